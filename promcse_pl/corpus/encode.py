"""Encode a corpus into shards of embeddings, resumable and with any number of processes."""

# N rows, D width

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from promcse_pl.corpus.folder import (
    OUTPUT_TYPES,
    SHARD_FORMATS,
    CorpusSettings,
    OutputType,
    Shard,
    ShardFormat,
    check_out,
    check_settings,
    matching_shards,
    remove_input_command,
    shard_name,
    write_manifest,
    write_shard,
)
from promcse_pl.corpus.inputs import InputFile, find_inputs
from promcse_pl.corpus.rows import EMBEDDING, Block, RowSettings, read_blocks
from promcse_pl.data.arrow import content_sha256, dataset_files, is_saved_dataset
from promcse_pl.data.readers import OnBadRow
from promcse_pl.utils.errors import ConfigError, DataError
from promcse_pl.utils.files import atomic_file, remove_leftovers
from promcse_pl.utils.paths import expand, hide_home

if TYPE_CHECKING:
    import pyarrow as pa

    from promcse_pl.embedder import PromCSE

_STALE_SECONDS = 86400.0
"""Age in seconds at which temporary files are removed; newer files may belong to a running process."""


@dataclass(frozen=True, slots=True)
class CorpusOptions:
    """Options of `encode_corpus`.

    Attributes:
        text_column: Name of the text column; None: recognised by its name.
        prompt: Text that is prepended to every text; None: the adapter's default prompt, "": none.
        output_dtype: `float32`, or `float16` with half the size (cosines change by less than 0.001).
        shard_format: `parquet`: all columns and the embeddings in one file; `npy`: embeddings in a .npy file, other columns in a
            parquet file.
        rows_per_shard: Input rows of an output shard, at least 1. An interruption loses at most one shard.
        on_bad_row: "stop" raises an error for a row without a text, "skip" skips it.
        task: (i, n): encode part i of n, from 0. Parts may run in separate processes or on separate machines.
    """

    text_column: str | None = None
    prompt: str | None = None
    output_dtype: OutputType = "float32"
    shard_format: ShardFormat = "parquet"
    rows_per_shard: int = 100_000
    on_bad_row: OnBadRow = "stop"
    task: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        for key, allowed in (
            ("output_dtype", OUTPUT_TYPES),
            ("shard_format", SHARD_FORMATS),
            ("on_bad_row", ("stop", "skip")),
        ):
            if getattr(self, key) not in allowed:
                raise ConfigError(f"{key} must be one of {', '.join(allowed)}, got {getattr(self, key)!r}")
        if type(self.rows_per_shard) is not int or self.rows_per_shard < 1:
            raise ConfigError(f"rows_per_shard must be an integer >= 1, got {self.rows_per_shard!r}")
        number, tasks = self.task
        if not 0 <= number < tasks:
            raise ConfigError(f"the task must be i/n with 0 <= i < n, got {number}/{tasks}. Try: 0/{max(1, tasks)}")


@dataclass(frozen=True, slots=True)
class CorpusProgress:
    """State of `encode_corpus`, reported after every block of texts.

    Attributes:
        rows: Texts encoded by this call.
        seconds: Seconds since the start of the call.
        encoded_bytes: Input bytes of the texts encoded by this call.
        done_bytes: Input bytes that have been encoded, or skipped as finished.
        total_bytes: Input bytes of this task.
        shard: Name of the shard that has just been finished; else None.
    """

    rows: int
    seconds: float
    encoded_bytes: float
    done_bytes: float
    total_bytes: float
    shard: str | None

    @property
    def rows_per_second(self) -> float:
        """Texts encoded per second."""
        return self.rows / max(self.seconds, 1e-9)

    @property
    def done(self) -> float:
        """Fraction of this task's input bytes that have been encoded or skipped."""
        return min(1.0, self.done_bytes / self.total_bytes)

    @property
    def seconds_left(self) -> float | None:
        """Estimated time left; None if unknown."""
        left = max(0.0, self.total_bytes - self.done_bytes)
        return self.seconds * left / self.encoded_bytes if self.encoded_bytes else None


