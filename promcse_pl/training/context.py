"""The state that the steps of a run share. Imports no torch: a run is created before torch is loaded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from promcse_pl.config import Config
from promcse_pl.run_folder import Status
from promcse_pl.training.distributed import Ranks
from promcse_pl.utils.signals import StopSignals

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback
    from pytorch_lightning.loggers import Logger


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A valid checkpoint.

    Attributes:
        path: Folder of the checkpoint.
        step: Number of optimiser steps done.
        history_bytes: Size of metrics.jsonl at that step.
    """

    path: Path
    step: int
    history_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """State of a run in one of its processes.

    Attributes:
        config: Valid settings; the pipeline replaces `auto` by the values for this machine, except in `trainer.layers` and
            `trainer.recompute`.
        typed: The settings as typed, which config.yaml keeps.
        folder: Run folder; only rank 0 writes to it.
        ranks: Rank of this process.
        console: Console for log lines, tables and progress bars.
        checkpoint: Checkpoint to resume from; None to start at step 0.
        status: Status of the run when this process started.
        stop: Handlers of the signals that stop the run after a save.
        started: `time.perf_counter()` when this process started the run.
        callbacks, loggers: Additional ones for the Lightning Trainer (`promcse_pl.train`).
    """

    config: Config
    typed: Config
    folder: Path
    ranks: Ranks
    console: Console
    checkpoint: Checkpoint | None = None
    status: Status = field(default_factory=lambda: Status(state="running"))
    stop: StopSignals = field(default_factory=StopSignals)
    started: float = field(default_factory=time.perf_counter)
    callbacks: Sequence[Callback] = ()
    loggers: Sequence[Logger] = ()

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0, which writes the run folder and prints the results."""
        return self.ranks.rank == 0
