"""The plan of a sweep: sweep.json holds its jobs and their overrides, start.yaml the config of each job."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from promcse_pl.config import Config
from promcse_pl.run_folder import START, Status, check_run_folder, read_json, read_status, write_config
from promcse_pl.tracking.wandb import MAX_TAG_LENGTH, short
from promcse_pl.utils.errors import ConfigError, DataError, PromcseError
from promcse_pl.utils.files import write_text
from promcse_pl.utils.paths import expand, hide_home, is_plain_name, run_command

PLAN = "sweep.json"
FORMAT = 1
_OF_ENGINE = ("sweep.address=", "sweep.job_cpus=", "sweep.job_gpus=")
"""Overrides that a resumed sweep does not take from sweep.json if it has another engine."""

Compose = Callable[[Sequence[str]], Config]
"""Function from the overrides of a job to its valid config."""


@dataclass(frozen=True, slots=True)
class SweepJob:
    """A job of a sweep.

    Attributes:
        folder: Name of its folder in the sweep's folder.
        overrides: All its overrides; `python run.py OVERRIDES` repeats it.
    """

    folder: str
    overrides: list[str]


@dataclass(frozen=True, slots=True)
class SharedSettings:
    """Settings shared by all jobs of a sweep, fixed at its first start and reused when it is resumed; `settled` in sweep.json.

    Attributes:
        parallel: Number of parallel jobs.
        threads: Threads of a single-process job.
        share: Threads of all ranks of a job together; None: the environment sets the threads of each rank.
        precision: Precision chosen for `trainer.precision=auto`, for each `trainer.device`.
    """

    parallel: int
    threads: int
    share: int | None
    precision: dict[str, str]

    def apply(self, config: Config) -> Config:
        """Return a job's config with the precision of the sweep in place of `auto`, which depends on `tuning` too."""
        precision = self.precision.get(config.trainer.device)
        if config.trainer.precision != "auto" or precision is None or config.tuning.uses_autocast:
            return config
        raw = config.to_dict()
        raw["trainer"]["precision"] = precision
        return Config.from_dict(raw)


@dataclass(slots=True)
class Plan:
    """Content of sweep.json.

    Attributes:
        overrides: Overrides as typed.
        jobs: All jobs; for a search, those suggested so far.
        shared: Shared settings; None for sweeps of older versions and for sweeps with a Hydra launcher (submitit, joblib).
    """

    overrides: list[str]
    jobs: list[SweepJob] = field(default_factory=list)
    shared: SharedSettings | None = None

    def varying(self, job: SweepJob) -> list[str]:
        """Return the overrides of a job that not all jobs share."""
        shared = set.intersection(*(set(other.overrides) for other in self.jobs))
        return [entry for entry in job.overrides if entry not in shared]


def write_plan(folder: Path, plan: Plan) -> None:
    """Write sweep.json atomically."""
    entries = {name: value for name, value in dataclasses.asdict(plan).items() if value is not None}
    if "shared" in entries:
        entries["settled"] = entries.pop("shared")
    write_text(folder / PLAN, json.dumps({"format": FORMAT, **entries}, indent=2) + "\n")


def without_home(entry: str) -> str:
    """Return an override with ~ for the home folder, quoted as Hydra requires; also a ~ that was typed.

    The command line is rewritten before Hydra reads it, so that a sweep and its resumption compose the same text.
    """
    key, equals, value = entry.partition("=")
    if key.startswith(("hydra.", "-")) or "\\" in value:
        return entry
    if re.fullmatch(r"'[^']*'|\"[^\"]*\"", value):
        return key + equals + hide_home(value)
    if "'" in value or '"' in value:
        return entry
    parts = [(part, hide_home(part)) for part in re.split(r"([,\[\]()])", value)]
    quoted = (f"'{hidden}'" if hidden.startswith("~") or hidden != part else part for part, hidden in parts)
    return key + equals + "".join(quoted)


