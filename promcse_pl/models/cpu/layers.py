"""Fused CPU layers for encoders with BERT's layer structure: packed tokens and a hand-written backward pass.

The tokens of a chunk are packed without padding. Each layer is one autograd function. Its backward pass computes the gradients
of the hidden states and of the layer's prompt, none of the frozen weights, and only the tensors that it needs are saved. Hooks
of the modules are not called, so callers check `promcse_pl.models.hooks.has_hooks` first.
"""

# B sentences, T tokens of the longest, M real tokens of all (or B if only the first token is computed), P prompt length,
# S = P + T, N heads, H head size, Z = B * N, D width, E intermediate width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from promcse_pl.models.cpu.dropout import Dropout, in_bytes, keep_mask, kept_share


class DenseNorm(NamedTuple):
    """Linear layer, dropout (None: none), residual and LayerNorm."""

    dense: nn.Linear
    dropout: Dropout | None
    norm: nn.LayerNorm


class LayerParts(NamedTuple):
    """Modules of one layer by role. `heads`: number of attention heads; `dropout`: dropout of the attention weights."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    heads: int
    dropout: Dropout
    out: DenseNorm
    up: nn.Linear
    down: DenseNorm


@dataclass(frozen=True, slots=True)
class FusedLayers:
    """Module names of a family with BERT's layer structure: attention, GELU, LayerNorm after the residual.

    Attributes:
        model: Import path of the model class.
        types: Names of the module classes of the encoder, in the same Python module.
        layers: Name of the ModuleList of layers, for `get_submodule`.
        parts: Returns the `LayerParts` of a layer.
        other_types: Further module classes of the encoder.
        position_bias: Returns a bias (N, T, T) on the attention scores of tokens from the model and the embedding output; None:
            no bias.
    """

    model: str
    types: tuple[str, ...]
    layers: str
    parts: Callable[[nn.Module], LayerParts]
    other_types: tuple[type[nn.Module], ...] = ()
    position_bias: Callable[[nn.Module, Tensor], Tensor] | None = None


@cache
def _module_types(fused: FusedLayers) -> tuple[type[nn.Module], frozenset[type[nn.Module]]]:
    """Return the class of the supported model, and those that the modules of its encoder may have."""
    from transformers.activations import GELUActivation

    path, _, name = fused.model.rpartition(".")
    module = import_module(path)
    shared = (nn.ModuleList, nn.Linear, nn.LayerNorm, Dropout, GELUActivation, *fused.other_types)
    return getattr(module, name), frozenset((*shared, *(getattr(module, part) for part in fused.types)))


def can_fuse(model: nn.Module, fused: FusedLayers | None) -> bool:
    """Return whether the fused layers compute what an encoder's modules would: transformers' own, on a CPU, and frozen.

    Weights that are trained count as frozen in eval mode without gradients, as in a dev evaluation. In train mode they do not, so
    that both passes of a recomputed chunk draw the same dropout masks.

    Types are compared exactly: a subclass, an int8 layer or an adapter of another library may compute something else.
    """
    if fused is None:
        return False
    model_type, types = _module_types(fused)
    if type(model) is not model_type or getattr(model.config, "is_decoder", False) or torch.is_autocast_enabled("cpu"):
        return False
    if next(model.parameters()).device.type != "cpu":
        return False
    is_training = model.training or torch.is_grad_enabled()
    # a single loop, since this is called for every chunk of sentences
    for module in model.get_submodule(fused.layers.rpartition(".")[0]).modules():
        if type(module) not in types:
            return False
        if is_training and any(weight is not None and weight.requires_grad for weight in module._parameters.values()):
            return False
    return True


@dataclass(frozen=True, slots=True)
class _Packing:
    """Positions of the packed tokens in the padded sentences.

    Attributes:
        sentences, longest: B and T.
        first_B: Index of each sentence's first token among the packed tokens.
        index_M: Index of each token in the flattened (B, T); None if no sentence is padded.
        bias: Added to the attention scores, (B, N or 1, T or 1, S): position bias, lowest number for padding; None if neither.
    """

    sentences: int
    longest: int
    first_B: Tensor
    index_M: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, mask_BT: Tensor, prompt_length: int, dtype: torch.dtype, position_bias_NTT: Tensor | None) -> _Packing:
        """Compute them from an attention mask (1 for real tokens)."""
        sentences, longest = mask_BT.shape
        real_BT = mask_BT.bool()
        lengths_B = real_BT.sum(1)
        first_B = lengths_B.cumsum(0) - lengths_B
        is_padded = not bool(real_BT.all())
        bias = None
        if position_bias_NTT is not None:
            bias = position_bias_NTT.expand(sentences, -1, -1, -1)
        elif is_padded:
            bias = torch.zeros(sentences, 1, 1, longest, dtype=dtype)
        if bias is not None:
            if is_padded:
                bias = bias.masked_fill(~real_BT[:, None, None], torch.finfo(dtype).min)
            bias = F.pad(bias, (prompt_length, 0)).contiguous()
        return cls(sentences, longest, first_B, real_BT.flatten().nonzero()[:, 0] if is_padded else None, bias)

    def pack(self, padded: Tensor) -> Tensor:
        """(B * T, ...) to (M, ...)."""
        return padded if self.index_M is None else padded.index_select(0, self.index_M)

    def pad(self, packed: Tensor) -> Tensor:
        """(M, ...) to (B * T, ...), with zeros for padding."""
        if self.index_M is None:
            return packed
        padded = packed.new_zeros(self.sentences * self.longest, *packed.shape[1:])
        return padded.index_copy_(0, self.index_M, packed)


def run_fused_layers(
    model: nn.Module,
    fused: FusedLayers,
    embedded_BTD: Tensor,
    mask_BT: Tensor,
    prompt_kv: Sequence[Tensor] | None,
    *,
    all_layers: bool,
    first_token: bool,
) -> tuple[Tensor, ...]:
    """Run the layers of an encoder for which `can_fuse` is true.

    Args:
        model: transformers' model; the weights, dropout rates and train or eval mode of its layers are used.
        fused: Module names of its family.
        embedded_BTD: The embedding output.
        mask_BT: 1 for real tokens, 0 for padding at the end.
        prompt_kv: Keys and values of each layer, (2, B or 1, N, P, H), or None.
        all_layers: Also return the input of each layer.
        first_token: Compute only the first token after the last layer's attention; not allowed with `all_layers`, or if a
            sentence is padded at the start.

    Returns:
        Hidden states (B, T, D), the last layer last, with zeros for padding in the outputs of layers; the last one is (B, 1, D)
        if only the first token was computed.
    """
    assert not (all_layers and first_token)
    length = 0 if prompt_kv is None else prompt_kv[0].shape[-2]
    bias_NTT = None if fused.position_bias is None else fused.position_bias(model, embedded_BTD)
    packing = _Packing.of(mask_BT, length, embedded_BTD.dtype, bias_NTT)
    layers = [fused.parts(layer) for layer in cast(nn.ModuleList, model.get_submodule(fused.layers))]
    hidden_MD = packing.pack(embedded_BTD.flatten(0, 1))
    states = [embedded_BTD]
    for number, layer in enumerate(layers):
        prompt = prompt_kv[number].to(hidden_MD.dtype) if prompt_kv is not None and length else None
        first = first_token and number == len(layers) - 1
        if torch.is_grad_enabled() and (hidden_MD.requires_grad or (prompt is not None and prompt.requires_grad)):
            hidden_MD = _FrozenLayer.apply(hidden_MD, prompt, layer, packing, first)  # type: ignore[no-untyped-call]
        else:
            hidden_MD, _ = _forward(hidden_MD, prompt, layer, packing, first=first, keep=False)
        if first:
            return (hidden_MD.unsqueeze(1),)
        if all_layers or number == len(layers) - 1:
            states.append(packing.pad(hidden_MD).view_as(embedded_BTD))
    return tuple(states) if all_layers else (states[-1],)


class _SavedNorm(NamedTuple):
    """Tensors for the backward pass of dense, dropout, residual and LayerNorm; no mask without dropout."""

    sum_MD: Tensor
    mean_M: Tensor
    rstd_M: Tensor
    mask_MD: Tensor | None


class _SavedAttention(NamedTuple):
    """Tensors for the backward pass of attention and GELU; no mask without dropout."""

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
        layer: LayerParts,
        packing: _Packing,
        first: bool,
    ) -> Tensor:
        after_MD, saved = _forward(hidden_MD, prompt, layer, packing, first=first, keep=True)
        assert saved is not None
        ctx.save_for_backward(*(tensor for part in saved for tensor in part))
        ctx.layer, ctx.packing, ctx.first = layer, packing, first
        ctx.rates = [_rate(dropout) for dropout in (layer.dropout, layer.out.dropout, layer.down.dropout)]
        return after_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, after_MD: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # noqa: ANN401
        saved, layer, packing = ctx.saved_tensors, ctx.layer, ctx.packing
        attention, out, down = _SavedAttention(*saved[:5]), _SavedNorm(*saved[5:9]), _SavedNorm(*saved[9:])
        second_MD = _norm_backward(after_MD, down, layer.down.norm)
        up_ME = _dropout_backward(second_MD, down.mask_MD, ctx.rates[2]) @ layer.down.dense.weight
        torch.ops.aten.gelu_backward.grad_input(up_ME, attention.up_ME, grad_input=up_ME)
        between_MD = second_MD.addmm_(up_ME, layer.up.weight)
        first_MD = _norm_backward(between_MD, out, layer.out.norm)
        mixed_MD = _dropout_backward(first_MD, out.mask_MD, ctx.rates[1]) @ layer.out.dense.weight
        of_tokens = ctx.needs_input_grad[0]  # False for the first layer: the embeddings are frozen
        qkv_M3D, prompt = _attention_backward(
            mixed_MD, attention, layer, packing, rate=ctx.rates[0], first=ctx.first, of_tokens=of_tokens
        )
        if qkv_M3D is None:
            return None, prompt, None, None, None
        if ctx.first:
            hidden_MD = torch.zeros_like(qkv_M3D[:, : first_MD.shape[1]]).index_add_(0, packing.first_B, first_MD)
        else:
            hidden_MD = first_MD
        for part, gradient_MD in zip(layer[:3], qkv_M3D.chunk(3, dim=1), strict=True):
            hidden_MD.addmm_(gradient_MD, part.weight)
        return hidden_MD, prompt, None, None, None


def _forward(
    hidden_MD: Tensor, prompt: Tensor | None, layer: LayerParts, packing: _Packing, *, first: bool, keep: bool
) -> tuple[Tensor, tuple[_SavedAttention, _SavedNorm, _SavedNorm] | None]:
    qkv_M3D = torch.cat([F.linear(hidden_MD, part.weight, part.bias) for part in layer[:3]], dim=1)
    query, kv = _heads(qkv_M3D, prompt, layer, packing, first=first)
    rate = _rate(layer.dropout)
    weights_ZTS = mask_ZTS = None
    if keep or layer.dropout.training:  # also in the first pass of a recomputed chunk: both passes must be equal
        query_ZTH, (key_ZSH, value_ZSH) = query.reshape(-1, *query.shape[2:]), kv.reshape(2, -1, *kv.shape[3:])
        weights_ZTS = dropped_ZTS = _scores(query_ZTH, key_ZSH, packing).softmax(-1)
        if rate:
            dropped_ZTS = keep_mask(weights_ZTS.shape, rate, weights_ZTS.dtype)
            mask_ZTS = in_bytes(dropped_ZTS)
            dropped_ZTS.mul_(weights_ZTS)
        mixed = _product(dropped_ZTS, value_ZSH, 1 / kept_share(rate)).view(query.shape)
    else:
        bias = packing.bias if packing.bias is None or not first else packing.bias[:, :, :1]
        mixed = F.scaled_dot_product_attention(query, kv[0], kv[1], attn_mask=bias)
    mixed_MD = mixed.transpose(1, 2).reshape(-1, hidden_MD.shape[1])
    if first:
        hidden_MD = hidden_MD[packing.first_B]
    else:
        mixed_MD = packing.pack(mixed_MD)
    between_MD, out = _add_and_norm(mixed_MD, hidden_MD, layer.out)
    up_ME = F.linear(between_MD, layer.up.weight, layer.up.bias)
    active_ME = F.gelu(up_ME) if keep else torch.ops.aten.gelu_(up_ME)
    after_MD, down = _add_and_norm(active_ME, between_MD, layer.down)
    if not keep:
        return after_MD, None
    assert weights_ZTS is not None
    return after_MD, (_SavedAttention(qkv_M3D, prompt, weights_ZTS, mask_ZTS, up_ME), out, down)


def _heads(
    qkv_M3D: Tensor, prompt: Tensor | None, layer: LayerParts, packing: _Packing, *, first: bool
) -> tuple[Tensor, Tensor]:
    """Return the queries (B, N, T or 1, H), and keys and values with the prompt in front, (2, B, N, S, H)."""
    padded = packing.pad(qkv_M3D).view(packing.sentences, packing.longest, 3, layer.heads, -1).permute(2, 0, 3, 1, 4)
    query, kv = padded[0], padded[1:]
    if prompt is not None:
        kv = torch.cat([prompt.expand(-1, packing.sentences, -1, -1, -1), kv], dim=-2)
    return query[:, :, :1] if first else query, kv


def _scores(query_ZTH: Tensor, key_ZSH: Tensor, packing: _Packing) -> Tensor:
    """Return the scaled dot products and the bias."""
    scale = query_ZTH.shape[-1] ** -0.5
    if packing.bias is None:
        return _product(query_ZTH, key_ZSH.mT, scale)
    bias = packing.bias[:, :, : query_ZTH.shape[1]]  # the first row if only the first token is computed
    bias_ZTS = bias.expand(-1, len(query_ZTH) // packing.sentences, -1, -1).flatten(0, 1)
    return torch.baddbmm(bias_ZTS, query_ZTH, key_ZSH.mT, alpha=scale)


def _product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """Return a batched matrix product times a factor, in one pass."""
    empty = left.new_empty(len(left), left.shape[1], right.shape[2])
    return torch.baddbmm(empty, left, right, beta=0, alpha=factor, out=empty)


def _add_and_norm(values: Tensor, residual_MD: Tensor, module: DenseNorm) -> tuple[Tensor, _SavedNorm]:
    """Apply dense, dropout, residual and LayerNorm."""
    dense_MD = F.linear(values, module.dense.weight, module.dense.bias)
    rate, norm = _rate(module.dropout), module.norm
    if rate:
        mask_MD = keep_mask(dense_MD.shape, rate, dense_MD.dtype)
        sum_MD = torch.addcmul(residual_MD, dense_MD, mask_MD, value=1 / kept_share(rate))
        kept_mask = in_bytes(mask_MD)
    else:
        sum_MD, kept_mask = dense_MD.add_(residual_MD), None
    normed_MD, mean_M, rstd_M = torch.native_layer_norm(sum_MD, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return normed_MD, _SavedNorm(sum_MD, mean_M, rstd_M, kept_mask)


def _norm_backward(gradient_MD: Tensor, saved: _SavedNorm, norm: nn.LayerNorm) -> Tensor:
    gradient: Tensor = torch.ops.aten.native_layer_norm_backward(
        gradient_MD,
        saved.sum_MD,
        norm.normalized_shape,
        saved.mean_M,
        saved.rstd_M,
        norm.weight,
        norm.bias,
        [True, False, False],
    )[0]
    return gradient


def _rate(dropout: Dropout | None) -> float:
    return dropout.p if dropout is not None and dropout.training else 0.0


def _dropout_backward(gradient: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    """Return the gradient of a dropout's input."""
    return gradient if mask is None else (gradient * mask).mul_(1 / kept_share(rate))


