"""The processes of a run on this machine: start one a rank, pass signals on, and say which of them failed.

The starter imports no torch. Each rank is a fresh process that reads the job's resolved config from the run's folder. A rank ends
when the starter does, however that ends, and all ranks end when one fails.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from promcse_pl.run_folder import RANK_LOG, read_status
from promcse_pl.training.distributed import LOST, STORE
from promcse_pl.utils import errors
from promcse_pl.utils.errors import PromcseError, RankError
from promcse_pl.utils.interpreter import python_command
from promcse_pl.utils.paths import run_command
from promcse_pl.utils.processes import SHARE, cores
from promcse_pl.utils.signals import SIGNALS, Stopped

GRACE = 30.0
"""Seconds that the others have to end by themselves after one rank has failed; at half of it they are asked to. W&B takes up to
ten of them."""
STARTER = "PROMCSESTARTER"
_STOPPED = {143, 130, *(-signum for signum in SIGNALS)}


def launch(folder: Path, ranks: int, lock: int) -> None:
    """Run the ranks of a run to their end.

    Rank 0 has this process's standard output and error; another's go to run-rankN.log, which stays only if the run fails.

    Args:
        folder: Of the run, with its config.yaml.
        ranks: Processes to start.
        lock: File descriptor of the folder's lock; the ranks inherit it, so that it is held until the last of them has ended.

    Raises:
        Stopped: By a signal to this process or to a rank; the run is saved if training had begun.
        RankError: A rank died, or failed in a way that rank 0 cannot know; the message names it and its exit code.
        PromcseError: What rank 0 has failed with.
    """
    store = (folder / ".ranks").absolute()
    store.unlink(missing_ok=True)  # of a run that was killed
    processes: list[subprocess.Popen[bytes]] = []
    with _passed_on(processes) as received:
        try:
            for rank in range(ranks):
                processes.append(_start(folder, rank, ranks, lock, store))
            ended = _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            store.unlink(missing_ok=True)
    logs = [folder / RANK_LOG.format(rank) for rank in range(1, ranks)]
    codes = [process.returncode for process in processes]
    failed = [rank for rank in ended if codes[rank] and codes[rank] not in _STOPPED]
    stopped = bool(received) or any(code in _STOPPED for code in codes)
    if stopped:  # the others may have lost a rank that a second signal ended at once
        failed = [rank for rank in failed if LOST not in _last_words(folder, rank)]
    for log in logs:
        if not failed or log.stat().st_size == 0:
            log.unlink(missing_ok=True)
    if failed:
        tell(folder, failed, codes)
    if stopped:
        raise Stopped(received[0] if received else signal.SIGINT if 130 in codes else signal.SIGTERM)


def _start(folder: Path, rank: int, ranks: int, lock: int, store: Path) -> subprocess.Popen[bytes]:
    share = os.environ.get(SHARE)
    threads = {"OMP_NUM_THREADS": str(max(1, int(share or cores()) // ranks))}
    environment = {
        **threads,
        **os.environ,
        **(threads if share else {}),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        STORE: str(store),
        STARTER: str(os.getpid()),
    }
    command = python_command("promcse_pl.runs.worker:main", str(folder))
    # a session of its own: Ctrl-C at a terminal reaches the starter, which passes it on once
    if rank == 0:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[lock], start_new_session=True
        )
    with (folder / RANK_LOG.format(rank)).open("wb") as log:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock],
            start_new_session=True,
        )


@contextmanager
def _passed_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass the signals that ask to stop on to the processes; gives the list of those that came."""
    received: list[int] = []

    def pass_on(signum: int, _frame: object) -> None:
        received.append(signum)
        for process in processes:
            process.send_signal(signum)

    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield received
        return
    before = {signum: signal.signal(signum, pass_on) for signum in SIGNALS}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all; end the others soon after one failed or was stopped alone. Return which ended by themselves, in order."""
    order: list[int] = []
    killed: list[int] = []
    failed_at: float | None = None
    asked = False
    while len(order) < len(processes):
        for rank, process in enumerate(processes):
            if rank not in order and process.poll() is not None:
                order.append(rank)
                if process.returncode and failed_at is None:
                    failed_at = time.monotonic()
        waited = 0.0 if failed_at is None else time.monotonic() - failed_at
        left = [rank for rank in range(len(processes)) if rank not in order]
        if (
            waited > GRACE / 2 and not asked
        ):  # not at once: the others may be about to end, and a second signal cuts that short
            asked = True
            for rank in left:
                processes[rank].terminate()
        if waited > GRACE and not killed:
            killed = left
            for rank in left:
                processes[rank].kill()
        time.sleep(0.05)
    return [rank for rank in order if rank not in killed]


def tell(folder: Path, failed: Sequence[int], codes: Sequence[int]) -> NoReturn:
    """Raise what the rank died of that failed first by itself."""
    words = {rank: _last_words(folder, rank) for rank in failed}
    own = [rank for rank in failed if LOST not in words[rank]] or list(failed)
    rank = min(own, key=lambda rank: (codes[rank] > 0, rank))  # killed before failed: a failure may follow from a death
    kind, colon, message = words[rank].partition(": ")
    known = getattr(errors, kind, None)
    if rank == 0 and codes[0] == 2 and colon and isinstance(known, type) and issubclass(known, PromcseError):
        raise known(message)
    code = codes[rank]
    how = (
        f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name} (exit code {code})"
    )
    log = folder / RANK_LOG.format(rank)
    more = f": {words[rank]}" if words[rank] and code > 0 else ""
    where = f" (its output: {log})" if rank and log.exists() else ""
    raise RankError(
        f"rank {rank} of {len(codes)} {how}{more}{where}. To resume from the last save: {run_command(f'resume={folder}')}"
    )


def _last_words(folder: Path, rank: int) -> str:
    """Return the error that a rank ended with, as far as it could tell."""
    if rank == 0:
        with suppress(PromcseError):
            status = read_status(folder)
            return (status.error if status else None) or ""
        return ""
    try:
        lines = (folder / RANK_LOG.format(rank)).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip().removeprefix("error: ") for line in reversed(lines) if line.strip()), "")
