"""Semantic textual similarity by the protocol of SentEval, as the papers of the field print it.

Sentences are split at white space and joined with one space, not lower-cased and not cut below the encoder's limit. A task's
score is "all": Spearman over the pairs of all its subsets together. The average is the mean of the tasks' scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from promcse_pl.data.pairs import TASKS, ScoredPairs, load_task
from promcse_pl.utils.errors import DataError, NonFiniteError

Encode = Callable[[Sequence[str]], NDArray[np.float32]]
"""Unit vectors (N, D) of N sentences."""
Embeddings = Mapping[str, NDArray[np.float32]]
"""The unit vector (D,) of each sentence."""


def checked(predicted: ArrayLike, gold: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both sides as float64 after looking whether a correlation of them is defined; errors as `spearman`."""
    predicted_n, gold_n = np.asarray(predicted, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if len(predicted_n) != len(gold_n) or len(gold_n) < 2:
        raise DataError(f"a correlation needs two or more pairs, got {len(predicted_n)} and {len(gold_n)} values")
    if not np.isfinite(predicted_n).all():
        raise NonFiniteError(
            f"{int((~np.isfinite(predicted_n)).sum())} of {len(predicted_n)} similarities are not finite"
        )
    if not np.isfinite(gold_n).all():
        raise DataError(f"{int((~np.isfinite(gold_n)).sum())} of {len(gold_n)} gold scores are not finite")
    for name, values in (("similarities", predicted_n), ("gold scores", gold_n)):
        if np.ptp(values) == 0:
            raise DataError(f"all {len(values)} {name} equal {values[0]}: a correlation is not defined")
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
        all: Over the pairs of all subsets together: what the papers print.
        subsets: Of each subset.
    """

    all: PairScores
    subsets: dict[str, PairScores]

    def mean(self, measure: str = "spearman", *, weighted: bool = False) -> float:
        """Return the mean over the subsets, weighted by their pairs if asked."""
        weights = [subset.pairs if weighted else 1 for subset in self.subsets.values()]
        return float(np.average([getattr(subset, measure) for subset in self.subsets.values()], weights=weights))


def encode_distinct(encode: Encode, groups: Iterable[ScoredPairs]) -> dict[str, NDArray[np.float32]]:
    """Encode every distinct sentence of all groups once, in one call."""
    distinct = sorted({sentence for group in groups for sentence in (*group.first, *group.second)})
    return dict(zip(distinct, encode(distinct), strict=True))


def cosines(pairs: ScoredPairs, vectors: Embeddings) -> NDArray[np.float64]:
    """Return the cosine of each pair; exactly 1 for twice the same sentence, so that rounding does not rank such pairs."""
    first = np.stack([vectors[sentence] for sentence in pairs.first]).astype(np.float64)
    second = np.stack([vectors[sentence] for sentence in pairs.second]).astype(np.float64)
    products: NDArray[np.float64] = np.einsum("nd,nd->n", first, second)
    lengths: NDArray[np.float64] = np.sqrt(np.einsum("nd,nd->n", first, first) * np.einsum("nd,nd->n", second, second))
    return products / lengths


def score_pairs(encode: Encode, pairs: ScoredPairs) -> PairScores:
    """Encode one set of pairs and correlate its cosines with the gold scores."""
    return _correlate(cosines(pairs, encode_distinct(encode, [pairs])), pairs.gold)


def _correlate(predicted: NDArray[np.float64], gold: Sequence[float]) -> PairScores:
    return PairScores(len(gold), spearman(predicted, gold), pearson(predicted, gold))


def evaluate_sts(encode: Encode, senteval: str | Path, tasks: Sequence[str] = TASKS) -> dict[str, TaskScores]:
    """Score an encoder on STS tasks.

    Args:
        encode: Gives unit vectors.
        senteval: SentEval's data folder.
        tasks: Of `TASKS`.

    Returns:
        The scores by task, in the order of `tasks`.
    """
    return score_groups(encode, {task: load_task(senteval, task) for task in tasks})


def score_groups(encode: Encode, groups: Mapping[str, Sequence[ScoredPairs]]) -> dict[str, TaskScores]:
    """Score an encoder on tasks of one or more subsets; every distinct sentence of all tasks is encoded once."""
    vectors = encode_distinct(encode, [subset for subsets in groups.values() for subset in subsets])
    return {task: score_task(subsets, vectors) for task, subsets in groups.items()}


def score_task(subsets: Sequence[ScoredPairs], vectors: Embeddings) -> TaskScores:
    """Score a task whose sentences have been encoded."""
    predicted = [cosines(subset, vectors) for subset in subsets]
    gold = [score for subset in subsets for score in subset.gold]
    return TaskScores(
        _correlate(np.concatenate(predicted), gold),
        {subset.name: _correlate(cosine, subset.gold) for subset, cosine in zip(subsets, predicted, strict=True)},
    )
