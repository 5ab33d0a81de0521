"""The training loss: the weighted sum of its terms."""

# B anchors, D width, M masked tokens, V vocabulary

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import reduce

from torch import Tensor
from torch.nn import functional as F

from promcse_pl.config import LossConfig
from promcse_pl.losses.contrastive import ntxent, ntxent_logits
from promcse_pl.losses.cosent import cosent
from promcse_pl.losses.hinge import energy_hinge

MLM_DECAY, MLM_DECAY_STEPS = 0.95, 100
"""The MLM weight is multiplied by this factor every `MLM_DECAY_STEPS` steps (official code)."""


@dataclass(frozen=True, slots=True)
class LossParts:
    """The total loss and its weighted terms, scalars; None for a term that is not used."""

    total: Tensor
    contrastive: Tensor | None = None
    cosent: Tensor | None = None
    hinge: Tensor | None = None
    mlm: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Return the terms that are used, by name."""
        names = ("contrastive", "cosent", "hinge", "mlm")
        parts = {"loss": self.total, **{name: getattr(self, name) for name in names}}
        return {name: part for name, part in parts.items() if part is not None}


def mlm_loss(scores_MV: Tensor, labels_M: Tensor) -> Tensor:
    """Mean cross-entropy over the masked tokens.

    Args:
        scores_MV: Scores of the vocabulary for each masked token.
        labels_M: Their token ids.

    Returns:
        A scalar >= 0; 0 (with a zero gradient) without masked tokens.
    """
    if len(labels_M) == 0:
        return scores_MV.sum()
    return F.cross_entropy(scores_MV, labels_M)


def mlm_weight_at(step: int, weight: float) -> float:
    """Return the weight of the MLM term at an optimiser step, counted from 0."""
    return float(weight * MLM_DECAY ** (step / MLM_DECAY_STEPS))


def hybrid_loss(
    anchor_BD: Tensor,
    positive_BD: Tensor,
    negative_BD: Tensor | None,
    config: LossConfig,
    *,
    scores_B: Tensor | None = None,
    mlm: Tensor | None = None,
) -> LossParts:
    """Sum the loss terms (Jiang et al. 2022, eq. 12, and the official code's MLM term).

        L = L_NT-Xent + lambda * L_hinge + w_mlm * L_MLM

    Args:
        anchor_BD, positive_BD, negative_BD: Unnormalised embeddings, one row per example; no negatives for pairs.
        config: Weights and parameters of the terms. Its `hinge_weight` must be 0 without hard negatives; its `mlm_weight` is not
            used, since that weight depends on the step.
        scores_B: Scores of the pairs, which are then trained with CoSENT in place of NT-Xent; None for rows without scores.
        mlm: The weighted MLM loss, or None.

    Returns:
        The total and its weighted terms.

    Raises:
        ValueError: hinge_weight is not 0 without hard negatives.
    """
    if negative_BD is None and config.hinge_weight:
        raise ValueError("the energy hinge needs hard negatives (triplets); set hinge_weight to 0 for pairs")
    anchor_BD, positive_BD = F.normalize(anchor_BD, dim=1), F.normalize(positive_BD, dim=1)
    negative_BD = None if negative_BD is None else F.normalize(negative_BD, dim=1)
    terms: dict[str, Tensor] = {}
    if scores_B is not None:
        cosines_B = (anchor_BD * positive_BD).sum(1)
        terms["cosent"] = cosent(cosines_B, scores_B, temperature=config.temperature)
    else:
        terms |= _contrastive_terms(anchor_BD, positive_BD, negative_BD, config)
    if mlm is not None:
        terms["mlm"] = mlm
    return LossParts(reduce(operator.add, terms.values()), **terms)


def _contrastive_terms(
    anchor_BD: Tensor, positive_BD: Tensor, negative_BD: Tensor | None, config: LossConfig
) -> dict[str, Tensor]:
    """Return NT-Xent and, with hard negatives, the weighted hinge; the embeddings are unit vectors."""
    logits_BC = ntxent_logits(
        anchor_BD,
        positive_BD,
        negative_BD,
        temperature=config.temperature,
        hard_negative_logit=config.hard_negative_logit,
    )
    terms = {"contrastive": ntxent(logits_BC)}
    if negative_BD is not None and config.hinge_weight:
        hinge = energy_hinge(anchor_BD, positive_BD, negative_BD, margin=config.margin)
        terms["hinge"] = config.hinge_weight * hinge
    return terms
