"""FAISS indexes of an encoded corpus; texts and other columns stay in its shards."""

# N rows, Q queries, D width, S sampled rows, R candidates

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from promcse_pl.corpus.folder import INDEX_DESCRIPTION as DESCRIPTION
from promcse_pl.corpus.folder import (
    Shard,
    complete_shards,
    finished_shards,
    read_settings,
    read_shard,
    remove_command,
)
from promcse_pl.corpus.rows import BLOCK_ROWS, EMBEDDING
from promcse_pl.data.arrow import content_sha256
from promcse_pl.index import best_hits, check_search, faiss_library, read_faiss, write_faiss
from promcse_pl.utils.errors import AdapterError, ConfigError, DataError, PromcseError
from promcse_pl.utils.files import current, own_description, read_unchanged, refuse_taken, update_folder
from promcse_pl.utils.paths import expand, require_regular_file
from promcse_pl.version import __version__

log = logging.getLogger(__name__)

CorpusKind = Literal["flat", "hnsw", "ivfpq"]
CORPUS_KINDS: tuple[CorpusKind, ...] = get_args(CorpusKind)
FORMAT = 1
"""Incremented when older versions could misread a newer folder."""
VECTORS = "vectors.faiss"
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 200, 128
"""M, efConstruction and minimum efSearch of HNSW. A vector takes 4 D + 8 M bytes."""
TRAIN_ROWS_PER_CELL = 64
"""Training vectors of an IVF cell. FAISS recommends at least 39, more give slightly better centroids."""
CODE_DIMENSIONS = 4
"""Dimensions per byte of a product-quantiser code: 96 bytes for D = 384."""
MINIMUM_IVFPQ = 2
"""Rows for a product quantiser with codes of one bit."""
SEED = 0


@dataclass(frozen=True, slots=True)
class CorpusHit:
    """A row that a search found.

    Attributes:
        score: Its cosine with the query; an estimate for `ivfpq`.
        text: Its text.
        columns: Its other columns, without the embedding.
    """

    score: float
    text: str
    columns: dict[str, Any]


def build_corpus_index(
    folder: str | Path, kind: CorpusKind, *, report: Callable[[int, int], None] | None = None
) -> Path:
    """Build a FAISS index of all shards of an encoded corpus and write it to a subfolder with the name of the kind.

    The centroids and the product quantiser of `ivfpq` are trained on a random sample; then one shard is added at a time, so
    the memory is that of the index.

    Args:
        folder: Output folder of `encode_corpus`; every input must be complete.
        kind: `flat`: exact, 4 D bytes a vector; `hnsw`: a graph, 4 D + 256 bytes; `ivfpq`: compressed, D / 4 + 8 bytes.
        report: Function that is called with the number of vectors added and their total.

    Returns:
        The folder of the index.

    Raises:
        ConfigError: An unknown kind, or FAISS is not installed.
        DataError: The corpus is incomplete, damaged or too small for the kind, or the subfolder has other content.
    """
    folder = expand(folder)
    if kind not in CORPUS_KINDS:
        raise ConfigError(f"kind must be one of {', '.join(CORPUS_KINDS)}, got {kind!r}")
    faiss_library()
    shards = complete_shards(folder)
    settings = read_settings(folder)
    rows = sum(shard.rows for shard in shards)
    if settings is None or not rows:
        raise DataError(f"{folder} has no embeddings")
    if kind == "ivfpq" and rows < MINIMUM_IVFPQ:
        raise DataError(
            f"ivfpq needs at least {MINIMUM_IVFPQ} rows, {folder} has {rows}. Try: {_index_command(folder, 'flat')}"
        )
    out = folder / kind
    if own_description(out, DESCRIPTION, {"format", "promcse_pl", "adapter"}) is None:
        refuse_taken(out)
    index = _new_index(kind, folder, shards, settings.width)
    added = 0
    for vectors_ND in _vectors(folder, shards):
        index.add(vectors_ND)
        added += len(vectors_ND)
        if report:
            report(added, rows)
    with update_folder(out, (VECTORS, DESCRIPTION)) as new:
        write_faiss(index, new / VECTORS)
        about = {
            "format": FORMAT,
            "promcse_pl": __version__,
            "kind": kind,
            "adapter": settings.adapter,
            "width": settings.width,
            "sha256": content_sha256(new / VECTORS),
            "shards": [
                {"name": shard.name, "rows": shard.rows, "input_sha256": shard.input_sha256} for shard in shards
            ],
        }
        (new / DESCRIPTION).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return out


