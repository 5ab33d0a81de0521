"""Hydra's door: compose, validate, hand ONE resolved config to ONE job. See `python run.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from promcse_pl.cli import main as cli
from promcse_pl.config import check_overrides
from promcse_pl.errors import ConfigError, PromcseError, write_error
from promcse_pl.sweep.compose import config_of
from promcse_pl.sweep.plan import resumed_arguments, without_home
from promcse_pl.training.stop import Stopped

CONF = Path(__file__).parent / "conf"


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float | None:
    """Run one job; a job of a sweep gets a process of its own, and its development score is returned."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return _run_apart(composed, folder)
        config = config_of(composed)
        from promcse_pl.job import run_job

        run_job(config, folder)
    except PromcseError as error:
        _remove_empty(folder)
        _stop(error)
    return None


def _run_apart(composed: DictConfig, folder: Path) -> float:
    """Run a job for a launcher or sweeper of Hydra's; our own sweeper has left its start.yaml."""
    from promcse_pl.sweep.local import run_alone
    from promcse_pl.sweep.plan import START, SweepJob, add_job

    overrides = list(HydraConfig.get().overrides.task)
    if not (folder / START).is_file():
        add_job(folder.parent, SweepJob(folder.name, overrides), config_of(composed))
    return run_alone(folder.parent, SweepJob(folder.name, overrides))


def _remove_empty(folder: Path) -> None:
    """Remove the folder that Hydra made for a run that never began, and its parents below here that held nothing else."""
    here = Path.cwd()
    while folder.is_dir() and folder != here and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
        if here not in folder.parents:
            return


def _resume(arguments: list[str]) -> int:
    """Go on with a run; nothing is composed: its folder has all settings."""
    if len(arguments) > 1:
        raise ConfigError(
            f"resume= goes on with a run as it was begun and takes no settings. Try: python run.py {arguments[0]}"
        )
    return cli(["train", "--resume", arguments[0].partition("=")[2]])


def _choices() -> dict[str, list[str]]:
    """Return the groups of conf/ and what each offers; recipe/ is chosen by mode and model."""
    groups = sorted(path for path in CONF.iterdir() if path.is_dir())
    return {group.name: sorted(path.stem for path in group.glob("[!_]*.yaml")) for group in groups}


def _stop(error: PromcseError) -> None:
    write_error(error)
    sys.exit(2)


if __name__ == "__main__":
    try:
        resumed = sorted(sys.argv[1:], key=lambda argument: not argument.startswith("resume="))
        if resumed and resumed[0].startswith("resume="):
            sys.exit(_resume(resumed))
        sys.argv[1:] = [without_home(argument) for argument in sys.argv[1:]]
        if any(argument.startswith("sweep.resume=") for argument in sys.argv[1:]):
            sys.argv[1:] = resumed_arguments(sys.argv[1:])
        check_overrides(sys.argv[1:], _choices())
        main()
    except PromcseError as error:
        _stop(error)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
