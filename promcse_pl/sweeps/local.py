"""The jobs of a sweep on this machine: start them, record how they end, say what came out."""

from __future__ import annotations

import dataclasses
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from promcse_pl.run_folder import CONFIG, OUTPUT, START, Status, is_running, read_results, read_status, write_status
from promcse_pl.sweeps.collect import read_sweep
from promcse_pl.sweeps.forkserver import Task
from promcse_pl.sweeps.plan import Plan, SweepJob, missing_jobs
from promcse_pl.sweeps.pool import GRACE, Pool, Running
from promcse_pl.sweeps.ranking import different_dev_sets, find_best, format_score
from promcse_pl.sweeps.wandb_summary import publish_sweep
from promcse_pl.utils.errors import ConfigError, DataError, PromcseError
from promcse_pl.utils.paths import run_command
from promcse_pl.utils.streams import visible

ERROR_LINES = 5
"""Last lines of a job's output that stand for its error when it names none."""


def job_task(folder: Path, job: SweepJob) -> Task:
    """Return the process of a job: it begins from start.yaml, or goes on from its own config.yaml."""
    run = folder / job.folder
    arguments = ["--resume", str(run)] if (run / CONFIG).is_file() else [str(run / START), "--out", str(run)]
    return Task(job.folder, "promcse_pl.cli.main:main", ["train", *arguments], run / OUTPUT)


def record_end(run: Path, code: int, began: float) -> Status:
    """Return how a job ended, and write it down where the job could not: it died early, or was killed.

    Args:
        run: Folder of the job.
        code: Exit code of its process, negative for a signal.
        began: When the process started, in seconds since 1970; an older status is of an earlier one.
    """
    try:
        before = read_status(run)
    except DataError:
        before = None
    told = before is not None and before.updated >= began and before.state != "running"
    if before is not None and (told or (before.state == "finished" and code == 0)):
        return before
    asked = code in (143, -signal.SIGTERM)
    status = dataclasses.replace(
        before or Status(state="failed", started=began),
        state="stopped" if asked else "failed",
        error=None if asked else _error(run / OUTPUT, code),
    )
    write_status(run, status)
    return status


def _error(output: Path, code: int) -> str:
    """Return why a job failed, from what it printed."""
    if code == -signal.SIGKILL:
        return "killed by SIGKILL: the kernel does that when the memory is full, a sweep to a job that does not stop in a minute"
    try:
        lines = output.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        lines = []
    lines = [line for line in lines if line.strip()]
    named = [line.removeprefix("error: ") for line in lines[-ERROR_LINES:] if line.startswith("error: ")]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return named[-1] if named else "\n".join([*lines[-ERROR_LINES:], f"({how})"])


def dev_score(run: Path) -> float | None:
    """Return the development score of a finished job, Spearman x 100; None without one."""
    try:
        score = read_results(run).get("dev_spearman")
    except DataError:
        return None
    return None if score is None else float(score)


def run_alone(folder: Path, job: SweepJob) -> float:
    """Run one job in its own process, for launchers that are not ours; a failure is recorded and does not raise.

    Returns:
        Its development score, Spearman x 100; nan without one.
    """
    with Pool(1, tell) as pool:
        wait_for_earlier(folder, [job])
        pool.run(iter([job_task(folder, job)]), lambda one, code: _report(folder, job, one, code))
    if pool.exit_code:
        sys.exit(pool.exit_code)
    score = dev_score(folder / job.folder)
    return math.nan if score is None else score


def run_local(folder: Path, plan: Plan, jobs: Sequence[SweepJob], pool: Pool) -> int | None:
    """Run jobs of a sweep.

    Returns:
        The exit code that a signal asks for, or None.
    """
    named = {job.folder: job for job in jobs}

    def tasks() -> Iterator[Task]:
        for job in jobs:
            announce(job, plan.varying(job))
            yield job_task(folder, job)

    pool.run(tasks(), lambda one, code: _report(folder, named[one.task.name], one, code))
    return pool.exit_code


