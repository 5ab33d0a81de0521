"""The process that talks to W&B for a run: the training never waits for it, and it may be killed at any time.

Lines of JSON come in on standard input: first what to start, at last how the run ended (`WandbRun` writes both); the end
of the input says that the run was killed. Lines of JSON go out: `began`, `info`, `failed`, `done`. In between it follows the
run's metrics.jsonl. Line n of that file is W&B's step n, so what W&B already has is never sent twice.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from promcse_pl.utils.paths import hide_home

Message = dict[str, Any]


class Ending:
    """Waits for the last line of the input in a thread of its own.

    Args:
        limit: Seconds after the end of the input at which this process, W&B's service with it, ends whatever it is doing.
    """

    def __init__(self, limit: float) -> None:
        self.message: Message = {"exit_code": 1}
        self.come = threading.Event()
        self._limit = limit
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        line = sys.stdin.readline()
        if line.endswith("\n"):
            self.message = json.loads(line)
        self.come.set()
        sys.stdin.readline()  # comes back when the run's process has ended
        time.sleep(self._limit)
        kill_service()
        os._exit(1)


def kill_service(pid: int | None = None) -> None:
    """Kill the processes that this one, or another, has started: W&B's service, which may hang."""
    import psutil

    with suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                process.kill()


def main(_arguments: Sequence[str]) -> NoReturn:
    """Keep one W&B run from its start to its end; the process ends with 0, or 1 when W&B failed."""
    report = _take_output()
    task = json.loads(sys.stdin.readline())
    ending = Ending(task["finish_seconds"])
    try:
        with _alone(Path(task["folder"]) / "wandb", task["start_seconds"]):
            _keep(task, ending, report)
    except Exception as error:
        # keys, networks, disks and versions fail in their own ways; the run's process decides what comes next
        report({"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"})
        kill_service()  # or W&B would wait for it when this process ends
        os._exit(1)
    os._exit(0)


def _keep(task: Message, ending: Ending, report: Callable[[Message], None]) -> None:
    import wandb

    online = task["mode"] == "online"
    run = wandb.init(
        **task["run"],
        dir=task["folder"],
        resume="allow" if online else None,
        settings=wandb.Settings(
            mode=task["mode"],
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            host="-",
            program="promcse",
            init_timeout=task["start_seconds"],
        ),
    )
    directory = Path(run.dir).parent
    report({"began": {"directory": str(directory), "url": run.url if online else None}})
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    _follow(run, Path(task["folder"]) / task["history"], ending)
    end = ending.message
    for name, table in end.get("tables", {}).items():
        run.log({name: wandb.Table(**table)})
    run.summary.update(end.get("summary", {}))
    for artifact in end.get("artifacts", ()) if online else ():
        files = wandb.Artifact(artifact["name"], type="adapter", metadata=artifact["metadata"])
        files.add_dir(artifact["path"])
        run.log_artifact(files, aliases=artifact["aliases"])
    run.finish(exit_code=end["exit_code"])
    wandb.teardown()  # comes back when everything is on disk
    _hide_home_in_logs(directory)
    _look_for_room(directory)
    for earlier in directory.parent.glob(f"offline-run-*-{glob.escape(task['run']['id'])}"):
        if earlier != directory:  # of a process that was killed; this one began with the history's first line
            shutil.rmtree(earlier, ignore_errors=True)
    report({"done": True})


def _follow(run: Any, history: Path, ending: Ending) -> None:  # noqa: ANN401  (a W&B run)
    """Log the lines of a growing history that W&B does not have, until the run has ended."""
    known, place = run.step, 0
    number, last = 0, False
    while not last:
        last = ending.come.wait(1)  # before reading: nothing is written after it
        with suppress(FileNotFoundError), history.open("rb") as stream:
            stream.seek(place)
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                place += len(line)
                if number >= known:
                    run.log(json.loads(line), step=number)
                number += 1


def _look_for_room(directory: Path) -> None:
    """Raise OSError when the disk is full: W&B's service says nothing then, and its file ends early."""
    probe = directory / "room"
    try:
        probe.write_bytes(bytes(64 * 1024))
    finally:
        probe.unlink(missing_ok=True)


def _hide_home_in_logs(directory: Path) -> None:
    """Take the home folder out of what W&B's client wrote about itself; W&B has no setting for it."""
    for path in directory.parent.glob("*/logs/*.log"):
        path.write_text(hide_home(path.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")


@contextmanager
def _alone(directory: Path, patience: float) -> Iterator[None]:
    """Wait for the process of a killed run that is still closing it, but not for ever."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("ab") as stream:
        patience += time.monotonic()
        while time.monotonic() < patience:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        yield


def _take_output() -> Callable[[Message], None]:
    """Keep standard output for messages; what libraries and W&B's service print goes nowhere."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)

    def report(message: Message) -> None:
        with suppress(OSError):  # the run's process has gone
            messages.write(json.dumps(message) + "\n")
            messages.flush()

    return report
