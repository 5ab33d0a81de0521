"""If only the first token is pooled, the last layer computes no other token after its attention, with equal results."""

import pytest
import torch
from support.encoders import FAMILIES, small_backbone, small_tokens

from promcse_pl.data.masking import IGNORED
from promcse_pl.models.encoder import PromptEncoder

LENGTHS = [9, 4, 12, 5, 9, 3]


def states_of(encoder, tokens, prompt_kv, **which):
    states = encoder.backbone(
        tokens.ids_NT, tokens.mask_NT, prompt_kv, position_offset=encoder.position_offset, **which
    )
    return states[-1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["cls", "cls_before_pooler"])
def test_vectors_and_every_gradient_are_those_of_the_whole_layer(family, pooling):
    encoder = PromptEncoder(small_backbone(family), length=4, pooling=pooling, head="mlp").double().eval()
    tokens = small_tokens(LENGTHS, encoder.backbone.pad_id)
    weights_ND = torch.randn(len(LENGTHS), encoder.backbone.width, dtype=torch.float64)

    whole = encoder.head(states_of(encoder, tokens, encoder.prompt())[:, 0])
    expected = torch.autograd.grad((whole * weights_ND).sum(), list(encoder.prompt.parameters()))
    vectors, _ = encoder(tokens, train_head=True, chunk_tokens=20)
    found = torch.autograd.grad((vectors * weights_ND).sum(), list(encoder.prompt.parameters()))

    torch.testing.assert_close(vectors, whole, rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_computes_the_first_token_alone(family):
    encoder = PromptEncoder(small_backbone(family), length=4).eval()
    tokens = small_tokens(LENGTHS, encoder.backbone.pad_id)
    with torch.inference_mode():
        state = states_of(encoder, tokens, encoder.prompt(), first_token=True)
        after = states_of(encoder, tokens, encoder.prompt())
        encoder.backbone.use_fused_layers = False  # as on a GPU
        library = states_of(encoder, tokens, encoder.prompt(), first_token=True)
    has_hook = encoder.backbone.family.first_token is not None
    assert library.shape[1] == (1 if has_hook else max(LENGTHS))
    assert state.shape[1] == (1 if has_hook or encoder.backbone.family.fused else max(LENGTHS))
    assert after.shape[1] == max(LENGTHS)  # nothing is left switched on


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mlm_pass_keeps_every_token(family):
    encoder = PromptEncoder(small_backbone(family), length=4, pooling="cls").double().eval()
    tokens = small_tokens(LENGTHS, encoder.backbone.pad_id)
    last_NT = torch.arange(max(LENGTHS)) == tokens.mask_NT.sum(1, keepdim=True) - 1
    tokens.mlm_ids_NT = tokens.ids_NT.masked_fill(last_NT, 4)
    tokens.mlm_labels_NT = tokens.ids_NT.masked_fill(~last_NT, IGNORED)
    with torch.inference_mode():
        _, hidden = encoder(tokens, chunk_tokens=20)
        tokens.ids_NT = tokens.mlm_ids_NT
        whole = states_of(encoder, tokens, encoder.prompt())[last_NT]
    torch.testing.assert_close(hidden, whole, rtol=1e-12, atol=1e-14)


def test_an_int8_encoder_computes_only_the_first_token():
    encoder = PromptEncoder(small_backbone("bert"), length=4, pooling="cls").eval()
    tokens = small_tokens(LENGTHS, encoder.backbone.pad_id)
    encoder.backbone.quantize()
    with torch.inference_mode():
        state = states_of(encoder, tokens, encoder.prompt(), first_token=True)
    assert state.shape[1] == 1
