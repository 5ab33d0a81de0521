"""Rank correlation between cosines and human scores."""

# n pairs

from __future__ import annotations

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from promcse_pl.utils.errors import DataError, NonFiniteError


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
