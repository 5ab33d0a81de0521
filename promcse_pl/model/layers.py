"""The layers of BERT and RoBERTa written out for a CPU: no padding in the linear layers, no gradient bookkeeping for frozen weights.

transformers' modules do the same work one small operation at a time, on padded sentences. Here the tokens of a chunk are packed
one behind the other, query, key and value are one matrix product, and a layer is one operation for torch's autograd, whose
backward pass gives two gradients: that of the hidden states, and that of the layer's prompt. Only what it needs is kept.
"""

# B sentences, T tokens of the longest, M real tokens of all, P prompt length, S = P + T, N heads, H head size, D width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from promcse_pl.model.dropout import keep_mask, kept_share

_MODELS = ("BertModel", "RobertaModel", "XLMRobertaModel")
_aten = torch.ops.aten


def can_be_written_out(model: nn.Module) -> bool:
    """Tell whether an encoder consists of layers as below, with their weights as plain matrices on a CPU."""
    config: Any = model.config
    if type(model).__name__ not in _MODELS or config.hidden_act != "gelu" or config.is_decoder:
        return False
    dense = model.encoder.layer[0].intermediate.dense  # type: ignore[union-attr, index]
    return type(dense) is nn.Linear and dense.weight.device.type == "cpu"  # int8 layers are of another type


