"""Read columns of parquet files and of folders written by `save_to_disk` of the datasets library."""

# The datasets library itself is not needed: such a folder is a list of Arrow IPC streams.

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promcse_pl.data.columns import ColumnRequest, Records, listed, short_name
from promcse_pl.data.files import open_file
from promcse_pl.utils.errors import DataError
from promcse_pl.utils.paths import is_plain_name

if TYPE_CHECKING:
    import pyarrow as pa

STATE, SPLITS = "state.json", "dataset_dict.json"
_BATCH = 4096


def is_saved_dataset(path: Path) -> bool:
    """Return whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder."""
    return any((path / name).is_file() for name in (STATE, SPLITS))


def train_split(path: Path) -> Path:
    """Return the folder of the split `train` of a saved DatasetDict; return any other path unchanged."""
    return path / "train" if (path / SPLITS).is_file() and "train" in _splits(path) else path


def dataset_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a saved dataset, in order.

    Raises:
        DataError: It is a DatasetDict (the message lists its splits), it has an indices mapping, or its metadata is damaged.
    """
    if (folder / SPLITS).is_file():
        splits = _splits(folder)
        raise DataError(
            f"{folder} is a DatasetDict with the splits {listed(splits)}, one split is needed. Try: {folder / splits[0]}"
        )
    state = _read_json(folder / STATE)
    entries = state.get("_data_files")
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{folder / STATE} lists no data files. Save the dataset again")
    if any(state.get(key) for key in ("_indices_files", "_indices_data_files")):
        raise DataError(
            f"{folder} was saved with an indices mapping (a selection or another order of rows), which is not supported. "
            "Try: dataset.flatten_indices().save_to_disk(FOLDER)"
        )
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    return [folder / _plain_name(name, folder / STATE) for name in names]


def content_sha256(path: Path) -> str:
    """Return the hex sha256 of a file; of a saved dataset, the sha256 of the hashes of its Arrow files.

    Raises:
        DataError: See `open_file` and `dataset_files`.
    """
    if is_saved_dataset(path):
        digests = [content_sha256(file) for file in dataset_files(path)]
        return hashlib.sha256("".join(digests).encode()).hexdigest()
    with open_file(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def dataset_records(folder: Path, request: ColumnRequest) -> Records:
    """Stream the requested columns of a saved dataset."""
    row = 0
    for batch, positions in dataset_batches(folder, request):
        names = batch.schema.names
        for start in range(0, batch.num_rows, _BATCH):
            values = (batch.column(position).slice(start, _BATCH).to_pylist() for position in positions)
            for cells in zip(*values, strict=True):
                row += 1
                yield row, [(names[i], cell) for i, cell in zip(positions, cells, strict=True)]


def dataset_batches(folder: Path, request: ColumnRequest) -> Iterator[tuple[pa.RecordBatch, list[int]]]:
    """Stream the record batches of a saved dataset, each with the positions of the requested columns.

    Raises:
        DataError: While iterating, for damaged files, files with different columns, and columns that cannot be selected.
    """
    import pyarrow as pa

    files = dataset_files(folder)
    schema: pa.Schema | None = None
    rows = 0
    for path in files:
        with open_file(path) as stream:
            try:
                reader = pa.ipc.open_stream(stream)
                if schema is None:
                    schema = reader.schema
                    positions = select_columns(schema, request)
                elif reader.schema.names != schema.names or reader.schema.types != schema.types:
                    raise DataError(f"{path} and {files[0]} have different columns")
                for batch in reader:
                    for position in range(batch.num_columns) if request.with_others else positions:
                        batch.column(position).validate(
                            full=True
                        )  # Arrow does not check the offsets of a stream by default
                    yield batch, positions
                    rows += batch.num_rows
            except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError, OverflowError) as error:
                raise DataError(f"{path} is not a complete UTF-8 Arrow stream: {error} (after row {rows})") from error


def parquet_records(stream: io.BufferedIOBase, request: ColumnRequest) -> Records:
    """Stream the requested columns of a parquet file."""
    import pyarrow as pa  # takes 0.3 s, and most files do not need it
    import pyarrow.parquet as pq

    source = io.BytesIO(stream.read()) if request.path.suffix.lower() == ".gz" else stream
    row = 0
    try:
        file = pq.ParquetFile(source)
        names = file.schema_arrow.names
        positions = select_columns(file.schema_arrow, request)
        labels = [names[position] for position in positions]
        # pyarrow selects columns by name alone; where a name is not unique, all are read
        unique = all(names.count(label) == 1 for label in labels)
        for batch in file.iter_batches(batch_size=_BATCH, columns=labels if unique else None):
            columns = (batch.column(key).to_pylist() for key in (labels if unique else positions))
            for cells in zip(*columns, strict=True):
                row += 1
                yield row, list(zip(labels, cells, strict=True))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{request.path} is not a complete UTF-8 parquet file: {error} (after row {row})") from error


def select_columns(schema: pa.Schema, request: ColumnRequest) -> list[int]:
    """Return the positions of the requested columns.

    Raises:
        DataError: They cannot be selected, or a text column does not hold strings.
    """
    import pyarrow.types as types

    positions = request.select(schema.names, len(schema.names))
    for position, role in zip(positions, request.kind.roles, strict=True):
        kind = schema.types[position]
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if role != "score" and not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
            raise DataError(
                f"{request.path}: column {short_name(schema.names[position])} must hold strings, got {kind}"
            )
    return positions


def _splits(folder: Path) -> list[str]:
    splits = _read_json(folder / SPLITS).get("splits")
    if not isinstance(splits, list) or not splits:
        raise DataError(f"{folder / SPLITS} lists no splits. Save the dataset again")
    return [_plain_name(split, folder / SPLITS) for split in splits]


def _plain_name(name: object, source: Path) -> str:
    """Return the name if it is a plain file name: metadata must not refer to files outside its folder."""
    if not is_plain_name(name):
        raise DataError(f"{source} refers to {str(name)[:100]!r}; only names of files in its folder are allowed")
    return name


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; empty for any other JSON value."""
    with open_file(path) as stream:
        try:
            described = json.loads(stream.read())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not valid JSON: {error}") from error
    return described if isinstance(described, dict) else {}
