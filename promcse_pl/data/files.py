"""Opens data files: regular files alone, with one error for whatever goes wrong."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from promcse_pl.errors import DataError
from promcse_pl.paths import NotARegularFileError, require_regular_file


@contextmanager
def open_file(path: Path) -> Iterator[io.BufferedReader]:
    """Open a data file as bytes; whatever goes wrong with the file while it is open becomes one DataError."""
    try:
        require_regular_file(path)
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise DataError(f"{path} is empty (0 bytes)")
            yield stream
    except NotARegularFileError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}, because it is read more than once. Write its content to a file first "
            "(promcse encode, search and similarity read a pipe given as -)"
        ) from error
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
