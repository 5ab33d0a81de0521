"""The measured training steps: ours, ours with each optimisation off, a plain path, and sentence-transformers + PEFT."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from machine import chunk_tokens_of
from torch import Tensor
from torch.nn import functional as F

from promcse_pl.config import LossConfig
from promcse_pl.data.batch import TrainBatch
from promcse_pl.data.columns import TRAINING_ROWS
from promcse_pl.data.module import EpochBatches, TrainBatches
from promcse_pl.data.readers import read_rows
from promcse_pl.data.tokens import file_source, load_tokens
from promcse_pl.embedder import PromCSE
from promcse_pl.losses.hybrid import hybrid_loss
from promcse_pl.models import attention, backbone, prompt
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.cpu import chunks, dropout, layers
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.hub import locate

NAME = "sentence-transformers/all-MiniLM-L6-v2"
LENGTH, TRIPLETS, MAX_LENGTH, SEED = 10, 128, 32, 1
TRAINING = (
    "ours",
    "no threads",
    "no sorting",
    "library layers",
    "float32",
    "chunks of 512",
    "torch dropout",
    "recompute",
    "plain path",
    "ST + PEFT",
)
ENCODING = ("ours bfloat16", "ours int8", "ours float32", "sentence-transformers")
EXPORTED = {"onnxruntime": "onnxruntime", "onnxruntime int8": "onnxruntime", "openvino": "openvino"}
"""Rows of exported graphs -> the runtime that they need; left out where it is not installed."""
NEEDS_BFLOAT16 = ("float32", "chunks of 512", "ours bfloat16")
"""Rows of machines where bfloat16 is faster; on others, the first two equal `ours` and the third takes too long."""
Step = Callable[[int], None]


def prompt_encoder(dtype: torch.dtype = torch.float32) -> PromptEncoder:
    torch.manual_seed(SEED)
    return PromptEncoder(FrozenBackbone.load(NAME, dtype=dtype), length=LENGTH, pooling="avg")


def batches(data: Path, cache: Path, count: int) -> list[TrainBatch]:
    source = file_source(
        data / "nli" / "nli_train.csv", kind=TRAINING_ROWS[3], columns=None, header=None, on_bad_row="stop"
    )
    rows = load_tokens(source, FrozenBackbone.load(NAME).tokenizer, max_length=MAX_LENGTH, cache_dir=cache)
    places = iter(EpochBatches(len(rows), TRIPLETS, SEED))
    return [TrainBatches(rows, SEED, None)[next(places)] for _ in range(count)]


def texts(data: Path, count: int) -> list[str]:
    """Return sentences of all lengths, half from Wikipedia, half from NLI."""
    chance = random.Random(SEED)
    wiki = [text for (text,) in read_rows(data / "wiki" / "wiki.txt.gz", width=1)]
    nli = [text for row in read_rows(data / "nli" / "nli_train.csv", width=3) for text in row]
    return chance.sample(wiki, count // 2) + chance.sample(nli, count // 2)


@contextmanager
def without_threads() -> Iterator[None]:
    with patch.object(chunks, "_results", lambda function, work, *_: map(function, work)):  # forward and backward pass
        yield


@contextmanager
def without_sorting() -> Iterator[None]:
    """Return chunks with equal numbers of sentences in file order, padded to the longest sentence of the batch."""

    def plan(lengths_N: Tensor, budget: int | None, _most_rows: int | None = None) -> list[Tensor]:
        if budget is None:
            return [torch.arange(len(lengths_N))]
        return list(torch.arange(len(lengths_N)).split(max(1, budget // int(lengths_N.max()))))

    with patch("promcse_pl.models.encoder.plan_chunks", plan):
        yield


@contextmanager
def with_torch_dropout() -> Iterator[None]:
    def drop(values: Tensor, probability: float, shape: torch.Size | None = None) -> Tensor:
        return F.dropout(values if shape is None else values.expand(shape), probability)

    def keep_mask(shape: torch.Size, probability: float, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype).bernoulli_(1 - probability)

    with (
        patch.object(layers, "keep_mask", keep_mask),
        patch.object(dropout, "dropout", drop),
        patch.object(prompt, "dropout", drop),
        patch.object(attention, "fast_dropout", drop),
    ):
        yield


def our_step(
    work: list[TrainBatch],
    *,
    dtype: torch.dtype,
    chunk_tokens: int | Literal["auto"] | None = "auto",
    recompute: bool = False,
) -> Step:
    if chunk_tokens == "auto":
        chunk_tokens = chunk_tokens_of(dtype, sum(int(batch.tokens.mask_NT.sum()) for batch in work) // len(work))
    encoder = prompt_encoder(dtype).train()
    optimizer = torch.optim.AdamW(encoder.prompt.parameters(), lr=3e-2)

    def step(number: int) -> None:
        tokens = work[number % len(work)].tokens
        vectors, _ = encoder(tokens, train_head=True, chunk_tokens=chunk_tokens, recompute=recompute)
        views = vectors.view(3, -1, vectors.shape[1])
        hybrid_loss(*views, LossConfig(temperature=0.05, margin=0.2, hinge_weight=10.0)).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer_step(work: list[TrainBatch]) -> Step:
    """PEFT's prefix tuning inside a sentence-transformers model, with that library's loss.

    It gets the same token ids, ready padded, and no hinge loss, which it does not have.
    """
    from peft import PrefixTuningConfig, get_peft_model
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    torch.manual_seed(SEED)
    model = SentenceTransformer(str(locate(NAME, None)[0]), device="cpu")
    prefix = PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=LENGTH)
    model[0].model = get_peft_model(model[0].model, prefix)
    loss = MultipleNegativesRankingLoss(model).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)

    def step(number: int) -> None:
        tokens = work[number % len(work)].tokens
        columns = zip(tokens.ids_NT.chunk(3), tokens.mask_NT.chunk(3), strict=True)
        features = [{"input_ids": ids, "attention_mask": mask} for ids, mask in columns]
        loss(features, None).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextmanager
def with_library_layers() -> Iterator[None]:
    with patch.object(backbone, "can_fuse", lambda *_: False):
        yield


@contextmanager
def lever_off(row: str) -> Iterator[None]:
    """Switch an optimisation off while the step of a row runs."""
    off = {
        "no threads": [without_threads],
        "no sorting": [without_sorting],
        "library layers": [with_library_layers],
        "torch dropout": [with_torch_dropout],
        "plain path": [with_torch_dropout, with_library_layers],
    }
    with ExitStack() as stack:
        for lever in off.get(row, []):
            stack.enter_context(lever())
        yield


def training_step(row: str, work: list[TrainBatch], default: torch.dtype) -> Step:
    """Return a row's step; `default` is the type that `run.py` picks on this machine."""
    if row == "ST + PEFT":
        return peer_step(work)
    options = {
        "float32": {"dtype": torch.float32},
        "bfloat16": {"dtype": torch.bfloat16},
        "chunks of 512": {"chunk_tokens": 512},
        "recompute": {"recompute": True, "chunk_tokens": 512},
        "plain path": {"dtype": torch.float32, "chunk_tokens": None},  # as the official code: one padded batch
    }
    return our_step(work, **{"dtype": default, **options.get(row, {})})


