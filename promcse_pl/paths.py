"""Names of files and folders as people type them, and as they may be written down."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import TypeGuard, TypeVar

Tree = TypeVar("Tree")
LONGEST_NAME = 255
"""Bytes of a file's name: no file system takes longer ones."""


def expand(name: str | Path) -> Path:
    """Return a path with the home folder in the place of ~; nothing is raised for a person whom the machine does not know."""
    return Path(os.path.expanduser(name))  # noqa: PTH111  (Path.expanduser raises there)


def is_there(path: Path) -> bool:
    """Tell whether a file or folder is there; a name that no file can have is not."""
    return os.path.exists(path)  # noqa: PTH110  (Path.exists raises for a name that is too long)


def is_folder(path: Path) -> bool:
    """Tell whether a folder is there; a name that no folder can have is not."""
    return os.path.isdir(path)  # noqa: PTH112  (the same)


def run_command(*arguments: str) -> str:
    """Return `python run.py ARGUMENTS` as it is typed into a shell, whatever the names of folders hold."""
    typed = ["python", "run.py"]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        typed.append(f"{key}={shlex.quote(value)}" if equals else shlex.quote(argument))
    return " ".join(typed)


def is_plain_name(value: object) -> TypeGuard[str]:
    """Return whether a value is the name of one file or folder, and no path.

    Everything that is read from a file and becomes part of a path must pass: such a file may come from anybody, and `../x` or
    `/x` would lead out of the folder that it describes.
    """
    return (
        isinstance(value, str)
        and value not in ("", ".", "..")
        and not any(character in "/\\" or ord(character) < 32 for character in value)
        and len(value.encode(errors="surrogatepass")) <= LONGEST_NAME
    )


def hide_home(value: Tree) -> Tree:
    """Return text, or the texts of a tree of plain values, with ~ for the home folder: its name is often a person's.

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