@dataclass(frozen=True, slots=True)
class EncodedCorpus:
    """Result of `encode_corpus`.

    Attributes:
        shards: Number of shards that this call wrote.
        rows: Number of texts in these shards.
        bad_rows: Number of rows that were skipped in these shards.
        skipped: Number of shards that earlier calls had finished.
    """

    shards: int
    rows: int
    bad_rows: int
    skipped: int


@dataclass(frozen=True, slots=True)
class CorpusPlan:
    """Inputs, output folder and settings of an `encode_corpus` call.

    Attributes:
        files: The input files.
        out: The output folder.
        options: See `CorpusOptions`.
        settings: The settings in the manifest of the folder.
    """

    files: Sequence[InputFile]
    out: Path
    options: CorpusOptions
    settings: CorpusSettings


ProgressCallback = Callable[[CorpusProgress], None]
CorpusEngine = Callable[[CorpusPlan, ProgressCallback | None], EncodedCorpus]
"""Function that writes the unfinished shards of a plan. The caller writes the manifest and checks the output folder."""


# six parameters: model, inputs, output, and how to encode
def encode_corpus(
    model: PromCSE,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    options: CorpusOptions | None = None,
    report: ProgressCallback | None = None,
    engine: CorpusEngine | None = None,
) -> EncodedCorpus:
    """Write the embeddings (unit length) of all texts of some files to a folder of shards.

    Finished shards are skipped, so repeating the call resumes an interrupted one, with bit-identical files. Memory use does
    not depend on the size of the files; the descriptions of all finished shards are in memory.

    Args:
        model: The adapter with its encoder.
        inputs: Files, folders and patterns, see `find_inputs`; all tasks need the same.
        out: Output folder: absent, empty, or written with the same adapter and options.
        options: See `CorpusOptions`.
        report: Function that is called after every block of texts.
        engine: Encodes the shards; None: this process encodes them. See `promcse_pl.interop.ray.RayCorpusEngine`.

    Raises:
        DataError: An input is missing, broken or has changed since some of its shards were written, a row is bad, or `out` has
            other content, or a concurrent call with other settings has written to it.
        AdapterError, ConfigError: The shards in `out` were written with another adapter or other options.
    """
    options, out = options or CorpusOptions(), expand(out)
    files = find_inputs(inputs, out=out)
    check_out(out)
    settings = check_settings(out, corpus_settings(model, options))
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out, older_than=_STALE_SECONDS)
    write_manifest(out, settings, [file.name for file in files])
    try:
        plan = CorpusPlan(files, out, options, settings)
        done = encode_task(model, plan, report) if engine is None else engine(plan, report)
    finally:
        write_manifest(out, settings, [file.name for file in files])
    matching_shards(out, settings)
    return done


def corpus_settings(model: PromCSE, options: CorpusOptions) -> CorpusSettings:
    """Return the settings that are stored in the manifest."""
    backbone = model.encoder.backbone
    return CorpusSettings(
        adapter=model.adapter_hash(),
        encoder=hide_home(backbone.identity.name),
        width=model.width,
        prompt=model.encoder.text.prompt_text(None, options.prompt),
        precision=backbone.precision,
        text_column=options.text_column,
        on_bad_row=options.on_bad_row,
        rows_per_shard=options.rows_per_shard,
        output_dtype=options.output_dtype,
        shard_format=options.shard_format,
    )


def encode_task(model: PromCSE, plan: CorpusPlan, report: ProgressCallback | None) -> EncodedCorpus:
    """Encode the part `plan.options.task` of a corpus in this process."""
    return _Task(model, plan).run(report)


