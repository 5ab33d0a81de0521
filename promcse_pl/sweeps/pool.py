"""Run tasks in parallel. An engine starts their processes; `LocalEngine` divides CPU threads and GPUs into slots."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from promcse_pl.config import Config, SweepConfig
from promcse_pl.sweeps.plan import SharedSettings
from promcse_pl.utils.errors import ConfigError, PromcseError
from promcse_pl.utils.imports import without_gc
from promcse_pl.utils.interpreter import call, python_command
from promcse_pl.utils.paths import run_command
from promcse_pl.utils.processes import (
    RANK_THREADS,
    StoppableProcess,
    available_cores,
    fork_process,
    start_process,
    stop_all,
)
from promcse_pl.utils.signals import Stopped, StopSignals, handled_by
from promcse_pl.utils.terminal import print_line

PRELOAD: Sequence[str] = (
    "promcse_pl.cli.main",
    "promcse_pl.runs.lifecycle",
    "promcse_pl.runs.pipeline",
    "transformers.models.bert.modeling_bert",
    "transformers.models.roberta.modeling_roberta",
    "transformers.models.xlm_roberta.modeling_xlm_roberta",
)
"""Modules that a run imports late; a forked job finds them imported."""
JOB_POLL_SECONDS = 0.1
JOB_GRACE_SECONDS = 60.0
"""Time that a job has to save after SIGTERM."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Task:
    """A function to call in a separate process.

    Attributes:
        name: Name of the job.
        target: "module:function"; the function takes the arguments and returns an exit code.
        arguments: Arguments of the function; `sys.argv` holds them too.
        output: File to which stdout and stderr are appended.
    """

    name: str
    target: str
    arguments: Sequence[str]
    output: Path


@dataclass(frozen=True, slots=True)
class RunningTask:
    """A task whose process was started.

    Attributes:
        task: The task.
        child: Its process.
        slot: Index of its slot, in [0, parallel).
        started: Seconds since 1970.
    """

    task: Task
    child: StoppableProcess
    slot: int
    started: float


class JobEngine(Protocol):
    """Starts the processes of a pool.

    Attributes:
        parallel: Maximum number of processes at the same time.
        rank_threads: Total threads of all ranks of a job; None: environment variables set the threads of each rank.
    """

    parallel: int
    rank_threads: int | None

    def start(self, task: Task, slot: int) -> StoppableProcess:
        """Start the process of a task.

        Args:
            task: The task; the folder of its output exists.
            slot: Index in [0, parallel) that no running task has.

        Raises:
            OSError: No further process can be started.
            Stopped: A signal interrupted the start.
        """


def thread_variables(threads: int) -> dict[str, str]:
    """Return the environment variables that set the number of threads of a process."""
    return dict.fromkeys(_THREAD_VARIABLES, str(threads))


