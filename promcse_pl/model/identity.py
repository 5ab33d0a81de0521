"""What decides the embeddings of a frozen encoder: its weights, some fields of its config, and its tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_BERT_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "pad_token_id",
    "is_decoder",
)
CONFIG_FIELDS: dict[str, tuple[str, ...]] = {
    "bert": _BERT_FIELDS,
    "roberta": _BERT_FIELDS,
    "xlm-roberta": _BERT_FIELDS,
    "electra": (*_BERT_FIELDS, "embedding_size"),
    "modernbert": (
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_activation",
        "max_position_embeddings",
        "norm_eps",
        "norm_bias",
        "pad_token_id",
        "attention_bias",
        "mlp_bias",
        "layer_types",
        "local_attention",
        "rope_parameters",
    ),
}
"""For each supported family (`model_type`), the fields of config.json that decide the output in eval mode.

An allow-list: a field that a newer transformers adds, with a default that changes nothing, must not refuse an old adapter.
"""

_OF_THE_FILES = ("is_local", "local_files_only", "model_max_length", "name_or_path", "tokenizer_class")
"""Settings of a tokenizer that say where its files are, or that each call overrides."""


@dataclass(frozen=True, slots=True)
class EncoderId:
    """Identity of a frozen encoder.

    Attributes:
        name: Folder or hub id as the user gave it.
        revision: Commit of the hub repository, or None.
        sha256: Of the weights file, or of the tensors for a model made in memory.
        config: Values of `CONFIG_FIELDS`; empty where they are not known (adapters of format 1).
        tokenizer: `tokenizer_fingerprint` of the encoder's own tokenizer; None if it has none, or it is not known.
    """

    name: str
    revision: str | None
    sha256: str
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None


def output_config(config: Any) -> dict[str, Any]:  # noqa: ANN401  (a transformers config)
    """Return the fields of a config that decide the output in eval mode, as plain JSON values; None for an absent field."""
    fields = {name: getattr(config, name, None) for name in CONFIG_FIELDS[config.model_type]}
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return plain


def tokenizer_fingerprint(tokenizer: Any) -> str:  # noqa: ANN401  (a transformers tokenizer)
    """Return the hex sha256 of all that decides the token ids: vocabulary, normalisation, special tokens, truncation side.

    A copy that `save_pretrained` wrote has the same fingerprint.
    """
    described: list[object] = [
        type(tokenizer).__name__,
        tokenizer.pad_token_id,
        tokenizer.truncation_side,
        tokenizer.split_special_tokens,
    ]
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Leftovers of the last call; each call sets its own.
        backend.update(truncation=None, padding=None)
        described.append(backend)
    else:
        settings = {
            key: value
            for key, value in tokenizer.init_kwargs.items()
            if value is not None and key not in _OF_THE_FILES and not key.endswith("_file")
        }
        described += [tokenizer.get_vocab(), settings]
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def differences(expected: EncoderId, actual: EncoderId, *, owner: str) -> list[str]:
    """Describe what makes an encoder with equal weights give other embeddings than expected.

    What is not known of either side (an empty config, no tokenizer) is not compared, nor are fields that one side lacks.

    Args:
        expected: The encoder that was used before.
        actual: The encoder that is there now.
        owner: Introduces the expected value, as in "hidden_act is relu, OWNER gelu".
    """
    found = [
        f"{name} is {str(actual.config[name])[:80]}, {owner} {str(value)[:80]}"
        for name, value in expected.config.items()
        if name in actual.config and actual.config[name] != value
    ]
    if None not in (expected.tokenizer, actual.tokenizer) and expected.tokenizer != actual.tokenizer:
        found.append("its tokenizer differs")
    return found