def settled_words(plan: Plan, parallel: int) -> str:
    """Return the settings shared by all jobs of a sweep on this machine, for the first line that is printed."""
    settled = plan.settled
    if settled is None:
        return ""
    words = f"; {parallel} in parallel, {settled.threads} thread{'s' if settled.threads > 1 else ''} per job"
    if parallel != settled.parallel:
        words += f" (as in the first start with sweep.parallel={settled.parallel})"
    for device, precision in settled.precision.items():
        words += f", precision {precision}{f' with trainer.device={device}' if len(settled.precision) > 1 else ''}"
    return words


def announce(job: SweepJob, names: Sequence[str]) -> None:
    """Print that a job starts, and what is its own."""
    tell(f"job {job.folder} starts{': ' if names else ''}{' '.join(names)}")


def _report(folder: Path, job: SweepJob, one: Running, code: int) -> None:
    status = record_end(folder / job.folder, code, one.began)
    tell(ending(folder / job.folder, status, time.time() - one.began))


def ending(run: Path, status: Status, seconds: float) -> str:
    """Return a line on how a job ended."""
    score = dev_score(run) if status.state == "finished" else None
    told = f", dev {score:.2f}" if score is not None else ""
    why = f": {status.error.splitlines()[-1] if status.error else ''}" if status.state == "failed" else ""
    return f"job {run.name} {status.state}{told}, {seconds:.0f} s{why}"


def wait_for_earlier(folder: Path, jobs: Iterable[SweepJob]) -> None:
    """Wait for jobs of a sweep whose parent was killed: they were told to stop and save.

    Raises:
        ConfigError: One goes on.
    """
    until = time.monotonic() + GRACE
    for job in jobs:
        while is_running(folder / job.folder):
            if time.monotonic() > until:
                raise ConfigError(f"another process is at work in {folder / job.folder}. Try: wait for it, or stop it")
            time.sleep(0.2)


def summary(folder: Path, plan: Plan, stopped: int | None) -> int:
    """Print what came out of a sweep, here and in W&B; return its exit code.

    Args:
        folder: Of the sweep.
        plan: Of the sweep.
        stopped: Exit code that a signal asks for, or None.
    """
    states: dict[str, list[SweepJob]] = {}
    for job in plan.jobs:
        try:
            status = read_status(folder / job.folder)
        except DataError:
            status = None
        state = status.state if status else "not started"
        states.setdefault(state, []).append(job)
        if status and state == "failed":
            first, *more = (status.error or "").split("\n")
            for line in (f"failed: job {job.folder}{_own(plan, job)}: {first}", *(f"  {line}" for line in more)):
                tell(line)
    tell(", ".join(f"{len(jobs)} {state}" for state, jobs in states.items()))
    runs = read_sweep(folder).runs if plan.jobs else []
    if best := find_best(runs):
        score = f"{best.run.dev:.2f}"
        if best.row.n > 1:
            score = f"{format_score(best.row.dev, best.row.std)} (mean of {best.row.n} seeds), its best seed {score}"
        job = next(job for job in plan.jobs if job.folder == best.run.name)
        tell(f"best on dev: {score}, job {job.folder}{_own(plan, job)}")
    elif why := different_dev_sets(runs):
        tell(f"warning: {why}")
    left = missing_jobs(folder, plan)
    if left:
        resume = run_command("-m", f"sweep.resume={folder}")
        tell(f"to run the {len(left)} unfinished jobs: {resume}")
    try:
        if upload := publish_sweep(folder):
            tell(f"to upload its offline W&B runs: wandb login && {upload}")
    except PromcseError as error:
        tell(f"warning: the sweep has no W&B summary run: {error}")
    tell(f"to view the results: {shlex.join(['promcse', 'report', str(folder)])}")
    return (stopped or 1) if left else 0


def _own(plan: Plan, job: SweepJob) -> str:
    """Return what is a job's own, in brackets; of a sweep of one job nothing."""
    varying = " ".join(plan.varying(job))
    return f" ({varying})" if varying else ""


def tell(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(visible(line) + "\n")
    sys.stdout.flush()
