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
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, Literal

from promcse_pl.data.arrow import dataset_cells, is_saved_dataset, parquet_cells
from promcse_pl.data.columns import (
    SCORED_PAIRS,
    TRAINING_ROWS,
    ColumnRequest,
    listed,
    match_names,
    roles_of,
    short_name,
)
from promcse_pl.data.files import open_file
from promcse_pl.utils.errors import DataError
from promcse_pl.utils.paths import SUFFIXES, file_suffix

log = logging.getLogger(__name__)

OnBadRow = Literal["stop", "skip"]


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
    notes: list[str] | None = None,
    configurable: bool = True,
) -> Iterator[tuple[str, ...]]:
    """Stream the rows of a file, every text exactly as it stands in the file.

    Args:
        path: a .csv (RFC 4180 quoting), .tsv (no quoting), .txt (a sentence per line), .jsonl (an object or a list
            per line) or .parquet file in UTF-8, each also gzipped with a further .gz, or a folder written by `save_to_disk` of
            the datasets library.
        width: texts per row: 1 sentences, 2 pairs, 3 triplets.
        columns: `width` names or 0-based positions; None matches columns by known names, in any order, and otherwise reads
            a file of exactly `width` columns by position. The keys of the first object of a jsonl file are its columns.
        header: whether a csv or tsv file starts with column names; None expects them, and asks where the first row
            looks like data.
        on_bad_row: "stop" raises at the first bad row, "skip" goes on without it.
        bad_rows: "skip" appends the bad rows here. Their line counts from 1 and is the one where the row starts; in
            a parquet file or a saved dataset it is the row number.
        notes: lines that describe how the file is read (columns, delimiter) are appended here.
        configurable: whether messages may suggest settings of the training file (data.columns and so on).

    Raises:
        DataError: while iterating, for a file, setting or row that cannot be used, or when no row is good.
    """
    request = ColumnRequest(path, TRAINING_ROWS[width], columns, header, configurable)
    return _read(request, [_text] * width, on_bad_row, bad_rows, notes)


def read_scored_pairs(
    path: Path,
    *,
    columns: Sequence[str | int] | None = None,
    header: bool | None = None,
    on_bad_row: OnBadRow = "stop",
    bad_rows: list[BadRow] | None = None,
) -> list[tuple[str, str, float]]:
    """Read rows of two texts and a finite score, and log their columns; arguments and errors as in `read_rows`.

    With header None, the first row of a csv or tsv file of three columns is a header if its score is not a number.
    """
    request = ColumnRequest(path, SCORED_PAIRS, columns, header, configurable=False)
    notes: list[str] = []
    rows = list(_read(request, [_text, _text, _score], on_bad_row, bad_rows, notes))
    for line in notes:
        log.info("%s", line)
    return rows


class _UnusableError(ValueError):
    """Why a row cannot be used."""


_Lines = Iterator[tuple[int, list[Any] | dict[str, Any] | str]]  # a line's cells, or the reason why it is bad
_Cells = Iterator[tuple[int, list[tuple[str, Any]] | str]]  # (label, value) of the wanted columns, or the reason


def _read(
    request: ColumnRequest,
    converters: Sequence[Callable[[Any, str], Any]],
    on_bad_row: OnBadRow,
    bad_rows: list[BadRow] | None,
    notes: list[str] | None,
) -> Iterator[tuple[Any, ...]]:
    path, good, bad, first_bad = request.path, 0, 0, None
    for line, cells in _cells(request, [convert is _text for convert in converters], [] if notes is None else notes):
        try:
            if isinstance(cells, str):
                raise _UnusableError(cells)
            for label, cell in cells:
                if cell is None or (isinstance(cell, str) and not cell.strip()):
                    raise _UnusableError(f"column {short_name(label)} is empty")
            row = tuple(convert(cell, label) for convert, (label, cell) in zip(converters, cells, strict=True))
        except _UnusableError as error:
            bad_row = BadRow(str(path), line, str(error))
            if on_bad_row == "stop":
                skipping = " (training rows can be skipped: data.on_bad_row=skip)" if request.configurable else ""
                raise DataError(f"{bad_row}. Fix the row{skipping}") from None
            bad, first_bad = bad + 1, first_bad or bad_row
            if bad_rows is not None:
                bad_rows.append(bad_row)
        else:
            good += 1
            yield row
    if not good:
        found = f"{bad} bad rows, the first is {first_bad}" if bad else "it holds no rows"
        raise DataError(f"{path} has no usable row: {found}")


