"""The tokenised dataset cache: rows are tokenised once into a memory-mapped folder, and padded batches gathered from it."""

# N sentences of a batch, T tokens of its longest sentence.

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from promcse_pl.data.arrow import content_sha256
from promcse_pl.data.columns import ColumnRequest, RowKind
from promcse_pl.data.readers import BadRow, OnBadRow, stream_rows
from promcse_pl.data.tokenizer import tokenizer_fingerprint
from promcse_pl.utils.errors import DataError
from promcse_pl.utils.files import publish, remove_leftovers, staging_folder
from promcse_pl.utils.paths import file_suffix, hide_home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_FORMAT = 2  # increase it when the files below, or the rows that the readers return, change
_BATCH = 10_000  # sentences per call of the tokenizer; only the rows of data.dev=holdout are all in memory
_STALE_SECONDS = 24 * 3600


Prepare = Callable[[Sequence[str], str], list[str]]
"""Function from texts and a prompt to the texts that the tokenizer gets."""


@dataclass(frozen=True)
class RowSource:
    """Rows of `width` texts that can be read repeatedly, and a fingerprint of everything that affects them.

    The last value of each row is its score if `is_scored`.
    """

    name: str
    fingerprint: str
    rows: Callable[[list[BadRow]], Iterator[tuple[Any, ...]]]
    """Called with a list that the bad rows are appended to."""
    width: int
    example: tuple[Any, ...] = ()
    """The first row."""
    notes: tuple[str, ...] = ()
    """How the file is read: its columns and delimiter."""
    is_scored: bool = False
    sha256: str = ""
    """sha256 of the file, of the Arrow files of a saved dataset, or of rows in memory."""
    bad_rows: tuple[BadRow, ...] | None = None
    """Bad rows that the fingerprint does not cover, so that a reused token cache may list others; None: it covers them."""


def file_source(
    path: Path, *, kind: RowKind, columns: Sequence[str | int] | None, header: bool | None, on_bad_row: OnBadRow
) -> RowSource:
    """Return the rows of a data file; `kind` is that of its rows, other arguments and errors are as in `read_rows`."""
    notes: list[str] = []
    width = len(kind.roles) - kind.is_scored

    def rows(bad_rows: list[BadRow], notes: list[str] | None = None) -> Iterator[tuple[Any, ...]]:
        request = ColumnRequest(path, kind, columns, header, notes=[] if notes is None else notes)
        return stream_rows(request, on_bad_row, bad_rows)

    content = content_sha256(path)
    example = next(rows([], notes))
    # The path is not part of the fingerprint: a moved file is not tokenised again.
    options = [file_suffix(path), width, None if columns is None else list(columns), header, on_bad_row]
    scored = ["scored"] if kind.is_scored else []  # caches of rows without scores keep their names
    fingerprint = _sha256([content, *options, *scored])
    return RowSource(str(path), fingerprint, rows, width, example, tuple(notes), kind.is_scored, content)


def memory_source(name: str, rows: Sequence[tuple[str, ...]]) -> RowSource:
    """Return rows in memory; raises DataError for no rows, ragged rows and blank texts."""
    if not rows:
        raise DataError(f"{name} holds no rows")
    width = len(rows[0])
    digest = hashlib.sha256()
    for number, row in enumerate(rows):
        if len(row) != width or not all(isinstance(text, str) and text.strip() for text in row):
            raise DataError(f"{name}: row {number} must hold {width} texts that are not blank, got {row}")
        try:
            digest.update(json.dumps(row, ensure_ascii=False).encode())  # quoted: ("ab", "c") and ("a", "bc") differ
        except UnicodeEncodeError as error:
            raise DataError(f"{name}: row {number} holds a lone surrogate, which no tokenizer accepts") from error
    return RowSource(name, digest.hexdigest(), lambda _: iter(rows), width, rows[0], sha256=digest.hexdigest())


def prepare_rows(source: RowSource, prompts: Sequence[str], prepare: Prepare) -> RowSource:
    """Return a source whose texts have their prompts prepended and are in lower case if the encoder needs that.

    Args:
        source: The rows.
        prompts: One text for each text of a row, to put in front of it; "" for none.
        prepare: Puts a prompt in front of texts, and converts them to lower case if the encoder needs that.

    Returns:
        Rows with another fingerprint, or the source itself if no text changes: caches of earlier versions stay valid.
    """
    probe = "Aa"
    effects = [prepare([probe], prompt)[0] for prompt in prompts]
    if all(effect == probe for effect in effects):
        return source

    def prepare_row(row: tuple[Any, ...]) -> tuple[Any, ...]:
        texts = (prepare([text], prompt)[0] for text, prompt in zip(row, prompts, strict=not source.is_scored))
        return (*texts, *row[source.width :])

    return replace(
        source,
        fingerprint=_sha256([source.fingerprint, effects]),
        rows=lambda bad_rows: map(prepare_row, source.rows(bad_rows)),
        example=prepare_row(source.example) if source.example else (),
    )


