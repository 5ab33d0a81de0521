"""What a person sees: the config as a tree, scores as a table, progress on a terminal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.tree import Tree


class ConsoleHandler(logging.Handler):
    """Prints log lines unbroken, however long: a command or path in them can be copied."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line; from a warning on with its level before it."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self.console.print(f"{level}{self.format(record)}", soft_wrap=True, markup=False)


def config_tree(config: Mapping[str, Any]) -> Tree:
    """Return nested settings as a tree, one line a setting."""
    tree = Tree("config")
    for name, value in config.items():
        if isinstance(value, Mapping):
            branch = tree.add(name)
            for key, entry in value.items():
                branch.add(f"{key}: {_shown(entry)}", highlight=True)
        else:
            tree.add(f"{name}: {_shown(value)}", highlight=True)
    return tree


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


def score_table(title: str, scores: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a table of scores: a row a model, a column a task; a gain over the first row stands beneath.

    Args:
        title: What is measured, in which unit.
        scores: Model -> task -> score.
    """
    # seven STS tasks, their mean and dev must fit 80 columns
    table = Table(
        title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title, min_width=len(title)
    )
    table.add_column("", no_wrap=True)
    rows = list(scores.items())
    for task in rows[0][1]:
        table.add_column(task, justify="right", no_wrap=True)
    for name, row in rows:
        table.add_row(name, *(f"{value:.2f}" for value in row.values()))
    if len(rows) == 2:
        table.add_section()
        gains = (rows[1][1][task] - rows[0][1][task] for task in rows[0][1])
        table.add_row("gain", *(f"{gain:+.2f}" for gain in gains))
    return table


@contextmanager
def progress_bar(console: Console, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal and nothing elsewhere; gives the function that takes the number done so far."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, completed=done)
