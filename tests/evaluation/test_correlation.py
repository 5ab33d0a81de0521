"""Correlations: scipy's, with errors in place of NaN."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from promcse_pl.evaluation.sts import pearson, spearman
from promcse_pl.utils.errors import DataError, NonFiniteError

SOME = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30)  # many ties


@given(SOME)
def test_spearman_ranks_ties_by_their_mean_as_scipy_and_as_pearson_of_ranks(pairs):
    predicted, gold = np.array(pairs, dtype=float).T
    assume(np.ptp(predicted) and np.ptp(gold))
    assert spearman(predicted, gold) == pytest.approx(stats.spearmanr(predicted, gold).statistic, abs=1e-12)
    by_hand = np.corrcoef(stats.rankdata(predicted), stats.rankdata(gold))[0, 1]
    assert spearman(predicted, gold) == pytest.approx(by_hand, abs=1e-12)
    assert pearson(predicted, gold) == pytest.approx(np.corrcoef(predicted, gold)[0, 1], abs=1e-9)


def test_only_the_order_counts_for_spearman():
    gold = [0.0, 1.0, 2.5, 4.0]
    assert spearman([1, 10, 100, 1000], gold) == pytest.approx(1)
    assert spearman([4, 3, 2, 1], gold) == pytest.approx(-1)
    assert pearson([1, 10, 100, 1000], gold) < 0.9


@pytest.mark.parametrize("measure", [spearman, pearson])
@pytest.mark.parametrize(
    ("predicted", "gold", "side"), [([0.5] * 3, [1, 2, 3], "similarities"), ([0.1, 0.2, 0.3], [4, 4, 4], "gold scores")]
)
def test_a_constant_side_has_no_correlation(measure, predicted, gold, side):
    with pytest.raises(DataError, match=f"all 3 {side} equal"):
        measure(predicted, gold)


@pytest.mark.parametrize("measure", [spearman, pearson])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_similarity_that_is_not_finite_is_an_error(measure, broken):
    with pytest.raises(NonFiniteError, match="1 of 3 similarities are not finite"):
        measure([0.1, broken, 0.3], [1, 2, 3])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_gold_score_that_is_not_finite_is_an_error(broken):
    with pytest.raises(DataError, match="1 of 3 gold scores are not finite"):
        spearman([0.1, 0.2, 0.3], [1, broken, 3])


@pytest.mark.parametrize(("predicted", "gold"), [([], []), ([1], [1]), ([1, 2], [1, 2, 3])])
def test_too_few_or_unequal_values_are_an_error(predicted, gold):
    with pytest.raises(DataError, match="two or more pairs"):
        spearman(predicted, gold)
