"""Save and load adapters: adapter.safetensors (the trained tensors), adapter.json (the settings to use them) and README.md.

The encoder is stored by name, or in the folder encoder/ of the adapter if it has no name or all of its weights were trained. No
code is stored or run. Saves are atomic (`promcse_pl.utils.files.update_folder`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from promcse_pl.adapter_folder import (
    BUNDLED,
    BUNDLED_NAME,
    DESCRIPTION,
    WEIGHTS,
    check_target,
    find_adapter,
    written_description,
)
from promcse_pl.config.pooling import ALLOWED_POOLINGS, is_pooling
from promcse_pl.data.tokenizer import tokenizer_fingerprint
from promcse_pl.model_card import CARD, Form, encoder_metadata, may_replace_card, model_card
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import HEADS, MODEL_PREFIX, LowRankHead, PromptEncoder
from promcse_pl.models.encoder_files import weights_sha256
from promcse_pl.models.hub import download
from promcse_pl.models.identity import EncoderId, differences, encoder_name
from promcse_pl.models.pipeline import SHORTEST_INPUT, TextSettings
from promcse_pl.models.prompt import KINDS, DeepPrompt, Prompt
from promcse_pl.models.tuning import TRAINABLE, Tuning
from promcse_pl.models.weights import TensorSpec, add_to_digest, read_header, read_json_object
from promcse_pl.utils.errors import AdapterError, EncoderError
from promcse_pl.utils.files import current, read_unchanged, update_folder
from promcse_pl.utils.paths import expand, is_folder, looks_like_path
from promcse_pl.version import __version__

FORMAT = 4
"""Incremented when older versions could misread a newer folder.

Format 1 identified the encoder by its weights only. Formats 1 and 2 ignored the pipeline of a sentence-transformers folder, dense
layers included, so they are loaded without it. Formats 1 to 3 stored neither the kind of the prompt, which was deep or projected,
nor the rank of a head, and had no trained weights of the encoder (`tuning`).
"""
ROTATED_KEYS = "after_rotation"
"""Value of `prompt.keys` for encoders with rotary positions: the prompt's keys enter the attention after the rotation."""
_OTHER_ENCODER = "--encoder FOLDER (in Python: PromCSE.load(..., encoder=FOLDER))"
"""How to use an encoder that is not found under the name in the adapter."""
ENCODER_FILES = ("*.json", "model*.safetensors")
"""File patterns of an encoder in an adapter folder; the checksum covers these files."""
_FILES = (DESCRIPTION, WEIGHTS, CARD, *(f"{BUNDLED_NAME}/{pattern}" for pattern in ENCODER_FILES))
HUB_FILES = (*_FILES, *(f"adapter/{pattern}" for pattern in _FILES))
"""File patterns of an adapter on the hub: at the top of a repository, or in its folder adapter/."""


def describe(encoder: PromptEncoder) -> dict[str, Any]:
    """Return the settings of a prompt encoder, everything but its tensors, as plain values."""
    backbone, prompt = encoder.backbone, encoder.prompt
    return {
        "format": FORMAT,
        "promcse_pl": __version__,
        "encoder": {
            "name": backbone.identity.name,
            "revision": backbone.identity.revision,
            "family": backbone.model_type,
            "sha256": backbone.identity.sha256,
            "config": dict(backbone.identity.config),
            "tokenizer": backbone.identity.tokenizer,
            "pipeline": backbone.has_pipeline,
        },
        "tuning": _tuning(backbone),
        "prompt": {
            "kind": prompt.kind,
            "length": prompt.length,
            "projection_size": _projection_size(prompt),
            "dropout": prompt.dropout,
            "keys": _keys(backbone),
        },
        "pooling": encoder.pooling,
        "head": encoder.head_mode,
        "head_rank": encoder.head.rank if isinstance(encoder.head, LowRankHead) else None,
        "position_offset": encoder.position_offset,
        "text": dataclasses.asdict(encoder.text),
        "dtype": "float32",
    }


def training_summary(encoder: PromptEncoder) -> dict[str, Any]:
    """Return the training summary of the adapter that a model was loaded from; empty if its `adapter_hash` has changed."""
    sha256, summary = encoder.trained_by or ("", {})
    return summary if summary and sha256 == adapter_hash(encoder) else {}


def card_of(encoder: PromptEncoder, description: dict[str, Any], name: str, form: Form = "adapter") -> str:
    """Return the model card of an adapter, or of its export; see `model_card`."""
    identity = encoder.backbone.identity
    return model_card(
        description,
        name=name,
        parameters=sum(tensor.numel() for tensor in encoder.state_dict().values()),
        encoder_card=encoder_metadata(identity.name, identity.revision),
        form=form,
    )


