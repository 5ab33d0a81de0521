"""DeBERTa-v2 and v3: every kind of disentangled attention equals that of transformers, and prompt slots have content scores."""

import math

import pytest
import torch
from support.encoders import small_backbone, small_encoder, small_tokens
from transformers import AutoModel

from promcse_pl.models.backbone import FrozenBackbone

LENGTHS, P = [9, 4, 12], 3
KINDS = {
    "v3": {},
    "c2p": {"pos_att_type": ["c2p"]},
    "p2c": {"pos_att_type": "p2c"},
    "content only": {"pos_att_type": []},
    "own projections": {"share_att_key": False},
    "no buckets": {"position_buckets": -1, "max_relative_positions": 6},
    "absolute positions": {"position_biased_input": True},
    "absolute positions only": {"position_biased_input": True, "relative_attention": False, "pos_att_type": None},
    "v2-xlarge": {"conv_kernel_size": 3, "conv_act": "gelu", "attention_head_size": 8},
    "token types": {"type_vocab_size": 2, "embedding_size": 12, "norm_rel_ebd": "none"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def backbone_of(kind: str) -> FrozenBackbone:
    return small_backbone("deberta-v2", **KINDS[kind]).double().eval()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@torch.no_grad()
def test_prompt_length_0_equals_the_encoder_of_transformers(kind, dtype):
    backbone, tokens = backbone_of(kind).to(dtype), small_tokens(LENGTHS)
    plain = AutoModel.from_config(small_encoder("deberta-v2", **KINDS[kind]).config).to(dtype).eval()
    plain.load_state_dict(small_encoder("deberta-v2", **KINDS[kind]).state_dict())
    expected = plain(input_ids=tokens.ids_NT, attention_mask=tokens.mask_NT, output_hidden_states=True).hidden_states
    prompt = torch.zeros(backbone.layers, 2, 1, backbone.kv_heads, 0, backbone.head_size)
    real = tokens.mask_NT.bool()
    for given in (prompt, None):
        states = backbone(tokens.ids_NT, tokens.mask_NT, given, all_layers=True)
        for ours, theirs in zip(states, expected, strict=True):
            atol = 1e-6 * theirs.abs().max().item() if dtype == torch.float32 else 1e-12
            torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["v3", "own projections", "content only", "absolute positions only"])
@torch.no_grad()
def test_attention_with_a_prompt_equals_a_loop_with_relative_scores_for_tokens_alone(kind):
    backbone, tokens = backbone_of(kind), small_tokens(LENGTHS)
    generator = torch.Generator().manual_seed(7)
    shape = (backbone.layers, 2, 1, backbone.kv_heads, P, backbone.head_size)
    prompt = torch.randn(shape, generator=generator, dtype=torch.float64)
    attention = backbone.model.encoder.layer[1].attention.self
    inputs = {}

    def record(_module, given, options, output):
        inputs.update(options, hidden_states=given[0], attention_mask=given[1], output=output[0])

    attention.register_forward_hook(record, with_kwargs=True)
    backbone(tokens.ids_NT, tokens.mask_NT, prompt)
    states, heads = inputs["hidden_states"], backbone.heads
    query, key, value = (
        attention.transpose_for_scores(projection(states), heads)
        for projection in (attention.query_proj, attention.key_proj, attention.value_proj)
    )
    kinds = attention.pos_att_type
    bias = torch.zeros(len(query), query.shape[1], query.shape[1])
    if attention.relative_attention and kinds:
        bias = attention.disentangled_attention_bias(
            query, key, inputs["relative_pos"], inputs["rel_embeddings"], 1 + len(kinds)
        )
    scale = math.sqrt(backbone.head_size * (1 + len(kinds)))
    for row, length in enumerate(LENGTHS):
        for head in range(heads):
            index, columns = row * heads + head, slice(head * 8, head * 8 + 8)
            for t in range(length):
                scores = [float(query[index, t] @ slot) / scale for slot in prompt[1, 0, 0, head]]
                scores += [
                    float(query[index, t] @ key[index, s]) / scale + float(bias[index, t, s]) for s in range(length)
                ]
                weights = torch.tensor([math.exp(score) for score in scores], dtype=torch.float64)
                values = torch.cat([prompt[1, 1, 0, head], value[index, :length]])
                expected = (weights / weights.sum()) @ values
                torch.testing.assert_close(inputs["output"][row, t, columns], expected, rtol=0, atol=1e-6)


@every_kind
@torch.no_grad()
def test_padding_changes_no_state(kind):
    backbone, tokens = backbone_of(kind), small_tokens(LENGTHS)
    prompt = torch.randn(backbone.layers, 2, 1, backbone.kv_heads, P, backbone.head_size, dtype=torch.float64)
    (together,) = backbone(tokens.ids_NT, tokens.mask_NT, prompt, position_offset=2)
    for row, length in enumerate(LENGTHS):
        ids, mask = tokens.ids_NT[row : row + 1, :length], tokens.mask_NT[row : row + 1, :length]
        (alone,) = backbone(ids, mask, prompt, position_offset=2)
        torch.testing.assert_close(together[row, :length], alone[0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_float16_without_a_prompt_stays_finite_with_padding():
    backbone, tokens = backbone_of("v3").to(torch.float16), small_tokens(LENGTHS)
    assert backbone(tokens.ids_NT, tokens.mask_NT, None)[0].isfinite().all()


def test_names_of_weights_and_the_random_state_do_not_change():
    model = small_encoder("deberta-v2")
    names, before = list(model.state_dict()), torch.get_rng_state()
    backbone = FrozenBackbone(model, small_backbone("deberta-v2").identity)
    assert list(backbone.model.state_dict()) == names
    assert torch.equal(torch.get_rng_state(), before)
