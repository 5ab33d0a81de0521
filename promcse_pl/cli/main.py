"""The `promcse` command. Modules of commands import torch, Hydra and the rest in `run`, so that --help is instant."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from promcse_pl.cli import (
    dashboard,
    encode,
    evaluate,
    export,
    import_,
    index,
    models,
    push,
    report,
    search,
    similarity,
    train,
)
from promcse_pl.utils.errors import ConfigError, write_error
from promcse_pl.utils.exit_codes import exit_code
from promcse_pl.utils.paths import ENTRY_POINT
from promcse_pl.utils.streams import open_streams
from promcse_pl.version import __version__

COMMANDS = (train, encode, index, search, similarity, evaluate, report, dashboard, import_, export, push, models)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        arguments: Command and its arguments; None: those of this process.
    """
    open_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if Path(sys.argv[0]).stem == "promcse":
        os.environ[ENTRY_POINT] = "promcse train"  # named in messages, also by the processes that a run starts
        given = _completion(given)
    parser, commands = build_parsers()
    options, rest = parser.parse_known_args(given)
    if "overrides" in options:  # KEY=VALUE may stand between options, which argparse cannot declare
        options.overrides = [argument for argument in rest if not argument.startswith("-")]
        rest = [argument for argument in rest if argument.startswith("-")]
    if rest:
        hint = ". Settings are typed KEY=VALUE, such as trainer.epochs=3" if "overrides" in options else ""
        commands[options.command].error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    return exit_code(lambda: options.run(options))


def build_parsers() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of `promcse` and those of its commands by name."""
    parser = Parser(prog="promcse", description="Sentence embeddings from a soft prompt on a frozen encoder.")
    parser.add_argument("--version", action="version", version=f"promcse {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser, dict(commands.choices)


def _completion(arguments: list[str]) -> list[str]:
    """Return the arguments with `train` in front if a shell requests completions: Hydra's script calls the program without it."""
    if arguments[:1] not in (["-sc"], ["--shell-completion"]):
        return arguments
    os.environ["COMP_LINE"] = re.sub(r"^(\S+)\s+train\b", r"\1", os.environ.get("COMP_LINE", ""))
    return ["train", *arguments]


class Parser(argparse.ArgumentParser):
    """Argument parser that reports errors in one line and suggests the closest command or option; no abbreviations."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401  (those of argparse)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)|unrecognized arguments: (\S+)", message)
        typed = (wrong[1] or wrong[3] or "") if wrong else ""
        known = re.findall(r"[\w-]+", wrong[2]) if wrong and wrong[2] else [*self._options()]
        near = difflib.get_close_matches(typed.partition("=")[0], known, n=1) if typed else []
        meant = f" Did you mean {near[0]}?" if near else ""
        if "required" in message:
            self.print_usage(sys.stderr)
        write_error(ConfigError(f"{message}.{meant} Try: {self.prog} --help"))
        sys.exit(2)

    def _options(self) -> Iterator[str]:
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._options()


if __name__ == "__main__":
    sys.exit(main())
