"""A search with Optuna: TPE proposes the jobs, successive halving stops the poor ones, a journal in the folder remembers."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promcse_pl.config import SweepConfig, is_integer
from promcse_pl.run_folder import HISTORY, START, Status, locked, read_status, write_status
from promcse_pl.sweeps.forkserver import Task
from promcse_pl.sweeps.local import (
    announce,
    dev_score,
    ending,
    job_task,
    record_end,
    settled_words,
    summary,
    tell,
    wait_for_earlier,
)
from promcse_pl.sweeps.plan import (
    Compose,
    Plan,
    SweepJob,
    check_new,
    checked,
    kept_overrides,
    read_plan,
    write_plan,
    write_start,
)
from promcse_pl.sweeps.pool import Pool, Running, check_fits
from promcse_pl.sweeps.run import Launch
from promcse_pl.sweeps.settle import settle
from promcse_pl.utils.errors import ConfigError, DataError, PromcseError

if TYPE_CHECKING:
    import optuna

JOURNAL = "search.journal"
FIRST_LOOK, HALVING = 25, 2
"""At a quarter and at half of a run, only the better half of what came so far goes on."""
LOOK_EVERY = 0.5
"""Seconds between two looks at the histories of running jobs."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A range to search in, both ends included: of integers if both are; `log`: evenly in the logarithm."""

    low: float
    high: float
    log: bool = False


Space = Mapping[str, Sequence[str] | Interval]
"""Values of each key, as text, or a range."""


def run_search(
    folder: Path,
    overrides: Sequence[str],
    space: Space,
    settings: SweepConfig,
    compose: Compose,
    launch: Launch | None,
) -> int:
    """Search, or go on searching, until `settings.trials` jobs have been tried.

    Args:
        folder: Of the sweep.
        overrides: As typed.
        space: What each key may be; one value: fixed.
        settings: How to run it.
        compose: Overrides of a job to its config.
        launch: A launcher of Hydra, which gets `sweep.parallel` jobs at once and prunes none; None: processes of this machine.

    Returns:
        As `run_sweep`.

    Raises:
        PromcseError: The space is empty or holds a value that is not valid; Optuna is not installed.
    """
    space = {key: _whole(one) if isinstance(one, Interval) and is_integer(key) else one for key, one in space.items()}
    settled = read_plan(folder).settled if settings.resume else None
    # a pool begins with its imports, while the space is checked
    with nullcontext(launch) if launch else Pool(settings.parallel, tell, settled) as runner:
        seen: set[str] = set()
        checked_configs = [check_fits(checked(corner, compose, seen), settings.parallel) for corner in corners(space)]
        for config in checked_configs:
            if config.data.dev is None:
                raise ConfigError(
                    "a search needs a development score, but data.dev=null. Try: "
                    f"{'data.dev=holdout, or ' if config.data.kind == 'triplets' else ''}data.dev=FILE"
                )
        with locked(folder):
            if settings.resume is None:
                check_new(folder, [SweepJob(str(number), []) for number in range(settings.trials or 0)])
                plan = Plan(kept_overrides(overrides))
                if isinstance(runner, Pool):
                    plan.settled = settle(runner, checked_configs)
                    if plan.settled is None:
                        return runner.exit_code or 1
                study = _study(folder, settings)
                write_plan(folder, plan)
            else:
                plan, study = read_plan(folder), _study(folder, settings)
            search = Search(folder, plan, study, space, settings, compose)
            words = settled_words(plan, runner.parallel) if isinstance(runner, Pool) else ""
            tell(f"search {folder}: {settings.trials} jobs, {search.told()} done{words}")
            stopped = search.run(runner) if isinstance(runner, Pool) else search.launch(runner)
            return summary(folder, plan, stopped)


