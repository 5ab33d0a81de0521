"""Hydra's door: compose, validate, hand ONE resolved config to ONE job. See `python run.py --help`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from promcse_pl.cli import main as cli
from promcse_pl.config import Config, check_overrides
from promcse_pl.errors import ConfigError, PromcseError
from promcse_pl.paths import hide_home
from promcse_pl.training.ranks import refuse_sweep
from promcse_pl.training.stop import Stopped

CONF = Path(__file__).parent / "conf"


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    """Run one job; a job of a sweep gets a process of its own."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"{missing[0]} is not set. Try: python run.py {' '.join(sys.argv[1:])} {missing[0]}=FILE")
        raw: Any = OmegaConf.to_container(composed, resolve=True)
        config = Config.from_dict(raw)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            refuse_sweep()
            _run_apart(config, folder)
        else:
            from promcse_pl.job import run_job

            run_job(config, folder)
    except PromcseError as error:
        _remove_empty(folder)
        _stop(error)


def _run_apart(config: Config, folder: Path) -> None:
    """Run a job of a sweep in a fresh process: W&B, CUDA and random state of one job do not reach the next."""
    from promcse_pl.job import write_config

    hydra_job = HydraConfig.get().job
    tracking = replace(
        config.tracking,
        group=config.tracking.group or folder.parent.name,
        name=config.tracking.name or hydra_job.override_dirname or folder.name,
    )
    start = write_config(replace(config, tracking=tracking), folder / "start.yaml")
    command = [sys.executable, "-m", "promcse_pl.cli", "train", str(start), "--out", str(folder)]
    if subprocess.run(command, check=False).returncode:
        raise PromcseError(f"the job in {folder} failed; what it printed says why")


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
    sys.stderr.write(f"error: {hide_home(str(error))[:3000]}\n")
    sys.exit(2)


if __name__ == "__main__":
    try:
        resumed = sorted(sys.argv[1:], key=lambda argument: not argument.startswith("resume="))
        if resumed and resumed[0].startswith("resume="):
            sys.exit(_resume(resumed))
        check_overrides(sys.argv[1:], _choices())
        main()
    except ConfigError as error:
        _stop(error)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
