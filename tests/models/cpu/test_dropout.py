"""Fast dropout has the distribution of torch's: rate, mean, independence and seeds; independence of the prompt's masks."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from support.encoders import NO_DROPOUT, small_backbone, small_encoder, small_tokens
from torch import nn
from torch.nn import functional as F

from promcse_pl.data.batch import Tokens
from promcse_pl.models.attention import prompt_attention, prompt_in_attention
from promcse_pl.models.cpu.dropout import Dropout, dropout, keep_mask, use_fast_dropout
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.prompt import DeepPrompt

RATES = [0.05, 0.1, 0.5, 0.9]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(11)


def assert_uncorrelated(slices, rate):
    """Any two rows of 0 and 1 are independent: their correlation lies within 5 sigma of 0."""
    slices = (slices.double() - (1 - rate)) / math.sqrt(rate * (1 - rate))
    for a, b in combinations(slices, 2):
        assert abs(float((a * b).mean())) < 5 / math.sqrt(a.numel())


def assert_same_distribution(ours, theirs):
    """Mean and variance of every column agree within 5 standard errors."""
    for a, b in ((ours, theirs), ((ours - ours.mean(0)) ** 2, (theirs - theirs.mean(0)) ** 2)):
        error = ((a.var(0) + b.var(0)) / len(a)).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()


# --- a mask


@pytest.mark.parametrize("rate", RATES)
def test_the_share_of_dropped_entries_is_the_rate(rate):
    count = 400_000
    kept = int(keep_mask(torch.Size((count,)), rate).sum())
    assert abs(kept / count - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / count)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_entries_cut_from_one_random_word_are_independent(rate):
    mask = keep_mask(torch.Size((50_000, 4)), rate)
    patterns = (mask * torch.tensor([8, 4, 2, 1])).sum(1).bincount(minlength=16)
    expected = [
        50_000 * math.prod((1 - rate) if pattern & bit else rate for bit in (8, 4, 2, 1)) for pattern in range(16)
    ]
    assert chisquare(patterns.numpy(), expected).pvalue > 1e-5


def test_masks_of_successive_calls_are_independent():
    assert_uncorrelated(torch.stack([keep_mask(torch.Size((40_000,)), 0.3) for _ in range(5)]), 0.3)


@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (2, 3, 5), (7, 1, 1)], ids=str)
def test_any_shape_is_filled(shape):
    assert keep_mask(torch.Size(shape), 0.5).shape == shape
    assert dropout(torch.ones(shape), 0.5).shape == shape


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_entries_are_zero_or_scaled_so_that_the_mean_stays(rate, dtype):
    dropped = dropout(torch.ones(200_000, dtype=dtype), rate)
    assert dropped.dtype == dtype
    values = dropped.unique()
    assert len(values) == 2
    assert values[0] == 0
    assert values[1].item() == pytest.approx(1 / (1 - rate), rel=1e-2 if dtype == torch.bfloat16 else 1e-3)
    sigma = math.sqrt(rate / (1 - rate) / 200_000)
    assert abs(dropped.double().mean().item() - 1) < 5 * sigma + (5e-3 if dtype == torch.bfloat16 else 0)


def test_the_scale_belongs_to_the_rate_that_is_drawn():
    # 0.1 becomes 6554 / 65536; a scale of 1 / 0.9 would shift every mean a little
    assert dropout(torch.ones(50, dtype=torch.float64), 0.1).max().item() == 65536 / (65536 - 6554)


def test_the_seed_of_torch_decides_the_masks_and_numpy_is_left_alone():
    values = torch.randn(1000)
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002  (the global state is what is looked at)
    torch.manual_seed(5)
    first, second = dropout(values, 0.5), dropout(values, 0.5)
    torch.manual_seed(5)
    assert torch.equal(dropout(values, 0.5), first)
    state = torch.get_rng_state()
    assert torch.equal(dropout(values, 0.5), second)
    torch.set_rng_state(state)
    assert torch.equal(dropout(values, 0.5), second)
    assert not torch.equal(first, second)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_the_gradient_is_that_of_the_kept_entries():
    values = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    dropped = dropout(values, 0.25)
    dropped.sum().backward()
    torch.testing.assert_close(values.grad, (dropped != 0).double() / 0.75, rtol=1e-12, atol=0)


def test_the_gradient_of_a_broadcast_tensor_is_summed_and_a_byte_an_entry_is_kept():
    values, kept = torch.randn(3, 1, 5, dtype=torch.float64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        dropped = dropout(values, 0.25, torch.Size([2, 3, 7, 5]))
    weights = torch.randn_like(dropped)
    (dropped * weights).sum().backward()
    expected = ((dropped != 0) * weights / 0.75).sum(0).sum(1, keepdim=True)
    torch.testing.assert_close(values.grad, expected, rtol=1e-12, atol=1e-12)
    assert [(tensor.dtype, tensor.shape) for tensor in kept] == [(torch.uint8, dropped.shape)]


# --- the module


def test_eval_mode_and_rate_0_return_the_values_themselves():
    values = torch.randn(10)
    assert Dropout(0.5).eval()(values) is values
    assert Dropout(0.0).train()(values) is values
    assert not torch.equal(Dropout(0.5).train()(values), values)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_every_dropout_of_an_encoder_is_replaced_with_its_own_rate(family):
    rates = {
        "hidden_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.3,
        "mlp_dropout": 0.4,
        "attention_dropout": 0.3,
    }
    model = small_encoder(family, **rates)
    before = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    use_fast_dropout(model)
    after = {name: module.p for name, module in model.named_modules() if isinstance(module, Dropout)}
    assert after == before
    assert after
    assert not any(isinstance(module, nn.Dropout) for module in model.modules())


# --- against torch's own


def test_attention_dropout_has_the_mean_and_variance_of_torch():
    draws, rate = 20_000, 0.3
    query, key, value = (torch.randn(1, 2, tokens, 4).expand(draws, -1, -1, -1) for tokens in (3, 5, 5))
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    mask[..., 4] = False
    module = nn.Module().train()
    ours, _ = prompt_attention(module, query, key, value, mask, dropout=rate)
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate).transpose(1, 2)
    assert ours.std(0).min() > 0.01
    assert_same_distribution(ours.flatten(1), theirs.flatten(1))


@pytest.mark.parametrize("masked", ["none", "boolean", "additive"])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_attention_with_dropout_as_separate_operations_equals_the_fused_one(masked, scaling):
    query, key, value = (torch.randn(2, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 1, 5, 5) < 0.7
    mask[..., 0] = True
    mask = {"none": None, "boolean": mask, "additive": torch.zeros(mask.shape).double().masked_fill(~mask, -1e30)}[
        masked
    ]
    prompt_kv, module = torch.randn(1, 2, 1, 2, 3, 4, dtype=torch.float64), nn.Module()
    module.layer_idx = 0
    with prompt_in_attention(prompt_kv):
        plain, dropped = (
            prompt_attention(module, query, key, value, mask, rate, scaling)[0] for rate in (0.0, 1e-9)
        )  # 1e-9 is rounded to no dropped entry
    torch.testing.assert_close(dropped, plain, rtol=0, atol=1e-13)


def test_an_encoder_in_train_mode_has_the_mean_and_variance_of_torch():
    draws, rates = 6000, {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "num_hidden_layers": 2}
    theirs, ours = small_encoder("bert", **rates).train(), small_backbone("bert", **rates).train()
    ids = torch.tensor([[5, 17, 40, 8]]).expand(draws, -1)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
        states = ours(ids, mask, None)[0]
    assert states.std(0).min() > 0.05
    assert_same_distribution(states.flatten(1), expected.flatten(1))


# --- the prompt's


def test_prompt_masks_are_independent_over_sentences_layers_keys_heads_slots_and_channels():
    prompt = DeepPrompt(6, layers=4, heads=4, head_size=10, dropout=0.3).train()
    dropped = prompt.drop(torch.ones(4, 2, 1, 4, 6, 10), 50)
    assert dropped.shape == (4, 2, 50, 4, 6, 10)
    kept = dropped != 0
    for axis in range(6):
        assert_uncorrelated(kept.movedim(axis, 0).flatten(1)[:8], 0.3)


def test_the_prompt_is_shared_and_not_copied_when_nothing_is_dropped():
    prompt = DeepPrompt(6, layers=4, heads=4, head_size=10, dropout=0.3)
    shared = prompt()
    assert prompt.eval().drop(shared, 50) is shared
    assert prompt.train().drop(shared, 50) is not shared
    prompt.dropout = 0.0
    assert prompt.drop(shared, 50) is shared


def encoder_with_prompt_dropout(rate):
    encoder = (
        PromptEncoder(small_backbone("bert", **NO_DROPOUT), length=4, pooling="cls", dropout=rate).double().train()
    )
    with torch.no_grad():
        encoder.prompt.embedding.weight.normal_()
    return encoder


def equal_sentences(count):
    tokens = small_tokens([6])
    return Tokens(tokens.ids_NT.expand(count, -1), tokens.mask_NT.expand(count, -1))


@pytest.mark.parametrize("chunk_tokens", [None, 12])
def test_equal_sentences_see_different_prompt_masks(chunk_tokens):
    vectors, _ = encoder_with_prompt_dropout(0.3)(equal_sentences(6), chunk_tokens=chunk_tokens)
    assert all((a - b).abs().max() > 1e-3 for a, b in combinations(vectors, 2))
    same, _ = encoder_with_prompt_dropout(0.0)(equal_sentences(6), chunk_tokens=chunk_tokens)
    torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [None, 12])
def test_the_mlm_pass_sees_the_prompt_mask_of_the_first_pass(chunk_tokens):
    tokens = small_tokens([6, 3, 5, 6, 2])
    labels = torch.full_like(tokens.ids_NT, -100)
    labels[:, 0] = 7  # the first token is what the pooling reads, and the ids are left as they were
    tokens = Tokens(tokens.ids_NT, tokens.mask_NT, None, tokens.ids_NT, labels)
    vectors, hidden = encoder_with_prompt_dropout(0.5)(tokens, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(hidden, vectors, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("given", "expected"), [(None, 0.25), (0.0, 0.0), (0.4, 0.4)])
def test_the_default_prompt_dropout_is_the_hidden_dropout_of_the_encoder(given, expected):
    backbone = small_backbone("bert", hidden_dropout_prob=0.25)
    assert PromptEncoder(backbone, length=2, dropout=given).prompt.dropout == expected
