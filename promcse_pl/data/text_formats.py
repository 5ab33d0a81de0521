"""Rows of text files (csv, tsv, txt, jsonl), each with its line number."""

# The csv and json modules instead of pandas, pyarrow or datasets: those lose the line numbers that a good error message needs,
# and turn texts such as "NA", "None" and "null" into missing values.

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from promcse_pl.data.columns import SCORED_PAIRS, ColumnRequest, Columns, Records, is_number, listed, short_name
from promcse_pl.utils.errors import DataError

_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Letters of scripts without spaces: Thai, Lao, Burmese, Khmer, kana, Chinese characters."""
_WORD = re.compile(rf"[{_UNSPACED}]{{2}}|[^\s{_UNSPACED}]+")
_SENTENCE_ENDS = (".", "!", "?", "。", "！", "？", "…")
_Lines = Iterator[tuple[int, list[Any] | dict[str, Any] | str]]
"""Line number, and all cells of the row or why it is bad; "" for a blank line."""


def text_records(stream: io.BufferedReader[Any], suffix: str, request: ColumnRequest) -> Records:
    """Stream the requested columns of a file in the format of a suffix.

    Raises:
        DataError: While iterating, for columns or a header that are ambiguous.
    """
    header: bool | None = False
    delimiter = ""
    if suffix == ".txt":
        lines = _txt(stream)
    elif suffix in (".jsonl", ".ndjson"):
        lines = _jsonl(stream)
    else:
        header, delimiter = request.header, _delimiter(stream, suffix, request)
        lines = _csv(stream, delimiter) if suffix == ".csv" else _tsv(stream)
    return _requested(_without_final_blanks(lines), request, header, delimiter)


def shown(value: object) -> str:
    """Return the type and the beginning of a value for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _csv(stream: IO[bytes], delimiter: str) -> _Lines:
    broken: list[str] = []

    def lines() -> Iterator[str]:
        for _, text, problem in _decoded(stream):
            if problem:  # the text is still parsed, so that the quotes pair up and only this row is lost
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
                reason = "a carriage return outside quotes"
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
            yield line, f"an object or a list with columns is needed, got {shown(cells)}"
        elif not isinstance(cells, kind := kind or type(cells)):
            yield line, "the file mixes objects and lists"
        else:
            yield line, cells


def _decoded(stream: IO[bytes]) -> Iterator[tuple[int, str, str]]:
    """Yield line number, text with its line end, and the decoding error or None. Only LF ends a line: U+2028 is text."""
    for line, data in enumerate(stream, start=1):
        if line == 1:
            data = data.removeprefix(codecs.BOM_UTF8)
        try:
            text, problem = data.decode(), ""
        except UnicodeDecodeError as error:
            text = data.decode(errors="replace")
            problem = f"byte 0x{data[error.start]:02x} at position {error.start + 1} of line {line} is not UTF-8"
        yield line, text, problem


def _without_final_blanks(lines: _Lines) -> _Lines:
    """Yield blank lines as bad rows, except those at the end of the file."""
    blank: list[int] = []
    for line, cells in lines:
        if cells == "":
            blank.append(line)
            continue
        yield from ((number, "the line is empty") for number in blank)
        blank.clear()
        yield line, cells


