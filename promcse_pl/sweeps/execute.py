"""Execute the jobs of a sweep, in a pool or through a launcher of Hydra: start them, record their states, summarise."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from promcse_pl.config import Config, SweepConfig
from promcse_pl.run_folder import (
    CONFIG,
    OUTPUT,
    START,
    Status,
    find_dev,
    is_running,
    locked,
    read_config,
    read_results,
    read_status,
    write_status,
)
from promcse_pl.sweeps.collect import read_sweep
from promcse_pl.sweeps.plan import (
    Compose,
    Plan,
    SharedSettings,
    SweepJob,
    check_job,
    check_new,
    kept_overrides,
    missing_jobs,
    plan_jobs,
    read_plan,
    write_plan,
    write_start,
)
from promcse_pl.sweeps.pool import JOB_GRACE_SECONDS, LocalEngine, Pool, RunningTask, Task, check_gpus
from promcse_pl.sweeps.ranking import different_dev_sets, find_best, format_score
from promcse_pl.sweeps.ray_engine import RaySweepEngine, ray_engine
from promcse_pl.sweeps.wandb_summary import publish_sweep
from promcse_pl.utils.errors import ConfigError, DataError, PromcseError
from promcse_pl.utils.paths import run_command
from promcse_pl.utils.terminal import print_line

Launch = Callable[[Sequence[SweepJob]], None]
"""Passes jobs to a launcher of Hydra and returns when they have ended."""
ERROR_LINES = 5
"""Number of last lines of a job's output that are recorded if it names no error."""


def run_sweep(
    folder: Path,
    overrides: Sequence[str],
    jobs: Sequence[Sequence[str]],
    settings: SweepConfig,
    compose: Compose,
    launch: Launch | None,
) -> int:
    """Run a sweep, or its missing jobs; nothing is written before every job is valid.

    Args:
        folder: Folder of the sweep.
        overrides: Overrides as typed.
        jobs: Overrides of each job.
        settings: Settings of the sweep.
        compose: Function from the overrides of a job to its config.
        launch: A launcher of Hydra; None: a pool with the engine of the settings.

    Returns:
        0; 1 if a job did not finish; 130 or 143 if a signal stopped the sweep.

    Raises:
        PromcseError: A job is not valid, or the folder belongs to another sweep.
    """
    if launch and settings.parallel > 1:
        raise ConfigError(
            "sweep.parallel applies to sweep.engine=local and ray only. Try: hydra.launcher.array_parallelism (submitit), "
            "hydra.launcher.n_jobs (joblib), or leave it out"
        )
    if settings.resume is not None:
        with locked(folder) as lock:
            plan = read_plan(folder)
            seen: set[str] = set()
            for job in missing_jobs(folder, plan):
                path = folder / job.folder / START
                check_job(job.overrides, lambda _, path=path: check_gpus(read_config(path), settings), seen)  # type: ignore[misc]
            with open_runner(launch, settings, lock, plan.shared) as runner:
                return _run_missing(folder, plan, runner)
    planned = plan_jobs(jobs, lambda overrides: check_gpus(compose(overrides), settings))
    with locked(folder) as lock:
        plan = Plan(kept_overrides(overrides), [job for job, _ in planned])
        check_new(folder, plan.jobs)
        with open_runner(launch, settings, lock) as runner:
            if isinstance(runner, Pool):
                plan.shared = measure_shared(folder, runner, [config for _, config in planned])
                if plan.shared is None:
                    return runner.exit_code or 1
            for job, config in planned:
                write_start(folder, plan, job, config)
            write_plan(folder, plan)
            return _run_missing(folder, plan, runner)


@contextmanager
def open_runner(
    launch: Launch | None, settings: SweepConfig, lock: int, shared: SharedSettings | None = None
) -> Iterator[Pool | Launch]:
    """Yield the launcher of Hydra if there is one, else a pool with the engine of the settings.

    Args:
        launch: A launcher of Hydra.
        settings: Settings of the sweep.
        lock: File descriptor of the sweep's lock.
        shared: Settings of the first start if the sweep is resumed.

    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be used.
    """
    if launch:
        yield launch
    elif settings.engine == "ray":
        with ray_engine(settings, shared) as engine:
            yield Pool(engine)
    else:
        yield Pool(LocalEngine(settings.parallel, shared, lock=lock))


