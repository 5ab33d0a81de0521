"""The W&B follower: a process that writes the W&B run of a run, so that training never waits for W&B.

It may be killed at any time. `promcse_pl.tracking.wandb.WandbRun` writes two JSON lines to its stdin: the task, and how the run
ended; stdin is closed early if the run was killed. The follower writes JSON lines to stdout: events `started`, `failed` and
`done`. In between it follows the run's metrics.jsonl and sends the entries after the last `step` that W&B has.
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
from promcse_pl.utils.processes import kill_descendants

Message = dict[str, Any]


class RunEnd:
    """Waits, in a thread, for the message with which the run ends.

    Args:
        limit: Seconds after the end of the input, thus of the run's process, after which this process is killed.

    Attributes:
        message: The message; before it was received, that of a run that was killed.
        received: Set when the run has ended.
    """

    def __init__(self, limit: float) -> None:
        self.message: Message = {"exit_code": 1}
        self.received = threading.Event()
        self._limit = limit
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        line = sys.stdin.readline()
        if line.endswith("\n"):
            self.message = json.loads(line)
        self.received.set()
        sys.stdin.readline()  # returns when the run's process has ended
        time.sleep(self._limit)
        kill_descendants()  # W&B's service may hang
        os._exit(1)


def main(_arguments: Sequence[str]) -> NoReturn:
    """Write one W&B run; the process exits with 0, or 1 if W&B failed."""
    send = _take_stdout()
    task = json.loads(sys.stdin.readline())
    end = RunEnd(task["finish_seconds"])
    try:
        with _only_follower(Path(task["folder"]) / "wandb", task["start_seconds"]):
            _write_run(task, end, send)
    except Exception as error:  # wrong keys, networks, disks and versions raise many exception types
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if task["mode"] != "offline" and (wandb := sys.modules.get("wandb")):
            reason += f"; server: {wandb.setup().settings.base_url}"
        send({"event": "failed", "reason": reason})
        kill_descendants()  # at exit, W&B would wait for its service
        os._exit(1)
    os._exit(0)


def _start_run(task: Message, mode: str) -> Any:  # noqa: ANN401  (a W&B run)
    import wandb

    return wandb.init(
        **task["run"],
        dir=task["folder"],
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(
            mode=mode,
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


def _write_run(task: Message, end: RunEnd, send: Callable[[Message], None]) -> None:
    import wandb

    mode = "online" if task["mode"] == "auto" else task["mode"]
    try:
        run = _start_run(task, mode)
    except wandb.errors.UsageError:  # W&B found no key
        if task["mode"] != "auto":
            raise
        mode = "offline"
        run = _start_run(task, mode)
    directory = Path(run.dir).parent
    is_online = mode == "online"
    send({"event": "started", "mode": mode, "directory": str(directory), "url": run.url if is_online else None})
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    _follow(run, Path(task["folder"]) / task["history"], end)
    for name, table in end.message.get("tables", {}).items():
        run.log({name: wandb.Table(**table)})
    run.summary.update(end.message.get("summary", {}))
    for artifact in end.message.get("artifacts", ()) if is_online else ():
        files = wandb.Artifact(artifact["name"], type="adapter", metadata=artifact["metadata"])
        files.add_dir(artifact["path"])
        run.log_artifact(files, aliases=artifact["aliases"])
    run.finish(exit_code=end.message["exit_code"])
    wandb.teardown()  # returns when everything is on disk
    _hide_home_in_logs(directory)
    _check_disk(directory)
    for earlier in directory.parent.glob(f"offline-run-*-{glob.escape(task['run']['id'])}"):
        if earlier != directory:  # of a follower that was killed; this one has written the whole history
            shutil.rmtree(earlier, ignore_errors=True)
    send({"event": "done"})


def _follow(run: Any, history: Path, end: RunEnd) -> None:  # noqa: ANN401  (a W&B run)
    """Log the lines of a growing history that W&B does not have, until the run has ended."""
    known = dict(run.summary)  # last values of a resumed run
    offset, is_last = 0, False
    while not is_last:
        is_last = end.received.wait(1)  # before reading: nothing is written after it
        with suppress(FileNotFoundError), history.open("rb") as stream:
            stream.seek(offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                offset += len(line)
                entry = json.loads(line)
                if not _is_known(entry, known):
                    run.log(entry)


def _is_known(entry: Message, known: Message) -> bool:
    """Return whether W&B has an entry; the dev evaluation of its last step may be missing, if the run was killed during it."""
    step, last = entry["step"] or 0, known.get("step", -1)
    dev = {name: value for name, value in entry.items() if name.startswith("dev/")}
    return step < last or (step == last and all(known.get(name) == value for name, value in dev.items()))


def _check_disk(directory: Path) -> None:
    """Raise OSError if the disk is full: W&B's service would report no error and write an incomplete file."""
    probe = directory / "probe"
    try:
        probe.write_bytes(bytes(64 * 1024))
    finally:
        probe.unlink(missing_ok=True)


def _hide_home_in_logs(directory: Path) -> None:
    """Replace the home folder in the logs of W&B's client, which has no setting for it."""
    for path in directory.parent.glob("*/logs/*.log"):
        path.write_text(hide_home(path.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")


@contextmanager
def _only_follower(directory: Path, limit: float) -> Iterator[None]:
    """Wait some seconds for the follower of an earlier, killed process that is still finishing the run."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("ab") as stream:
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        yield


def _take_stdout() -> Callable[[Message], None]:
    """Return a function that writes messages to stdout; what libraries and W&B's service print is discarded."""
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)

    def send(message: Message) -> None:
        with suppress(OSError):  # the run's process has ended
            stdout.write(json.dumps(message) + "\n")
            stdout.flush()

    return send