class Layer:
    """The weights of one frozen layer, query, key and value joined; the rates are read anew at every call."""

    def __init__(self, module: Any) -> None:  # noqa: ANN401  (a layer of transformers)
        attention, self.module = module.attention, module
        parts = attention.self.query, attention.self.key, attention.self.value
        self.heads: int = attention.self.num_attention_heads
        self.sources = [part.weight.detach() for part in parts] + [part.bias.detach() for part in parts]
        self.versions = [source._version for source in self.sources]
        self.qkv = torch.cat(self.sources[:3]), torch.cat(self.sources[3:])

    @property
    def stale(self) -> bool:
        """Whether the model's weights have been changed, converted or moved since they were joined."""
        own = self.module.attention.self
        parts = own.query, own.key, own.value
        now = [part.weight for part in parts] + [part.bias for part in parts]
        return any(
            a.data_ptr() != b.data_ptr() or a.dtype != b.dtype or a._version != version
            for a, b, version in zip(now, self.sources, self.versions, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Places:
    """Where the packed tokens stand in the padded sentences.

    Attributes:
        sentences, longest: B and T.
        index_M: Place of each token in the flattened (B, T), or None where no sentence is padded.
        bias_B1S: What is added to the attention scores, 0 or the lowest number; None where no sentence is padded.
    """

    sentences: int
    longest: int
    index_M: Tensor | None
    bias_B1S: Tensor | None

    @classmethod
    def of(cls, mask_BT: Tensor, prompt_length: int, dtype: torch.dtype) -> Places:
        """Read them off a mask (1 for real tokens)."""
        sentences, longest = mask_BT.shape
        real_BT = mask_BT.bool()
        if bool(real_BT.all()):
            return cls(sentences, longest, None, None)
        bias_BT = torch.zeros(real_BT.shape, dtype=dtype).masked_fill_(~real_BT, torch.finfo(dtype).min)
        return cls(sentences, longest, real_BT.flatten().nonzero()[:, 0], F.pad(bias_BT, (prompt_length, 0))[:, None])

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
    layers: Sequence[Layer], embedded_BTD: Tensor, mask_BT: Tensor, prompt_kv: Sequence[Tensor] | None, *, all_layers: bool
) -> tuple[Tensor, ...]:
    """Return the hidden states (B, T, D) after the last layer, or with `all_layers` before and after every layer.

    Padding has zeros there, in the embedding output what the embeddings gave.

    Args:
        layers: The frozen layers.
        embedded_BTD: The embedding output.
        mask_BT: 1 for real tokens.
        prompt_kv: Keys and values of each layer, (2, B or 1, N, P, H), or None.
        all_layers: See above.
    """
    length = 0 if prompt_kv is None else prompt_kv[0].shape[-2]
    places = Places.of(mask_BT, length, embedded_BTD.dtype)
    hidden_MD = places.pack(embedded_BTD.flatten(0, 1))
    states = [embedded_BTD]
    for number, layer in enumerate(layers):
        prompt = prompt_kv[number].to(hidden_MD.dtype) if prompt_kv is not None and length else None
        if torch.is_grad_enabled() and (hidden_MD.requires_grad or (prompt is not None and prompt.requires_grad)):
            hidden_MD = _FrozenLayer.apply(hidden_MD, prompt, layer, places)  # type: ignore[no-untyped-call]
        else:
            hidden_MD, _ = _forward(hidden_MD, prompt, layer, places, keep=False)
        if all_layers or number == len(layers) - 1:
            states.append(places.pad(hidden_MD).view_as(embedded_BTD))
    return tuple(states) if all_layers else (states[-1],)


class _Kept(NamedTuple):
    """What a layer's backward pass needs; None where nothing was dropped."""

    qkv_M3D: Tensor
    prompt: Tensor | None
    weights_ZTS: Tensor
    attention_mask: Tensor | None
    sum_MD: Tensor
    mean: Tensor
    rstd: Tensor
    out_mask: Tensor | None
    up: Tensor
    second_sum_MD: Tensor
    second_mean: Tensor
    second_rstd: Tensor
    down_mask: Tensor | None


def _heads(qkv_M3D: Tensor, prompt: Tensor | None, layer: Layer, places: Places) -> tuple[Tensor, Tensor]:
    """Return the queries (B, N, T, H), and keys and values with the prompt in front, (2, B, N, S, H)."""
    padded = places.pad(qkv_M3D).view(places.sentences, places.longest, 3, layer.heads, -1).permute(2, 0, 3, 1, 4)
    kv = padded[1:]
    if prompt is not None:
        kv = torch.cat([prompt.expand(-1, places.sentences, -1, -1, -1), kv], dim=-2)
    return padded[0], kv


def _forward(
    hidden_MD: Tensor, prompt: Tensor | None, layer: Layer, places: Places, *, keep: bool
) -> tuple[Tensor, _Kept | None]:
    module = layer.module
    weights_ZTS = attention_mask = None
    qkv_M3D = F.linear(hidden_MD, *layer.qkv)
    query, kv = _heads(qkv_M3D, prompt, layer, places)
    rate = _rate(module.attention.self.dropout)
    if keep or rate:
        query_ZTH, (key_ZSH, value_ZSH) = query.reshape(-1, *query.shape[2:]), kv.reshape(2, -1, *kv.shape[3:])
        weights_ZTS = _scores(query_ZTH, key_ZSH, layer, places).softmax(-1)
        dropped_ZTS, attention_mask = _drop(weights_ZTS, rate)
        mixed = (dropped_ZTS @ value_ZSH).view(query.shape)
    else:  # torch has a fused kernel for it
        mask = None if places.bias_B1S is None else places.bias_B1S.unsqueeze(1)
        mixed = F.scaled_dot_product_attention(query, kv[0], kv[1], attn_mask=mask)
    mixed_MD = places.pack(mixed.transpose(1, 2).reshape(-1, hidden_MD.shape[1]))
    between_MD, *first = _add_and_norm(mixed_MD, hidden_MD, module.attention.output)
    up = F.linear(between_MD, module.intermediate.dense.weight, module.intermediate.dense.bias)
    active = F.gelu(up) if keep else torch._C._nn.gelu_(up)
    after_MD, *second = _add_and_norm(active, between_MD, module.output)
    if not keep:
        return after_MD, None
    assert weights_ZTS is not None
    return after_MD, _Kept(qkv_M3D, prompt, weights_ZTS, attention_mask, *first, up, *second)


def _scores(query_ZTH: Tensor, key_ZSH: Tensor, layer: Layer, places: Places) -> Tensor:
    """Scaled dot products, with the lowest number for padding keys."""
    shape = len(query_ZTH), query_ZTH.shape[1], key_ZSH.shape[1]
    scale = query_ZTH.shape[-1] ** -0.5
    if places.bias_B1S is None:
        return torch.baddbmm(query_ZTH.new_empty(shape), query_ZTH, key_ZSH.mT, beta=0, alpha=scale)
    bias_ZTS = places.bias_B1S.unsqueeze(1).expand(-1, layer.heads, shape[1], -1).reshape(shape)
    return bias_ZTS.baddbmm_(query_ZTH, key_ZSH.mT, alpha=scale)


def _add_and_norm(values: Tensor, residual_MD: Tensor, module: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # noqa: ANN401
    """Dense, dropout, residual and LayerNorm; returns also the sum, its mean and 1 / deviation, and the dropout mask."""
    dense_MD = F.linear(values, module.dense.weight, module.dense.bias)
    rate, norm, mask = _rate(module.dropout), module.LayerNorm, None
    if rate:
        mask = keep_mask(dense_MD.shape, rate, dense_MD.dtype)
        sum_MD = torch.addcmul(residual_MD, dense_MD, mask, value=1 / kept_share(rate))
    else:
        sum_MD = dense_MD.add_(residual_MD)
    normed, mean, rstd = torch.native_layer_norm(sum_MD, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return normed, sum_MD, mean, rstd, mask


def _norm_backward(gradient: Tensor, sum_MD: Tensor, mean: Tensor, rstd: Tensor, norm: nn.LayerNorm) -> Tensor:
    found: Tensor = _aten.native_layer_norm_backward(
        gradient, sum_MD, norm.normalized_shape, mean, rstd, norm.weight, norm.bias, [True, False, False]
    )[0]
    return found


def _rate(dropout: Any) -> float:  # noqa: ANN401  (our Dropout, or torch's where nothing is ever dropped)
    return float(dropout.p) if dropout.training else 0.0


def _drop(values: Tensor, rate: float) -> tuple[Tensor, Tensor | None]:
    if not rate:
        return values, None
    # the factor stands in the mask: attention weights are fewer than what it would otherwise have to be put on
    mask = keep_mask(values.shape, rate, values.dtype).mul_(1 / kept_share(rate))
    return values * mask, mask


def _undrop(gradient: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    """The gradient before a hidden dropout, in a tensor of its own."""
    return gradient if mask is None else (gradient * mask).mul_(1 / kept_share(rate))


class _FrozenLayer(torch.autograd.Function):
    """One layer as one operation on the hidden states and the layer's prompt."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, prompt: Tensor | None, layer: Layer, places: Places) -> Tensor:  # noqa: ANN401
        after_MD, kept = _forward(hidden_MD, prompt, layer, places, keep=True)
        assert kept is not None
        ctx.save_for_backward(*kept)
        ctx.layer, ctx.places = layer, places
        own = layer.module
        ctx.rates = _rate(own.attention.output.dropout), _rate(own.output.dropout)
        return after_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, after_MD: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # noqa: ANN401
        kept, layer, places = _Kept(*ctx.saved_tensors), ctx.layer, ctx.places
        out, down = layer.module.attention.output, layer.module.output
        second_MD = _norm_backward(
            after_MD, kept.second_sum_MD, kept.second_mean, kept.second_rstd, down.LayerNorm
        )
        up = _undrop(second_MD, kept.down_mask, ctx.rates[1]) @ down.dense.weight
        _aten.gelu_backward.grad_input(up, kept.up, grad_input=up)
        between_MD = second_MD.addmm_(up, layer.module.intermediate.dense.weight)
        first_MD = _norm_backward(between_MD, kept.sum_MD, kept.mean, kept.rstd, out.LayerNorm)
        mixed_MD = _undrop(first_MD, kept.out_mask, ctx.rates[0]) @ out.dense.weight
        qkv_M3D, prompt = _attention_backward(mixed_MD, kept, layer, places, of_tokens=ctx.needs_input_grad[0])
        if qkv_M3D is None:
            return None, prompt, None, None
        return first_MD.addmm_(qkv_M3D, layer.qkv[0]), prompt, None, None


def _attention_backward(
    mixed_MD: Tensor, kept: _Kept, layer: Layer, places: Places, *, of_tokens: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the joined projections (if `of_tokens`: below the first layer nothing needs it) and of the prompt."""
    query, kv = _heads(kept.qkv_M3D, kept.prompt, layer, places)
    sentences, heads, longest, size = query.shape
    mixed_ZTH = places.pad(mixed_MD).view(sentences, longest, heads, size).transpose(1, 2).reshape(-1, longest, size)
    query_ZTH, (key_ZSH, value_ZSH) = query.reshape(-1, longest, size), kv.reshape(2, -1, kv.shape[-2], size)
    weights_ZTS, mask = kept.weights_ZTS, kept.attention_mask
    d_weights = mixed_ZTH @ value_ZSH.mT
    dropped_ZTS = weights_ZTS
    if mask is not None:
        dropped_ZTS, d_weights = weights_ZTS * mask, d_weights.mul_(mask)
    d_scores = torch._softmax_backward_data(d_weights, weights_ZTS, -1, weights_ZTS.dtype)
    d_kv = torch.empty_like(kv, memory_format=torch.contiguous_format)
    scale, (d_key, d_value) = size**-0.5, d_kv.view(2, -1, kv.shape[-2], size)
    torch.baddbmm(d_key, d_scores.mT, query_ZTH, beta=0, alpha=scale, out=d_key)
    torch.bmm(dropped_ZTS.mT, mixed_ZTH, out=d_value)
    length, d_prompt = 0, None
    if kept.prompt is not None:
        length = kept.prompt.shape[-2]
        d_prompt = d_kv[..., :length, :]
        d_prompt = d_prompt if kept.prompt.shape[1] == sentences else d_prompt.sum(1, keepdim=True)
    if not of_tokens:
        return None, d_prompt
    d_query = torch.baddbmm(torch.empty_like(query_ZTH), d_scores, key_ZSH, beta=0, alpha=scale)
    padded = mixed_MD.new_empty(sentences, longest, 3, heads, size)
    padded[:, :, 0].copy_(d_query.view(query.shape).transpose(1, 2))
    padded[:, :, 1:].copy_(d_kv[..., length:, :].permute(1, 3, 0, 2, 4))
    return places.pack(padded.view(sentences * longest, -1)), d_prompt
