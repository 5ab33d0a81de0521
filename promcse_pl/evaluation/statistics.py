"""Uncertainty of scores: bootstrap over pairs, confidence intervals over seeds, differences with a verdict."""

# n pairs, b resamples, g groups of equal values

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from promcse_pl.evaluation.sts import checked
from promcse_pl.utils.errors import DataError

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
RESAMPLES, SEED, LEVEL = 1000, 0, 0.95
"""Resamples of a bootstrap, seed of their draws, and the confidence level of intervals."""
BLOCK_ENTRIES = 2**19
"""Resamples x pairs in memory at once."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference of two scores with its uncertainty, in the unit of the scores.

    Attributes:
        value: Second minus first.
        low, high: Confidence interval; None if all seeds have equal scores.
        p: Two-sided p-value of no difference; None as above.
        over: Resamples or seeds behind the interval, such as "1000 resamples".
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    over: str

    @property
    def verdict(self) -> str:
        """The difference in words, such as "+0.31 [0.05, 0.58] over 5 seeds: better"."""
        if self.low is None or self.high is None:
            return f"{self.value:+.2f} over {self.over}: no interval, so no verdict"
        word = "better" if self.low > 0 else "worse" if self.high < 0 else "not significant"
        return f"{self.value:+.2f} [{self.low:.2f}, {self.high:.2f}] over {self.over}: {word}"


def resample_counts(
    pairs: int, *, resamples: int = RESAMPLES, seed: int | Sequence[int] = SEED
) -> Iterator[NDArray[np.int64]]:
    """Draw bootstrap resamples of `pairs` pairs, each as large as the original and with replacement.

    Yields:
        (b, n) int64 blocks: how often each resample holds each pair. The draws depend on pairs, resamples and seed alone, so
        that several models scored with the same three see the same resamples.
    """
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK_ENTRIES // pairs)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn_bn = rng.integers(pairs, size=(rows, pairs)) + pairs * np.arange(rows)[:, None]
        yield np.bincount(drawn_bn.ravel(), minlength=rows * pairs).reshape(rows, pairs)


class CountedSpearman:
    """Spearman's correlation of many resamples of a set of pairs, ties by mean rank, without sorting each of them.

    The pairs are sorted once; a running sum of the counts in that order gives the mean rank of every value in every resample.

    Args:
        predicted, gold: (n,) similarities and human scores.

    Raises:
        DataError, NonFiniteError: As `promcse_pl.evaluation.sts.spearman`.
    """

    def __init__(self, predicted: ArrayLike, gold: ArrayLike) -> None:
        self._sides = [_Groups(side_n) for side_n in checked(predicted, gold)]

    def __call__(self, counts_bn: Counts) -> Floats:
        """Return (b,) correlations in [-1, 1]; NaN for a resample with all values of one side equal."""
        size_b = counts_bn.sum(1, keepdims=True)
        # ranks around their mean, which is (size + 1) / 2 whatever ties
        (first_bn, first_b), (second_bn, second_b) = (side.ranks(counts_bn, (size_b + 1) / 2) for side in self._sides)
        products_b: Floats = np.einsum("bn,bn,bn->b", counts_bn, first_bn, second_bn)
        with np.errstate(invalid="ignore"):
            return products_b / np.sqrt(first_b * second_b)


class _Groups:
    """One side of the pairs, grouped by equal values in ascending order."""

    def __init__(self, values_n: Floats) -> None:
        self._order_n = np.argsort(values_n, kind="stable")
        ordered_n = values_n[self._order_n]
        self._starts_g = np.flatnonzero(np.r_[True, ordered_n[1:] > ordered_n[:-1]])
        _, self._group_n = np.unique(values_n, return_inverse=True)

    def ranks(self, counts_bn: Counts, middle_b1: Floats) -> tuple[Floats, Floats]:
        """Return (b, n) mean ranks minus `middle_b1`, and (b,) their sums of squares."""
        counts_bg = np.add.reduceat(counts_bn[:, self._order_n], self._starts_g, axis=1)
        # a group's mean rank: all counts before it, and half of its own
        ranks_bg = np.cumsum(counts_bg, axis=1) - (counts_bg - 1) / 2 - middle_b1
        return ranks_bg[:, self._group_n], np.einsum("bg,bg,bg->b", counts_bg, ranks_bg, ranks_bg)


def bootstrap_spearman(
    predicted: ArrayLike, gold: ArrayLike, *, resamples: int = RESAMPLES, seed: int | Sequence[int] = SEED
) -> Floats:
    """Return Spearman's correlation of bootstrap resamples of the pairs.

    Args:
        predicted, gold: (n,) similarities and human scores.
        resamples: Number of resamples, at least 1.
        seed: Of the draws, see `resample_counts`.

    Returns:
        (resamples,) values in [-1, 1]; NaN for a resample with all values of one side equal (a handful of pairs only).
    """
    score = CountedSpearman(predicted, gold)
    blocks = resample_counts(len(np.asarray(gold)), resamples=resamples, seed=seed)
    return np.concatenate([score(counts_bn) for counts_bn in blocks])


def interval(values_b: Floats, level: float = LEVEL) -> tuple[float, float]:
    """Return the percentile interval (Efron 1979) of bootstrap values; NaN values are left out.

    Raises:
        DataError: Every value is NaN.
    """
    kept_b = values_b[np.isfinite(values_b)]
    if not len(kept_b):
        raise DataError("no resample of these few pairs has a correlation. A bootstrap needs more pairs")
    low, high = np.quantile(kept_b, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(value: float, differences_b: Floats, over: str) -> Difference:
    """Judge the difference of two models that were scored on the same resamples (Efron and Tibshirani 1993).

    The p-value is twice the smaller share of resamples on one side of zero, one of them added to both the count and the number
    of resamples, so that it is never 0 (Davison and Hinkley 1997, section 4.2).

    Args:
        value: Second minus first, on the data as they are.
        differences_b: The same of every resample; NaN values are left out.
        over: Description of the resamples.
    """
    low, high = interval(differences_b)
    kept_b = differences_b[np.isfinite(differences_b)]
    least = min(int((kept_b <= 0).sum()), int((kept_b >= 0).sum()))
    return Difference(value, low, high, min(1.0, 2 * (least + 1) / (len(kept_b) + 1)), over)


def mean_over_seeds(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Return mean, standard deviation (n - 1) and Student's t interval of the scores of two or more seeds."""
    if len(values) < 2:
        raise DataError(f"a spread over seeds needs two or more runs, got {len(values)}")
    mean, std = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * std / len(values) ** 0.5
    return mean, std, mean - half, mean + half


