"""Token masking for the auxiliary masked-language-model task."""

# B sentences, T tokens, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor

MASKED_SHARE, MASK_SHARE, RANDOM_SHARE = 0.15, 0.8, 0.1
"""15 % of the tokens are predicted; of these 80 % become [MASK], 10 % a random token, 10 % stay (Devlin et al. 2019)."""
IGNORED = -100
"""The label of a token that is not predicted."""


def mask_tokens(
    ids_BT: Tensor, special_BT: Tensor, *, mask_id: int, vocabulary: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mask 15 % of the ordinary tokens.

    Args:
        ids_BT: Token ids.
        special_BT: True for special tokens and padding, which are never masked.
        mask_id: Id of the mask token.
        vocabulary: V; random tokens are drawn from [0, V).
        generator: Random number generator.

    Returns:
        Masked token ids, and labels: the original id where it is predicted, `IGNORED` elsewhere.
    """
    chosen_BT = (torch.rand(ids_BT.shape, generator=generator) < MASKED_SHARE) & ~special_BT
    fate_BT = torch.rand(ids_BT.shape, generator=generator)
    random_BT = torch.randint(vocabulary, ids_BT.shape, generator=generator)
    masked_BT = torch.where(chosen_BT & (fate_BT < MASK_SHARE), mask_id, ids_BT)
    masked_BT = torch.where(chosen_BT & (fate_BT >= 1 - RANDOM_SHARE), random_BT, masked_BT)
    return masked_BT, torch.where(chosen_BT, ids_BT, IGNORED)
