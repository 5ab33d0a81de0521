"""Open data files: regular files only, and every failure is a `DataError`."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from promcse_pl.utils.errors import DataError
from promcse_pl.utils.paths import NotARegularFileError, require_regular_file


@contextmanager
def open_file(path: Path) -> Iterator[io.BufferedReader]:
    """Open a data file as bytes; every file error inside the block is raised as a DataError."""
    try:
        require_regular_file(path)
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise DataError(f"{path} is empty (0 bytes)")
            yield stream
    except NotARegularFileError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}, and data files are read more than once. Write its content to a file first "
            "(promcse encode, search and similarity read a pipe given as -)"
        ) from error
    except FileNotFoundError as error:
        where = "" if path.is_absolute() else f"; the current folder is {Path.cwd()}"
        raise DataError(f"{path} does not exist{where}") from error
    except IsADirectoryError as error:
        raise DataError(
            f"{path} is a folder, but not one written by save_to_disk of the datasets library. Give a file or such a folder"
        ) from error
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: permission denied. Try: chmod u+r {path}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a complete gzip file ({error}). Copy or compress it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
