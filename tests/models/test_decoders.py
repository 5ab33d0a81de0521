"""Decoders as encoders: causal and windowed attention against a slow loop, rotary positions, padding, what is refused."""

import json
import math

import pytest
import torch
from support.encoders import small_backbone, small_encoder, small_tokens
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM

from promcse_pl.models.attention import prompt_attention
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.encoder_files import read_config
from promcse_pl.models.families import decoders
from promcse_pl.utils.errors import EncoderError

CASES = {**{name: {} for name in decoders.FAMILIES}, "gemma3_text causal": {"use_bidirectional_attention": False}}
every_decoder = pytest.mark.parametrize("name", CASES)
P, LENGTHS = 3, [9, 4, 12]
LAYOUTS = {"one sentence": [12], "equal lengths": [12, 12], "padding": [12, 9, 12]}


def backbone_of(name: str, **changes: object) -> FrozenBackbone:
    return small_backbone(name.split()[0], **CASES[name], **changes).double().eval()


def prompt_for(backbone: FrozenBackbone, length: int = P) -> Tensor:
    shape = (backbone.layers, 2, 1, backbone.kv_heads, length, backbone.head_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def is_causal(name: str) -> bool:
    return name != "gemma3_text"


# --- attention


@every_decoder
@pytest.mark.parametrize("length", [None, 0, P])
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
@torch.no_grad()
def test_a_later_token_changes_an_earlier_one_only_without_causal_attention(name, length, lengths):
    backbone, tokens = backbone_of(name), small_tokens(lengths)
    prompt = None if length is None else prompt_for(backbone, length)
    (before,) = backbone(tokens.ids_NT, tokens.mask_NT, prompt)
    tokens.ids_NT[:, 7] = (tokens.ids_NT[:, 7] + 11) % 97
    (after,) = backbone(tokens.ids_NT, tokens.mask_NT, prompt)
    assert torch.equal(before[:, :7], after[:, :7]) == is_causal(name)
    assert (before[:, 7:9] - after[:, 7:9]).abs().amax(-1).gt(1e-6).all()


def slow_attention(lengths: list[int], prompt: Tensor, *, causal: bool):
    """Attention a query at a time: all prompt slots, and the tokens that the causal order and the window allow."""

    def attention(module, query, key, value, _mask, *, scaling, sliding_window=None, **_options):
        mixed = torch.zeros_like(query)
        groups = query.shape[1] // key.shape[1]
        for b, n, t in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
            k = n // groups
            keys, values = [*prompt[module.layer_idx, 0, 0, k]], [*prompt[module.layer_idx, 1, 0, k]]
            for s in range(lengths[b]):
                if (s <= t or not causal) and (sliding_window is None or abs(t - s) < sliding_window):
                    keys.append(key[b, k, s])
                    values.append(value[b, k, s])
            weights = [math.exp(float(query[b, n, t] @ key_H) * scaling) for key_H in keys]
            for weight, value_H in zip(weights, values, strict=True):
                mixed[b, n, t] += weight / sum(weights) * value_H
        return mixed.transpose(1, 2), None

    return attention


@every_decoder
@torch.no_grad()
def test_attention_with_a_prompt_equals_a_loop_over_queries(name):
    backbone, tokens = backbone_of(name), small_tokens(LENGTHS)
    prompt, family = prompt_for(backbone), name.split()[0]
    AttentionInterface.register("slow_test_loop", slow_attention(LENGTHS, prompt, causal=is_causal(name)))
    config = small_encoder(family, **CASES[name]).config
    plain = AutoModel.from_config(config, attn_implementation="slow_test_loop").double().eval()
    plain.load_state_dict(small_encoder(family, **CASES[name]).state_dict())
    expected = plain(input_ids=tokens.ids_NT, output_hidden_states=True, use_cache=False).hidden_states
    states = backbone(tokens.ids_NT, tokens.mask_NT, prompt, all_layers=True)
    real = tokens.mask_NT.bool()
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-11)


