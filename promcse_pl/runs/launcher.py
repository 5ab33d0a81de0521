"""Start the ranks of a run on this machine, forward signals to them, and report which of them failed.

The launcher does not import torch. Each rank is a new process that reads the resolved config from the run's folder. All ranks
stop when one of them fails, or when the launcher exits for any reason.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from promcse_pl.run_folder import RANK_LOG
from promcse_pl.training.distributed import STORE
from promcse_pl.utils.errors import (
    AdapterError,
    ConfigError,
    DataError,
    EncoderError,
    LostRankError,
    NonFiniteError,
    OutOfMemoryError,
    PromcseError,
    RankError,
    TextTypeError,
)
from promcse_pl.utils.interpreter import python_command
from promcse_pl.utils.paths import run_command
from promcse_pl.utils.processes import (
    PROCESS_POLL_SECONDS,
    RANK_THREADS,
    available_cores,
    start_process,
    stop_all,
)
from promcse_pl.utils.signals import STOP_SIGNALS, Stopped, handled_by

RANK_GRACE_SECONDS = 30.0
"""Seconds in which the other ranks must exit after one has failed; after half of it they get SIGTERM. W&B takes up to ten
seconds of it."""
ERROR_PIPE = "PROMCSE_ERROR_PIPE"
"""Environment variable with the file descriptor to which a rank writes the error that it fails with."""
_MAX_ERROR_LENGTH = 3000
"""Characters of a reported error: at most 18 KB of JSON, which fit the buffer of a pipe (64 KiB on Linux). So a rank can report
its error and exit even while the launcher waits for it without reading."""
_ERRORS = {
    kind.__name__: kind
    for kind in (
        PromcseError,
        ConfigError,
        DataError,
        TextTypeError,
        EncoderError,
        AdapterError,
        NonFiniteError,
        RankError,
        LostRankError,
        OutOfMemoryError,
    )
}
"""Classes that a reported error can have."""
_STOPPED = {143, 130, *(-signum for signum in STOP_SIGNALS)}


class RankProcess:
    """The process of a rank.

    Attributes:
        child: The process.
        error: The error that it reported before it ended; None: none.
        log: File with its output; None for rank 0, which uses this process's stdout and stderr.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, lock: int, store: Path) -> None:
        self.error: PromcseError | None = None
        self.log = folder / RANK_LOG.format(rank) if rank else None
        if self.log:
            self.log.unlink(missing_ok=True)
        self._errors, writer = Pipe(duplex=False)
        with writer:
            self.child = start_process(
                python_command("promcse_pl.runs.worker:main", str(folder)),
                {
                    **_threads(ranks),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    STORE: str(store),
                    ERROR_PIPE: str(writer.fileno()),
                },
                output=self.log,
                parent_signal=signal.SIGKILL,
                pass_fds=[lock, writer.fileno()],
            )

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process runs."""
        code = self.child.poll()
        with suppress(EOFError, OSError, ValueError):  # it exited without a report, or was killed while it sent one
            if self._errors.poll():
                self.error = receive_error(self._errors)
        return code


def send_error(pipe: Connection, error: PromcseError) -> None:
    """Report an error of this rank to the launcher, unless the launcher has ended."""
    message = json.dumps([type(error).__name__, str(error)[:_MAX_ERROR_LENGTH]], ensure_ascii=False)
    with suppress(OSError):
        pipe.send_bytes(message.encode(errors="replace"))


def receive_error(pipe: Connection) -> PromcseError:
    """Return the error that a rank reported with `send_error`; a RankError if its class is unknown.

    Raises:
        EOFError, OSError, ValueError: The rank ended without a report, or the report is incomplete or invalid.
    """
    match json.loads(pipe.recv_bytes()):
        case [str(name), str(text)]:
            return _ERRORS.get(name, RankError)(text)
    raise ValueError("not the error of a rank")


def launch(folder: Path, ranks: int, lock: int) -> None:
    """Run all ranks of a run and wait until they have exited.

    Rank 0 uses this process's stdout and stderr; the output of another goes to run-rankN.log, which is kept if the run fails.

    Args:
        folder: Folder of the run, with its config.yaml.
        ranks: Number of processes to start.
        lock: File descriptor of the folder's lock; the ranks inherit it, so that it is held until the last of them has ended.

    Raises:
        Stopped: A signal stopped this process or a rank; the run is saved if training had started.
        RankError: A rank was killed, or failed with an error that rank 0 does not have; the message names it and its exit code.
        PromcseError: The error of rank 0.
    """
    store = (folder / ".ranks").absolute()
    store.unlink(missing_ok=True)  # of a run that was killed
    processes: list[RankProcess] = []
    received: list[int] = []

    def forward(signum: int) -> None:
        received.append(signum)
        for process in processes:
            process.child.send_signal(signum)

    with handled_by(forward):
        try:
            for rank in range(ranks):
                processes.append(RankProcess(folder, rank, ranks, lock, store))
            ended = _wait(processes)
        finally:
            stop_all([process.child for process in processes], 0)
            store.unlink(missing_ok=True)
    codes = [process.poll() or 0 for process in processes]
    failed = [rank for rank in ended if codes[rank] and codes[rank] not in _STOPPED]
    is_stopped = bool(received) or any(code in _STOPPED for code in codes)
    if is_stopped:  # the other ranks lose the connection to a rank that a second signal stopped at once
        failed = [rank for rank in failed if not isinstance(processes[rank].error, LostRankError)]
    for log in (process.log for process in processes if process.log):
        if not failed or log.stat().st_size == 0:
            log.unlink(missing_ok=True)
    if failed:
        raise_failure(folder, failed, codes, [process.error for process in processes])
    if is_stopped:
        raise Stopped(received[0] if received else signal.SIGINT if 130 in codes else signal.SIGTERM)


def _threads(ranks: int) -> dict[str, str]:
    """Return this process's environment with the threads of a rank: its part of the job's or the machine's, unless it is set."""
    threads_of_job = os.environ.get(RANK_THREADS)
    threads = {"OMP_NUM_THREADS": str(max(1, int(threads_of_job or available_cores()) // ranks))}
    return {**os.environ, **threads} if threads_of_job else {**threads, **os.environ}


def _wait(processes: Sequence[RankProcess]) -> list[int]:
    """Wait until all ranks have ended, and stop the others some time after one failed.

    Returns:
        The ranks that ended without being killed here, in the order in which they exited.
    """
    ended: list[int] = []
    deadline = math.inf
    # not at once: a second signal would interrupt the save of a rank that is stopping
    while len(ended) < len(processes) and time.monotonic() < deadline:
        for rank, process in enumerate(processes):
            if rank not in ended and (code := process.poll()) is not None:
                ended.append(rank)
                if code:
                    deadline = min(deadline, time.monotonic() + RANK_GRACE_SECONDS / 2)
        time.sleep(PROCESS_POLL_SECONDS)
    stop_all([process.child for process in processes], RANK_GRACE_SECONDS / 2)
    return [
        *ended,
        *(rank for rank in range(len(processes)) if rank not in ended and processes[rank].poll() != -signal.SIGKILL),
    ]


def raise_failure(
    folder: Path, failed: Sequence[int], codes: Sequence[int], reported: Sequence[PromcseError | None]
) -> NoReturn:
    """Raise the error of the rank that failed first, not of those that lost their connection to it.

    Args:
        folder: Folder of the run.
        failed: Ranks that failed, in the order in which they exited.
        codes: Exit code of every rank.
        reported: Error that every rank reported; None: none.
    """
    causes = [rank for rank in failed if not isinstance(reported[rank], LostRankError)] or list(failed)
    rank = min(causes, key=lambda rank: (codes[rank] > 0, rank))  # killed before failed: a kill may cause failures
    code, error = codes[rank], reported[rank]
    if rank == 0 and code == 2 and error and not isinstance(error, LostRankError):
        raise error
    how = (
        f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name} (exit code {code})"
    )
    log = folder / RANK_LOG.format(rank)
    reason = f": {error}" if error and code > 0 else ""
    output = f" (its output: {log})" if rank and log.exists() else ""
    raise RankError(
        f"rank {rank} of {len(codes)} {how}{reason}{output}. To resume from the last save: {run_command(f'resume={folder}')}"
    )
