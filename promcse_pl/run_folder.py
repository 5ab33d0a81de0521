"""The run folder: file names, config, status, results, and the lock against a second process."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args, get_type_hints

import yaml

from promcse_pl.config import Config, flat_settings
from promcse_pl.utils.errors import ConfigError, DataError
from promcse_pl.utils.files import remove_leftovers, write_text
from promcse_pl.utils.paths import hide_home, is_plain_name, require_regular_file, run_command

CONFIG, RESULTS, HISTORY, LOG, BAD_ROWS, ADAPTER, STATUS, LOCK, CHECKPOINTS, INPUTS, NON_FINITE, RANK_LOG = (
    "config.yaml",
    "results.json",
    "metrics.jsonl",
    "run.log",
    "bad_rows.txt",
    "adapter",
    "status.json",
    ".lock",
    "checkpoints",
    "inputs.json",
    "non_finite.safetensors",
    "run-rank{}.log",
)
DATA = "data.jsonl"
"""Training rows that were passed in memory (`promcse_pl.train`)."""
START, OUTPUT = "start.yaml", "output.log"
"""Files that a sweep writes into a job folder before the job starts: its config and its output."""
RESOLVED = "resolved"
"""Section of config.yaml with the resolved values of the settings in `RESOLVED_KEYS`."""
RESOLVED_KEYS = (
    *("model.revision", "model.pooling", "model.max_length", "model.prompts", "model.default_prompt"),
    *("trainer.device", "trainer.precision", "trainer.chunk_tokens"),
)
DEV_METRICS = {"spearman": "Spearman", "ndcg_at_10": "nDCG@10"}
"""Metrics of dev sets: name in keys -> name in texts. Scores under these keys are x 100."""
_BEFORE_START = {DATA, START, OUTPUT, STATUS, LOCK, LOG, ".hydra"}
_FIRST_FILES = re.compile("|".join(map(re.escape, (CONFIG, STATUS, LOCK, LOG, BAD_ROWS))) + r"|run-rank\d+\.log")
"""Files that a run writes before inputs.json."""
_LOCK_SECONDS = 1.0
"""Time to wait for the lock of a run folder: `is_running` holds it for a moment."""
_NEW_FOLDER = "the same command with hydra.run.dir=NEW_FOLDER (promcse train: --out NEW_FOLDER)"
State = Literal["running", "finished", "failed", "stopped", "pruned"]


def find_dev(values: Mapping[str, Any], prefix: str) -> tuple[str, Any] | None:
    """Return metric and value of a dev score; None without one.

    Args:
        values: Content of results.json, or an entry of metrics.jsonl.
        prefix: Prefix of the metric in its key: `dev_` or `dev/`.
    """
    return next(
        ((metric, values[prefix + metric]) for metric in DEV_METRICS if values.get(prefix + metric) is not None), None
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Content of status.json.

    Attributes:
        state: `running`, `finished`, `failed` (by an error), `stopped` (by a signal, after a save) or `pruned` (by a search).
        step, steps: Optimiser steps at the last save, and of the whole run; `steps` is None until they are known.
        error: Class and message of the error of a failed run.
        stopped_early: Why a finished run has fewer steps than planned; None if it has all of them.
        wandb_id: Id of the W&B run, chosen before training starts; None without tracking.
        callbacks: Class names of the callbacks and loggers passed to `promcse_pl.train`; resuming the run does not recreate them.
        started, updated: Seconds since 1970. Resuming moves `started` forward by the time between the two processes.
        pid: Process that wrote the status.
    """

    state: State
    step: int = 0
    steps: int | None = None
    error: str | None = None
    stopped_early: str | None = None
    wandb_id: str | None = None
    callbacks: list[str] = dataclasses.field(default_factory=list)
    started: float = dataclasses.field(default_factory=time.time)
    updated: float = dataclasses.field(default_factory=time.time)
    pid: int = dataclasses.field(default_factory=os.getpid)

    def at(self, step: int, steps: int) -> Status:
        """Return the status at another step."""
        return dataclasses.replace(self, step=step, steps=steps)

    def resumed(self) -> Status:
        """Return the status of the resumed run; the time between the two processes does not count."""
        started = time.time() - max(0.0, self.updated - self.started)
        return dataclasses.replace(self, state="running", error=None, started=started)


