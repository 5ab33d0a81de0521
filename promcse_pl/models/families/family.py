"""Properties of an encoder family: config fields, positions, and how the prompt is passed to its attention layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from promcse_pl.models.cpu.layers import FusedLayers

Positions = Literal["from_zero", "after_padding_id", "none"]
COMMON_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "pad_token_id",
)
"""Fields of config.json, under the names that transformers gives them in every family."""


def _nothing(_: object) -> None:  # a lambda could not be pickled for a worker process
    """Do nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The encoders of one `model_type`; docs/adding-an-encoder.md explains how to add one.

    Attributes:
        fields: Fields of config.json that affect the output in eval mode: an allow-list, so that a field that a newer
            transformers adds does not invalidate old adapters.
        positions: `from_zero`: the first token has position 0. `after_padding_id`: it has position pad_token_id + 1, and padding
            has position pad_token_id. `none`: the encoder takes no position ids (relative positions only).
        has_limit: Whether inputs are limited to `max_position_embeddings` tokens.
        pooling: Default pooling of these encoders if the folder has no modules.json.
        auto_class: Class of transformers that loads the encoder.
        has_pooler: Whether its model class builds a pooler unless `add_pooling_layer` is False.
        attention: Class name of the attention modules, for families whose modules have no `layer_idx`, which is then set in the
            order of `model.modules()`.
        in_call_order: Whether layers share one attention module, so that the prompt is selected by the order of the calls.
        replace_attention: Replaces the attention modules of a loaded model with modules that call `prepend_prompt`, for encoders
            without transformers' attention interface.
        check: Raises EncoderError for a config that is not supported.
        first_token: Name of the module that adds the residual after attention in the last layer, after which `cls` pooling
            computes only the first token; {} is replaced by the layer index. None: transformers' modules compute all tokens.
        fused: Module names for the fused CPU layers; None: transformers' modules are used.
        mlm_head: Name in `MlmHead` -> name in the files of a pre-trained MLM head. The decoder's weight is tied to the embeddings
            there.
    """

    fields: tuple[str, ...]
    positions: Positions
    pooling: Literal["cls", "avg", "lasttoken"] = "avg"
    has_limit: bool = True
    auto_class: str = "AutoModel"
    has_pooler: bool = False
    attention: str | None = None
    in_call_order: bool = False
    replace_attention: Callable[[nn.Module], None] | None = None
    check: Callable[[Any], None] = _nothing
    first_token: str | None = None
    fused: FusedLayers | None = None
    mlm_head: Mapping[str, str] = field(default_factory=dict)
