"""Properties of an encoder family: config fields, positions, and how the prompt is passed to its attention layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from promcse_pl.models.cpu.layers import FusedLayers
from promcse_pl.utils.errors import EncoderError

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


def rope_types(config: Any) -> set[str]:  # noqa: ANN401  (a transformers config)
    """Return the types of the rotary position embeddings of a config, such as `default`; empty without any."""
    rope = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [rope] if "rope_type" in rope else rope.values()
    return {parameters["rope_type"] for parameters in per_layer_type if parameters}


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
        check: Raises EncoderError for a config that is not supported; see also `require_supported`.
        embeddings: Name of the module that embeds the tokens with absolute positions, to whose output `prompt.kind=input` appends
            its vectors. None: not supported, as with relative or rotary positions, where the output depends on the order of rows.
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
    embeddings: str | None = None
    first_token: str | None = None
    fused: FusedLayers | None = None
    mlm_head: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_rotary(self) -> bool:
        """Whether positions are rotary: there is no matrix of positions, so `max_position_embeddings` is not a hard limit."""
        return "rope_parameters" in self.fields

    def require_supported(self, config: Any) -> None:  # noqa: ANN401  (a transformers config)
        """Raise an EncoderError for a config of this family that is not supported."""
        if "longrope" in rope_types(config):
            raise EncoderError(
                "config.json has rope_type=longrope, with which an embedding depends on the longest sentence of its batch. Use "
                "an encoder with another rope_type, such as default, llama3 or yarn"
            )
        self.check(config)
