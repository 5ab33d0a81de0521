"""The W&B run of a whole sweep: a table of its jobs, and the best adapter."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promcse_pl.config import Config, flat_settings
from promcse_pl.run_folder import ADAPTER, CONFIG, START, Status, read_resolved_config, read_results, read_status
from promcse_pl.sweeps.collect import read_sweep
from promcse_pl.sweeps.ranking import different_dev_sets, find_best
from promcse_pl.tracking.wandb import open_run, resolve_mode, sent_settings
from promcse_pl.utils.errors import ConfigError, DataError, PromcseError
from promcse_pl.utils.files import write_text
from promcse_pl.utils.paths import is_plain_name


@dataclass(frozen=True, slots=True)
class _Job:
    folder: Path
    config: Config
    settings: Mapping[str, Any]
    status: Status
    results: Mapping[str, Any]

    @property
    def dev(self) -> float | None:
        """Spearman x 100 of a finished job."""
        return self.results.get("dev_spearman")


def publish_sweep(folder: Path) -> str | None:
    """Log a sweep as one W&B run of job type `sweep`: a table of its jobs, and online the best adapter under the alias `best`.

    Called again, after more jobs, it goes on with the same run. Without tracking it does nothing; trouble with W&B is a warning.
    The best run is determined by `promcse_pl.sweeps.ranking.find_best`.

    Args:
        folder: Of the sweep; every folder in it with a config.yaml and a status.json is a job.

    Returns:
        The one command that uploads every offline run of the sweep, this one too; None when there is none.

    Raises:
        PromcseError: The id of the sweep's own W&B run cannot be read or written.
    """
    jobs = list(_jobs(folder))
    ids = [job.status.wandb_id for job in jobs if job.status.wandb_id]
    if not ids:
        return None
    varying = [key for key in jobs[0].settings if len({repr(job.settings.get(key)) for job in jobs}) > 1]
    cells = {key: _column([job.settings.get(key) for job in jobs]) for key in varying}
    columns = ["job", *varying, "dev", "status", "seconds", "run"]
    data = [
        [
            job.folder.name,
            *(cells[key][place] for key in varying),
            job.dev,
            job.status.state,
            job.results.get("seconds"),
            job.status.wandb_id,
        ]
        for place, job in enumerate(jobs)
    ]
    runs = read_sweep(folder).runs
    best = find_best(runs)
    best_job = next((job for job in jobs if best and job.folder.name == best.run.folder.name), None)
    summary: dict[str, Any] = {
        "jobs": len(jobs),
        "jobs_finished": sum(job.status.state == "finished" for job in jobs),
    }
    artifacts = []
    if why := different_dev_sets(runs):
        summary["best/none"] = why
    if best and best_job:
        summary |= {"best/job": best_job.folder.name, "best/dev/spearman": best_job.dev}
        summary |= {f"best/{key}": cells[key][jobs.index(best_job)] for key in varying}
        if best.row.n > 1:
            summary |= {"best/dev/mean": best.row.dev, "best/dev/std": best.row.std, "best/seeds": best.row.n}
        artifacts = [
            {
                "name": re.sub(r"[^\w.-]", "-", f"best-of-{folder.resolve().name}")[:128],
                "path": str((best_job.folder / ADAPTER).absolute()),
                "metadata": summary,
                "aliases": ["best"],
            }
        ]
    tracking = jobs[0].config.tracking
    name = folder.resolve().name
    tracking = dataclasses.replace(tracking, group=tracking.group or name, tags=[])
    try:
        if resolve_mode(tracking.wandb) == "disabled":
            return None
    except ConfigError:  # an invalid WANDB_MODE has already failed the jobs
        return _sync_command(folder)
    about = {"job_type": "sweep", "name": name, "config": {"varying": ", ".join(varying)}}
    if run := open_run(tracking, folder, _run_id(folder, ids[0]), **about):
        run.finish(
            summary=summary, tables={"jobs": {"columns": columns, "data": data}}, artifacts=artifacts, quiet=True
        )
    return _sync_command(folder)


def _sync_command(folder: Path) -> str | None:
    places = [pattern for pattern in ("*/wandb", "wandb") if any(folder.glob(f"{pattern}/offline-run-*"))]
    if not places:
        return None
    return "wandb sync " + " ".join(f"{shlex.quote(str(folder))}/{place}/offline-run-*" for place in places)


def _jobs(folder: Path) -> Iterator[_Job]:
    """Read what lies in a sweep's folder, by number; what cannot be read is left out."""
    found = [path.parent for path in folder.glob(f"*/{CONFIG}")]
    for job in sorted(found, key=lambda path: (len(path.name), path.name)):
        with suppress(PromcseError):
            # start.yaml, where there is one: what the job was given, not what it settled
            config = read_resolved_config(job / START if (job / START).is_file() else job / CONFIG)
            status = read_status(job)
            results = {}
            with suppress(PromcseError):
                results = read_results(job)
            if status is not None:
                yield _Job(job, config, flat_settings(sent_settings(config)), status, results)


def _column(values: Sequence[Any]) -> list[Any]:
    """Return the values of a setting as a W&B table takes them: all numbers, all text or all booleans, and None."""
    kinds = {float if type(value) is int else type(value) for value in values if value is not None}
    return (
        [*values]
        if len(kinds) == 1 and kinds <= {float, str, bool}
        else [None if v is None else str(v) for v in values]
    )


def _run_id(folder: Path, first: str) -> str:
    """Return the id of the sweep's own W&B run, which is derived from a job's id once and then stored.

    Raises:
        DataError: The stored id cannot be read, or contains a path: W&B uses it as a folder name.
    """
    kept = folder / "wandb" / "sweep-id"
    if not kept.exists():
        write_text(kept, f"sweep-{first}")
    try:
        found = kept.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{kept} cannot be read: {error}") from error
    if not is_plain_name(found):
        raise DataError(
            f"{kept} must contain a name without / and .., got {found[:80]!r}. Try: rm {shlex.quote(str(kept))}"
        )
    return found
