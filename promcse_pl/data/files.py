"""Open and read data files: regular files only, and every failure is a `DataError`."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
        raise DataError(f"{path} cannot be read: permission denied. Try: chmod u+r {shlex.quote(str(path))}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a complete gzip file ({error}). Copy or compress it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def decompressed(raw: io.BufferedReader, path: Path) -> io.BufferedReader[Any]:
    """Return the stream of an open file, decompressed if its name ends in .gz."""
    # GzipFile.readline is Python code; the buffer in front of it saves a third of the time.
    return io.BufferedReader(gzip.GzipFile(fileobj=raw)) if path.suffix.lower() == ".gz" else raw


def read_text(path: Path, hint: str, encoding: str = "utf-8") -> tuple[str, str]:
    """Return the text of a file of a published data set, and the hex sha256 of its bytes.

    Args:
        path: The file.
        hint: Where the file comes from, for the message if it cannot be read.
        encoding: Encoding of the file.

    Raises:
        DataError: The file cannot be read or has another encoding.
    """
    try:
        content = require_regular_file(path).read_bytes()
        return content.decode(encoding), hashlib.sha256(content).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. {hint}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {error.object[error.start]:#04x})") from error


def read_senteval(path: Path, encoding: str = "utf-8") -> tuple[list[str], str]:
    """Return the lines of a file of SentEval, and the hex sha256 of its bytes; errors as `read_text`."""
    text, sha256 = read_text(path, "SentEval's data folder is data.dir/senteval", encoding)
    return text.removesuffix("\n").split("\n") if text else [], sha256


def single_spaced(sentence: str) -> str:
    """Return a sentence with single spaces between its words, as SentEval reads it; neither lower-cased nor cut."""
    return " ".join(sentence.split())
