"""Atomic writes: after any failure a file or folder is the old one or the new one, never a mixture and never lost.

One policy for the whole package: content is synced before it gets its final name, and the folder that holds the name is synced
afterwards. Temporary names are unique and have one form, so that leftovers of a killed process can be told from everything else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from promcse_pl.errors import DataError, PromcseError

T = TypeVar("T")

COMMIT = ".promcse_pl-commit"
"""Folder with the files of a committed save that have not been moved to their final names yet (`update_folder`)."""
_ATTEMPTS = 5
_LEFTOVER = re.compile(r"\.promcse_pl-[0-9a-f]{16}(\.\w+)?")


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _temporary(folder: Path, suffix: str = "") -> Path:
    return folder / f".promcse_pl-{secrets.token_hex(8)}{suffix}"


def remove_leftovers(folder: Path, *, older_than: float = 0.0) -> None:
    """Remove what killed processes left in a folder under the temporary names of this module, and nothing else.

    Args:
        folder: Where to look; subfolders are not searched.
        older_than: Seconds since the last change of a leftover; younger ones may belong to a living process.
    """
    with suppress(OSError):
        for path in folder.iterdir():
            if _LEFTOVER.fullmatch(path.name) and time.time() - _last_change(path) >= older_than:
                _remove(path)


def _last_change(path: Path) -> float:
    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
    times = [0.0]
    for entry in (path, *inside):
        with suppress(OSError):  # removed meanwhile
            times.append(entry.lstat().st_mtime)
    return max(times)


def _remove(path: Path) -> None:
    """Remove a file, link or folder of ours."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@contextmanager
def atomic_file(path: Path, *, error: type[PromcseError] = DataError) -> Iterator[Path]:
    """Give a temporary path, with the same suffix, that becomes `path` when the block ends without an error.

    Args:
        path: The file to write; its folder is made if absent, an existing file is replaced.
        error: Class of the error when it cannot be written.
    """
    temporary = _temporary(path.parent, path.suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as reason:
        raise error(f"cannot write {path}: {reason.strerror or reason}") from reason
    finally:
        _remove(temporary)


def write_bytes(path: Path, content: bytes, *, error: type[PromcseError] = DataError) -> None:
    """Write a file atomically; see `atomic_file`."""
    with atomic_file(path, error=error) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, *, error: type[PromcseError] = DataError) -> None:
    """Write a UTF-8 file atomically; see `atomic_file`."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"), error=error)


@contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """Give an empty folder in `parent` for `publish`; it is removed at the end unless it was published."""
    parent.mkdir(parents=True, exist_ok=True)
    staged = _temporary(parent)
    staged.mkdir()
    try:
        yield staged
    finally:
        _remove(staged)


def publish(staged: Path, folder: Path, *, replace: bool = False) -> None:
    """Sync a staged folder and rename it to its final name.

    Args:
        staged: From `staging_folder`, in the parent of `folder`.
        folder: Absent or empty.
        replace: Remove an existing folder first. Only for folders that belong to this package as a whole and can be rebuilt.

    Raises:
        OSError: It cannot be written, or `folder` is not empty.
    """
    _sync_tree(staged)
    if replace and folder.exists():
        old = _temporary(folder.parent)
        folder.rename(old)
        _remove(old)
    staged.rename(folder)
    sync(folder.parent)


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        sync(path)


@contextmanager
def new_folder(folder: Path, *, error: type[PromcseError] = DataError) -> Iterator[Path]:
    """Give a staging folder that becomes `folder` when the block ends without an error.

    Args:
        folder: Must be absent or empty.
        error: Class of the error when it is not, or cannot be written.
    """
    refuse_taken(folder, error=error)
    with _write_errors(folder, error), staging_folder(folder.parent) as staged:
        yield staged
        publish(staged, folder)


@contextmanager
def update_folder(folder: Path, own: Sequence[str], *, error: type[PromcseError] = DataError) -> Iterator[Path]:
    """Give a staging folder whose entries replace those of the same names in `folder`, all of them or none.

    Everything else in the folder stays. The staged entries are committed by one rename, to the folder `COMMIT`, and then moved to
    their final names one by one. A process that is killed in between has lost nothing: `current` finds the committed entries,
    and the next update moves them first.

    Args:
        folder: Where to; made if absent.
        own: Names of the entries that belong to the caller. Those of them that are not staged are removed at the end.
        error: Class of the error when it cannot be written.
    """
    if not folder.is_dir():  # an empty folder is kept: it may be a mount point, a link or the current folder
        with new_folder(folder, error=error) as staged:
            yield staged
        return
    with _write_errors(folder, error), _exclusive(folder):
        _move_committed(folder, own)
        remove_leftovers(folder)
        with staging_folder(folder) as staged:
            yield staged
            names = [path.name for path in staged.iterdir()]
            _sync_tree(staged)
            staged.rename(folder / COMMIT)
        sync(folder)
        _move_committed(folder, names)
        for name in set(own) - set(names):
            _remove(folder / name)


def _move_committed(folder: Path, names: Iterable[str]) -> None:
    """Move committed entries to their final names; others in the commit did not come from the caller and are dropped."""
    commit = folder / COMMIT
    if not commit.is_dir() or commit.is_symlink():
        return
    for name in sorted(names):
        path, final = commit / name, folder / name
        if not os.path.lexists(path):
            continue
        if path.is_dir() and final.exists():
            # a folder cannot be replaced in one step; `current` finds the new one meanwhile
            old = _temporary(folder)
            final.rename(old)
            path.rename(final)
            _remove(old)
        else:
            path.replace(final)
    sync(folder)
    _remove(commit)
    sync(folder)


def current(folder: Path, name: str) -> Path:
    """Return where an entry of a folder that `update_folder` writes is now: in the folder, or still in its `COMMIT`."""
    committed = folder / COMMIT / name
    return committed if os.path.lexists(committed) else folder / name


def read_unchanged(folder: Path, name: str, read: Callable[[], T]) -> T:
    """Return what `read` returns; call it again if a save replaced the entry `name` of the folder while it read.

    Args:
        folder: That `update_folder` writes.
        name: An entry that every save writes.
        read: Reads from the folder through `current`.
    """

    def version() -> tuple[int, int] | None:
        with suppress(OSError):
            found = current(folder, name).stat()
            return found.st_ino, found.st_mtime_ns
        return None

    for attempt in range(_ATTEMPTS):
        before, is_moving = version(), (folder / COMMIT).exists()
        try:
            result = read()
        except (PromcseError, OSError):
            if attempt == _ATTEMPTS - 1 or (version() == before and not is_moving):
                raise
        else:
            if version() == before:
                return result
    raise DataError(f"{folder} is being written again and again. Try: wait until that is done")


def refuse_taken(folder: Path, *, error: type[PromcseError] = DataError) -> None:
    """Raise `error` unless a folder is absent, or empty but for leftovers of a killed process."""
    with _write_errors(folder, error):
        is_free = folder.is_dir() and all(_LEFTOVER.fullmatch(path.name) for path in folder.iterdir())
        if os.path.lexists(folder) and not is_free:
            raise error(f"{folder} exists already and is not replaced. Give another name, or delete it first")


@contextmanager
def _write_errors(folder: Path, error: type[PromcseError]) -> Iterator[None]:
    try:
        yield
    except OSError as reason:
        raise error(f"cannot write to {folder}: {reason.strerror or reason}") from reason


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Let one process at a time update a folder; file systems without locks do without."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
