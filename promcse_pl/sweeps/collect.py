"""Reads the runs of a sweep from their folders, without torch. A damaged file becomes a message of its run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from promcse_pl.config import comparable_settings, decides, flat_settings
from promcse_pl.run_folder import (
    CONFIG,
    HISTORY,
    RESULTS,
    START,
    find_dev,
    is_number,
    is_running,
    read_history,
    read_results,
    read_status,
    split_resolved,
)
from promcse_pl.sweeps.plan import PLAN, read_plan
from promcse_pl.utils.errors import DataError
from promcse_pl.utils.paths import expand

FROZEN = "frozen encoder"
"""Name of the baseline in results.json."""
_SHORT = 10_000
"""Maximum length of a YAML text in characters for the C loader. It is ten times as fast, but crashes the process at about 30,000
levels of nesting."""
_MAX_DEPTH = 10
"""Maximum nesting depth of settings."""


@dataclass(slots=True)
class Run:
    """A run, or a job of a sweep that has not started.

    Attributes:
        folder: Run folder; it may not exist yet.
        name: Path relative to the sweep's folder; the folder's name if the run is the only one.
        settings: By dotted name: the overrides of a planned sweep, otherwise all settings that affect training.
        encoder, data: `model.path` and `data.train`; None: unknown.
        state: `finished`, `failed`, `stopped`, `pruned`, `running`; `not started`; `killed`: running by its status,
            but no process holds its lock; `damaged`: its status, or the results of a finished run, cannot be read.
        error: Error message of a failed run.
        problems: Messages on files that cannot be read.
        started: Start time in seconds since 1970; None: unknown.
        seconds: Duration up to now or the last status; None: unknown.
        metric: Metric of the dev set, one of `promcse_pl.run_folder.DEV_METRICS`.
        dev: Score x 100 on the dev set at the best step; for unfinished runs the best so far; None: none measured.
        dev_name, dev_sha256: Name and content of the dev set; None: unknown.
        tests: Final test scores x 100 of the adapter by task.
        frozen: Scores x 100 of the frozen encoder by task, with `dev`.
        precision: Dtype of the frozen encoder in training; None: unknown.
        versions: Versions of promcse_pl, torch and Python.
        wandb_id: Id of its W&B run; None: no tracking.
        history: Entries of metrics.jsonl.
    """

    folder: Path
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    encoder: str | None = None
    data: str | None = None
    state: str = "not started"
    error: str | None = None
    problems: list[str] = field(default_factory=list)
    started: float | None = None
    seconds: float | None = None
    metric: str = "spearman"
    dev: float | None = None
    dev_name: str | None = None
    dev_sha256: str | None = None
    tests: dict[str, float] = field(default_factory=dict)
    frozen: dict[str, float] = field(default_factory=dict)
    precision: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    wandb_id: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether its dev score is final."""
        return self.state == "finished"


@dataclass(frozen=True, slots=True)
class Sweep:
    """Runs of a folder.

    Attributes:
        folder: Folder as given.
        runs: Runs in the order of the sweep.
        planned: Whether the folder has a sweep.json, so that the sweep can be resumed.
        warnings: Problems with the folder itself.
    """

    folder: Path
    runs: list[Run]
    planned: bool
    warnings: list[str]


def read_sweep(folder: str | Path, command: str = "promcse report") -> Sweep:
    """Read the folder of a sweep, or any folder with runs below it.

    Args:
        folder: The folder.
        command: Command that error messages suggest.

    Raises:
        DataError: The folder does not exist or contains no run.
    """
    folder = expand(folder)
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder (current folder: {Path.cwd()}). Try: {command} FOLDER, with the folder that the sweep "
            "printed, such as multirun/DATE/TIME"
        )
    plan, warnings = None, []
    if (folder / PLAN).exists():
        try:
            plan = read_plan(folder)
        except DataError as error:
            warnings.append(f"{error}; the runs below the folder are shown instead")
    runs = [_read_run(folder, job.folder, parse_overrides(job.overrides)) for job in plan.jobs] if plan else []
    if not runs:
        runs = [_read_run(folder, name, None) for name in _find_runs(folder)]
    if not runs:
        raise DataError(
            f"{folder} holds no run: no {CONFIG} or {START} in it or below. Try: {command} multirun/DATE/TIME"
        )
    return Sweep(folder, runs, plan is not None, warnings)


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """Return the settings of Hydra overrides of the form `key=value`; numbers are converted."""
    settings = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals:
            settings[key.lstrip("+~")] = _parse_value(value)
    return settings


