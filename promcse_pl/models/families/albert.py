"""ALBERT: the layers of a group share one module, so the prompt is selected by the order of the calls."""

from __future__ import annotations

from typing import Any

from promcse_pl.models.families.family import COMMON_FIELDS, Family
from promcse_pl.utils.errors import EncoderError


def _check(config: Any) -> None:  # noqa: ANN401
    if config.inner_group_num != 1:
        raise EncoderError(
            f"config.json has inner_group_num={config.inner_group_num}; prompts support 1, as in all published ALBERT encoders"
        )


FAMILIES = {
    "albert": Family(
        fields=(
            *COMMON_FIELDS,
            "embedding_size",
            "type_vocab_size",
            "hidden_act",
            "layer_norm_eps",
            "num_hidden_groups",
            "inner_group_num",
        ),
        positions="from_zero",
        has_pooler=True,
        in_call_order=True,
        check=_check,
        embeddings="embeddings",
    ),
}
