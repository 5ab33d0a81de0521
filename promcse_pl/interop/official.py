"""Import and export checkpoints of the official PromCSE code.

A published folder has the whole encoder, the prompt and the MLP in one file, but neither the prompt length, nor the projection
flag, nor the pooler. The first two follow from the names and shapes of the tensors. Whether the MLP is kept at test time is an
argument, or inferred from the folder's name.
"""

# P prompt length, L layers, D width

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promcse_pl.adapter_folder import BUNDLED, find_adapter
from promcse_pl.config import Head
from promcse_pl.config.pooling import ALLOWED_POOLINGS, is_pooling
from promcse_pl.data.tokenizer import tokenizer_fingerprint
from promcse_pl.interop.files import read_json, read_tensors
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.encoder_files import first_line, model_on_meta, quiet_transformers, read_config, without_pooler
from promcse_pl.models.hub import locate, refuse_special_files
from promcse_pl.models.identity import EncoderId, differences
from promcse_pl.models.prompt import DeepPrompt, SharedPrompt
from promcse_pl.models.weights import file_sha256
from promcse_pl.utils.errors import AdapterError, EncoderError
from promcse_pl.utils.files import new_folder
from promcse_pl.utils.paths import expand, is_folder, looks_like_path, run_command

CLASSES = {"bert": "BertForCL", "roberta": "RobertaForCL"}
"""Encoder families of the official code -> its class in config.json."""
SAFE, PICKLE = "model.safetensors", "pytorch_model.bin"
README = "README.md"

_TRAINED = {"prefix_encoder.": "prompt.", "mlp.": "head."}
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
_CONFIG_KEYS = (
    "attention_probs_dropout_prob",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_dropout_prob",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "pad_token_id",
    "type_vocab_size",
    "vocab_size",
)
_MLM_HEAD = "lm_head."


@dataclass(frozen=True, slots=True)
class Imported:
    """An official checkpoint as a prompt encoder.

    Attributes:
        encoder: In eval mode; `save_adapter` keeps the frozen encoder inside the adapter unless a name gives it.
        notes: Messages on what was read, inferred and dropped.
    """

    encoder: PromptEncoder
    notes: tuple[str, ...]


def import_official(source: str | Path, *, pooling: str | None = None, encoder: str | Path | None = None) -> Imported:
    """Read a checkpoint of the official code; no code in it is run.

    Args:
        source: Published folder, or hub id.
        pooling: `cls`: the MLP is kept at test time (supervised); `cls_before_pooler`: it is left out (unsupervised); or one of
            the avg poolings, which crash in the official code. None: `cls_before_pooler` without an MLP or with "unsup" in the
            folder's name, else `cls`.
        encoder: Name of the frozen encoder; None: what config.json calls it. The adapter refers to it if it holds the same
            tensors bit for bit, and keeps the checkpoint's own otherwise.

    Raises:
        AdapterError: Not an official checkpoint, damaged, a pickle with code in it, shapes that do not fit config.json, values
            that are not finite, or a pooling that it cannot have.
        EncoderError: Another encoder family, or an encoder that was asked for and cannot be read.
    """
    folder = _find(str(source))
    raw = read_json(folder / "config.json", "a checkpoint of the official code")
    family = raw.get("model_type")
    if family not in CLASSES:
        raise EncoderError(f"{source} has model_type {family!r}; the official code knows {' and '.join(CLASSES)}")
    path, state = read_tensors(folder, SAFE, PICKLE)
    frozen, trained, left_out = _split(state, family, path)

    chosen, head, pooling_note = _choose_pooling(
        pooling, str(source), has_mlp=any(name.startswith("head.") for name in trained)
    )
    if head == "none":
        trained = {name: tensor for name, tensor in trained.items() if not name.startswith("head.")}
    inner = _build_backbone(folder, frozen, path)
    backbone, encoder_note = _choose_backbone(
        None if encoder is None else str(encoder), raw.get("_name_or_path"), inner
    )
    projection = trained.get("prompt.trans.0.weight")
    options: dict[str, Any] = {
        "length": len(trained["prompt.embedding.weight"]),
        "projection_size": None if projection is None else len(projection),
        "pooling": chosen,
        "head": head,
    }
    with torch.device("meta"):  # shapes only: one tensor must not determine how much memory is allocated for the others
        wanted = PromptEncoder(backbone, **options).state_dict()
    _fit(trained, wanted, path)
    with torch.random.fork_rng(devices=[]):
        model = PromptEncoder(backbone, **options)
    model.load_state_dict(trained, strict=True)
    prompt = f"prompt length {model.prompt.length}, " + (
        "no projection" if projection is None else f"projection of size {len(projection)}"
    )
    notes = [f"{prompt}: read from the tensors", pooling_note, encoder_note]
    if "lm_head" in left_out:
        notes.append(
            "the MLM head (lm_head) is dropped: embeddings do not use it. An export of this adapter has no MLM head, so the "
            "official code would initialise a new one for --do_mlm"
        )
    if "pooler" in left_out:
        notes.append(
            "the pooler of the pre-trained encoder (pooler) is dropped: neither this package nor the official code uses it"
        )
    return Imported(model.eval(), tuple(notes))


