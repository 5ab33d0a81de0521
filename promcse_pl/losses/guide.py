"""What a guide, the frozen encoder without a prompt, contributes to the loss: a mask of false negatives."""

# B anchors, D width, C candidates (B without hard negatives, 2B with)

from __future__ import annotations

import torch
from torch import Tensor


def candidate_cosines(anchor_BD: Tensor, positive_BD: Tensor, negative_BD: Tensor | None = None) -> Tensor:
    """Return the cosine of every anchor with every candidate, in the column order of `ntxent_logits`.

    Args:
        anchor_BD, positive_BD, negative_BD: Unit vectors, one row per example; no negatives for pairs.

    Returns:
        (B, C): columns are the positives of the batch, then its hard negatives.
    """
    return anchor_BD @ (positive_BD if negative_BD is None else torch.cat([positive_BD, negative_BD])).T


def false_negatives(guide_BC: Tensor) -> Tensor:
    """Return which candidates are probably no negatives (GISTEmbed; Solatorio 2024, section 3).

        mask_ic = cos_guide(anchor_i, candidate_c) > cos_guide(anchor_i, positive_i)

    Args:
        guide_BC: Cosines of the guide, from `candidate_cosines`.

    Returns:
        (B, C) boolean; False for the positive of each row.
    """
    return guide_BC > guide_BC.diagonal().unsqueeze(1)
