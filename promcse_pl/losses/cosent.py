"""CoSENT: the order of the cosines of pairs must be the order of their scores."""

# B pairs

from __future__ import annotations

import torch
from torch import Tensor


def cosent(cosines_B: Tensor, scores_B: Tensor, *, temperature: float) -> Tensor:
    """CoSENT loss: log-sum-exp over all pairs of rows with different scores (Su 2022, https://kexue.fm/archives/8847).

        L = log(1 + sum_{s_i > s_j} exp((cos_j - cos_i) / temperature))

    Only the order of the scores matters, so their scale is arbitrary. Rows with equal scores are not compared.

    Args:
        cosines_B: Cosine of the two texts of each pair.
        scores_B: Their scores, higher is more similar.
        temperature: Divides the differences of cosines, > 0; the usual scale of 20 is 0.05.

    Returns:
        A scalar >= 0; 0 (with a zero gradient) if all scores are equal.
    """
    gaps_BB = (cosines_B.unsqueeze(0) - cosines_B.unsqueeze(1)) / temperature
    in_order_BB = scores_B.unsqueeze(1) > scores_B.unsqueeze(0)
    compared_BB = gaps_BB.masked_fill(~in_order_BB, -torch.inf)  # selecting them would wait for a GPU
    return torch.cat([gaps_BB.new_zeros(1), compared_BB.flatten()]).logsumexp(0)
