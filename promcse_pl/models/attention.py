"""Deep prompts enter a transformers encoder through a registered attention function.

The prompt is the forward keyword `prompt_kv`, which the encoder passes unchanged to every attention layer, where this
function selects the layer's keys and values by `module.layer_idx` and prepends them. Prompt slots have no queries and no outputs,
so the encoder still returns T positions.
"""

# B sentences, T tokens, P prompt length, L layers, N heads, H head size

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from promcse_pl.models.cpu.dropout import dropout as fast_dropout

PROMPT_ATTENTION = "promcse_prompt"
"""Value of `attn_implementation`."""


# the signature is that of transformers' attention functions
def prompt_attention(
    module: nn.Module,
    query_BNTH: Tensor,
    key_BNTH: Tensor,
    value_BNTH: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    prompt_kv: Sequence[Tensor] | None = None,
    **_: Any,  # noqa: ANN401  (other arguments that transformers passes to every attention function)
) -> tuple[Tensor, None]:
    """Scaled dot-product attention over the layer's prompt slots and the tokens.

    Args:
        module: The attention layer; its `layer_idx` selects the prompt of this layer.
        query_BNTH, key_BNTH, value_BNTH: Projections of the tokens.
        attention_mask: Boolean (True = attend) or additive, broadcastable to (B, N, T, T), or None. Prompt slots are never
            masked.
        dropout: Probability of dropping an attention weight, of prompt slots as well as of tokens.
        scaling: Factor on the dot products; 1 / sqrt(H) if None.
        prompt_kv: Keys and values of each layer, (2, B or 1, N, P, H), or None for the plain encoder.

    Returns:
        The attention output, (B, T, N, H), and None for the weights.
    """
    if prompt_kv is not None and prompt_kv[0].shape[-2] > 0:
        prompt_key, prompt_value = prompt_kv[cast(int, module.layer_idx)].to(key_BNTH.dtype)
        key_BNTH = torch.cat([prompt_key.expand(len(key_BNTH), -1, -1, -1), key_BNTH], dim=2)
        value_BNTH = torch.cat([prompt_value.expand(len(value_BNTH), -1, -1, -1), value_BNTH], dim=2)
        if attention_mask is not None:
            visible = True if attention_mask.dtype == torch.bool else 0.0
            attention_mask = F.pad(attention_mask, (prompt_key.shape[-2], 0), value=visible)
    if dropout and query_BNTH.device.type == "cpu":
        mixed_BNTH = _dropped_attention(query_BNTH, key_BNTH, value_BNTH, attention_mask, dropout, scaling)
    else:
        mixed_BNTH = F.scaled_dot_product_attention(
            query_BNTH, key_BNTH, value_BNTH, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
    return mixed_BNTH.transpose(1, 2).contiguous(), None


def _dropped_attention(
    query_BNTH: Tensor,
    key_BNTH: Tensor,
    value_BNTH: Tensor,
    mask: Tensor | None,
    probability: float,
    scaling: float | None,
) -> Tensor:
    """Attention with dropout as separate operations: torch has no fused kernel for it on a CPU, and draws masks slowly."""
    scores_BNTS = (query_BNTH * (scaling or query_BNTH.shape[-1] ** -0.5)) @ key_BNTH.transpose(-1, -2)
    if mask is not None:
        # not -inf: a padding row that attends to nothing (ModernBERT's window) would be NaN and reach the real tokens
        lowest = torch.finfo(scores_BNTS.dtype).min
        scores_BNTS = scores_BNTS.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores_BNTS + mask
    return fast_dropout(scores_BNTS.softmax(-1), probability) @ value_BNTH


AttentionInterface.register(PROMPT_ATTENTION, prompt_attention)
AttentionMaskInterface.register(PROMPT_ATTENTION, sdpa_mask)