class _Task:
    """The part of a corpus that one process encodes."""

    def __init__(self, model: PromCSE, plan: CorpusPlan) -> None:
        self.model, self.out, self.options, self.settings = model, plan.out, plan.options, plan.settings
        number, tasks = self.options.task
        self.has_whole_files = len(plan.files) >= tasks
        self.files = [
            (index, file)
            for index, file in enumerate(plan.files)
            if not self.has_whole_files or index % tasks == number
        ]
        self.finished: dict[str, dict[int, Shard]] = {}
        for shard in matching_shards(self.out, self.settings):
            self.finished.setdefault(shard.input, {})[shard.number] = shard
        self.shards = self.rows = self.bad_rows = self.skipped = 0
        self.meter = _Meter(sum(input_bytes(file) for _, file in self.files), 1 if self.has_whole_files else tasks)

    def run(self, report: ProgressCallback | None) -> EncodedCorpus:
        """Encode the shards of this task that are not finished."""
        self.meter.report = report
        for index, file in self.files:
            self._encode_file(index, file)
        return EncodedCorpus(self.shards, self.rows, self.bad_rows, self.skipped)

    def _owns(self, index: int, shard: int) -> bool:
        """Return whether this task encodes a shard of a file: whole files are distributed, or shards if there are few files."""
        number, tasks = self.options.task
        return self.has_whole_files or (index + shard) % tasks == number

    def _encode_file(self, index: int, file: InputFile) -> None:
        version, sha256, size = _version(file.path), content_sha256(file.path), input_bytes(file)
        finished = self.finished.get(file.name, {})
        if any(shard.input_sha256 != sha256 for shard in finished.values()):
            raise DataError(
                f"{file.path} has changed since its shards in {self.out} were written. To encode it again: "
                f"{remove_input_command(self.out, file.name)}, then the same command; or give another --out"
            )

        def is_wanted(shard: int) -> bool:
            return self._owns(index, shard) and shard not in finished

        self.skipped += sum(self._owns(index, shard) for shard in finished)
        last = max(finished, default=-1)
        if last >= 0 and finished[last].is_last and not any(map(is_wanted, range(last))):
            self.meter.skip(size)
            return
        rows = RowSettings(self.options.text_column, self.options.on_bad_row, self.options.rows_per_shard)
        blocks = self.meter.positions(read_blocks(file.path, rows, is_wanted), size)
        for block in blocks:
            if block.table is None:
                continue
            shard = self._write(shard_name(file.name, block.shard), chain([block], blocks))
            if _version(file.path) != version:
                raise DataError(f"{file.path} was changed while it was read. Run the command again")
            write_shard(self.out, dataclasses.replace(shard, input=file.name, number=block.shard, input_sha256=sha256))
            self.shards, self.bad_rows = self.shards + 1, self.bad_rows + shard.bad_rows
            self.rows += shard.rows
            self.meter.finish(shard.name)

    def _write(self, name: str, blocks: Iterator[Block]) -> Shard:
        """Encode the rows of a shard and write its files; the caller adds the fields of the input file.

        No block of the next shard is taken: an error in it must not lose this shard.
        """
        import pyarrow.parquet as pq

        is_npy, width = self.options.shard_format == "npy", self.model.width
        paths = [self.out / f"{name}.parquet", *([self.out / f"{name}.npy"] if is_npy else [])]
        writer, rows, bad_rows = None, 0, 0
        with ExitStack() as stack:
            temporary = [stack.enter_context(atomic_file(path)) for path in paths]
            vectors = stack.enter_context(NpyWriter(temporary[1], width, self.options.output_dtype)) if is_npy else None
            for block in blocks:
                assert block.table is not None
                texts = block.texts
                embeddings_ND = self.model.encode(texts, prompt=self.options.prompt, progress=self.meter.encoded)
                self.meter.add(len(texts))
                rows, bad_rows = rows + len(texts), bad_rows + block.bad_rows
                embeddings_ND = embeddings_ND.astype(self.options.output_dtype)
                if vectors is not None:
                    vectors.write(embeddings_ND)
                table = block.table if is_npy else block.table.append_column(EMBEDDING, fixed_size_lists(embeddings_ND))
                if writer is None:
                    writer = stack.enter_context(
                        pq.ParquetWriter(temporary[0], table.schema, **_compression(table.schema))
                    )
                writer.write_table(table)
                if block.next_shard != block.shard:
                    break
        files = {path.name: {"bytes": path.stat().st_size, "sha256": content_sha256(path)} for path in paths}
        columns = table.schema.names
        is_last, settings = block.next_shard is None, self.settings.sha256
        return Shard(name, "", 0, is_last, "", settings, rows, bad_rows, block.text_column, columns, files)


