"""Cache of sentence embeddings on disk: every distinct sentence is encoded once per model and prompt.

A cache file contains hashes of sentences and their embeddings, never a sentence. It is written atomically, and a damaged one is
replaced.
"""

# N sentences, D width

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from promcse_pl.data.retrieval import RoleText, Text
from promcse_pl.embedder import PromCSE, model_hash
from promcse_pl.evaluation.sts import Embeddings
from promcse_pl.models.vectors import require_finite
from promcse_pl.utils.errors import DataError
from promcse_pl.utils.files import atomic_file, file_version

log = logging.getLogger(__name__)

Progress = Callable[[int], None]
ROUNDING = 1e-6
"""Unit embeddings whose entries differ by less count as equal: float32 rounding alone makes them differ."""


@dataclass(slots=True)
class EmbeddingCache:
    """Embeddings on disk, one file per model.

    Attributes:
        folder: Folder of the files; it may be deleted at any time.
        encoded: Number of sentences encoded so far because no file had them.
    """

    folder: str | Path
    encoded: int = 0

    def embeddings(self, model: PromCSE, sentences: Iterable[Text], progress: Progress | None = None) -> Embeddings:
        """Return the embedding of every distinct sentence; those that the file lacks are encoded in one call.

        Args:
            model: The model.
            sentences: In any order, repeated or not.
            progress: Called with the number of sentences encoded so far.

        Raises:
            DataError: All embeddings are the same.
            NonFiniteError: An embedding is not finite.
        """
        # the longest first, so that an out-of-memory error occurs early
        distinct = sorted(set(sentences), key=_longest_first)
        path = Path(self.folder) / f"{model_hash(model)}.safetensors"
        version, known = file_version(path), _read(path, model.width)
        digests = [_digest(model, text) for text in distinct]
        missing = [(text, digest) for text, digest in zip(distinct, digests, strict=True) if digest not in known]
        if missing:
            encoded = encode_texts(model, [text for text, _ in missing], progress)
            self.encoded += len(missing)
            if file_version(path) != version:  # another process has written it meanwhile
                known |= _read(path, model.width)
            known.update((digest, encoded[text]) for text, digest in missing)
            _write(path, known)
        found = {text: known[digest] for text, digest in zip(distinct, digests, strict=True)}
        check_embeddings(found)
        return found


def encode_texts(model: PromCSE, texts: Iterable[Text], progress: Progress | None = None) -> Embeddings:
    """Encode distinct texts, with one call per prompt.

    Args:
        model: The model.
        texts: Distinct texts.
        progress: Called with the number of texts encoded so far.
    """
    by_prompt: dict[str | None, list[Text]] = {}
    for text in texts:
        by_prompt.setdefault(_prompt_name(model, text), []).append(text)
    encoded: dict[Text, NDArray[np.float32]] = {}
    for name, part in by_prompt.items():
        report = partial(_report_offset, progress, len(encoded)) if progress else None
        embeddings_ND = model.encode([_plain(text) for text in part], prompt_name=name, progress=report)
        encoded.update(zip(part, embeddings_ND, strict=True))
    return encoded


def _report_offset(progress: Progress, before: int, done: int) -> None:
    """Report the progress of one of several calls of `encode`."""
    progress(before + done)


def _plain(text: Text) -> str:
    return text.text if isinstance(text, RoleText) else text


def _longest_first(text: Text) -> tuple[int, str, str]:
    plain = _plain(text)
    return -len(plain), plain, text.role if isinstance(text, RoleText) else ""


def _prompt_name(model: PromCSE, text: Text) -> str | None:
    """Return the name of a text's prompt; None for the default prompt."""
    settings = model.encoder.text
    name = settings.role_prompt(text.role) if isinstance(text, RoleText) else None
    return None if name == settings.default_prompt else name


def _digest(model: PromCSE, text: Text) -> bytes:
    """Return the sha256 of a text, with its prompt if that is not the default one (no text contains the byte between)."""
    name = _prompt_name(model, text)
    prompt = b"" if name is None else model.encoder.text.prompt_text(name).encode() + b"\xff"
    return hashlib.sha256(prompt + _plain(text).encode()).digest()


def check_embeddings(embeddings: Embeddings) -> None:
    """Check that embeddings can be scored.

    Raises:
        DataError: All embeddings of two or more sentences are the same, up to rounding.
        NonFiniteError: An embedding is not finite.
    """
    first_D: NDArray[np.float32] | None = None
    constant = len(embeddings) > 1
    for text, embedding_D in embeddings.items():
        require_finite([_plain(text)], embedding_D[None])
        first_D = embedding_D if first_D is None else first_D
        constant = constant and bool(np.abs(embedding_D - first_D).max() < ROUNDING)
    if constant:
        raise DataError(
            f"all {len(embeddings)} sentences have the same embedding: the model has collapsed and cannot be scored"
        )


def _read(path: Path, width: int) -> dict[bytes, NDArray[np.float32]]:
    """Return the embeddings by the hash of their sentence; empty if there is no file or it is damaged."""
    if not path.is_file():  # also excludes FIFOs
        return {}
    try:
        with safe_open(path, framework="np") as file:
            digests_N32, vectors_ND = file.get_tensor("digests"), file.get_tensor("vectors")
            whole = (file.metadata() or {}).get("sha256") == _checksum(digests_N32, vectors_ND)
    except (SafetensorError, OSError, ValueError) as error:
        whole, reason = False, f"{type(error).__name__}: {error}"
    else:
        reason = "its checksum differs"
        whole = whole and vectors_ND.shape == (len(digests_N32), width)
    if not whole:
        log.warning("%s is damaged (%s); the sentences are encoded again", path, reason)
        return {}
    return {row.tobytes(): vector_D for row, vector_D in zip(digests_N32, vectors_ND, strict=True)}


def _write(path: Path, vectors: Mapping[bytes, NDArray[np.float32]]) -> None:
    digests_N32 = np.frombuffer(b"".join(vectors), dtype=np.uint8).reshape(len(vectors), -1)
    vectors_ND = np.stack(list(vectors.values()))
    metadata = {"sha256": _checksum(digests_N32, vectors_ND)}
    try:
        with atomic_file(path) as temporary:
            save_file({"digests": digests_N32, "vectors": vectors_ND}, temporary, metadata)
    except (DataError, SafetensorError) as error:
        log.warning("the embeddings are not cached: %s", error)


def _checksum(*arrays: NDArray[np.generic]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
