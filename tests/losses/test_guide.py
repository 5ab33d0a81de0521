"""The loss without false negatives equals plain loops; gradients equal finite differences."""

import math

import pytest
import torch
from support.losses import assert_equal_with_gradients, dot, slow_hinge, slow_ntxent, some_views, unit, unit_views

from promcse_pl.config import LossConfig
from promcse_pl.losses.guide import candidate_cosines, false_negatives
from promcse_pl.losses.hinge import energy_hinge
from promcse_pl.losses.hybrid import hybrid_loss

TEMPERATURE, MARGIN = 0.2, 0.3


def slow_cosines(anchors, positives, negatives=None):
    return [[dot(anchor, candidate) for candidate in [*positives, *(negatives or [])]] for anchor in anchors]


def slow_false_negatives(guide):
    return {(i, c) for i, row in enumerate(guide) for c, cosine in enumerate(row) if c != i and cosine >= row[i] - 1e-3}


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_masked_loss_equals_the_loop(batch, views):
    guide = unit_views(batch, views, seed=1)
    config = LossConfig(
        temperature=TEMPERATURE, margin=MARGIN, hinge_weight=2.0 if views == 3 else 0.0, mask_false_negatives=True
    )
    excluded = slow_false_negatives(slow_cosines(*(view.tolist() for view in guide)))
    assert excluded or batch < 6

    def ours(anchor, positive, negative=None):
        return hybrid_loss(anchor, positive, negative, config, guide_BC=candidate_cosines(*guide)).total

    def slow(anchor, positive, negative=None):
        anchor, positive, negative = unit(anchor), unit(positive), unit(negative)
        loss = slow_ntxent(anchor, positive, negative, TEMPERATURE, excluded=excluded)
        return loss + 2 * slow_hinge(anchor, positive, negative, MARGIN, excluded) if negative else loss

    assert_equal_with_gradients(ours, slow, some_views(batch, views))


def test_a_candidate_as_similar_as_the_positive_is_a_false_negative():
    guide_BC = torch.tensor([[0.5, 0.5, 0.6, 0.498], [0.298, 0.3, 0.2995, 0.31]])
    assert false_negatives(guide_BC).tolist() == [[False, True, True, False], [False, False, True, True]]


def test_every_copy_of_the_positive_is_a_false_negative_after_rounding_to_float16():
    anchor, positive, _ = (view.float() for view in unit_views(61, 3))
    rounded = torch.nn.functional.normalize(positive.half().float(), dim=1)
    mask_BC = false_negatives(candidate_cosines(anchor, rounded, positive))
    assert mask_BC.diagonal(61).all()
    assert not mask_BC.diagonal().any()


def test_an_anchor_without_negatives_has_no_hinge_and_a_finite_gradient():
    views = [view.requires_grad_() for view in unit_views(2, 3)]
    excluded_BC = torch.tensor([[False, True, True, True], [False, False, False, False]])
    loss = energy_hinge(*views, margin=2.0, excluded_BC=excluded_BC)
    loss.backward()
    anchors, positives, negatives = (view.tolist() for view in views)
    cosines = slow_cosines(anchors, positives, negatives)[1]
    assert loss.item() == pytest.approx((2.0 + max(cosines[0], *cosines[2:]) - cosines[1]) / 2)
    assert all(math.isfinite(value) for view in views for value in view.grad.flatten().tolist())
    assert not views[0].grad[0].any()


def test_masking_is_refused_without_the_cosines_of_the_guide():
    with pytest.raises(ValueError, match="mask_false_negatives needs the cosines of the guide"):
        hybrid_loss(*some_views(4, 3), LossConfig(mask_false_negatives=True))
