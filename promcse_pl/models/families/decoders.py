"""Decoders as text encoders: rotary position embeddings, grouped-query attention, causal attention (Gemma 3: optional).

The prompt's keys are prepended after the rotation, so every prompt slot has position 0 and the first token has the position
offset. Changing the offset is equivalent to rotating the prompt's keys. A sliding window limits the attention to tokens, not to
prompt slots.
"""

from __future__ import annotations

from typing import Any

from promcse_pl.models.families.family import COMMON_FIELDS, Family
from promcse_pl.utils.errors import EncoderError

_FIELDS = (*COMMON_FIELDS, "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters")


def _check(config: Any) -> None:  # noqa: ANN401
    if not getattr(config, "is_causal", True):
        raise EncoderError(
            "config.json has is_causal=false, with which transformers attends in both directions only in batches with padding. "
            "Use an encoder without it"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise EncoderError(
            f"config.json has attn_logit_softcapping={config.attn_logit_softcapping}, which this version of transformers "
            "ignores. Use an encoder with attn_logit_softcapping=null"
        )


def _decoder(*fields: str, **properties: Any) -> Family:  # noqa: ANN401
    """Return a family of decoders.

    Args:
        fields: Fields of config.json that affect the output, beside those of all decoders.
        properties: Other attributes of the family.
    """
    return Family(
        **{
            "fields": (*_FIELDS, *fields),
            "positions": "from_zero",
            "pooling": "lasttoken",
            "check": _check,
            **properties,
        }
    )


FAMILIES = {
    "llama": _decoder("hidden_act", "attention_bias", "mlp_bias"),
    "mistral": _decoder("hidden_act", "sliding_window"),
    "qwen2": _decoder("hidden_act", "layer_types", "sliding_window"),
    "qwen3": _decoder("hidden_act", "layer_types", "sliding_window", "attention_bias"),
    # EmbeddingGemma averages its tokens, which attend in both directions
    "gemma3_text": _decoder(
        "hidden_activation",
        "layer_types",
        "sliding_window",
        "attention_bias",
        "query_pre_attn_scalar",
        "use_bidirectional_attention",
        pooling="avg",
    ),
}
