"""Read rows of texts from csv, tsv, txt, jsonl and parquet files and saved datasets, with the line of every unusable row."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from promcse_pl.data.arrow import dataset_records, is_saved_dataset, parquet_records
from promcse_pl.data.columns import SCORED_PAIRS, TRAINING_ROWS, ColumnRequest, Record, Records, is_number, short_name
from promcse_pl.data.files import decompressed, open_file
from promcse_pl.data.text_formats import shown, text_records
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


# Eight parameters: four settings of data.*, two lists of results, and `configurable` for callers without such settings.
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
    """Stream the rows of a file, every text exactly as in the file.

    Args:
        path: A .csv (RFC 4180 quoting), .tsv (no quoting), .txt (a sentence per line), .jsonl (an object or a list
            per line) or .parquet file in UTF-8, each also gzipped with a further .gz, or a folder written by `save_to_disk` of
            the datasets library.
        width: Texts per row: 1 sentences, 2 pairs, 3 triplets.
        columns: `width` names or 0-based positions; None matches columns by known names, in any order, and otherwise reads
            a file of exactly `width` columns by position. The keys of the first object of a jsonl file are its columns.
        header: Whether a csv or tsv file starts with column names; None expects them, and raises where the first row
            looks like data.
        on_bad_row: "stop" raises at the first bad row, "skip" continues without it.
        bad_rows: "skip" appends the bad rows here. Their line counts from 1 and is the one where the row starts; in
            a parquet file or a saved dataset it is the row number.
        notes: Lines that describe how the file is read (columns, delimiter) are appended here.
        configurable: Whether messages may suggest settings of the training file (data.columns and so on).

    Raises:
        DataError: While iterating, for a file, setting or row that cannot be used, or when no row is good.
    """
    request = ColumnRequest(path, TRAINING_ROWS[width], columns, header, configurable, [] if notes is None else notes)
    return stream_rows(request, on_bad_row, bad_rows)


def read_scored_pairs(path: Path) -> list[tuple[str, str, float]]:
    """Read rows of two texts and a finite score in any format of `read_rows`, and log their columns.

    The first row of a csv or tsv file of three columns is a header if its score is not a number.

    Raises:
        DataError: A file or row that cannot be used, or no row is good.
    """
    request = ColumnRequest(path, SCORED_PAIRS, configurable=False)
    rows = list(stream_rows(request))
    for line in request.notes:
        log.info("%s", line)
    return rows


class UnusableRowError(ValueError):
    """A row cannot be used; the message is the reason."""


def stream_rows(
    request: ColumnRequest, on_bad_row: OnBadRow = "stop", bad_rows: list[BadRow] | None = None
) -> Iterator[tuple[Any, ...]]:
    """Stream the rows of a request, with a float in place of each score; see `read_rows`."""
    good, bad, first_bad = 0, 0, None
    for line, record in _records(request):
        try:
            row = row_values(record, request.kind.roles)
        except UnusableRowError as error:
            bad_row = BadRow(str(request.path), line, str(error))
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
        raise DataError(f"{request.path} has no usable row: {found}")


def _records(request: ColumnRequest) -> Records:
    """Check the settings of a request and stream its columns from a file of any format."""
    path, width = request.path, len(request.kind.roles)
    is_folder = is_saved_dataset(path)
    suffix = "folder" if is_folder else file_suffix(path)
    if request.chosen is not None and len(request.chosen) != width:
        raise DataError(f"{path}: {width} columns are needed, got data.columns={list(request.chosen)}")
    if request.header is not None and suffix in ("folder", *SUFFIXES) and suffix not in (".csv", ".tsv"):
        raise DataError(f"{path}: data.header has no effect on {suffix} files. Try: data.header=null")
    if is_folder:
        yield from dataset_records(path, request)
        return
    with open_file(path) as raw:
        if suffix not in SUFFIXES:
            raise DataError(f"{path}: unknown format {suffix!r}. Allowed: {', '.join(SUFFIXES)}, each also with .gz")
        if suffix == ".txt" and (width != 1 or request.chosen is not None):
            raise DataError(_txt_refusal(request))
        stream = decompressed(raw, path)
        yield from (parquet_records(stream, request) if suffix == ".parquet" else text_records(stream, suffix, request))


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


def row_values(record: Record, roles: Sequence[str]) -> tuple[str | float, ...]:
    """Return the texts and the score of a record.

    Raises:
        UnusableRowError: A value is missing, blank or of another type.
    """
    if isinstance(record, str):
        raise UnusableRowError(record)
    for label, cell in record:
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            raise UnusableRowError(f"column {short_name(label)} is empty")
    return tuple(
        _score(cell, label) if role == "score" else _text(cell, label)
        for role, (label, cell) in zip(roles, record, strict=True)
    )


def _text(value: object, label: str) -> str:
    if not isinstance(value, str):
        raise UnusableRowError(f"column {short_name(label)} must hold a string, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # only a JSON escape can spell this; tokenizers refuse it
        raise UnusableRowError(
            f"column {short_name(label)} holds a lone surrogate at character {error.start + 1}"
        ) from error
    return value


def _score(value: object, label: str) -> float:
    if isinstance(value, str | int | float | Decimal) and not isinstance(value, bool) and is_number(str(value)):
        return float(value)
    raise UnusableRowError(f"column {short_name(label)} must hold a finite number, got {shown(value)}")
