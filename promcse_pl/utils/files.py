"""Atomic writes: after any failure, a file or folder is either the old or the new version.

All writes in this package work the same way: the content is synced before it is renamed to its final name, and the parent folder
is synced afterwards. Temporary names are unique and match one pattern, so that leftovers of a killed process can be identified.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from promcse_pl.utils.errors import DataError, PromcseError
from promcse_pl.utils.paths import is_folder, require_regular_file

T = TypeVar("T")

COMMIT = ".promcse_pl-commit"
"""Folder with committed files that have not been moved to their final names yet (`update_folder`)."""
_ATTEMPTS = 5
_LEFTOVER = re.compile(r"\.promcse_pl-[0-9a-f]{16}(\.\w+)?")


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
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
    """Remove the temporary files and folders of killed processes from a folder.

    Args:
        folder: Folder to clean up; subfolders are not searched.
        older_than: Minimum age in seconds since the last change; newer entries may belong to a running process.
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
    """Remove a file, symbolic link or folder."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path with the same suffix that is renamed to `path` if the block succeeds.

    Args:
        path: The file to write; its folder is created if needed, an existing file is replaced.

    Raises:
        DataError: It cannot be written.
    """
    temporary = _temporary(path.parent, path.suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        _remove(temporary)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; see `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically; see `atomic_file`."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


@contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty folder in `parent` for `publish`; remove it at the end unless it was published."""
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
        staged: Folder from `staging_folder`, in the parent of `folder`.
        folder: Final path; absent or empty.
        replace: Remove an existing folder first. Only for folders that contain nothing else and can be rebuilt.

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
    """Yield a staging folder that is renamed to `folder` if the block succeeds.

    Args:
        folder: Final path; absent or empty.
        error: Class of the error that is raised if the folder is not empty or cannot be written.
    """
    refuse_taken(folder, error=error)
    if folder.is_dir():  # an empty folder is filled in place: it may be a mount point, a link or the current folder
        with update_folder(folder, (), error=error) as staged:
            yield staged
        return
    with _write_errors(folder, error), staging_folder(folder.parent) as staged:
        yield staged
        publish(staged, folder)


@contextmanager
def update_folder(folder: Path, own: Sequence[str], *, error: type[PromcseError] = DataError) -> Iterator[Path]:
    """Yield a staging folder whose entries atomically replace the entries with the same names in `folder`.

    Other entries of the folder are kept. The staged entries are committed by one rename to the folder `COMMIT` and then moved to
    their final names. If the process is killed in between, `current` returns the committed entries and the next update moves
    them first.

    Args:
        folder: Folder to update; created if needed.
        own: Names of the entries that belong to the caller. Those that are not staged are removed at the end.
        error: Class of the error that is raised if the folder cannot be written.
    """
    if not folder.is_dir():
        with new_folder(folder, error=error) as staged:
            yield staged
        return
    with _write_errors(folder, error), _exclusive(folder):
        _move_committed(folder, own)
        remove_leftovers(folder)
        with staging_folder(folder) as staged:
            yield staged
            names = [path.name for path in staged.iterdir()]
            for name in names:  # before the commit, which could not be completed
                if (staged / name).is_file() and (folder / name).is_dir():
                    raise error(
                        f"{folder / name} is a folder, and a file of that name is to be written. Move it elsewhere"
                    )
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
            # a folder cannot be replaced by one rename; until then `current` returns the new one
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
    """Return the path of the newest version of an entry written by `update_folder`: in the folder, or still in `COMMIT`."""
    committed = folder / COMMIT / name
    return committed if os.path.lexists(committed) else folder / name


def own_description(folder: Path, name: str, keys: Set[str]) -> dict[str, Any] | None:
    """Return the JSON object in a file of a folder if it has all keys; None if it is absent or another program wrote it."""
    try:
        about = json.loads(require_regular_file(current(folder, name)).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return about if isinstance(about, dict) and keys <= set(about) else None


def file_version(path: Path) -> tuple[int, int] | None:
    """Return what differs after another process has replaced a file; None if there is no file."""
    with suppress(OSError, ValueError):  # also for a name that no file can have
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def read_unchanged(folder: Path, name: str, read: Callable[[], T]) -> T:
    """Return the result of `read`, and retry if a concurrent save replaced the entry `name` in the meantime.

    Args:
        folder: Folder written by `update_folder`.
        name: Entry that every save writes.
        read: Function that reads from the folder through `current`.
    """

    def version() -> tuple[int, int] | None:
        return file_version(current(folder, name))

    for attempt in range(_ATTEMPTS):
        before, is_moving = version(), os.path.isdir(folder / COMMIT)  # noqa: PTH112  (Path.is_dir raises for a long name)
        try:
            result = read()
        except (PromcseError, OSError):
            if attempt == _ATTEMPTS - 1 or (version() == before and not is_moving):
                raise
        else:
            if version() == before:
                return result
    raise DataError(
        f"{folder} was overwritten during each of {_ATTEMPTS} reads. Try again when no process writes to it"
    )


def refuse_taken(folder: Path, *, error: type[PromcseError] = DataError) -> None:
    """Raise `error` unless a folder is absent, or empty but for leftovers of a killed process."""
    with _write_errors(folder, error):
        is_free = folder.is_dir() and all(_LEFTOVER.fullmatch(path.name) for path in folder.iterdir())
        if os.path.lexists(folder) and not is_free:
            raise error(f"{folder} already exists and is not overwritten. Give another name, or delete it first")


def refuse_unwritable(folder: Path) -> None:
    """Check that files can be written to a folder that exists or can be created.

    Raises:
        DataError: They cannot.
    """
    if obstacle := find_obstacle(folder):
        raise DataError(f"cannot write to {folder}: {obstacle} is not a writable folder")


def find_obstacle(folder: Path) -> Path | None:
    """Return the nearest existing path of a folder or its parents if it is not a writable folder; else None."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    return None if is_folder(nearest) and os.access(nearest, os.W_OK | os.X_OK) else nearest


@contextmanager
def _write_errors(folder: Path, error: type[PromcseError]) -> Iterator[None]:
    try:
        yield
    except OSError as reason:
        raise error(f"cannot write to {folder}: {reason.strerror or reason}") from reason


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder; do nothing on file systems without locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
