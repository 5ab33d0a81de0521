"""Stop a run whose loss or gradient is not finite, without synchronising the CPU with the GPU in every step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from promcse_pl.data.batch import TrainBatch
from promcse_pl.utils.errors import NonFiniteError


@dataclass(frozen=True, slots=True)
class CheckedStep:
    """A training step and what its error says.

    Attributes:
        name: The step in words, such as "step 12".
        rows: Batch and training rows of the step.
        remedy: Advice at the end of the error message.
        batch: Its batch.
        losses: Detached scalars by name, the total first.
    """

    name: str
    rows: str
    remedy: str
    batch: TrainBatch
    losses: dict[str, Tensor]


class FiniteCheck:
    """Checks the loss terms and the gradient norm of each step; a step that fails does not change the trained parameters.

    On a CPU, a step is checked before its update. On a GPU, the values are copied to the CPU asynchronously: from the failed step
    on, the optimiser skips all updates on the device, and `wait` raises the error.

    Attributes:
        failed: Batch of the step that failed; None: no step has failed.
    """

    def __init__(self) -> None:
        self.failed: TrainBatch | None = None
        self._step: CheckedStep | None = None
        self._copies: deque[tuple[CheckedStep, Tensor, torch.cuda.Event | None]] = deque()
        self._found_inf: Tensor | None = None

    def check_losses(self, step: CheckedStep) -> None:
        """Check the loss terms of a step.

        Raises:
            NonFiniteError: The total is not finite (CPU only, see `wait`).
        """
        self._step = step
        if not is_deferred(next(iter(step.losses.values()))):
            self._require_finite(step, [float(value) for value in step.losses.values()], 0.0)

    def check_gradient(self, norm: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Check the global gradient norm of the step whose losses were checked last.

        Args:
            norm: A scalar.
            optimizer: On a GPU, `found_inf` makes a fused AdamW skip the update.

        Raises:
            NonFiniteError: A value is not finite; on a GPU, only with an optimiser that is not fused, see `wait`.
        """
        assert self._step is not None
        if not is_deferred(norm):
            self._require_finite(self._step, [], float(norm))
            return
        values = torch.stack([*(value.to(norm.dtype) for value in self._step.losses.values()), norm])
        if not all(group.get("fused") for group in optimizer.param_groups):  # resumed from a CPU checkpoint
            *losses, last = values.tolist()
            self._require_finite(self._step, losses, last)
            return
        is_bad = (~values.isfinite().all()).float()
        self._found_inf = is_bad if self._found_inf is None else torch.maximum(self._found_inf, is_bad)
        optimizer.found_inf = self._found_inf  # type: ignore[attr-defined]
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        copy.copy_(values, non_blocking=True)
        event = None
        if values.is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._copies.append((self._step, copy, event))

    def wait(self, *, pending: int = 0) -> None:
        """Wait for the values of earlier steps on a GPU; no effect on a CPU.

        Args:
            pending: Number of the last steps whose values are not waited for.

        Raises:
            NonFiniteError: The total loss or the gradient norm of a step is not finite.
        """
        while len(self._copies) > pending:
            step, copy, event = self._copies.popleft()
            if event is not None:
                event.synchronize()
            *losses, norm = copy.tolist()
            self._require_finite(step, losses, norm)

    def _require_finite(self, step: CheckedStep, losses: Sequence[float], norm: float) -> None:
        if losses and not math.isfinite(losses[0]):
            values = ", ".join(f"{name} {value:g}" for name, value in zip(step.losses, losses, strict=True))
            problem = f"the loss of {step.name} ({step.rows}) is not finite: {values}"
        elif not math.isfinite(norm):
            problem = f"the gradient of {step.name} is not finite"
        else:
            return
        self.failed = step.batch
        raise NonFiniteError(f"{problem}. {step.remedy}")


def is_deferred(value: Tensor) -> bool:
    """Return whether a value is checked asynchronously: reading it would synchronise with the GPU."""
    return value.is_cuda