def write_status(folder: Path, status: Status) -> None:
    """Write status.json atomically."""
    now = dataclasses.replace(status, updated=time.time(), pid=os.getpid())
    write_text(folder / STATUS, json.dumps(hide_home(dataclasses.asdict(now)), indent=2) + "\n")


def read_status(folder: Path) -> Status | None:
    """Return the status of a run; None for a folder without status.json (no run, or one of an older version).

    Raises:
        DataError: The file is damaged.
    """
    path = folder / STATUS
    if not path.exists():
        return None
    try:
        status = Status(**read_json(path))
    except TypeError as error:
        raise DataError(f"{path} cannot be read as the status of a run: {error}") from error
    if status.state not in get_args(State):
        raise DataError(f"{path}: state must be one of {', '.join(get_args(State))}, got {status.state!r}")
    for name, hint in get_type_hints(Status).items():
        value = getattr(status, name)
        if name != "state" and not _has_type(value, hint):
            raise DataError(f"{path}: {name} cannot be {str(value)[:80]!r}")
    if status.wandb_id is not None and not is_plain_name(status.wandb_id):  # W&B uses it as a folder name
        raise DataError(f"{path}: wandb_id must be a name without / and .., got {status.wandb_id[:80]!r}")
    return status


def _has_type(value: object, hint: Any) -> bool:  # noqa: ANN401
    if hint == list[str]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return is_number(value) if hint is float else isinstance(value, hint)


def read_json(path: Path) -> Any:  # noqa: ANN401
    """Return the content of a JSON file.

    Raises:
        DataError: It cannot be read, or is not JSON.
    """
    try:
        return json.loads(require_regular_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value of a JSON file is a float or a 64-bit integer, but not a boolean."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def is_running(folder: Path) -> bool:
    """Return whether a process holds the lock of a run folder. A run with status `running` and no lock was killed."""
    with suppress(OSError), (folder / LOCK).open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def check_run_folder(folder: Path, *, advice: str = _NEW_FOLDER) -> None:
    """Check that a new run can start in a folder: it is absent, empty, or prepared by a sweep.

    Args:
        folder: Folder of the new run.
        advice: Command that uses another folder, for the message.

    Raises:
        ConfigError: The folder has other content, or is not a folder.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"cannot create the run folder {folder}: {error.strerror}") from error
    if CONFIG in names and STATUS in names:
        raise ConfigError(
            f"{folder} already contains a run. Try: {run_command(f'resume={folder}')} to resume it, or another folder"
        )
    foreign = [name for name in names if name not in _BEFORE_START or (name == STATUS and _is_foreign_status(folder))]
    if foreign:
        shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise ConfigError(f"a run needs a new or empty folder, but {folder.absolute()} contains {shown}. Try: {advice}")


def _is_foreign_status(folder: Path) -> bool:
    """Return whether status.json is not of this package; that of a job of a sweep, which has a start.yaml, may be damaged."""
    try:
        read_status(folder)
    except DataError:
        return not (folder / START).exists()
    return False


def remove_first_files(folder: Path, *, before: Collection[str] | None) -> None:
    """Remove the files that a new run wrote before inputs.json; all other entries of its folder are kept.

    Args:
        folder: Run folder; this process must hold its lock.
        before: Names of the entries before the run started; None: the folder was absent and is removed too if it is then empty.
    """
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name not in (before or ()) and _FIRST_FILES.fullmatch(path.name):
                path.unlink()
        if before is None:
            folder.rmdir()


def checkpoint_folders(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, sorted by step; other entries are ignored."""
    folder = run / CHECKPOINTS
    steps = [path for path in folder.glob("step-*") if re.fullmatch(r"step-[0-9]{1,18}", path.name)]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")))


def remove_checkpoints(run: Path) -> None:
    """Remove the checkpoints of a finished run, and the checkpoints folder if it is then empty."""
    for path in checkpoint_folders(run):
        shutil.rmtree(path, ignore_errors=True)
    remove_leftovers(run / CHECKPOINTS)
    with suppress(OSError):
        (run / CHECKPOINTS).rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Lock a run folder for this process; the kernel releases the lock when the process ends.

    Yields:
        The file descriptor of the lock. A child process that inherits it keeps the lock.

    Raises:
        ConfigError: Another process holds the lock, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / LOCK).open("ab")
    except OSError as error:
        raise ConfigError(f"cannot create the run folder {folder}: {error.strerror}") from error
    with stream:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    message = f"another process is running in {folder}. Try: another folder, or wait for it"
                    raise ConfigError(message) from None
            time.sleep(0.05)
        yield stream.fileno()


