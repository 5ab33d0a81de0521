"""A sweep over given jobs: check all, then run what is missing, on this machine or by another's launcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from promcse_pl.config import SweepConfig
from promcse_pl.run_folder import START, locked, read_config
from promcse_pl.sweeps.local import run_local, settled_words, summary, tell, wait_for_earlier
from promcse_pl.sweeps.plan import (
    Compose,
    Plan,
    SweepJob,
    check_new,
    checked,
    kept_overrides,
    missing_jobs,
    plan_jobs,
    read_plan,
    write_plan,
    write_start,
)
from promcse_pl.sweeps.pool import Pool, check_fits
from promcse_pl.sweeps.settle import settle
from promcse_pl.utils.errors import ConfigError

Launch = Callable[[Sequence[SweepJob]], None]
"""Hands jobs to a launcher of Hydra and returns when they have ended."""


def run_sweep(
    folder: Path,
    overrides: Sequence[str],
    jobs: Sequence[Sequence[str]],
    settings: SweepConfig,
    compose: Compose,
    launch: Launch | None,
) -> int:
    """Run a sweep, or what is missing of one; nothing is written before every job is valid.

    Args:
        folder: Of the sweep.
        overrides: As typed.
        jobs: Overrides of each job.
        settings: How to run it.
        compose: Overrides of a job to its config.
        launch: A launcher of Hydra; None: processes of this machine.

    Returns:
        0; 1 if a job did not finish; 130 or 143 if a signal stopped the sweep.

    Raises:
        PromcseError: A job is not valid, or the folder is another sweep's.
    """
    if launch and settings.parallel > 1:
        raise ConfigError(
            "sweep.parallel is of the local launcher. Try: hydra.launcher.n_jobs (joblib), or leave it out"
        )
    settled = read_plan(folder).settled if settings.resume else None
    # a pool begins with its imports, while the jobs are checked
    with nullcontext(launch) if launch else Pool(settings.parallel, tell, settled) as runner:
        if settings.resume is None:
            planned = plan_jobs(jobs, lambda overrides: check_fits(compose(overrides), settings.parallel))
            with locked(folder):
                plan = Plan(kept_overrides(overrides), [job for job, _ in planned])
                check_new(folder, plan.jobs)
                if isinstance(runner, Pool):
                    plan.settled = settle(runner, [config for _, config in planned])
                    if plan.settled is None:
                        return runner.exit_code or 1
                for job, config in planned:
                    write_start(folder, plan, job, plan.settled.apply(config) if plan.settled else config)
                write_plan(folder, plan)
                return _run(folder, plan, runner)
        with locked(folder):
            plan = read_plan(folder)
            seen: set[str] = set()
            for job in missing_jobs(folder, plan):
                checked(job.overrides, lambda _, start=folder / job.folder / START: read_config(start), seen)  # type: ignore[misc]
            return _run(folder, plan, runner)


def _run(folder: Path, plan: Plan, runner: Pool | Launch) -> int:
    jobs = missing_jobs(folder, plan)
    settled = settled_words(plan, runner.parallel) if isinstance(runner, Pool) else ""
    tell(f"sweep {folder}: {len(plan.jobs)} {'job' if len(plan.jobs) == 1 else 'jobs'}, {len(jobs)} to run{settled}")
    wait_for_earlier(folder, jobs)
    stopped = None
    if not jobs:  # nor is a pool's import waited for
        pass
    elif isinstance(runner, Pool):
        stopped = run_local(folder, plan, jobs, runner)
    else:
        try:
            runner(jobs)
        except KeyboardInterrupt:
            stopped = 130
    return summary(folder, plan, stopped)
