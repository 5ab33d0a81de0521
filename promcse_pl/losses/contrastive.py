"""NT-Xent: the contrastive cross-entropy of SimCSE and PromCSE."""

# B anchors, D width, C candidates (B without hard negatives, 2B with)

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def ntxent_logits(
    anchor_BD: Tensor,
    positive_BD: Tensor,
    negative_BD: Tensor | None = None,
    *,
    temperature: float,
    hard_negative_logit: float = 0.0,
) -> Tensor:
    """Return the logits of every candidate for every anchor, cos(anchor, candidate) / temperature.

    Args:
        anchor_BD, positive_BD, negative_BD: Unit vectors, one row per example; no negatives for pairs.
        temperature: Divides the cosines, > 0.
        hard_negative_logit: Added to the logit of each anchor's own hard negative (official --hard_negative_weight).

    Returns:
        (B, C): columns are the positives of the batch, then its hard negatives. The correct candidate of row i is column i.
    """
    scores_BC = anchor_BD @ positive_BD.T / temperature
    if negative_BD is None:
        return scores_BC
    negative_BB = anchor_BD @ negative_BD.T / temperature
    if hard_negative_logit:
        negative_BB = negative_BB + hard_negative_logit * torch.eye(
            len(anchor_BD), dtype=negative_BB.dtype, device=negative_BB.device
        )
    return torch.cat([scores_BC, negative_BB], dim=1)


def ntxent(logits_BC: Tensor) -> Tensor:
    """Mean cross-entropy of the correct candidate (Jiang et al. 2022, eq. 2 and 8).

        L = -1/B sum_i log(exp(logit_ii) / sum_c exp(logit_ic))

    Args:
        logits_BC: From `ntxent_logits`.

    Returns:
        A scalar >= 0.
    """
    return F.cross_entropy(logits_BC, torch.arange(len(logits_BC), device=logits_BC.device))