def corners(space: Space) -> Iterator[list[str]]:
    """Give overrides that hold every value and both ends of every range at least once.

    Raises:
        ConfigError: There is nothing to search in.
    """
    values = {
        key: [_text(one.low), _text(one.high)] if isinstance(one, Interval) else list(one) for key, one in space.items()
    }
    if all(len(texts) == 1 for texts in values.values()):
        raise ConfigError(
            "there is nothing to search in. Try: python run.py -m sweep=search, or 'optim.lr=interval(1e-3,3e-2)'"
        )
    for row in range(max(map(len, values.values()))):
        yield [f"{key}={texts[min(row, len(texts) - 1)]}" for key, texts in values.items()]


def _whole(one: Interval) -> Interval:
    """Return a range of integers: Hydra's `interval(4,16)` is one of fractions."""
    return Interval(math.ceil(one.low), math.floor(one.high), log=one.log)


def _text(value: float) -> str:
    """Return a number as an override shows it: four digits are finer than any run can tell apart."""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _study(folder: Path, settings: SweepConfig) -> optuna.Study:
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ConfigError("a search needs Optuna. Try: pip install 'promcse_pl[optuna]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=FIRST_LOOK, reduction_factor=HALVING)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
        study_name="sweep",
        direction="maximize",
        load_if_exists=True,
        pruner=halving if settings.prune else optuna.pruners.NopPruner(),
    )


