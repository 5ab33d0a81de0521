"""Import and export prefix-tuning adapters of PEFT (Hugging Face), which have the same prompt in the same layout.

PEFT stores one tensor `prompt_embeddings`, (P, L * 2 * D), and views it as (P, 2L, N, H) with K0, V0, K1, V1, ... along 2L:
the order of `DeepPrompt` and of the official PromCSE code. It passes the keys and values to the encoder as a cache of P past
tokens, so transformers counts every token's position from P, for BERT and RoBERTa alike: `position_offset` is always P.
Measured with PEFT 0.21.2 and transformers 5.23: hidden states are equal to the last bit.
"""

# P prompt length, L layers, N heads, H head size, D = N * H

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from promcse_pl.adapter_folder import BUNDLED
from promcse_pl.config.pooling import ALLOWED_POOLINGS, is_pooling
from promcse_pl.interop.files import read_json, read_tensors
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.pooling import count_pooled_parts
from promcse_pl.models.prompt import DeepPrompt
from promcse_pl.utils.errors import AdapterError, ConfigError
from promcse_pl.utils.files import new_folder
from promcse_pl.utils.paths import expand

FAMILIES = ("bert", "roberta", "xlm-roberta", "electra")
"""Encoders that take a cache of past tokens, as PEFT needs; each has a test."""
CONFIG, WEIGHTS, PICKLED, TENSOR = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "prompt_embeddings",
)


