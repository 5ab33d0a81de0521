"""Reads rows of texts from csv, tsv, txt, jsonl and parquet files, and names the line of every row it cannot use."""

# pandas and datasets are not used on purpose: both lose the line numbers that a good error message needs, and both
# turn texts such as "NA", "None" and "null" into missing values.

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, Literal

from promcse_pl.errors import DataError

log = logging.getLogger(__name__)

OnBadRow = Literal["stop", "skip"]

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used: where it starts and why."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def read_rows(
    path: Path,
    *,
    width: int,
    columns: Sequence[str | int] | None = None,
    header: bool | None = None,
    on_bad_row: OnBadRow = "stop",
    bad_rows: list[BadRow] | None = None,
) -> Iterator[tuple[str, ...]]:
    """Stream the rows of a file, every text exactly as it stands in the file.

    Args:
        path: a .csv (RFC 4180 quoting), .tsv (no quoting), .txt (a sentence per line), .jsonl (an object or a list
            per line) or .parquet file in UTF-8, each also gzipped with a further .gz.
        width: texts per row: 1 sentences, 2 pairs, 3 triplets.
        columns: `width` names or 0-based positions; None takes the first `width` columns. The first object of a
            jsonl file names its columns.
        header: whether a csv or tsv file starts with column names; None expects them, and asks where the first row
            looks like data.
        on_bad_row: "stop" raises at the first bad row, "skip" goes on without it.
        bad_rows: "skip" appends the bad rows here. Their line counts from 1 and is the one where the row starts; in
            a parquet file it is the row number.

    Raises:
        DataError: while iterating, for a file, setting or row that cannot be used, or when no row is good.
    """
    return _read(path, [_text] * width, columns, header, on_bad_row, bad_rows)


def read_scored_pairs(
    path: Path,
    *,
    columns: Sequence[str | int] | None = None,
    header: bool | None = None,
    on_bad_row: OnBadRow = "stop",
    bad_rows: list[BadRow] | None = None,
) -> list[tuple[str, str, float]]:
    """Read rows of text, text and a finite score; the arguments and errors are those of `read_rows`.

    With header None, a csv or tsv file starts with column names if its first score is not a number.
    """
    if (
        header is None
        and file_suffix(path) in (".csv", ".tsv")
        and not any(isinstance(name, str) for name in columns or ())
    ):
        first = next(_read(path, [_text] * 3, columns, False, on_bad_row, []))
        header = not _is_number(first[2])
    return list(_read(path, [_text, _text, _score], columns, header, on_bad_row, bad_rows))


