"""The encoders of T5, mT5 and UMT5: relative position biases, unscaled dot products, RMS norms before attention."""

from promcse_pl.models.families.family import COMMON_FIELDS, Family

T5 = Family(
    fields=(
        *COMMON_FIELDS,
        "head_dim",
        "dense_act_fn",
        "is_gated_act",
        "layer_norm_epsilon",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
    ),
    positions="none",
    has_limit=False,
    auto_class="AutoModelForTextEncoding",
)
FAMILIES = {"t5": T5, "mt5": T5, "umt5": T5}
