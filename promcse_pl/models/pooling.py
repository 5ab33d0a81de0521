"""Pooling: from token embeddings to one sentence embedding."""

# B sentences, T tokens, D width

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

Pooling = Literal["cls", "cls_before_pooler", "avg", "avg_top2", "avg_first_last"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


def needs_all_layers(pooling: Pooling) -> bool:
    """Return whether a pooling reads other layers than the last."""
    return pooling in ("avg_top2", "avg_first_last")


def needs_first_token(pooling: Pooling) -> bool:
    """Return whether a pooling reads only the first token."""
    return pooling in ("cls", "cls_before_pooler")


def pool(states: Sequence[Tensor], mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """Reduce the token embeddings of each sentence to one embedding.

    Args:
        states: Hidden states (B, T, D) from the embedding output to the last layer. The last layer is sufficient unless
            `needs_all_layers`, and its first token, (B, 1, D), if `needs_first_token`.
        mask_BT: 1 for real tokens, 0 for padding. Prompt slots have no rows here.
        pooling: `cls` and `cls_before_pooler`: the first token (the two differ in the MLP head);
            `avg`: mean of the last layer's tokens; `avg_top2`: of the last two layers; `avg_first_last`: of the embedding
            output and the last layer.

    Returns:
        (B, D).
    """
    last_BTD = states[-1]
    if needs_first_token(pooling):
        return last_BTD[:, 0]
    if pooling == "avg_top2":
        last_BTD = (last_BTD + states[-2]) / 2
    elif pooling == "avg_first_last":
        last_BTD = (last_BTD + states[0]) / 2
    mask_BT1 = mask_BT.unsqueeze(-1).to(last_BTD.dtype)
    return (last_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
