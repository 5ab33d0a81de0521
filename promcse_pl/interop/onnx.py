"""Export an adapter as one ONNX or OpenVINO graph, for servers and runtimes that do not have this package.

The graph maps `input_ids` and `attention_mask`, (N, T) int64, to `sentence_embedding`, (N, D) float32 of unit length. Prompt,
positions, pooling, head and dense layers are part of it; texts are tokenised by the exported tokenizer.json. The file
layout is that of text-embeddings-inference, fastembed and transformers.js.
"""

# N sentences, T tokens, D width

from __future__ import annotations

import copy
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, normalizers
from torch import Tensor, nn
from torch.nn import functional as F

from promcse_pl.data.batch import Tokens
from promcse_pl.data.demo import demo_pairs
from promcse_pl.embedder import PromCSE
from promcse_pl.interop.graph import GRAPH, INPUTS, OPENVINO, OUTPUT, QUANTIZED, GraphEncoder, require_modules
from promcse_pl.models.encoder import PromptEncoder, eval_mode
from promcse_pl.models.encoder_files import first_line, quiet_transformers
from promcse_pl.models.tuning import merge_lora
from promcse_pl.utils.errors import AdapterError
from promcse_pl.utils.files import new_folder
from promcse_pl.utils.paths import expand

TOLERANCE = 1e-5
"""Largest difference from PyTorch in an entry of a unit-length embedding, in float32."""
_CHECKED_TOKENS = 512
"""Length of the longest text that is checked, unless the encoder's limit is shorter."""
_CARD = """---
tags: [sentence-similarity, promcse_pl]
---
Sentence embeddings from a soft prompt on the encoder {encoder}, as one graph: `input_ids` and `attention_mask` to
`sentence_embedding`, which is pooled and has unit length. At most {max_tokens} tokens. Exported by promcse_pl.
"""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export measured.

    Attributes:
        difference: Largest difference between an entry of the exported and of the PyTorch embeddings.
        int8_cosine: Lowest and mean cosine between int8 and float32 embeddings of the demo sentences, with the default prompt in
            front; None without int8.
        notes: Settings of the adapter that the graph and its tokenizer cannot contain.
    """

    difference: float
    int8_cosine: tuple[float, float] | None
    notes: tuple[str, ...]


class EmbeddingGraph(nn.Module):
    """The module that is exported: the test-time embedding of a prompt encoder, of unit length.

    Args:
        encoder: The prompt encoder; it is shared. Its prompt is computed once and stored as a constant.
    """

    def __init__(self, encoder: PromptEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("prompt", encoder.prompt().detach())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (N, D) from token ids and attention mask, (N, T)."""
        embeddings_ND = self.encoder.encode_chunk(Tokens(input_ids, attention_mask), self.get_buffer("prompt"))[0]
        if self.encoder.head is not None and self.encoder.has_test_head:
            embeddings_ND = self.encoder.head(embeddings_ND)
        return F.normalize(embeddings_ND, dim=1)


def export_onnx(model: PromCSE, folder: str | Path, *, int8: bool = False) -> ExportReport:
    """Write an ONNX graph and its tokenizer to a folder, after comparing its embeddings with PyTorch's.

    Args:
        model: The adapter and its encoder, in float32 on a CPU.
        folder: Absent or empty.
        int8: Also write a graph whose linear layers and embeddings are 8-bit integers (dynamic quantisation of onnxruntime).

    Raises:
        ConfigError: The extra `onnx` is not installed.
        AdapterError: The encoder or its tokenizer cannot be exported, the embeddings differ, or the folder cannot be written.
    """
    require_modules("onnx", "onnx", "onnxscript", "onnxruntime")
    _check_model(model)
    with new_folder(expand(folder), error=AdapterError) as new:
        _write_graph(model, new / GRAPH)
        notes = _write_files(model, new)
        exported = GraphEncoder.load(new, GRAPH)
        difference = _check(model, exported)
        cosine = None
        if int8:
            _quantize(new / GRAPH, new / QUANTIZED)
            prompt = model.encoder.text.prompt_text()
            texts = [prompt + text for text in sorted({text for pair in demo_pairs("dev") for text in pair[:2]})]
            quantized = GraphEncoder.load(new, QUANTIZED)
            cosines_N = (exported.encode(texts) * quantized.encode(texts)).sum(1)
            cosine = float(cosines_N.min()), float(cosines_N.mean())
    return ExportReport(difference, cosine, notes)


def export_openvino(model: PromCSE, folder: str | Path) -> ExportReport:
    """Write an OpenVINO graph (IR, float32) and its tokenizer to a folder; arguments and errors as `export_onnx`."""
    require_modules("openvino", "onnx", "onnxscript", "openvino")
    _check_model(model)
    import openvino

    with new_folder(expand(folder), error=AdapterError) as new, tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / GRAPH
        _write_graph(model, path)
        graph = openvino.convert_model(path)
        # by default, OpenVINO computes in bfloat16 on CPUs that support it
        graph.set_rt_info("f32", ["runtime_options", "INFERENCE_PRECISION_HINT"])
        (new / OPENVINO).parent.mkdir()
        openvino.save_model(graph, new / OPENVINO, compress_to_fp16=False)
        notes = _write_files(model, new)
        difference = _check(model, GraphEncoder.load(new, OPENVINO))
    return ExportReport(difference, None, notes)


