"""CoSENT against a plain loop; gradients against finite differences."""

import math

import pytest
import torch
from support.losses import assert_equal_with_gradients, dot, some_views, unit

from promcse_pl.config import LossConfig
from promcse_pl.losses.cosent import cosent
from promcse_pl.losses.hybrid import hybrid_loss

TEMPERATURE = 0.2


def slow_cosent(first, second, scores):
    cosines = [dot(u, v) for u, v in zip(first, second, strict=True)]
    total = 1.0
    for i, higher in enumerate(scores):
        for j, lower in enumerate(scores):
            if higher > lower:
                total += math.exp((cosines[j] - cosines[i]) / TEMPERATURE)
    return math.log(total)


@pytest.mark.parametrize("scores", [[3.0], [0.0, 5.0], [1.0, 0.5, 1.0, 0.2, 0.9]])
def test_cosent_equals_the_loop_on_unnormalised_embeddings(scores):
    config = LossConfig(temperature=TEMPERATURE, hinge_weight=0.0)

    def ours(first, second):
        return hybrid_loss(first, second, None, config, scores_B=torch.tensor(scores)).total

    assert_equal_with_gradients(
        ours, lambda first, second: slow_cosent(unit(first), unit(second), scores), some_views(len(scores), 2)
    )


def test_only_the_order_of_the_scores_matters():
    cosines_B, scores_B = torch.tensor([0.1, 0.8, 0.4, 0.4]), torch.tensor([0.0, 0.3, 0.7, 0.7])
    loss = cosent(cosines_B, scores_B, temperature=TEMPERATURE)
    assert torch.equal(loss, cosent(cosines_B, 5 * scores_B**2 - 3, temperature=TEMPERATURE))
    assert loss > cosent(cosines_B, cosines_B, temperature=TEMPERATURE)


def test_equal_scores_give_no_loss_and_no_gradient():
    cosines_B = torch.tensor([0.1, 0.8, 0.4]).requires_grad_()
    loss = cosent(cosines_B, torch.ones(3), temperature=0.05)
    loss.backward()
    assert loss.item() == 0
    assert not cosines_B.grad.any()
