"""Each loss against a plain Python loop over floats, written from its formula; gradients against finite differences."""

import math

import pytest
import torch
from support.losses import (
    assert_equal_with_gradients,
    slow_hinge,
    slow_hybrid,
    slow_ntxent,
    some_views,
    unit,
    unit_views,
)
from torch.nn import functional as F

from promcse_pl.config import LossConfig
from promcse_pl.losses.contrastive import ntxent, ntxent_logits
from promcse_pl.losses.hinge import energy_hinge
from promcse_pl.losses.hybrid import hybrid_loss, mlm_loss, mlm_weight_at

TEMPERATURE = 0.2


# --- NT-Xent


@pytest.mark.parametrize("logit", [0.0, 1.5, -2.0])
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_ntxent_equals_the_loop(batch, views, logit):
    def ours(anchor, positive, negative=None):
        return ntxent(ntxent_logits(anchor, positive, negative, temperature=TEMPERATURE, hard_negative_logit=logit))

    def slow(anchor, positive, negative=None):
        return slow_ntxent(anchor, positive, negative, TEMPERATURE, logit)

    assert_equal_with_gradients(ours, slow, unit_views(batch, views))


def test_ntxent_of_a_single_pair_is_zero_without_gradient():
    anchor, positive = (view.requires_grad_() for view in unit_views(1, 2))
    loss = ntxent(ntxent_logits(anchor, positive, temperature=TEMPERATURE))
    loss.backward()
    assert loss.item() == 0
    assert not anchor.grad.any()
    assert not positive.grad.any()


def test_the_hard_negative_logit_touches_the_own_negatives_alone():
    views = unit_views(4, 3)
    plain = ntxent_logits(*views, temperature=TEMPERATURE)
    added = ntxent_logits(*views, temperature=TEMPERATURE, hard_negative_logit=2.5) - plain
    expected = torch.zeros(4, 8, dtype=torch.float64)
    for i in range(4):
        expected[i, 4 + i] = 2.5
    torch.testing.assert_close(added, expected)


def test_ntxent_of_equal_candidates_is_the_logarithm_of_their_number():
    same = F.normalize(torch.ones(6, 4, dtype=torch.float64), dim=1)
    loss = ntxent(ntxent_logits(same, same, same, temperature=0.05))
    assert loss.item() == pytest.approx(math.log(12), rel=1e-12)


# --- energy hinge


@pytest.mark.parametrize("margin", [0.0, 0.2, 2.0])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_energy_hinge_equals_the_loop(seed, batch, margin):
    assert_equal_with_gradients(
        lambda *views: energy_hinge(*views, margin=margin),
        lambda *views: slow_hinge(*views, margin),
        unit_views(batch, 3, seed),
    )


def test_energy_hinge_is_exactly_zero_when_every_positive_wins():
    anchor = torch.eye(4, dtype=torch.float64).requires_grad_()
    loss = energy_hinge(anchor, torch.eye(4, dtype=torch.float64), -torch.eye(4, dtype=torch.float64), margin=0.2)
    loss.backward()
    assert loss.item() == 0
    assert not anchor.grad.any()


@pytest.mark.parametrize("hardest", ["other positive", "own negative", "other negative"])
def test_any_wrong_candidate_can_be_the_hardest(hardest):
    rest = math.sqrt(1 - 0.6**2 - 0.7**2)
    anchor = torch.eye(4, dtype=torch.float64)[:2]
    positive = torch.tensor([[0.6, 0.0, 0.8, 0.0], [0.0, 0.6, 0.8, 0.0]], dtype=torch.float64)
    negative = torch.tensor([[0.0, 0.0, 0.0, -1.0]] * 2, dtype=torch.float64)
    assert energy_hinge(anchor, positive, negative, margin=0.2).item() == 0
    if hardest == "other positive":
        positive[1] = torch.tensor([0.7, 0.6, rest, 0.0])
    else:
        negative[0 if hardest == "own negative" else 1] = torch.tensor([0.7, 0.0, 0.0, math.sqrt(1 - 0.7**2)])
    # the first anchor's positive has cosine 0.6 and loses to 0.7; the second anchor wins
    assert energy_hinge(anchor, positive, negative, margin=0.2).item() == pytest.approx((0.2 + 0.7 - 0.6) / 2)


def test_tied_hardest_negatives_share_the_gradient_of_one():
    anchor, positive = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.6, 0.8]]).double()
    anchor, positive = anchor.expand(2, -1), positive.expand(2, -1)
    negative = torch.tensor([[0.8, 0.6], [0.8, -0.6]]).double().requires_grad_()
    loss = energy_hinge(anchor, positive, negative, margin=0.1)
    assert loss.item() == pytest.approx(0.1 + 0.8 - 0.6)
    loss.backward()
    torch.testing.assert_close(negative.grad.sum(0), torch.tensor([1.0, 0.0]).double())


