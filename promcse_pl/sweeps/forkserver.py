"""Processes that start in a moment: each is forked from one, the server, that has imported torch, transformers and Lightning.

The server does nothing else: it reads no data and touches no GPU, so that what is forked from it is as good as a new interpreter.
Lines of JSON go to its standard input, one for each process to begin; lines of JSON come from its standard output: one when the
imports are done, one for each process that began, one for each that ended. When its input ends, because its starter has, it sends
SIGTERM to all that run and stays until they have ended.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promcse_pl.utils.errors import PromcseError
from promcse_pl.utils.imports import unwatched_imports
from promcse_pl.utils.interpreter import python_command
from promcse_pl.utils.processes import end_with
from promcse_pl.utils.signals import SIGNALS, Stopped, StopSignals

PRELOAD = (
    "promcse_pl.cli.main",
    "promcse_pl.runs.lifecycle",
    "promcse_pl.evaluation.report",
    "promcse_pl.tracking.local",
    "promcse_pl.training.fit",
    "promcse_pl.runs.inputs",
    "promcse_pl.evaluation.suite",
    "promcse_pl.tracking.wandb",
    "transformers.models.bert.modeling_bert",
    "transformers.models.roberta.modeling_roberta",
)
"""What a run imports late."""
POLL = 0.05
"""Seconds between two looks at the processes."""


@dataclass(slots=True)
class Task:
    """A function to run in a process of its own.

    Attributes:
        name: Of the job.
        target: "module:function"; the function takes the arguments and returns an exit code.
        arguments: Of the function; `sys.argv` holds them too.
        output: File that gets what it prints; it is appended to.
    """

    name: str
    target: str
    arguments: Sequence[str]
    output: Path


class Process:
    """A process that the server began. It leads a session of its own: Ctrl-C at a terminal does not reach it."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self._server = server
        self._asked = False

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal; None while it runs."""
        return self._server.exit_code(self.pid)

    def wait(self, seconds: float) -> bool:
        """Wait for its end, so long at most; return whether it has come."""
        until = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > until:
                return False
            time.sleep(POLL)
        return True

    def terminate(self) -> None:
        """Ask it, once, to save and end: a second signal would cut its saving short."""
        if self.poll() is None and not self._asked and not self._server.has_asked:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
        self._asked = True

    def kill(self) -> None:
        """End it and what it started."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