def _find(source: str) -> Path:
    """Return the folder of a checkpoint: the named folder, or a download from the hub."""
    folder = expand(source)
    if not is_folder(folder):
        if looks_like_path(source) or "/" not in source:
            raise AdapterError(f"{source} is neither a folder (current folder: {Path.cwd()}) nor a hub id (OWNER/NAME)")
        return locate(source, None, weights=(SAFE, PICKLE))[0]
    if find_adapter(folder):
        raise AdapterError(
            f"{source} is already an adapter of this package. Use it directly: promcse encode {source} ..."
        )
    refuse_special_files(folder)
    return folder


def _split(state: dict[str, Tensor], family: str, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Return the frozen encoder's tensors, the trained tensors under this package's names, and the names of dropped modules."""
    if "prefix_encoder.embedding.weight" not in state:
        kind = "a SimCSE model" if "mlp.dense.weight" in state else "a plain encoder or a SimCSE model"
        raise AdapterError(
            f"{path} has no prompt (prefix_encoder.embedding.weight); it looks like {kind}. An encoder is trained on, not "
            f"imported: {run_command(f'model.path={path.parent}')}"
        )
    frozen: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    left_out: dict[str, None] = {}
    for name, tensor in state.items():
        official = next((prefix for prefix in _TRAINED if name.startswith(prefix)), None)
        if official is not None:
            trained[_TRAINED[official] + name.removeprefix(official)] = tensor.float()
        elif name.startswith((_MLM_HEAD, f"{family}.pooler.")):
            left_out[name.removeprefix(f"{family}.").partition(".")[0]] = None
        elif name.startswith(f"{family}."):
            if not name.endswith(_BUFFERS):
                frozen[name.removeprefix(f"{family}.")] = tensor.float()
        else:
            raise AdapterError(f"{path} holds {name}, which no {CLASSES[family]} has: it is not of the official code")
    for name, tensor in (frozen | trained).items():
        if tensor.dim() == 0:
            raise AdapterError(f"{path}: {name} is a single number")
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{path}: {name} holds values that are not finite")
    return frozen, trained, list(left_out)


def _fit(tensors: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    """Check that tensors have the names and shapes that config.json and the prompt require."""
    for what, names in (("lacks", set(wanted) - set(tensors)), ("holds the unknown", set(tensors) - set(wanted))):
        if names:
            raise AdapterError(
                f"{path} {what} {min(names)} ({len(names)} such tensors): it does not fit the config.json beside it"
            )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise AdapterError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, the config.json beside it asks for {tuple(wanted[name].shape)}"
            )


def _choose_pooling(pooling: str | None, source: str, *, has_mlp: bool) -> tuple[str, Head, str]:
    """Return pooling and head in this package's terms, and a note on them."""
    if pooling is not None and not is_pooling(pooling):
        raise AdapterError(f"--pooling must be one of {ALLOWED_POOLINGS}, got {pooling!r}")
    name = expand(source).resolve().name
    guess = "cls_before_pooler" if not has_mlp or "unsup" in name.lower() else "cls"
    chosen = guess if pooling is None else pooling
    if not has_mlp:
        if chosen == "cls":
            raise AdapterError(
                "--pooling cls needs the MLP, and the checkpoint has none. Try: --pooling cls_before_pooler"
            )
        return chosen, "none", f"pooling {chosen}: there is no MLP"
    fates: dict[str, tuple[Head, str]] = {
        "cls": ("mlp", "kept"),
        "cls_before_pooler": ("mlp_train_only", "for training alone"),
    }
    head, fate = fates.get(chosen, ("none", "dropped"))
    note = f"pooling {chosen}: the MLP is {fate}"
    if pooling is None:
        other = "cls" if chosen == "cls_before_pooler" else "cls_before_pooler"
        note += (
            f". It was inferred from the name {name}, since the files do not record it. For the other: "
            f"promcse import {source} --pooling {other} -o ADAPTER"
        )
    return "cls" if chosen == "cls_before_pooler" else chosen, head, note


def _build_backbone(folder: Path, frozen: dict[str, Tensor], path: Path) -> FrozenBackbone:
    """Build the encoder from the checkpoint's own tensors."""
    from transformers import AutoModel

    config = read_config(folder, str(folder))
    try:
        if config.num_hidden_layers > len(frozen):
            raise ValueError(
                f"num_hidden_layers is {config.num_hidden_layers}, but there are only {len(frozen)} tensors"
            )
        wanted = model_on_meta(config).state_dict()
    except Exception as error:
        raise AdapterError(f"{folder / 'config.json'} describes no encoder: {first_line(error)}") from error
    _fit(frozen, wanted, path)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        model = AutoModel.from_config(config, dtype=torch.float32, **without_pooler(config))
    model.load_state_dict(frozen, strict=True)
    backbone = FrozenBackbone(model, EncoderId(str(folder), None, file_sha256(path)), folder)
    fingerprint = tokenizer_fingerprint(backbone.tokenizer)  # raises without a tokenizer: the checkpoint is unusable
    backbone.identity = dataclasses.replace(backbone.identity, tokenizer=fingerprint)
    return backbone


def _choose_backbone(asked: str | None, stored: object, inner: FrozenBackbone) -> tuple[FrozenBackbone, str]:
    """Return the named encoder if it is bit for bit that of the checkpoint, otherwise the checkpoint's, and a note."""
    name = asked or (stored if isinstance(stored, str) else "")
    why = "config.json names no other; to refer to one: --encoder NAME"
    if name:
        try:
            named = FrozenBackbone.load(name, with_pipeline=False)
            difference = _difference(inner, named)
        except EncoderError as error:
            if asked:
                raise
            why = f"config.json names {name}, which cannot be read here ({error})"
        else:
            if not difference:
                return (
                    named,
                    f"encoder {name}: equal to the checkpoint's bit for bit, so the adapter refers to it by name",
                )
            why = f"{name} is another one: {difference}"
    inner.identity = dataclasses.replace(inner.identity, name=BUNDLED)
    return inner, f"encoder kept inside the adapter: {why}"


def _difference(inner: FrozenBackbone, named: FrozenBackbone) -> str:
    """Describe the differences that affect the embeddings of two encoders; "" if there are none."""
    ours, theirs = inner.model.state_dict(), named.model.state_dict()
    other = [name for name, tensor in ours.items() if name not in theirs or not torch.equal(tensor, theirs[name])]
    if other or len(ours) != len(theirs):
        return f"{len(other)} of {len(ours)} tensors differ"
    return "; ".join(differences(inner.identity, named.identity, owner="here"))


def export_official(encoder: PromptEncoder, folder: str | Path) -> str:
    """Write a folder that the official code (transformers 4.2.1) loads.

    A shared prompt is stored as a deep one with equal keys and values in every layer.

    Args:
        encoder: The prompt encoder; its backbone is BERT or RoBERTa in float32.
        folder: Absent or empty.

    Returns:
        The text of README.md in the folder: the command line options of the official code, which the format does not contain.

    Raises:
        AdapterError: The official code does not support the adapter, or the folder cannot be written.
    """
    folder, backbone = expand(folder), encoder.backbone
    family, config = backbone.model_type, backbone.model.config
    reason = _no_export(encoder)
    if reason:
        raise AdapterError(f"the official code cannot use this adapter: {reason}")
    state = {f"{family}.{name}": tensor for name, tensor in backbone.model.state_dict().items()}
    positions = torch.arange(config.max_position_embeddings).unsqueeze(0)  # type: ignore[union-attr, arg-type]
    state[f"{family}.embeddings.position_ids"] = positions
    for name, tensor in encoder.state_dict().items():
        official, ours = next((o, u) for o, u in _TRAINED.items() if name.startswith(u))
        state[official + name.removeprefix(ours)] = tensor
    if isinstance(encoder.prompt, SharedPrompt):
        state["prefix_encoder.embedding.weight"] = encoder.prompt.flat()
    known = {key: getattr(config, key, None) for key in _CONFIG_KEYS}
    described = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        **{key: value for key, value in known.items() if value is not None},
        "position_embedding_type": "absolute",
        "transformers_version": "4.2.1",
    }
    pooler = "cls" if encoder.head_mode == "mlp" else "cls_before_pooler"
    options = f"--pooler_type {pooler} --pre_seq_len {encoder.prompt.length}"
    assert isinstance(encoder.prompt, DeepPrompt)  # others are refused
    if encoder.prompt.trans is not None:
        options += f" --prefix_projection --prefix_hidden_size {encoder.prompt.trans[0].out_features}"
    usage = (
        "A checkpoint for the official PromCSE code. Its files do not hold these options, type them:\n\n"
        f"    python evaluation.py --model_name_or_path {folder} {options}\n\n"
        f"The path must have `{family}` in it{' and not `roberta`' if family == 'bert' else ''}: the official code picks its "
        "class by the path.\n"
    )
    with new_folder(folder, error=AdapterError) as new:
        torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, new / PICKLE)
        _write_json(new / "config.json", described)
        _write_tokenizer(backbone.tokenizer, new)
        (new / README).write_text(usage, encoding="utf-8")
    return usage


