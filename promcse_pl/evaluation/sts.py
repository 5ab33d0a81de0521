"""Semantic textual similarity by the protocol of SentEval: cosines of sentence pairs against human scores.

A task's score is "all": Spearman over the pairs of all its subsets together.
"""

# n pairs, N sentences, D width

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from promcse_pl.data.pairs import ScoredPairs
from promcse_pl.data.retrieval import Text
from promcse_pl.utils.errors import DataError, NonFiniteError

Encode = Callable[[Sequence[str]], NDArray[np.float32]]
"""Unit embeddings (N, D) of N sentences."""
Embeddings = Mapping[Text, NDArray[np.float32]]
"""The unit embedding (D,) of each text."""
LOWEST_PLAUSIBLE = 0.05
"""Spearman correlation that every pre-trained encoder exceeds on pairs whose scores mean similarity."""


@dataclass(frozen=True, slots=True)
class PairScores:
    """Correlations of one set of pairs, in [-1, 1]."""

    pairs: int
    spearman: float
    pearson: float


@dataclass(frozen=True, slots=True)
class TaskScores:
    """A task's correlations, in [-1, 1].

    Attributes:
        all: Over the pairs of all subsets together: the score in the papers.
        subsets: Of each subset.
    """

    all: PairScores
    subsets: dict[str, PairScores]

    def mean(self, measure: str = "spearman", *, weighted: bool = False) -> float:
        """Return the mean over the subsets, weighted by their pairs if asked."""
        weights = [subset.pairs if weighted else 1 for subset in self.subsets.values()]
        return float(np.average([getattr(subset, measure) for subset in self.subsets.values()], weights=weights))


def checked(predicted: ArrayLike, gold: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both sides as float64 if a correlation of them is defined; errors as `spearman`."""
    predicted_n, gold_n = np.asarray(predicted, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if len(predicted_n) != len(gold_n) or len(gold_n) < 2:
        raise DataError(f"a correlation needs two or more pairs, got {len(predicted_n)} and {len(gold_n)} values")
    for name, values_n, error in (("similarities", predicted_n, NonFiniteError), ("gold scores", gold_n, DataError)):
        if not np.isfinite(values_n).all():
            raise error(f"{int((~np.isfinite(values_n)).sum())} of {len(values_n)} {name} are not finite")
    for name, values_n in (("similarities", predicted_n), ("gold scores", gold_n)):
        if np.ptp(values_n) == 0:
            raise DataError(f"all {len(values_n)} {name} equal {values_n[0]}: a correlation is not defined")
    return predicted_n, gold_n


def spearman(predicted: ArrayLike, gold: ArrayLike) -> float:
    """Return Spearman's rank correlation in [-1, 1], ties by mean rank.

    Raises:
        DataError: Fewer than two pairs, a gold score that is not finite, or all values of one side equal.
        NonFiniteError: A similarity is NaN or infinite.
    """
    return float(scipy.stats.spearmanr(*checked(predicted, gold)).statistic)


def pearson(predicted: ArrayLike, gold: ArrayLike) -> float:
    """Return Pearson's correlation in [-1, 1]; errors as `spearman`."""
    return float(scipy.stats.pearsonr(*checked(predicted, gold)).statistic)


def score_warning(score: float, data: str) -> str | None:
    """Return a warning if a Spearman correlation suggests wrong columns or a reversed score scale, else None.

    Args:
        score: Correlation in [-1, 1] of a pre-trained encoder, with or without an adapter.
        data: The files or settings to check, for the message.
    """
    if score >= LOWEST_PLAUSIBLE:
        return None
    return (
        f"Spearman {100 * score:.2f}, but a pre-trained encoder usually scores well above 0. Check the columns of {data}, and "
        "that higher scores mean more similar"
    )


def cosines(pairs: ScoredPairs, embeddings: Embeddings) -> NDArray[np.float64]:
    """Return the cosine of each pair; exactly 1 for twice the same sentence, so that rounding does not rank such pairs."""
    first = np.stack([embeddings[sentence] for sentence in pairs.first]).astype(np.float64)
    second = np.stack([embeddings[sentence] for sentence in pairs.second]).astype(np.float64)
    products: NDArray[np.float64] = np.einsum("nd,nd->n", first, second)
    lengths: NDArray[np.float64] = np.sqrt(np.einsum("nd,nd->n", first, first) * np.einsum("nd,nd->n", second, second))
    return products / lengths


def encode_distinct(encode: Encode, groups: Iterable[ScoredPairs]) -> Embeddings:
    """Encode every distinct sentence of all groups once, in one call."""
    distinct = sorted({sentence for group in groups for sentence in (*group.first, *group.second)})
    return dict(zip(distinct, encode(distinct), strict=True))


def score_pairs(encode: Encode, pairs: ScoredPairs) -> PairScores:
    """Encode one set of pairs and correlate its cosines with the gold scores."""
    return score_task([pairs], encode_distinct(encode, [pairs])).all


def score_task(subsets: Sequence[ScoredPairs], embeddings: Embeddings) -> TaskScores:
    """Score a task from the embeddings of its sentences."""
    predicted = [cosines(subset, embeddings) for subset in subsets]
    gold = [score for subset in subsets for score in subset.gold]
    return TaskScores(
        _correlations(np.concatenate(predicted), gold),
        {subset.name: _correlations(cosine, subset.gold) for subset, cosine in zip(subsets, predicted, strict=True)},
    )


def _correlations(predicted: NDArray[np.float64], gold: Sequence[float]) -> PairScores:
    return PairScores(len(gold), spearman(predicted, gold), pearson(predicted, gold))
