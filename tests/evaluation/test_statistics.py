"""Intervals and p-values: equal to plain loops over scipy, with the stated coverage."""

import numpy as np
import pytest
from scipy import stats

from promcse_pl.evaluation import statistics
from promcse_pl.evaluation.statistics import (
    CountedSpearman,
    Difference,
    bootstrap_spearman,
    interval,
    mean_over_seeds,
    paired_difference,
    resample_counts,
    seed_difference,
)
from promcse_pl.utils.errors import DataError, NonFiniteError


def correlated(rng: np.random.Generator, pairs: int, rho: float) -> tuple[np.ndarray, np.ndarray]:
    first = rng.normal(size=pairs)
    return first, rho * first + (1 - rho**2) ** 0.5 * rng.normal(size=pairs)


def true_spearman(rho: float) -> float:
    """Of a bivariate normal with Pearson's correlation rho."""
    return 6 / np.pi * np.arcsin(rho / 2)


# --- bootstrap -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [0, 1, 9], ids=["many ties", "some ties", "no ties"])
def test_every_resample_has_the_correlation_that_a_loop_over_scipy_gives(digits):
    predicted, gold = (side.round(digits) for side in correlated(np.random.default_rng(1), 60, 0.6))
    values = bootstrap_spearman(predicted, gold, resamples=200, seed=5)
    (counts,) = resample_counts(60, resamples=200, seed=5)
    looped = []
    for count in counts:
        rows = np.repeat(np.arange(60), count)
        looped.append(stats.spearmanr(predicted[rows], gold[rows]).statistic)
    assert values == pytest.approx(looped, abs=1e-12)


def test_the_pairs_as_they_are_have_their_own_correlation():
    predicted, gold = correlated(np.random.default_rng(2), 50, 0.4)
    once = CountedSpearman(predicted, gold)(np.ones((1, 50), dtype=np.int64))
    assert once == pytest.approx(stats.spearmanr(predicted, gold).statistic, abs=1e-14)


def test_a_resample_is_as_large_as_the_original_and_blocks_do_not_change_how_often_a_pair_is_drawn(monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK_ENTRIES", 100)
    blocks = list(resample_counts(30, resamples=1000, seed=0))
    assert {len(block) for block in blocks} == {3, 1}
    counts = np.concatenate(blocks)
    assert counts.shape == (1000, 30)
    assert (counts.sum(1) == 30).all()
    # a pair is missing from a resample with probability (1 - 1/n)^n
    assert (counts == 0).mean() == pytest.approx((1 - 1 / 30) ** 30, abs=0.01)


def test_the_same_seed_draws_the_same_and_another_one_others():
    predicted, gold = correlated(np.random.default_rng(3), 40, 0.4)
    first, second, other = (bootstrap_spearman(predicted, gold, seed=seed) for seed in (1, 1, 2))
    assert (first == second).all()
    assert not (first == other).any()


def test_the_interval_holds_the_true_correlation_about_as_often_as_it_claims():
    studies, inside = 400, 0
    rng = np.random.default_rng(4)
    for study in range(studies):
        low, high = interval(bootstrap_spearman(*correlated(rng, 200, 0.7), resamples=400, seed=study))
        inside += low <= true_spearman(0.7) <= high
    # 95 % within four standard deviations of a binomial count
    assert inside / studies == pytest.approx(0.95, abs=4 * (0.95 * 0.05 / studies) ** 0.5)


def test_p_values_of_two_models_that_are_equally_good_are_spread_evenly():
    rng = np.random.default_rng(5)
    values = []
    for study in range(300):
        gold = rng.normal(size=150)
        first, second = (gold + rng.normal(size=150) for _ in range(2))
        one, two = (bootstrap_spearman(model, gold, resamples=300, seed=study) for model in (first, second))
        value = stats.spearmanr(second, gold).statistic - stats.spearmanr(first, gold).statistic
        values.append(paired_difference(value, two - one, "").p)
    assert stats.kstest(values, "uniform").pvalue > 0.001
    assert np.mean(np.array(values) <= 0.05) == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / 300) ** 0.5)


