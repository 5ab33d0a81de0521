"""Token masking and the MLM head."""

import math

import pytest
import torch
from support.encoders import save_small_encoder, small_backbone, small_encoder, small_tokens
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM

from promcse_pl.data.masking import IGNORED, mask_tokens
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.mlm import MlmHead

VOCABULARY, MASK = 1000, 4


def masked(ids, special, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return mask_tokens(ids, special, mask_id=MASK, vocabulary=VOCABULARY, generator=generator)


def many_tokens(seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (400, 250), generator=generator)
    return ids, torch.rand(ids.shape, generator=generator) < 0.2


def assert_rate(hits, trials, rate):
    sigma = math.sqrt(rate * (1 - rate) / trials)
    assert abs(hits / trials - rate) < 5 * sigma, f"{hits} of {trials}, expected {rate}"


def test_15_percent_of_the_ordinary_tokens_are_masked_and_no_special_token():
    ids, special = many_tokens()
    hidden_ids, labels = masked(ids, special)
    assert_rate(int((labels[~special] != IGNORED).sum()), int((~special).sum()), 0.15)
    assert (labels[special] == IGNORED).all()
    assert torch.equal(hidden_ids[special], ids[special])


def test_of_the_predicted_tokens_80_percent_are_masked_10_random_and_10_unchanged():
    ids, special = many_tokens()
    hidden_ids, labels = masked(ids, special)
    chosen = labels != IGNORED
    now, then = hidden_ids[chosen], ids[chosen]
    # a random token is the mask, or the true one, once in a vocabulary
    assert_rate(int((now == MASK).sum()), len(now), 0.8 + 0.1 / VOCABULARY)
    assert_rate(int((now == then).sum()), len(now), 0.1 + 0.1 / VOCABULARY)
    assert_rate(int(((now != MASK) & (now != then)).sum()), len(now), 0.1 * (1 - 2 / VOCABULARY))


def test_random_tokens_are_drawn_from_the_whole_vocabulary_evenly():
    ids = torch.full((1000, 400), 7)
    hidden_ids, labels = masked(ids, torch.zeros_like(ids, dtype=torch.bool))
    drawn = hidden_ids[(labels != IGNORED) & (hidden_ids != MASK) & (hidden_ids != 7)]
    tenths = torch.bincount(drawn * 10 // VOCABULARY, minlength=10)
    assert (drawn.min(), drawn.max()) == (0, VOCABULARY - 1)
    for count in tenths.tolist():
        assert_rate(count, len(drawn), 0.1)


def test_labels_are_the_original_ids_of_masked_tokens_and_other_tokens_are_unchanged():
    ids, special = many_tokens()
    before = ids.clone()
    hidden_ids, labels = masked(ids, special)
    chosen = labels != IGNORED
    assert torch.equal(ids, before)
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(hidden_ids[~chosen], ids[~chosen])


def test_the_generator_decides_everything_and_the_global_one_is_left_alone():
    ids, special = many_tokens()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, two, other = masked(ids, special, 5), masked(ids, special, 5), masked(ids, special, 6)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[1], other[1])


def test_masking_of_neighbouring_tokens_is_independent():
    ids = torch.full((400, 250), 7)
    chosen = masked(ids, torch.zeros_like(ids, dtype=torch.bool))[1] != IGNORED
    for pairs in (chosen[:, 1:] & chosen[:, :-1], chosen[1:] & chosen[:-1]):
        assert_rate(int(pairs.sum()), pairs.numel(), 0.15**2)


# --- the head


def masked_model(folder, family):
    """A masked language model of transformers with no parameter at its starting value, saved."""
    model = AutoModelForMaskedLM.from_config(small_encoder(family).config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_a_filled_head_guesses_as_the_masked_language_model_of_transformers(tmp_path, family):
    model = masked_model(tmp_path, family)
    backbone = FrozenBackbone.load(str(tmp_path)).eval()
    head = MlmHead(backbone.word_embeddings, layer_norm_eps=backbone.layer_norm_eps)
    assert backbone.fill_mlm_head(head)
    tokens = small_tokens([7, 3, 5], backbone.pad_id)
    (states,) = backbone(tokens.ids_NT, tokens.mask_NT, None)
    real = tokens.mask_NT.bool()
    expected = model(input_ids=tokens.ids_NT, attention_mask=tokens.mask_NT).logits[real]
    assert expected.std() > 0.1
    torch.testing.assert_close(head(states[real]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_files_without_an_mlm_head_keep_the_new_head(tmp_path, family):
    backbone = FrozenBackbone.load(str(save_small_encoder(tmp_path, family)))
    head = MlmHead(backbone.word_embeddings, layer_norm_eps=1e-12)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    assert not backbone.fill_mlm_head(head)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_a_model_in_memory_has_no_pretrained_mlm_head():
    backbone = small_backbone()
    assert not backbone.fill_mlm_head(MlmHead(backbone.word_embeddings, layer_norm_eps=1e-12))


def test_the_head_of_a_bfloat16_backbone_is_filled_in_float32(tmp_path):
    masked_model(tmp_path, "bert")
    backbone = FrozenBackbone.load(str(tmp_path), dtype=torch.bfloat16)
    head = MlmHead(backbone.word_embeddings.float(), layer_norm_eps=1e-12)
    assert backbone.fill_mlm_head(head)
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}


def test_the_decoder_starts_as_a_copy_of_the_embeddings_and_is_trained_apart():
    backbone = small_backbone()
    before = backbone.word_embeddings.clone()
    head = MlmHead(backbone.word_embeddings, layer_norm_eps=1e-12)
    assert torch.equal(head.decoder.weight, before)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    F.cross_entropy(head(torch.randn(5, 16)), torch.arange(5)).backward()
    optimizer.step()
    assert not torch.equal(head.decoder.weight, before)
    assert torch.equal(backbone.word_embeddings, before)
