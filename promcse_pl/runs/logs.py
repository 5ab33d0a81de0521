"""Where the package's log lines go while a run is at work."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.paths import hide_home
from promcse_pl.utils.signals import Stopped
from promcse_pl.utils.streams import visible
from promcse_pl.utils.terminal import ConsoleHandler

log = logging.getLogger("promcse_pl")


@contextmanager
def logging_to(path: Path | None, console: Console) -> Iterator[None]:
    """Send the package's log lines to the terminal and, with times, to a file."""
    try:
        to_file = _LogFile(path or os.devnull, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    to_terminal = ConsoleHandler(console)
    handlers = (to_file, to_terminal)
    level = log.level
    log.setLevel(logging.INFO)
    propagate, log.propagate = log.propagate, False
    for handler in handlers:
        handler.addFilter(_make_printable)
        log.addHandler(handler)
    try:
        yield
    except Stopped:  # whoever ends the run says how to go on
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
    """Format the message, with ~ for the home folder and control characters escaped."""
    record.msg, record.args = visible(hide_home(record.getMessage())), None
    return True


class _LogFile(logging.FileHandler):
    """A log file that a full disk silences: the line is on the terminal too, and what fails for good raises elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (the hook's name is logging's)
        """Drop the line."""
