"""Learning-rate schedules and weight decay."""

import math

import pytest
import torch
from transformers import get_scheduler

from promcse_pl.config import OptimConfig
from promcse_pl.training.optimizer import build_optimizer, learning_rate_factor

NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""The schedules by their name in transformers."""


@pytest.mark.parametrize("steps", [1, 2, 7, 230])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("schedule", NAMES)
def test_a_schedule_is_that_of_transformers(schedule, warmup, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        NAMES[schedule], optimizer, num_warmup_steps=math.ceil(warmup * steps), num_training_steps=steps
    )
    optim = OptimConfig(schedule=schedule, warmup=warmup)
    for step in range(steps):
        assert learning_rate_factor(step, optim, steps) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        scheduler.step()


def test_the_schedules_at_known_points():
    def factors(**settings):
        return [learning_rate_factor(step, OptimConfig(**settings), 8) for step in range(9)]

    assert factors(warmup=0.25) == pytest.approx([0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    assert factors(schedule="constant", warmup=0.3) == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1])
    cosine = factors(schedule="cosine")
    assert cosine[::2] == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0])
    assert cosine == sorted(cosine, reverse=True)


def test_without_warm_up_the_linear_schedule_has_the_bits_of_earlier_versions():
    for steps in (3, 230, 10_741):
        for step in range(0, steps + 2, max(1, steps // 97)):
            assert learning_rate_factor(step, OptimConfig(), steps) == max(0.0, 1 - step / steps)


def test_weight_decay_shrinks_matrices_and_no_vector():
    matrix, vector = torch.nn.Parameter(torch.full((2, 3), 2.0)), torch.nn.Parameter(torch.full((3,), 2.0))
    optimizer = build_optimizer([vector, matrix], OptimConfig(lr=0.5, weight_decay=0.1))
    for parameter in (vector, matrix):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(vector.detach(), torch.full((3,), 2.0))
    torch.testing.assert_close(matrix.detach(), torch.full((2, 3), 2.0 * (1 - 0.5 * 0.1)))
    assert all(group["lr"] == 0.5 for group in optimizer.param_groups)