class ForkServer:
    """Begins tasks; the server's imports begin at once.

    Args:
        environment: Variables for all tasks, among them those that libraries read when they are imported (OMP_NUM_THREADS).
        preload: Modules to import.
    """

    def __init__(self, environment: Mapping[str, str], preload: Sequence[str] = PRELOAD) -> None:
        # the server begins with them blocked, and keeps it so: what is sent early waits until the task can take it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._server = subprocess.Popen(
                python_command("promcse_pl.sweeps.forkserver:main", *preload),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._is_ready, self._refused = False, 0
        self._codes: dict[int, int | None] = {}
        self._begun: list[int] = []
        self._rest = b""

    @property
    def has_asked(self) -> bool:
        """Whether the kernel has told all tasks to end, because the server was killed."""
        return sys.platform == "linux" and self._server.poll() is not None

    def ready(self) -> bool:
        """Return whether the imports are done.

        Raises:
            PromcseError: They failed, or the server was killed in them.
        """
        self._catch_up()
        if not self._is_ready and self._server.poll() is not None:
            raise PromcseError(
                "what the jobs need could not be imported (the reason stands above). "
                "Try: pip install -c constraints.txt -e ."
            )
        return self._is_ready

    def start(self, task: Task, environment: Mapping[str, str]) -> Process:
        """Begin a task; waits until the server is `ready`.

        Args:
            task: What to run.
            environment: Variables of its own.

        Raises:
            PromcseError: The server was killed, or the machine has no room for another process.
        """
        task.output.parent.mkdir(parents=True, exist_ok=True)
        request = {
            "target": task.target,
            "arguments": list(task.arguments),
            "output": str(task.output.absolute()),
            "environment": dict(environment),
        }
        assert self._server.stdin is not None
        with suppress(BrokenPipeError):
            self._server.stdin.write(json.dumps(request).encode() + b"\n")
            self._server.stdin.flush()
        self._refused = 0
        while not self._begun:
            if self._refused:
                raise PromcseError(
                    f"a job's process cannot be started: {os.strerror(self._refused)}. "
                    "Try: python run.py -m sweep.resume=FOLDER sweep.parallel=1"
                )
            if not self._listen():
                raise PromcseError(
                    "the process from which jobs are started has ended. Try: python run.py -m sweep.resume=FOLDER"
                )
        return Process(self, self._begun.pop())

    def exit_code(self, pid: int) -> int | None:
        """Return the exit code of a process that was begun, negative for a signal; None while it runs."""
        self._catch_up()
        if self._codes[pid] is None and self._server.poll() is not None and not _is_alive(pid):
            return -signal.SIGKILL  # nobody knows; it was told to end when the server was killed
        return self._codes[pid]

    def close(self) -> None:
        """End the server; what still runs is asked to save and end, and waited for."""
        assert self._server.stdin is not None
        with suppress(BrokenPipeError):
            self._server.stdin.close()
        if None not in self._codes.values():
            self._server.kill()  # it may be importing
        self._server.wait()

    def _catch_up(self) -> None:
        assert self._server.stdout is not None
        while select.select([self._server.stdout], [], [], 0)[0] and self._listen():
            pass

    def _listen(self) -> bool:
        """Take in what the server tells; return False when it has ended."""
        assert self._server.stdout is not None
        read = os.read(self._server.stdout.fileno(), 65536)
        *lines, self._rest = (self._rest + read).split(b"\n")
        for answer in map(json.loads, lines):
            if "ready" in answer:
                self._is_ready = True
            elif "refused" in answer:
                self._refused = answer["refused"]
            elif "began" in answer:
                self._begun.append(answer["began"])
                self._codes[answer["began"]] = None
            else:
                self._codes[answer["ended"]] = answer["code"]
        if not read:
            self._server.wait()
        return bool(read)


def _is_alive(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main(preload: Sequence[str]) -> int:
    """Be the server; what it forks comes back from here too."""
    channel = os.dup(1)
    os.dup2(2, 1)  # what an import prints is no answer
    with unwatched_imports():
        for name in preload:
            importlib.import_module(name)
    _tell(channel, ready=1)
    server = os.getpid()
    children: set[int] = set()
    going = True
    while going or children:
        if going and select.select([sys.stdin.buffer], [], [], POLL)[0]:
            line = sys.stdin.buffer.readline()
            if line:
                try:
                    pid = os.fork()
                except OSError as error:  # too little memory, or too many processes
                    _tell(channel, refused=error.errno or errno.EAGAIN)
                    continue
                if pid == 0:
                    os.close(channel)
                    return _run(json.loads(line), server)
                children.add(pid)
                _tell(channel, began=pid)
            else:
                going = False
                for pid in children:
                    os.kill(pid, signal.SIGTERM)
        elif not going:
            time.sleep(POLL)
        while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            children.discard(ended[0])
            _tell(channel, ended=ended[0], code=os.waitstatus_to_exitcode(ended[1]))
    return 0


def _tell(channel: int, **answer: int) -> None:
    with suppress(BrokenPipeError):  # the starter was killed
        os.write(channel, json.dumps(answer).encode() + b"\n")


def _run(request: Mapping[str, Any], server: int) -> int:
    """Be a task."""
    os.setsid()
    with Path(os.devnull).open("rb") as nothing, Path(request["output"]).open("ab") as output:
        for source, number in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source.fileno(), number)
    os.environ.update(request["environment"])
    end_with(server, signal.SIGTERM)
    module, _, function = request["target"].partition(":")
    if not _is_as_new():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.execv(sys.executable, python_command(request["target"], *request["arguments"]))
    sys.argv = [module, *request["arguments"]]
    try:
        with StopSignals():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            code: int = getattr(importlib.import_module(module), function)(request["arguments"])
    except Stopped as stopped:
        return stopped.exit_code
    return code


def _is_as_new() -> bool:
    """Return whether this fork can do what a new process can: no import has asked CUDA for anything, and this is no Mac."""
    torch = sys.modules.get("torch")
    return sys.platform == "linux" and not (torch and torch.cuda._is_in_bad_fork())
