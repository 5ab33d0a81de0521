"""Geometry of embeddings on the unit sphere: alignment, uniformity, anisotropy and effective rank."""

# N sentences or pairs, D width

from __future__ import annotations

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from promcse_pl.utils.errors import DataError

Units = NDArray[np.floating]
POSITIVE = 4.0
"""Least gold score, of 0 to 5, of a pair that counts as positive."""
BLOCK_ROWS = 512
"""Rows whose products with all others are in memory at once."""


def alignment(first_ND: Units, second_ND: Units) -> float:
    """Return the mean squared distance of positive pairs, in [0, 4]; lower is closer (Wang and Isola 2020, alpha = 2).

    Args:
        first_ND, second_ND: Unit vectors; row n of both is a positive pair.

    Raises:
        DataError: There is no pair.
    """
    if not len(first_ND):
        raise DataError(f"alignment needs positive pairs (gold score {POSITIVE:g} or more), and there is none")
    differences_ND = first_ND.astype(np.float64) - second_ND
    return float(np.einsum("nd,nd->n", differences_ND, differences_ND).mean())


def uniformity(vectors_ND: Units) -> float:
    """Return log E exp(-2 |x - y|^2) over all pairs of distinct sentences, in [-8, 0]; lower is more evenly spread.

    Wang and Isola 2020 with t = 2. All pairs are used, without sampling.

    Args:
        vectors_ND: Unit vectors of distinct sentences, N >= 2.
    """
    vectors_ND = _wide(vectors_ND)
    total = 0.0
    for start in range(0, len(vectors_ND), BLOCK_ROWS):
        products = vectors_ND[start : start + BLOCK_ROWS] @ vectors_ND.T
        total += float(np.exp(4 * products - 4).sum())  # |x - y|^2 = 2 - 2 xy
    itself = float(np.exp(4 * np.einsum("nd,nd->n", vectors_ND, vectors_ND) - 4).sum())
    return float(np.log((total - itself) / (len(vectors_ND) * (len(vectors_ND) - 1))))


def mean_cosine(vectors_ND: Units) -> float:
    """Return the mean cosine of two different sentences, in [-1, 1]: anisotropy (Ethayarajh 2019); 0 is isotropic.

    Over all pairs instead of random ones: their products add up to |sum of x|^2.

    Args:
        vectors_ND: Unit vectors of distinct sentences, N >= 2.
    """
    vectors_ND = _wide(vectors_ND)
    sum_D = vectors_ND.sum(0)
    itself = np.einsum("nd,nd->", vectors_ND, vectors_ND)
    return float((sum_D @ sum_D - itself) / (len(vectors_ND) * (len(vectors_ND) - 1)))


def effective_rank(vectors_ND: Units) -> float:
    """Return the effective rank of the embedding matrix, in [1, min(N, D)] (Roy and Vetterli 2007).

    It is exp of the entropy of the singular values scaled to sum 1; the vectors are not centred.

    Args:
        vectors_ND: Unit vectors of distinct sentences, N >= 2.
    """
    singular = np.linalg.svd(_wide(vectors_ND), compute_uv=False)
    return float(np.exp(scipy.special.entr(singular / singular.sum()).sum()))


def cosine_density(cosines_N: Units, gold_N: ArrayLike) -> dict[str, list[float]]:
    """Return the density of the cosines of pairs by gold score: the paper's figure 3.

    Args:
        cosines_N: Cosine of each pair.
        gold_N: Their human scores, in [0, 5].

    Returns:
        `cosine`: a grid in [-1, 1]; and on this grid the density (Gaussian kernel, Scott's width) of the pairs of each range of
        scores: `0-1` ... `4-5`. Ranges with fewer than 3 different cosines are omitted.
    """
    grid = np.linspace(-1, 1, 201)
    bin_N = np.minimum(np.asarray(gold_N).astype(int), 4)
    curves = {"cosine": grid.round(2).tolist()}
    for low in range(5):
        part_n = cosines_N[bin_N == low]
        if len(np.unique(part_n)) >= 3:
            curves[f"{low}-{low + 1}"] = scipy.stats.gaussian_kde(part_n)(grid).round(4).tolist()
    return curves


def _wide(vectors_ND: Units) -> NDArray[np.float64]:
    if len(vectors_ND) < 2:
        raise DataError(f"the spread of vectors needs two or more distinct sentences, got {len(vectors_ND)}")
    return vectors_ND.astype(np.float64)
