"""Read an input file in blocks of rows, with all columns; memory use does not depend on its size."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from promcse_pl.data.arrow import dataset_batches, is_saved_dataset, select_columns
from promcse_pl.data.columns import TRAINING_ROWS, ColumnRequest, Record, Records, listed, short_name
from promcse_pl.data.files import decompressed, open_file
from promcse_pl.data.readers import BadRow, OnBadRow, UnusableRowError, row_values
from promcse_pl.data.text_formats import shown, text_records
from promcse_pl.utils.errors import DataError
from promcse_pl.utils.paths import file_suffix

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
IsWanted = Callable[[int], bool]
"""Maps the number of a shard in its input file to whether its rows are needed."""
BLOCK_ROWS = 16384
"""Rows that are read and encoded at once; a multiple of `embedder.BLOCK_SENTENCES`, so that `encode` gets full blocks."""
EMBEDDING = "embedding"
"""Column of the embeddings in the output."""
OPTION = "--text"
"""Command-line option of the text column."""


@dataclass(frozen=True, slots=True)
class RowSettings:
    """How the rows of input files are read.

    Attributes:
        text_column: Name of the text column; None: recognised by its name.
        on_bad_row: "stop" raises an error at the first bad row, "skip" skips bad rows.
        rows_per_shard: Input rows of a shard, bad ones included.
    """

    text_column: str | None
    on_bad_row: OnBadRow
    rows_per_shard: int


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of one shard.

    Attributes:
        shard: Number of the shard in its input file.
        table: All columns of the good rows; None if the shard is not wanted.
        text_column: Name of the text column.
        bad_rows: Number of rows that were skipped.
        done: Fraction of the input file that has been read.
        next_shard: Number of the shard of the next row; None after the last row of the file.
    """

    shard: int
    table: pa.Table | None
    text_column: str = ""
    bad_rows: int = 0
    done: float = 0.0
    next_shard: int | None = None

    @property
    def texts(self) -> list[str]:
        """The texts of the rows."""
        assert self.table is not None
        texts: list[str] = self.table.column(self.text_column).to_pylist()
        return texts


def read_blocks(path: Path, settings: RowSettings, is_wanted: IsWanted) -> Iterator[Block]:
    """Stream the rows of a file in blocks that never cross a shard boundary.

    Block boundaries depend only on the positions of the rows and on `rows_per_shard`.

    Args:
        path: A file in a format of `read_rows`, or a saved dataset.
        settings: How to read it.
        is_wanted: Whether the rows of a shard are needed; blocks of other shards have no table.

    Raises:
        DataError: While iterating: the file cannot be read, has no rows or no text column, or a row is bad.
    """
    chosen = None if settings.text_column is None else [settings.text_column]
    request = ColumnRequest(path, TRAINING_ROWS[1], chosen, configurable=False, with_others=True, option=OPTION)
    if is_saved_dataset(path):
        yield from _arrow_blocks(_dataset_pieces(request), request, settings, is_wanted)
        return
    with open_file(path) as raw:
        stream = decompressed(raw, path)
        if file_suffix(path) == ".parquet":
            pieces = _parquet_pieces(stream, request, settings.rows_per_shard, is_wanted)
            yield from _arrow_blocks(pieces, request, settings, is_wanted)
            return
        size = path.stat().st_size
        records = text_records(stream, file_suffix(path), request)
        if file_suffix(path) == ".txt":
            records = ((line, r if isinstance(r, str) else [("text", r[0][1])]) for line, r in records)
        for block in _text_blocks(records, request, settings, is_wanted):
            yield dataclasses.replace(block, done=min(1.0, raw.tell() / size))


def _groups(rows: Iterable[tuple[int, T]], rows_per_shard: int) -> Iterator[tuple[int, list[T], int | None]]:
    """Yield the rows of each block with the number of its shard and that of the next row.

    Only the next row is read ahead, and it is not checked: a bad row does not affect the shard before it.

    Args:
        rows: Numbered rows.
        rows_per_shard: See `RowSettings`.
    """
    group: list[T] = []
    block = (0, 0)
    for row, value in rows:
        next_block = _block_of(row, rows_per_shard)
        if group and next_block != block:
            yield block[0], group, next_block[0]
            group = []
        block = next_block
        group.append(value)
    if group:
        yield block[0], group, None