def read_plan(folder: Path) -> Plan:
    """Read sweep.json.

    Raises:
        ConfigError: The folder holds no sweep.
        DataError: The file is damaged, or of a newer version.
    """
    path = folder / PLAN
    try:
        if not path.exists():
            raise ConfigError(f"{folder} holds no sweep: it has no {PLAN}. Try: the folder of a sweep")
        raw = read_json(path)
        if raw["format"] != FORMAT:
            raise DataError(f"{path} has format {raw['format']}; this version reads {FORMAT}. Try: a newer promcse_pl")
        jobs = [SweepJob(job["folder"], [str(entry) for entry in job["overrides"]]) for job in raw["jobs"]]
        overrides = [str(entry) for entry in raw["overrides"]]
        shared = _read_shared(raw["settled"]) if "settled" in raw else None
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    seen: set[str] = set()
    for job in jobs:
        if not is_plain_name(job.folder) or job.folder in seen:
            raise DataError(
                f"{path}: the folder of a job must be a unique name without / and .., got {str(job.folder)[:200]!r}. "
                "The file was not written by a sweep; no job was started"
            )
        seen.add(job.folder)
    return Plan(overrides, jobs, shared)


def _read_shared(raw: dict[str, Any]) -> SharedSettings:
    shared = SharedSettings(**raw)
    numbers = (shared.parallel, shared.threads, 1 if shared.share is None else shared.share)
    if not all(type(number) is int and 1 <= number <= 10_000 for number in numbers):
        raise TypeError(f"parallel, threads and share must be in [1, 10000], got {numbers}")
    if not isinstance(shared.precision, dict) or not {*shared.precision.values()} <= {"float32", "bfloat16"}:
        raise TypeError(f"precision must be float32 or bfloat16, got {shared.precision}")
    return shared


def resumed_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the command line that resumes a sweep: the overrides of sweep.json, and the sweep.* and hydra.* ones given now.

    Args:
        arguments: Arguments with `sweep.resume=FOLDER`; the other overrides may be repeated or left out, but must not differ.

    Raises:
        ConfigError: The folder contains no sweep, or it was started with other overrides.
    """
    from promcse_pl.runs.compose import quoted  # imports Hydra

    name = next(entry for entry in arguments if entry.startswith("sweep.resume=")).partition("=")[2].strip("'\"")
    if not name:
        raise ConfigError(f"sweep.resume= names no folder. Try: {run_command()} -m sweep.resume=multirun/DATE/TIME")
    folder = expand(name)
    plan = read_plan(folder)
    given = [entry for entry in arguments if not entry.startswith("-") and not _is_of_launch(entry)]
    before = [entry for entry in plan.overrides if not _is_of_launch(entry)]
    if given and sorted(given) != sorted(before):
        added = " ".join(entry for entry in given if entry not in before)
        removed = " ".join(entry for entry in before if entry not in given)
        differences = [f"{entries} is {how}" for entries, how in ((added, "new"), (removed, "missing")) if entries]
        raise ConfigError(
            f"the sweep in {folder} was started with other overrides: {'; '.join(differences)}. "
            f"Try: {run_command('-m', f'sweep.resume={folder}')}"
        )
    fixed = ("hydra.sweep.", "hydra/sweeper", "sweep.resume=")
    launch = [entry for entry in arguments if _is_of_launch(entry) and not entry.startswith(fixed)]
    kept = plan.overrides
    if (engine_of(launch) or engine_of(kept)) != engine_of(kept):
        kept = [entry for entry in kept if not entry.startswith(_OF_ENGINE)]
    together = [*kept, *launch]
    has_launcher = engine_of(together) == "submitit" or any(entry.startswith("hydra/launcher=") for entry in together)
    if plan.shared and not has_launcher and not any(entry.startswith("sweep.parallel=") for entry in launch):
        launch.append(f"sweep.parallel={plan.shared.parallel}")
    path = quoted(str(folder))
    return ["-m", *kept, *launch, f"sweep.resume={path}", f"hydra.sweep.dir={path}"]


def engine_of(overrides: Sequence[str]) -> str | None:
    """Return the value of `sweep.engine` on a command line; None if it is not given."""
    return next((entry.partition("=")[2] for entry in reversed(overrides) if entry.startswith("sweep.engine=")), None)


def kept_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a command line that sweep.json keeps."""
    of_one_start = ("sweep.parallel=", "sweep.resume=", "hydra.sweep.dir=", "hydra.run.dir=")
    return [entry for entry in overrides if not entry.startswith(of_one_start)]


def _is_of_launch(entry: str) -> bool:
    """Return whether an override affects only how jobs are started."""
    return entry.startswith(("sweep.", "hydra.", "hydra/"))


