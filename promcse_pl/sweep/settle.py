"""What is settled once for all jobs of a sweep: the threads of a job, and what `trainer.precision=auto` means."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from promcse_pl.config import Config
from promcse_pl.errors import ConfigError
from promcse_pl.launch import cores
from promcse_pl.sweep.forkserver import Task
from promcse_pl.sweep.plan import Settled
from promcse_pl.sweep.pool import Pool


def settle(pool: Pool, configs: Iterable[Config]) -> Settled | None:
    """Measure in a process of the pool, which has torch and a job's threads: this one imports no torch.

    Args:
        pool: Runs the jobs later; nothing runs in it yet.
        configs: Of the jobs.

    Returns:
        What was settled; None if a signal came first.

    Raises:
        ConfigError: A device that a job asks for is not there.
    """
    devices = sorted({config.trainer.device for config in configs if config.trainer.precision == "auto"})
    codes: list[int] = []
    with TemporaryDirectory(prefix="promcse-") as place:
        result, output = Path(place, "result.json"), Path(place, "output.log")
        task = Task("settle", "promcse_pl.training.precision:measure", [str(result), *devices], output)
        pool.run(iter([task]), lambda _, code: codes.append(code))
        if pool.exit_code:
            return None
        if codes != [0]:
            lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no reason given"]
            raise ConfigError(f"trainer.precision=auto cannot be measured: {lines[-1].removeprefix('error: ')}")
        measured = json.loads(result.read_text(encoding="utf-8"))
    share = None if pool.parallel == 1 and os.environ.get("OMP_NUM_THREADS") else max(1, cores() // pool.parallel)
    return Settled(pool.parallel, measured["threads"], share, measured["precision"])