def _no_export(encoder: PromptEncoder) -> str:
    """Return why the official code cannot use an adapter; "" if it can."""
    backbone, prompt = encoder.backbone, encoder.prompt
    if backbone.model_type not in CLASSES:
        return f"its encoder is {backbone.model_type}, allowed: {', '.join(CLASSES)}"
    if not isinstance(prompt, DeepPrompt):
        return (
            f"it has a prompt in every layer, this adapter has prompt.kind={prompt.kind} (export to sentence-transformers "
            "instead)"
        )
    if encoder.head_mode == "low_rank":
        return "it has no head of the kind low_rank (export to sentence-transformers instead)"
    if backbone.tuning.weights != "none":
        return (
            f"weights of its encoder were trained (tuning.weights={backbone.tuning.weights}), and the official code trains a "
            "prompt alone (export to sentence-transformers instead)"
        )
    if len(backbone.dense):
        return "its encoder has dense layers after the pooling (export to sentence-transformers instead)"
    if encoder.text.changes_texts:
        return "its texts get a default prompt or are converted to lower case (export to sentence-transformers instead)"
    if encoder.pooling not in ("cls", "cls_before_pooler"):
        return (
            f"it does not support the pooling {encoder.pooling}, only cls and cls_before_pooler (export to sentence-transformers "
            "instead)"
        )
    if encoder.position_offset != prompt.length:
        return f"it shifts positions by the prompt length {prompt.length}, this adapter by {encoder.position_offset}"
    if backbone.dtype != torch.float32:
        return f"the encoder was read as {backbone.dtype}; load it as float32"
    kind = type(backbone.tokenizer.backend_tokenizer.model).__name__
    wanted = {"bert": "WordPiece", "roberta": "BPE"}[backbone.model_type]
    return "" if kind == wanted else f"its tokenizer is {kind}, transformers 4.2.1 needs {wanted}"


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:  # noqa: ANN401  (a transformers tokenizer)
    """Write a tokenizer for transformers 4.2.1: its vocabulary files and the settings of its normaliser."""
    backend = tokenizer.backend_tokenizer
    parts = json.loads(backend.to_str())
    backend.model.save(str(folder))
    special = dict(tokenizer.special_tokens_map)
    settings = {"model_max_length": tokenizer.model_max_length}
    normalizer, splitter = parts["normalizer"] or {}, parts["pre_tokenizer"] or {}
    if normalizer.get("type") == "BertNormalizer":
        settings |= {
            "do_lower_case": normalizer["lowercase"],
            "strip_accents": normalizer["strip_accents"],
            "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        }
    if splitter.get("type") == "ByteLevel":
        settings["add_prefix_space"] = splitter["add_prefix_space"]
    _write_json(folder / "tokenizer_config.json", settings | special)
    _write_json(folder / "special_tokens_map.json", special)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
