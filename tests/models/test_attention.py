"""The registered attention function: the prompt in front, and arguments that it refuses."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from promcse_pl.models.attention import prepend_prompt, prompt_attention, prompt_in_attention
from promcse_pl.utils.errors import EncoderError


class Layer(nn.Module):
    """Stands for the attention module of an encoder."""

    layer_idx = 0
    is_causal = False


def projections(tokens: int = 4, heads: int = 2, kv_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [
        torch.randn(3, count, tokens, 8, generator=generator, dtype=torch.float64)
        for count in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("s_aux", torch.zeros(2)),
        ("softcap", 50.0),
        ("head_mask", torch.ones(2)),
        ("a_new_option", 0),
    ],
)
def test_an_argument_that_could_change_the_output_is_refused(name, value):
    with pytest.raises(EncoderError, match=rf"Layer passes {name} to its attention function"):
        prompt_attention(Layer(), *projections(), None, **{name: value})


@pytest.mark.parametrize("name", ["s_aux", "softcap", "is_causal"])
@pytest.mark.parametrize("value", [None, False])
def test_an_argument_that_is_switched_off_is_accepted(name, value):
    mixed, _ = prompt_attention(Layer(), *projections(), None, **{name: value})
    assert mixed.shape == (3, 4, 2, 8)


def test_causal_attention_without_a_mask_is_refused():
    layer = Layer()
    with pytest.raises(EncoderError, match="causal attention without a mask"):
        prompt_attention(layer, *projections(), None, is_causal=True)
    layer.is_causal = True
    with pytest.raises(EncoderError, match="causal attention without a mask"):
        prompt_attention(layer, *projections(), None)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mixed, _ = prompt_attention(layer, *projections(), mask)
    expected = F.scaled_dot_product_attention(*projections(), is_causal=True)
    torch.testing.assert_close(mixed.transpose(1, 2), expected, rtol=0, atol=1e-12)
    mixed, _ = prompt_attention(layer, *projections(tokens=1), None)  # one token attends to itself
    torch.testing.assert_close(mixed.transpose(1, 2), projections(tokens=1)[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", ["boolean", "additive"])
@pytest.mark.parametrize("dropout", [0.0, 1e-12], ids=["torch", "separate operations"])
def test_prompt_slots_are_visible_to_every_query_under_a_causal_mask_and_a_bias(mask, dropout):
    query, key, value = projections(heads=4)
    prompt = torch.randn(2, 1, 2, 3, 8, dtype=torch.float64)
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()
    given = allowed if mask == "boolean" else torch.zeros(4, 4, dtype=torch.float64).masked_fill(~allowed, -1e300)
    bias = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    with prompt_in_attention([prompt]):
        mixed, _ = prompt_attention(Layer(), query, key, value, given, dropout=dropout, scaling=0.5, position_bias=bias)
    for b in range(3):
        for n in range(4):
            for t in range(4):
                keys = torch.cat([prompt[0, 0, n // 2], key[b, n // 2, : t + 1]])
                values = torch.cat([prompt[1, 0, n // 2], value[b, n // 2, : t + 1]])
                scores = 0.5 * keys @ query[b, n, t] + F.pad(bias[0, n, t, : t + 1], (3, 0))
                torch.testing.assert_close(mixed[b, t, n], scores.softmax(0) @ values, rtol=0, atol=1e-12)


def test_without_a_prompt_nothing_is_put_in_front():
    _, key, value = projections()
    for prompts in (None, [torch.zeros(2, 1, 2, 0, 8)]):
        with prompt_in_attention(prompts):
            assert prepend_prompt(Layer(), key, value, None) == (key, value, None)
