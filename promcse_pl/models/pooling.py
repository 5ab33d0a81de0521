"""Pooling: from token embeddings to one sentence embedding. The names are in `promcse_pl.config.pooling`."""

# B sentences, T tokens, D width

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def count_pooled_parts(pooling: str) -> int:
    """Return the number of embeddings that a pooling concatenates."""
    return pooling.count("+") + 1


def needs_all_layers(pooling: str) -> bool:
    """Return whether a pooling reads other layers than the last."""
    return pooling in ("avg_top2", "avg_first_last")


def needs_first_token(pooling: str) -> bool:
    """Return whether a pooling reads only the first token."""
    return pooling in ("cls", "cls_before_pooler")


def pool(states: Sequence[Tensor], mask_BT: Tensor, pooling: str) -> Tensor:
    """Reduce the token embeddings of each sentence to one embedding.

    Args:
        states: Hidden states (B, T, D) from the embedding output to the last layer. The last layer is sufficient unless
            `needs_all_layers`, and its first token, (B, 1, D), if `needs_first_token` and no sentence is padded at the start.
        mask_BT: 1 for real tokens, 0 for padding at the start or at the end. Prompt slots have no rows here.
        pooling: `cls` and `cls_before_pooler`: the first token (the two differ in the MLP head); `avg`: mean of the last
            layer's tokens; `avg_top2`: of the last two layers; `avg_first_last`: of the embedding output and the last layer;
            `max`: maximum of each entry; `mean_sqrt_len`: sum of the tokens divided by the square root of their number;
            `weightedmean`: mean weighted by the position, 1 for the first token; `lasttoken`: the last token. Several joined
            by `+` are concatenated.

    Returns:
        (B, D), or (B, n D) for n concatenated poolings.
    """
    last_BTD = states[-1]
    if pooling == "avg_top2":
        last_BTD = (last_BTD + states[-2]) / 2
    elif pooling == "avg_first_last":
        last_BTD = (last_BTD + states[0]) / 2
    parts = [_pool(last_BTD, mask_BT, part) for part in pooling.split("+")]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _pool(states_BTD: Tensor, mask_BT: Tensor, pooling: str) -> Tensor:
    if needs_first_token(pooling):
        return states_BTD[:, 0] if states_BTD.shape[1] == 1 else _at(states_BTD, mask_BT.argmax(1))
    if pooling == "lasttoken":
        return _at(states_BTD, mask_BT.cumsum(1).argmax(1))
    if pooling == "max":
        return states_BTD.masked_fill(mask_BT.unsqueeze(-1) == 0, float("-inf")).amax(1)
    weights_BT = mask_BT * mask_BT.cumsum(1) if pooling == "weightedmean" else mask_BT
    weights_BT1 = weights_BT.unsqueeze(-1).to(states_BTD.dtype)
    total_B1 = weights_BT1.sum(1)
    return (states_BTD * weights_BT1).sum(1) / (total_B1.sqrt() if pooling == "mean_sqrt_len" else total_B1)


def _at(states_BTD: Tensor, positions_B: Tensor) -> Tensor:
    """Return the token at a position of each sentence, (B, D)."""
    return states_BTD[torch.arange(states_BTD.shape[0], device=states_BTD.device), positions_B]