def plan_jobs(jobs: Iterable[Sequence[str]], compose: Compose) -> list[tuple[SweepJob, Config]]:
    """Compose and check every job of a sweep.

    Raises:
        PromcseError: The first job that is not valid; the message names its overrides.
    """
    seen: set[str] = set()
    planned = [
        (SweepJob(str(number), list(overrides)), check_job(overrides, compose, seen))
        for number, overrides in enumerate(jobs)
    ]
    if not planned:
        raise ConfigError(f"the sweep has no jobs. Try: {run_command()} -m loss.temperature=0.03,0.05")
    return planned


def check_job(overrides: Sequence[str], compose: Compose, seen: set[str]) -> Config:
    """Return the config of a job after checking its values and input files.

    Args:
        overrides: Overrides of the job.
        compose: Function from the overrides to the config.
        seen: Inputs that were checked for earlier jobs, to which these are added: jobs that share them check them once.

    Raises:
        PromcseError: The job is not valid; the message names its overrides.
    """
    from promcse_pl.runs.inputs import check_inputs

    try:
        config = compose(overrides)
        inputs = repr((config.model, config.data, config.trainer, config.tracking, config.evaluation))
        if inputs not in seen:
            check_inputs(config)
            seen.add(inputs)
    except PromcseError as error:
        raise type(error)(f"no job was started; job {' '.join(overrides)}: {error}") from error
    return config


def write_start(folder: Path, plan: Plan, job: SweepJob, config: Config, names: Sequence[str] | None = None) -> None:
    """Write start.yaml, the only file that a job reads. The W&B group is the sweep; the varying overrides are name and tags.

    Args:
        folder: Folder of the sweep.
        plan: Its plan.
        job: One of its jobs.
        config: Config of the job.
        names: Overrides that vary between jobs; None: those that vary in the plan.
    """
    if plan.shared:
        config = plan.shared.apply(config)
    varying, tracking = plan.varying(job) if names is None else names, config.tracking
    tracking = dataclasses.replace(
        tracking,
        group=tracking.group or folder.resolve().name,
        name=tracking.name or short(",".join(varying), 2 * MAX_TAG_LENGTH) or job.folder,
        tags=list(dict.fromkeys([*tracking.tags, *(short(entry, MAX_TAG_LENGTH) for entry in varying)])),
    )
    write_config(dataclasses.replace(config, tracking=tracking), folder / job.folder / START)


def missing_jobs(folder: Path, plan: Plan) -> list[SweepJob]:
    """Return the jobs of a sweep that are neither finished nor pruned.

    Raises:
        DataError: A job folder is a symbolic link, so that the job would write outside the sweep folder.
    """
    for job in plan.jobs:
        if (folder / job.folder).is_symlink():
            raise DataError(
                f"{folder / job.folder} is a symbolic link, but a job needs a folder inside the sweep folder. Try: replace the "
                "link by the folder that it points to"
            )
    return [job for job in plan.jobs if outcome(folder / job.folder) is None]


def outcome(folder: Path) -> Status | None:
    """Return the status of a finished or pruned job; None for others, whose status may be damaged: they are run or resumed."""
    with suppress(DataError):
        status = read_status(folder)
        if status is not None and status.state in ("finished", "pruned"):
            return status
    return None


def check_new(folder: Path, jobs: Iterable[SweepJob]) -> None:
    """Check that a new sweep can start in a folder: it contains no sweep, and its job folders are absent or empty.

    Raises:
        ConfigError: It contains a sweep, or a job folder is not empty.
    """
    if (folder / PLAN).exists():
        raise ConfigError(
            f"{folder} already contains a sweep. Try: another folder, or {run_command('-m', f'sweep.resume={folder}')}"
        )
    advice = "the same command with hydra.sweep.dir=NEW_FOLDER"
    for job in jobs:
        path = folder / job.folder
        if path.is_symlink():
            raise ConfigError(f"{path} is a symbolic link, but a job needs a new or empty folder. Try: {advice}")
        check_run_folder(path, advice=advice)


def add_job(folder: Path, job: SweepJob, config: Config) -> None:
    """Add a job to sweep.json and write its start.yaml, for other sweepers of Hydra; safe to call from several processes."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{PLAN}.lock").open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        plan = read_plan(folder) if (folder / PLAN).exists() else Plan([])
        plan.jobs = sorted(
            [*(other for other in plan.jobs if other.folder != job.folder), job], key=lambda job: job.folder.zfill(9)
        )
        write_start(folder, plan, job, config)
        write_plan(folder, plan)