def test_a_clear_difference_has_the_smallest_p_value_that_the_resamples_allow():
    rng = np.random.default_rng(6)
    gold = rng.normal(size=300)
    weak, strong = gold + 3 * rng.normal(size=300), gold + 0.3 * rng.normal(size=300)
    one, two = (bootstrap_spearman(model, gold, resamples=199, seed=0) for model in (weak, strong))
    difference = paired_difference(0.5, two - one, "199 resamples")
    assert difference.p == pytest.approx(2 / 200)
    assert difference.verdict.endswith("over 199 resamples: better")
    assert paired_difference(-0.5, one - two, "199 resamples").verdict.endswith(": worse")


def test_a_model_against_itself_shows_no_difference():
    difference = paired_difference(0.0, np.zeros(100), "100 resamples")
    assert (difference.low, difference.high, difference.p) == (0, 0, 1)
    assert difference.verdict == "+0.00 [0.00, 0.00] over 100 resamples: not significant"


def test_resamples_without_a_correlation_are_left_out_and_are_an_error_when_all_are():
    values = bootstrap_spearman([0.1, 0.2, 0.3], [1, 1, 2], resamples=500)
    assert 0 < np.isnan(values).sum() < 500
    low, high = interval(values)
    assert -1 <= low <= high <= 1
    with pytest.raises(DataError, match="needs more pairs"):
        interval(np.full(3, np.nan))


@pytest.mark.parametrize(("predicted", "error"), [([0.5] * 3, DataError), ([0.1, np.nan, 0.2], NonFiniteError)])
def test_what_has_no_correlation_has_no_interval(predicted, error):
    with pytest.raises(error):
        bootstrap_spearman(predicted, [1, 2, 3])


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_mean_and_t_interval_over_seeds_are_those_of_scipy():
    values = [81.2, 81.5, 80.9, 81.4]
    mean, std, low, high = mean_over_seeds(values)
    assert (mean, std) == pytest.approx((np.mean(values), stats.tstd(values)))
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 3, loc=mean, scale=stats.sem(values)))
    with pytest.raises(DataError, match="two or more runs, got 1"):
        mean_over_seeds([81.2])


def test_the_difference_of_two_groups_of_seeds_is_welchs_test():
    first, second = [80.0, 80.2, 80.1], [80.6, 80.2, 80.9, 80.5]
    difference = seed_difference(first, second)
    welch = stats.ttest_ind(second, first, equal_var=False)
    assert difference.value == pytest.approx(np.mean(second) - np.mean(first))
    assert (difference.low, difference.high) == pytest.approx(tuple(welch.confidence_interval()))
    assert difference.p == pytest.approx(welch.pvalue)
    assert difference.over == "3 and 4 seeds"


def test_the_difference_of_the_same_seeds_is_the_paired_test():
    first, second = [80.0, 80.4, 80.1], [80.3, 80.8, 80.5]
    difference = seed_difference(first, second, is_paired=True)
    test = stats.ttest_rel(second, first)
    assert (difference.low, difference.high) == pytest.approx(tuple(test.confidence_interval()))
    assert difference.p == pytest.approx(test.pvalue)
    assert difference.verdict.endswith("over 3 paired seeds: better")
    assert seed_difference(first, second).verdict.endswith("over 3 seeds: not significant")
    assert seed_difference([80.0, 81.0], [80.5, 81.5], is_paired=True).low is None, "no spread of the differences"


@pytest.mark.parametrize("sign", [1, -1])
def test_a_single_model_counts_as_a_fixed_number_against_a_group_of_seeds(sign):
    groups = ([78.9], [81.0, 81.4, 81.1])
    difference = seed_difference(*groups[::sign])
    test = stats.ttest_1samp(groups[1], 78.9)
    assert difference.value == pytest.approx(sign * (np.mean(groups[1]) - 78.9))
    low, high = sorted(sign * (edge - 78.9) for edge in test.confidence_interval())
    assert (difference.low, difference.high, difference.p) == pytest.approx((low, high, test.pvalue))
    assert difference.verdict.endswith(f"over 3 seeds: {'better' if sign > 0 else 'worse'}")


def test_seeds_that_agree_to_the_last_digit_give_no_verdict():
    difference = seed_difference([80.0], [81.0, 81.0])
    assert difference == Difference(1.0, None, None, None, "2 seeds")
    assert difference.verdict == "+1.00 over 2 seeds: no interval, so no verdict"


def test_two_single_scores_have_no_seeds_to_differ_over():
    with pytest.raises(DataError, match="two single scores"):
        seed_difference([80.0], [81.0])
