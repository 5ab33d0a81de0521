"""ModernBERT: rotary positions, and layers that attend to a window around each token."""

from promcse_pl.models.families.family import COMMON_FIELDS, Family

FAMILIES = {
    "modernbert": Family(
        fields=(
            *COMMON_FIELDS,
            "hidden_activation",
            "norm_eps",
            "norm_bias",
            "attention_bias",
            "mlp_bias",
            "layer_types",
            "local_attention",
            "rope_parameters",
        ),
        positions="from_zero",
    ),
}
