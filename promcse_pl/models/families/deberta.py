"""DeBERTa-v2 and v3: attention scores with content-to-position and position-to-content terms (disentangled attention)."""

# B sentences, T tokens, P prompt length, S = P + T, N heads, H head size

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention, scaled_size_sqrt

from promcse_pl.models.attention import attend, prepend_prompt
from promcse_pl.models.families.family import COMMON_FIELDS, Family


class PromptSelfAttention(DisentangledSelfAttention):  # type: ignore[misc]  # transformers' classes are Any
    """DeBERTa's attention with prompt slots, which get content-to-content scores only: their relative position bias is 0.

    Args:
        attention: The module to replace; its submodules are shared, so that names in the state dict do not change.
        config: Config of the model.
        layer_idx: Number of the layer, which selects its prompt.
    """

    def __init__(self, attention: DisentangledSelfAttention, config: Any, layer_idx: int) -> None:  # noqa: ANN401
        with torch.device("meta"):
            super().__init__(config)
        for name, module in attention.named_children():
            setattr(self, name, module)
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        *_inputs: object,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
        **_options: object,
    ) -> tuple[Tensor, None]:
        """Return the attention output, (B, T, D), and None for the weights.

        Args:
            hidden_states: (B, T, D).
            attention_mask: (B, 1, T, T), 1 = attend.
            relative_pos: Buckets of relative positions, (1, T, T); None without relative attention.
            rel_embeddings: Their embeddings, (2 * buckets, D); None without relative attention.
            _inputs, _options: `output_attentions` and `query_states`, which have no effect.
        """
        query, key, value = (
            self.transpose_for_scores(projection(hidden_states), self.num_attention_heads)  # (B * N, T, H)
            for projection in (self.query_proj, self.key_proj, self.value_proj)
        )
        position_types = {"c2p", "p2c"}.intersection(self.pos_att_type)
        factor = 1 + len(position_types)
        heads = (-1, self.num_attention_heads)
        key_BNSH, value_BNSH, mask = prepend_prompt(
            self, key.unflatten(0, heads), value.unflatten(0, heads), attention_mask.bool()
        )
        scaled_key_BNSH = key_BNSH / scaled_size_sqrt(query, factor).to(query.dtype)
        scores_BNTS = query.unflatten(0, heads) @ scaled_key_BNSH.transpose(-1, -2)
        if self.relative_attention and position_types:
            bias = self.disentangled_attention_bias(query, key, relative_pos, self.pos_dropout(rel_embeddings), factor)
            slots = scores_BNTS.shape[-1] - bias.shape[-1]
            scores_BNTS = scores_BNTS + F.pad(bias.unflatten(0, heads), (slots, 0))
        mixed_BNTH = attend(scores_BNTS, value_BNSH, mask, self.dropout.p if self.training else 0.0)
        return mixed_BNTH.transpose(1, 2).flatten(2), None


def _replace_attention(model: Any) -> None:  # noqa: ANN401
    for number, layer in enumerate(model.encoder.layer):
        layer.attention.self = PromptSelfAttention(layer.attention.self, model.config, number)


FAMILIES = {
    "deberta-v2": Family(
        fields=(
            *COMMON_FIELDS,
            "hidden_act",
            "layer_norm_eps",
            "type_vocab_size",
            "embedding_size",
            "attention_head_size",
            "position_biased_input",
            "relative_attention",
            "pos_att_type",
            "share_att_key",
            "max_relative_positions",
            "position_buckets",
            "norm_rel_ebd",
            "conv_kernel_size",
            "conv_groups",
            "conv_act",
        ),
        positions="from_zero",
        replace_attention=_replace_attention,
    ),
}
