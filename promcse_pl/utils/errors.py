"""Errors that a user can correct. Each message says what was given, what is allowed and what to type."""

from __future__ import annotations

import re
import sys

from promcse_pl.utils.paths import hide_home
from promcse_pl.utils.streams import visible


class PromcseError(Exception):
    """Base class of the errors that this package raises; the command line prints them without a traceback."""


class ConfigError(PromcseError, ValueError):
    """A setting has an invalid key, type, value or combination."""


class DataError(PromcseError, ValueError):
    """A data file, row or sentence cannot be used."""


class TextTypeError(DataError, TypeError):
    """An argument is not a string or an iterable of strings."""


class EncoderError(PromcseError, ValueError):
    """A pre-trained encoder cannot be found or read, or does not support deep prompts."""


class AdapterError(PromcseError, ValueError):
    """An adapter folder cannot be read, or does not match its encoder."""


class NonFiniteError(PromcseError, FloatingPointError):
    """A loss, gradient or embedding is NaN or infinite."""


class RankError(PromcseError, RuntimeError):
    """A rank of a distributed run has died or lost the connection to another rank."""


class LostRankError(RankError):
    """A rank lost the connection to another rank; the error of that other rank is the cause."""


class OutOfMemoryError(PromcseError, MemoryError):
    """The memory of the machine or its GPU is too small for the settings."""


def of_the_system(error: OSError) -> PromcseError:
    """Convert an OSError of a file or stream, for callers without a more specific message."""
    where = "the output" if error.filename is None else str(error.filename)
    return DataError(f"cannot read or write {where[:200]}{'…' if len(where) > 200 else ''}: {error.strerror or error}")


def write_error(error: PromcseError) -> None:
    """Print an error to stderr in one line: home folder as ~, control characters escaped, at most 3,000 characters."""
    message = re.sub(r"(?<!\S)'~/", "~/'", visible(hide_home(str(error))))  # a shell does not expand a quoted ~
    sys.stderr.write(f"error: {message if len(message) < 3000 else message[:3000] + '…'}\n")