def _run_missing(folder: Path, plan: Plan, runner: Pool | Launch) -> int:
    jobs = missing_jobs(folder, plan)
    shared = describe_shared(plan, runner.engine.parallel) if isinstance(runner, Pool) else ""
    print_line(
        f"sweep {folder}: {len(plan.jobs)} {'job' if len(plan.jobs) == 1 else 'jobs'}, {len(jobs)} to run{shared}"
    )
    wait_for_earlier(folder, jobs)
    exit_code = None
    if isinstance(runner, Pool):
        names = {job.folder: plan.varying(job) for job in jobs}
        runner.run(
            (start_job(folder, job, names[job.folder]) for job in jobs), lambda task, code: end_job(folder, task, code)
        )
        exit_code = runner.exit_code
    elif jobs:
        exit_code = launch_jobs(runner, jobs)
    return summarise(folder, plan, exit_code)


def launch_jobs(launch: Launch, jobs: Sequence[SweepJob]) -> int | None:
    """Pass jobs to a launcher of Hydra; return the exit code after Ctrl-C, or None. States are in the folders of the jobs."""
    try:
        launch(jobs)
    except KeyboardInterrupt:
        return 130
    except PromcseError:
        raise
    except Exception as error:  # such as submitit's UncompletedJobError
        print_line(f"warning: the launcher failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    return None


def run_single(folder: Path, job: SweepJob) -> float:
    """Run one job in its own process, for launchers and sweepers of Hydra; a failure is recorded and does not raise.

    Returns:
        Its dev score, x 100; nan if there is none.
    """
    wait_for_earlier(folder, [job])
    pool = Pool(LocalEngine(1, can_fork=False))
    pool.run(iter([job_task(folder, job)]), lambda task, code: end_job(folder, task, code))
    if pool.exit_code:
        sys.exit(pool.exit_code)
    score = dev_score(folder / job.folder)
    return math.nan if score is None else score


def measure_shared(folder: Path, pool: Pool, configs: Iterable[Config]) -> SharedSettings | None:
    """Measure the precision for `trainer.precision=auto` in a process with the threads of a job.

    Args:
        folder: Folder of the sweep. The process writes temporary files to it, since all nodes mount it.
        pool: Pool that will run the jobs; no task runs in it yet.
        configs: Configs of the jobs.

    Returns:
        The settings shared by all jobs; None if a signal stopped the measurement.

    Raises:
        ConfigError: A device that a job needs is not available.
    """
    devices = sorted({config.trainer.device for config in configs if config.trainer.precision == "auto"})
    if not devices and isinstance(pool.engine, RaySweepEngine):  # the engine has already set the number of threads
        return SharedSettings(pool.engine.parallel, pool.engine.threads, pool.engine.threads, {})
    codes: list[int] = []
    with TemporaryDirectory(prefix=".measure-", dir=folder) as temporary:
        result, output = Path(temporary, "result.json"), Path(temporary, "output.log")
        task = Task("measure", "promcse_pl.training.machine:measure", [str(result), *devices], output)
        pool.run(iter([task]), lambda _, code: codes.append(code))
        if pool.exit_code:
            return None
        if codes != [0]:
            lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no reason given"]
            raise ConfigError(f"trainer.precision=auto cannot be measured: {lines[-1].removeprefix('error: ')}")
        measured = json.loads(result.read_text(encoding="utf-8"))
    return SharedSettings(pool.engine.parallel, measured["threads"], pool.engine.rank_threads, measured["precision"])


def describe_shared(plan: Plan, parallel: int) -> str:
    """Return the settings shared by all jobs of a sweep as text for the first line that is printed."""
    shared = plan.shared
    if shared is None:
        return ""
    text = f"; {parallel} in parallel, {shared.threads} thread{'s' if shared.threads > 1 else ''} per job"
    if parallel != shared.parallel:
        text += f" (as in the first start with sweep.parallel={shared.parallel})"
    for device, precision in shared.precision.items():
        text += f", precision {precision}{f' with trainer.device={device}' if len(shared.precision) > 1 else ''}"
    return text


def job_task(folder: Path, job: SweepJob) -> Task:
    """Return the task of a job: a new run of its start.yaml, or the resumption of its run."""
    run = folder / job.folder
    arguments = ["--resume", str(run)] if (run / CONFIG).is_file() else ["--start", str(run / START), "--out", str(run)]
    return Task(job.folder, "promcse_pl.cli.main:main", ["train", *arguments], run / OUTPUT)


def start_job(folder: Path, job: SweepJob, names: Sequence[str]) -> Task:
    """Print that a job starts, with the overrides that distinguish it; return its task."""
    print_line(f"job {job.folder} starts{': ' if names else ''}{' '.join(names)}")
    return job_task(folder, job)


def end_job(folder: Path, running: RunningTask, code: int, pruned: bool = False) -> Status:
    """Record and print how a job ended.

    Args:
        folder: Folder of the sweep.
        running: The job's task.
        code: Exit code of its process, negative for a signal.
        pruned: Whether a search has stopped it.
    """
    run = folder / running.task.name
    status = record_end(run, code, running.started)
    if pruned and status.state == "stopped":
        status = dataclasses.replace(status, state="pruned")
        write_status(run, status)
    score = dev_score(run) if status.state == "finished" else None
    dev = "" if score is None else f", dev {score:.2f}"
    reason = f": {status.error.splitlines()[-1] if status.error else ''}" if status.state == "failed" else ""
    print_line(f"job {run.name} {status.state}{dev}, {time.time() - running.started:.0f} s{reason}")
    return status


def record_end(run: Path, code: int, started: float) -> Status:
    """Return how a job ended, and write it to status.json if the job could not: it failed early, or was killed.

    Args:
        run: Folder of the job.
        code: Exit code of its process, negative for a signal.
        started: When the process started, in seconds since 1970; an older status belongs to an earlier process.
    """
    try:
        before = read_status(run)
    except DataError:
        before = None
    is_recorded = before is not None and before.updated >= started and before.state != "running"
    if before is not None and (is_recorded or (before.state == "finished" and code == 0)):
        return before
    is_stopped = code in (143, -signal.SIGTERM)
    status = dataclasses.replace(
        before or Status(state="failed", started=started),
        state="stopped" if is_stopped else "failed",
        error=None if is_stopped else _error(run / OUTPUT, code),
    )
    write_status(run, status)
    return status


def _error(output: Path, code: int) -> str:
    """Return why a job failed, from its output."""
    if code == -signal.SIGKILL:
        return "killed by SIGKILL: by the OOM killer when memory is full, by a sweep if a job does not stop within a minute"
    try:
        lines = output.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        lines = []
    last = [line for line in lines if line.strip()][-ERROR_LINES:]
    named = [line.removeprefix("error: ") for line in last if line.startswith("error: ")]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return named[-1] if named else "\n".join([*last, f"({how})"])


def dev_score(run: Path) -> float | None:
    """Return the dev score of a finished job, x 100; None if there is none."""
    try:
        found = find_dev(read_results(run), "dev_")
    except DataError:
        return None
    return None if found is None else float(found[1])


def wait_for_earlier(folder: Path, jobs: Iterable[SweepJob]) -> None:
    """Wait until jobs that an earlier, killed process of the sweep started have saved and stopped.

    Raises:
        ConfigError: A job still runs.
    """
    deadline = time.monotonic() + JOB_GRACE_SECONDS
    for job in jobs:
        while is_running(folder / job.folder):
            if time.monotonic() > deadline:
                raise ConfigError(f"another process is running in {folder / job.folder}. Try: wait for it, or stop it")
            time.sleep(0.2)


def summarise(folder: Path, plan: Plan, exit_code: int | None, unplanned: int = 0) -> int:
    """Print the outcome of a sweep and send it to W&B; return the exit code of the sweep.

    Args:
        folder: Folder of the sweep.
        plan: Its plan.
        exit_code: Exit code after a signal; None: there was none.
        unplanned: Number of jobs that a stopped search has not suggested yet.
    """
    varying = {job.folder: " ".join(plan.varying(job)) for job in plan.jobs}
    names = {job: f" ({overrides})" if overrides else "" for job, overrides in varying.items()}
    _print_states(folder, names)
    runs = read_sweep(folder).runs if plan.jobs else []
    if best := find_best(runs):
        score = f"{best.run.dev:.2f}"
        if best.row.n > 1:
            score = f"{format_score(best.row.dev, best.row.std)} (mean of {best.row.n} seeds), its best seed {score}"
        print_line(f"best on dev: {score}, job {best.run.name}{names[best.run.name]}")
    elif why := different_dev_sets(runs):
        print_line(f"warning: {why}")
    missing = len(missing_jobs(folder, plan)) + unplanned
    if missing:
        print_line(f"to run the {missing} unfinished jobs: {run_command('-m', f'sweep.resume={folder}')}")
    try:
        if upload := publish_sweep(folder):
            print_line(f"to upload its offline W&B runs: wandb login && {upload}")
    except PromcseError as error:
        print_line(f"warning: the sweep has no W&B summary run: {error}")
    print_line(f"to view the results: {shlex.join(['promcse', 'report', str(folder)])}")
    return (exit_code or 1) if missing else 0


def _print_states(folder: Path, names: dict[str, str]) -> None:
    """Print the errors of failed jobs, and the number of jobs in each state."""
    count: dict[str, int] = {}
    for job, varying in names.items():
        try:
            status = read_status(folder / job)
        except DataError:
            status = None
        state = status.state if status else "not started"
        count[state] = count.get(state, 0) + 1
        if status and state == "failed":
            first, *more = (status.error or "").split("\n")
            for line in (f"failed: job {job}{varying}: {first}", *(f"  {line}" for line in more)):
                print_line(line)
    print_line(", ".join(f"{number} {state}" for state, number in count.items()))
