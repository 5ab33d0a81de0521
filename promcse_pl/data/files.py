"""Opens data files: regular files alone, with one error for whatever goes wrong."""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from promcse_pl.errors import DataError


def require_regular_file(path: Path) -> None:
    """Refuse a FIFO, device or socket before it is opened: opening a FIFO waits for a writer, and a device may never end.

    Raises:
        DataError: It is one of these.
        OSError: There is nothing at the path, or it cannot be asked about.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise DataError(
            f"{path} is {kind}, a regular file is needed: it is read more than once. Write its content to a file first "
            "(promcse encode, search and similarity read a pipe given as -)"
        )


@contextmanager
def open_file(path: Path) -> Iterator[io.BufferedReader]:
    """Open a data file as bytes; whatever goes wrong with the file while it is open becomes one DataError."""
    try:
        require_regular_file(path)
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise DataError(f"{path} is empty (0 bytes)")
            yield stream
    except FileNotFoundError as error:
        where = "" if path.is_absolute() else f"; the current folder is {Path.cwd()}"
        raise DataError(f"{path} does not exist{where}") from error
    except IsADirectoryError as error:
        raise DataError(
            f"{path} is a folder; a file is needed, or a folder that save_to_disk of the datasets library wrote"
        ) from error
    except PermissionError as error:
        raise DataError(f"{path} may not be read: permission denied. Try: chmod u+r {path}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}). Copy or compress it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
