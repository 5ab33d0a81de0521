"""The Hydra application: compose the config, validate it, and run one job or a sweep."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence, Set
from contextlib import suppress
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from promcse_pl.cli.config_file import file_overrides
from promcse_pl.config import check_overrides, is_dictionary, unquoted_dictionary
from promcse_pl.runs.compose import (
    CONF,
    TYPED,
    config_groups,
    config_of,
    quoted,
    recipe_note,
    refusal,
    replace_prompts,
    typed_command,
)
from promcse_pl.sweeps.plan import engine_of, resumed_arguments, without_home
from promcse_pl.utils.errors import ConfigError, PromcseError
from promcse_pl.utils.exit_codes import exit_code
from promcse_pl.utils.paths import expand, is_folder, run_command

_EXISTING: ContextVar[Set[Path]] = ContextVar("_EXISTING", default=frozenset())
"""Folders that the run folder may be in or be, as far as they existed before Hydra was called."""


def compose_and_run(
    flags: Sequence[str], overrides: Sequence[str], *, config_file: str | None = None, out: Path | None = None
) -> None:
    """Compose a config and train with it, or run the action of a flag: sweep, print config, help, shell completion.

    Args:
        flags: Options of Hydra, long and with = before their values: `--multirun`, `--cfg=job`, `--config-dir=FOLDER`.
        overrides: `key=value` and `group=choice`.
        config_file: YAML file with settings; overrides win over them.
        out: Folder of the run or sweep; None: that of conf/config.yaml.

    Raises:
        ConfigError: Hydra refused the command line.
    """
    if "--resolve" in flags and not any(flag.startswith(("--cfg=", "--help")) for flag in flags):
        raise ConfigError(f"--resolve has an effect only with --cfg or --help. Try: {run_command('--cfg', 'job')}")
    TYPED.set(
        [*(["--config", config_file] if config_file else ()), *(["--out", str(out)] if out else ()), *flags, *overrides]
    )
    folders = [CONF, *(expand(flag.partition("=")[2]) for flag in flags if flag.startswith("--config-dir="))]
    given = [_with_home(without_home(override)) for override in overrides]
    if config_file is not None:
        given = _with_file(config_file, given, folders, "--multirun" in flags)
    if out is not None:
        given.append(f"hydra.{'sweep' if '--multirun' in flags else 'run'}.dir={quoted(str(out))}")
    _EXISTING.set(_existing(out, given))
    if any(override.startswith("sweep.resume=") for override in given):
        _, *given = resumed_arguments(given)
        flags = [*(flag for flag in flags if flag != "--multirun"), "--multirun"]
    if "--multirun" in flags:
        given = _with_launcher(given)
    searches_elsewhere = any(flag.startswith("--config-path=") for flag in flags) or any(
        override.lstrip("+").startswith("hydra.searchpath") for override in given
    )
    if "--shell-completion" not in flags and not searches_elsewhere:
        check_overrides(given, config_groups(folders))
    _call_hydra([*flags, *(given if "--multirun" in flags else replace_prompts(given))])


def _with_home(override: str) -> str:
    """Return an override with the home folder for the ~ of a run or sweep folder, which Hydra would create as it is."""
    folder = re.fullmatch(r"(hydra\.(?:run|sweep)\.dir)=(['\"]?)(~[^'\"]*)\2", override)
    return f"{folder[1]}='{expand(folder[3])}'" if folder else override


def _with_file(file: str, overrides: Sequence[str], folders: Sequence[Path], is_sweep: bool) -> list[str]:
    """Return the overrides with those of a config file before them; the run folder is named after the file."""
    name = re.sub(r"[^\w.-]", "_", Path(file).stem, flags=re.ASCII)
    named = [] if is_sweep else [f"hydra.run.dir='outputs/${{now:%Y-%m-%d}}/${{now:%H-%M-%S}}-{name}'"]
    try:
        return [*named, *file_overrides(file, overrides, folders), *overrides]
    except RecursionError as error:
        raise ConfigError(f"{file}: a value contains itself. Try: the file without & and *") from error


def _with_launcher(overrides: list[str]) -> list[str]:
    """Return the overrides of a sweep with the launcher of Hydra that `sweep.engine=submitit` needs.

    Raises:
        ConfigError: The launcher or SLURM is not installed.
    """
    if engine_of(overrides) != "submitit" or any(entry.startswith("hydra/launcher=") for entry in overrides):
        return overrides
    if not find_spec("hydra_plugins.hydra_submitit_launcher"):
        raise ConfigError(
            "sweep.engine=submitit needs Hydra's submitit launcher. Try: pip install hydra-submitit-launcher"
        )
    if not shutil.which("srun"):
        raise ConfigError(
            "sweep.engine=submitit needs SLURM, but this machine has no srun. Try: the same command on a node of the cluster, or "
            "sweep.engine=local"
        )
    return [*overrides, "hydra/launcher=submitit_slurm"]


def _call_hydra(arguments: list[str]) -> None:
    """Call Hydra, and raise what it refuses as a ConfigError; a user's HYDRA_FULL_ERROR=1 shows where the refusal comes from.

    Jobs and sweeps that Hydra calls end with SystemExit, not with another exception, so that an exception is Hydra's own.
    """
    before, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR", "")
    sys.argv = [before[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises; otherwise it prints and exits with code 1
    try:
        run_composed()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if full_error:
            raise
        raise _refusal(error, arguments) from error
    finally:
        sys.argv, os.environ["HYDRA_FULL_ERROR"] = before, full_error


def _refusal(error: Exception, arguments: Sequence[str]) -> ConfigError:
    """Return why Hydra refused a command line, with the advice that the command line itself suggests."""
    parser = OverridesParser.create()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument.startswith("-") or not equals:
            continue
        try:
            override = parser.parse_override(argument)
        except HydraException as reason:
            if is_dictionary(key):
                return unquoted_dictionary(argument)
            return ConfigError(
                f"{argument}: {reason}. A value with special characters needs quotes. "
                f"Try: {run_command()} {shlex.quote(f'{key}={quoted(value)}')}"
            )
        if override.is_sweep_override() and "--multirun" not in arguments:
            return ConfigError(
                f"{argument} has several values. Try: {typed_command(sweep=True)} (a job for each), or "
                "'KEY=[VALUE,VALUE]' for a list"
            )
    message = refusal(error)
    return ConfigError(message if "Try: " in message else f"{message.rstrip('.')}. Try: {run_command('--help')}")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run_composed(composed: DictConfig) -> float | None:
    """Run the composed job; for a Hydra launcher or sweeper in a separate process, to return its dev score."""
    runtime: Any = OmegaConf.to_container(HydraConfig.get().runtime, resolve=False)
    folder = Path(runtime["output_dir"])  # a path: ${ in it is not an interpolation
    score: float | None = None

    def run() -> None:
        nonlocal score
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            score = _run_apart(composed, folder)
            return
        try:
            _check_single()
            config = config_of(composed)
            from promcse_pl.runs.lifecycle import run_job

            run_job(config, folder, note=recipe_note(config, str(HydraConfig.get().runtime.choices["model"])))
        except PromcseError:
            _remove_empty(folder)
            raise

    if code := exit_code(run):
        sys.exit(code)
    return score


def _run_apart(composed: DictConfig, folder: Path) -> float:
    """Run a job for a launcher or sweeper of Hydra's; our own sweeper has written its start.yaml."""
    from promcse_pl.run_folder import START
    from promcse_pl.sweeps.execute import run_single
    from promcse_pl.sweeps.plan import SweepJob, add_job, read_plan

    typed: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    job = SweepJob(folder.name, typed)
    if not (folder / START).is_file():
        add_job(folder.parent, job, config_of(composed))
    elif job not in read_plan(folder.parent).jobs:
        raise ConfigError(
            f"{folder} has a job with other settings. Try: the same command with hydra.sweep.dir=NEW_FOLDER"
        )
    return run_single(folder.parent, job)


