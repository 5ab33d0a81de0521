"""False negatives according to a guide, the frozen encoder without a prompt."""

# B anchors, D width, C candidates (B without hard negatives, 2B with)

from __future__ import annotations

import torch
from torch import Tensor

GUIDE_ROUNDING = 1e-3
"""Upper bound of the rounding of a cosine of the guide, whose unit vectors are stored as float16."""


def candidate_cosines(anchor_BD: Tensor, positive_BD: Tensor, negative_BD: Tensor | None = None) -> Tensor:
    """Return the cosine of every anchor with every candidate, in the column order of `ntxent_logits`.

    Args:
        anchor_BD, positive_BD, negative_BD: Unit vectors, one row per example; no negatives for pairs.

    Returns:
        (B, C): columns are the positives of the batch, then its hard negatives.
    """
    return anchor_BD @ (positive_BD if negative_BD is None else torch.cat([positive_BD, negative_BD])).T


def false_negatives(guide_BC: Tensor) -> Tensor:
    """Return the mask of probable false negatives (GISTEmbed; Solatorio 2024, section 3).

        mask_ic = cos_guide(anchor_i, candidate_c) >= cos_guide(anchor_i, positive_i) - 0.001,  c != i

    GISTEmbed has no margin. With it, a copy of the positive in another row is a false negative in spite of the rounding of the
    guide to float16.

    Args:
        guide_BC: Cosines of the guide, from `candidate_cosines`.

    Returns:
        (B, C) boolean; False for the positive of each row.
    """
    mask_BC = guide_BC >= guide_BC.diagonal().unsqueeze(1) - GUIDE_ROUNDING
    return mask_BC.fill_diagonal_(False)