def _cells(request: ColumnRequest, textual: Sequence[bool], notes: list[str]) -> _Cells:
    """Yield the requested columns of every row; `textual` marks those that must hold strings."""
    path, width = request.path, len(request.kind.roles)
    is_folder = is_saved_dataset(path)
    suffix = "folder" if is_folder else file_suffix(path)
    if request.chosen is not None and len(request.chosen) != width:
        raise DataError(f"{path}: {width} columns are needed, got data.columns={list(request.chosen)}")
    if request.header is not None and suffix in ("folder", *SUFFIXES) and suffix not in (".csv", ".tsv"):
        raise DataError(f"{path}: data.header has no effect on {suffix} files. Try: data.header=null")
    if is_folder:
        yield from dataset_cells(path, request, textual, notes)
        return
    with open_file(path) as raw:
        if suffix not in SUFFIXES:
            raise DataError(f"{path}: unknown format {suffix!r}. Allowed: {', '.join(SUFFIXES)}, each also with .gz")
        if suffix == ".txt" and (width != 1 or request.chosen is not None):
            raise DataError(_txt_refusal(request))
        # GzipFile.readline is Python code; the buffer in front of it saves a third of the time.
        stream = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if path.suffix.lower() == ".gz" else raw
        if suffix == ".parquet":
            yield from parquet_cells(path, stream, request, textual, notes)
        elif suffix in (".csv", ".tsv"):
            delimiter = _delimiter(stream, suffix, request, notes)
            lines = _csv(stream, delimiter) if suffix == ".csv" else _tsv(stream)
            yield from _picked(_interior_blanks(lines), request, request.header, notes, delimiter)
        else:
            lines = _txt(stream) if suffix == ".txt" else _jsonl(stream)
            yield from _picked(_interior_blanks(lines), request, False, notes)