def slot_environments(parallel: int, shared: SharedSettings | None = None) -> list[dict[str, str]]:
    """Return the environment variables of each slot: its part of the CPU threads and of the GPUs.

    A single slot has the whole machine. If there are more slots than GPUs, several slots use the same GPU.

    Args:
        parallel: Number of slots.
        shared: Settings of the sweep's first start, which fix the threads per job; None: this is the first start.
    """
    if parallel == 1 and shared is None:
        return [{}]
    threads = shared.threads if shared else max(1, available_cores() // parallel)
    rank_threads = shared.share if shared else threads
    variables = thread_variables(threads)
    if rank_threads is not None:
        variables[RANK_THREADS] = str(rank_threads)
    devices = visible_devices() if parallel > 1 else []
    if not devices:
        return [variables] * parallel
    environments = []
    for slot in range(parallel):
        devices_of_slot = devices[slot * len(devices) // parallel : (slot + 1) * len(devices) // parallel]
        names = ",".join(devices_of_slot or [devices[slot % len(devices)]])
        environments.append({**variables, "CUDA_VISIBLE_DEVICES": names})
    return environments


def check_gpus(config: Config, settings: SweepConfig) -> Config:
    """Return a job's config after checking that there is a GPU for each rank of the parallel jobs.

    Raises:
        ConfigError: There are fewer GPUs.
    """
    ranks, parallel = config.trainer.devices, settings.parallel
    if settings.engine == "ray":
        gpus = settings.job_gpus or 0
        if (config.trainer.device == "cuda" and not gpus) or (config.trainer.device != "cpu" and 0 < gpus < ranks > 1):
            raise ConfigError(
                f"sweep.job_gpus={gpus:g}, but a job of trainer.device={config.trainer.device} trainer.devices={ranks} needs "
                f"{ranks}. Try: sweep.job_gpus={ranks}"
            )
    elif parallel > 1 and ranks > 1 and config.trainer.device != "cpu":
        available = len(visible_devices())
        if 0 < available < parallel * ranks:
            raise ConfigError(
                f"sweep.parallel={parallel} jobs of trainer.devices={ranks} need {parallel * ranks} GPUs, this machine has "
                f"{available}. Try: sweep.parallel={max(1, available // ranks)}"
            )
    return config


def visible_devices() -> list[str]:
    """Return the GPUs that this process may use, named as in CUDA_VISIBLE_DEVICES; without torch, which takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


class LocalEngine:
    """Starts processes on this machine.

    On Linux, this process imports the modules that the tasks need, without using a GPU, and forks: a start takes milliseconds. On
    other systems, or if this process had already imported torch, a new interpreter is started. A process receives SIGTERM if this
    process is killed.

    Args:
        parallel: Number of slots, >= 1.
        shared: Settings of the first start if the sweep is resumed.
        lock: File descriptor of the sweep's lock, which the tasks must not hold; None: there is no lock.
        can_fork: False: always start a new interpreter.
    """

    def __init__(
        self, parallel: int, shared: SharedSettings | None = None, *, lock: int | None = None, can_fork: bool = True
    ) -> None:
        self.parallel = parallel
        is_set_by_user = parallel == 1 and os.environ.get("OMP_NUM_THREADS")
        self.rank_threads = None if is_set_by_user else max(1, available_cores() // parallel)
        self._environments = slot_environments(parallel, shared)
        self._inherited = [] if lock is None else [lock]
        self._can_fork = can_fork and sys.platform == "linux" and "torch" not in sys.modules

    def start(self, task: Task, slot: int) -> StoppableProcess:
        """Start the process of a task in a slot.

        Raises:
            PromcseError: An import failed.
            OSError, Stopped: As for `JobEngine`.
        """
        environment = self._environments[slot]
        if not self._can_fork:
            return start_process(
                python_command(task.target, *task.arguments),
                {**os.environ, **environment},
                output=task.output,
                parent_signal=signal.SIGTERM,
            )
        self._preload()
        return fork_process(
            lambda: _run_forked(task),
            environment,
            output=task.output,
            parent_signal=signal.SIGTERM,
            close=self._inherited,
        )

    def _preload(self) -> None:
        """Import the modules of the tasks, with their number of threads, which the libraries read when they are imported.

        Raises:
            PromcseError: An import failed.
            Stopped: A signal interrupted the imports.
        """
        first = self._environments[0]
        os.environ.update({name: first[name] for name in _THREAD_VARIABLES if name in first})
        try:
            with StopSignals(), without_gc(), redirect_stdout(sys.stderr):
                for name in PRELOAD:
                    importlib.import_module(name)
        except ImportError as error:
            raise PromcseError(
                f"the modules of the jobs could not be imported ({error}). Try: pip install promcse_pl"
            ) from error


class Pool:
    """Runs tasks in parallel and handles the stop signals of this process.

    After one Ctrl-C, no further task is started, and the running tasks finish. After a second Ctrl-C, SIGTERM or SIGUSR1, the
    running tasks receive SIGTERM and save a checkpoint; they are killed after `JOB_GRACE_SECONDS`.

    Args:
        engine: Starts the processes.

    Attributes:
        running: Tasks whose process runs.
    """

    def __init__(self, engine: JobEngine) -> None:
        self.engine = engine
        self.running: list[RunningTask] = []
        self._free_slots = list(range(engine.parallel))
        self._signals: list[int] = []
        self._is_waiting = False
        self._terminated_at: float | None = None

    @property
    def exit_code(self) -> int | None:
        """130 or 143 if a signal stopped the pool, else None."""
        if not self._signals:
            return None
        return 130 if set(self._signals) == {signal.SIGINT} else 143

    def run(
        self,
        tasks: Iterator[Task],
        on_end: Callable[[RunningTask, int], object],
        on_poll: Callable[[], None] = lambda: None,
    ) -> None:
        """Run tasks until there are no more or a signal stops the pool.

        Args:
            tasks: The next one is taken when a slot is free.
            on_end: Called with a task that has ended and its exit code, negative for a signal.
            on_poll: Called regularly while tasks run.

        Raises:
            PromcseError: A process cannot be started, or the imports failed.
        """
        is_exhausted = False
        with handled_by(self._signals.append):
            try:
                while self.running or not (is_exhausted or self._signals):
                    while self._free_slots and not (is_exhausted or self._signals):
                        task = next(tasks, None)
                        is_exhausted = task is None
                        if task:
                            self._start(task)
                    time.sleep(JOB_POLL_SECONDS)
                    self._stop_tasks()
                    for running in [*self.running]:
                        code = running.child.poll()
                        if code is not None:
                            self.running.remove(running)
                            self._free_slots.append(running.slot)
                            on_end(running, code)
                    on_poll()
            finally:  # after an error, no task may keep running
                stop_all([running.child for running in self.running], JOB_GRACE_SECONDS)

    def _start(self, task: Task) -> None:
        slot = self._free_slots[0]
        task.output.parent.mkdir(parents=True, exist_ok=True)
        started = time.time()
        try:
            child = self.engine.start(task, slot)
        except Stopped as stopped:
            self._signals.append(stopped.signum)
            return
        except OSError as error:  # too little memory, or too many processes
            raise PromcseError(
                f"a job's process cannot be started: {os.strerror(error.errno or 0)}. "
                f"Try: {run_command()} -m sweep.resume=FOLDER sweep.parallel=1"
            ) from error
        self._free_slots.remove(slot)
        self.running.append(RunningTask(task, child, slot, started))

    def _stop_tasks(self) -> None:
        """React to received signals: start no more tasks, or stop the running ones."""
        if not self._signals:
            return
        if self._signals == [signal.SIGINT]:
            if self.running and not self._is_waiting:
                print_line(
                    f"Ctrl-C: waiting for {len(self.running)} running; press it again to stop them (they save first)"
                )
            self._is_waiting = True
        elif self._terminated_at is None:
            self._terminated_at = time.monotonic()
            for running in self.running:
                running.child.terminate()
        elif time.monotonic() - self._terminated_at > JOB_GRACE_SECONDS:
            for running in self.running:
                running.child.kill()


def _run_forked(task: Task) -> int:
    torch = sys.modules.get("torch")
    if torch and torch.cuda._is_in_bad_fork():  # an import has used the GPU, which a forked process then cannot do
        os.execv(sys.executable, python_command(task.target, *task.arguments))
    return call(task.target, task.arguments)
