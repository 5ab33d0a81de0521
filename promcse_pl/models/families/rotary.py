"""EuroBERT, NomicBERT, GTE and jina-embeddings-v3: rotary positions and full attention."""

from __future__ import annotations

from typing import Any

from promcse_pl.models.families.family import COMMON_FIELDS, Family
from promcse_pl.utils.errors import EncoderError

_FIELDS = (*COMMON_FIELDS, "hidden_act", "rope_parameters", "type_vocab_size", "layer_norm_eps")
_NOMIC_NAMES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "layer_norm_eps",
}
"""Field in the original config.json of nomic-embed-text (for its remote code) -> field of transformers' config."""
_NOMIC_VALUES = {
    "rotary_emb_base": 1000.0,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "activation_function": "swiglu",
    "prenorm": False,
    "parallel_block": False,
    "use_rms_norm": False,
    "causal": False,
    "num_experts": 0,
}
"""Further fields of these files -> the only value that transformers' class implements."""


def _check_nomic(config: Any) -> None:  # noqa: ANN401
    """Reject an original config.json with values that transformers ignores and does not implement."""
    expected = {theirs: getattr(config, ours) for theirs, ours in _NOMIC_NAMES.items()} | _NOMIC_VALUES
    for name, value in expected.items():
        found = getattr(config, name, None)
        if found is not None and found != value:
            raise EncoderError(
                f"config.json has {name}={found}, which transformers' NomicBert ignores: it computes {name}={value}. Try: "
                "model.path=nomic-ai/nomic-embed-text-v1.5"
            )


FAMILIES = {
    "eurobert": Family(
        fields=(
            *COMMON_FIELDS,
            "num_key_value_heads",
            "head_dim",
            "hidden_act",
            "rms_norm_eps",
            "rope_parameters",
            "attention_bias",
            "mlp_bias",
        ),
        positions="from_zero",
    ),
    "nomic_bert": Family(
        fields=(*_FIELDS, "head_dim"), positions="from_zero", attention="NomicBertAttention", check=_check_nomic
    ),
    "gte": Family(fields=_FIELDS, positions="from_zero", pooling="cls", attention="GteAttention"),
    # without the task-specific LoRA adapters, which are stored in separate files
    "jina_embeddings_v3": Family(
        fields=_FIELDS, positions="from_zero", has_pooler=True, attention="JinaEmbeddingsV3Attention"
    ),
}