def _delimiter(stream: io.BufferedReader[Any], suffix: str, request: ColumnRequest) -> str:
    """Return the delimiter of a csv or tsv file, detected in its first line.

    A csv file without a comma in its first line is read with ; or | if one of them gives enough fields. A tab-separated file
    must be named .tsv, since tsv files have no quoting.
    """
    line = stream.peek(1 << 16).removeprefix(codecs.BOM_UTF8).partition(b"\n")[0].decode(errors="replace").rstrip("\r")
    expected = "," if suffix == ".csv" else "\t"
    if len(_fields(line, expected)) != 1:
        return expected
    found = next((delimiter for delimiter in ",;|\t" if _separates(line, delimiter, request)), expected)
    if found == expected:
        return expected
    if suffix == ".csv" and found != "\t":
        request.notes.append(f"{request.path}: columns are separated by {found}")
        return found
    shown_delimiter = "tabs" if found == "\t" else repr(found)
    renamed = re.sub(
        r"\.[ct]sv(?=(\.gz)?$)", ".csv" if suffix == ".tsv" else ".tsv", request.path.name, flags=re.IGNORECASE
    )
    raise DataError(
        f"{request.path}: columns are separated by {shown_delimiter}, which does not match the suffix {suffix}. "
        f"Rename it to {renamed}"
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


def _requested(lines: _Lines, request: ColumnRequest, header: bool | None, delimiter: str) -> Records:
    """Select the requested columns of each row; the first row is the header, or its cells or keys decide the positions."""
    names: list[str] | None = None
    positions: list[int] = []
    labels: list[str] = []
    count = 0
    for line, cells in lines:
        if isinstance(cells, str):
            if header is not False and not positions:
                without = "; if it has none: data.header=false" if request.configurable else ""
                raise DataError(f"{request.path}:{line}: {cells}. The file must start with column names{without}")
            yield line, cells
            continue
        if not positions:
            is_header = isinstance(cells, list) and _is_header(cells, request, header)
            names, count = list(cells) if is_header or isinstance(cells, dict) else None, len(cells)
            positions = request.select(names, count)
            if request.with_others and not isinstance(cells, dict):
                positions += [position for position in range(count) if position not in positions]
            labels = [names[position] if names else str(position) for position in positions]
            if is_header:
                continue
        if isinstance(cells, dict):
            missing = next((label for label in labels if label not in cells), None)
            if missing is None:
                others = (
                    [(key, cell) for key, cell in cells.items() if key not in labels] if request.with_others else []
                )
                yield line, [*((label, cells[label]) for label in labels), *others]
            else:
                yield line, f"column {short_name(missing)} is missing, got {listed(list(cells))}"
        elif len(cells) == count:
            yield line, [(label, cells[position]) for label, position in zip(labels, positions, strict=True)]
        else:
            reason = (
                f"{len(cells)} field{'s' * (len(cells) != 1)}, the {'header' if names else 'first row'} has {count}"
            )
            if len(cells) > count and delimiter:
                reason += (
                    " (a tab inside a text?)" if delimiter == "\t" else f" (a text with {delimiter!r} without quotes?)"
                )
            yield line, reason


def _is_header(cells: list[str], request: ColumnRequest, header: bool | None) -> bool:
    """Return whether the first row of a csv or tsv file holds column names.

    Raises:
        DataError: It looks like data, and data.header is not set.
    """
    if header is not None:
        return header
    columns = Columns.of(cells, len(cells))
    if any(isinstance(column, str) for column in request.chosen or ()):
        return True
    if request.chosen is None and columns.match(request.kind):
        return True
    chosen = range(len(cells)) if request.chosen is None else request.chosen
    used = [cells[position] for position in chosen if isinstance(position, int) and 0 <= position < len(cells)]
    if request.kind is SCORED_PAIRS and len(used) == len(SCORED_PAIRS.roles) and is_number(used[-1]):
        return False
    has_spaces = any(len(cell.split()) > 1 for cell in used)
    if any(map(_is_text, used)) or (has_spaces and not any(columns.roles)) or any(map(is_number, used)):
        advice = (
            "Set data.header=false if it is data, data.header=true if it holds column names"
            if request.configurable
            else f"Add a first line with column names ({', '.join(request.kind.titles)})"
        )
        raise DataError(
            f"{request.path}: the first row looks like data, not like column names: {listed(used)}. {advice}"
        )
    return True


def _is_text(cell: str) -> bool:
    """Return whether a cell looks like a sentence, not like the name of a column."""
    return cell.rstrip().endswith(_SENTENCE_ENDS) or len(_WORD.findall(cell)) >= 4