def _parse_value(text: str) -> Any:  # noqa: ANN401
    for kind in (int, float):  # before YAML, which reads 1e-3 as a string
        try:
            return kind(text)
        except ValueError:
            pass
    try:
        return _load_yaml(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return text


def _load_yaml(text: str) -> Any:  # noqa: ANN401
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader) if len(text) < _SHORT else yaml.SafeLoader
    value = yaml.load(text, Loader=loader)
    if _is_deeper(value, _MAX_DEPTH):
        raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")
    return value


def _is_deeper(value: object, levels: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(parts) and (levels == 0 or any(_is_deeper(part, levels - 1) for part in parts))


def _find_runs(folder: Path) -> list[str]:
    """Return the relative paths of the runs below a folder; numeric names are sorted by value."""
    found = []
    for parent, subfolders, files in os.walk(folder):
        if CONFIG in files or START in files:
            found.append(os.path.relpath(parent, folder))
            subfolders.clear()  # folders inside a run (wandb/, adapter/) are not runs
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
    return sorted(
        found, key=lambda name: [(len(part), part) if part.isdigit() else (99, part) for part in name.split("/")]
    )


def _read_run(sweep: Path, name: str, overrides: dict[str, Any] | None) -> Run:
    run = Run(sweep / name, sweep.resolve().name if name == "." else name)
    config = _read_config(run)
    run.encoder, run.data = (
        value if isinstance(value := config.get(key), str) else None for key in ("model.path", "data.train")
    )
    settings = {key: value for key, value in config.items() if decides(key) == "training"}
    run.settings = settings if overrides is None else overrides
    _read_state(run)
    try:
        run.history = read_history(run.folder / HISTORY, run.problems) if (run.folder / HISTORY).exists() else []
    except DataError as error:
        run.problems.append(str(error))
    if run.finished:
        _read_results(run)
    if run.dev is None and not run.finished:
        found = [score for entry in run.history if (score := find_dev(entry, "dev/")) and is_number(score[1])]
        run.metric, run.dev = max(
            ((metric, score) for metric, score in found if score == score),
            key=lambda score: score[1],
            default=(run.metric, None),
        )
    return run


def _read_config(run: Run) -> dict[str, Any]:
    """Return the settings by dotted name, from start.yaml if it exists, else config.yaml with the resolved values."""
    for path in (run.folder / START, run.folder / CONFIG):
        if not path.exists():
            continue
        try:
            raw, resolved = split_resolved(_load_yaml(path.read_text(encoding="utf-8")))
            if not isinstance(raw, Mapping):
                raise ValueError(f"it holds {type(raw).__name__}, not settings")
            return comparable_settings(flat_settings(raw) | resolved)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            run.problems.append(f"{path} cannot be read: {error}")
    return {}


def _read_state(run: Run) -> None:
    try:
        status = read_status(run.folder)
    except DataError as error:
        run.state = "damaged"
        run.problems.append(str(error))
        return
    if status is not None:
        run.state, run.error, run.started, run.wandb_id = status.state, status.error, status.started, status.wandb_id
        run.seconds = max(0.0, status.updated - status.started)
    elif (run.folder / CONFIG).exists():  # a run of an older version
        run.state = "finished" if (run.folder / RESULTS).exists() else "running"
    if run.state == "running" and not is_running(run.folder):
        run.state = "killed"


def _read_results(run: Run) -> None:
    try:
        results = read_results(run.folder)
        metric, dev = find_dev(results, "dev_") or ("spearman", results["dev_spearman"])
        seconds = results["seconds"]
        scores, frozen = (results["scores"].get(name, {}) for name in ("adapter", FROZEN))
        if not all(value is None or is_number(value) for value in (dev, seconds, *scores.values(), *frozen.values())):
            raise ValueError("a score or time is not a number")
        dev_task = results.get("evaluation", {}).get("tasks", {}).get("dev", {"files": [{"sha256": None}]})
        name, sha256 = results.get("dev"), dev_task["files"][0]["sha256"]
        precision, versions = results.get("machine", {}).get("precision"), results.get("versions", {})
        if not all(value is None or isinstance(value, str) for value in (name, sha256, precision, *versions.values())):
            raise ValueError("the dev set, precision or a version is not a string")
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        run.state = "damaged"
        run.problems.append(f"{run.folder / RESULTS} cannot be read as results: {type(error).__name__}: {error}")
        return
    run.dev, run.dev_name, run.dev_sha256, run.precision, run.versions = dev, name, sha256, precision, versions
    run.metric, run.seconds = metric, run.seconds if seconds is None else seconds
    run.tests = {task: score for task, score in scores.items() if task != "dev" and score is not None}
    run.frozen = {task: score for task, score in frozen.items() if score is not None}
