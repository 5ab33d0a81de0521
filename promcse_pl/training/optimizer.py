"""The optimiser and the schedule of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from promcse_pl.config import OptimConfig


def learning_rate_factor(step: int, optim: OptimConfig, total_steps: int) -> float:
    """Return the factor by which the learning rate of a step is multiplied.

    It is that of the schedulers of transformers: a linear rise over the first W = ceil(warmup * S) steps, and then, with
    p = (step - W) / (S - W), 1 - p (linear), (1 + cos(pi * p)) / 2 (cosine) or 1 (constant).

    Args:
        step: Number of optimiser steps done.
        optim: Schedule and warm-up.
        total_steps: S, the planned number of steps.

    Returns:
        A number in [0, 1]; 0 for the first step of a warm-up.
    """
    warmup_steps = math.ceil(optim.warmup * total_steps)
    if step < warmup_steps:
        return step / warmup_steps
    if optim.schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, 1 - progress if optim.schedule == "linear" else (1 + math.cos(math.pi * min(1.0, progress))) / 2)


def build_optimizer(trained: Sequence[Tensor], optim: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW; the weight decay applies to tensors with two or more dimensions.

    Args:
        trained: The trained tensors.
        optim: Learning rate and weight decay.
    """
    groups: list[dict[str, Any]] = [{"params": list(trained)}]  # a single group, as in checkpoints of earlier versions
    if optim.weight_decay:
        groups = [
            {"params": [tensor for tensor in trained if tensor.ndim >= 2], "weight_decay": optim.weight_decay},
            {"params": [tensor for tensor in trained if tensor.ndim < 2]},
        ]
    # only the fused AdamW can skip an update on a GPU, see `FiniteCheck`
    is_fused = trained[0].is_cuda if trained else False
    return torch.optim.AdamW(
        groups, lr=optim.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=is_fused or None
    )
