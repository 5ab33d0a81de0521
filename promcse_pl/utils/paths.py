"""Paths: expand ~, check names and files, and hide the home folder."""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
from pathlib import Path
from typing import TypeGuard, TypeVar

Tree = TypeVar("Tree")
ENTRY_POINT = "PROMCSE_ENTRY_POINT"
"""Environment variable with the start of the commands in messages: `promcse train`."""
LONGEST_NAME = 255
"""Maximum length of a file name in bytes on common file systems."""


def expand(name: str | Path) -> Path:
    """Return a path with the home folder instead of ~; an unknown user name is not an error."""
    return Path(os.path.expanduser(name))  # noqa: PTH111  (Path.expanduser raises there)


def is_there(path: Path) -> bool:
    """Return whether a file or folder exists; False for an invalid name."""
    return os.path.exists(path)  # noqa: PTH110  (Path.exists raises for a name that is too long)


def is_folder(path: Path) -> bool:
    """Return whether a folder exists; False for an invalid name."""
    return os.path.isdir(path)  # noqa: PTH112  (the same)


def looks_like_path(name: str) -> bool:
    """Return whether a name has the form of a path; otherwise it can be a hub id, NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def run_command(*arguments: str) -> str:
    """Return the command that trains with these arguments, quoted for a shell.

    It is `promcse train ...` if this process or its parent was started with it, or if the package is installed without a
    clone; otherwise `python run.py ...`.
    """
    in_clone = (Path(__file__).parents[2] / "run.py").is_file()
    typed = [os.environ.get(ENTRY_POINT) or ("python run.py" if in_clone else "promcse train")]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        typed.append(f"{key}={shlex.quote(value)}" if equals else shlex.quote(argument))
    return " ".join(typed)


def is_plain_name(value: object) -> TypeGuard[str]:
    """Return whether a value is the name of a file or folder without a path.

    Names that are read from a file and become part of a path must pass this check: the file may be untrusted, and `../x` or `/x`
    would point outside its folder.
    """
    return (
        isinstance(value, str)
        and value not in ("", ".", "..")
        and not any(character in "/\\" or ord(character) < 32 for character in value)
        and len(value.encode(errors="surrogatepass")) <= LONGEST_NAME
    )


class NotARegularFileError(OSError):
    """A path is a FIFO, socket or device instead of a regular file."""


def require_regular_file(path: Path, *, at_most: int | None = None) -> Path:
    """Return the path if it is a regular file: reading a FIFO could block, reading a device might never end.

    Args:
        path: The file; symbolic links are followed.
        at_most: Maximum size in bytes; None: no limit.

    Raises:
        OSError: The file does not exist, is a folder, FIFO, socket or device, or is larger.
    """
    found = os.stat(path)  # noqa: PTH116  (Path.stat, for a name of any length)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        kind = "FIFO" if stat.S_ISFIFO(found.st_mode) else "socket" if stat.S_ISSOCK(found.st_mode) else "device"
        raise NotARegularFileError(errno.EINVAL, f"it is a {kind}, not a regular file", str(path))
    if at_most is not None and found.st_size > at_most:
        raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, the maximum is {at_most:,}", str(path))
    return path


def hide_home(value: Tree) -> Tree:
    """Return text, or the texts of a tree of plain values, with ~ for the home folder, whose path often contains a person's name.

    `expand` undoes it for a path.
    """
    home = os.path.expanduser("~").rstrip("/")  # noqa: PTH111
    if not home.startswith("/"):
        return value
    pattern = re.compile(rf"(?<![\w.~-]){re.escape(home)}(?![\w.-])")

    def hidden(part: object) -> object:
        if isinstance(part, str):
            return pattern.sub("~", part)
        if isinstance(part, dict):
            return {hidden(key): hidden(entry) for key, entry in part.items()}
        if isinstance(part, list | tuple):
            return type(part)(hidden(entry) for entry in part)
        return part

    return hidden(value)  # type: ignore[return-value]


SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".parquet")


def file_suffix(path: Path) -> str:
    """Return the suffix that determines the format: .csv for data.CSV.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix
