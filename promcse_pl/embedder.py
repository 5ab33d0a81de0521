"""PromCSE: the object a user encodes sentences with."""

# N sentences, T tokens, D width

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from promcse_pl.errors import ConfigError, DataError, NonFiniteError
from promcse_pl.model.encoder import PromptEncoder, Tokens

Vectors = NDArray[np.float32]
CHUNK_TOKENS = 2048
"""Tokens that pass the encoder at once; larger chunks leave the processor's cache."""
BLOCK_SENTENCES = 16384
"""Sentences that are tokenised and sorted at once; it bounds the memory beside the vectors."""


class PromCSE:
    """Sentence vectors from a frozen encoder and a trained prompt.

    Args:
        encoder: The model; it is used in eval mode and left in the mode it had.
        tokenizer: A transformers tokenizer; None takes the encoder's own.

    Example:
        >>> model = PromCSE.load("outputs/.../adapter")  # doctest: +SKIP
        >>> vectors = model.encode(["A woman is reading.", "Someone reads."])  # doctest: +SKIP
        >>> model.similarity("A woman is reading.", "Someone reads.")  # doctest: +SKIP
    """

    def __init__(self, encoder: PromptEncoder, tokenizer: Any | None = None) -> None:  # noqa: ANN401
        self.encoder = encoder
        self.tokenizer = encoder.backbone.tokenizer if tokenizer is None else tokenizer
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls, folder: str | Path, *, encoder: str | None = None, device: str = "auto", dtype: str = "float32"
    ) -> PromCSE:
        """Read an adapter and the frozen encoder it belongs to.

        Args:
            folder: The `adapter` folder of a run, or the run's folder.
            encoder: Where the encoder lies now, if not where the adapter says.
            device: `cpu`, `cuda`, `mps`, or `auto`: a GPU if there is one.
            dtype: `float32`, `bfloat16` or `float16`: the type the encoder computes in; vectors are float32 in any case.

        Raises:
            AdapterError: The folder is not an adapter, is damaged, or belongs to another encoder.
            EncoderError: The encoder is not to be found.
        """
        from promcse_pl.adapter.files import load_adapter

        if dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
        return cls(load_adapter(Path(folder), encoder=encoder, dtype=getattr(torch, dtype)).to(pick_device(device)))

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
        self, sentences: Sequence[str], *, normalize: bool = True, progress: Callable[[int], None] | None = None
    ) -> Vectors: ...
    def encode(
        self, sentences: str | Sequence[str], *, normalize: bool = True, progress: Callable[[int], None] | None = None
    ) -> Vectors:
        """Return one vector per sentence, in the order given.

        Inside, sentences are sorted by length so that little padding is computed. A sentence longer than `max_tokens` is cut.

        Args:
            sentences: One sentence or many.
            normalize: Scale vectors to length 1, so that dot products are cosines.
            progress: Called with the number of sentences done so far, now and then.

        Returns:
            (N, D) float32; (D,) for a single sentence; (0, D) for an empty list.

        Raises:
            DataError: Something that is not text; it names the place in the list.
            NonFiniteError: A vector is not finite.
        """
        if isinstance(sentences, str):
            single: Vectors = self.encode([sentences], normalize=normalize)[0]
            return single
        for place, sentence in enumerate(sentences):
            if not isinstance(sentence, str):
                raise DataError(f"sentence {place} is {type(sentence).__name__} ({sentence!r}), not text")
        vectors_ND = np.empty((len(sentences), self.width), dtype=np.float32)
        for start in range(0, len(sentences), BLOCK_SENTENCES):
            block = sentences[start : start + BLOCK_SENTENCES]
            vectors_ND[start : start + len(block)] = self._encode_block(block, normalize)
            if progress is not None:
                progress(start + len(block))
        return vectors_ND

    def similarity(self, a: str | Sequence[str], b: str | Sequence[str]) -> NDArray[np.float32]:
        """Return the cosine of every sentence of `a` with every one of `b`: (A, B) float32; a single sentence has no axis."""
        cosines: NDArray[np.float32] = self.encode(a) @ self.encode(b).T
        return cosines

    def _encode_block(self, sentences: Sequence[str], normalize: bool) -> Vectors:
        tokens = self._tokenize(sentences)
        with self._lock, _eval_mode(self.encoder), torch.inference_mode():
            vectors_ND, _ = self.encoder(tokens.to(self.encoder.backbone.device), chunk_tokens=CHUNK_TOKENS)
            vectors_ND = F.normalize(vectors_ND, dim=1) if normalize else vectors_ND
        if not bool(torch.isfinite(vectors_ND).all()):
            place = int((~torch.isfinite(vectors_ND)).any(1).nonzero()[0])
            raise NonFiniteError(
                f"the vector of {sentences[place][:80]!r} is not finite: the adapter or the encoder is damaged"
            )
        return vectors_ND.cpu().numpy()

    def _tokenize(self, sentences: Sequence[str]) -> Tokens:
        encoded = self.tokenizer(
            list(sentences),
            truncation=True,
            max_length=self.max_tokens,
            padding=True,
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
