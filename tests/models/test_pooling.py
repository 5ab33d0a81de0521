"""Every pooling against a plain loop over the real tokens."""

import pytest
import torch
from support.encoders import small_backbone, small_tokens

from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.pooling import POOLINGS, needs_all_layers, pool

LENGTHS = [5, 1, 3]


def some_states():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, 4, dtype=torch.float64, generator=generator) for _ in range(4)]


def some_mask():
    return (torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)).long()


def slow_pool(states, pooling):
    """From the definition: the mean over the real tokens of the mean of the layers that a pooling reads."""
    layers = {"avg": [3], "avg_top2": [2, 3], "avg_first_last": [0, 3]}.get(pooling, [3])
    rows = []
    for b, length in enumerate(LENGTHS):
        positions = [0] if pooling.startswith("cls") else list(range(length))
        entries = []
        for d in range(4):
            numbers = [float(states[layer][b, t, d]) for layer in layers for t in positions]
            entries.append(sum(numbers) / len(numbers))
        rows.append(entries)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_equals_the_loop(pooling):
    states = some_states()
    torch.testing.assert_close(pool(states, some_mask(), pooling), slow_pool(states, pooling), rtol=0, atol=1e-14)


@pytest.mark.parametrize("pooling", [pooling for pooling in POOLINGS if not needs_all_layers(pooling)])
def test_the_last_layer_is_enough_unless_the_pooling_says_otherwise(pooling):
    states = some_states()
    assert torch.equal(pool(states[-1:], some_mask(), pooling), pool(states, some_mask(), pooling))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_gets_no_gradient_and_does_not_count(pooling):
    states = [state.requires_grad_() for state in some_states()]
    mask = some_mask()
    before = pool(states, mask, pooling)
    before.sum().backward()
    for state in states:
        if state.grad is not None:
            assert not state.grad[mask == 0].any()
    with torch.no_grad():
        for state in states:
            state[mask == 0] = 1e6
    assert torch.equal(pool(states, mask, pooling), before)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pooling_keeps_the_dtype(pooling, dtype):
    assert pool([state.to(dtype) for state in some_states()], some_mask(), pooling).dtype == dtype


def test_prompt_slots_are_not_pooled():
    tokens = small_tokens([6, 4])
    for length in (0, 1, 7):
        encoder = PromptEncoder(small_backbone(), length=length, pooling="avg").double().eval()
        (states,) = encoder.backbone(tokens.ids_NT, tokens.mask_NT, encoder.prompt(), position_offset=length)
        assert states.shape[1] == 6
        expected = torch.stack([states[0].mean(0), states[1, :4].mean(0)])
        torch.testing.assert_close(encoder(tokens)[0], expected, rtol=0, atol=1e-14)
