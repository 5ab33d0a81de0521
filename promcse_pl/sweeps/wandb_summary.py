"""The W&B run of a whole sweep: a table of its jobs, and the best adapter."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from promcse_pl.config import Config, flat_settings
from promcse_pl.run_folder import ADAPTER, CONFIG, START, read_resolved_config
from promcse_pl.sweeps.collect import Run, read_sweep
from promcse_pl.sweeps.ranking import different_dev_sets, find_best
from promcse_pl.tracking.wandb import open_run, resolve_mode, sent_settings
from promcse_pl.utils.errors import ConfigError, DataError
from promcse_pl.utils.files import write_text
from promcse_pl.utils.paths import is_plain_name


def publish_sweep(folder: Path) -> str | None:
    """Log a sweep as one W&B run of job type `sweep`: a table of its jobs, and online the best adapter with the alias `best`.

    Later calls resume the same W&B run. Without tracking nothing is logged; W&B errors become warnings. `find_best` selects the
    adapter.

    Args:
        folder: Folder of the sweep.

    Returns:
        The command that uploads all offline runs of the sweep, including this one; None if there are none.

    Raises:
        PromcseError: The stored id of the W&B run cannot be read or written.
    """
    try:
        runs = read_sweep(folder).runs
    except DataError:  # no job has started
        return None
    started = [(run, config) for run in runs if run.started is not None and (config := submitted_config(run))]
    ids = [run.wandb_id for run, _ in started if run.wandb_id]
    if not ids:
        return None
    settings = [flat_settings(sent_settings(config)) for _, config in started]
    varied = [key for key in settings[0] if len({repr(values.get(key)) for values in settings}) > 1]
    columns = {
        "job": [run.folder.name for run, _ in started],
        **{key: _column([values.get(key) for values in settings]) for key in varied},
        "dev": [run.dev if run.finished else None for run, _ in started],
        "status": [run.state for run, _ in started],
        "seconds": [run.seconds if run.finished else None for run, _ in started],
        "run": [run.wandb_id for run, _ in started],
    }
    name = folder.resolve().name
    summary, artifacts = _summarise(runs, columns, varied, f"best-of-{name}")
    tracking = started[0][1].tracking
    tracking = dataclasses.replace(tracking, group=tracking.group or name, tags=[])
    try:
        if resolve_mode(tracking.wandb) == "disabled":
            return None
    except ConfigError:  # an invalid WANDB_MODE has already failed the jobs
        return sync_command(folder, runs)
    about = {"job_type": "sweep", "name": name, "config": {"varying": ", ".join(varied)}}
    if run := open_run(tracking, folder, _run_id(folder, ids[0]), **about):
        table = {"columns": [*columns], "data": [list(row) for row in zip(*columns.values(), strict=True)]}
        run.finish(summary=summary, tables={"jobs": table}, artifacts=artifacts, quiet=True)
    return sync_command(folder, runs)


def _summarise(
    runs: Sequence[Run], columns: Mapping[str, list[Any]], varied: Sequence[str], artifact: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the summary of the W&B run, and the best adapter as a list of at most one artifact with this name."""
    summary: dict[str, Any] = {"jobs": len(columns["job"]), "jobs_finished": columns["status"].count("finished")}
    if why := different_dev_sets(runs):
        summary["best/none"] = why
    best = find_best(runs)
    if best is None or best.run.folder.name not in columns["job"]:
        return summary, []
    index = columns["job"].index(best.run.folder.name)
    summary |= {"best/job": best.run.folder.name, f"best/dev/{best.run.metric}": best.run.dev}
    summary |= {f"best/{key}": columns[key][index] for key in varied}
    if best.row.n > 1:
        summary |= {"best/dev/mean": best.row.dev, "best/dev/std": best.row.std, "best/seeds": best.row.n}
    path = (best.run.folder / ADAPTER).absolute()
    artifact = re.sub(r"[^\w.-]", "-", artifact)[:128]
    return summary, [{"name": artifact, "path": str(path), "metadata": summary, "aliases": ["best"]}]


def submitted_config(run: Run) -> Config | None:
    """Return the config of a run as it was submitted, before `auto` was resolved; None if it cannot be read."""
    start = run.folder / START
    try:
        return read_resolved_config(start if start.is_file() else run.folder / CONFIG)
    except ConfigError:
        return None


def _column(values: Sequence[Any]) -> list[Any]:
    """Return values for a column of a W&B table, which must be all numbers, all strings or all booleans, or None."""
    kinds = {float if type(value) is int else type(value) for value in values if value is not None}
    if len(kinds) == 1 and kinds <= {float, str, bool}:
        return [*values]
    return [None if value is None else str(value) for value in values]


def _run_id(folder: Path, first: str) -> str:
    """Return the id of the sweep's W&B run; it is derived from a job's id once and then stored.

    Raises:
        DataError: The stored id cannot be read, or contains a path: W&B uses it as a folder name.
    """
    path = folder / "wandb" / "sweep-id"
    if not path.exists():
        write_text(path, f"sweep-{first}")
    try:
        run_id = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not is_plain_name(run_id):
        raise DataError(
            f"{path} must contain a name without / and .., got {run_id[:80]!r}. Try: rm {shlex.quote(str(path))}"
        )
    return run_id


def sync_command(folder: Path, runs: Sequence[Run]) -> str | None:
    """Return the command that uploads all offline runs of a sweep, or of a folder of sweeps; None if there are none."""
    folders = {
        folder,
        *(path for run in runs for path in (run.folder, run.folder.parent) if path.is_relative_to(folder)),
    }
    offline = [path for path in folders if any(path.glob("wandb/offline-run-*"))]
    patterns = sorted({"*/" * len(path.relative_to(folder).parts) for path in offline}, reverse=True)
    if not patterns:
        return None
    return "wandb sync " + " ".join(f"{shlex.quote(str(folder))}/{pattern}wandb/offline-run-*" for pattern in patterns)