def _block_of(row: int, rows_per_shard: int) -> tuple[int, int]:
    """Return the shard of a row and the number of its block in the shard."""
    shard, within = divmod(row, rows_per_shard)
    return shard, within // BLOCK_ROWS


def _check_skipped(path: Path, line: int, reason: str, settings: RowSettings) -> None:
    """Raise a DataError for a bad row, unless bad rows are skipped."""
    if settings.on_bad_row == "stop":
        raise DataError(f"{BadRow(str(path), line, reason)}. Fix the row, or skip such rows with --on-bad-row skip")


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Raise a DataError if the output could not have columns of these names."""
    if EMBEDDING in names:
        raise DataError(f"{path} has a column {EMBEDDING}, the name of the output column of the embeddings. Rename it")
    if len(set(names)) < len(names):
        raise DataError(f"{path} has two columns with the same name (columns: {listed(names)}). Rename one of them")


# csv, tsv, txt, jsonl

_Rows = list[tuple[int, dict[str, Any]]]
"""Line number and values of each row, the text first."""


def _text_blocks(
    records: Records, request: ColumnRequest, settings: RowSettings, is_wanted: IsWanted
) -> Iterator[Block]:
    columns: dict[str, type] = {}
    for shard, group, next_shard in _groups(enumerate(records), settings.rows_per_shard):
        if columns and not is_wanted(shard):
            yield Block(shard, None, next_shard=next_shard)
            continue
        rows: _Rows = []
        bad_rows = 0
        for line, record in group:
            reason = _unusable(record)
            if reason or isinstance(record, str):
                _check_skipped(request.path, line, reason, settings)
                bad_rows += 1
                continue
            if not columns and not rows:
                _check_names(request.path, [label for label, _ in record])
            rows.append((line, dict(record)))
        if not columns:  # even if the shard is not wanted: types are inferred from the first block
            if not rows:
                raise DataError(
                    f"{request.path}: none of the first {bad_rows:,} rows is valid. Check its format and columns"
                )
            columns = _column_types(request.path, rows)
        first_rows = min(BLOCK_ROWS, settings.rows_per_shard)
        table = _table(request.path, rows, columns, first_rows) if is_wanted(shard) else None
        yield Block(shard, table, next(iter(columns)), bad_rows, next_shard=next_shard)
    if not columns:
        raise DataError(f"{request.path} has no rows")


def _unusable(record: Record) -> str:
    """Return why the text of a record (its first value) is invalid; empty if it is valid."""
    try:
        row_values(record if isinstance(record, str) else record[:1], ("text",))
    except UnusableRowError as reason:
        return str(reason)
    return ""


_TYPES = {str: "string", bool: "bool", int: "int64", float: "double"}
"""Type of a value -> type of its column."""


def _column_types(path: Path, rows: _Rows) -> dict[str, type]:
    """Return the columns of the first rows of a file and the type of their values: of numbers float, else of the first value."""
    names = list(dict.fromkeys(name for _, cells in rows for name in cells))
    _check_names(path, names)
    types = {name: [type(value) for value in _values(rows, name) if value is not None] for name in names}
    return {name: float if set(kinds) == {int, float} else kinds[0] if kinds else str for name, kinds in types.items()}


def _table(path: Path, rows: _Rows, columns: dict[str, type], first_rows: int) -> pa.Table:
    """Return rows as a table; a missing value of a JSON object is null."""
    import pyarrow as pa

    for line, cells in rows:
        if unknown := cells.keys() - columns.keys():
            raise DataError(
                f"{path}:{line}: column {short_name(min(unknown))} does not occur in the first {first_rows:,} rows (columns: "
                f"{listed(list(columns))}). Move a row that has it to the start of the file"
            )
    return pa.table({name: _array(path, rows, name, kind) for name, kind in columns.items()})


def _values(rows: _Rows, name: str) -> list[Any]:
    """Return the values of a column; nested JSON values become their JSON text, because their types vary between rows."""
    values = (cells.get(name) for _, cells in rows)
    return [json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value for value in values]


def _array(path: Path, rows: _Rows, name: str, kind: type) -> pa.Array:
    """Return a column. Values are checked first, because pyarrow converts 9.99 to int64 as 9 and True to double as 1.0."""
    import pyarrow as pa

    values, allowed = _values(rows, name), {type(None), kind, int if kind is float else kind}

    def array(some: list[Any]) -> pa.Array | None:
        if not set(map(type, some)) <= allowed:
            return None
        try:
            return pa.array(some, type=_TYPES[kind])
        except (pa.ArrowException, ValueError, OverflowError):  # an integer out of range, a lone surrogate
            return None

    column = array(values)
    if column is None:
        line, value = next(
            (line, value) for (line, _), value in zip(rows, values, strict=True) if array([value]) is None
        )
        is_float = kind is int and isinstance(value, float)
        raise DataError(
            f"{path}:{line}: column {short_name(name)} must hold {_TYPES[kind]} as in the first rows, got {shown(value)}. "
            + ("Write all its numbers with a decimal point" if is_float else "Convert all its values to strings")
        )
    return column


# parquet and saved datasets


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive rows of an Arrow file.

    Attributes:
        row: Number of the first row.
        batch: The rows; None for the last row of an unwanted row group.
        text: Position of the text column.
        done: Fraction of the input file that has been read; 0 if unknown.
    """

    row: int
    batch: pa.RecordBatch | None
    text: int
    done: float = 0.0


