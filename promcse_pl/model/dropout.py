"""Dropout whose mask is cheap to draw on a CPU.

torch draws one Bernoulli number at a time there (some 8 ns each), which made a quarter of a training step. Here a counter-free
generator (SFC64) fills whole words and every 16 bits decide one entry: the same distribution, with the probability rounded to
1/65536. Each mask is seeded from torch's own generator, so seeds and saved random states mean what they always meant.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEVELS = 1 << 16
_PER_WORD = 4  # 16-bit numbers in a 64-bit word


def keep_mask(shape: torch.Size, probability: float) -> Tensor:
    """Return a boolean CPU tensor whose entries are True with 1 - `probability`, independently."""
    seed = int(torch.randint(2**62, (1,)))
    count = shape.numel()
    words = np.random.SFC64(seed).random_raw(-(-count // _PER_WORD))
    bits = torch.from_numpy(words.view(np.int16))[:count].view(shape)
    return bits >= round(probability * _LEVELS) - _LEVELS // 2


def dropout(values: Tensor, probability: float, shape: torch.Size | None = None) -> Tensor:
    """Zero entries with a probability and scale the others, so that the mean stays.

    Args:
        values: Any tensor.
        probability: In [0, 1).
        shape: Shape of the result, which `values` broadcasts to; every entry of it has its own mask. None: that of `values`.
    """
    shape = values.shape if shape is None else shape
    if values.device.type != "cpu":
        return F.dropout(values.expand(shape), probability)
    kept_share = 1 - round(probability * _LEVELS) / _LEVELS
    return values * keep_mask(shape, probability).to(values.dtype).mul_(1 / kept_share)


class Dropout(nn.Module):
    """`torch.nn.Dropout`, drawn as above."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, values: Tensor) -> Tensor:
        """Drop in training, else return the values as they are."""
        return dropout(values, self.p) if self.training and self.p else values


def use_cheap_dropout(model: nn.Module) -> None:
    """Put `Dropout` in the place of every `torch.nn.Dropout` of a model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))
