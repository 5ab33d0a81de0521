"""Local processes, so many at a time: Ctrl-C at the terminal does not reach them, and they do not outlive their parent."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType, TracebackType

from promcse_pl.config import Config
from promcse_pl.sweeps.forkserver import PRELOAD, ForkServer, Process, Task
from promcse_pl.sweeps.plan import Settled
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.processes import SHARE, cores
from promcse_pl.utils.signals import SIGNALS

POLL = 0.1
"""Seconds between two looks at the processes."""
GRACE = 60.0
"""Seconds that a process gets to save after SIGTERM."""


@dataclass(slots=True)
class Running:
    """A task at work.

    Attributes:
        task: What runs.
        process: Its process.
        place: Number of its share of the machine, in [0, parallel).
        began: Seconds since 1970.
    """

    task: Task
    process: Process
    place: int
    began: float


def shares(parallel: int, settled: Settled | None = None) -> list[dict[str, str]]:
    """Return the environment of each of so many jobs at a time: a share of the GPUs, or of the CPU's threads.

    One job at a time gets the machine as it is. More jobs than GPUs share them in turn.

    Args:
        parallel: Number of parallel jobs.
        settled: Settings of the sweep's first start, which fix the threads per job; None: this is the first start.
    """
    if parallel == 1 and settled is None:
        return [{}]
    threads = settled.threads if settled else max(1, cores() // parallel)
    share = settled.share if settled else threads
    cpu = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
    if share is not None:
        cpu[SHARE] = str(share)
    devices = visible_devices() if parallel > 1 else []
    if not devices:
        return [cpu] * parallel
    places = []
    for place in range(parallel):
        own = devices[place * len(devices) // parallel : (place + 1) * len(devices) // parallel]
        places.append({**cpu, "CUDA_VISIBLE_DEVICES": ",".join(own or [devices[place % len(devices)]])})
    return places


def check_fits(config: Config, parallel: int) -> Config:
    """Return a job's config if so many such jobs at a time find a GPU for each of their processes.

    Raises:
        ConfigError: They do not.
    """
    devices = config.trainer.devices
    if parallel > 1 and devices > 1 and config.trainer.device != "cpu":
        there = len(visible_devices())
        if 0 < there < parallel * devices:
            raise ConfigError(
                f"sweep.parallel={parallel} jobs of trainer.devices={devices} want {parallel * devices} GPUs, this machine has "
                f"{there}. Try: sweep.parallel={max(1, there // devices)}"
            )
    return config


def visible_devices() -> list[str]:
    """Return the CUDA devices of this process as CUDA_VISIBLE_DEVICES names them; torch is not asked: it takes seconds."""
    set_by_user = os.environ.get("CUDA_VISIBLE_DEVICES")
    if set_by_user is not None:
        return [name for name in set_by_user.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


class Pool:
    """Runs tasks and minds the signals of this process.

    Ctrl-C once starts nothing more and waits for what runs; a second one, SIGTERM or SIGUSR1 sends SIGTERM to the tasks and
    waits for them to save, a minute at most. The imports of the tasks begin when the pool is made; leave it as a context.

    Args:
        parallel: Tasks at a time, >= 1.
        tell: Prints a line.
        settled: Settings of the first start, if the sweep is resumed.
    """

    def __init__(self, parallel: int, tell: Callable[[str], None], settled: Settled | None = None) -> None:
        self.parallel = parallel
        self._free = list(range(parallel))
        self._environments = shares(parallel, settled)
        # what is imported reads the number of threads, and all have the same
        self._server = ForkServer(self._environments[0], PRELOAD)
        self._tell = tell
        self.running: list[Running] = []
        self._signals: list[int] = []
        self._killed_at: float | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()

    @property
    def exit_code(self) -> int | None:
        """130 or 143 when a signal ended the pool, else None."""
        if not self._signals:
            return None
        return 130 if set(self._signals) == {signal.SIGINT} else 143

    def run(
        self,
        tasks: Iterator[Task],
        ended: Callable[[Running, int], None],
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        """Run tasks until there are no more, or a signal says so.

        Args:
            tasks: The next one is taken when there is room for it.
            ended: Takes a task that ended and its exit code, negative for a signal.
            watch: Called between looks, while tasks run.
        """
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            more = True
            while True:
                while more and self._free and not self._signals and self._server.ready():
                    task = next(tasks, None)
                    if task is None:
                        more = False
                        break
                    place = self._free.pop(0)
                    began = time.time()
                    process = self._server.start(task, self._environments[place])
                    self.running.append(Running(task, process, place, began))
                if not self.running and (self._signals or not more):
                    return
                time.sleep(POLL)
                self._obey()
                for one, code in [(one, one.process.poll()) for one in self.running]:
                    if code is None:
                        continue
                    self.running.remove(one)
                    self._free.append(one.place)
                    ended(one, code)
                watch()
        finally:
            for one in self.running:  # an error of ours: nothing may go on unseen
                one.process.terminate()
            for one in self.running:
                if not one.process.wait(GRACE):
                    one.process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)
        if self._signals == [signal.SIGINT]:
            self._tell(f"Ctrl-C: waiting for {len(self.running)} running; once more stops them (they save first)")

    def _obey(self) -> None:
        """Pass on what the signals ask for."""
        if not self._signals or self._signals == [signal.SIGINT]:
            return
        if self._killed_at is None:
            self._killed_at = time.monotonic()
            for one in self.running:
                one.process.terminate()
        elif time.monotonic() - self._killed_at > GRACE:
            for one in self.running:
                one.process.kill()