def encoder_of(row: str) -> Callable[[list[str]], object]:
    """Return unit-length embeddings; every row uses the same frozen MiniLM, ours with a new prompt."""
    if row == "sentence-transformers":
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(locate(NAME, None)[0]), device="cpu")
        model.max_seq_length = 512 - LENGTH
        return lambda sentences: model.encode(sentences, normalize_embeddings=True)
    encoder = prompt_encoder(torch.bfloat16 if row == "ours bfloat16" else torch.float32).eval()
    if row in EXPORTED:
        return exported_encoder(row, encoder)
    if row == "ours int8":
        encoder.backbone.quantize()
    return PromCSE(encoder).encode


def exported_encoder(row: str, encoder: PromptEncoder) -> Callable[[list[str]], object]:
    """Return the embeddings of an exported graph, on as many threads as torch uses."""
    from promcse_pl.interop.graph import GRAPH, OPENVINO, QUANTIZED, GraphEncoder
    from promcse_pl.interop.onnx import export_onnx, export_openvino

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "exported"
        if row == "openvino":
            export_openvino(PromCSE(encoder), out)
        else:
            export_onnx(PromCSE(encoder), out, int8=row == "onnxruntime int8")
        file = {"onnxruntime": GRAPH, "onnxruntime int8": QUANTIZED, "openvino": OPENVINO}[row]
        return GraphEncoder.load(out, file, threads=torch.get_num_threads()).encode