def _txt_refusal(request: ColumnRequest) -> str:
    if request.kind is SCORED_PAIRS:
        advice = f"Use a csv file with the columns {', '.join(SCORED_PAIRS.titles)}"
    elif len(request.kind.roles) > 1:
        advice = f"Use another format, or train on single sentences: {request.command('sentences')}"
    else:
        advice = "Try: data.columns=null"
    return (
        f"{request.path}: a .txt file has one sentence per line, got {len(request.kind.roles)} texts per row and "
        f"data.columns={request.chosen}. {advice}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Text formats. The reason of a blank line is "".


def _csv(stream: IO[bytes], delimiter: str) -> _Lines:
    broken: list[str] = []

    def lines() -> Iterator[str]:
        for _, text, problem in _decoded(stream):
            if problem:  # the text still goes on, so that the quotes pair up and only this row is lost
                broken.append(problem)
            yield text

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
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


def _delimiter(stream: io.BufferedReader[Any], suffix: str, request: ColumnRequest, notes: list[str]) -> str:
    """Return the delimiter of a csv or tsv file, detected in its first line.

    A csv file without a comma in its first line is read with ; or | if one of them gives enough fields. A tab-separated file
    must be named .tsv, since tsv files have no quoting.
    """
    line = stream.peek(1 << 16).removeprefix(codecs.BOM_UTF8).partition(b"\n")[0].decode(errors="replace").rstrip("\r")
    own = "," if suffix == ".csv" else "\t"
    if len(_fields(line, own)) != 1:
        return own
    other = next((candidate for candidate in ",;|\t" if _separates(line, candidate, request)), own)
    if other == own:
        return own
    if suffix == ".csv" and other != "\t":
        notes.append(f"{request.path}: columns are separated by {other}")
        return other
    name = re.sub(
        r"\.[ct]sv(?=(\.gz)?$)", ".csv" if suffix == ".tsv" else ".tsv", request.path.name, flags=re.IGNORECASE
    )
    shown = "tabs" if other == "\t" else repr(other)
    raise DataError(
        f"{request.path}: columns are separated by {shown}, which does not match the suffix {suffix}. Rename it to {name}"
    )


def _fields(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []


def _separates(line: str, delimiter: str, request: ColumnRequest) -> bool:
    """Return whether the delimiter splits a first line into enough columns; a sentence may contain one, a header rarely."""
    fields = _fields(line, delimiter)
    if len(request.kind.roles) > 1:
        return len(fields) >= len(request.kind.roles)
    return len(fields) > 1 and request.header is not False and not any(re.search(r"\s", field) for field in fields)


def _picked(
    lines: _Lines, request: ColumnRequest, header: bool | None, notes: list[str], delimiter: str = ""
) -> _Cells:
    path, names, count = request.path, None, 0
    positions: list[int] = []
    labels: list[str] = []
    for line, cells in lines:
        if isinstance(cells, str):
            if header is not False and not positions:
                without = "; if it has none: data.header=false" if request.configurable else ""
                raise DataError(f"{path}:{line}: {cells}. The file must start with column names{without}")
            yield line, cells
            continue
        if not positions:  # the first row: the header, or an object whose keys name the columns
            is_header = isinstance(cells, list) and _is_header(cells, request, header)
            names = list(cells) if is_header or isinstance(cells, dict) else None
            count = len(cells)
            positions = request.find(names, count)
            labels = [names[position] if names else str(position) for position in positions]
            if names or count > len(positions):
                notes.append(request.describe(names, positions, count))
            if is_header:
                continue
        if isinstance(cells, dict):
            missing = [label for label in labels if label not in cells]
            if missing:
                yield line, f"column {short_name(missing[0])} is missing, got {listed(list(cells))}"
            else:
                yield line, [(label, cells[label]) for label in labels]
        elif len(cells) != count:
            yield line, _ragged(len(cells), count, "header" if names else "first row", delimiter)
        else:
            yield line, [(label, cells[position]) for label, position in zip(labels, positions, strict=True)]


def _ragged(found: int, wanted: int, of: str, delimiter: str) -> str:
    """Return why a row with another number of fields than the first row is bad."""
    reason = f"{found} field{'s' * (found != 1)}, the {of} has {wanted}"
    if found > wanted and delimiter:
        reason += " (a tab inside a text?)" if delimiter == "\t" else f" (a text with {delimiter!r} without quotes?)"
    return reason


def _is_header(cells: list[Any], request: ColumnRequest, header: bool | None) -> bool:
    """Return whether the first row of a csv or tsv file holds column names.

    Raises:
        DataError: It looks like data, and data.header is not set.
    """
    if header is not None:
        return header
    if any(isinstance(column, str) for column in request.chosen or ()):
        return True
    if request.chosen is None and match_names(cells, request.kind):
        return True
    chosen = range(len(cells)) if request.chosen is None else request.chosen
    used = [cells[position] for position in chosen if isinstance(position, int) and 0 <= position < len(cells)]
    if request.kind is SCORED_PAIRS and len(used) == len(SCORED_PAIRS.roles) and is_number(used[-1]):
        return False
    words = [len(cell.split()) for cell in used]
    is_short_text = max(words, default=0) > 1 and not any(roles_of(cells))  # no name that is known in the whole row
    if is_short_text or max(words, default=0) >= 4 or any(map(is_number, used)):
        advice = (
            "Set data.header=false if it is data, data.header=true if it holds column names"
            if request.configurable
            else f"Add a first line with column names ({', '.join(request.kind.titles)})"
        )
        raise DataError(
            f"{request.path}: the first row looks like data, not like column names: {listed(used)}. {advice}"
        )
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Values.


def _text(value: object, label: str) -> str:
    if not isinstance(value, str):
        raise _UnusableError(f"column {short_name(label)} must hold a string, got {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # only a JSON escape can spell this; tokenizers refuse it
        raise _UnusableError(
            f"column {short_name(label)} holds a lone surrogate at character {error.start + 1}"
        ) from error
    return value


def _score(value: object, label: str) -> float:
    if isinstance(value, str | int | float | Decimal) and not isinstance(value, bool) and is_number(str(value)):
        return float(value)
    raise _UnusableError(f"column {short_name(label)} must hold a finite number, got {_shown(value)}")


def is_number(text: str) -> bool:
    """Return whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _shown(value: object) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