def _projection_size(prompt: Prompt) -> int | None:
    if not isinstance(prompt, DeepPrompt) or prompt.trans is None:
        return None
    first: Any = prompt.trans[0]
    return int(first.out_features)


def _tuning(backbone: FrozenBackbone) -> dict[str, Any] | None:
    """Return which weights of the encoder were trained, and their hash; None for a frozen encoder."""
    if backbone.tuning.weights == "none":
        return None
    return {**dataclasses.asdict(backbone.tuning), "sha256": backbone.tuned_sha256()}


def _keys(backbone: FrozenBackbone) -> str | None:
    return ROTATED_KEYS if getattr(backbone.model.config, "rope_parameters", None) else None


def save_adapter(encoder: PromptEncoder, folder: str | Path, *, training: dict[str, Any] | None = None) -> None:
    """Write an adapter and its model card to a folder; an adapter that is already there is replaced atomically.

    Other files in the folder are kept, such as .git and a README.md that a person wrote or edited.

    Args:
        encoder: The prompt encoder.
        folder: Absent, empty, or the folder of an adapter.
        training: Summary of the run, plain values; None: the summary of the adapter that the model was loaded from, if the
            model is unchanged.

    Raises:
        AdapterError: The folder cannot be written, or contains something other than an adapter; or weights of an encoder without
            a name were trained.
        EncoderError: Weights of the encoder were trained and then rounded to another type than float32.
    """
    folder, backbone = expand(folder), encoder.backbone
    check_target(folder)
    _require_named_encoder(backbone)
    if backbone.is_rounded:
        backbone.require_float32()
    in_encoder = backbone.tuning.weights == "full"
    state = {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in encoder.state_dict().items()
        if not (in_encoder and name.startswith(MODEL_PREFIX))
    }
    description: dict[str, Any] = {
        **describe(encoder),
        "training": training_summary(encoder) if training is None else training,
    }
    weights = save(state)  # safetensors' own save_file makes a file that only its owner can read
    own = _own_entries(folder, description)
    with update_folder(folder, own, error=AdapterError) as new:
        if _holds_encoder(description):
            sha256 = backbone.save(new / BUNDLED)
            if not in_encoder:
                description["encoder"]["sha256"] = sha256
        (new / WEIGHTS).write_bytes(weights)
        description["checksum"] = _checksum(description, weights, new / BUNDLED)
        (new / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        if CARD in own:
            (new / CARD).write_text(card_of(encoder, description, folder.absolute().name), encoding="utf-8")


def _own_entries(folder: Path, description: dict[str, Any]) -> list[str]:
    """Return the names of the files and folders that saving an adapter replaces or removes.

    Raises:
        AdapterError: The adapter contains its encoder, but the folder encoder/ exists and is not part of an adapter.
    """
    own = [WEIGHTS, DESCRIPTION, *([CARD] if may_replace_card(folder) else [])]
    replaced = written_description(folder)
    if replaced and _holds_encoder(replaced):
        own.append(BUNDLED_NAME)
    elif _holds_encoder(description) and os.path.lexists(folder / BUNDLED_NAME):
        raise AdapterError(
            f"{folder / BUNDLED_NAME} already exists and is not part of the adapter. Move it to another folder"
        )
    return own


def _require_named_encoder(backbone: FrozenBackbone) -> None:
    """Reject trained weights of an encoder that is stored in its adapter: the pre-trained encoder would be lost."""
    if backbone.tuning.weights != "none" and backbone.identity.name == BUNDLED:
        raise AdapterError(
            f"an adapter with tuning.weights={backbone.tuning.weights} stores the name of its pre-trained encoder, but this "
            f"encoder has none: it was loaded from the folder {BUNDLED_NAME}/ of an adapter or from an official checkpoint. Save "
            "it to a folder before training. Try: backbone.save(Path('FOLDER')), then FrozenBackbone.load('FOLDER').tune(...)"
        )


def _trains_all(description: dict[str, Any]) -> bool:
    """Return whether all weights of the encoder were trained; formats 1 to 3 have no trained weights."""
    tuning = description.get("tuning")
    return isinstance(tuning, dict) and tuning.get("weights") == "full"


def _holds_encoder(description: dict[str, Any]) -> bool:
    """Return whether the encoder is in the folder of its adapter."""
    return description["encoder"].get("name") == BUNDLED or _trains_all(description)


def _checksum(description: dict[str, Any], weights: bytes, bundled: Path) -> str:
    """Return the hex sha256 of a description, the tensors and the files of the encoder in the adapter's folder."""
    described = {key: value for key, value in description.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    digest.update(weights)
    if _holds_encoder(description):
        for path in sorted(bundled.glob("*.json")):
            digest.update(path.name.encode() + path.read_bytes())
    if _trains_all(description):  # otherwise the description has the sha256 of the encoder's weights
        digest.update(weights_sha256(bundled).encode())
    return digest.hexdigest()


def adapter_hash(encoder: PromptEncoder, tokenizer: Any | None = None) -> str:  # noqa: ANN401  (a transformers tokenizer)
    """Return the hex sha256 of everything that affects the embeddings, and of nothing else.

    It covers the trained tensors (names, shapes, float32 values), the weights of the encoder before training, the config, dense
    layers and tokenizer of the encoder (see `promcse_pl.models.identity`), pooling, head, positions and text settings. It
    excludes the encoder's name, the prompt's dropout, versions and the training summary.

    Args:
        encoder: The prompt encoder.
        tokenizer: The tokenizer in use; None: that of the encoder.
    """
    identity = encoder.backbone.identity
    fingerprint = identity.tokenizer if tokenizer is None else tokenizer_fingerprint(tokenizer)
    head_is_used = encoder.has_test_head
    settings: list[object] = [
        identity.sha256,
        dict(identity.config),
        fingerprint,
        encoder.pooling,
        head_is_used,
        encoder.position_offset,
    ]
    if encoder.text != TextSettings():  # so that the hashes of adapters of formats 1 and 2 do not change
        settings.append(dataclasses.asdict(encoder.text))
    if encoder.prompt.kind in ("shared", "input"):  # as above: those of formats 1 to 3
        settings.append(encoder.prompt.kind)
    if tuning := _tuning(encoder.backbone):
        settings.append(tuning)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    left_out = (MODEL_PREFIX,) if head_is_used else (MODEL_PREFIX, "head.")
    state = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith(left_out)}
    add_to_digest(digest, state)
    return digest.hexdigest()


def locate_adapter(name: str | Path, revision: str | None = None) -> Path:
    """Return the local folder of an adapter or run; a hub id OWNER/NAME that is not a local folder is downloaded.

    Raises:
        AdapterError: The hub id cannot be downloaded and is not in the local cache.
    """
    folder = expand(name)
    if is_folder(folder) or looks_like_path(str(name)) or "/" not in str(name):
        return folder
    try:
        return download(str(name), revision, HUB_FILES)
    except EncoderError as error:
        raise AdapterError(f"there is no folder {name} (current folder: {Path.cwd()}), and {error}") from error


def load_adapter(
    folder: str | Path, *, encoder: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> PromptEncoder:
    """Read an adapter and its frozen encoder.

    Args:
        folder: Folder of the adapter or of its run.
        encoder: Folder or hub id of the frozen encoder; None: the name in the adapter. If all weights were trained, the encoder
            is that of the adapter, and this one is only read for comparisons (`FrozenBackbone.base`).
        dtype: Type of the encoder's weights.

    Returns:
        The prompt encoder in eval mode, on the CPU. Weights of the encoder that were trained have no gradient.

    Raises:
        AdapterError: Not an adapter, a newer format, missing or unknown keys, wrong shapes, a truncated file, not finite, or
            trained on an encoder with different weights, config or tokenizer.
    """
    folder = expand(folder)
    found = find_adapter(folder) or folder
    where = None if encoder is None else str(encoder)
    return read_unchanged(found, DESCRIPTION, lambda: _load(found, where, dtype))


def _load(folder: Path, encoder: str | None, dtype: torch.dtype) -> PromptEncoder:
    about, header = _read_description(folder), _read_header(folder)
    _check_rank(about.get("tuning"), header, folder)
    backbone = _load_backbone(folder, about, encoder, dtype)
    options: dict[str, Any] = {
        "length": about["prompt"]["length"],
        "kind": about["prompt"].get("kind", "deep"),
        "projection_size": about["prompt"]["projection_size"],
        "pooling": about["pooling"],
        "head": about["head"],
        "head_rank": about.get("head_rank"),
        "dropout": about["prompt"]["dropout"],
        "position_offset": about["position_offset"],
        "text": TextSettings(**about.get("text", {})),
    }
    if backbone.longest_input(about["position_offset"]) < SHORTEST_INPUT:
        raise AdapterError(
            f"{folder / DESCRIPTION}: position_offset {about['position_offset']} leaves no room for a sentence in "
            f"{backbone.identity.name}"
        )
    with torch.device("meta"):  # shapes only: adapter.json may declare sizes that do not fit into memory
        wanted = PromptEncoder(backbone, **options).state_dict()
    in_encoder = {
        name: wanted.pop(name) for name in list(wanted) if name.startswith(MODEL_PREFIX) and _trains_all(about)
    }
    _check_header(header, wanted, folder)
    stored = _read_tensors(about, folder)
    with torch.random.fork_rng(devices=[]):
        model = PromptEncoder(backbone, **options)
    model.load_state_dict({**in_encoder, **stored}, strict=True)
    backbone.freeze()
    model.trained_by = (adapter_hash(model), about["training"])
    return model.eval()


def _load_backbone(folder: Path, about: dict[str, Any], encoder: str | None, dtype: torch.dtype) -> FrozenBackbone:
    """Read the encoder of an adapter; LoRA layers are inserted, but the trained tensors are not loaded yet."""
    stored, tuning = about["encoder"], about.get("tuning")
    bundled = _trains_all(about) or (encoder is None and stored["name"] == BUNDLED)
    name = str(current(folder, BUNDLED_NAME).absolute()) if bundled else encoder or stored["name"]
    if looks_like_path(name) and not is_folder(expand(name)):
        origin = "" if encoder else f"named in {folder / DESCRIPTION}, "
        raise EncoderError(
            f"the encoder folder {name} does not exist ({origin}current folder: {Path.cwd()}). Try: {_OTHER_ENCODER}"
        )
    backbone = FrozenBackbone.load(
        name,
        revision=None if encoder or bundled else stored["revision"],
        dtype=dtype,
        with_pipeline=stored.get("pipeline", False),
    )
    if _trains_all(about):  # the identity is that of the pre-trained encoder
        revision = None if encoder else stored["revision"]
        name = encoder_name(encoder) if encoder else stored["name"]
        backbone.identity = dataclasses.replace(
            backbone.identity, name=name, revision=revision, sha256=stored["sha256"]
        )
    _check_encoder(stored, backbone, folder)
    if bundled and not _trains_all(about):
        # so that the next save bundles it again
        backbone.identity = dataclasses.replace(backbone.identity, name=BUNDLED)
    if tuning:
        with torch.random.fork_rng(devices=[]):
            backbone.tune(Tuning(tuning["weights"], tuning["rank"], tuning["alpha"]))
        if backbone.is_rounded:
            backbone.exact_sha256 = tuning["sha256"]
    return backbone


def _check_encoder(stored: dict[str, Any], backbone: FrozenBackbone, folder: Path) -> None:
    """Reject an encoder whose embeddings differ from those of the encoder that the adapter was trained on."""
    config = stored.get("config", {"model_type": stored["family"]})  # format 1 stores only the family
    expected = EncoderId(stored["name"], stored["revision"], stored["sha256"], config, stored.get("tokenizer"))
    actual = backbone.identity
    if actual.sha256 != expected.sha256:
        raise AdapterError(
            f"{folder} was trained on {expected.name} with weights {expected.sha256[:12]}…, but "
            f"{actual.name} has {actual.sha256[:12]}…. Try: {_OTHER_ENCODER}"
        )
    found = differences(expected, actual, owner="the adapter was trained with")
    if found:
        raise AdapterError(
            f"{folder} was trained on {expected.name}, and {actual.name} has the same weights but would produce different "
            f"embeddings: {'; '.join(found)}. Use an unmodified copy of the encoder: --encoder FOLDER (in Python: "
            f"PromCSE.load({str(folder)!r}, encoder=FOLDER))"
        )


def _read_description(folder: Path) -> dict[str, Any]:
    path = current(folder, DESCRIPTION)
    try:
        about = read_json_object(path)
    except FileNotFoundError:
        reason = f"it has no {DESCRIPTION}" if folder.is_dir() else "there is no such folder"
        raise AdapterError(
            f"{folder} is not an adapter: {reason}. Give the `adapter` folder of a run, or the run's folder"
        ) from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if type(about.get("format")) is not int or about["format"] < 1:
        raise AdapterError(f"{path} is not an adapter's description: it has no format number")
    if about["format"] > FORMAT:
        raise AdapterError(
            f"{path} has format {about['format']} (written by promcse_pl {about.get('promcse_pl')}); this version "
            f"({__version__}) reads up to {FORMAT}. Try: pip install --upgrade promcse_pl"
        )
    return _checked(about, path)


def _checked(about: dict[str, Any], path: Path) -> dict[str, Any]:
    """Check every field of a description; unknown keys are rejected, since they could affect the embeddings."""
    template: dict[str, Any] = {
        "format": int,
        "promcse_pl": str,
        "encoder": {"name": str, "revision": str | None, "family": str, "sha256": str},
        "prompt": {"length": int, "projection_size": int | None, "dropout": float | int},
        "pooling": str,
        "head": str,
        "position_offset": int,
        "dtype": str,
        "training": dict,
    }

    def check(value: Any, wanted: Any, key: str) -> None:  # noqa: ANN401
        if isinstance(wanted, dict):
            if not isinstance(value, dict) or set(value) != set(wanted):
                given = sorted(value) if isinstance(value, dict) else value
                raise AdapterError(f"{path}: {key or 'the file'} must have the keys {sorted(wanted)}, got {given}")
            for name, inner in wanted.items():
                check(value[name], inner, f"{key}.{name}" if key else name)
        elif not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise AdapterError(f"{path}: {key} has the wrong type: {value!r}")

    if about["format"] > 1:
        template["encoder"] |= {"config": dict, "tokenizer": str | None}
    if about["format"] > 2:
        template["encoder"]["pipeline"] = bool
        template["prompt"]["keys"] = str | None
        text = {"max_length": int | None, "lower_case": bool, "prompts": dict, "default_prompt": str | None}
        template["text"] = text
    if about["format"] > 3:
        template["prompt"]["kind"] = str
        template["head_rank"] = int | None
        tuning = {"weights": str, "rank": int | None, "alpha": float | int | None, "sha256": str}
        template["tuning"] = tuning if isinstance(about.get("tuning"), dict) else type(None)
    if about["format"] > 3 or "checksum" in about:  # the first adapters of formats 1 to 3 have none
        template["checksum"] = str
    check(about, template, "")
    if not is_pooling(about["pooling"]):
        raise AdapterError(f"{path}: pooling is {about['pooling']!r}; allowed: {ALLOWED_POOLINGS}")
    for key, value, allowed in (
        ("head", about["head"], HEADS),
        ("prompt.kind", about["prompt"].get("kind", "deep"), KINDS),
        ("dtype", about["dtype"], ("float32",)),
        ("prompt.keys", about["prompt"].get("keys"), (None, ROTATED_KEYS)),
    ):
        if value not in allowed:
            raise AdapterError(f"{path}: {key} is {value!r}; allowed: {', '.join(map(str, allowed))}")
    _check_text(about.get("text", {}), path)
    _check_tuning(about.get("tuning"), path)
    _check_ranges(about, path)
    return about


def _check_ranges(about: dict[str, Any], path: Path) -> None:
    """Check the ranges of a description's numbers, and which of them must be null; types have been checked."""
    prompt, rank = about["prompt"], about.get("head_rank")
    ranges = (
        ("prompt.length", prompt["length"], 0, 4096),
        ("prompt.projection_size", prompt["projection_size"] or 1, 1, 2**20),
        ("prompt.dropout", prompt["dropout"], 0, 1),
        ("position_offset", about["position_offset"], 0, 2**20),
        ("head_rank", rank if rank is not None else 1, 1, 2**20),
    )
    for key, value, low, high in ranges:
        if not low <= value <= high:
            raise AdapterError(f"{path}: {key} is {value}; allowed: {low} to {high}")
    if "kind" in prompt and (prompt["kind"] == "projected") != (prompt["projection_size"] is not None):
        raise AdapterError(
            f"{path}: prompt.projection_size is {prompt['projection_size']} with prompt.kind {prompt['kind']}; allowed: a number "
            "with projected, null with other kinds"
        )
    if (about["head"] == "low_rank") != (rank is not None):
        raise AdapterError(
            f"{path}: head_rank is {rank} with head {about['head']}; allowed: a number with low_rank, null with other heads"
        )


def _check_text(text: dict[str, Any], path: Path) -> None:
    """Check the values of the text settings; their types have been checked."""
    if text and text["max_length"] is not None and text["max_length"] < SHORTEST_INPUT:
        raise AdapterError(
            f"{path}: text.max_length is {text['max_length']}; allowed: null, or {SHORTEST_INPUT} or more"
        )
    prompts = text.get("prompts", {})
    for name, prompt in prompts.items():
        if not isinstance(prompt, str):
            raise AdapterError(f"{path}: text.prompts.{name} has the wrong type: {prompt!r}")
    if text.get("default_prompt") is not None and text["default_prompt"] not in prompts:
        raise AdapterError(
            f"{path}: text.default_prompt is {text['default_prompt']!r}; allowed: null, or one of {sorted(prompts)}"
        )


def _check_tuning(tuning: dict[str, Any] | None, path: Path) -> None:
    """Check the values of the settings of trained weights; their types have been checked."""
    if tuning is None:
        return
    if tuning["weights"] not in TRAINABLE:
        raise AdapterError(f"{path}: tuning.weights is {tuning['weights']!r}; allowed: {', '.join(TRAINABLE)}")
    for key, most in (("rank", 1024), ("alpha", 2**20)):
        value = tuning[key]
        if tuning["weights"] != "lora" and value is not None:
            raise AdapterError(f"{path}: tuning.{key} is {value}; allowed with {tuning['weights']}: null")
        if tuning["weights"] == "lora" and (value is None or not 0 < value <= most):
            raise AdapterError(f"{path}: tuning.{key} is {value}; allowed with lora: above 0, up to {most}")


def read_checked(folder: Path) -> tuple[dict[str, Any], int]:
    """Return the content of adapter.json and the number of trained parameters, after checking the files; no encoder is loaded.

    Raises:
        AdapterError: A file is missing or damaged, or the adapter has a newer format.
    """
    about, header = _read_description(folder), _read_header(folder)
    _read_tensors(about, folder)
    in_encoder = sorted(current(folder, BUNDLED_NAME).glob(ENCODER_FILES[1])) if _trains_all(about) else []
    specs = [*header.values(), *(spec for path in in_encoder for spec in read_header(path).values())]
    return about, sum(spec.numel for spec in specs)


def adapter_files(folder: Path, about: dict[str, Any]) -> dict[str, Path]:
    """Return the files of an adapter without its model card: name in the folder -> path."""
    files = {name: current(folder, name) for name in (DESCRIPTION, WEIGHTS)}
    if _holds_encoder(about):
        paths = (path for pattern in ENCODER_FILES for path in sorted(current(folder, BUNDLED_NAME).glob(pattern)))
        files |= {f"{BUNDLED_NAME}/{path.name}": path for path in paths}
    return files


def _read_header(folder: Path) -> dict[str, TensorSpec]:
    path = current(folder, WEIGHTS)
    try:
        return read_header(path)
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing: the adapter is incomplete") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged or truncated: {error}") from error


def _check_rank(tuning: dict[str, Any] | None, header: dict[str, TensorSpec], folder: Path) -> None:
    """Check the rank of LoRA against the stored matrices A (rank, in) and B (out, rank), before matrices are allocated."""
    if tuning is None or tuning["weights"] != "lora":
        return
    ranks = {spec.shape[:1] for name, spec in header.items() if ".lora_A." in name}
    ranks |= {spec.shape[1:] for name, spec in header.items() if ".lora_B." in name}
    if ranks != {(tuning["rank"],)}:
        raise AdapterError(
            f"{folder}: {DESCRIPTION} has tuning.rank {tuning['rank']}, and {WEIGHTS} LoRA matrices of other ranks or none"
        )


def _check_header(header: dict[str, TensorSpec], wanted: dict[str, Tensor], folder: Path) -> None:
    """Check names, shapes and types of the stored tensors."""
    path = current(folder, WEIGHTS)
    if set(header) != set(wanted):
        raise AdapterError(f"{path} must hold the tensors {sorted(wanted)}, got {sorted(header)}")
    for name, spec in header.items():
        if spec.shape != tuple(wanted[name].shape):
            raise AdapterError(f"{path}: {name} has shape {spec.shape}, the encoder needs {tuple(wanted[name].shape)}")
        if spec.dtype != torch.float32:
            raise AdapterError(f"{path}: {name} is {spec.dtype}, expected torch.float32")


def _read_tensors(about: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Return the stored tensors after a check of their values and the checksum."""
    path = current(folder, WEIGHTS)
    try:
        content = path.read_bytes()
        stored = load(content)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is damaged or truncated: {error}") from error
    for name, tensor in stored.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{path}: {name} holds values that are not finite")
    if "checksum" in about and about["checksum"] != _checksum(about, content, current(folder, BUNDLED_NAME)):
        raise AdapterError(
            f"{folder} is damaged or was modified: its checksum is wrong. Copy the adapter from its source again"
        )
    return stored
