"""Every pooling against a plain loop over the real tokens."""

import pytest
import torch
from support.encoders import small_backbone, small_tokens

from promcse_pl.config.pooling import POOLINGS, is_pooling
from promcse_pl.data.batch import Tokens
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.pooling import (
    count_pooled_parts,
    needs_all_layers,
    needs_first_token,
    pool,
)

LENGTHS = [5, 1, 3]
JOINED = ["cls+avg", "avg+cls", "cls+max+avg+mean_sqrt_len+weightedmean+lasttoken"]


def some_states():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, 4, dtype=torch.float64, generator=generator) for _ in range(4)]


def some_mask(side="right"):
    mask = (torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    return mask if side == "right" else mask.flip(1)


def slow_pool(states, pooling, side="right"):
    """From the definition: loops over the real tokens of the mean of the layers that a pooling reads."""
    if "+" in pooling:
        return torch.cat([slow_pool(states, part, side) for part in pooling.split("+")], dim=1)
    layers = {"avg_top2": [2, 3], "avg_first_last": [0, 3]}.get(pooling, [3])
    rows = []
    for b, length in enumerate(LENGTHS):
        start = 0 if side == "right" else 5 - length
        entries = []
        for d in range(4):
            numbers = [sum(float(states[i][b, start + t, d]) for i in layers) / len(layers) for t in range(length)]
            weighted = [(t + 1) * number for t, number in enumerate(numbers)]
            entries.append(
                {
                    "cls": numbers[0],
                    "cls_before_pooler": numbers[0],
                    "lasttoken": numbers[-1],
                    "max": max(numbers),
                    "mean_sqrt_len": sum(numbers) / length**0.5,
                    "weightedmean": sum(weighted) / (length * (length + 1) / 2),
                }.get(pooling, sum(numbers) / length)
            )
        rows.append(entries)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", [*POOLINGS, *JOINED])
def test_pooling_equals_the_loop(pooling, side):
    found = pool(some_states(), some_mask(side), pooling)
    torch.testing.assert_close(found, slow_pool(some_states(), pooling, side), rtol=0, atol=1e-14)
    assert found.shape[1] == 4 * count_pooled_parts(pooling)


@pytest.mark.parametrize("pooling", [pooling for pooling in POOLINGS if not needs_all_layers(pooling)])
def test_the_last_layer_is_enough_unless_the_pooling_says_otherwise(pooling):
    states = some_states()
    assert torch.equal(pool(states[-1:], some_mask(), pooling), pool(states, some_mask(), pooling))


@pytest.mark.parametrize("pooling", [pooling for pooling in [*POOLINGS, *JOINED] if needs_first_token(pooling)])
def test_the_first_token_is_enough_for_cls_alone(pooling):
    states = some_states()
    assert torch.equal(pool([states[-1][:, :1]], some_mask(), pooling), pool(states, some_mask(), pooling))
    assert pooling in ("cls", "cls_before_pooler")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", [*POOLINGS, *JOINED])
def test_padding_gets_no_gradient_and_does_not_count(pooling, side):
    states = [state.requires_grad_() for state in some_states()]
    mask = some_mask(side)
    before = pool(states, mask, pooling)
    before.sum().backward()
    for state in states:
        if state.grad is not None:
            assert not state.grad[mask == 0].any()
    with torch.no_grad():
        for state in states:
            state[mask == 0] = 1e6
    assert torch.equal(pool(states, mask, pooling), before)


@pytest.mark.parametrize("pooling", [*POOLINGS, *JOINED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pooling_keeps_the_dtype(pooling, dtype):
    assert pool([state.to(dtype) for state in some_states()], some_mask(), pooling).dtype == dtype


@pytest.mark.parametrize(
    ("name", "allowed"),
    [(name, True) for name in [*POOLINGS, *JOINED]]
    + [
        (name, False)
        for name in ("mean", "", "+", "cls+", "cls+cls", "cls+avg_top2", "cls_before_pooler+avg", "cls, avg")
    ],
)
def test_names_of_poolings(name, allowed):
    assert is_pooling(name) == allowed


@pytest.mark.parametrize("family", ["bert", "electra", "modernbert"])
def test_cls_pooling_reads_the_first_token_of_sentences_that_are_padded_at_the_start(family):
    encoder = PromptEncoder(small_backbone(family), length=3, pooling="cls").double().eval()
    tokens = small_tokens([6, 4])
    ids, mask = tokens.ids_NT.clone(), tokens.mask_NT.clone()
    ids[1], mask[1] = ids[1].roll(2), mask[1].roll(2)
    torch.testing.assert_close(encoder(Tokens(ids, mask))[0], encoder(tokens)[0], rtol=0, atol=1e-12)


def test_prompt_slots_are_not_pooled():
    tokens = small_tokens([6, 4])
    for length in (0, 1, 7):
        encoder = PromptEncoder(small_backbone(), length=length, pooling="avg").double().eval()
        (states,) = encoder.backbone(tokens.ids_NT, tokens.mask_NT, encoder.prompt(), position_offset=length)
        assert states.shape[1] == 6
        expected = torch.stack([states[0].mean(0), states[1, :4].mean(0)])
        torch.testing.assert_close(encoder(tokens)[0], expected, rtol=0, atol=1e-14)
