"""PromCSE: the object a user encodes sentences with."""

# N sentences, T tokens, D width

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from promcse_pl import adapter as adapter_files
from promcse_pl.data.batch import Tokens
from promcse_pl.index import Hit, Kind, SentenceIndex
from promcse_pl.models.cpu.chunks import CHUNK_TOKENS
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.utils.errors import ConfigError, DataError, NonFiniteError, TextTypeError

Vectors = NDArray[np.float32]
BLOCK_SENTENCES = 4096
"""Sentences that are tokenised and sorted at once; it bounds the memory beside the vectors."""


class PromCSE:
    """Sentence vectors from a frozen encoder and a trained prompt.

    Args:
        encoder: The model; it is used in eval mode and left in the mode it had.
        tokenizer: A transformers tokenizer; None takes the encoder's own.

    Example (`run` is the folder of a run, `folder` one to write to):
        >>> model = PromCSE.load(run)
        >>> vectors = model.encode(["A woman is reading.", "Someone reads."])
        >>> vectors.shape, vectors.dtype.name
        ((2, 384), 'float32')
        >>> cosine = model.similarity("A woman is reading.", "Someone reads.")
        >>> bool(-1 <= cosine <= 1)
        True
        >>> model.build_index(["Someone reads a book.", "A dog sleeps."])
        >>> [sentence for sentence, score in model.search("A woman is reading.", top_k=1)]
        ['Someone reads a book.']
        >>> model.add(["A woman studies a map."])
        >>> model.save_index(folder / "index")
        >>> model.load_index(folder / "index")
        >>> len(model.search(["A woman is reading.", "A cat sleeps."], top_k=2))
        2
    """

    def __init__(self, encoder: PromptEncoder, tokenizer: Any | None = None) -> None:  # noqa: ANN401
        self.encoder = encoder
        self.tokenizer = encoder.backbone.tokenizer if tokenizer is None else tokenizer
        self._lock = threading.Lock()
        self._index: SentenceIndex | None = None

    @classmethod
    def load(
        cls, folder: str | Path, *, encoder: str | Path | None = None, device: str = "auto", dtype: str = "float32"
    ) -> PromCSE:
        """Read an adapter and the frozen encoder it belongs to.

        Args:
            folder: The `adapter` folder of a run, or the run's folder.
            encoder: Where the encoder lies now, if not where the adapter says.
            device: `cpu`, `cuda`, `mps`, or `auto`: a GPU if there is one.
            dtype: `float32`, `bfloat16`, `float16`, or `int8` (a CPU's; docs/speed.md says what it costs): the type the encoder
                computes in; vectors are float32 in any case.

        Raises:
            AdapterError: The folder is not an adapter, is damaged, or belongs to another encoder.
            EncoderError: The encoder is not to be found.
        """
        if dtype not in ("float32", "bfloat16", "float16", "int8"):
            raise ConfigError(f"dtype must be float32, bfloat16, float16 or int8, got {dtype!r}")
        kept = torch.float32 if dtype == "int8" else getattr(torch, dtype)
        model = adapter_files.load_adapter(folder, encoder=encoder, dtype=kept).to(pick_device(device))
        if dtype == "int8":
            model.backbone.quantize()
        return cls(model)

    @property
    def width(self) -> int:
        """Entries of a vector."""
        return self.encoder.backbone.width

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sentence that is not cut, special ones included."""
        return self.encoder.longest_input

    @overload
    def encode(
        self, sentences: str, *, normalize: bool = True, progress: Callable[[int], None] | None = None
    ) -> Vectors: ...
    @overload
    def encode(
        self, sentences: Iterable[str], *, normalize: bool = True, progress: Callable[[int], None] | None = None
    ) -> Vectors: ...
    def encode(
        self, sentences: str | Iterable[str], *, normalize: bool = True, progress: Callable[[int], None] | None = None
    ) -> Vectors:
        """Return one vector per sentence, in the order given.

        Inside, sentences are sorted by length so that little padding is computed. A sentence longer than `max_tokens` is cut.

        Args:
            sentences: One sentence, or any iterable of them: a list, a generator, a numpy array, a pandas Series.
            normalize: Scale vectors to length 1, so that dot products are cosines.
            progress: Called with the number of sentences done so far, now and then.

        Returns:
            (N, D) float32; (D,) for a single sentence; (0, D) for an empty list.

        Raises:
            TextTypeError: An entry is not a string (a DataError and a TypeError); the message names its position.
            DataError: A sentence holds a lone surrogate.
            NonFiniteError: A vector is not finite.
        """
        if isinstance(sentences, str):
            single: Vectors = self.encode([sentences], normalize=normalize)[0]
            return single
        texts = list_of_texts(sentences, "encode")
        vectors_ND = np.empty((len(texts), self.width), dtype=np.float32)
        for start in range(0, len(texts), BLOCK_SENTENCES):
            block = texts[start : start + BLOCK_SENTENCES]
            vectors_ND[start : start + len(block)] = self._encode_block(block, normalize)
            if progress is not None:
                progress(start + len(block))
        return vectors_ND

    def similarity(self, a: str | Iterable[str], b: str | Iterable[str]) -> NDArray[np.float32]:
        """Return the cosine similarity of every sentence in `a` with every sentence in `b`.

        Returns:
            (A, B) float32 in [-1, 1]; the axis of a single sentence is dropped.
        """
        cosines: NDArray[np.float32] = np.clip(self.encode(a) @ self.encode(b).T, -1, 1)
        return cosines

    def adapter_hash(self) -> str:
        """Return the hex sha256 of everything that affects the embeddings, including the tokenizer in use."""
        return adapter_files.adapter_hash(self.encoder, self.tokenizer)

    def build_index(
        self, sentences: Iterable[str], *, kind: Kind = "exact", progress: Callable[[int], None] | None = None
    ) -> None:
        """Encode the sentences that `search` will look through, in the place of those of an earlier index.

        Args:
            sentences: At least one; a sentence that stands twice is found twice.
            kind: `exact`, or through FAISS (extra `faiss`) `flat` or `ivf`; see `promcse_pl.index.SentenceIndex`.
            progress: See `encode`.

        Raises:
            ConfigError: An unknown kind, or FAISS is not installed.
            DataError: No sentences, or something that is not text.
        """
        index = SentenceIndex(kind)
        texts = [] if isinstance(sentences, str) else list_of_texts(sentences, "build_index")
        if not texts:
            raise DataError(
                f'an index needs a list of sentences, got {sentences!r}. Try: build_index(["A woman reads."])'
            )
        index.add(self.encode(texts, progress=progress), texts)
        self._index = index

    def add(self, sentences: Iterable[str]) -> None:
        """Append sentences to the index.

        Raises:
            DataError: There is no index yet, or something that is not text.
        """
        if isinstance(sentences, str):
            raise DataError(f"add needs a list of sentences, got {sentences!r}. Try: add([{sentences!r}])")
        index, texts = self._built_index(), list_of_texts(sentences, "add")
        index.add(self.encode(texts), texts)

    @overload
    def search(  # type: ignore[overload-overlap]  # a str is an Iterable[str] too
        self, queries: str, *, top_k: int = 5, threshold: float | None = None
    ) -> list[Hit]: ...
    @overload
    def search(self, queries: Iterable[str], *, top_k: int = 5, threshold: float | None = None) -> list[list[Hit]]: ...
    def search(
        self, queries: str | Iterable[str], *, top_k: int = 5, threshold: float | None = None
    ) -> list[Hit] | list[list[Hit]]:
        """Return the nearest sentences of the index with their cosines, the best first; equal ones in the order they were added.

        Args:
            queries: One sentence or many.
            top_k: Most hits of each query, at least 1; all if the index holds fewer.
            threshold: Minimum cosine of a hit, in [-1, 1]; None: no minimum.

        Returns:
            A list of (sentence, cosine) for one query; for many a list of such lists, empty where nothing reaches the threshold.

        Raises:
            ConfigError: top_k or threshold out of range.
            DataError: There is no index yet, or a query is not text.
        """
        if isinstance(queries, str):
            return self.search([queries], top_k=top_k, threshold=threshold)[0]
        return self._built_index().search(self.encode(queries), top_k=top_k, threshold=threshold)

    def save_index(self, folder: str | Path) -> None:
        """Write the index to a folder; the files of an index that is already there are replaced, other files are kept.

        Raises:
            AdapterError: The folder holds something else, or cannot be written.
            DataError: There is no index yet.
        """
        self._built_index().save(folder, adapter=self.adapter_hash())

    def load_index(self, folder: str | Path) -> None:
        """Read an index that this adapter made, in the place of an earlier one.

        Raises:
            AdapterError: Another adapter made it.
            DataError: It is not an index, or a file is missing, cut short or changed.
            ConfigError: It needs FAISS, which is not installed.
        """
        self._index = SentenceIndex.load(folder, adapter=self.adapter_hash(), width=self.width)

    def _built_index(self) -> SentenceIndex:
        if self._index is None:
            raise DataError("there is no index yet. Try: model.build_index(sentences), or model.load_index(folder)")
        return self._index

    def _encode_block(self, sentences: Sequence[str], normalize: bool) -> Vectors:
        tokens = tokenize(self.tokenizer, sentences, self.max_tokens)
        with self._lock, _eval_mode(self.encoder), torch.inference_mode():
            device = self.encoder.backbone.device
            vectors_ND, _ = self.encoder(tokens.to(device), chunk_tokens=CHUNK_TOKENS[device.type])
            vectors_ND = F.normalize(vectors_ND, dim=1) if normalize else vectors_ND
        if not bool(torch.isfinite(vectors_ND).all()):
            place = int((~torch.isfinite(vectors_ND)).any(1).nonzero()[0])
            raise NonFiniteError(
                f"the vector of {sentences[place][:80]!r} is not finite: the adapter or the encoder is damaged"
            )
        return vectors_ND.cpu().numpy()


def list_of_texts(sentences: Iterable[str], caller: str) -> list[str]:
    """Return the strings of an iterable as a list; the iterable is consumed once.

    Raises:
        TextTypeError: Not an iterable of strings: None, bytes, a dict, a DataFrame, or an entry of another type.
        DataError: A text holds a lone surrogate.
    """
    if (
        not isinstance(sentences, Iterable)
        or isinstance(sentences, bytes | bytearray | memoryview | Mapping)
        or getattr(sentences, "ndim", 1) != 1  # iterating over a DataFrame gives its column names
    ):
        raise TextTypeError(
            f"{caller} needs a string or an iterable of strings, got {type(sentences).__name__} ({repr(sentences)[:80]}). "
            f'Try: {caller}(["A woman reads."])'
        )
    texts = list(sentences)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TextTypeError(f"sentence {position} must be a string, got {type(text).__name__} ({repr(text)[:200]})")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"sentence {position} holds a lone surrogate, which no tokenizer accepts") from None
    return texts


def tokenize(tokenizer: Any, sentences: Sequence[str], longest: int) -> Tokens:  # noqa: ANN401  (a transformers tokenizer)
    """Return the token numbers of sentences, cut to `longest` tokens and padded at the end."""
    encoded = tokenizer(
        list(sentences),
        truncation=True,
        max_length=longest,
        padding=True,
        padding_side="right",
        return_token_type_ids=False,
        return_tensors="pt",
    )
    return Tokens(encoded["input_ids"], encoded["attention_mask"])


def pick_device(name: str) -> torch.device:
    """Return the device of a setting; `auto` takes a GPU if there is one.

    Raises:
        ConfigError: A device that this machine does not have.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device("cuda" if available["cuda"] else "mps" if available["mps"] else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu, cuda or mps, got {name!r}") from None
    if not available.get(device.type, False):
        here = ", ".join(kind for kind, there in available.items() if there)
        raise ConfigError(f"there is no {device.type} device on this machine (there is: {here}). Try: device auto")
    return device


@contextmanager
def _eval_mode(module: torch.nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
