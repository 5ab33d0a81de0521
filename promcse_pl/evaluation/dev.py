"""The dev score, which selects the best step: Spearman of pairs, nDCG@10 of a retrieval set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from promcse_pl.data.pairs import ScoredPairs
from promcse_pl.data.retrieval import DevSet, Text
from promcse_pl.evaluation.retrieval import score_queries
from promcse_pl.evaluation.sts import Embeddings, score_pairs, score_task, spearman

if TYPE_CHECKING:
    from promcse_pl.embedder import PromCSE


def dev_texts(dev: DevSet) -> tuple[Text, ...]:
    """Return all texts of a dev set, duplicates included."""
    return (*dev.first, *dev.second) if isinstance(dev, ScoredPairs) else dev.texts


def dev_score(dev: DevSet, embeddings: Embeddings) -> float:
    """Return the score of a dev set in its metric, in [-1, 1], from the embeddings of its texts."""
    if isinstance(dev, ScoredPairs):
        return score_task([dev], embeddings).all.spearman
    return float(score_queries(dev, embeddings)[dev.metric].mean())


def score_dev(model: PromCSE, dev: DevSet) -> float:
    """Encode a dev set and return its score, as `dev_score`; nothing is cached."""
    if isinstance(dev, ScoredPairs):
        return score_pairs(model.encode, dev).spearman
    from promcse_pl.evaluation.embeddings import encode_texts

    return dev_score(dev, encode_texts(model, dict.fromkeys(dev.texts)))


def highest_score(dev: DevSet) -> float:
    """Return the highest possible score: below 1 for pairs with equal scores, which no ranking of cosines can tie."""
    if isinstance(dev, ScoredPairs):
        return spearman(np.argsort(np.argsort(dev.gold, kind="stable")), dev.gold)
    return 1.0