def test_the_small_decoders_have_a_window_narrower_than_a_sentence_and_grouped_heads():
    for name in CASES:
        backbone = backbone_of(name)
        assert backbone.kv_heads < backbone.heads
        windows = {getattr(backbone.model.config, "sliding_window", None)} - {None}
        assert all(window < max(LENGTHS) for window in windows)
    assert set(backbone_of("qwen2").model.config.layer_types) == {"full_attention", "sliding_attention"}
    assert set(backbone_of("gemma3_text").model.config.layer_types) == {"full_attention", "sliding_attention"}


@pytest.mark.parametrize("option", [{"softcap": 30.0}, {"s_aux": torch.ones(2)}, {"is_causal": True}], ids=str)
def test_an_argument_that_changes_scores_is_refused_by_the_attention_function(option):
    query = torch.randn(1, 2, 4, 8)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(EncoderError, match=r"passes (softcap|s_aux)|uses causal attention"):
        prompt_attention(torch.nn.Module(), query, query, query, mask, **option)


# --- positions


def rotated(prompt: Tensor, backbone: FrozenBackbone, positions: int) -> Tensor:
    """The prompt with its keys rotated by a number of positions, layer by layer."""
    rotary, config = backbone.model.rotary_emb, backbone.model.config
    moved = prompt.clone()
    for number, keys in enumerate(prompt[:, 0]):
        kind = (config.layer_types[number],) if config.model_type == "gemma3_text" else ()
        cos, sin = rotary(keys, torch.tensor([[positions]]), *kind)
        left, right = keys.chunk(2, dim=-1)
        moved[number, 0] = keys * cos + torch.cat([-right, left], dim=-1) * sin
    return moved


@every_decoder
@torch.no_grad()
def test_a_position_offset_equals_prompt_keys_rotated_back_and_does_nothing_without_a_prompt(name):
    backbone, tokens = backbone_of(name), small_tokens(LENGTHS)
    real, prompt = tokens.mask_NT.bool(), prompt_for(backbone)
    (shifted,) = backbone(tokens.ids_NT, tokens.mask_NT, prompt, position_offset=5)
    (same,) = backbone(tokens.ids_NT, tokens.mask_NT, rotated(prompt, backbone, -5))
    torch.testing.assert_close(shifted[real], same[real], rtol=0, atol=2e-5)  # transformers rotates in float32
    (unshifted,) = backbone(tokens.ids_NT, tokens.mask_NT, prompt)
    assert (shifted - unshifted)[real].abs().max() > 1e-2
    plain = [backbone(tokens.ids_NT, tokens.mask_NT, None, position_offset=offset)[0][real] for offset in (0, 5)]
    torch.testing.assert_close(*plain, rtol=0, atol=2e-5)


@every_decoder
@pytest.mark.parametrize("length", [0, P])
@torch.no_grad()
def test_padding_on_the_left_gives_the_states_of_padding_on_the_right(name, length):
    backbone, tokens = backbone_of(name), small_tokens(LENGTHS)
    prompt = prompt_for(backbone, length)
    (expected,) = backbone(tokens.ids_NT, tokens.mask_NT, prompt, position_offset=2)
    ids, mask = (
        torch.stack([row.roll(-count) for row, count in zip(part, LENGTHS, strict=True)])
        for part in (tokens.ids_NT, tokens.mask_NT)
    )
    assert not mask[1, 0]
    (states,) = backbone(ids, mask, prompt, position_offset=2)
    torch.testing.assert_close(states[mask.bool()], expected[tokens.mask_NT.bool()], rtol=0, atol=1e-12)


# --- memory, chunks


@every_decoder
def test_keys_and_values_are_not_cached(name):
    backbone, tokens, outputs = backbone_of(name), small_tokens(LENGTHS), []
    backbone.model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    backbone(tokens.ids_NT, tokens.mask_NT, None)
    assert outputs[0].get("past_key_values") is None