class CorpusIndex:
    """An index that `build_corpus_index` wrote; see `load`."""

    def __init__(self, folder: Path, about: dict[str, Any], vectors: Any) -> None:  # noqa: ANN401
        self.kind: str = about["kind"]
        self._corpus, self._vectors, self._shards = folder.absolute().parent, vectors, about["shards"]
        self._starts = np.cumsum([0, *(shard["rows"] for shard in self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @classmethod
    def load(cls, folder: str | Path, *, adapter: str, width: int) -> CorpusIndex:
        """Read an index. FAISS parses the file: load only indexes from trusted sources.

        Args:
            folder: The index's folder, in the folder of its corpus.
            adapter: Hash of the adapter that will encode the queries.
            width: D, the dimension of its embeddings.

        Raises:
            AdapterError: The corpus was encoded with another adapter.
            DataError: The folder is not an index, or is damaged.
            ConfigError: FAISS is not installed.
        """
        folder = expand(folder)
        if own_description(folder, DESCRIPTION, {"format"}) is None:
            built = [kind for kind in CORPUS_KINDS if own_description(folder / kind, DESCRIPTION, {"format"})]
            advice = f"{folder / built[0]}" if built else _index_command(folder, "ivfpq")
            raise DataError(f"{folder} is not an index of a corpus. Try: {advice}")
        index = read_unchanged(folder, DESCRIPTION, lambda: cls._load(folder, adapter, width))
        index._warn_of_new_shards()
        return index

    def _warn_of_new_shards(self) -> None:
        indexed = {shard["name"] for shard in self._shards}
        new = [shard for shard in finished_shards(self._corpus) if shard.name not in indexed]
        if new:
            command = _index_command(self._corpus, self.kind)
            log.warning("%d shards of %s are not in the index. Try: %s", len(new), self._corpus, command)

    @classmethod
    def _load(cls, folder: Path, adapter: str, width: int) -> CorpusIndex:
        try:
            about = json.loads(require_regular_file(current(folder, DESCRIPTION)).read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise DataError(
                    f"{folder} has format {about['format']!r} (written by promcse_pl {about.get('promcse_pl')}); this version "
                    f"({__version__}) reads {FORMAT}. Try: {_index_command(folder.parent, str(about.get('kind')))}"
                )
            if about["adapter"] != adapter:
                raise AdapterError(
                    f"the embeddings in {folder} were computed by another adapter ({str(about['adapter'])[:12]}…, this one is "
                    f"{adapter[:12]}…), encoder or tokenizer, so the cosines would be meaningless. Load that adapter"
                )
            rows = sum(shard["rows"] for shard in about["shards"])
            path = current(folder, VECTORS)
            if content_sha256(path) != about["sha256"]:
                raise DataError(
                    f"{path} is truncated or was modified. Try: {_index_command(folder.parent, about['kind'])}"
                )
            return cls(folder, about, read_faiss(path, (rows, width), compressed=about["kind"] == "ivfpq"))
        except PromcseError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DataError(f"{folder} is damaged: {type(error).__name__}: {error}. Build it again") from error

    def search(
        self, queries_QD: NDArray[np.float32], *, top_k: int = 5, threshold: float | None = None
    ) -> list[list[CorpusHit]]:
        """Return the nearest rows of each query, best first.

        Args:
            queries_QD: Normalised embeddings, one row per query.
            top_k: Maximum number of hits per query, at least 1.
            threshold: Minimum cosine of a hit, in [-1, 1]; None: no minimum.

        Raises:
            ConfigError: top_k or threshold out of range.
            DataError: A shard is missing or has changed.
        """
        check_search(top_k, threshold)
        if self.kind == "hnsw":
            self._vectors.hnsw.efSearch = max(HNSW_SEARCH, 2 * top_k)
        scores_QR, rows_QR = self._vectors.search(queries_QD, min(top_k, len(self)))
        found = []
        for scores_R, rows_R in zip(scores_QR, rows_QR, strict=True):
            is_hit = rows_R >= 0  # FAISS pads with row number -1
            found.append(best_hits(scores_R[is_hit], rows_R[is_hit], top_k, -1.0 if threshold is None else threshold))
        rows = self._rows(sorted({int(row) for _, rows_R in found for row in rows_R}))
        return [
            [CorpusHit(score, *rows[row]) for score, row in zip(scores_R.tolist(), rows_R.tolist(), strict=True)]
            for scores_R, rows_R in found
        ]

    def _rows(self, numbers: list[int]) -> dict[int, tuple[str, dict[str, Any]]]:
        """Read texts and other columns of rows from the shards: only the row groups that contain them, without embeddings."""
        import pyarrow.parquet as pq

        read: dict[int, tuple[str, dict[str, Any]]] = {}
        for position in sorted({int(np.searchsorted(self._starts, number, side="right")) - 1 for number in numbers}):
            stored, start = self._shards[position], int(self._starts[position])
            shard = read_shard(self._corpus, stored["name"])
            if shard is None or shard.input_sha256 != stored["input_sha256"] or shard.rows != stored["rows"]:
                raise DataError(
                    f"the shard {self._corpus / stored['name']} is missing, or newer than the index. Try: "
                    f"{_index_command(self._corpus, self.kind)}"
                )
            file = pq.ParquetFile(self._corpus / f"{shard.name}.parquet")
            columns = [name for name in shard.columns if name != EMBEDDING]
            wanted = [number - start for number in numbers if 0 <= number - start < shard.rows]
            first = 0
            for group in range(file.num_row_groups):
                stop = first + file.metadata.row_group(group).num_rows
                inside = [row for row in wanted if first <= row < stop]
                if inside:
                    rows = file.read_row_group(group, columns=columns).take([row - first for row in inside]).to_pylist()
                    for row, cells in zip(inside, rows, strict=True):
                        read[start + row] = (cells.pop(shard.text_column), cells)
                first = stop
        return read


def _index_command(corpus: Path, kind: str) -> str:
    return f"promcse index {shlex.quote(str(corpus))} --kind {kind}"


def _check_content(folder: Path, shard: Shard) -> None:
    """Raise a DataError if a file of a shard differs from its checksum."""
    for name, about in shard.files.items():
        if content_sha256(folder / name) != about["sha256"]:
            raise DataError(
                f"{folder / name} was modified or is damaged: its sha256 is not that of {shard.name}.json. Try: "
                f"{remove_command(folder, [shard.name])} and the same promcse encode command again"
            )


def _vectors(folder: Path, shards: list[Shard]) -> Iterator[NDArray[np.float32]]:
    """Yield the embeddings of the shards in blocks (N, D), after a check of each shard's files."""
    import pyarrow.parquet as pq

    for shard in shards:
        _check_content(folder, shard)
        npy = folder / f"{shard.name}.npy"
        if npy.name in shard.files:
            stored_ND = np.load(npy, mmap_mode="r", allow_pickle=False)
            for start in range(0, shard.rows, BLOCK_ROWS):
                yield np.array(stored_ND[start : start + BLOCK_ROWS], dtype=np.float32)
            continue
        file = pq.ParquetFile(folder / f"{shard.name}.parquet", pre_buffer=False)
        for batch in file.iter_batches(batch_size=BLOCK_ROWS, columns=[EMBEDDING]):
            column = batch.column(0)
            yield np.asarray(column.flatten(), dtype=np.float32).reshape(len(column), column.type.list_size)


def _new_index(kind: CorpusKind, folder: Path, shards: list[Shard], width: int) -> Any:  # noqa: ANN401
    faiss = faiss_library()
    if kind == "flat":
        return faiss.IndexFlatIP(width)
    if kind == "hnsw":
        graph = faiss.IndexHNSWFlat(width, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = HNSW_BUILD
        return graph
    rows = sum(shard.rows for shard in shards)
    cells = ivf_cells(rows)
    codes = max(size for size in range(1, max(1, width // CODE_DIMENSIONS) + 1) if width % size == 0)
    bits = 8 if rows >= 256 else max(1, int(math.log2(rows)))
    quantiser = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFPQ(quantiser, width, cells, codes, bits, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # no warning about few vectors
    index.nprobe = ivf_probes(cells)
    index.train(_sample(folder, shards, max(TRAIN_ROWS_PER_CELL * cells, 256 * 256), width))
    return index


def ivf_cells(rows: int) -> int:
    """Return the number of IVF cells: 4 sqrt(N), or fewer to have 39 vectors per cell (FAISS's recommendation)."""
    return max(1, min(4 * math.isqrt(rows), rows // 39))


def ivf_probes(cells: int) -> int:
    """Return the number of cells that a query searches: a sixteenth, at least 8 and at most 256."""
    return min(cells, max(8, min(256, cells // 16)))


def _sample(folder: Path, shards: list[Shard], size: int, width: int) -> NDArray[np.float32]:
    """Return a random sample (S, D) of the embeddings, deterministic for given shards."""
    rows = sum(shard.rows for shard in shards)
    chosen_S = np.sort(np.random.default_rng(SEED).choice(rows, min(size, rows), replace=False))
    sample_SD, start = np.empty((len(chosen_S), width), dtype=np.float32), 0
    for vectors_ND in _vectors(folder, shards):
        first, stop = np.searchsorted(chosen_S, (start, start + len(vectors_ND)))
        sample_SD[first:stop] = vectors_ND[chosen_S[first:stop] - start]
        start += len(vectors_ND)
    return sample_SD
