"""Identity of a frozen encoder: everything that affects its embeddings (weights, config fields, tokenizer)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from promcse_pl.models.families import FAMILIES
from promcse_pl.utils.paths import expand, hide_home, is_folder


@dataclass(frozen=True, slots=True)
class EncoderId:
    """Identity of a frozen encoder.

    Attributes:
        name: Folder or hub id as the user gave it.
        revision: Commit of the hub repository, or None.
        sha256: Hash of the weights file, or of the tensors for a model built in memory.
        config: Values of the fields of its family (`Family.fields`), and "dense", its dense layers, if it has any; empty if
            unknown (adapters of format 1).
        tokenizer: `tokenizer_fingerprint` of the encoder's tokenizer; None if it has none or it is unknown.
    """

    name: str
    revision: str | None
    sha256: str
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None


def encoder_name(name: str) -> str:
    """Return an encoder's name as adapters store it: a hub id, or the absolute path of a folder, with ~ for the home folder."""
    path = expand(name)
    return hide_home(str(path.absolute())) if is_folder(path) else name


def output_config(config: Any, dense: Iterable[Any] = ()) -> dict[str, Any]:  # noqa: ANN401  (a transformers config)
    """Return everything that affects the output in eval mode beside the weights, as JSON values; None for absent fields.

    Args:
        config: Config of the encoder.
        dense: Its `FrozenDense` layers. If empty, no entry is added, so the identities in older adapters stay valid.
    """
    fields = {name: getattr(config, name, None) for name in FAMILIES[config.model_type].fields}
    layers = [layer.identity() for layer in dense]
    fields |= {"dense": layers} if layers else {}
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return plain


def differences(expected: EncoderId, actual: EncoderId, *, owner: str) -> list[str]:
    """Return the differences between two encoders with equal weights that affect their embeddings.

    Unknown values (an empty config, no tokenizer) and fields that only one encoder has are not compared.

    Args:
        expected: The encoder that was used before.
        actual: The encoder in use now.
        owner: Introduces the expected value in messages, as in "hidden_act is relu, OWNER gelu".
    """
    found = [
        f"{name} is {str(actual.config[name])[:80]}, {owner} {str(value)[:80]}"
        for name, value in expected.config.items()
        if name != "dense" and name in actual.config and actual.config[name] != value
    ]
    if expected.config.get("dense", []) != actual.config.get("dense", []):
        found.append("the dense layers after its pooling differ")
    if None not in (expected.tokenizer, actual.tokenizer) and expected.tokenizer != actual.tokenizer:
        found.append("its tokenizer differs")
    return found
