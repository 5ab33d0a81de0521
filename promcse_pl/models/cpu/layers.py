"""The layers of BERT and RoBERTa written out for a CPU: no padding in the linear layers, no bookkeeping for frozen weights.

transformers' modules do the same work one small operation at a time, on padded sentences. Here the tokens of a chunk are packed
one behind the other, and a layer is one operation for torch's autograd, whose backward pass gives two gradients: that of the
hidden states, and that of the layer's prompt. Only what it needs is kept. Hooks on a layer's modules are not called.
"""

# B sentences, T tokens of the longest, M real tokens of all (or B, where the first token alone goes on), P prompt length,
# S = P + T, N heads, H head size, Z = B * N, D width, E inner width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from promcse_pl.models.cpu.dropout import in_bytes, keep_mask, kept_share

_MODELS = ("BertModel", "RobertaModel", "XLMRobertaModel")
Layer = Any
"""A layer of one of these; transformers has no common type for them."""


def can_be_written_out(model: nn.Module) -> bool:
    """Tell whether an encoder's layers can be run as below: BERT's or RoBERTa's, with frozen matrices on a CPU."""
    config: Any = model.config
    if type(model).__name__ not in _MODELS or config.hidden_act != "gelu" or config.is_decoder:
        return False
    if torch.is_autocast_enabled("cpu") or next(model.parameters()).device.type != "cpu":
        return False
    for module in model.get_submodule("encoder").modules():  # in one pass: every chunk asks
        if "in_features" in vars(module) and type(module) is not nn.Linear:  # int8, or an adapter of another library
            return False
        if any(weight is not None and weight.requires_grad for weight in module._parameters.values()):
            return False
    return True


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the packed tokens stand in the padded sentences.

    Attributes:
        sentences, longest: B and T.
        first_B: Place of each sentence's first token among the packed ones.
        index_M: Place of each token in the flattened (B, T), or None where no sentence is padded.
        bias_B1S: What is added to the attention scores, 0 or the lowest number; None where no sentence is padded.
    """

    sentences: int
    longest: int
    first_B: Tensor
    index_M: Tensor | None
    bias_B1S: Tensor | None

    @classmethod
    def of(cls, mask_BT: Tensor, prompt_length: int, dtype: torch.dtype) -> _Places:
        """Read them off a mask (1 for real tokens)."""
        sentences, longest = mask_BT.shape
        real_BT = mask_BT.bool()
        lengths_B = real_BT.sum(1)
        first_B = lengths_B.cumsum(0) - lengths_B
        if bool(real_BT.all()):
            return cls(sentences, longest, first_B, None, None)
        bias_BT = torch.zeros(real_BT.shape, dtype=dtype).masked_fill_(~real_BT, torch.finfo(dtype).min)
        bias_B1S = F.pad(bias_BT, (prompt_length, 0))[:, None]
        return cls(sentences, longest, first_B, real_BT.flatten().nonzero()[:, 0], bias_B1S)

    def pack(self, padded: Tensor) -> Tensor:
        """(B * T, ...) to (M, ...)."""
        return padded if self.index_M is None else padded.index_select(0, self.index_M)

    def pad(self, packed: Tensor) -> Tensor:
        """(M, ...) to (B * T, ...), zero where there is no token."""
        if self.index_M is None:
            return packed
        padded = packed.new_zeros(self.sentences * self.longest, *packed.shape[1:])
        return padded.index_copy_(0, self.index_M, packed)


def run_layers(
    layers: Sequence[nn.Module],
    embedded_BTD: Tensor,
    mask_BT: Tensor,
    prompt_kv: Sequence[Tensor] | None,
    *,
    all_layers: bool,
    first_token: bool,
) -> tuple[Tensor, ...]:
    """Run an encoder's layers.

    Args:
        layers: transformers' modules; their dropout rates and mode count.
        embedded_BTD: The embedding output.
        mask_BT: 1 for real tokens, 0 for padding at the end.
        prompt_kv: Keys and values of each layer, (2, B or 1, N, P, H), or None.
        all_layers: Also return what enters each layer.
        first_token: Leave out, behind the last attention, all tokens but the first; not with `all_layers`, and not done where a
            sentence has no first token.

    Returns:
        Hidden states (B, T, D), the last layer last, with zeros for padding behind the layers; that one is (B, 1, D) if the other
        tokens were left out.
    """
    assert not (all_layers and first_token)
    first_token = first_token and bool(mask_BT[:, 0].all())
    length = 0 if prompt_kv is None else prompt_kv[0].shape[-2]
    places = _Places.of(mask_BT, length, embedded_BTD.dtype)
    hidden_MD = places.pack(embedded_BTD.flatten(0, 1))
    states = [embedded_BTD]
    for number, layer in enumerate(layers):
        prompt = prompt_kv[number].to(hidden_MD.dtype) if prompt_kv is not None and length else None
        first = first_token and number == len(layers) - 1
        if torch.is_grad_enabled() and (hidden_MD.requires_grad or (prompt is not None and prompt.requires_grad)):
            hidden_MD = _FrozenLayer.apply(hidden_MD, prompt, layer, places, first)  # type: ignore[no-untyped-call]
        else:
            hidden_MD, _ = _forward(hidden_MD, prompt, layer, places, first=first, keep=False)
        if first:
            return (hidden_MD.unsqueeze(1),)
        if all_layers or number == len(layers) - 1:
            states.append(places.pad(hidden_MD).view_as(embedded_BTD))
    return tuple(states) if all_layers else (states[-1],)


class _Norm(NamedTuple):
    """What the backward pass of dense, dropout, residual and LayerNorm needs."""

    sum_MD: Tensor
    mean_M: Tensor
    rstd_M: Tensor
    mask_MD: Tensor | None


class _Kept(NamedTuple):
    """What a layer's backward pass needs; masks are None where nothing was dropped."""

    qkv_M3D: Tensor
    prompt: Tensor | None
    weights_ZTS: Tensor
    mask_ZTS: Tensor | None
    up_ME: Tensor


