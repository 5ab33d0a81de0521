"""The layers written out give the numbers of transformers' own, and those gradients."""

import copy
from contextlib import contextmanager

import pytest
import torch
from conftest import NO_DROPOUT, small_backbone, small_tokens

from promcse_pl.model.dropout import seeded_dropout
from promcse_pl.model.encoder import PromptEncoder

FAMILIES = ["bert", "roberta", "xlm-roberta"]
LENGTHS = {"padded": [9, 4, 12, 5, 9, 3], "equal": [7, 7, 7, 7]}
every_family = pytest.mark.parametrize("family", FAMILIES)
all_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


@contextmanager
def layers_of_transformers(encoder):
    kept, encoder.backbone._layers = encoder.backbone._layers, []
    try:
        yield
    finally:
        encoder.backbone._layers = kept


def prompt_encoder(family="bert", *, length=4, pooling="avg", dropout=None, **changes) -> PromptEncoder:
    encoder = PromptEncoder(
        small_backbone(family, **changes), length=length, pooling=pooling, dropout=dropout, projection_size=6
    )
    assert encoder.backbone._layers
    return encoder


def vectors_and_gradients(encoder, tokens, seed=None):
    parameters = list(encoder.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    encoder.zero_grad()
    with seeded_dropout(seed, torch.device("cpu")):
        (vectors,) = encoder.encode_chunk(tokens, encoder.prompt())
    weights_ND = torch.linspace(-1, 1, vectors.numel(), dtype=vectors.dtype).view_as(vectors)
    (vectors * weights_ND).sum().backward()
    assert all(parameter.grad is None for parameter in parameters if not parameter.requires_grad)
    return vectors.detach(), [parameter.grad.clone() for parameter in trained]


def assert_equal(found, expected, bound):
    assert (found[0] - expected[0]).norm() <= bound * expected[0].norm()
    assert len(found[1]) == len(expected[1]) == 5
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= bound * theirs.norm()


@every_family
@all_lengths
@pytest.mark.parametrize("pooling", ["cls", "avg", "avg_top2", "avg_first_last"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_vectors_and_every_gradient_are_those_of_transformers(family, lengths, pooling, dtype, bound):
    encoder = prompt_encoder(family, pooling=pooling).to(dtype).eval()
    tokens = small_tokens(lengths, encoder.backbone.pad_id)
    found = vectors_and_gradients(encoder, tokens)
    with layers_of_transformers(encoder):
        assert_equal(found, vectors_and_gradients(encoder, tokens), bound)
    with torch.inference_mode():  # another path: fused attention, nothing kept
        (vectors,) = encoder.encode_chunk(tokens, encoder.prompt())
    torch.testing.assert_close(vectors, found[0], rtol=0, atol=bound)


@every_family
@pytest.mark.parametrize("prompt_dropout", [0.0, 0.1])
def test_with_the_same_masks_vectors_and_every_gradient_are_those_of_transformers(family, prompt_dropout):
    encoder = prompt_encoder(family, dropout=prompt_dropout, attention_probs_dropout_prob=0.3).double().train()
    tokens = small_tokens(LENGTHS["equal"], encoder.backbone.pad_id)  # without padding both draw alike
    found = vectors_and_gradients(encoder, tokens, seed=3)
    other = vectors_and_gradients(encoder, tokens, seed=4)
    with layers_of_transformers(encoder):
        assert_equal(found, vectors_and_gradients(encoder, tokens, seed=3), 1e-12)
    assert (found[0] - other[0]).norm() > 0.1 * found[0].norm()


@all_lengths
@pytest.mark.parametrize("pooling", ["cls", "avg"])
def test_with_dropout_the_gradient_is_the_slope_of_the_loss(lengths, pooling):
    encoder = prompt_encoder(pooling=pooling, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    encoder.double().train()
    tokens = small_tokens(lengths)
    _, gradients = vectors_and_gradients(encoder, tokens, seed=3)
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(5)
    for parameter, gradient in zip(trained, gradients, strict=True):
        way = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(way, alpha=step)
            vectors, _ = vectors_and_gradients(encoder, tokens, seed=3)
            weights_ND = torch.linspace(-1, 1, vectors.numel(), dtype=torch.float64).view_as(vectors)
            losses.append(float((vectors * weights_ND).sum()))
            with torch.no_grad():
                parameter.sub_(way, alpha=step)
        slope = (losses[0] - losses[1]) / 2e-5
        assert slope == pytest.approx(float((gradient * way).sum()), rel=1e-6)


def test_without_a_prompt_the_states_are_those_of_transformers():
    backbone = small_backbone(**NO_DROPOUT).double()
    tokens = small_tokens(LENGTHS["padded"])
    real_NT = tokens.mask_NT.bool()
    whole = backbone.model(tokens.ids_NT, attention_mask=tokens.mask_NT, output_hidden_states=True).hidden_states
    states = backbone(tokens.ids_NT, tokens.mask_NT, None, all_layers=True)
    for ours, theirs in zip(states, whole, strict=True):
        torch.testing.assert_close(ours[real_NT], theirs[real_NT], rtol=0, atol=1e-12)
    assert not states[-1][~real_NT].any()


@every_family
def test_bfloat16_is_as_near_to_float32_as_transformers_is(family):
    exact = prompt_encoder(family).eval()
    rounded = copy.deepcopy(exact)
    rounded.backbone.bfloat16()
    tokens = small_tokens(LENGTHS["padded"], exact.backbone.pad_id)
    expected, gradients = vectors_and_gradients(exact, tokens)
    ours = vectors_and_gradients(rounded, tokens)
    with layers_of_transformers(rounded):
        theirs = vectors_and_gradients(rounded, tokens)
    for number, whole in enumerate([expected, *gradients]):
        error, other = ((([found[0], *found[1]][number] - whole).norm() / whole.norm()) for found in (ours, theirs))
        assert error <= max(1.5 * other, 0.004)


def test_joined_weights_are_the_model_s_own_and_follow_it():
    backbone = small_backbone()
    for converted in (backbone, backbone.double(), backbone.bfloat16()):
        for layer, module in zip(converted._layers, converted.model.encoder.layer, strict=True):
            own = module.attention.self
            assert layer.module is module
            for name, joined in zip(("weight", "bias"), layer.qkv, strict=True):
                parts = [getattr(part, name) for part in (own.query, own.key, own.value)]
                assert joined.dtype == converted.dtype
                assert [part.data_ptr() for part in parts] == [part.data_ptr() for part in joined.chunk(3)]


@pytest.mark.parametrize(
    ("family", "changes"),
    [("electra", {}), ("modernbert", {}), ("bert", {"hidden_act": "relu"})],
    ids=["electra", "modernbert", "relu"],
)
def test_other_layers_are_left_to_transformers(family, changes):
    assert not small_backbone(family, **changes)._layers


def test_int8_layers_are_left_to_transformers():
    backbone = small_backbone()
    assert backbone._layers
    backbone.quantize()
    assert not backbone._layers