class Search:
    """Trials of a study as jobs of a sweep; a trial's number is the name of its job's folder."""

    def __init__(
        self, folder: Path, plan: Plan, study: optuna.Study, space: Space, settings: SweepConfig, compose: Compose
    ) -> None:
        self.folder, self.plan, self.study, self.settings, self.compose = folder, plan, study, settings, compose
        self.fixed = [
            f"{key}={one[0]}" for key, one in space.items() if not isinstance(one, Interval) and len(one) == 1
        ]
        self.distributions = {
            key: _distribution(one) for key, one in space.items() if isinstance(one, Interval) or len(one) > 1
        }
        self.open: dict[str, optuna.Trial] = {}
        self.pruned: set[str] = set()
        self._looked = 0.0

    def told(self) -> int:
        """Return how many trials have an outcome."""
        return sum(trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False))

    def run(self, pool: Pool) -> int | None:
        """Run all that is missing in local processes; return the exit code that a signal asks for, or None."""

        def tasks() -> Iterator[Task]:
            for job in self._jobs():
                announce(job, job.overrides[len(self.fixed) :])
                yield job_task(self.folder, job)

        pool.run(tasks(), self._ended, lambda: self._look(pool.running))
        return pool.exit_code

    def launch(self, launch: Launch) -> int | None:
        """Hand all that is missing to a launcher, so many at a time; return the exit code of a Ctrl-C, or None."""
        jobs = self._jobs()
        while batch := list(itertools.islice(jobs, self.settings.parallel)):
            try:
                launch(batch)
            except KeyboardInterrupt:
                return 130
            for job in batch:
                self._tell(job.folder, read_status(self.folder / job.folder) or Status(state="failed"))
        return None

    def _jobs(self) -> Iterator[SweepJob]:
        """Give the jobs of an earlier process that have no outcome yet, then new ones."""
        from optuna.trial import Trial

        for frozen in self.study.get_trials(deepcopy=False):
            if frozen.state.is_finished():
                continue
            name = str(frozen.number)
            self.open[name] = Trial(self.study, frozen._trial_id)
            job = self._planned(name, frozen.params)
            if job is None:
                continue
            status = read_status(self.folder / name)
            if status is not None and status.state in ("finished", "pruned"):  # nobody was left to note it
                self._tell(name, status)
            else:
                wait_for_earlier(self.folder, [job])
                yield job
        while len(self.study.get_trials(deepcopy=False)) < (self.settings.trials or 0):
            trial = self._ask()
            self.open[str(trial.number)] = trial
            if job := self._planned(str(trial.number), trial.params):
                yield job

    def _ask(self) -> optuna.Trial:
        """Ask for the next trial; the sampler is seeded by its number, so that a resumed search asks for the same."""
        from optuna.samplers import TPESampler

        number = len(self.study.get_trials(deepcopy=False))
        # constant_liar: what runs elsewhere counts as poor, so that it is not proposed twice
        self.study.sampler = TPESampler(seed=self.settings.seed + number, multivariate=True, constant_liar=True)
        return self.study.ask(self.distributions)

    def _planned(self, name: str, params: Mapping[str, Any]) -> SweepJob | None:
        """Return the job of a trial, written down in sweep.json and start.yaml; None when its settings exclude each other."""
        for job in self.plan.jobs:
            if job.folder == name and (self.folder / name / START).is_file():
                return job
        values = [f"{key}={value if isinstance(value, str) else _text(value)}" for key, value in params.items()]
        job = SweepJob(name, [*self.fixed, *values])
        try:
            config = self.compose(job.overrides)
        except PromcseError as error:
            from optuna.trial import TrialState

            tell(f"trial {name} ({' '.join(values)}) is left out: {error}")
            self.study.tell(self.open[name], state=TrialState.FAIL)
            return None
        self.plan.jobs = [*(one for one in self.plan.jobs if one.folder != name), job]
        if self.plan.settled:
            config = self.plan.settled.apply(config)
        write_start(self.folder, self.plan, job, config, names=values)
        write_plan(self.folder, self.plan)
        return job

    def _ended(self, one: Running, code: int) -> None:
        run = self.folder / one.task.name
        status = record_end(run, code, one.began)
        if one.task.name in self.pruned and status.state == "stopped":
            status = dataclasses.replace(status, state="pruned")
            write_status(run, status)
        tell(ending(run, status, time.time() - one.began))
        self._tell(one.task.name, status)

    def _tell(self, name: str, status: Status) -> None:
        """Let the study know an outcome; a job that failed or was stopped from outside has none yet: it may be resumed."""
        from optuna.trial import TrialState

        trial, score = self.open[name], dev_score(self.folder / name)
        if self.settings.prune:
            self._is_poor(name)  # the last looks are what later jobs are measured by
        if status.state == "finished" and score is not None:
            self.study.tell(trial, score)
        elif status.state == "pruned":
            self.study.tell(trial, state=TrialState.PRUNED)
        elif status.state == "finished":
            self.study.tell(trial, state=TrialState.FAIL)

    def _look(self, running: Sequence[Running]) -> None:
        """Report new development scores, and stop what is not promising."""
        if not self.settings.prune or time.monotonic() - self._looked < LOOK_EVERY:
            return
        self._looked = time.monotonic()
        for one in running:
            name = one.task.name
            if name in self.pruned:
                continue
            if self._is_poor(name):
                self.pruned.add(name)
                one.process.terminate()

    def _is_poor(self, name: str) -> bool:
        """Report the looks of a job that are new; tell whether halving would end it there."""
        trial = self.open[name]
        known = trial.storage.get_trial(trial._trial_id).intermediate_values
        poor = False
        for percent, score in dev_looks(self.folder / name):
            if percent not in known and not poor:
                trial.report(score, percent)
                poor = trial.should_prune()
        return poor


def dev_looks(run: Path) -> list[tuple[int, float]]:
    """Return how far a job was at each look at the development set but the last, in percent, and the score."""
    from promcse_pl.run_folder import read_history

    with suppress(DataError):
        status = read_status(run)
        if status is not None and status.steps:
            return [
                (round(100 * entry["step"] / status.steps), float(entry["dev/spearman"]))
                for entry in read_history(run / HISTORY)
                if "dev/spearman" in entry and entry["step"] < status.steps
            ]
    return []


def _distribution(one: Sequence[str] | Interval) -> Any:  # noqa: ANN401  (Optuna's)
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(one, Interval):
        return CategoricalDistribution(list(one))
    if isinstance(one.low, int) and isinstance(one.high, int):
        return IntDistribution(one.low, one.high, log=one.log)
    return FloatDistribution(one.low, one.high, log=one.log)
