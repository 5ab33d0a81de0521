"""Attention with a deep prompt: in every layer, the prompt's keys and values are prepended to those of the tokens.

`FrozenBackbone` sets the prompt of a forward pass with `prompt_in_attention`. Most encoders call the attention function that is
registered here with transformers. In the others, `promcse_pl.models.families` replaces the attention modules by ones that call
`prepend_prompt`. Prompt slots have no queries and no outputs, so the encoder still returns T positions.
"""

# B sentences, T tokens, P prompt length, S = P + T, L layers, N query heads, K key/value heads, H head size

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from promcse_pl.models.cpu.dropout import dropout as fast_dropout
from promcse_pl.utils.errors import EncoderError

PROMPT_ATTENTION = "promcse_prompt"
"""Value of `attn_implementation`."""
Prompts = Sequence[Tensor] | Iterator[Tensor]
"""Keys and values (2, B or 1, K, P, H) of each layer: a sequence indexed by `module.layer_idx`, or an iterator in call order."""

_prompts: ContextVar[Prompts | None] = ContextVar("prompts", default=None)
_WITHOUT_EFFECT = frozenset(
    ("sliding_window", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict")
)
"""Keyword arguments of attention functions that do not affect the output here; sliding windows are part of the mask."""


@contextmanager
def prompt_in_attention(prompts: Prompts | None) -> Iterator[None]:
    """Prepend a prompt in every attention layer called inside this context (per thread); None: no prompt."""
    token = _prompts.set(prompts)
    try:
        yield
    finally:
        _prompts.reset(token)


def prepend_prompt(
    module: nn.Module, key_BKTH: Tensor, value_BKTH: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Prepend the prompt of a layer to keys, values and mask.

    Args:
        module: The attention module; its `layer_idx` selects the prompt.
        key_BKTH, value_BKTH: Projections of the tokens.
        mask: Boolean (True = attend) or additive, (..., T), or None. Prompt slots are always visible, with a bias of 0.
    """
    prompts = _prompts.get()
    if prompts is None:
        return key_BKTH, value_BKTH, mask
    prompt = next(prompts) if isinstance(prompts, Iterator) else prompts[cast(int, module.layer_idx)]
    length = prompt.shape[-2]
    if length == 0:
        return key_BKTH, value_BKTH, mask
    key, value = prompt.to(key_BKTH.dtype).expand(-1, key_BKTH.shape[0], -1, -1, -1)
    if mask is not None:
        mask = F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)
    return torch.cat([key, key_BKTH], dim=2), torch.cat([value, value_BKTH], dim=2), mask


# the signature is that of transformers' attention functions
def prompt_attention(
    module: nn.Module,
    query_BNTH: Tensor,
    key_BKTH: Tensor,
    value_BKTH: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **others: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Scaled dot-product attention over the layer's prompt slots and the tokens.

    Args:
        module: The attention module; its `layer_idx` selects the prompt of this layer.
        query_BNTH, key_BKTH, value_BKTH: Projections of the tokens; N is a multiple of K.
        attention_mask: Boolean (True = attend) or additive, broadcastable to (B, N, T, T), or None.
        dropout: Probability of dropping an attention weight, of prompt slots as well as of tokens.
        scaling: Factor on the dot products; 1 / sqrt(H) if None.
        position_bias: Added to the scaled dot products of the tokens, broadcastable to (B, N, T, T) (T5); prompt slots get 0.
        others: Other arguments of transformers. They must be unset, or in `_WITHOUT_EFFECT`.

    Returns:
        The attention output, (B, T, N, H), and None for the weights.

    Raises:
        EncoderError: An argument that is not implemented and could change the output, or causal attention without a mask.
    """
    _check_arguments(module, query_BNTH, attention_mask, others)
    if position_bias is not None:
        attention_mask = additive_mask(position_bias, attention_mask)
    key_BKTH, value_BKTH, attention_mask = prepend_prompt(module, key_BKTH, value_BKTH, attention_mask)
    groups = query_BNTH.shape[1] // key_BKTH.shape[1]
    if groups > 1:
        key_BKTH, value_BKTH = (part.repeat_interleave(groups, 1) for part in (key_BKTH, value_BKTH))
    if dropout and query_BNTH.device.type == "cpu":
        scores_BNTS = (query_BNTH * (scaling or query_BNTH.shape[-1] ** -0.5)) @ key_BKTH.transpose(-1, -2)
        mixed_BNTH = attend(scores_BNTS, value_BKTH, attention_mask, dropout)
    else:
        mixed_BNTH = F.scaled_dot_product_attention(
            query_BNTH, key_BKTH, value_BKTH, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
    return mixed_BNTH.transpose(1, 2).contiguous(), None


def attend(scores_BNTS: Tensor, value_BNSH: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Return the values weighted by the softmax of scores, as separate operations.

    torch has no fused attention with dropout on a CPU, and samples dropout masks slowly.

    Args:
        scores_BNTS: Scaled dot products.
        value_BNSH: Values of prompt slots and tokens.
        mask: Boolean (True = attend) or additive, broadcastable to the scores, or None.
        dropout: Probability of dropping an attention weight.
    """
    if mask is not None:
        # not -inf: a padding row that attends to nothing (ModernBERT's window) would be NaN and reach the real tokens
        lowest = torch.finfo(scores_BNTS.dtype).min
        scores_BNTS = scores_BNTS.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores_BNTS + mask
    weights_BNTS = scores_BNTS.softmax(-1)
    return (fast_dropout(weights_BNTS, dropout) if dropout else weights_BNTS) @ value_BNSH


def additive_mask(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Add a mask to an attention bias: masked positions get the lowest number of its dtype.

    Args:
        bias: Broadcastable to (B, N, T, T).
        mask: Boolean (True = attend) or additive, broadcastable to (B, N, T, T), or None.
    """
    if mask is None:
        return bias
    return bias.masked_fill(~mask, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask


def _check_arguments(module: nn.Module, query_BNTH: Tensor, mask: Tensor | None, others: dict[str, Any]) -> None:
    unknown = sorted(
        name
        for name, value in others.items()
        if name not in _WITHOUT_EFFECT and value is not None and value is not False
    )
    if "is_causal" in unknown or (getattr(module, "is_causal", False) and mask is None and query_BNTH.shape[2] > 1):
        raise EncoderError(f"{type(module).__name__} uses causal attention without a mask, which is not supported")
    if unknown:
        raise EncoderError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention function, which is not supported. "
            "Try: another encoder, or the transformers version in constraints.txt"
        )


def _mask(*sizes: Any, **options: Any) -> Tensor | None:  # noqa: ANN401
    """Return transformers' boolean mask.

    Causal masks are always materialised, since `is_causal` does not count prompt slots. A mask without padding is skipped on a
    CPU only: on other devices the check for padding would synchronise with the device.
    """
    skips = {"allow_is_causal_skip": False}
    if torch.device(options.get("device", "cpu")).type != "cpu":
        skips["allow_is_bidirectional_skip"] = False
    return cast(Tensor | None, sdpa_mask(*sizes, **{**options, **skips}))


AttentionInterface.register(PROMPT_ATTENTION, prompt_attention)
AttentionMaskInterface.register(PROMPT_ATTENTION, _mask)