@contextmanager
def open_file(path: Path) -> Iterator[io.BufferedReader]:
    """Open a data file as bytes; whatever goes wrong with the file while it is open becomes one DataError."""
    try:
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise DataError(f"{path} is empty (0 bytes)")
            yield stream
    except FileNotFoundError as error:
        where = "" if path.is_absolute() else f"; the current folder is {Path.cwd()}"
        raise DataError(f"{path} does not exist{where}") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder, a file is needed") from error
    except PermissionError as error:
        raise DataError(f"{path} may not be read: permission denied. Try: chmod u+r {path}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}). Copy or compress it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def file_suffix(path: Path) -> str:
    """The suffix that picks the format: data.CSV.gz gives .csv."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


class _UnusableError(ValueError):
    """Why a row cannot be used."""


_Lines = Iterator[tuple[int, list[Any] | dict[str, Any] | str]]  # a line's cells, or the reason why it is bad
_Cells = Iterator[tuple[int, list[tuple[str, Any]] | str]]  # (label, value) of the wanted columns, or the reason
_Columns = Sequence[str | int] | None


def _read(
    path: Path,
    converters: Sequence[Callable[[Any, str], Any]],
    columns: _Columns,
    header: bool | None,
    on_bad_row: OnBadRow,
    bad_rows: list[BadRow] | None,
) -> Iterator[tuple[Any, ...]]:
    width, good, bad, first_bad = len(converters), 0, 0, None
    with open_file(path) as raw:
        suffix = file_suffix(path)
        if suffix not in SUFFIXES:
            raise DataError(f"{path}: unknown format {suffix!r}. Allowed: {', '.join(SUFFIXES)}, each also with .gz")
        if header is not None and suffix not in (".csv", ".tsv"):
            raise DataError(f"{path}: data.header has no effect on {suffix} files. Try: data.header=null")
        if suffix == ".txt" and (width != 1 or columns is not None):
            raise DataError(
                f"{path}: a .txt file is one sentence a line, got {width} texts a row and data.columns={columns}. "
                "Use another format, or data.columns=null"
            )
        if columns is not None and len(columns) != width:
            raise DataError(f"{path}: {width} columns are needed, got data.columns={list(columns)}")
        # GzipFile.readline is Python code; the buffer in front of it saves a third of the time.
        stream = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if path.suffix.lower() == ".gz" else raw
        if suffix == ".parquet":
            rows = _parquet(path, stream, [convert is _text for convert in converters], columns)
        else:
            has_header = suffix in (".csv", ".tsv") and header is not False
            rows = _picked(path, _interior_blanks(_PARSERS[suffix](stream)), width, columns, has_header, header is None)
        for line, cells in rows:
            try:
                if isinstance(cells, str):
                    raise _UnusableError(cells)
                for label, cell in cells:
                    if cell is None or (isinstance(cell, str) and not cell.strip()):
                        raise _UnusableError(f"column {_short(label)} is empty")
                row = tuple(convert(cell, label) for convert, (label, cell) in zip(converters, cells, strict=True))
            except _UnusableError as error:
                bad_row = BadRow(str(path), line, str(error))
                if on_bad_row == "stop":
                    message = f"{bad_row}. Fix the row (training rows can be skipped: data.on_bad_row=skip)"
                    raise DataError(message) from None
                bad, first_bad = bad + 1, first_bad or bad_row
                if bad_rows is not None:
                    bad_rows.append(bad_row)
            else:
                good += 1
                yield row
    if not good:
        found = f"{bad} bad rows, the first is {first_bad}" if bad else "it holds no rows"
        raise DataError(f"{path} has no usable row: {found}")


# ---------------------------------------------------------------------------------------------------------------------
# Text formats. The reason of a blank line is "".


def _csv(stream: IO[bytes]) -> _Lines:
    broken: list[str] = []

    def lines() -> Iterator[str]:
        for _, text, problem in _decoded(stream):
            if problem:  # the text still goes on, so that the quotes pair up and only this row is lost
                broken.append(problem)
            yield text

    reader = csv.reader(lines(), strict=True)
    while True:
        start = reader.line_num + 1
        broken.clear()
        try:
            cells = next(reader)
            yield start, broken[0] if broken else cells or ""
        except StopIteration:
            return
        except csv.Error as error:
            reason = f"broken quoting: {error}"
            if "field limit" in reason:
                limit = csv.field_size_limit()
                reason = f"a field is over {limit} characters: a quote that opens in line {start} probably never closes"
            elif "end of data" in reason:
                reason = f"a quote that opens in line {start} never closes"
            elif "new-line" in reason:
                reason = "a carriage return stands outside quotes"
            yield start, reason + (f" (lines {start} to {reader.line_num})" if reader.line_num > start else "")


def _tsv(stream: IO[bytes]) -> _Lines:
    # text/tab-separated-values (IANA) has no quoting, and tsv files of sentences hold single, unpaired quotes.
    for line, cells in _txt(stream):
        yield line, cells[0].split("\t") if isinstance(cells, list) else cells


def _txt(stream: IO[bytes]) -> _Lines:
    for line, text, problem in _decoded(stream):
        text = text.removesuffix("\n").removesuffix("\r")
        yield line, problem or ([text] if text else "")


def _jsonl(stream: IO[bytes]) -> _Lines:
    kind: type | None = None
    for line, text, problem in _decoded(stream):
        if problem or not text.strip("\r\n"):
            yield line, problem
            continue
        try:
            cells = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield line, f"not JSON: {error}"
            continue
        if not isinstance(cells, dict | list) or not cells:
            yield line, f"an object or a list with columns is needed, got {_shown(cells)}"
        elif not isinstance(cells, kind := kind or type(cells)):
            yield line, "the file mixes objects and lists"
        else:
            yield line, cells


_PARSERS = {".csv": _csv, ".tsv": _tsv, ".txt": _txt, ".jsonl": _jsonl, ".ndjson": _jsonl}


def _decoded(stream: IO[bytes]) -> Iterator[tuple[int, str, str]]:
    """Line number, text with its line end, what is wrong with its bytes. Only LF ends a line: U+2028 is text."""
    for line, data in enumerate(stream, start=1):
        if line == 1:
            data = data.removeprefix(codecs.BOM_UTF8)
        try:
            text, problem = data.decode(), ""
        except UnicodeDecodeError as error:
            text = data.decode(errors="replace")
            problem = f"byte 0x{data[error.start]:02x} at position {error.start + 1} of line {line} is not UTF-8"
        yield line, text, problem


def _interior_blanks(lines: _Lines) -> _Lines:
    """Blank lines are bad only where something follows them; those that end the file are dropped."""
    blank: list[int] = []
    for line, cells in lines:
        if cells == "":
            blank.append(line)
            continue
        yield from ((number, "the line is empty") for number in blank)
        blank.clear()
        yield line, cells


# ---------------------------------------------------------------------------------------------------------------------
# Columns.


def _picked(path: Path, lines: _Lines, width: int, columns: _Columns, has_header: bool, guessed: bool) -> _Cells:
    positions: list[int] = []
    labels: list[str] = []
    for line, cells in lines:
        if isinstance(cells, str):
            if has_header and not labels:
                raise DataError(f"{path}:{line}: {cells}. The file must start with column names, or data.header=false")
            yield line, cells
            continue
        if not labels:  # the first row: the header, or an object whose keys name the columns
            names = list(cells) if has_header or isinstance(cells, dict) else None
            positions = _positions(path, names, width, columns)
            labels = [names[position] if names else str(position) for position in positions]
            if names and columns is None and len(names) > width:
                log.warning("%s: of its columns %s the first %d are read", path, _listed(names), width)
            if has_header:
                by_name = any(isinstance(column, str) for column in columns or ())
                if guessed and not by_name and any(len(label.split()) >= 4 or _is_number(label) for label in labels):
                    raise DataError(
                        f"{path}: the first row looks like data, not like column names: {_listed(labels)}. "
                        "Say which it is: data.header=true or data.header=false"
                    )
                continue
        if isinstance(cells, dict):
            yield line, [(label, cells.get(label)) for label in labels]
        elif len(cells) <= max(positions):
            label = labels[positions.index(max(positions))]
            missing = (
                f"column {_short(label)} is missing" if not label.isdigit() else f"{max(positions) + 1} are needed"
            )
            yield line, f"{missing}, the row has {len(cells)} columns"
        else:
            yield line, [(label, cells[position]) for label, position in zip(labels, positions, strict=True)]


def _parquet(path: Path, stream: IO[bytes], textual: Sequence[bool], columns: _Columns) -> _Cells:
    import pyarrow as pa  # here and not above: 0.3 s that most files do not need
    import pyarrow.parquet as pq

    source = io.BytesIO(stream.read()) if path.suffix.lower() == ".gz" else stream
    row = 0
    try:
        file = pq.ParquetFile(source)
        schema = file.schema_arrow
        labels = [schema.names[position] for position in _positions(path, schema.names, len(textual), columns)]
        for label, is_text in zip(labels, textual, strict=True):
            kind = schema.field(label).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if is_text and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f"{path}: column {_short(label)} must hold strings, it holds {kind}")
        for batch in file.iter_batches(batch_size=4096, columns=labels):
            for cells in zip(*(batch.column(label).to_pylist() for label in labels), strict=True):
                row += 1
                yield row, list(zip(labels, cells, strict=True))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a whole parquet file in UTF-8: {error} (after row {row})") from error


def _positions(path: Path, names: list[str] | None, width: int, columns: _Columns) -> list[int]:
    positions: list[int] = []
    for column in range(width) if columns is None else columns:
        if names is None:
            found = [column] if isinstance(column, int) and column >= 0 else []
            known, example = "its columns have no names, only positions from 0", ",".join(map(str, range(width)))
        else:
            found = [position for position, name in enumerate(names) if column in (name, position)]
            known, example = f"its {len(names)} columns are: {_listed(names)}", ",".join(map(_short, names[:width]))
        if len(found) != 1:
            raise DataError(
                f"{path} has {'several columns' if found else 'no column'} {column!r}; {known}. "
                f"{width} are needed, such as data.columns=[{example}]"
            )
        positions += found
    return positions


# ---------------------------------------------------------------------------------------------------------------------
# Values.


def _text(value: object, label: str) -> str:
    if not isinstance(value, str):
        raise _UnusableError(f"column {_short(label)} holds {_shown(value)}, a string is needed")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # only a JSON escape can spell this; tokenizers refuse it
        raise _UnusableError(
            f"column {_short(label)} holds half a surrogate pair at character {error.start + 1}"
        ) from error
    return value


def _score(value: object, label: str) -> float:
    if isinstance(value, str | int | float | Decimal) and not isinstance(value, bool) and _is_number(str(value)):
        return float(value)
    raise _UnusableError(f"column {_short(label)} holds {_shown(value)}, a finite number is needed")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _shown(value: object) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(_short, names[:20]))
    return shown if len(names) <= 20 else f"{shown}, ... ({len(names)} in all)"


def _short(name: str) -> str:
    return name if len(name) <= 40 else name[:37] + "..."
