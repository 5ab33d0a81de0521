"""MPNet: BERT's layers with a relative position bias on the attention scores."""

# B sentences, T tokens, N heads, H head size

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from promcse_pl.models.attention import PROMPT_ATTENTION, additive_mask, attend, prepend_prompt
from promcse_pl.models.cpu.layers import DenseNorm, FusedLayers, LayerParts
from promcse_pl.models.families.family import COMMON_FIELDS, Family


class PromptSelfAttention(nn.Module):
    """`MPNetSelfAttention`, which does not use transformers' attention interface, with prompt slots.

    Args:
        attention: The module to replace; its submodules are shared, so that names in the state dict do not change.
        layer_idx: Number of the layer, which selects its prompt.
    """

    def __init__(self, attention: Any, layer_idx: int) -> None:  # noqa: ANN401
        super().__init__()
        self.q, self.k, self.v, self.o = attention.q, attention.k, attention.v, attention.o
        self.dropout = attention.dropout
        self.num_attention_heads: int = attention.num_attention_heads
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_bias: Tensor, **_options: object
    ) -> tuple[Tensor]:
        """Return the attention output, (B, T, D).

        Args:
            hidden_states: (B, T, D).
            attention_mask: Boolean, as the mask function of the prompt attention makes it, or None.
            position_bias: Relative position bias of the tokens, (B, N, T, T).
            _options: `output_attentions`, which has no effect.
        """
        query_BNTH, key_BNTH, value_BNTH = (
            projection(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        bias = additive_mask(position_bias, attention_mask)
        key_BNSH, value_BNSH, bias_BNTS = prepend_prompt(self, key_BNTH, value_BNTH, bias)
        scores_BNTS = (query_BNTH * query_BNTH.shape[-1] ** -0.5) @ key_BNSH.transpose(-1, -2)
        rate = self.dropout.p if self.training else 0.0
        mixed_BNTH = attend(scores_BNTS, value_BNSH, bias_BNTS, rate)
        return (self.o(mixed_BNTH.transpose(1, 2).flatten(2)),)


def _replace_attention(model: Any) -> None:  # noqa: ANN401
    for number, layer in enumerate(model.encoder.layer):
        layer.attention.attn = PromptSelfAttention(layer.attention.attn, number)
    # selects the mask function; the public setter has no effect on models without the attention interface
    model.config._attn_implementation = PROMPT_ATTENTION


def _parts(layer: Any) -> LayerParts:  # noqa: ANN401
    attention = layer.attention.attn
    return LayerParts(
        query=attention.q,
        key=attention.k,
        value=attention.v,
        heads=attention.num_attention_heads,
        dropout=attention.dropout,
        out=DenseNorm(attention.o, layer.attention.dropout, layer.attention.LayerNorm),
        up=layer.intermediate.dense,
        down=DenseNorm(layer.output.dense, layer.output.dropout, layer.output.LayerNorm),
    )


def _position_bias(model: Any, hidden_BTD: Tensor) -> Tensor:  # noqa: ANN401
    """Return the relative position bias, (N, T, T)."""
    bias: Tensor = model.encoder.compute_position_bias(hidden_BTD[:1])[0]
    return bias


FAMILIES = {
    "mpnet": Family(
        fields=(*COMMON_FIELDS, "hidden_act", "layer_norm_eps", "relative_attention_num_buckets"),
        positions="after_padding_id",
        has_pooler=True,
        replace_attention=_replace_attention,
        fused=FusedLayers(
            "transformers.models.mpnet.modeling_mpnet.MPNetModel",
            ("MPNetEncoder", "MPNetLayer", "MPNetAttention", "MPNetIntermediate", "MPNetOutput"),
            "encoder.layer",
            _parts,
            other_types=(PromptSelfAttention, nn.Embedding),
            position_bias=_position_bias,
        ),
    ),
}
