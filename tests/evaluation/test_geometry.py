"""Geometry: hand-computed values on few embeddings, theoretical values on many."""

import numpy as np
import pytest

from promcse_pl.evaluation import geometry
from promcse_pl.evaluation.geometry import alignment, effective_rank, mean_cosine, uniformity
from promcse_pl.utils.errors import DataError


def random_units(rows: int, width: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


AXES = np.eye(3, dtype=np.float32)


def test_alignment_is_the_mean_squared_distance_of_pairs():
    assert alignment(AXES, AXES) == 0
    assert alignment(AXES, -AXES) == pytest.approx(4)
    assert alignment(AXES, AXES[[0, 2, 1]]) == pytest.approx(4 / 3)  # orthogonal units are sqrt(2) apart


@pytest.mark.parametrize("block", [7, 512])
def test_uniformity_and_mean_cosine_are_those_of_a_loop_over_all_pairs(block, monkeypatch):
    monkeypatch.setattr(geometry, "BLOCK_ROWS", block)
    vectors = random_units(40, 5).astype(np.float64)
    pairs = [(a, b) for position, a in enumerate(vectors) for b in vectors[:position]]
    looped = np.log(np.mean([np.exp(-2 * ((a - b) ** 2).sum()) for a, b in pairs]))
    assert uniformity(vectors) == pytest.approx(looped, abs=1e-7)  # float32 units are not quite of length 1
    assert mean_cosine(vectors) == pytest.approx(np.mean([a @ b for a, b in pairs]), abs=1e-9)


def test_geometry_of_equal_and_of_opposite_embeddings():
    point = np.repeat(AXES[:1], 4, axis=0)
    assert (uniformity(point), mean_cosine(point), effective_rank(point)) == pytest.approx((0, 1, 1), abs=1e-6)
    poles = np.array([[1, 0], [-1, 0]], dtype=np.float32)
    assert (uniformity(poles), mean_cosine(poles)) == pytest.approx((-8, -1))


def test_evenly_spread_vectors_have_no_mean_cosine_and_fill_all_dimensions():
    vectors = random_units(4000, 16)
    assert mean_cosine(vectors) == pytest.approx(0, abs=0.002)
    assert effective_rank(vectors) == pytest.approx(16, abs=0.1)


def test_the_effective_rank_is_the_exponential_entropy_of_the_singular_values():
    assert effective_rank(AXES) == pytest.approx(3)
    # two vectors at 60 degrees: singular values sqrt(1 + 1/2) and sqrt(1 - 1/2)
    shares = np.sqrt([1.5, 0.5]) / np.sqrt([1.5, 0.5]).sum()
    vectors = np.array([[1, 0], [0.5, 3**0.5 / 2]], dtype=np.float32)
    assert effective_rank(vectors) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_what_cannot_be_measured_is_an_error():
    with pytest.raises(DataError, match="gold score 4 or more"):
        alignment(AXES[:0], AXES[:0])
    for measure in (uniformity, mean_cosine, effective_rank):
        with pytest.raises(DataError, match="two or more distinct sentences, got 1"):
            measure(AXES[:1])