def _check_model(model: PromCSE) -> None:
    backbone = model.encoder.backbone
    if backbone.precision != "float32" or backbone.device.type != "cpu":
        raise AdapterError(
            f"an export needs float32 weights on a CPU, these are {backbone.precision} on {backbone.device.type}. Try: "
            'PromCSE.load(..., device="cpu")'
        )
    if not model.tokenizer.is_fast:
        raise AdapterError(
            f"the tokenizer of {backbone.identity.name} ({type(model.tokenizer).__name__}) has no tokenizer.json, which the "
            "programs that read an export need. Use an encoder with a tokenizer.json"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the messages of torch and onnxruntime about unused operators."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _write_graph(model: PromCSE, path: Path) -> None:
    """Export the graph with dynamic batch size and length; LoRA is merged into the weights."""
    path.parent.mkdir()
    encoder = model.encoder
    if encoder.backbone.tuning.weights == "lora":
        encoder = copy.deepcopy(encoder)
        merge_lora(encoder.backbone.model)
    backbone = encoder.backbone
    ids = torch.full((2, 4), backbone.pad_id + 1)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    fused, backbone.use_fused_layers = backbone.use_fused_layers, False
    try:
        with _quiet(), eval_mode(encoder), torch.no_grad():
            program = torch.export.export(
                EmbeddingGraph(encoder),
                (ids, torch.ones_like(ids)),
                dynamic_shapes=(dynamic, dynamic),
                strict=False,
            )
            graph: Any = torch.onnx.export(program, input_names=INPUTS, output_names=[OUTPUT], verbose=False)
            for value in (*graph.model.graph.inputs, *graph.model.graph.outputs):
                value.shape[0] = "batch"
            for value in graph.model.graph.inputs:
                value.shape[1] = "length"
            graph.save(path)
    except OSError:
        raise
    except Exception as error:  # of torch.export, torch.onnx or onnxscript
        raise AdapterError(
            f"encoders with model_type {backbone.model_type} cannot be exported with torch {torch.__version__}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    finally:
        backbone.use_fused_layers = fused


def _quantize(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)


def _write_files(model: PromCSE, folder: Path) -> tuple[str, ...]:
    """Write tokenizer and config files; return notes on the settings that only some programs read."""
    backbone, text = model.encoder.backbone, model.encoder.text
    tokenizer = copy.deepcopy(model.tokenizer)
    backend: Tokenizer = tokenizer.backend_tokenizer
    if text.lower_case:
        rest = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])
    backend.enable_truncation(model.max_tokens, direction=tokenizer.truncation_side)
    backend.enable_padding(
        direction=tokenizer.padding_side, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token
    )
    tokenizer.model_max_length = model.max_tokens
    config: Any = copy.deepcopy(backbone.model.config)
    config.architectures = [type(backbone.model).__name__]
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))  # with the truncation and the padding
    files = {
        "sentence_bert_config.json": {"max_seq_length": model.max_tokens, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": dict(text.prompts),
            "default_prompt_name": text.default_prompt,
            "similarity_fn_name": "cosine",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    card = _CARD.format(encoder=backbone.identity.name, max_tokens=model.max_tokens)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if not any(text.prompts.values()):
        return ()
    default = f" (default: {text.default_prompt})" if text.default_prompt else ""
    return (
        f"the graph does not add the text prompts {', '.join(text.prompts)}{default}: put them in front of the texts. "
        "text-embeddings-inference reads them from config_sentence_transformers.json with --default-prompt-name",
    )


def _check(model: PromCSE, exported: GraphEncoder) -> float:
    """Return the largest difference from PyTorch for texts of different lengths, in a padded batch and alone.

    Raises:
        AdapterError: The exported tokenizer gives other token ids, or the difference exceeds `TOLERANCE`.
    """
    short = [text for pair in demo_pairs("dev")[:4] for text in pair[:2]]
    long = " ".join(text for pair in demo_pairs("test")[:_CHECKED_TOKENS] for text in pair[:2])
    words = long.split()[: min(model.max_tokens, _CHECKED_TOKENS)]
    texts = ["A", *short, short[0].upper(), " ".join(words), " ".join(words[: len(words) // 2])]
    prepared = model.encoder.text.prepare(texts, tokenizer=model.tokenizer)
    expected = model.tokenizer(prepared, truncation=True, max_length=model.max_tokens)["input_ids"]
    for text, ids, ours in zip(texts, exported.tokenizer.encode_batch(texts), expected, strict=True):
        found = [token for token, real in zip(ids.ids, ids.attention_mask, strict=True) if real]
        if found != ours:
            raise AdapterError(
                f"the tokenizer of {model.encoder.backbone.identity.name} gives other token ids from its tokenizer.json "
                f"for {text[:40]!r}, so the export would not give the same embeddings. Use an encoder with another tokenizer"
            )
    embeddings_ND = model.encode(texts, prompt="")
    alone_ND = np.concatenate([exported.encode([text]) for text in texts])
    difference = float(np.abs(np.stack([exported.encode(texts), alone_ND]) - embeddings_ND).max())
    if not difference <= TOLERANCE:  # also rejects NaN
        raise AdapterError(
            f"the exported embeddings of model_type {model.encoder.backbone.model_type} differ from those of PyTorch by "
            f"{difference:.1e} (allowed: {TOLERANCE:.0e}); nothing was written"
        )
    return difference
