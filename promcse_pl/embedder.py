"""PromCSE: encode sentences, compare them, and search an index."""

# N sentences, Q queries, T tokens, D width

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from promcse_pl import adapter as adapter_files
from promcse_pl.data.texts import list_of_texts
from promcse_pl.data.tokenizer import tokenizer_fingerprint
from promcse_pl.index import Hit, Kind, SearchOptions, SentenceIndex
from promcse_pl.models.cpu.chunks import CHUNK_TOKENS
from promcse_pl.models.device import pick_device
from promcse_pl.models.encoder import PromptEncoder, eval_mode
from promcse_pl.models.texts import tokenize
from promcse_pl.models.vectors import Embeddings, Vectors, is_embeddings, require_finite, unit_embeddings
from promcse_pl.publish import push_adapter
from promcse_pl.utils.errors import AdapterError, ConfigError, DataError
from promcse_pl.utils.locks import Lock
from promcse_pl.utils.terminal import progress_bar

Progress = Callable[[int], None]
_TOKENIZING = threading.Lock()
"""Models may share a tokenizer, whose truncation is a state."""
BLOCK_SENTENCES = 4096
"""Number of sentences tokenised and sorted by length at once; this bounds the memory in addition to the embeddings."""


class EncodeOptions(TypedDict, total=False):
    """Options of `PromCSE.encode` that do not change the type of its result."""

    prompt_name: str | None
    prompt: str | None
    batch_size: int | None
    show_progress_bar: bool
    normalize_embeddings: bool | None
    normalize: bool | None
    progress: Progress | None


