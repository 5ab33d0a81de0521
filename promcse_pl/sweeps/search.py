"""Search for settings with Optuna: TPE suggests the jobs, successive halving prunes them, a journal in the folder stores them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promcse_pl.config import SweepConfig, is_integer
from promcse_pl.run_folder import HISTORY, START, STATUS, Status, find_dev, locked, read_history, read_status
from promcse_pl.sweeps.execute import (
    Launch,
    describe_shared,
    dev_score,
    end_job,
    launch_jobs,
    measure_shared,
    open_runner,
    start_job,
    summarise,
    wait_for_earlier,
)
from promcse_pl.sweeps.plan import (
    Compose,
    Plan,
    SweepJob,
    check_job,
    check_new,
    kept_overrides,
    outcome,
    read_plan,
    write_plan,
    write_start,
)
from promcse_pl.sweeps.pool import Pool, RunningTask, Task, check_gpus
from promcse_pl.utils.errors import ConfigError, DataError, PromcseError
from promcse_pl.utils.paths import run_command
from promcse_pl.utils.terminal import print_line

if TYPE_CHECKING:
    import optuna

JOURNAL = "search.journal"
MIN_PERCENT, REDUCTION = 25, 2
"""Successive halving: at 25 and 50 % of its steps, a job continues only if it belongs to the better half so far."""
READ_SECONDS = 0.5
"""Time between two reads of the histories of running jobs."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A range to search in, both ends included; of integers if both ends are.

    Attributes:
        low, high: Ends.
        log: Whether values are drawn uniformly in the logarithm.
    """

    low: float
    high: float
    log: bool = False


Space = Mapping[str, Sequence[str] | Interval]
"""Values of each key as text, or a range."""


def run_search(
    folder: Path,
    overrides: Sequence[str],
    space: Space,
    settings: SweepConfig,
    compose: Compose,
    launch: Launch | None,
) -> int:
    """Search, or resume a search, until it has `settings.trials` jobs.

    Args:
        folder: Folder of the sweep.
        overrides: Overrides as typed.
        space: Values or range of each key; a single value is fixed.
        settings: Settings of the sweep.
        compose: Function from the overrides of a job to its config.
        launch: A launcher of Hydra, which receives `sweep.parallel` jobs at a time and does not prune; None: a pool with the
            engine of the settings.

    Returns:
        As `run_sweep`.

    Raises:
        PromcseError: The space is empty or contains an invalid value, or Optuna is not installed.
    """
    space = {
        key: _checked_range(key, values) if isinstance(values, Interval) else values for key, values in space.items()
    }
    seen: set[str] = set()
    configs = [check_gpus(check_job(corner, compose, seen), settings) for corner in corners(space)]
    for config in configs:
        if config.data.dev is None:
            raise ConfigError(
                "a search needs a dev score, but data.dev=null. Try: "
                f"{'data.dev=holdout, or ' if config.data.kind == 'triplets' else ''}data.dev=FILE"
            )
    with locked(folder) as lock:
        if settings.resume is None:
            check_new(folder, [SweepJob(str(number), []) for number in range(settings.trials or 0)])
            plan = Plan(kept_overrides(overrides))
        else:
            plan = read_plan(folder)
        with open_runner(launch, settings, lock, plan.shared) as runner:
            if settings.resume is None and isinstance(runner, Pool):
                plan.shared = measure_shared(folder, runner, configs)
                if plan.shared is None:
                    return runner.exit_code or 1
            search = Search(folder, plan, _study(folder, settings), space, settings, compose)
            write_plan(folder, plan)
            shared = describe_shared(plan, runner.engine.parallel) if isinstance(runner, Pool) else ""
            print_line(f"search {folder}: {settings.trials} jobs, {search.n_finished()} done{shared}")
            stopped = search.run(runner) if isinstance(runner, Pool) else search.launch(runner)
            if not plan.jobs and not stopped:
                raise ConfigError(
                    f"no job was run: all {settings.trials} trials were left out. Try: another search space"
                )
            return summarise(folder, plan, stopped, unplanned=(settings.trials or 0) - search.n_suggested())


def corners(space: Space) -> Iterator[list[str]]:
    """Yield overrides that contain every value and both ends of every range at least once.

    Raises:
        ConfigError: The space has a single point.
    """
    values = {
        key: [_text(part.low), _text(part.high)] if isinstance(part, Interval) else list(part)
        for key, part in space.items()
    }
    if all(len(texts) == 1 for texts in values.values()):
        raise ConfigError(
            f"the search space has a single point. Try: {run_command()} -m sweep=search, or 'optim.lr=interval(1e-3,3e-2)'"
        )
    for row in range(max(map(len, values.values()))):
        yield [f"{key}={texts[min(row, len(texts) - 1)]}" for key, texts in values.items()]


def _checked_range(key: str, values: Interval) -> Interval:
    """Return a range; that of an integer setting with integers as ends: those of Hydra's `interval(4,16)` are floats.

    Raises:
        ConfigError: It contains no value, or values without a logarithm.
    """
    typed = f"{key}=interval({values.low:g},{values.high:g})"
    if not -math.inf < values.low <= values.high < math.inf:
        raise ConfigError(f"{typed} must have two numbers, the smaller one first")
    if values.log and values.low <= 0:
        raise ConfigError(f"{typed} cannot be searched in the logarithm: its ends must be above 0")
    if not is_integer(key):
        return values
    low, high = math.ceil(values.low), math.floor(values.high)
    if low > high:
        raise ConfigError(f"{typed} contains no integer, but {key} is one")
    return Interval(low, high, log=values.log)


def _text(value: float) -> str:
    """Return a number as in an override, with four digits."""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _study(folder: Path, settings: SweepConfig) -> optuna.Study:
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ConfigError("a search needs Optuna. Try: pip install 'promcse_pl[optuna]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=MIN_PERCENT, reduction_factor=REDUCTION)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
        study_name="sweep",
        direction="maximize",
        load_if_exists=True,
        pruner=halving if settings.prune else optuna.pruners.NopPruner(),
    )


class Search:
    """Trials of a study as jobs of a sweep; the number of a trial is the name of its job's folder."""

    def __init__(
        self, folder: Path, plan: Plan, study: optuna.Study, space: Space, settings: SweepConfig, compose: Compose
    ) -> None:
        self.folder, self.plan, self.study, self.settings, self.compose = folder, plan, study, settings, compose
        self.fixed, self.distributions = list[str](), dict[str, Any]()
        for key, values in space.items():
            if not isinstance(values, Interval) and len(values) == 1:
                self.fixed.append(f"{key}={values[0]}")
            else:
                self.distributions[key] = _distribution(values)
        self.trials: dict[str, optuna.Trial] = {}
        self.pruned: set[str] = set()
        self._last_read = 0.0

    def n_finished(self) -> int:
        """Return the number of trials that have an outcome."""
        return sum(trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False))

    def n_suggested(self) -> int:
        """Return the number of trials so far, at most that of the settings."""
        return min(len(self.study.get_trials(deepcopy=False)), self.settings.trials or 0)

    def run(self, pool: Pool) -> int | None:
        """Run all missing jobs in a pool; return the exit code after a signal, or None."""

        def tasks() -> Iterator[Task]:
            for job in self._jobs():
                yield start_job(self.folder, job, job.overrides[len(self.fixed) :])

        def on_end(running: RunningTask, code: int) -> None:
            name = running.task.name
            self._record(name, end_job(self.folder, running, code, pruned=name in self.pruned))

        pool.run(tasks(), on_end, lambda: self._prune(pool.running))
        return pool.exit_code

    def launch(self, launch: Launch) -> int | None:
        """Pass all missing jobs to a launcher, `sweep.parallel` at a time; return the exit code after Ctrl-C, or None."""
        jobs = self._jobs()
        while batch := list(itertools.islice(jobs, self.settings.parallel)):
            if code := launch_jobs(launch, batch):
                return code
            if not any((self.folder / job.folder / STATUS).exists() for job in batch):
                return 1  # the launcher starts nothing: the other trials would be lost too
            for job in batch:
                self._record(job.folder, outcome(self.folder / job.folder) or Status(state="failed"))
        return None

    def _jobs(self) -> Iterator[SweepJob]:
        """Yield the jobs of an earlier process that have no outcome yet, then new ones."""
        from optuna.trial import Trial

        for frozen in self.study.get_trials(deepcopy=False):
            if frozen.state.is_finished():
                continue
            name = str(frozen.number)
            self.trials[name] = Trial(self.study, frozen._trial_id)
            job = self._job_of(name, frozen.params)
            if job is None:
                continue
            if status := outcome(self.folder / name):  # the sweep was killed before it recorded this
                self._record(name, status)
            else:
                wait_for_earlier(self.folder, [job])
                yield job
        while self.n_suggested() < (self.settings.trials or 0):
            trial = self._ask()
            self.trials[str(trial.number)] = trial
            if job := self._job_of(str(trial.number), trial.params):
                yield job

    def _ask(self) -> optuna.Trial:
        """Ask for the next trial; the sampler is seeded by its number, so that a resumed search suggests the same trials."""
        from optuna.samplers import TPESampler

        number = len(self.study.get_trials(deepcopy=False))
        # constant_liar: running trials count as poor, so that nothing similar is suggested
        self.study.sampler = TPESampler(seed=self.settings.seed + number, multivariate=True, constant_liar=True)
        return self.study.ask(self.distributions)

    def _job_of(self, name: str, params: Mapping[str, Any]) -> SweepJob | None:
        """Return the job of a trial, after writing it to sweep.json and start.yaml; None if its settings exclude each other."""
        for job in self.plan.jobs:
            if job.folder == name and (self.folder / name / START).is_file():
                return job
        values = [f"{key}={value if isinstance(value, str) else _text(value)}" for key, value in params.items()]
        job = SweepJob(name, [*self.fixed, *values])
        try:
            config = self.compose(job.overrides)
        except PromcseError as error:
            from optuna.trial import TrialState

            print_line(f"trial {name} ({' '.join(values)}) is left out: {error}")
            self.study.tell(self.trials[name], state=TrialState.FAIL)
            return None
        self.plan.jobs = [*(other for other in self.plan.jobs if other.folder != name), job]
        write_start(self.folder, self.plan, job, config, names=values)
        write_plan(self.folder, self.plan)
        return job

    def _record(self, name: str, status: Status) -> None:
        """Record the outcome of a job in the study; one that failed or was stopped has none yet, since it may be resumed."""
        from optuna.trial import TrialState

        trial, score = self.trials[name], dev_score(self.folder / name)
        if self.settings.prune:
            self._should_prune(name)  # reports the last dev evaluations, with which later jobs are compared
        if status.state == "finished" and score is not None:
            self.study.tell(trial, score)
        elif status.state == "pruned":
            self.study.tell(trial, state=TrialState.PRUNED)
        elif status.state == "finished":
            self.study.tell(trial, state=TrialState.FAIL)

    def _prune(self, running: Sequence[RunningTask]) -> None:
        """Report new dev scores, and stop the jobs that the pruner rejects."""
        if not self.settings.prune or time.monotonic() - self._last_read < READ_SECONDS:
            return
        self._last_read = time.monotonic()
        for task in running:
            if task.task.name not in self.pruned and self._should_prune(task.task.name):
                self.pruned.add(task.task.name)
                task.child.terminate()

    def _should_prune(self, name: str) -> bool:
        """Report the new dev scores of a job; return whether the pruner rejects it at one of them."""
        trial = self.trials[name]
        reported = trial.storage.get_trial(trial._trial_id).intermediate_values
        for percent, score in dev_evaluations(self.folder / name):
            if percent not in reported:
                trial.report(score, percent)
                if trial.should_prune():
                    return True
        return False


def dev_evaluations(run: Path) -> list[tuple[int, float]]:
    """Return the progress in percent and the dev score at each dev evaluation of a run except the one after its last step."""
    with suppress(DataError):
        status = read_status(run)
        if status is not None and status.steps:
            return [
                (round(100 * entry["step"] / status.steps), float(found[1]))
                for entry in read_history(run / HISTORY)
                if (found := find_dev(entry, "dev/")) and entry["step"] < status.steps
            ]
    return []


def _distribution(values: Sequence[str] | Interval) -> Any:  # noqa: ANN401  (Optuna's)
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(values, Interval):
        return CategoricalDistribution(list(values))
    if isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)
