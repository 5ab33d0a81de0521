"""The energy-based hinge: the cosine of each positive must exceed that of the hardest negative by a margin."""

# B anchors, D width, C = 2B candidates

from __future__ import annotations

import torch
from torch import Tensor


def energy_hinge(
    anchor_BD: Tensor,
    positive_BD: Tensor,
    negative_BD: Tensor,
    *,
    margin: float,
) -> Tensor:
    """Mean hinge between each anchor's positive and its hardest negative, on cosines (Jiang et al. 2022, eq. 10-12).

        L = 1/B sum_i max(0, margin + max_n cos(anchor_i, negative_n) - cos(anchor_i, positive_i))

    The negatives of an anchor are the positives of all other anchors and all hard negatives of the batch, its own included.
    The gradient flows through both cosines.

    Args:
        anchor_BD, positive_BD, negative_BD: Unit vectors, one row per example.
        margin: Required cosine gap, in [0, 2].

    Returns:
        A scalar >= 0; 0 if every positive exceeds its hardest negative by the margin.
    """
    cosines_BB = anchor_BD @ positive_BD.T
    same_row_BB = torch.eye(len(anchor_BD), dtype=torch.bool, device=anchor_BD.device)
    wrong_BC = torch.cat([cosines_BB.masked_fill(same_row_BB, -torch.inf), anchor_BD @ negative_BD.T], dim=1)
    return (margin + wrong_BC.amax(dim=1) - cosines_BB.diagonal()).clamp(min=0).mean()