def seed_difference(first: Sequence[float], second: Sequence[float], *, is_paired: bool = False) -> Difference:
    """Judge the difference between the mean scores of two groups of seeds by Welch's t-test.

    A group of one counts as a fixed number (a frozen encoder, a published checkpoint); then it is Student's test of the other
    group against that number.

    Args:
        first, second: Scores of the seeds.
        is_paired: Whether both groups have the same seeds in the same order; then it is Student's paired test.

    Raises:
        DataError: Both groups are of one.
    """
    value = float(np.mean(second) - np.mean(first))
    seeds = sorted({len(group) for group in (first, second) if len(group) > 1})
    if not seeds:
        raise DataError("a difference over seeds needs a group of two or more seeds, got two single scores")
    over = f"{' and '.join(map(str, seeds))} {'paired ' * is_paired}seeds"
    spread = [np.subtract(second, first)] if is_paired else [first, second]
    if not any(np.ptp(group) for group in spread):
        return Difference(value, None, None, None, over)  # seeds that agree to the last digit, as accuracies can
    test: Any
    if is_paired:
        test = scipy.stats.ttest_rel(second, first)
    elif len(first) > 1 and len(second) > 1:
        test = scipy.stats.ttest_ind(second, first, equal_var=False)
    else:
        test = scipy.stats.ttest_1samp(np.subtract.outer(second, first).ravel(), 0.0)
    low, high = test.confidence_interval(LEVEL)
    return Difference(value, float(low), float(high), float(test.pvalue), over)
