"""Stop a run whose loss or gradient is not finite, without synchronising the CPU with the GPU in every step."""

# K loss terms

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from promcse_pl.utils.errors import NonFiniteError


class FiniteCheck:
    """Checks the loss terms and the gradient norm of each step; a step that fails does not change the trained parameters.

    On a CPU, a step is checked before its update. On a GPU, the values are copied to the CPU asynchronously: the optimiser skips
    the update on the device, and `wait`, called before the next step and before a checkpoint, raises the error.
    """

    def __init__(self) -> None:
        self._step = self._rows = self._remedy = ""
        self._losses: dict[str, Tensor] = {}
        self._arriving: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def check_losses(self, losses: dict[str, Tensor], *, step: str, rows: str, remedy: str) -> None:
        """Check the loss terms of a step.

        Args:
            losses: Detached scalars by name, the total first.
            step: Number of the step, for the error.
            rows: Batch and training rows of the step, for the error.
            remedy: Advice at the end of the error message.

        Raises:
            NonFiniteError: The total is not finite (CPU only, see `wait`).
        """
        self._step, self._rows, self._losses, self._remedy = step, rows, losses, remedy
        if not is_deferred(next(iter(losses.values()))):
            self._require([float(value) for value in losses.values()], 0.0)

    def check_gradient(self, norm: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Check the global gradient norm of the step whose losses were checked last.

        Args:
            norm: A scalar.
            optimizer: On a GPU, `found_inf` makes a fused AdamW skip the update.

        Raises:
            NonFiniteError: A value is not finite; on a GPU, only with an optimiser that is not fused, see `wait`.
        """
        if not is_deferred(norm):
            self._require([], float(norm))
            return
        values = torch.stack([*(value.to(norm.dtype) for value in self._losses.values()), norm])
        if not all(group.get("fused") for group in optimizer.param_groups):  # resumed from a CPU checkpoint
            *losses, last = values.tolist()
            self._require(losses, last)
            return
        optimizer.found_inf = (~values.isfinite().all()).float()  # type: ignore[attr-defined]
        self._arriving = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._arriving.copy_(values, non_blocking=True)
        if values.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> None:
        """Wait for the pending copy of the last step's values, if there is one.

        Raises:
            NonFiniteError: The total loss or the gradient norm is not finite.
        """
        if self._arriving is None:
            return
        if self._arrived is not None:
            self._arrived.synchronize()
        *losses, norm = self._arriving.tolist()
        self._arriving = self._arrived = None
        self._require(losses, norm)

    def _require(self, losses: Sequence[float], norm: float) -> None:
        if losses and not math.isfinite(losses[0]):
            values = ", ".join(f"{name} {value:g}" for name, value in zip(self._losses, losses, strict=True))
            raise NonFiniteError(f"the loss of {self._step} ({self._rows}) is not finite: {values}. {self._remedy}")
        if not math.isfinite(norm):
            raise NonFiniteError(f"the gradient of {self._step} is not finite. {self._remedy}")


def is_deferred(value: Tensor) -> bool:
    """Return whether a value is checked asynchronously: reading it would synchronise with the GPU."""
    return value.is_cuda
