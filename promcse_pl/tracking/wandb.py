"""Weights & Biases, in a separate process so that it cannot delay or fail training.

Only an allow-list is sent: settings (of a path only its last part), logged numbers, the final table and the adapter. Console
output, the environment, code, the git state and the description of the machine are not.

A follower process (wandb_process.py) reads the run's metrics.jsonl and does everything that can hang or fail. This module does
not import wandb.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shlex
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from promcse_pl.config import Config, TrackingConfig, is_list
from promcse_pl.run_folder import HISTORY, find_dev
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.interpreter import python_command
from promcse_pl.utils.paths import SUFFIXES, expand, file_suffix, is_folder, looks_like_path
from promcse_pl.utils.processes import ChildProcess, kill_descendants, start_process, stop_all

log = logging.getLogger("promcse_pl")

MODES = ("online", "offline", "disabled")
_FILES = ("data.train", "data.dev", "evaluation.tasks")
"""Settings whose values with a slash are always paths; in others, OWNER/NAME may be a hub id."""
START_SECONDS = 30
"""Time in which the server must answer; otherwise the W&B run is an offline one."""
FINISH_SECONDS = 60
"""Seconds to send the remaining data after the end of a run; `wandb sync` can upload data that was not sent."""
STOP_SECONDS = 10
"""The same for a run that failed or was stopped: schedulers kill soon after SIGTERM."""
MAX_TAG_LENGTH = 64
"""Characters of a tag that W&B accepts."""
SUMMARY = (
    "best_step",
    "steps",
    "stopped_early",
    "trained_parameters",
    "training_seconds",
    "seconds",
    "rows_per_second",
)
"""Entries of results.json that go into the summary, if they are not null."""


def resolve_mode(setting: str) -> str:
    """Return the mode of a run: `disabled` if it is the setting, else WANDB_MODE if it is set, else the setting.

    Returns:
        One of `MODES`, or `auto`: online if W&B finds a key, else offline, which the follower finds out.

    Raises:
        ConfigError: WANDB_MODE is not valid.
    """
    mode = os.environ.get("WANDB_MODE")
    if not mode or setting == "disabled":
        return setting
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if mode not in MODES:
        raise ConfigError(f"WANDB_MODE must be one of {', '.join(MODES)}, got {mode!r}. Try: unset WANDB_MODE")
    return mode


def new_run_id() -> str:
    """Return the id that a W&B agent chose for this trial of a W&B sweep, else a unique one.

    It does not use the generators that training seeds.
    """
    assigned = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    return assigned or secrets.token_hex(6)


def start_wandb(config: Config, folder: Path, run_id: str) -> WandbRun | None:
    """Start or resume the W&B run of a run, without waiting for it; None if W&B is disabled.

    Args:
        config: The resolved config.
        folder: Folder of the run: its metrics.jsonl is followed, W&B's own files go to folder/wandb.
        run_id: Id of the W&B run, the same when a run is resumed.
    """
    name = config.tracking.name or folder.name
    return open_run(config.tracking, folder, run_id, job_type="train", name=name, config=sent_settings(config))


def sent_settings(config: Config) -> dict[str, Any]:
    """Return the settings that are sent to W&B: all but tracking and folders, and of a path its last part."""
    settings: dict[str, Any] = hide_folders(
        {name: part for name, part in config.to_dict().items() if name != "tracking"}
    )
    for private in ("dir", "cache_dir"):
        del settings["data"][private]
    return settings


def open_run(tracking: TrackingConfig, folder: Path, run_id: str, **run: Any) -> WandbRun | None:  # noqa: ANN401
    """Open the W&B run of a folder; None if W&B is disabled.

    Args:
        tracking: Mode, project, entity, group and tags.
        folder: Folder for W&B's own files, in wandb/.
        run_id: Id of the W&B run.
        run: Further arguments of `wandb.init`.
    """
    mode = resolve_mode(tracking.wandb)
    if mode == "disabled":
        return None
    tags = list(dict.fromkeys(short(tag, MAX_TAG_LENGTH) for tag in tracking.tags if tag))
    options = {"project": tracking.project, "entity": tracking.entity, "group": tracking.group, "tags": tags, **run}
    options["name"] = short(options["name"], 2 * MAX_TAG_LENGTH)
    return WandbRun({"id": run_id, **options}, folder.absolute(), mode)


def hide_folders(value: Any, key: str = "") -> Any:  # noqa: ANN401  (a tree of settings)
    """Return settings in which every path is replaced by its last part.

    Args:
        value: A tree of settings, or the value of one, or overrides such as data.train=FILE,loss.margin=0.2.
        key: Dotted key of the value, if it is known.
    """
    if isinstance(value, Mapping):
        return {name: hide_folders(part, f"{key}.{name}".lstrip(".")) for name, part in value.items()}
    if isinstance(value, list):
        return [hide_folders(part, key) for part in value]
    if not isinstance(value, str):
        return value
    is_single = key != "" and not is_list(key)
    parts, shown = [value] if is_single else re.split(r"('[^']*'|\"[^\"]*\"|[=,\[\]])", value), []
    for part, after in zip(parts, [*parts[1:], ""], strict=True):
        key, text = part if after == "=" else key, part.strip("'\"")
        shown.append(part.replace(text, PurePath(text).name) if _is_path(text, key) else part)
    return "".join(shown)


def _is_path(text: str, key: str) -> bool:
    """Return whether a value is a path; OWNER/NAME is one in a setting for files, and of an encoder in the current folder."""
    is_local = key in _FILES or (key == "model.path" and is_folder(expand(text)))
    return "/" in text and (is_local or looks_like_path(text) or file_suffix(Path(text)) in SUFFIXES)


def short(text: str, max_length: int) -> str:
    """Return a name or tag for W&B: of a path its last part, cut to a number of characters."""
    text = hide_folders(text)
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


class WandbRun:
    """A W&B run, written by a follower process.

    If the follower fails or is killed, a second one writes the whole run offline.

    Args:
        run: Arguments of `wandb.init`.
        folder: Folder of the run.
        mode: `online`, `offline` or `auto`.
    """

    def __init__(self, run: Mapping[str, Any], folder: Path, mode: str) -> None:
        self.id: str = run["id"]
        self._run, self._folder, self._mode = run, folder, mode
        self._follower: ChildProcess | None = None
        self._end: dict[str, Any] | None = None
        self._directory: str | None = None
        self._is_abandoned = self._is_complete = False
        self._lock = threading.Lock()  # of _follower, _end and _is_abandoned
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()

    def finish(
        self,
        exit_code: int = 0,
        *,
        summary: Mapping[str, Any] | None = None,
        tables: Mapping[str, Any] | None = None,
        artifacts: Sequence[Mapping[str, Any]] = (),
        quiet: bool = False,
    ) -> None:
        """Finish the run, waiting for a limited time, and log how to upload it if it is not on the server.

        Args:
            exit_code: 0: successful.
            summary: Final numbers.
            tables: Columns and data of each table.
            artifacts: Adapter folders to upload: name, path, metadata, aliases.
            quiet: Do not log how to upload it.
        """
        limit = STOP_SECONDS if exit_code else FINISH_SECONDS
        end = {
            "exit_code": exit_code,
            "summary": dict(summary or {}),
            "tables": dict(tables or {}),
            "artifacts": [*artifacts],
        }
        try:
            threading.Thread(
                target=self._send_end, args=(end,), daemon=True
            ).start()  # a follower that hangs reads nothing
            self._thread.join(limit)
        finally:
            hangs = self._thread.is_alive()
            with self._lock:
                self._is_abandoned = True
            if self._follower and self._follower.poll() is None:
                kill_descendants(self._follower.pid)
                stop_all([self._follower], 0)
        if hangs:
            log.warning("W&B did not finish in %g s; the run's folder is complete without it", limit)
        if self._directory and not quiet and (self._mode == "offline" or not self._is_complete):
            what = "the W&B run is offline. To upload it" if self._is_complete else "to upload what W&B has of the run"
            online = "--include-online " if self._mode == "online" else ""
            log.info("%s: wandb login && wandb sync %s%s", what, online, shlex.quote(self._directory))

    def _supervise(self) -> None:
        """Run a follower; if it fails, run another one offline."""
        for attempt in range(2):
            if attempt:
                self._mode = "offline"
            failure, is_started = self._run_follower()
            if failure is None or self._is_abandoned:
                return
            mode = "offline" if self._mode == "offline" else "online"
            log.warning("W&B %s %s (%s)", "stopped" if is_started else "did not start", mode, failure)
            if mode == "offline" and not is_started:
                return

    def _run_follower(self) -> tuple[str | None, bool]:
        """Run a follower to its end; return why it failed (None: it did not), and whether the W&B run was started."""
        task = {
            "run": self._run,
            "folder": str(self._folder),
            "history": HISTORY,
            "mode": self._mode,
            "start_seconds": START_SECONDS,
            "finish_seconds": FINISH_SECONDS,
        }
        # its error reports contain paths; the service of another run would end with that run
        environment = {**os.environ, "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
        environment.pop("WANDB_SERVICE", None)
        is_started, failure = False, None
        try:
            with self._lock:
                if self._is_abandoned:
                    return None, False
                self._follower = start_process(
                    python_command("promcse_pl.tracking.wandb_process:main"),
                    environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
                self._send(task)
                end = self._end
            if end:
                self._send(end)
            for line in self._follower.stdout:
                message = json.loads(line)
                if message["event"] == "started":
                    is_started, self._mode, self._directory = True, message["mode"], message["directory"]
                    if message["url"]:
                        log.info("W&B run: %s", message["url"])
                elif message["event"] == "failed":
                    failure = message["reason"]
                else:
                    self._is_complete = True
                    return None, True
            code = self._follower.wait()
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}", is_started
        return failure or f"its process ended with code {code}", is_started

    def _send_end(self, end: dict[str, Any]) -> None:
        with self._lock:
            self._end = end
            if not self._follower:
                return
        self._send(end)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._follower
        with suppress(OSError):  # the follower has ended
            self._follower.stdin.write(json.dumps(message) + "\n")
            self._follower.stdin.flush()


def finish_wandb(run: WandbRun, results: Mapping[str, Any], adapter: Path) -> None:
    """Finish the W&B run of a run, with its final scores and its adapter."""
    scores = results["scores"]
    summary = {key: results[key] for key in SUMMARY if results[key] is not None}
    tables = {}
    if scores:  # empty without a dev set and tasks
        tables["results"] = {
            "columns": ["model", *scores["adapter"]],
            "data": [[name, *row.values()] for name, row in scores.items()],
        }
        metric, _ = find_dev(results, "dev_") or ("spearman", None)
        summary |= {score_key(task, metric): value for task, value in scores["adapter"].items()}
    artifact = {
        "name": f"adapter-{run.id}",
        "path": str(adapter.absolute()),
        "metadata": {key: value for key, value in summary.items() if "/" in key},
        "aliases": ["latest"],
    }
    run.finish(summary=summary, tables=tables, artifacts=[artifact])


def score_key(task: str, metric: str = "spearman") -> str:
    """Return the key of a final score in W&B: test/STS12, test/avg; dev/METRIC for the dev score of the saved adapter."""
    return f"dev/{metric}" if task == "dev" else f"test/{re.sub('^Avg', 'avg', task).replace(' ', '_')}"