def _check_single() -> None:
    """Check that a single run has no settings of sweeps: they would have no effect."""
    given: Any = OmegaConf.to_container(HydraConfig.get().overrides, resolve=False)
    of_sweeps = ("sweep", "hydra.sweep", "hydra/sweep")
    unused = [override for override in (*given["hydra"], *given["task"]) if override.lstrip("+").startswith(of_sweeps)]
    if unused:
        raise ConfigError(f"{unused[0]} has no effect on a single run. Try: {typed_command(sweep=True)}")


def _existing(out: Path | None, overrides: Sequence[str]) -> Set[Path]:
    """Return the existing folders among the run folder, its parents and, if its name contains the time, those next to it."""
    typed = [value for key, _, value in (entry.partition("=") for entry in overrides) if key == "hydra.run.dir"]
    folder = out or Path((typed or ["outputs/"])[-1].strip("'\"").partition("${")[0])
    inside = folder.absolute().glob("*") if is_folder(folder) else ()
    return {path for path in (folder.absolute(), *folder.absolute().parents, *inside) if is_folder(path)}


def _remove_empty(folder: Path) -> None:
    """Remove the folders that Hydra created for a run that did not start: its folder, and empty parents in the current folder."""
    here = Path.cwd()
    with suppress(OSError):  # a link, a mount point, or removed by another rank
        while folder.is_dir() and folder not in {here, *_EXISTING.get()} and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
            if here not in folder.parents:
                return
