"""Weights & Biases: a run that never costs the training anything.

Only an allow-list goes out: settings (of paths the last part), logged numbers, the final table and the adapter. Console output,
the environment, code, the git state and the machine's description stay here.

Everything that can hang or fail is done by a process of its own (wandb_process.py) that follows the run's metrics.jsonl. Nothing
here imports wandb.
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
from configparser import ConfigParser
from configparser import Error as ParsingError
from contextlib import suppress
from netrc import NetrcParseError, netrc
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

from promcse_pl.config import Config, TrackingConfig
from promcse_pl.run_folder import HISTORY
from promcse_pl.tracking.wandb_process import kill_service
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.interpreter import python_command

log = logging.getLogger("promcse_pl")

MODES = ("online", "offline", "disabled")
PUBLIC_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""The public server's names: of always, and of wandb since 0.31."""
START_SECONDS = 30
"""A server that has not answered by then makes the run an offline one."""
FINISH_SECONDS = 60
"""What is not sent by then after the end of a run is left to `wandb sync`."""
STOP_SECONDS = 10
"""The same for a run that failed or was stopped: a scheduler's patience is short."""
LONGEST_TAG = 64
"""Characters of a tag that W&B takes."""


def resolve_mode(setting: str) -> str:
    """Return the mode of a run: WANDB_MODE if set, else the setting; `auto` is online with a key and offline without.

    Raises:
        ConfigError: WANDB_MODE holds something else.
    """
    from_environment = os.environ.get("WANDB_MODE")
    if from_environment:
        mode = {"dryrun": "offline", "run": "online"}.get(from_environment, from_environment)
        if mode not in MODES:
            raise ConfigError(
                f"WANDB_MODE must be one of {', '.join(MODES)}, got {from_environment!r}. Try: unset WANDB_MODE"
            )
        return mode
    if setting != "auto":
        return setting
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Tell whether W&B will find a key: in the environment, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    names = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in names):
        with suppress(OSError, NetrcParseError):
            return bool(_hosts() & set(netrc(path).hosts))
    return False


def _hosts() -> set[str]:
    """Return the servers a key may be for: the one that the environment or `wandb login --host` names, or the public ones."""
    settings = ConfigParser(interpolation=None)
    with suppress(OSError, ParsingError, UnicodeDecodeError):
        settings.read(Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser() / "settings")
    url = os.environ.get("WANDB_BASE_URL") or settings.get("default", "base_url", fallback="")
    return {urlsplit(url).netloc} if url else set(PUBLIC_HOSTS)


def new_run_id() -> str:
    """Return an id for a W&B run that no other run has; no generator of the training is touched."""
    return secrets.token_hex(6)


def start_wandb(config: Config, folder: Path, run_id: str) -> WandbRun | None:
    """Begin, or go on with, the W&B run of a job; returns at once. None when disabled.

    Args:
        config: The resolved config; of paths in it the last part is sent.
        folder: The run's folder: its metrics.jsonl is followed, W&B's own files go to folder/wandb.
        run_id: The same for a job and for its resumption.
    """
    name = config.tracking.name or folder.name
    return open_run(config.tracking, folder, run_id, job_type="train", name=name, config=sent_settings(config))


def sent_settings(config: Config) -> dict[str, Any]:
    """Return the settings that go to W&B: all but tracking and folders; of paths the last part."""
    settings: dict[str, Any] = _public({name: part for name, part in config.to_dict().items() if name != "tracking"})
    for private in ("dir", "cache_dir"):
        del settings["data"][private]
    return settings


def open_run(tracking: TrackingConfig, folder: Path, run_id: str, **run: Any) -> WandbRun | None:  # noqa: ANN401
    """Open the W&B run of a folder; None when disabled.

    Args:
        tracking: Mode, project, entity, group and tags.
        folder: Gets wandb/.
        run_id: Of the run.
        run: What else `wandb.init` is to be told.
    """
    mode = resolve_mode(tracking.wandb)
    if mode == "disabled":
        return None
    tags = list(dict.fromkeys(short(tag, LONGEST_TAG) for tag in tracking.tags if tag))
    about = {"project": tracking.project, "entity": tracking.entity, "group": tracking.group, "tags": tags, **run}
    about["name"] = short(about["name"], 2 * LONGEST_TAG)
    return WandbRun({"id": run_id, **about}, folder.absolute(), mode)


