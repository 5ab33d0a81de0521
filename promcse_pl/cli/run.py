"""Hydra's door: compose, validate, hand ONE resolved config to ONE job. See `python run.py --help`."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from promcse_pl.cli.main import main as cli
from promcse_pl.config import check_overrides
from promcse_pl.runs.compose import CONF, config_groups, config_of
from promcse_pl.sweeps.plan import resumed_arguments, without_home
from promcse_pl.utils.errors import ConfigError, PromcseError, of_the_system, write_error
from promcse_pl.utils.signals import Stopped
from promcse_pl.utils.streams import drop_output, open_streams


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def compose_and_run(composed: DictConfig) -> float | None:
    """Run one job; a job of a sweep gets a process of its own, and its development score is returned."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return _run_apart(composed, folder)
        _check_single()
        config = config_of(composed)
        from promcse_pl.runs.lifecycle import run_job

        run_job(config, folder)
    except PromcseError as error:
        _remove_empty(folder)
        _stop(error)
    return None


def _run_apart(composed: DictConfig, folder: Path) -> float:
    """Run a job for a launcher or sweeper of Hydra's; our own sweeper has left its start.yaml."""
    from promcse_pl.run_folder import START
    from promcse_pl.sweeps.execute import run_single
    from promcse_pl.sweeps.plan import SweepJob, add_job

    overrides = list(HydraConfig.get().overrides.task)
    if not (folder / START).is_file():
        add_job(folder.parent, SweepJob(folder.name, overrides), config_of(composed))
    return run_single(folder.parent, SweepJob(folder.name, overrides))


def _check_single() -> None:
    """Refuse what is of sweeps where one job was asked for: it would have no effect."""
    given: Any = OmegaConf.to_container(HydraConfig.get().overrides, resolve=False)
    of_sweeps = ("sweep", "hydra.sweep", "hydra/sweep")
    idle = [one for one in (*given["hydra"], *given["task"]) if one.lstrip("+").startswith(of_sweeps)]
    if idle:
        raise ConfigError(f"{idle[0]} has no effect on a single run. Try: python run.py -m {shlex.join(sys.argv[1:])}")


def _remove_empty(folder: Path) -> None:
    """Remove the folder that Hydra made for a run that never began, and its parents below here that held nothing else."""
    here = Path.cwd()
    while folder.is_dir() and folder != here and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
        if here not in folder.parents:
            return


def _resume(arguments: list[str]) -> int:
    """Resume a run with the settings in its folder and overrides of execution settings; no config is composed."""
    if arguments[0] == "resume=":
        raise ConfigError("resume= names no folder. Try: python run.py resume=outputs/DATE/TIME-NAME")
    folder, *overrides = arguments
    if flags := [argument for argument in overrides if argument.startswith("-") or "=" not in argument]:
        raise ConfigError(
            f"resume= takes only KEY=VALUE settings, got {flags[0]}. Try: python run.py {shlex.quote(folder)}"
        )
    return cli(["train", "--resume", folder.partition("=")[2], *overrides])


def _refused(error: Exception) -> ConfigError:
    """Return what Hydra did not accept on the command line as an error of ours, in one line that says what to type."""
    text = str(error)
    several = re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'", text)
    if several:
        return ConfigError(
            f"{several[1]} has several values. Try: python run.py -m {shlex.join(sys.argv[1:])} (a job for each), or "
            "'KEY=[VALUE,VALUE]' for a list"
        )
    if strange := re.match(r"LexerNoViableAltException: (.*?)=", text):
        return ConfigError(
            f"the value of {strange[1]} holds a character that Hydra takes in quotes alone. Try: \"{strange[1]}='VALUE'\""
        )
    noise = ("See https:", "full_key:", "object_type=", "Config search path:", "provider=")
    lines = [line.strip() for line in text.splitlines()]
    told = " ".join(line for line in lines if line and not line.startswith(noise)).rstrip(".")
    return ConfigError(f"{told}. Try: python run.py --help")


def _stop(error: PromcseError) -> None:
    write_error(error)
    sys.exit(2)


def _run_hydra() -> None:
    """Call `main` through Hydra, whose refusals become errors of ours; a user's HYDRA_FULL_ERROR=1 shows where they come from."""
    if os.environ.get("HYDRA_FULL_ERROR"):
        compose_and_run()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # it raises, where it would print and end with 1
    try:
        compose_and_run()
    except (HydraException, OmegaConfBaseException) as error:
        raise _refused(error) from error
    except (ValueError, OSError) as error:  # of options that exclude one another, or a folder that cannot be made
        if _is_ours(error):
            raise
        raise of_the_system(error) if isinstance(error, OSError) else _refused(error) from error


def _is_ours(error: Exception) -> bool:
    """Return whether an error comes from what Hydra called, and not from Hydra."""
    trace, names = error.__traceback__, list[str]()
    while trace:
        names.append(f"{trace.tb_frame.f_globals['__name__']}.{trace.tb_frame.f_code.co_name}")
        trace = trace.tb_next
    return any(
        name.startswith(("promcse_pl.", "hydra_plugins.promcse")) and name != f"{__name__}.{_run_hydra.__name__}"
        for name in names
    )


def main() -> None:
    """Run the command line of this process: `python run.py` and `promcse train`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    open_streams()
    try:
        resumed = sorted(sys.argv[1:], key=lambda argument: not argument.startswith("resume="))
        if resumed and resumed[0].startswith("resume="):
            sys.exit(_resume(resumed))
        sys.argv[1:] = [without_home(argument) for argument in sys.argv[1:]]
        if any(argument.startswith("sweep.resume=") for argument in sys.argv[1:]):
            sys.argv[1:] = resumed_arguments(sys.argv[1:])
        check_overrides(sys.argv[1:], config_groups())
        _run_hydra()
    except PromcseError as error:
        _stop(error)
    except BrokenPipeError:  # the reader of our output has gone
        drop_output()
    except OSError as error:
        if error.filename is None:
            drop_output()
        _stop(of_the_system(error))
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
