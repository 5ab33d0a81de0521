"""EuroBERT, NomicBERT, GTE and jina-embeddings-v3: rotary positions and full attention."""

from __future__ import annotations

from promcse_pl.models.families.family import COMMON_FIELDS, Family

_FIELDS = (*COMMON_FIELDS, "hidden_act", "rope_parameters", "type_vocab_size", "layer_norm_eps")
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
    "nomic_bert": Family(fields=(*_FIELDS, "head_dim"), positions="from_zero", attention="NomicBertAttention"),
    "gte": Family(fields=_FIELDS, positions="from_zero", pooling="cls", attention="GteAttention"),
    "jina_embeddings_v3": Family(
        fields=_FIELDS, positions="from_zero", has_pooler=True, attention="JinaEmbeddingsV3Attention"
    ),
}
