"""An index of sentences, searched by cosine similarity: in memory, and as a folder on disk."""

# N sentences, Q queries, D width, R candidates of one query

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray

from promcse_pl.models.weights import file_sha256, read_json_object
from promcse_pl.utils.errors import AdapterError, ConfigError, DataError, PromcseError
from promcse_pl.utils.files import current, own_description, read_unchanged, refuse_taken, update_folder
from promcse_pl.utils.locks import Lock
from promcse_pl.utils.paths import expand
from promcse_pl.version import __version__

Kind = Literal["exact", "flat", "ivf"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Hit = tuple[str, float]
"""A sentence and its cosine with the query."""


class SearchOptions(TypedDict, total=False):
    """Options of `PromCSE.search`."""

    top_k: int
    threshold: float | None
    prompt_name: str | None
    prompt: str | None


FORMAT = 2
"""Incremented when older versions could misread a newer folder, or when the definition of the adapter hash changes."""
DESCRIPTION, SENTENCES = "index.json", "sentences.json"
VECTORS = {"exact": "vectors.npy", "flat": "vectors.faiss", "ivf": "vectors.faiss"}
DECIMALS = 6
"""Decimals of a score. Further decimals of float32 embeddings are noise; without them equal sentences have equal scores."""
SLACK = 2e-6
"""Upper bound on the rounding error of a float32 cosine; scores this close to the limit are computed again in float64."""
BLOCK_QUERIES, BLOCK_ROWS = 256, 65536
"""Size of the block of scores that exact search keeps in memory: 64 MiB."""


class SentenceIndex:
    """Sentences and their normalised embeddings, with search by cosine similarity. Thread-safe.

    Args:
        kind: `exact`: numpy, all embeddings; `flat`: FAISS, all embeddings; `ivf`: FAISS, only the 10 % of the IVF cells
            nearest to the query: fast on millions of sentences, but may miss hits.

    Raises:
        ConfigError: An unknown kind, or one that needs FAISS where it is not installed.

    Examples:
        >>> index = SentenceIndex()
        >>> index.add(np.eye(2, dtype=np.float32), ["east", "north"])
        >>> index.search(np.array([[0.8, 0.6]], dtype=np.float32), top_k=2, threshold=0.7)
        [[('east', 0.8)]]
    """

    def __init__(self, kind: Kind = "exact") -> None:
        if kind not in KINDS:
            raise ConfigError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if kind != "exact":
            faiss_library()  # raises if it is not installed, before a million sentences are encoded
        self.kind = kind
        self.sentences: list[str] = []
        self._vectors: Any = None  # (N, D) float32 of an exact index, else the FAISS index
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self.sentences)

    def add(self, vectors_ND: NDArray[np.float32], sentences: Sequence[str]) -> None:
        """Append sentences. The first call on an `ivf` index also trains its IVF centroids; pass a representative sample.

        Args:
            vectors_ND: Normalised embeddings, one row per sentence.
            sentences: The sentences, returned by `search`.
        """
        assert len(vectors_ND) == len(sentences)
        if not len(sentences):
            return
        with self._lock:
            if self.kind == "exact":
                parts = [vectors_ND] if self._vectors is None else [self._vectors, vectors_ND]
                self._vectors = np.concatenate(parts)
            else:
                if self._vectors is None:
                    self._vectors = _new_faiss_index(vectors_ND, self.kind)
                self._vectors.add(vectors_ND)
            self.sentences += sentences

    def search(
        self, queries_QD: NDArray[np.float32], *, top_k: int = 5, threshold: float | None = None
    ) -> list[list[Hit]]:
        """Return the nearest sentences of each query, best first; equal scores in the order they were added.

        With FAISS, equal scores at the end of a full list are selected by FAISS.

        Args:
            queries_QD: Normalised embeddings, one row per query.
            top_k: Maximum number of hits per query, at least 1.
            threshold: Minimum cosine of a hit, in [-1, 1]; None: no minimum.

        Returns:
            For each query a list of (sentence, cosine), cosines in [-1, 1].

        Raises:
            ConfigError: top_k or threshold out of range.
            DataError: The index is empty.
        """
        check_search(top_k, threshold)
        threshold = -1.0 if threshold is None else threshold
        with self._lock:
            if self._vectors is None:
                raise DataError("the index is empty: add sentences before you search")
            if self.kind == "exact":
                found = self._search_exactly(queries_QD, top_k, threshold)
            else:
                scores_QR, rows_QR = self._vectors.search(queries_QD, min(top_k, len(self)))
                found = [  # FAISS pads with row number -1
                    best_hits(scores_R[rows_R >= 0], rows_R[rows_R >= 0], top_k, threshold)
                    for scores_R, rows_R in zip(scores_QR, rows_QR, strict=True)
                ]
            return [
                [(self.sentences[row], score) for row, score in zip(rows_R.tolist(), scores_R.tolist(), strict=True)]
                for scores_R, rows_R in found
            ]

    def _search_exactly(self, queries_QD: NDArray[np.float32], top_k: int, threshold: float) -> list[_Ranked]:
        found: list[_Ranked] = [(np.empty(0), np.empty(0, dtype=np.intp)) for _ in queries_QD]
        for first_query in range(0, len(queries_QD), BLOCK_QUERIES):
            for first_row in range(0, len(self), BLOCK_ROWS):
                block_ND = self._vectors[first_row : first_row + BLOCK_ROWS]
                scores_QN = queries_QD[first_query : first_query + BLOCK_QUERIES] @ block_ND.T
                for query, scores_N in enumerate(scores_QN, first_query):
                    rows_R = np.flatnonzero(scores_N >= threshold - SLACK)
                    if len(rows_R) > top_k:
                        rows_R = rows_R[scores_N[rows_R] >= np.partition(scores_N[rows_R], -top_k)[-top_k] - SLACK]
                    scores_R = np.einsum("rd,d->r", block_ND[rows_R], queries_QD[query], dtype=np.float64)
                    scores_R = np.concatenate([found[query][0], scores_R])
                    rows_R = np.concatenate([found[query][1], rows_R + first_row])
                    found[query] = best_hits(scores_R, rows_R, top_k, threshold)
        return found

    def save(self, folder: str | Path, *, adapter: str) -> None:
        """Write the index to a folder; an index that is already there is replaced atomically.

        Args:
            folder: Absent, empty, or the folder of an index; other files in it are kept.
            adapter: Hash of the adapter that computed the embeddings; `load` requires the same.

        Raises:
            AdapterError: The folder cannot be written, or contains something other than an index.
            DataError: The index is empty.
        """
        folder = expand(folder)
        if self._vectors is None:
            raise DataError("the index is empty: add sentences before you save it")
        if own_description(folder, DESCRIPTION, {"format", "promcse_pl", "adapter", "sha256"}) is None:
            refuse_taken(folder, error=AdapterError)
        files = (SENTENCES, *VECTORS.values(), DESCRIPTION)
        with self._lock, update_folder(folder, files, error=AdapterError) as new:
            names = (SENTENCES, VECTORS[self.kind])
            (new / SENTENCES).write_text(json.dumps(self.sentences), encoding="utf-8")
            if self.kind == "exact":
                np.save(new / names[1], self._vectors)
            else:
                write_faiss(self._vectors, new / names[1])
            about = {"format": FORMAT, "promcse_pl": __version__, "kind": self.kind, "adapter": adapter}
            about |= {"sha256": {name: file_sha256(new / name) for name in names}}
            (new / DESCRIPTION).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, *, adapter: str, width: int) -> SentenceIndex:
        """Read a folder that `save` wrote. Nothing in it is unpickled.

        Args:
            folder: The index's folder.
            adapter: Hash of the adapter that will encode the queries.
            width: D, the dimension of its embeddings.

        Raises:
            AdapterError: The index was built with another adapter.
            DataError: The folder is not an index, has another format, or a file is missing, truncated, modified or
                inconsistent with the others.
            ConfigError: It needs FAISS, which is not installed.
        """
        folder = expand(folder)
        return read_unchanged(folder, DESCRIPTION, lambda: cls._load(folder, adapter, width))

    @classmethod
    def _load(cls, folder: Path, adapter: str, width: int) -> SentenceIndex:
        try:
            about = read_json_object(current(folder, DESCRIPTION))
            if about["format"] != FORMAT:
                newer = isinstance(about["format"], int) and about["format"] > FORMAT
                raise DataError(
                    f"{folder} has format {about['format']!r} (written by promcse_pl {about.get('promcse_pl')}); this version "
                    f"({__version__}) reads {FORMAT}. Try: {'pip install --upgrade promcse_pl, or ' if newer else ''}build the "
                    "index again with build_index and save_index"
                )
            index, sums = cls(about["kind"]), about["sha256"]
            if about["adapter"] != adapter:
                raise AdapterError(
                    f"the embeddings in {folder} were computed by another adapter ({str(about['adapter'])[:12]}…, this one is "
                    f"{adapter[:12]}…), encoder or tokenizer, so the cosines would be meaningless. Load that adapter, or build "
                    "the index again"
                )
            sentences, vectors = current(folder, SENTENCES), current(folder, VECTORS[index.kind])
            for path in (sentences, vectors):
                if file_sha256(path) != sums[path.name]:
                    raise DataError(f"{path} is truncated or was modified: build the index again")
            index.sentences = json.loads(sentences.read_text(encoding="utf-8"))
            if not isinstance(index.sentences, list) or not all(isinstance(text, str) for text in index.sentences):
                raise DataError(f"{sentences} must contain a list of strings. Build the index again")
            shape = len(index.sentences), width
            index._vectors = _read_npy(vectors, shape) if index.kind == "exact" else read_faiss(vectors, shape)
        except FileNotFoundError as error:
            raise DataError(
                f"{folder} is not a complete index: {error.filename} is missing. Write one with save_index"
            ) from None
        except PromcseError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError) as error:
            raise DataError(f"{folder} is not an index, or is damaged: {type(error).__name__}: {error}") from error
        return index