# --- the whole


@pytest.mark.parametrize(
    ("views", "hinge_weight", "logit"), [(2, 0.0, 0.0), (3, 0.0, 0.0), (3, 10.0, 0.0), (3, 0.5, 1.5)]
)
@pytest.mark.parametrize("batch", [1, 4])
def test_hybrid_loss_equals_the_loop_on_unnormalised_embeddings(batch, views, hinge_weight, logit):
    def ours(anchor, positive, negative=None):
        return hybrid_loss(
            anchor, positive, negative,
            LossConfig(temperature=TEMPERATURE, margin=0.3, hinge_weight=hinge_weight, hard_negative_logit=logit),
        ).total  # fmt: skip

    def slow(anchor, positive, negative=None):
        return slow_hybrid(anchor, positive, negative, TEMPERATURE, logit, 0.3, hinge_weight)

    assert_equal_with_gradients(ours, slow, some_views(batch, views))


def test_the_parts_are_weighted_and_sum_to_the_total():
    mlm = torch.tensor(0.3, dtype=torch.float64)
    parts = hybrid_loss(*some_views(4, 3), LossConfig(temperature=TEMPERATURE, margin=0.4, hinge_weight=10.0), mlm=mlm)
    assert parts.named().keys() == {"loss", "contrastive", "hinge", "mlm"}
    assert parts.mlm.item() == pytest.approx(0.3)
    assert parts.hinge.item() == pytest.approx(10 * slow_hinge(*(unit(v.tolist()) for v in some_views(4, 3)), 0.4))
    assert parts.total.item() == pytest.approx((parts.contrastive + parts.hinge + parts.mlm).item(), rel=1e-14)


def test_unused_loss_terms_are_not_named():
    parts = hybrid_loss(*some_views(4, 3), LossConfig(temperature=TEMPERATURE, hinge_weight=0.0))
    assert parts.named().keys() == {"loss", "contrastive"}
    assert parts.total is parts.contrastive


def test_the_hinge_sees_neither_temperature_nor_hard_negative_logit():
    views = some_views(4, 3)
    one = hybrid_loss(*views, LossConfig(temperature=0.05, margin=0.3, hinge_weight=2.0))
    two = hybrid_loss(*views, LossConfig(temperature=0.5, margin=0.3, hinge_weight=2.0, hard_negative_logit=3.0))
    assert one.hinge.item() > 0
    assert torch.equal(one.hinge, two.hinge)
    assert not torch.equal(one.contrastive, two.contrastive)


def test_a_hinge_without_hard_negatives_is_refused():
    anchor, positive = some_views(4, 2)
    with pytest.raises(ValueError, match=r"needs hard negatives.*hinge_weight to 0"):
        hybrid_loss(anchor, positive, None, LossConfig(hinge_weight=10.0))


def test_equal_vectors_everywhere_give_a_finite_gradient():
    views = [torch.ones(4, 3, dtype=torch.float64).requires_grad_() for _ in range(3)]
    parts = hybrid_loss(*views, LossConfig(temperature=0.05, margin=0.2, hinge_weight=10.0))
    parts.total.backward()
    assert parts.hinge.item() == pytest.approx(10 * 0.2)
    assert all(torch.isfinite(view.grad).all() for view in views)


# --- MLM


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (100, 0.095), (50, 0.1 * math.sqrt(0.95)), (300, 0.1 * 0.95 * 0.95 * 0.95), (1, 0.1 * 0.95**0.01)],
)
def test_the_mlm_weight_decays_by_5_percent_every_100_steps(step, expected):
    assert mlm_weight_at(step, 0.1) == pytest.approx(expected, rel=1e-12)


def test_mlm_loss_equals_the_loop():
    scores = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = [3, 0, 6, 6, 2]

    def slow(rows):
        total = 0.0
        for row, label in zip(rows, labels, strict=True):
            total -= math.log(math.exp(row[label]) / sum(math.exp(score) for score in row))
        return total / len(rows)

    assert_equal_with_gradients(lambda rows: mlm_loss(rows, torch.tensor(labels)), slow, [scores])


def test_mlm_loss_without_masked_tokens_is_zero_with_a_zero_gradient():
    weight = torch.randn(4, 7, requires_grad=True)
    loss = mlm_loss(torch.empty(0, 4) @ weight, torch.empty(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert not weight.grad.any()
