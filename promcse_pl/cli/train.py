"""`promcse train`: start, resume or sweep runs. `python run.py` is the same command."""

from __future__ import annotations

import argparse
from typing import Any

from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.paths import expand, run_command
from promcse_pl.version import __version__


def add_parser(commands: Any) -> None:  # noqa: ANN401  (argparse's type is private)
    """Add the command's parser. It declares the options of Hydra too and collects them in `flags`, in the form Hydra takes."""
    parser = commands.add_parser(
        "train",
        help="start, resume or sweep runs (the same as python run.py)",
        prog=run_command(),
        usage=f"{run_command()} [OPTIONS] [GROUP=CHOICE] [KEY=VALUE] ...",
        add_help=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings, for example RUN/config.yaml")
    parser.add_argument(
        "--out", metavar="FOLDER", type=expand, help="folder of the new run or sweep (default: outputs/...)"
    )
    parser.add_argument("--resume", metavar="RUN", help="resume the run in this folder; the same as resume=RUN")
    # start.yaml of a job of a sweep; its path may contain =
    parser.add_argument("--start", metavar="FILE", type=expand, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"promcse {__version__}")

    def flag(group: Any, long: str, *short: str, text: str = argparse.SUPPRESS, **value: Any) -> None:  # noqa: ANN401
        kind = (
            {"action": "append", "type": f"{long}={{}}".format, **value}
            if value
            else {"action": "append_const", "const": long}
        )
        group.add_argument(*short, long, dest="flags", help=text, **kind)

    flag(parser, "--help", "-h", text="show this help, the config groups and the default settings")
    mode = parser.add_mutually_exclusive_group()
    flag(mode, "--multirun", "-m", text="run a sweep: one job for each combination of comma-separated values")
    flag(mode, "--cfg", "-c", text="print the config instead of training: job, hydra or all", metavar="PART")
    flag(mode, "--info", "-i", text="print what Hydra composes the config from", metavar="WHAT", nargs="?", const="all")
    flag(mode, "--run", "-r")
    flag(mode, "--shell-completion", "-sc", text="install=SHELL or uninstall=SHELL: print the completion script")
    flag(parser, "--config-dir", "-cd", text="folder with groups and choices of your own", metavar="FOLDER")
    flag(parser, "--hydra-help", text="show Hydra's help")
    flag(parser, "--resolve")
    flag(parser, "--package", "-p", metavar="PACKAGE")
    flag(parser, "--config-name", "-cn", metavar="NAME")
    flag(parser, "--config-path", "-cp", metavar="FOLDER")
    parser.set_defaults(run=run, parser=parser, flags=[], overrides=[])


def run(options: argparse.Namespace) -> None:
    """Resume a run, run a saved config, or compose a config with Hydra and run that."""
    overrides: list[str] = options.overrides
    resumed = [override for override in overrides if override.startswith("resume=")]
    if options.resume is not None or resumed:
        folder = options.resume if options.resume is not None else resumed[0].partition("=")[2]
        _resume(folder, [override for override in overrides if override not in resumed], options)
        return
    files = [override for override in overrides if "=" not in override and not override.startswith("~")]
    if files and options.out and len(overrides) == 1 and not options.flags and not options.config:
        options.start = expand(files[0])
    if options.start and options.out:
        from promcse_pl.run_folder import read_config
        from promcse_pl.runs.lifecycle import run_job

        run_job(read_config(options.start), options.out)
        return
    if files and files[0].endswith((".yaml", ".yml")):
        raise ConfigError(f"{files[0]} is not KEY=VALUE. Try: {run_command('--config', files[0])}")
    from promcse_pl.config import path_advice

    if files and (advice := path_advice("data", files[0])):
        raise ConfigError(f"{files[0]} is not KEY=VALUE. {advice}")
    from promcse_pl.cli.run import compose_and_run

    if "--help" in options.flags:
        options.parser.print_help()
    compose_and_run(options.flags, overrides, config_file=options.config, out=options.out)


def _resume(folder: str, overrides: list[str], options: argparse.Namespace) -> None:
    """Resume a run with the settings in its folder and overrides of execution settings; no config is composed."""
    from promcse_pl.runs.lifecycle import resume_job

    if not folder:
        raise ConfigError(f"resume= names no folder. Try: {run_command('resume=outputs/DATE/TIME-NAME')}")
    refused = [*options.flags, *(override for override in overrides if "=" not in override)]
    refused += [name for name in ("config", "out") if getattr(options, name) is not None]
    if refused:
        raise ConfigError(
            f"resume= takes only KEY=VALUE settings, got {refused[0]}. Try: {run_command(f'resume={folder}')}"
        )
    resume_job(expand(folder), overrides=overrides)