class NpyWriter:
    """Writes rows of embeddings to a .npy file whose number of rows is not known in advance.

    Args:
        path: The file.
        width: D.
        dtype: Type of the stored embeddings.
    """

    def __init__(self, path: Path, width: int, dtype: str) -> None:
        self._file = path.open("wb")
        self._width, self._dtype, self._rows = width, np.dtype(dtype), 0
        self._write_header()

    def __enter__(self) -> NpyWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        self._write_header()  # numpy pads the header, so that a larger number of rows fits in
        self._file.close()

    def write(self, embeddings_ND: NDArray[Any]) -> None:
        """Append rows."""
        self._file.write(np.ascontiguousarray(embeddings_ND).tobytes())
        self._rows += len(embeddings_ND)

    def _write_header(self) -> None:
        about = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._rows, self._width)}
        np.lib.format.write_array_header_1_0(self._file, about)


class _Meter:
    """Measures the rate of encoding and estimates the time left from the bytes of the input files.

    Args:
        total: Bytes of the input files.
        tasks: Number of tasks that share the files.
    """

    def __init__(self, total: int, tasks: int) -> None:
        self.report: ProgressCallback | None = None
        self._total, self._tasks = max(1, total), tasks
        self._skipped = self._encoded = 0.0
        self._rows = self._rows_of_block = 0
        self._start = time.monotonic()

    def skip(self, size: float) -> None:
        """Count bytes that this process does not encode."""
        self._skipped += size

    def positions(self, blocks: Iterator[Block], size: int) -> Iterator[Block]:
        """Yield the blocks of a file and count their bytes."""
        before = 0.0
        for block in blocks:
            share, before = max(0.0, block.done - before) * size, max(before, block.done)
            if block.table is None:
                self._skipped += share
            else:
                self._encoded += share
            yield block

    def encoded(self, rows_of_block: int) -> None:
        """Report progress within a block."""
        self._rows_of_block = rows_of_block
        self._send(None)

    def add(self, rows: int) -> None:
        """Count an encoded block."""
        self._rows, self._rows_of_block = self._rows + rows, 0

    def finish(self, shard: str) -> None:
        """Report a finished shard."""
        self._send(shard)

    def _send(self, shard: str | None) -> None:
        if self.report is None:
            return
        seconds, rows = time.monotonic() - self._start, self._rows + self._rows_of_block
        done = (self._skipped + self._encoded) / self._tasks
        self.report(CorpusProgress(rows, seconds, self._encoded, done, self._total / self._tasks, shard))


def fixed_size_lists(embeddings_ND: NDArray[Any]) -> pa.Array:
    """Return embeddings as a column of fixed-size lists."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(embeddings_ND.reshape(-1)), embeddings_ND.shape[1])


def _compression(schema: pa.Schema) -> dict[str, Any]:
    """Return parquet options: no dictionary encoding or statistics for embeddings, whose values hardly repeat."""
    import pyarrow.types as types

    plain = [field.name for field in schema if not types.is_nested(field.type)]
    return {"compression": "zstd", "use_dictionary": plain, "write_statistics": plain}


def _files(path: Path) -> list[Path]:
    return dataset_files(path) if is_saved_dataset(path) else [path]


def input_bytes(file: InputFile) -> int:
    """Return the size of an input file."""
    return sum(part.stat().st_size for part in _files(file.path))


def _version(path: Path) -> list[tuple[int, int]]:
    """Return size and modification time of each file, which reveal changes while it is read."""
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in _files(path)]