def _public(value: Any) -> Any:  # noqa: ANN401  (a tree of settings)
    """Return settings with the last part of every path in place of the path."""
    if isinstance(value, Mapping):
        return {name: _public(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_public(part) for part in value]
    if not isinstance(value, str):
        return value
    # an override names several values: data.train=FILE,loss.margin=0.2
    return "".join(PurePath(part).name if _is_path(part) else part for part in re.split(r"([=,\[\]])", value))


def _is_path(text: str) -> bool:
    """From the root, home or here, or more than a hub id's one slash."""
    return "/" in text and (text.startswith(("/", ".", "~")) or text.count("/") > 1)


def short(text: str, most: int) -> str:
    """Return what W&B may see of a name or tag: of paths the last part, and so many characters."""
    text = _public(text)
    return text if len(text) <= most else text[: most - 1] + "…"


class WandbRun:
    """A W&B run, kept by a process of its own.

    A process that fails, or whose service is killed, is followed by one that writes the run offline, from its first line on.

    Args:
        run: What `wandb.init` is told.
        folder: Of the run.
        mode: `online` or `offline`.
    """

    def __init__(self, run: Mapping[str, Any], folder: Path, mode: str) -> None:
        self.id: str = run["id"]
        self._run, self._folder, self._mode = run, folder, mode
        self._process: subprocess.Popen[str] | None = None
        self._end: dict[str, Any] | None = None
        self._directory: str | None = None
        self._given_up = self._complete = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, daemon=True)
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
        """End the run and say how to upload it if it is not on the server; waits, but not for ever.

        Args:
            exit_code: 0: successful.
            summary: Final numbers.
            tables: Name -> columns and data.
            artifacts: Adapter folders to upload: name, path, metadata, aliases.
            quiet: The caller says how to upload.
        """
        limit = STOP_SECONDS if exit_code else FINISH_SECONDS
        end = {
            "exit_code": exit_code,
            "summary": dict(summary or {}),
            "tables": dict(tables or {}),
            "artifacts": [*artifacts],
        }
        try:
            threading.Thread(target=self._send_end, args=(end,), daemon=True).start()
            self._thread.join(limit)
        finally:
            hangs = self._thread.is_alive()
            self._given_up = True
            self._kill()
        if hangs:
            log.warning("W&B did not finish in %g s; the run's folder is complete without it", limit)
        if self._directory and not quiet and (self._mode == "offline" or not self._complete):
            what = "the W&B run is offline. To upload it" if self._complete else "to upload what W&B has of the run"
            online = "--include-online " if self._mode == "online" else ""
            log.info("%s: wandb login && wandb sync %s%s", what, online, shlex.quote(self._directory))

    def _serve(self) -> None:
        """Start the process and hear what it says; after a failure once more, offline."""
        for attempt in range(2):
            if attempt:
                self._mode = "offline"
            failure, began = self._attempt()
            if failure is None or self._given_up:
                return
            if self._mode == "online":
                failure += f"; server: {' or '.join(sorted(_hosts()))}"
            log.warning("W&B %s %s (%s)", "stopped" if began else "did not start", self._mode, failure)
            if self._mode == "offline" and not began:
                return

    def _attempt(self) -> tuple[str | None, bool]:
        """Return what failed, None if nothing did, and whether the run had begun before."""
        task = {
            "run": self._run,
            "folder": str(self._folder),
            "history": HISTORY,
            "mode": self._mode,
            "start_seconds": START_SECONDS,
            "finish_seconds": FINISH_SECONDS,
        }
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"} | {
            "WANDB_SILENT": "true",
            "WANDB_ERROR_REPORTING": "false",  # its crash reports carry paths
        }
        began, failure = False, None
        try:
            with self._lock:
                if self._given_up:
                    return None, False
                process = self._process = subprocess.Popen(
                    python_command("promcse_pl.tracking.wandb_process:main"),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for the run, which then ends this one in order
                )
                end = self._end
                self._send(process, [task])  # with the lock: the end must not come before it
            if end:
                self._send(process, [end])
            assert process.stdout is not None
            for line in process.stdout:
                message = json.loads(line)
                if "began" in message:
                    began, self._directory = True, message["began"]["directory"]
                    if message["began"]["url"]:
                        log.info("W&B run: %s", message["began"]["url"])
                failure = message.get("failed", failure)
                if "done" in message:
                    self._complete = True
                    return None, True
            code = process.wait()
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}", began
        return failure or f"its process ended with code {code}", began

    def _send_end(self, end: dict[str, Any]) -> None:
        with self._lock:
            self._end, process = end, self._process
        if process:
            self._send(process, [end])

    def _send(self, process: subprocess.Popen[str], lines: Sequence[dict[str, Any]]) -> None:
        assert process.stdin is not None
        with suppress(OSError):  # it has gone
            process.stdin.write("".join(json.dumps(line) + "\n" for line in lines))
            process.stdin.flush()

    def _kill(self) -> None:
        with self._lock:
            process = self._process
        if process and process.poll() is None:
            kill_service(process.pid)
            process.kill()
            process.wait()


def finish_wandb(run: WandbRun, results: Mapping[str, Any], adapter: Path) -> None:
    """Put the final scores and the adapter into the run of a job and end it."""
    scores = results["scores"]
    summary = {key: results[key] for key in SUMMARY if results[key] is not None}
    tables = {}
    if scores:  # empty without a development set and without tasks
        tables["results"] = {
            "columns": ["model", *scores["adapter"]],
            "data": [[name, *row.values()] for name, row in scores.items()],
        }
        summary |= {score_key(task): value for task, value in scores["adapter"].items()}
    artifact = {
        "name": f"adapter-{run.id}",
        "path": str(adapter.absolute()),
        "metadata": {key: value for key, value in summary.items() if "/" in key},
        "aliases": ["latest"],
    }
    run.finish(summary=summary, tables=tables, artifacts=[artifact])


SUMMARY = ("best_step", "steps", "trained_parameters", "training_seconds", "seconds", "rows_per_second")


def score_key(task: str) -> str:
    """Return the key of a final score in W&B: test/STS12, test/avg; the development score of the kept adapter is dev/spearman."""
    return "dev/spearman" if task == "dev" else f"test/{re.sub('^Avg', 'avg', task).replace(' ', '_')}"