def _attention_backward(
    mixed_MD: Tensor,
    saved: _SavedAttention,
    layer: LayerParts,
    packing: _Packing,
    *,
    rate: float,
    first: bool,
    of_tokens: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of query, key and value, concatenated (None unless `of_tokens`), and of the prompt.

    It has seven parameters: those of `_heads`, the incoming gradient, the dropout rate, and which gradients are needed.
    """
    query, kv = _heads(saved.qkv_M3D, saved.prompt, layer, packing, first=first)
    sentences, heads, rows, size = query.shape
    query_ZTH, (key_ZSH, value_ZSH) = query.reshape(-1, rows, size), kv.reshape(2, -1, kv.shape[-2], size)
    padded = mixed_MD if first else packing.pad(mixed_MD)
    mixed_ZTH = padded.view(sentences, rows, heads, size).transpose(1, 2).reshape(-1, rows, size)
    weights_ZTS, mask_ZTS, factor = saved.weights_ZTS, saved.mask_ZTS, 1 / kept_share(rate)
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
    if saved.prompt is not None:
        length = saved.prompt.shape[-2]
        d_prompt = d_kv[..., :length, :]
        if saved.prompt.shape[1] != sentences:
            d_prompt = d_prompt.sum(1, keepdim=True)
    if not of_tokens:
        return None, d_prompt
    d_query = _product(d_scores, key_ZSH, size**-0.5).view(query.shape).transpose(1, 2)
    d_padded = mixed_MD.new_empty(sentences, packing.longest, 3, heads, size)
    d_padded[:, :rows, 0].copy_(d_query)
    d_padded[:, rows:, 0].zero_()
    d_padded[:, :, 1:].copy_(d_kv[..., length:, :].permute(1, 3, 0, 2, 4))
    return packing.pack(d_padded.view(sentences * packing.longest, -1)), d_prompt
