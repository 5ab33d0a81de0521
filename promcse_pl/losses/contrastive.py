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


def weight_by_hardness(logits_BC: Tensor, hardness: float) -> Tensor:
    """Return the logits of NT-Xent with its negatives weighted by their similarity (Robinson et al. 2021, eq. 4 with tau+ = 0).

        weight_ic = exp(hardness * logit_ic) / mean over the negatives n of exp(hardness * logit_in)

    The weights have a gradient, as in the authors' code.

    Args:
        logits_BC: From `ntxent_logits`; -inf for excluded candidates.
        hardness: Beta >= 0; 0 weights all negatives equally.
    """
    correct_BC = torch.eye(*logits_BC.shape, dtype=torch.bool, device=logits_BC.device)
    negatives_BC = ~correct_BC & logits_BC.isfinite()
    weights_BC = hardness * logits_BC  # logarithms
    # not -inf: the gradient of a row without negatives would be NaN
    among_negatives_BC = weights_BC.masked_fill(~negatives_BC, torch.finfo(logits_BC.dtype).min)
    count_B1 = negatives_BC.sum(1, keepdim=True, dtype=logits_BC.dtype).clamp(min=1)
    log_mean_B1 = among_negatives_BC.logsumexp(1, keepdim=True) - count_B1.log()
    return torch.where(negatives_BC, logits_BC + weights_BC - log_mean_B1, logits_BC)