def export_peft(encoder: PromptEncoder, folder: str | Path) -> None:
    """Write a prompt as a folder that `peft.PeftModel.from_pretrained(base_model, folder)` reads.

    PEFT stores neither pooling and maximum length, which users of the folder must know, nor the prompt's dropout.
    A projected prompt is stored as the output of the projection, a shared prompt with equal keys and values in every layer. A
    head for training only (`mlp_train_only`) is dropped. An encoder inside the adapter's folder is not copied and has no name in
    the config.

    Args:
        encoder: The prompt encoder.
        folder: Absent or empty.

    Raises:
        AdapterError: Weights of the encoder were trained, the prompt is one of the input embeddings, the head is used at test
            time, texts are changed before tokenisation, the encoder has dense layers, several poolings are concatenated, the
            positions are not shifted by P, there is no prompt, PEFT does not support the family, or the folder cannot be written.

    Examples:
        >>> from promcse_pl.adapter import load_adapter
        >>> export_peft(load_adapter(Path("outputs/.../adapter")), Path("peft_adapter"))  # doctest: +SKIP
    """
    folder = expand(folder)
    backbone, length = encoder.backbone, encoder.prompt.length
    _check_family(backbone)
    if backbone.tuning.weights != "none":
        raise AdapterError(
            f"weights of the encoder were trained (tuning.weights={backbone.tuning.weights}), and prefix tuning of PEFT stores a "
            "prompt alone. Export to sentence-transformers instead"
        )
    if not isinstance(encoder.prompt, DeepPrompt):
        raise AdapterError(
            f"PEFT's prefix tuning has keys and values in every layer, this adapter has prompt.kind={encoder.prompt.kind}. Train "
            "with prompt.kind=deep or prompt.kind=shared, or export to sentence-transformers"
        )
    if encoder.has_test_head:
        head = "MLP head" if encoder.head_mode == "mlp" else "low-rank head"
        raise AdapterError(
            f"the {head} cannot be stored by PEFT, and the embeddings depend on it. Train with model.head=none, or export to "
            "sentence-transformers"
        )
    if len(backbone.dense) or count_pooled_parts(encoder.pooling) > 1:
        what = "dense layers of the encoder" if len(backbone.dense) else f"concatenated poolings ({encoder.pooling})"
        raise AdapterError(
            f"the {what} cannot be stored by PEFT, and the embeddings depend on them. Export to sentence-transformers instead"
        )
    if encoder.text.changes_texts:
        raise AdapterError(
            "the default prompt and the lower case of texts cannot be stored by PEFT, and the embeddings depend on them. Export "
            "to sentence-transformers instead"
        )
    if length == 0 or encoder.position_offset != length:
        raise AdapterError(
            f"PEFT shifts all positions by the prompt length, so it needs position_offset = prompt length >= 1; this adapter "
            f"has position_offset {encoder.position_offset} and prompt length {length}. Train with prompt.position_offset=null, "
            "or export to sentence-transformers"
        )
    with torch.no_grad():
        flat = encoder.prompt.flat().float().cpu().contiguous()
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "FEATURE_EXTRACTION",
        "inference_mode": True,
        "base_model_name_or_path": None if backbone.identity.name == BUNDLED else backbone.identity.name,
        "revision": backbone.identity.revision,
        "num_virtual_tokens": length,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "encoder_hidden_size": backbone.width,
        **_shape_of(backbone),
    }
    with new_folder(folder, error=AdapterError) as new:
        (new / WEIGHTS).write_bytes(save({TENSOR: flat}))
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def import_peft(folder: str | Path, *, pooling: str = "avg", encoder: str | Path | None = None) -> PromptEncoder:
    """Read a prefix-tuning adapter of PEFT and the encoder it names.

    PEFT stores neither the pooling nor a hash of the encoder, so the caller must know both. PEFT wraps the encoder
    only, so the pipeline of a sentence-transformers folder is ignored.

    Args:
        folder: Folder with adapter_config.json and adapter_model.safetensors (or .bin, from which only tensors are read).
        pooling: Pooling of the embeddings; see `promcse_pl.models.pooling`.
        encoder: Folder or hub id, if not the one in the config.

    Returns:
        The prompt encoder in eval mode, without head and prompt dropout, its positions shifted by P as PEFT does.

    Raises:
        ConfigError: An unknown pooling.
        AdapterError: Not a prefix of PEFT, damaged, with more tensors than the prefix, or not of the encoder's shape.
        EncoderError: The encoder cannot be found.
    """
    if not is_pooling(pooling):
        raise ConfigError(f"pooling must be one of {ALLOWED_POOLINGS}, got {pooling!r}")
    folder = expand(folder)
    config, prompt = _read_config(folder / CONFIG), _read_prompt(folder)
    name = encoder or config.get("base_model_name_or_path")
    if not name:
        raise AdapterError(f"{folder / CONFIG} names no encoder. Try: import_peft(folder, encoder=FOLDER_OR_HUB_ID)")
    revision = None if encoder else config.get("revision")
    backbone = FrozenBackbone.load(name, revision=revision, with_pipeline=False)
    _check_family(backbone)
    for key, value in _shape_of(backbone).items():
        if config.get(key) != value:
            raise AdapterError(f"{folder} was made for an encoder with {key} {config.get(key)}; {name} has {value}")
    length, wanted = config.get("num_virtual_tokens"), backbone.layers * 2 * backbone.width
    if tuple(prompt.shape) != (length, wanted):
        raise AdapterError(f"{folder}: {TENSOR} has shape {tuple(prompt.shape)}, expected {(length, wanted)}")
    with torch.random.fork_rng(devices=[]):
        model = PromptEncoder(backbone, length=len(prompt), pooling=pooling, dropout=0.0)
    model.prompt.embedding.weight.data.copy_(prompt)
    return model.eval()


def _shape_of(backbone: FrozenBackbone) -> dict[str, int]:
    return {"num_layers": backbone.layers, "num_attention_heads": backbone.heads, "token_dim": backbone.width}


def _check_family(backbone: FrozenBackbone) -> None:
    if backbone.model_type not in FAMILIES:
        raise AdapterError(
            f"PEFT's prefix tuning does not run on {backbone.model_type} encoders. It does on: {', '.join(FAMILIES)}"
        )


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path, "a PEFT adapter")
    kind = config.get("peft_type")
    if kind != "PREFIX_TUNING":
        raise AdapterError(f"{path} describes a PEFT adapter of the type {kind}; only PREFIX_TUNING is a deep prompt")
    if config.get("num_transformer_submodules") not in (None, 1):
        raise AdapterError(f"{path} describes a prefix of an encoder-decoder model; only encoders are supported")
    return config


def _read_prompt(folder: Path) -> Tensor:
    path, stored = read_tensors(folder, WEIGHTS, PICKLED)
    if set(stored) != {TENSOR}:
        raise AdapterError(
            f"{path} must hold {TENSOR} alone, got {sorted(map(str, stored))}: other trained tensors cannot be kept"
        )
    if not bool(torch.isfinite(stored[TENSOR]).all()):
        raise AdapterError(f"{path}: {TENSOR} must be a tensor of finite values")
    return stored[TENSOR]
