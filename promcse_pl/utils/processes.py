"""Child processes: how the ranks of a run, the jobs of a sweep and the W&B follower are started and stopped.

A child leads its own session: Ctrl-C in the terminal reaches only this process, which stops its children.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from promcse_pl.utils.signals import STOP_SIGNALS

PARENT = "PROMCSE_PARENT"
"""Environment variable of a child that must not outlive its parent: the parent's process id and the signal it then gets."""
RANK_THREADS = "PROMCSE_THREADS"
"""Environment variable of a job of a sweep: the number of threads of all its ranks together."""
PROCESS_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class StoppableProcess(Protocol):
    """A process on this machine (`ChildProcess`) or on a node of a Ray cluster."""

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process runs."""

    def terminate(self) -> None:
        """Send SIGTERM, but only once."""

    def kill(self) -> None:
        """Kill the process and its group."""


class ChildProcess:
    """A child process, started or forked.

    Attributes:
        pid: Process id, and the id of the process group and session.
        stdin, stdout: Pipes to and from the process, if it was started with any.
    """

    def __init__(self, process: subprocess.Popen[Any] | BaseProcess) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self.stdin: Any = getattr(process, "stdin", None)
        self.stdout: Any = getattr(process, "stdout", None)
        self._process = process
        self._is_terminated = False

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process runs."""
        return self._process.poll() if isinstance(self._process, subprocess.Popen) else self._process.exitcode

    def wait(self) -> int:
        """Wait until the process has ended; return its exit code."""
        while (code := self.poll()) is None:
            time.sleep(PROCESS_POLL_SECONDS)
        return code

    def send_signal(self, signum: int) -> None:
        """Send a signal to the process, but not to its group."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def terminate(self) -> None:
        """Send SIGTERM, but only once: a second one would interrupt the save that the first one started."""
        if not self._is_terminated:
            self.send_signal(signal.SIGTERM)
        self._is_terminated = True

    def kill(self) -> None:
        """Kill the process and its group."""
        if self.poll() is None:
            for kill in (os.killpg, os.kill):  # a forked process may not lead a group yet
                with suppress(ProcessLookupError):
                    kill(self.pid, signal.SIGKILL)


def stop_all(children: Iterable[StoppableProcess], grace: float) -> None:
    """Terminate children, kill those that still run after some seconds, and wait until all have ended.

    Args:
        children: Processes that may have ended already.
        grace: Seconds between SIGTERM and SIGKILL; 0: SIGKILL at once.
    """
    running = [child for child in children if child.poll() is None]
    deadline = time.monotonic() + grace
    if grace:
        for child in running:
            child.terminate()
    is_killed = False
    while any(child.poll() is None for child in running):
        if time.monotonic() >= deadline and not is_killed:
            is_killed = True
            for child in running:
                child.kill()
        time.sleep(PROCESS_POLL_SECONDS)


def kill_descendants(pid: int | None = None) -> None:
    """Kill everything that a process (default: this one) has started, in whatever session, but not the process itself."""
    import psutil

    with suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                process.kill()


def start_process(
    command: list[str],
    environment: Mapping[str, str],
    *,
    output: Path | None = None,
    parent_signal: int | None = None,
    **options: Any,  # noqa: ANN401
) -> ChildProcess:
    """Start a command of `promcse_pl.utils.interpreter.python_command`.

    Args:
        command: Program and arguments.
        environment: All variables of the process.
        output: File to which stdout and stderr are appended; None: those of this process, unless `options` says otherwise.
        parent_signal: Signal that the process gets when this one ends in any way, SIGKILL included; None: none.
        options: Of `subprocess.Popen`; stdin is /dev/null by default.
    """
    if parent_signal is not None:
        environment = {**environment, PARENT: f"{os.getpid()} {int(parent_signal)}"}
    options = {"stdin": subprocess.DEVNULL, "env": environment, "start_new_session": True, **options}
    if output is None:
        return ChildProcess(subprocess.Popen(command, **options))
    with output.open("ab") as stream:
        return ChildProcess(subprocess.Popen(command, stdout=stream, stderr=stream, **options))


def fork_process(
    function: Callable[[], int],
    environment: Mapping[str, str],
    *,
    output: Path,
    parent_signal: int,
    close: Iterable[int] = (),
) -> ChildProcess:
    """Fork a process that calls a function and exits with its return value; it finds all modules imported.

    Args:
        function: Called in the child.
        environment: Variables that are set in the child in addition to those of this process.
        output, parent_signal: As for `start_process`.
        close: File descriptors that the child must not keep open.

    Raises:
        OSError: No further process can be started.
    """

    def run(parent: int) -> None:
        os.setsid()
        end_with_parent(parent, parent_signal)
        with Path(os.devnull).open("rb") as nothing, output.open("ab") as stream:
            for source, descriptor in ((nothing, 0), (stream, 1), (stream, 2)):
                os.dup2(source.fileno(), descriptor)
        for descriptor in close:
            os.close(descriptor)
        os.environ.update(environment)
        for signum in STOP_SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        sys.exit(function())

    process = multiprocessing.get_context("fork").Process(target=run, args=(os.getpid(),))
    # blocked until the child has replaced the handlers of this process, which would swallow a signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return ChildProcess(process)


def end_with_parent(parent: int, signum: int) -> None:
    """Have this process receive a signal when its parent ends; exit at once if it has ended already."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)
    else:
        threading.Thread(target=_watch_parent, args=(parent, signum), daemon=True).start()
    if os.getppid() != parent:
        sys.exit(1)


def _watch_parent(parent: int, signum: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signum)
