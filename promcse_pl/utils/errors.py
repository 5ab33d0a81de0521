"""The errors a user can cause. Each message says what was given, what is allowed and what to type."""

from __future__ import annotations

import sys

from promcse_pl.utils.paths import hide_home
from promcse_pl.utils.streams import visible


class PromcseError(Exception):
    """Base of every error that this package raises on purpose; the command line prints it without a traceback."""


class ConfigError(PromcseError, ValueError):
    """A setting has a wrong key, type, range or combination."""


class DataError(PromcseError, ValueError):
    """A data file, row or sentence cannot be used."""


class TextTypeError(DataError, TypeError):
    """An argument is not a string or an iterable of strings."""


class EncoderError(PromcseError, ValueError):
    """A pre-trained encoder cannot be found, read, or does not take deep prompts."""


class AdapterError(PromcseError, ValueError):
    """An adapter folder cannot be read, or does not fit its encoder."""


class NonFiniteError(PromcseError, FloatingPointError):
    """A loss, gradient or vector is NaN or infinite."""


class RankError(PromcseError, RuntimeError):
    """A process of a distributed run died, or lost another one."""


class LostRankError(RankError):
    """A rank lost its connection to another one: the error of the other one is the cause."""


class OutOfMemoryError(PromcseError, MemoryError):
    """The memory of the machine or its GPU does not hold what the settings ask for."""


def of_the_system(error: OSError) -> PromcseError:
    """Return an error of a file or stream that nothing nearer has put into words."""
    where = "the output" if error.filename is None else str(error.filename)
    return DataError(f"cannot read or write {where[:200]}{'…' if len(where) > 200 else ''}: {error.strerror or error}")


def write_error(error: PromcseError) -> None:
    """Print an error to stderr in one line: home folder as ~, control characters escaped, at most 3,000 characters."""
    message = visible(hide_home(str(error)))
    sys.stderr.write(f"error: {message if len(message) < 3000 else message[:3000] + '…'}\n")