@every_decoder
@torch.no_grad()
def test_chunks_in_threads_equal_one_batch(name):
    backbone, tokens = backbone_of(name), small_tokens([12, 3, 5, 9, 9, 4, 12, 7])
    encoder = PromptEncoder(backbone, length=P, pooling="avg").double().eval()
    torch.testing.assert_close(encoder(tokens, chunk_tokens=13)[0], encoder(tokens)[0], rtol=0, atol=1e-12)
    assert encoder.prompt.dropout == 0.0


# --- files


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", decoders.FAMILIES)
@torch.no_grad()
def test_the_decoder_inside_a_causal_language_model_is_read(tmp_path, family, tied):
    model = AutoModelForCausalLM.from_config(small_encoder(family, tie_word_embeddings=tied).config).eval()
    model.save_pretrained(tmp_path)
    loaded = FrozenBackbone.load(str(tmp_path))
    expected = model.model.state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.model.state_dict().items())
    tokens = small_tokens(LENGTHS)  # frequencies of rotations and Gemma's scale are in no file
    states = model.model(input_ids=tokens.ids_NT, attention_mask=tokens.mask_NT).last_hidden_state
    real = tokens.mask_NT.bool()
    torch.testing.assert_close(loaded(tokens.ids_NT, tokens.mask_NT, None)[0][real], states[real], rtol=0, atol=1e-6)
    half = FrozenBackbone.load(str(tmp_path), dtype=torch.bfloat16)
    halved = half(tokens.ids_NT, tokens.mask_NT, None)[0]
    assert halved.dtype == torch.bfloat16
    similarity = torch.nn.functional.cosine_similarity(halved.float(), states, dim=-1)
    assert similarity[real].min() > 0.999


def test_the_window_of_gemma_survives_copies(tmp_path):
    first = small_backbone("gemma3_text")
    first.model.save_pretrained(tmp_path / "a")
    second = FrozenBackbone.load(str(tmp_path / "a"))
    second.model.save_pretrained(tmp_path / "b")
    third = FrozenBackbone.load(str(tmp_path / "b"))
    assert first.model.config.sliding_window == 5  # half of 9, both ends exclusive
    assert first.identity.config == second.identity.config == third.identity.config


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 2.0,
    "short_factor": [1.0] * 3,
    "long_factor": [2.0] * 3,
    "original_max_position_embeddings": 10,
}


ENCODERS = ("eurobert", "nomic_bert", "gte", "jina_embeddings_v3")


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("qwen3", {"rope_parameters": LONGROPE}, "rope_type=longrope"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}},
            "rope_type=longrope",
        ),
        *((family, {"rope_parameters": LONGROPE}, "rope_type=longrope") for family in ENCODERS),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": LONGROPE}},
            "rope_type=longrope",
        ),
        ("qwen2", {"is_causal": False}, "is_causal=false"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50\.0"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_with_its_reason(tmp_path, family, changes, reason):
    small_encoder(family).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(EncoderError, match=rf"an encoder: config\.json has {reason}, w"):
        read_config(tmp_path, "an encoder")


@pytest.mark.parametrize("rope_type", ["dynamic", "linear", "llama3", "yarn"])
def test_embeddings_with_a_scaled_rotation_do_not_depend_on_the_batch(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 10}
    factors = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope_type == "llama3" else {}
    backbone = backbone_of("llama", rope_parameters={**rope, **factors})
    decoders.FAMILIES["llama"].require_supported(backbone.model.config)
    tokens, prompt = small_tokens([4, 40]), prompt_for(backbone)
    (together,) = backbone(tokens.ids_NT, tokens.mask_NT, prompt)
    (alone,) = backbone(tokens.ids_NT[:1, :4], tokens.mask_NT[:1, :4], prompt)
    torch.testing.assert_close(together[:1, :4], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "advice"),
    [("gemma3", "model.path=google/embeddinggemma-300m"), ("deberta", "model.path=microsoft/deberta")],
)
def test_relatives_are_refused_with_an_encoder_to_use_instead(tmp_path, family, advice):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match=rf"has model_type '{family}', which is not supported: .* Try: .*{advice}"):
        read_config(tmp_path, "encoder")
