"""The energy-based hinge: each positive must beat the hardest negative by a margin."""

# B anchors, D width

from __future__ import annotations

import torch
from torch import Tensor


def energy_hinge(anchor_BD: Tensor, positive_BD: Tensor, negative_BD: Tensor, *, margin: float) -> Tensor:
    """Mean hinge between each anchor's positive and its hardest negative, on cosines.

    The negatives of an anchor are the positives of all other anchors and all hard negatives of the batch, its own included
    (Jiang et al. 2022, eq. 10-12). The gradient flows through both cosines.

    Args:
        anchor_BD, positive_BD, negative_BD: Unit vectors, one row per example.
        margin: Cosine gap that is demanded, in [0, 2].

    Returns:
        A scalar >= 0; 0 when every positive wins by the margin.
    """
    cosines_BB = anchor_BD @ positive_BD.T
    own_BB = torch.eye(len(anchor_BD), dtype=torch.bool, device=anchor_BD.device)
    wrong_BC = torch.cat([cosines_BB.masked_fill(own_BB, -torch.inf), anchor_BD @ negative_BD.T], dim=1)
    return (margin + wrong_BC.amax(dim=1) - cosines_BB.diagonal()).clamp(min=0).mean()