class PromCSE:
    """Sentence embeddings from a frozen encoder and a trained prompt.

    Args:
        encoder: The model; it is used in eval mode, and its mode is restored afterwards.
        tokenizer: A transformers tokenizer; None: that of the encoder.

    Examples:
        `run` is the folder of a run, `folder` a folder to write to.

        >>> from promcse_pl import PromCSE
        >>> model = PromCSE.from_pretrained(run)
        >>> embeddings = model.encode(["A woman is reading.", "Someone reads."], batch_size=32)
        >>> embeddings.shape, embeddings.dtype.name
        ((2, 384), 'float32')
        >>> tuple(model.encode("A woman is reading.", convert_to_tensor=True).shape)
        (384,)
        >>> cosine = model.similarity("A woman is reading.", "Someone reads.")
        >>> bool(-1 <= cosine <= 1)
        True
        >>> model.save_pretrained(folder / "my-adapter")
        >>> bool((PromCSE.from_pretrained(folder / "my-adapter").encode("A test.") == model.encode("A test.")).all())
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
        self._lock = Lock()
        self._index: SentenceIndex | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        encoder: str | Path | None = None,
        device: str = "auto",
        dtype: str = "float32",
    ) -> PromCSE:
        """Load an adapter from a local folder or the Hugging Face Hub, and the frozen encoder that it names.

        Args:
            name: Folder of an adapter or of a run, or a hub id OWNER/NAME.
            revision: Commit, tag or branch on the hub.
            encoder, device, dtype: See `load`.

        Raises:
            AdapterError: It is neither a folder nor on the hub; or see `load`.
            EncoderError, ConfigError: See `load`.
        """
        return cls.load(adapter_files.locate_adapter(name, revision), encoder=encoder, device=device, dtype=dtype)

    @classmethod
    def load(
        cls, folder: str | Path, *, encoder: str | Path | None = None, device: str = "auto", dtype: str = "float32"
    ) -> PromCSE:
        """Load an adapter from a local folder, and the encoder that it names.

        Args:
            folder: The `adapter` folder of a run, or the run's folder.
            encoder: Folder or hub id of the encoder before training, if it is not found under the name in the adapter.
            device: `cpu`, `cuda`, `mps`, or `auto`: a GPU if there is one.
            dtype: Type that the encoder computes in: `float32`, `bfloat16`, `float16`, or `int8` (CPU only; docs/speed.md has its
                accuracy). Embeddings are always float32.

        Raises:
            AdapterError: The folder is not an adapter, is damaged, or was trained on another encoder.
            EncoderError: The encoder cannot be found.
            ConfigError: An unknown device or dtype.
        """
        if dtype not in ("float32", "bfloat16", "float16", "int8"):
            raise ConfigError(f"dtype must be float32, bfloat16, float16 or int8, got {dtype!r}")
        stored = torch.float32 if dtype == "int8" else getattr(torch, dtype)
        model = adapter_files.load_adapter(folder, encoder=encoder, dtype=stored).to(pick_device(device))
        if dtype == "int8":
            model.backbone.quantize()
        return cls(model)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter and its model card to a folder: what was trained, and the name of the encoder.

        Args:
            folder: Absent, empty, or the folder of an adapter, which is replaced. A README.md that a person wrote or edited is
                kept.

        Raises:
            AdapterError: The folder cannot be written or has other content, or `require_encoder_tokenizer` fails.
            EncoderError: Weights of the encoder were trained, and this model was loaded with another dtype than float32.
        """
        self.require_encoder_tokenizer("save_pretrained")
        adapter_files.save_adapter(self.encoder, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Upload the adapter and its model card to the Hugging Face Hub in one commit.

        The card contains the settings and scores of the run that the model was loaded from, unless its tensors or
        settings have changed.

        Args:
            repo_id: OWNER/NAME; the repository is created if it does not exist.
            private, revision, commit_message, token: See `promcse_pl.publish.push_adapter`.

        Returns:
            The URL of the commit.

        Raises:
            AdapterError: The hub cannot be reached or refuses the upload; or see `save_pretrained`.
            ConfigError: `repo_id` is not a valid name.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "adapter"
            self.save_pretrained(folder)
            return push_adapter(
                folder, repo_id, private=private, revision=revision, commit_message=commit_message, token=token
            )

    def require_encoder_tokenizer(self, caller: str) -> None:
        """Raise an AdapterError if the tokenizer is not that of the encoder: an adapter cannot store another one."""
        if self.encoder.backbone.identity.tokenizer != tokenizer_fingerprint(self.tokenizer):
            raise AdapterError(
                f"the model does not use the tokenizer of its encoder, and {caller} cannot store another one. Try: "
                "PromCSE(model.encoder), which uses that of the encoder"
            )

    def __repr__(self) -> str:
        encoder = self.encoder
        described = {
            "encoder": encoder.backbone.identity.name,
            **({} if encoder.backbone.tuning.weights == "none" else {"tuning": encoder.backbone.tuning.weights}),
            "prompt_length": encoder.prompt.length,
            "pooling": encoder.pooling,
            "head": encoder.head_mode,
            "dimension": self.width,
            "position_offset": encoder.position_offset,
            "max_length": self.max_tokens,
            "device": str(encoder.backbone.device),
        }
        return f"PromCSE({', '.join(f'{name}={value!r}' for name, value in described.items())})"

    @property
    def width(self) -> int:
        """D, the dimension of an embedding."""
        return self.encoder.width

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a sentence, special ones included; longer sentences are truncated."""
        limits = (self.encoder.longest_input, self.encoder.text.max_length)
        return min(limit for limit in limits if limit is not None)

    # many parameters: all but normalize and progress have the names of sentence-transformers
    @overload
    def encode(
        self,
        sentences: str | Iterable[str],
        *,
        convert_to_numpy: Literal[True] = True,
        convert_to_tensor: Literal[False] = False,
        **options: Unpack[EncodeOptions],
    ) -> Vectors: ...
    @overload
    def encode(
        self,
        sentences: str | Iterable[str],
        *,
        convert_to_numpy: bool = True,
        convert_to_tensor: Literal[True],
        **options: Unpack[EncodeOptions],
    ) -> Tensor: ...
    @overload
    def encode(
        self,
        sentences: str | Iterable[str],
        *,
        convert_to_numpy: Literal[False],
        convert_to_tensor: Literal[False] = False,
        **options: Unpack[EncodeOptions],
    ) -> Tensor | list[Tensor]: ...
    def encode(
        self,
        sentences: str | Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool | None = None,
        normalize: bool | None = None,
        progress: Progress | None = None,
    ) -> Vectors | Tensor | list[Tensor]:
        """Compute the embeddings of sentences, in the order given.

        Sentences are sorted by length and encoded in batches with a limited number of tokens, so that little padding is computed.

        Args:
            sentences: One sentence, or any iterable of them: a list, a generator, a numpy array, a pandas Series.
            prompt_name: Name of a prompt in `encoder.text.prompts` to prepend to every sentence; None: the default prompt.
            prompt: Text to prepend to every sentence; "": no prompt. Not together with `prompt_name`.
            batch_size: Maximum number of sentences in a batch; None: only the number of tokens is limited. It affects memory and
                speed; embeddings change by no more than rounding.
            show_progress_bar: Show a progress bar on standard error if it is a terminal.
            convert_to_numpy: Return a numpy array; if False, a list of tensors. `convert_to_tensor` takes precedence.
            convert_to_tensor: Return one torch.Tensor on the model's device.
            normalize_embeddings: Scale embeddings to length 1; None: True (in sentence-transformers the default is False).
            normalize: Older name of `normalize_embeddings`.
            progress: Function that is called with the number of sentences done, every few thousand sentences.

        Returns:
            (N, D) float32, (D,) for a single sentence, (0, D) for an empty list; N tensors (D,) with convert_to_numpy=False.

        Raises:
            TextTypeError: An entry is not a string (a DataError and a TypeError); the message has its position.
            DataError: A sentence contains a lone surrogate.
            ConfigError: batch_size is not an integer >= 1, there is no prompt of that name, or prompt and prompt_name are given.
            TypeError: normalize and normalize_embeddings differ.
            NonFiniteError: An embedding is not finite.
        """
        if batch_size is not None and (
            isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1
        ):
            raise ConfigError(f"batch_size must be an integer >= 1, or None, got {batch_size!r}")
        if None not in (normalize, normalize_embeddings) and normalize != normalize_embeddings:
            raise TypeError(
                f"encode got {normalize_embeddings=} and {normalize=}, its older name. Try: the first alone"
            )
        texts = list_of_texts([sentences] if isinstance(sentences, str) else sentences, "encode")
        front = self.encoder.text.prompt_text(prompt_name, prompt)
        unit_length = next((value for value in (normalize_embeddings, normalize) if value is not None), True)
        embeddings_ND = np.empty((len(texts), self.width), dtype=np.float32)
        bar = progress_bar(Console(stderr=True), "encoding", len(texts)) if show_progress_bar else nullcontext()
        with bar as report:
            for start in range(0, len(texts), BLOCK_SENTENCES):
                block = texts[start : start + BLOCK_SENTENCES]
                block = self.encoder.text.prepare(block, front, tokenizer=self.tokenizer)
                embeddings_ND[start : start + len(block)] = self._encode_block(block, batch_size, unit_length)
                for function in filter(None, (report, progress)):
                    function(start + len(block))
        found = embeddings_ND[0] if isinstance(sentences, str) else embeddings_ND
        if convert_to_numpy and not convert_to_tensor:
            return found
        tensor = torch.from_numpy(found).to(self.encoder.backbone.device)
        return tensor if convert_to_tensor or tensor.ndim == 1 else list(tensor)

    def similarity(self, a: str | Iterable[str] | Embeddings, b: str | Iterable[str] | Embeddings) -> Vectors:
        """Return the cosine similarity of every sentence in `a` with every sentence in `b`.

        Args:
            a, b: Sentences as in `encode`, or their embeddings: a float array or tensor (N, D) or (D,) of any length.

        Returns:
            (A, B) float32 in [-1, 1]; the axis of a single sentence or embedding is dropped.

        Raises:
            DataError, NonFiniteError: Embeddings of another dimension, or not finite; see also `encode`.
        """
        unit_a, unit_b = (unit_embeddings(x, self.width) if is_embeddings(x) else self.encode(x) for x in (a, b))
        cosines: Vectors = np.clip(unit_a @ unit_b.T, -1, 1)
        return cosines

    def adapter_hash(self) -> str:
        """Return the hex sha256 of everything that affects the embeddings, including the tokenizer in use."""
        return adapter_files.adapter_hash(self.encoder, self.tokenizer)

    def build_index(
        self,
        sentences: Iterable[str],
        *,
        kind: Kind = "exact",
        prompt_name: str | None = None,
        prompt: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Encode sentences into the index of `search`; an earlier index is replaced.

        Args:
            sentences: At least one; a sentence that occurs twice is found twice.
            kind: `exact`, or through FAISS (extra `faiss`) `flat` or `ivf`; see `promcse_pl.index.SentenceIndex`.
            prompt_name, prompt, progress: See `encode`.

        Raises:
            ConfigError: An unknown kind or prompt, or FAISS is not installed.
            DataError: There are no sentences, or an entry is not text.
        """
        index = SentenceIndex(kind)
        texts = [] if isinstance(sentences, str) else list_of_texts(sentences, "build_index")
        if not texts:
            raise DataError(
                f'an index needs a list of sentences, got {sentences!r}. Try: build_index(["A woman reads."])'
            )
        index.add(self.encode(texts, prompt_name=prompt_name, prompt=prompt, progress=progress), texts)
        self._index = index

    def add(self, sentences: Iterable[str], *, prompt_name: str | None = None, prompt: str | None = None) -> None:
        """Append sentences to the index; pass the same prompt as to `build_index`.

        Raises:
            ConfigError: An unknown prompt.
            DataError: There is no index yet, or an entry is not text.
        """
        if isinstance(sentences, str):
            raise DataError(f"add needs a list of sentences, got {sentences!r}. Try: add([{sentences!r}])")
        index, texts = self._built_index(), list_of_texts(sentences, "add")
        index.add(self.encode(texts, prompt_name=prompt_name, prompt=prompt), texts)

    @overload
    def search(self, queries: str, **options: Unpack[SearchOptions]) -> list[Hit]: ...  # type: ignore[overload-overlap]
    @overload  # a str is an Iterable[str] too
    def search(self, queries: Iterable[str], **options: Unpack[SearchOptions]) -> list[list[Hit]]: ...
    def search(
        self,
        queries: str | Iterable[str],
        *,
        top_k: int = 5,
        threshold: float | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> list[Hit] | list[list[Hit]]:
        """Return the nearest sentences of the index with their cosines, best first; equal cosines in the order they were added.

        Args:
            queries: One sentence or many.
            top_k: Maximum number of hits of each query, at least 1.
            threshold: Minimum cosine of a hit, in [-1, 1]; None: no minimum.
            prompt_name, prompt: Prompt of the queries; see `encode`.

        Returns:
            A list of (sentence, cosine) for one query; a list of such lists for many.

        Raises:
            ConfigError: top_k or threshold out of range, or an unknown prompt.
            DataError: There is no index yet, or a query is not text.
        """
        index, texts = self._built_index(), [queries] if isinstance(queries, str) else queries
        embeddings_QD = self.encode(texts, prompt_name=prompt_name, prompt=prompt)
        hits = index.search(embeddings_QD, top_k=top_k, threshold=threshold)
        return hits[0] if isinstance(queries, str) else hits

    def save_index(self, folder: str | Path) -> None:
        """Write the index to a folder; an index that is already there is replaced, other files are kept.

        Raises:
            AdapterError: The folder has other content and no index, or cannot be written.
            DataError: There is no index yet.
        """
        self._built_index().save(folder, adapter=self.adapter_hash())

    def load_index(self, folder: str | Path) -> None:
        """Read an index that was built with this adapter; an earlier index is replaced.

        Raises:
            AdapterError: It was built with another adapter.
            DataError: It is not an index, or a file is missing, truncated or modified.
            ConfigError: It needs FAISS, which is not installed.
        """
        self._index = SentenceIndex.load(folder, adapter=self.adapter_hash(), width=self.width)

    def _built_index(self) -> SentenceIndex:
        if self._index is None:
            raise DataError("there is no index yet. Try: model.build_index(sentences), or model.load_index(folder)")
        return self._index

    def _encode_block(self, sentences: Sequence[str], batch_size: int | None, unit_length: bool) -> Vectors:
        with _TOKENIZING:
            tokens = tokenize(self.tokenizer, sentences, self.max_tokens, len(self.encoder.backbone.word_embeddings))
        with self._lock, eval_mode(self.encoder), torch.inference_mode():
            device = self.encoder.backbone.device
            embeddings_ND, _ = self.encoder(
                tokens.to(device), chunk_tokens=CHUNK_TOKENS[device.type], chunk_sentences=batch_size
            )
            embeddings_ND = F.normalize(embeddings_ND, dim=1) if unit_length else embeddings_ND
        found_ND: Vectors = embeddings_ND.cpu().numpy()
        require_finite(sentences, found_ND)
        return found_ND


def model_hash(model: PromCSE) -> str:
    """Return the hex sha256 of everything that affects a model's embeddings: adapter hash, maximum length, precision, device."""
    backbone = model.encoder.backbone
    parts = [model.adapter_hash(), model.max_tokens, backbone.precision, backbone.device.type]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