class _FrozenLayer(torch.autograd.Function):
    """One layer as one operation on the hidden states and the layer's prompt."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden_MD: Tensor,
        prompt: Tensor | None,
        layer: Layer,
        places: _Places,
        first: bool,
    ) -> Tensor:
        after_MD, kept = _forward(hidden_MD, prompt, layer, places, first=first, keep=True)
        assert kept is not None
        ctx.save_for_backward(*(tensor for part in kept for tensor in part))
        ctx.layer, ctx.places, ctx.first = layer, places, first
        ctx.rates = [_rate(part.dropout) for part in (layer.attention.self, layer.attention.output, layer.output)]
        return after_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, after_MD: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # noqa: ANN401
        saved, layer, places = ctx.saved_tensors, ctx.layer, ctx.places
        kept, out, down = _Kept(*saved[:5]), _Norm(*saved[5:9]), _Norm(*saved[9:])
        second_MD = _norm_backward(after_MD, down, layer.output.LayerNorm)
        up_ME = _undrop(second_MD, down.mask_MD, ctx.rates[2]) @ layer.output.dense.weight
        torch.ops.aten.gelu_backward.grad_input(up_ME, kept.up_ME, grad_input=up_ME)
        between_MD = second_MD.addmm_(up_ME, layer.intermediate.dense.weight)
        first_MD = _norm_backward(between_MD, out, layer.attention.output.LayerNorm)
        mixed_MD = _undrop(first_MD, out.mask_MD, ctx.rates[1]) @ layer.attention.output.dense.weight
        of_tokens = ctx.needs_input_grad[0]  # below the first layer nothing needs it
        qkv_M3D, prompt = _attention_backward(
            mixed_MD, kept, layer, places, rate=ctx.rates[0], first=ctx.first, of_tokens=of_tokens
        )
        if qkv_M3D is None:
            return None, prompt, None, None, None
        if ctx.first:
            hidden_MD = torch.zeros_like(qkv_M3D[:, : first_MD.shape[1]]).index_add_(0, places.first_B, first_MD)
        else:
            hidden_MD = first_MD
        for part, gradient_MD in zip(_projections(layer), qkv_M3D.chunk(3, dim=1), strict=True):
            hidden_MD.addmm_(gradient_MD, part.weight)
        return hidden_MD, prompt, None, None, None


def _forward(
    hidden_MD: Tensor, prompt: Tensor | None, layer: Layer, places: _Places, *, first: bool, keep: bool
) -> tuple[Tensor, tuple[_Kept, _Norm, _Norm] | None]:
    qkv_M3D = torch.cat([F.linear(hidden_MD, part.weight, part.bias) for part in _projections(layer)], dim=1)
    query, kv = _heads(qkv_M3D, prompt, layer, places, first=first)
    rate = _rate(layer.attention.self.dropout)
    weights_ZTS = mask_ZTS = None
    if keep or layer.training:  # the same in both passes of a chunk that runs twice
        query_ZTH, (key_ZSH, value_ZSH) = query.reshape(-1, *query.shape[2:]), kv.reshape(2, -1, *kv.shape[3:])
        weights_ZTS = dropped_ZTS = _scores(query_ZTH, key_ZSH, places).softmax(-1)
        if rate:
            dropped_ZTS = keep_mask(weights_ZTS.shape, rate, weights_ZTS.dtype)
            mask_ZTS = in_bytes(dropped_ZTS)
            dropped_ZTS.mul_(weights_ZTS)
        mixed = _product(dropped_ZTS, value_ZSH, 1 / kept_share(rate)).view(query.shape)
    else:  # torch has a fused kernel for it
        mask = None if places.bias_B1S is None else places.bias_B1S.unsqueeze(1)
        mixed = F.scaled_dot_product_attention(query, kv[0], kv[1], attn_mask=mask)
    mixed_MD = mixed.transpose(1, 2).reshape(-1, hidden_MD.shape[1])
    if first:
        hidden_MD = hidden_MD[places.first_B]
    else:
        mixed_MD = places.pack(mixed_MD)
    between_MD, out = _add_and_norm(mixed_MD, hidden_MD, layer.attention.output)
    up_ME = F.linear(between_MD, layer.intermediate.dense.weight, layer.intermediate.dense.bias)
    active_ME = F.gelu(up_ME) if keep else torch.ops.aten.gelu_(up_ME)
    after_MD, down = _add_and_norm(active_ME, between_MD, layer.output)
    if not keep:
        return after_MD, None
    assert weights_ZTS is not None
    return after_MD, (_Kept(qkv_M3D, prompt, weights_ZTS, mask_ZTS, up_ME), out, down)


def _projections(layer: Layer) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    own = layer.attention.self
    return own.query, own.key, own.value


def _heads(
    qkv_M3D: Tensor, prompt: Tensor | None, layer: Layer, places: _Places, *, first: bool
) -> tuple[Tensor, Tensor]:
    """Return the queries (B, N, T or 1, H), and keys and values with the prompt in front, (2, B, N, S, H)."""
    padded = (
        places.pad(qkv_M3D)
        .view(places.sentences, places.longest, 3, layer.attention.self.num_attention_heads, -1)
        .permute(2, 0, 3, 1, 4)
    )
    query, kv = padded[0], padded[1:]
    if prompt is not None:
        kv = torch.cat([prompt.expand(-1, places.sentences, -1, -1, -1), kv], dim=-2)
    return query[:, :, :1] if first else query, kv


def _scores(query_ZTH: Tensor, key_ZSH: Tensor, places: _Places) -> Tensor:
    """Scaled dot products, with the lowest number for padding keys."""
    scale = query_ZTH.shape[-1] ** -0.5
    if places.bias_B1S is None:
        return _product(query_ZTH, key_ZSH.mT, scale)
    heads = len(query_ZTH) // places.sentences
    return torch.baddbmm(places.bias_B1S.repeat_interleave(heads, 0), query_ZTH, key_ZSH.mT, alpha=scale)


def _product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """Batched matrix product times a factor, in one pass."""
    empty = left.new_empty(len(left), left.shape[1], right.shape[2])
    return torch.baddbmm(empty, left, right, beta=0, alpha=factor, out=empty)


def _add_and_norm(values: Tensor, residual_MD: Tensor, module: Any) -> tuple[Tensor, _Norm]:  # noqa: ANN401
    """Dense, dropout, residual and LayerNorm."""
    dense_MD = F.linear(values, module.dense.weight, module.dense.bias)
    rate, norm = _rate(module.dropout), module.LayerNorm
    if rate:
        mask_MD = keep_mask(dense_MD.shape, rate, dense_MD.dtype)
        sum_MD = torch.addcmul(residual_MD, dense_MD, mask_MD, value=1 / kept_share(rate))
        kept_mask = in_bytes(mask_MD)
    else:
        sum_MD, kept_mask = dense_MD.add_(residual_MD), None
    normed_MD, mean_M, rstd_M = torch.native_layer_norm(sum_MD, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return normed_MD, _Norm(sum_MD, mean_M, rstd_M, kept_mask)


def _norm_backward(gradient_MD: Tensor, kept: _Norm, norm: nn.LayerNorm) -> Tensor:
    found: Tensor = torch.ops.aten.native_layer_norm_backward(
        gradient_MD,
        kept.sum_MD,
        norm.normalized_shape,
        kept.mean_M,
        kept.rstd_M,
        norm.weight,
        norm.bias,
        [True, False, False],
    )[0]
    return found


def _rate(dropout: Any) -> float:  # noqa: ANN401  (our Dropout)
    return float(dropout.p) if dropout.training else 0.0


def _undrop(gradient: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    """Return the gradient before a dropout."""
    return gradient if mask is None else (gradient * mask).mul_(1 / kept_share(rate))


def _attention_backward(
    mixed_MD: Tensor, kept: _Kept, layer: Layer, places: _Places, *, rate: float, first: bool, of_tokens: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of query, key and value, side by side (if `of_tokens`), and of the prompt."""
    query, kv = _heads(kept.qkv_M3D, kept.prompt, layer, places, first=first)
    sentences, heads, rows, size = query.shape
    query_ZTH, (key_ZSH, value_ZSH) = query.reshape(-1, rows, size), kv.reshape(2, -1, kv.shape[-2], size)
    padded = mixed_MD if first else places.pad(mixed_MD)
    mixed_ZTH = padded.view(sentences, rows, heads, size).transpose(1, 2).reshape(-1, rows, size)
    weights_ZTS, mask_ZTS, factor = kept.weights_ZTS, kept.mask_ZTS, 1 / kept_share(rate)
    d_weights = _product(mixed_ZTH, value_ZSH.mT, factor)
    dropped_ZTS = weights_ZTS
    if mask_ZTS is not None:
        dropped_ZTS, d_weights = weights_ZTS * mask_ZTS, d_weights.mul_(mask_ZTS)
    d_scores = torch._softmax_backward_data(d_weights, weights_ZTS, -1, weights_ZTS.dtype)
    d_kv = torch.empty_like(kv, memory_format=torch.contiguous_format)
    d_key, d_value = d_kv.view(2, -1, kv.shape[-2], size)
    torch.baddbmm(d_key, d_scores.mT, query_ZTH, beta=0, alpha=size**-0.5, out=d_key)
    torch.baddbmm(d_value, dropped_ZTS.mT, mixed_ZTH, beta=0, alpha=factor, out=d_value)
    length, d_prompt = 0, None
    if kept.prompt is not None:
        length = kept.prompt.shape[-2]
        d_prompt = d_kv[..., :length, :]
        if kept.prompt.shape[1] != sentences:
            d_prompt = d_prompt.sum(1, keepdim=True)
    if not of_tokens:
        return None, d_prompt
    d_query = _product(d_scores, key_ZSH, size**-0.5).view(query.shape).transpose(1, 2)
    d_padded = mixed_MD.new_empty(sentences, places.longest, 3, heads, size)
    d_padded[:, :rows, 0].copy_(d_query)
    d_padded[:, rows:, 0].zero_()
    d_padded[:, :, 1:].copy_(d_kv[..., length:, :].permute(1, 3, 0, 2, 4))
    return places.pack(d_padded.view(sentences * places.longest, -1)), d_prompt
