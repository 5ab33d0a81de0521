"""Losses as plain loops over lists of floats, written from their formulas, and their comparison with the tensor versions."""

import math

import pytest
import torch
from torch.nn import functional as F

STEP = 1e-5


# --- the formulas, on lists of floats


def dot(u, v):
    return sum(a * b for a, b in zip(u, v, strict=True))


def unit(rows):
    return None if rows is None else [[x / math.sqrt(dot(row, row)) for x in row] for row in rows]


def slow_ntxent(anchors, positives, negatives, temperature, logit=0.0):
    total = 0.0
    for i, anchor in enumerate(anchors):
        scores = [dot(anchor, positive) / temperature for positive in positives]
        for j, negative in enumerate(negatives or []):
            scores.append(dot(anchor, negative) / temperature + (logit if i == j else 0.0))
        total -= math.log(math.exp(scores[i]) / sum(math.exp(score) for score in scores))
    return total / len(anchors)


def slow_hinge(anchors, positives, negatives, margin):
    total = 0.0
    for i, anchor in enumerate(anchors):
        hardest = -math.inf
        for j, positive in enumerate(positives):
            if j != i:
                hardest = max(hardest, dot(anchor, positive))
        for negative in negatives:
            hardest = max(hardest, dot(anchor, negative))
        total += max(0.0, margin + hardest - dot(anchor, positives[i]))
    return total / len(anchors)


def slow_hybrid(anchors, positives, negatives, temperature, logit, margin, hinge_weight):
    anchors, positives, negatives = unit(anchors), unit(positives), unit(negatives)
    loss = slow_ntxent(anchors, positives, negatives, temperature, logit)
    return loss + hinge_weight * slow_hinge(anchors, positives, negatives, margin) if hinge_weight else loss


# --- comparison


def some_views(batch, views, seed=0, width=4):
    """Unnormalised embeddings with similar anchors and positives."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(batch, width, dtype=torch.float64, generator=generator) for _ in range(4)]
    return [noise[0] + 0.6 * noise[1], noise[0] + 0.6 * noise[2], 0.5 * noise[0] + noise[3]][:views]


def unit_views(batch, views, seed=0):
    return [F.normalize(view, dim=1) for view in some_views(batch, views, seed)]


def assert_equal_with_gradients(ours, slow, tensors):
    """ours(*tensors) and slow(*lists) agree, and so do autograd and central differences of the slow one."""
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    value = ours(*tensors)
    lists = [tensor.tolist() for tensor in tensors]
    assert value.item() == pytest.approx(slow(*lists), rel=1e-12, abs=1e-14)
    grads = torch.autograd.grad(value, tensors)
    for rows, grad in zip(lists, grads, strict=True):
        for i, row in enumerate(rows):
            for j, entry in enumerate(row):
                row[j] = entry + STEP
                above = slow(*lists)
                row[j] = entry - STEP
                below = slow(*lists)
                row[j] = entry
                assert grad[i, j].item() == pytest.approx((above - below) / (2 * STEP), rel=1e-6, abs=1e-8)