def _read_npy(path: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Read vectors; the file is memory-mapped, so that numpy checks its size before it allocates memory."""
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    if mapped.shape != shape or mapped.dtype != np.float32:
        raise ValueError(f"{path} contains {mapped.dtype} of shape {mapped.shape}, expected float32 of shape {shape}")
    vectors_ND: NDArray[np.float32] = np.array(mapped)
    if not np.isfinite(vectors_ND).all():
        raise ValueError(f"{path} contains non-finite values")
    return vectors_ND


def read_faiss(path: Path, shape: tuple[int, int], *, compressed: bool = False) -> Any:  # noqa: ANN401
    """Read a FAISS index; its header consists of the kind (4 bytes), the width (int32) and the number of vectors (int64).

    Args:
        path: The file.
        shape: (N, D).
        compressed: Whether it stores codes instead of float32 vectors.

    Raises:
        ValueError: It has another shape, or is truncated.
        OSError, RuntimeError: It cannot be read.
    """
    with path.open("rb") as file:
        header = file.read(16)
    width, rows = (int.from_bytes(part, "little", signed=True) for part in (header[4:8], header[8:16]))
    if (rows, width) != shape or (1 if compressed else 4 * width) * rows > path.stat().st_size:
        raise ValueError(f"{path} declares {rows} vectors of width {width}, expected {shape}")
    index = faiss_library().read_index(str(path))
    if (index.ntotal, index.d) != shape:
        raise ValueError(f"{path} contains {index.ntotal} vectors of width {index.d}, expected {shape}")
    return index


def check_search(top_k: int, threshold: float | None) -> None:
    """Raise a ConfigError if a parameter of `SentenceIndex.search` is out of range."""
    if not isinstance(top_k, int | np.integer) or top_k < 1:
        raise ConfigError(f"top_k must be an integer >= 1, got {top_k!r}")
    if threshold is not None and not -1 <= threshold <= 1:
        raise ConfigError(f"threshold must lie in [-1, 1] (a cosine), got {threshold!r}")


_Ranked = tuple[NDArray[np.float64], NDArray[np.intp]]


def best_hits(scores_R: NDArray[Any], rows_R: NDArray[np.intp], top_k: int, threshold: float) -> _Ranked:
    """Return the `top_k` highest scores >= `threshold` and their rows; for equal scores, the lower rows."""
    scores_R = scores_R.astype(np.float64).round(DECIMALS).clip(-1, 1)
    keep_R = scores_R >= threshold
    if len(scores_R) > top_k:
        keep_R &= scores_R >= np.partition(scores_R, -top_k)[-top_k]
    scores_R, rows_R = scores_R[keep_R], rows_R[keep_R]
    order_R = np.lexsort((rows_R, -scores_R))[:top_k]
    return scores_R[order_R], rows_R[order_R]


def _new_faiss_index(vectors_ND: NDArray[np.float32], kind: Kind) -> Any:  # noqa: ANN401
    """Return an empty FAISS index; the centroids of an `ivf` index are trained on the embeddings."""
    faiss, (rows, width) = faiss_library(), vectors_ND.shape
    flat = faiss.IndexFlatIP(width)
    if kind == "flat":
        return flat
    # about as many cells as embeddings per cell, and at least the 39 training embeddings per cell that FAISS recommends
    cells = max(1, min(math.isqrt(rows), rows // 39))
    index = faiss.IndexIVFFlat(flat, width, cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # no warning about a single cell with few vectors
    index.nprobe = math.ceil(cells / 10)
    index.train(vectors_ND)
    return index


def write_faiss(index: Any, path: Path) -> None:  # noqa: ANN401
    """Write a FAISS index.

    Raises:
        OSError: It cannot be written.
    """
    try:
        faiss_library().write_index(index, str(path))
    except RuntimeError as error:  # raised by FAISS if the disk is full
        raise OSError(str(error)) from error


def faiss_library() -> Any:  # noqa: ANN401
    """Return the module faiss.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError:
        raise ConfigError("all index kinds but exact need FAISS. Try: pip install 'promcse_pl[faiss]'") from None