def _dataset_pieces(request: ColumnRequest) -> Iterator[_Piece]:
    row = 0
    for batch, (position,) in dataset_batches(request.path, request):
        yield _Piece(row, batch, position)
        row += batch.num_rows


def _parquet_pieces(
    stream: io.BufferedReader[Any], request: ColumnRequest, rows_per_shard: int, is_wanted: IsWanted
) -> Iterator[_Piece]:
    """Yield the batches of row groups with wanted rows; for any other row group, yield its last row without content."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        source = io.BytesIO(stream.read()) if request.path.suffix.lower() == ".gz" else stream
        # with a buffer and without pre_buffer, row groups are read page by page
        file = pq.ParquetFile(source, pre_buffer=False, buffer_size=2**20)
        (position,) = select_columns(file.schema_arrow, request)
        rows = file.metadata.num_rows
        for number in range(file.num_row_groups):
            stop = row + file.metadata.row_group(number).num_rows
            if not any(is_wanted(shard) for shard in range(row // rows_per_shard, -(-stop // rows_per_shard))):
                if stop > row:
                    yield _Piece(stop - 1, None, position, stop / rows)
                row = stop
                continue
            for batch in file.iter_batches(batch_size=BLOCK_ROWS, row_groups=[number]):
                yield _Piece(row, batch, position, (row + batch.num_rows) / rows)
                row += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{request.path} is not a complete UTF-8 parquet file: {error} (after row {row})") from error


def _arrow_blocks(
    pieces: Iterator[_Piece], request: ColumnRequest, settings: RowSettings, is_wanted: IsWanted
) -> Iterator[Block]:
    is_empty = True
    split = ((piece.row, piece) for piece in _split(pieces, settings.rows_per_shard))
    for shard, parts, next_shard in _groups(split, settings.rows_per_shard):
        if is_empty and parts[0].batch is not None:
            _check_names(request.path, parts[0].batch.schema.names)
        is_empty = False
        if is_wanted(shard):
            block = _arrow_block(shard, parts, request.path, settings)
        else:
            block = Block(shard, None, done=parts[-1].done)
        yield dataclasses.replace(block, next_shard=next_shard)
    if is_empty:
        raise DataError(f"{request.path} has no rows")


def _split(pieces: Iterator[_Piece], rows_per_shard: int) -> Iterator[_Piece]:
    """Split pieces at block boundaries."""
    for piece in pieces:
        if piece.batch is None:
            yield piece
            continue
        offset = 0
        while offset < piece.batch.num_rows:
            row = piece.row + offset
            shard, block = _block_of(row, rows_per_shard)
            stop = min(shard * rows_per_shard + (block + 1) * BLOCK_ROWS, (shard + 1) * rows_per_shard)
            batch = piece.batch.slice(offset, stop - row)
            yield _Piece(row, batch, piece.text, piece.done)
            offset += batch.num_rows


def _arrow_block(shard: int, pieces: list[_Piece], path: Path, settings: RowSettings) -> Block:
    import pyarrow as pa

    table = pa.Table.from_batches([piece.batch for piece in pieces])
    name = table.schema.names[pieces[0].text]
    good = []
    for row, text in enumerate(table.column(pieces[0].text).to_pylist(), pieces[0].row + 1):
        reason = _unusable([(name, text)])
        if reason:
            _check_skipped(path, row, reason, settings)
        good.append(not reason)
    if not all(good):
        table = table.filter(pa.array(good))
    return Block(shard, table, name, good.count(False), pieces[-1].done)