class TokenRows:
    """Token ids of all rows, memory-mapped read-only: worker processes share one copy.

    Attributes:
        width: Texts per row.
        scores_R: Score of each row, float32; None for rows without scores.
        bad_rows: Rows of the source that were skipped.
        truncated: Sentences that lost tokens to max_length.
        tokens_total: Tokens of all sentences, special tokens included.
        fingerprint: Name of the cache folder: a hash of rows, tokenizer and max_length.
        reused: Whether the cache existed before.
    """

    def __init__(self, folder: Path, name: str, *, reused: bool) -> None:
        meta = _read_meta(folder)
        self._folder, self._name, self._rows, self._pad_id = folder, name, int(meta["rows"]), int(meta["pad_id"])
        self.width = int(meta["width"])
        # The current path, not that of the run that built the cache.
        self.bad_rows = [BadRow(name, line, reason) for line, reason in meta["bad_rows"]]
        self.truncated = int(meta["truncated"])
        self.tokens_total = int(meta["tokens"])
        self.fingerprint = folder.name
        self.reused = reused
        self._ids: npt.NDArray[np.int32] = np.memmap(folder / "ids.bin", np.int32, "r")
        self._offsets: npt.NDArray[np.int64] = np.memmap(folder / "offsets.bin", np.int64, "r")
        self.scores_R: npt.NDArray[np.float32] | None = None
        if "scores.bin" in meta["sha256"]:
            self.scores_R = np.memmap(folder / "scores.bin", np.float32, "r")

    def __len__(self) -> int:
        return self._rows

    def __reduce__(self) -> tuple[Any, ...]:
        # numpy pickles a memory map with its content; a spawned worker maps the files again instead.
        return partial(TokenRows, reused=self.reused), (self._folder, self._name)

    def fetch(self, rows: npt.NDArray[np.integer[Any]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Gather rows: all first texts, then all second texts, then all third.

        Args:
            rows: Row numbers, each in [0, len(self)), repeated or not.

        Returns:
            ids_NT, padded on the right to the longest sentence, and lengths_N, with N = width * len(rows).
        """
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= self._rows:
            raise IndexError(f"row numbers must be in [0, {self._rows}), got {rows}")
        sentences_N = (rows.astype(np.int64) * self.width + np.arange(self.width)[:, None]).ravel()
        starts_N = self._offsets[sentences_N]
        lengths_N = self._offsets[sentences_N + 1] - starts_N
        positions_T = np.arange(lengths_N.max())
        real_NT = positions_T < lengths_N[:, None]
        ids_NT = np.full(real_NT.shape, self._pad_id, dtype=np.int64)
        ids_NT[real_NT] = self._ids[(starts_N[:, None] + positions_T)[real_NT]]
        return ids_NT, lengths_N


def load_tokens(
    source: RowSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    cache_dir: Path,
    vocabulary: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> TokenRows:
    """Map the token ids of a source, tokenising it first unless cache_dir has them.

    Safe to call from several processes at once: each builds its own folder, the first to finish publishes it.

    Args:
        source: The rows.
        tokenizer: Its truncation side and special tokens are used, and its padding token is stored with the cache.
        max_length: Maximum number of tokens of a sentence, special tokens included.
        cache_dir: Folder of caches; created if absent.
        vocabulary: V, the rows of the encoder's embedding matrix, if the tokenizer may have special tokens without one.
        progress: Called with the number of sentences done so far.

    Raises:
        DataError: A bad row, a sentence or tokenizer that cannot be used, or a cache_dir that cannot be written.
    """
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise DataError(f"data.max_length must exceed the {special} special tokens of the tokenizer, got {max_length}")
    if tokenizer.pad_token_id is None:
        raise DataError("the tokenizer has no padding token. Try: tokenizer.pad_token = tokenizer.eos_token")
    limit = vocabulary if vocabulary is not None and vocabulary < len(tokenizer) else None
    described = [_FORMAT, source.fingerprint, source.width, tokenizer_fingerprint(tokenizer), max_length]
    key = _sha256(described if limit is None else [*described, limit])
    folder = cache_dir / "tokens" / key
    if _is_whole(folder):
        return _open(folder, source, reused=True)
    if folder.exists():
        log.warning("The token cache %s of %s is damaged and will be rebuilt.", folder, source.name)
    try:
        with staging_folder(folder.parent) as staged:
            # A running writer updates its files all the time.
            remove_leftovers(folder.parent, older_than=_STALE_SECONDS)
            _write(staged, source, tokenizer, max_length, limit, progress)
            try:
                publish(staged, folder)
            except OSError:
                if not _is_whole(folder):  # else another process has published an identical folder
                    publish(staged, folder, replace=True)
    except OSError as error:
        raise DataError(f"the token cache {folder} cannot be written: {error}. Try: data.cache_dir=FOLDER") from error
    return _open(folder, source, reused=False)


def _open(folder: Path, source: RowSource, *, reused: bool) -> TokenRows:
    rows = TokenRows(folder, source.name, reused=reused)
    if source.bad_rows is not None:
        rows.bad_rows = [*source.bad_rows]
    return rows


def require_embeddings(
    tokenizer: PreTrainedTokenizerBase, ids: npt.NDArray[np.integer[Any]], vocabulary: int, texts: str
) -> None:
    """Check that the encoder has an embedding for every token.

    Args:
        tokenizer: Names the token in the message.
        ids: Token ids, of any shape.
        vocabulary: V, the rows of the encoder's embedding matrix.
        texts: The texts in the message.

    Raises:
        DataError: An id is not in [0, V).
    """
    largest = int(ids.max(initial=0))
    if largest >= vocabulary:
        raise DataError(
            f"{texts}: the encoder has no embedding for the token {tokenizer.convert_ids_to_tokens(largest)!r} (id {largest}; "
            f"the largest id with an embedding is {vocabulary - 1}). Remove this token from the texts"
        )


def _write(
    folder: Path,
    source: RowSource,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    vocabulary: int | None,
    progress: Callable[[int], None] | None,
) -> None:
    bad_rows: list[BadRow] = []
    sentences = tokens = truncated = 0
    scores = array("f")  # 4 bytes per row
    texts = _texts(source, bad_rows, scores)
    ids_hash, offsets_hash = hashlib.sha256(), hashlib.sha256(first := np.zeros(1, np.int64).tobytes())
    with (folder / "ids.bin").open("wb") as ids_file, (folder / "offsets.bin").open("wb") as offsets_file:
        offsets_file.write(first)
        while batch := list(islice(texts, _BATCH)):
            ids, cut = _tokenize(tokenizer, batch, max_length)
            lengths_N = np.fromiter(map(len, ids), np.int64, len(ids))
            if not lengths_N.all():
                raise DataError(f"{source.name}: no token is left of the text {batch[int(lengths_N.argmin())]!r}")
            ids_all = np.fromiter(chain.from_iterable(ids), np.int32)
            if vocabulary is not None:
                require_embeddings(tokenizer, ids_all, vocabulary, source.name)
            ends_N = tokens + np.cumsum(lengths_N)
            sentences, tokens, truncated = sentences + len(batch), int(ends_N[-1]), truncated + cut
            for file, digest, content in (
                (ids_file, ids_hash, ids_all.tobytes()),
                (offsets_file, offsets_hash, ends_N.tobytes()),
            ):
                file.write(content)
                digest.update(content)
            if progress is not None:
                progress(sentences)
    meta: dict[str, Any] = {
        "format": _FORMAT,
        "source": hide_home(source.name),
        "rows": sentences // source.width,
        "width": source.width,
        "tokens": tokens,
        "truncated": truncated,
        "max_length": max_length,
        "pad_id": tokenizer.pad_token_id,
        "bad_rows": [[bad.line, bad.reason] for bad in bad_rows],
        "sha256": {"ids.bin": ids_hash.hexdigest(), "offsets.bin": offsets_hash.hexdigest()},
    }
    if source.is_scored:
        (folder / "scores.bin").write_bytes(content := scores.tobytes())
        meta["sha256"]["scores.bin"] = hashlib.sha256(content).hexdigest()
    meta["checksum"] = _sha256(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _texts(source: RowSource, bad_rows: list[BadRow], scores: array[float]) -> Iterator[str]:
    """Yield the texts of all rows, and append the scores of scored rows."""
    if not source.is_scored:
        yield from chain.from_iterable(source.rows(bad_rows))
        return
    for *texts, score in source.rows(bad_rows):
        scores.append(score)
        yield from texts


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> tuple[list[list[int]], int]:
    """Return the token ids of the texts, and how many of them were truncated."""
    options = {"add_special_tokens": True, "return_attention_mask": False, "return_token_type_ids": False}
    encoded = tokenizer(texts, truncation=True, max_length=max_length, **options)
    ids: list[list[int]] = encoded["input_ids"]
    # Only a sentence of exactly max_length tokens can be truncated.
    full = [i for i, sentence in enumerate(ids) if len(sentence) == max_length]
    if tokenizer.is_fast:
        return ids, sum(bool(encoded.encodings[i].overflowing) for i in full)
    # verbose=False silences "sequence length is longer than": these ids are counted, never used.
    whole = tokenizer([texts[i] for i in full], verbose=False, **options)["input_ids"] if full else []
    return ids, sum(len(sentence) > max_length for sentence in whole)


def _is_whole(folder: Path) -> bool:
    """Return whether the checksums of all files match; this takes about as long as reading the data file."""
    try:
        meta = _read_meta(folder)
        if meta.pop("checksum") != _sha256(meta) or meta["format"] != _FORMAT:
            return False
        for name, wanted in meta["sha256"].items():
            with (folder / name).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != wanted:
                    return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return True


def _read_meta(folder: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return meta


def _sha256(described: object) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