def read_config(path: str | Path) -> Config:
    """Read a config.yaml as it was typed: `auto` and a null revision are resolved again in a new run.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or does not match the schema.
    """
    return read_configs(path)[0]


def read_resolved_config(path: str | Path) -> Config:
    """Read a config.yaml with the values that were resolved when the run started, as a resumed run needs them.

    Raises:
        ConfigError: As for `read_config`.
    """
    return read_configs(path)[1]


def read_yaml(path: Path) -> Any:  # noqa: ANN401  (the content of a YAML file)
    """Return the content of a YAML file with settings.

    Raises:
        ConfigError: The file cannot be read or is not YAML.
    """
    try:
        return yaml.safe_load(require_regular_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = getattr(error, "strerror", None) or str(error)[:1000]
        raise ConfigError(f"cannot read the config {path}: {why}") from error


def read_configs(path: str | Path) -> tuple[Config, Config]:
    """Read a config.yaml once; return the settings as `read_config` and as `read_resolved_config`.

    Raises:
        ConfigError: As for `read_config`.
    """
    raw = read_yaml(Path(path))
    try:
        typed, resolved = split_resolved(raw)
        config = Config.from_dict(typed)
        return config, _with_resolved(config, resolved)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def split_resolved(raw: Any) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401  (the content of a YAML file)
    """Split the content of a config.yaml into the typed settings and the section `resolved` (dotted key -> value).

    Raises:
        ConfigError: The section is not a mapping of the keys in `RESOLVED_KEYS`.
    """
    if not isinstance(raw, dict) or RESOLVED not in raw:  # without the section: written by an earlier version
        return raw, {}
    resolved = raw[RESOLVED]
    if not isinstance(resolved, dict) or not resolved.keys() <= set(RESOLVED_KEYS):
        raise ConfigError(
            f"the section {RESOLVED} may only contain {', '.join(RESOLVED_KEYS)}, got {str(resolved)[:200]}"
        )
    return {key: value for key, value in raw.items() if key != RESOLVED}, resolved


def _with_resolved(config: Config, resolved: dict[str, Any]) -> Config:
    """Return a config with recorded values in place of unresolved ones (`auto`, null prompts) and of the revision."""
    tree = config.to_dict()
    for key, value in resolved.items():
        part, name = key.split(".")
        unresolved = (None,) if key in ("model.prompts", "model.default_prompt") else ("auto",)
        if tree[part][name] in unresolved or key == "model.revision":  # else it was edited, which resuming reports
            tree[part][name] = value
    return Config.from_dict(tree)


def write_config(config: Config, path: str | Path, resolved: Config | None = None) -> Path:
    """Write a config.yaml, with ~ for the home folder; return its path.

    Args:
        config: Settings as typed.
        path: File to write.
        resolved: Settings with resolved values; None before they are known.
    """
    path = Path(path)
    tree = config.to_dict()
    if resolved is not None:
        typed, used = flat_settings(tree), flat_settings(resolved.to_dict())
        if differing := {key: used[key] for key in RESOLVED_KEYS if used[key] != typed[key]}:
            tree[RESOLVED] = differing
    text = yaml.safe_dump(hide_home(tree), sort_keys=False, allow_unicode=True)
    write_text(path, f"# promcse train --config THIS_FILE repeats the run\n{text}")
    return path


def read_results(folder: str | Path) -> dict[str, Any]:
    """Return the content of a finished run's results.json.

    Raises:
        DataError: The file is missing or damaged.
    """
    results: dict[str, Any] = read_json(Path(folder) / RESULTS)
    return results


def read_history(path: str | Path, problems: list[str] | None = None) -> list[dict[str, Any]]:
    """Return the entries of a metrics.jsonl, oldest first. A last line without a line break is skipped: its run was killed.

    Args:
        path: The file.
        problems: Receives a message for each damaged line, which is skipped; None: a damaged line is an error.

    Raises:
        DataError: The file cannot be read, or a line is damaged and `problems` is None.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a history: {error}") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("not a JSON object")
            entries.append(entry)
        except (ValueError, RecursionError) as error:
            message = f"{path}:{number} cannot be read: {error}"
            if problems is None:
                raise DataError(message) from error
            problems.append(message)
    return entries
