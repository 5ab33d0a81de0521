"""Terminal output: consoles, log handlers, the config as a tree, progress bars."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.tree import Tree

from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.paths import hide_home
from promcse_pl.utils.signals import Stopped
from promcse_pl.utils.streams import drop_output, visible

log = logging.getLogger("promcse_pl")

NO_TERMINAL_WIDTH = 120
"""Width of tables in a pipe or file; rich would assume 80 columns and truncate numbers."""


class OutputConsole(Console):
    """Console of standard output that discards its output if the reading process has ended."""

    def on_broken_pipe(self) -> None:
        """Discard further output; rich would end the process."""
        self.quiet = True
        drop_output()


def output_console() -> Console:
    """Return the console of standard output."""
    return OutputConsole(width=None if sys.stdout.isatty() else NO_TERMINAL_WIDTH)


def plain(text: str) -> str:
    """Return text that rich prints literally: markup such as `[bold]` and control characters are escaped."""
    return escape(visible(text))


def print_line(text: str) -> None:
    """Print a line of text on standard output: unbroken, without markup, and at once."""
    output_console().out(visible(text), highlight=False)


class ConsoleHandler(logging.Handler):
    """Prints log lines without line breaks, so that commands and paths can be copied."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line, with its level if it is a warning or an error."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self.console.print(f"{level}{self.format(record)}", soft_wrap=True, markup=False)


@contextmanager
def logging_to(path: Path | None, console: Console) -> Iterator[None]:
    """Send the package's log lines to a console and, with times, to a file; an exception of the block is added to the file.

    Args:
        path: Log file, which is appended to; None for no file.
        console: The console.

    Raises:
        ConfigError: The file cannot be written.
    """
    try:
        to_file = _LogFile(path or os.devnull, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers = (to_file, ConsoleHandler(console))
    level = log.level
    log.setLevel(logging.INFO)
    propagate, log.propagate = log.propagate, False
    for handler in handlers:
        handler.addFilter(_make_printable)
        log.addHandler(handler)
    try:
        yield
    except Stopped:  # not an error; the caller logs how to resume
        raise
    except BaseException as error:
        to_file.handle(log.makeRecord(log.name, logging.ERROR, "", 0, "%s: %s", (type(error).__name__, error), None))
        raise
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
        log.setLevel(level)
        log.propagate = propagate


def _make_printable(record: logging.LogRecord) -> bool:
    """Format the message with ~ for the home folder, and escape control characters."""
    record.msg, record.args = visible(hide_home(record.getMessage())), None
    return True


class _LogFile(logging.FileHandler):
    """Log file that drops lines it cannot write: they are on the console too, and a full disk raises an error elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (the hook's name is logging's)
        """Ignore the error."""


def config_tree(config: Mapping[str, Any]) -> Tree:
    """Return nested settings as a tree, one line per setting."""
    tree = Tree("config")
    for name, value in config.items():
        if isinstance(value, Mapping):
            branch = tree.add(plain(name))
            for key, entry in value.items():
                branch.add(plain(f"{key}: {_shown(entry)}"), highlight=True)
        else:
            tree.add(plain(f"{name}: {_shown(value)}"), highlight=True)
    return tree


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


@contextmanager
def stages(console: Console) -> Iterator[Callable[[str, int, int | None], None]]:
    """Show one progress bar for work in one or several parts; it appears at the first report, and only on a terminal.

    Yields:
        A function that takes the name of the current part, its steps done and its total steps (None if unknown).
    """
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bars: list[TaskID] = []

        def report(part: str, done: int, total: int | None) -> None:
            bars[:] = bars or [progress.add_task(plain(part), total=total)]
            progress.update(bars[0], description=plain(part), completed=done, total=total)

        yield report


@contextmanager
def progress_bar(console: Console, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar for work in one part; yield a function that takes the number of steps done."""
    with stages(console) as report:
        yield lambda done: report(label, done, total)
