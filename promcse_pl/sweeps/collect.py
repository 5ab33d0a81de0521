"""What the folders of a sweep hold, read without torch; a damaged file is a message, never the end of the report."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from promcse_pl.config import decides, flat_settings
from promcse_pl.run_folder import (
    CONFIG,
    HISTORY,
    RESULTS,
    START,
    Status,
    is_number,
    is_running,
    read_history,
    read_results,
    read_status,
    split_resolved,
)
from promcse_pl.sweeps.plan import PLAN, read_plan
from promcse_pl.utils.errors import DataError

_SHORT = 10_000
"""Characters that YAML's loader in C gets to read: ten times as fast, and what is nested some 30,000 deep ends the process."""
_DEEPEST = 10
"""Levels that settings may be nested."""


@dataclass(slots=True)
class Run:
    """One job of a sweep, as far as it got.

    Attributes:
        folder: Where it lies (or would, had it begun).
        name: The folder, seen from the sweep's; its own name where it is that folder.
        settings: Dotted names (and groups of conf/) with their values.
        state: `finished`, `failed`, `stopped`, `pruned`, `running`; `killed`: it says running but no process holds it;
            `not started`; `damaged`: status.json or the results of a finished run cannot be read.
        error: What ended a failed run.
        problems: What could not be read, and why.
        precision: Dtype of the frozen encoder in training, from results.json of a finished run.
        dev_name: The development set.
        dev_sha256: Of its content; None: not known.
        dev: Spearman x 100 on it at the best step; of a run that is not finished, the best so far; None: none measured.
        tests: Final scores of the adapter by task, Spearman or accuracy x 100.
        seconds: From its start to its end, or to the last sign of life; None: not known.
        history: The entries of metrics.jsonl.
    """

    folder: Path
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    state: str = "not started"
    error: str | None = None
    problems: list[str] = field(default_factory=list)
    precision: str | None = None
    dev_name: str | None = None
    dev_sha256: str | None = None
    dev: float | None = None
    tests: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether its dev score is final."""
        return self.state == "finished"


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep's folder.

    Attributes:
        folder: As it was given.
        runs: In the sweep's order.
        planned: Whether a sweep.json binds the runs together, so that the sweep can be resumed.
        warnings: What is wrong with the folder itself.
    """

    folder: Path
    runs: list[Run]
    planned: bool
    warnings: list[str]


def read_sweep(folder: str | Path) -> Sweep:
    """Read a sweep's folder, or any folder with runs somewhere below it.

    Raises:
        DataError: There is no such folder, or no run in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Try: promcse report multirun/DATE/TIME")
    warnings: list[str] = []
    plan = None
    runs: list[Run] = []
    try:
        if (folder / PLAN).exists():
            plan = read_plan(folder)
            runs = [_read_run(folder, job.folder, parse_overrides(job.overrides)) for job in plan.jobs]
    except DataError as error:
        warnings.append(f"{error}; the runs below the folder are shown instead")
    if not runs:
        runs = [_read_run(folder, name, None) for name in _find_runs(folder)]
    if not runs:
        raise DataError(
            f"{folder} holds no run: no {CONFIG} or {START} in it or below. Try: promcse report multirun/DATE/TIME"
        )
    return Sweep(folder, runs, plan is not None, warnings)


def _find_runs(folder: Path) -> list[str]:
    """Return the runs below a folder by name; numbers in order of size."""
    found = []
    for place, inner, files in os.walk(folder):
        if CONFIG in files or START in files:
            found.append(os.path.relpath(place, folder))
            inner.clear()  # what lies inside a run (wandb/, adapter/) is no other run
        inner[:] = [name for name in inner if not name.startswith(".")]
    return sorted(
        found, key=lambda name: [(len(part), part) if part.isdigit() else (99, part) for part in name.split("/")]
    )


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """Return the settings that Hydra's `key=value` arguments set, numbers as numbers."""
    settings = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals:
            settings[key.lstrip("+~")] = _value(value)
    return settings


def _value(text: str) -> Any:  # noqa: ANN401
    for kind in (int, float):  # before YAML, for which 1e-3 is a text
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
    if _is_deeper(value, _DEEPEST):
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
    return value


def _is_deeper(value: object, most: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(parts) and (most == 0 or any(_is_deeper(part, most - 1) for part in parts))


def _read_run(sweep: Path, name: str, settings: dict[str, Any] | None) -> Run:
    run = Run(sweep / name, sweep.resolve().name if name == "." else name, settings or {})
    try:
        status = read_status(run.folder)
    except DataError as error:
        run.state = "damaged"
        run.problems.append(str(error))
    else:
        _take_status(run, status)
    if settings is None:
        _read_settings(run)
    try:
        run.history = read_history(run.folder / HISTORY, run.problems) if (run.folder / HISTORY).exists() else []
    except DataError as error:
        run.problems.append(str(error))
    if run.finished:
        _read_results(run)
    if run.dev is None and not run.finished:
        seen = [entry["dev/spearman"] for entry in run.history if is_number(entry.get("dev/spearman"))]
        run.dev = max((score for score in seen if score == score), default=None)
    return run


def _take_status(run: Run, status: Status | None) -> None:
    begun = (run.folder / CONFIG).exists()
    if status is None:  # a run of an older version, or none
        run.state = "not started" if not begun else "finished" if (run.folder / RESULTS).exists() else "running"
    else:
        run.state, run.error = status.state, status.error
        run.seconds = max(0.0, status.updated - status.started)
    if run.state == "running" and not is_running(run.folder):
        run.state = "killed"


def _read_settings(run: Run) -> None:
    """Take the settings as they were before the start: what `auto` became on a machine is no difference of settings."""
    for name in (START, CONFIG):
        path = run.folder / name
        if not path.exists():
            continue
        try:
            raw, resolved = split_resolved(_load_yaml(path.read_text(encoding="utf-8")))
            if not isinstance(raw, dict):
                raise ValueError(f"it holds {type(raw).__name__}, not settings")
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            run.problems.append(f"{path} cannot be read: {error}")
            continue
        # settings that do not affect training are not compared
        settings = flat_settings(raw) | resolved
        run.settings = {key: value for key, value in settings.items() if decides(key) == "training"}
        return


def _read_results(run: Run) -> None:
    path = run.folder / RESULTS
    try:
        results = read_results(run.folder)
        dev, seconds, scores = results["dev_spearman"], results["seconds"], results["scores"].get("adapter", {})
        if not all(value is None or is_number(value) for value in (dev, seconds, *scores.values())):
            raise ValueError("a score or time is not a number")
        name, precision = results.get("dev"), results.get("machine", {}).get("precision")
        dev_task = results.get("evaluation", {}).get("tasks", {}).get("dev", {"files": [{"sha256": None}]})
        sha256 = dev_task["files"][0]["sha256"]
        if not isinstance(name, str | None) or not isinstance(sha256, str | None):
            raise ValueError("the development set is no name")
        if not isinstance(precision, str | None):
            raise ValueError("the precision is not a string")
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        run.state = "damaged"
        run.problems.append(f"{path} cannot be read as results: {type(error).__name__}: {error}")
        return
    run.dev, run.dev_name, run.dev_sha256, run.precision = dev, name, sha256, precision
    run.seconds = seconds if seconds is not None else run.seconds
    run.tests = {task: score for task, score in scores.items() if task != "dev" and score is not None}
