"""Fast dropout on a CPU.

torch draws one Bernoulli number at a time (about 8 ns each), which was a quarter of a training step. Here the generator SFC64
fills whole words, and every 16 bits decide one entry: the same distribution, with the probability rounded to 1/65536. Streams
are seeded from torch's generator, so seeds and saved random states keep their effect.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_LEVELS = 1 << 16
_PER_WORD = 4  # 16-bit numbers in a 64-bit word
_of_thread = threading.local()


@contextmanager
def seeded_dropout(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw all masks of this thread from a seeded stream, so that a recomputed chunk gets the same masks.

    Args:
        seed: Seed of the stream; None: no effect.
        device: Device on which the masks are drawn.
    """
    if seed is None or device.type == "meta":  # meta tensors have no values
        yield
    elif device.type == "cpu":
        before, _of_thread.stream = getattr(_of_thread, "stream", None), np.random.SFC64(seed)
        try:
            yield
        finally:
            _of_thread.stream = before
    else:
        generator = torch.get_device_module(device)
        state = generator.get_rng_state()
        generator.manual_seed(seed)
        try:
            yield
        finally:
            generator.set_rng_state(state)


def keep_mask(shape: torch.Size, probability: float, dtype: torch.dtype = torch.bool) -> Tensor:
    """Return a CPU tensor whose entries are 1 (or True) with 1 - `probability`, independently, and else 0."""
    stream = getattr(_of_thread, "stream", None) or np.random.SFC64(int(torch.randint(2**62, (1,))))
    count = shape.numel()
    words = stream.random_raw(-(-count // _PER_WORD))
    bits = torch.from_numpy(words.view(np.int16))[:count].view(shape)
    level = round(probability * _LEVELS) - _LEVELS // 2
    # write directly in the type of the values: a boolean tensor in between costs four times as much
    return torch.ge(bits, level, out=torch.empty(shape, dtype=dtype))


def kept_share(probability: float) -> float:
    """Return the share of entries that `keep_mask` keeps, `probability` being rounded."""
    return 1 - round(probability * _LEVELS) / _LEVELS


def in_bytes(mask: Tensor) -> Tensor:
    """Return a mask with one byte per entry for the backward pass: torch multiplies by numbers faster than by booleans."""
    return mask.to(torch.bool).view(torch.uint8)


def dropout(values: Tensor, probability: float, shape: torch.Size | None = None) -> Tensor:
    """Zero entries with a probability and scale the others, so that the mean is unchanged.

    Args:
        values: Any tensor.
        probability: In [0, 1).
        shape: Shape of the result, which `values` broadcasts to; every entry of it has its own mask. None: that of `values`.
    """
    shape = values.shape if shape is None else shape
    if values.device.type != "cpu":
        return F.dropout(values.expand(shape), probability)
    return cast(Tensor, _Dropped.apply(values, probability, shape))  # type: ignore[no-untyped-call]


class _Dropped(torch.autograd.Function):
    """Keeps the mask for the backward pass with one byte per entry; autograd would keep it in the type of the values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, probability: float, shape: torch.Size) -> Tensor:  # noqa: ANN401
        mask = keep_mask(shape, probability, values.dtype)
        ctx.scale, ctx.shape = 1 / kept_share(probability), values.shape
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(in_bytes(mask))
        return mask.mul_(ctx.scale).mul_(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (mask,) = ctx.saved_tensors
        return (gradient * mask).mul_(ctx.scale).sum_to_size(ctx.shape), None, None


class Dropout(nn.Module):
    """`torch.nn.Dropout` with the masks of this module."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, values: Tensor) -> Tensor:
        """Apply dropout in training mode, otherwise return the values unchanged."""
        return dropout(values, self.p) if self.training and self.p else values


def use_fast_dropout(model: nn.Module) -> None:
    """Replace every `torch.nn.Dropout` of a model by `Dropout`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))
