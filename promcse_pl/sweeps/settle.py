"""Fix the settings shared by all jobs of a sweep: the threads per job and the precision for `trainer.precision=auto`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from promcse_pl.config import Config
from promcse_pl.sweeps.forkserver import Task
from promcse_pl.sweeps.plan import Settled
from promcse_pl.sweeps.pool import Pool
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.processes import cores


def settle(pool: Pool, configs: Iterable[Config]) -> Settled | None:
    """Measure the precision in a worker process with the threads of a job; this process does not import torch.

    Args:
        pool: Pool that will run the jobs; no task runs in it yet.
        configs: Configs of the jobs.

    Returns:
        The shared settings; None if a signal stopped the measurement.

    Raises:
        ConfigError: A device that a job needs is not available.
    """
    devices = sorted({config.trainer.device for config in configs if config.trainer.precision == "auto"})
    codes: list[int] = []
    with TemporaryDirectory(prefix="promcse-") as place:
        result, output = Path(place, "result.json"), Path(place, "output.log")
        task = Task("settle", "promcse_pl.training.machine:measure", [str(result), *devices], output)
        pool.run(iter([task]), lambda _, code: codes.append(code))
        if pool.exit_code:
            return None
        if codes != [0]:
            lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no reason given"]
            raise ConfigError(f"trainer.precision=auto cannot be measured: {lines[-1].removeprefix('error: ')}")
        measured = json.loads(result.read_text(encoding="utf-8"))
    share = None if pool.parallel == 1 and os.environ.get("OMP_NUM_THREADS") else max(1, cores() // pool.parallel)
    return Settled(pool.parallel, measured["threads"], share, measured["precision"])
