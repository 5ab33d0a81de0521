"""What every encoder family must satisfy with a prompt, on small random models: one test per property, over all families."""

import copy
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from support.encoders import (
    FAMILIES,
    SMALL,
    prompt_encoder,
    save_small_encoder,
    small_encoder,
    small_tokenizer,
    small_tokens,
    trained,
)
from torch.nn import functional as F

from promcse_pl import PromCSE
from promcse_pl.adapter import load_adapter, save_adapter
from promcse_pl.config import LossConfig
from promcse_pl.config.pooling import POOLINGS
from promcse_pl.data.batch import Tokens
from promcse_pl.losses.hybrid import hybrid_loss
from promcse_pl.models.backbone import SUPPORTED, UNLIMITED_INPUT, FrozenBackbone
from promcse_pl.models.cpu.layers import can_fuse
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.encoder_files import auto_class
from promcse_pl.models.families import FAMILIES as ROWS
from promcse_pl.utils.errors import ConfigError

LENGTHS = [9, 4, 12, 5, 9, 3]
ONLY_EAGER = {"mpnet", "deberta-v2"}
"""Families whose attention does not use transformers' attention interface. The others are compared with its `sdpa`."""
every_family = pytest.mark.parametrize("family", FAMILIES)


def batch_for(encoder: PromptEncoder, lengths: list[int] | None = None) -> Tokens:
    return small_tokens(lengths or LENGTHS, encoder.backbone.pad_id)


def states_of(encoder: PromptEncoder, ids_NT: torch.Tensor, mask_NT: torch.Tensor) -> torch.Tensor:
    (states,) = encoder.backbone(ids_NT, mask_NT, encoder.prompt(), position_offset=encoder.position_offset)
    return states


def loss_of(encoder: PromptEncoder, tokens: Tokens, **options: object) -> torch.Tensor:
    vectors, _ = encoder(tokens, train_head=True, **options)
    return hybrid_loss(*vectors.view(3, 2, -1), LossConfig(temperature=0.05, margin=0.2, hinge_weight=10.0)).total


def gradients_of(encoder: PromptEncoder, tokens: Tokens, **options: object) -> dict[str, torch.Tensor]:
    encoder.zero_grad()
    loss_of(encoder, tokens, **options).backward()
    return {name: parameter.grad.clone() for name, parameter in trained(encoder).items()}


def test_every_supported_family_is_tested_here():
    assert set(FAMILIES) == set(SUPPORTED)


# --- outputs


@every_family
def test_prompt_length_0_equals_the_encoder_of_transformers(family):
    encoder = prompt_encoder(family, length=0)
    config = small_encoder(family).config
    plain = auto_class(config).from_config(config, attn_implementation="eager" if family in ONLY_EAGER else "sdpa")
    plain.load_state_dict(small_encoder(family).state_dict())
    tokens = batch_for(encoder)
    expected = (
        plain.double()
        .eval()(input_ids=tokens.ids_NT, attention_mask=tokens.mask_NT, output_hidden_states=True)
        .hidden_states
    )
    states = encoder.backbone(tokens.ids_NT, tokens.mask_NT, encoder.prompt(), all_layers=True)
    real = tokens.mask_NT.bool()
    assert len(states) == len(expected) == SMALL["num_hidden_layers"] + 1
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-12)
    (last,) = encoder.backbone(tokens.ids_NT, tokens.mask_NT, None)
    assert torch.equal(last[real], states[-1][real])


@every_family
def test_keys_and_values_of_every_layer_change_the_embedding(family):
    encoder = prompt_encoder(family)
    tokens, before = batch_for(encoder), encoder.prompt.embedding.weight.detach().clone()
    plain, _ = encoder(tokens)
    slices_P2LD = encoder.prompt.embedding.weight.detach().view(4, 2 * SMALL["num_hidden_layers"], -1)
    for index in range(slices_P2LD.shape[1]):
        slices_P2LD[:, index] = 0
        moved, _ = encoder(tokens)
        assert (moved - plain).abs().max() > 1e-4, f"layer {index // 2}, {'KV'[index % 2]}"
        encoder.prompt.embedding.weight.data.copy_(before)


@pytest.mark.parametrize(
    "poolings",
    [
        pytest.param(("cls", "avg", "avg_first_last", "lasttoken"), id="some"),
        pytest.param(POOLINGS, id="all", marks=pytest.mark.exhaustive),
    ],
)
@every_family
def test_padding_batch_composition_and_order_do_not_change_an_embedding(family, poolings):
    for pooling in poolings:
        encoder = prompt_encoder(family, pooling=pooling, dtype=torch.float32)
        tokens = batch_for(encoder)
        together = F.normalize(encoder(tokens)[0])
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        reordered = F.normalize(encoder(tokens.select(order, tokens.mask_NT.shape[1]), chunk_tokens=20)[0])
        torch.testing.assert_close(reordered, together[order], rtol=0, atol=1e-6)
        for row, length in enumerate(LENGTHS):
            alone = F.normalize(encoder(tokens.select(torch.tensor([row]), length))[0])
            torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-6)


@every_family
def test_padding_in_front_does_not_change_hidden_states(family):
    encoder = prompt_encoder(family)
    tokens = batch_for(encoder)
    right = states_of(encoder, tokens.ids_NT, tokens.mask_NT)
    shifts = [tokens.mask_NT.shape[1] - length for length in LENGTHS]
    ids_NT, mask_NT = (
        torch.stack([row.roll(shift) for row, shift in zip(part, shifts, strict=True)])
        for part in (tokens.ids_NT, tokens.mask_NT)
    )
    left = states_of(encoder, ids_NT, mask_NT)
    torch.testing.assert_close(left[mask_NT.bool()], right[tokens.mask_NT.bool()], rtol=0, atol=1e-6)


@every_family
def test_the_longest_input_fits_and_longer_sentences_are_truncated_to_it(family):
    encoder = prompt_encoder(family, dtype=torch.float32)
    model = PromCSE(encoder, small_tokenizer(encoder.backbone.pad_id))
    longest = encoder.longest_input
    has_limit = encoder.backbone.family.has_limit
    assert has_limit or longest == UNLIMITED_INPUT
    words = [f"w{7 + number % 80}" for number in range(longest if has_limit else 300)]
    whole = model.encode(" ".join(words))
    assert (whole == model.encode(" ".join(words[:-2]))).all() == has_limit  # [CLS] and [SEP] are tokens, too
    assert not (whole == model.encode(" ".join(words[:-3]))).all()


@pytest.mark.parametrize("family", [family for family in FAMILIES if ROWS[family].positions == "none"])
def test_an_encoder_without_position_ids_refuses_a_position_offset(family):
    assert prompt_encoder(family).position_offset == 0
    with pytest.raises(ConfigError, match=rf"position_offset=3: {family} .*Try: prompt.position_offset=null"):
        prompt_encoder(family, position_offset=3)


# --- attention, one query at a time


class Slow(NamedTuple):
    """What the loop needs to know about the attention of a family: names of its modules, and how it computes scores."""

    attention: str
    query: str
    key: str
    value: str
    out: str | None = None
    scale: float | None = None
    base: float | None = None
    """Base of the rotary frequencies; None: no rotation."""
    bias: str | None = None
    """Embedding of the buckets of relative positions."""
    buckets: int = 32


ROTARY = ("layers.{}.self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
SLOW = {
    "bert": Slow("encoder.layer.{}.attention.self", "query", "key", "value"),
    "mpnet": Slow("encoder.layer.{}.attention.attn", "q", "k", "v", "o", bias="encoder.relative_attention_bias"),
    "t5": Slow(
        "encoder.block.{}.layer.0.SelfAttention",
        *("q", "k", "v", "o"),
        scale=1.0,
        bias="encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        buckets=8,
    ),
    "nomic_bert": Slow(*ROTARY, base=1000.0),
    "eurobert": Slow(*ROTARY, base=10000.0),  # with grouped key/value heads
}


def rotate(state_TNH: torch.Tensor, base: float, first: int) -> torch.Tensor:
    """Rotate the pairs (h, h + H / 2) of every token by its position, as complex numbers."""
    half = state_TNH.shape[-1] // 2
    pairs = torch.complex(state_TNH[..., :half], state_TNH[..., half:])
    for t in range(len(pairs)):
        for h in range(half):
            pairs[t, :, h] *= complex(math.cos(angle := (first + t) * base ** (-h / half)), math.sin(angle))
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def bucket(distance: int, buckets: int) -> int:
    """Return the bucket of a distance between two tokens, as in the papers on T5 and MPNet; the furthest is 128."""
    half, exact, far = buckets // 2, buckets // 4, abs(distance)
    if far >= exact:
        far = min(half - 1, exact + int(math.log(far / exact) / math.log(128 / exact) * (half - exact)))
    return far + half * (distance > 0)


def slow_attention(model, family, number, hidden_TD, prompt, first):
    """Attention of one layer on one sentence without padding, a query and a head at a time.

    Args:
        prompt: Keys and values (2, K, P, H) of the layer; they are neither rotated nor get a bias.
        first: Position of the first token.
    """
    slow = SLOW[family]
    module = model.get_submodule(slow.attention.format(number))
    query, key, value = (
        module.get_submodule(name)(hidden_TD).unflatten(-1, (-1, prompt.shape[-1])) for name in slow[1:4]
    )
    if slow.base is not None:
        query, key = rotate(query, slow.base, first), rotate(key, slow.base, first)
    groups, scale = query.shape[1] // key.shape[1], slow.scale or prompt.shape[-1] ** -0.5
    mixed_TNH = torch.zeros_like(query)
    for t, n in itertools.product(range(query.shape[0]), range(query.shape[1])):
        k = n // groups
        scores = [scale * query[t, n] @ slot_H for slot_H in prompt[0, k]]
        for other in range(len(key)):
            bias = 0.0
            if slow.bias is not None:
                bias = model.get_submodule(slow.bias).weight[bucket(other - t, slow.buckets), n]
            scores.append(scale * query[t, n] @ key[other, k] + bias)
        exponentials = [score.exp() for score in scores]
        for weight, slot_H in zip(exponentials, [*prompt[1, k], *value[:, k]], strict=True):
            mixed_TNH[t, n] += weight / sum(exponentials) * slot_H
    mixed_TD = mixed_TNH.flatten(1)
    return mixed_TD if slow.out is None else module.get_submodule(slow.out)(mixed_TD)


@pytest.mark.parametrize("family", SLOW)
@torch.no_grad()
def test_attention_equals_a_loop_over_prompt_slots_and_tokens(family):
    encoder = prompt_encoder(family, length=2)
    model, prompt_kv, seen = encoder.backbone.model, encoder.prompt(), {}
    tokens = batch_for(encoder, [7, 4])
    for number in range(encoder.backbone.layers):

        def remember(_module, inputs, options, output, number=number):
            seen[number] = inputs[0] if inputs else options["hidden_states"], output[0]

        model.get_submodule(SLOW[family].attention.format(number)).register_forward_hook(remember, with_kwargs=True)
    states_of(encoder, tokens.ids_NT, tokens.mask_NT)
    for number, (hidden_BTD, mixed_BTD) in seen.items():
        for row, length in enumerate([7, 4]):
            expected_TD = slow_attention(
                model, family, number, hidden_BTD[row, :length], prompt_kv[number, :, 0], encoder.position_offset
            )
            torch.testing.assert_close(mixed_BTD[row, :length], expected_TD, rtol=0, atol=1e-6)


# --- gradients


@every_family
def test_the_gradient_of_every_layers_prompt_is_the_slope_of_the_loss(family):
    encoder = prompt_encoder(family)
    tokens = batch_for(encoder)
    weight = encoder.prompt.embedding.weight
    gradient = gradients_of(encoder, tokens)["prompt.embedding.weight"]
    step = 1e-3  # some families compute norms in float32, so that a smaller step measures rounding errors
    for layer, part in enumerate(gradient.view(4, SMALL["num_hidden_layers"], -1).unbind(1)):
        assert part.norm() > 0, f"layer {layer}"
        way = torch.zeros_like(gradient)
        way.view(4, SMALL["num_hidden_layers"], -1)[:, layer] = part / part.norm()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(way, alpha=sign * step)
                losses.append(loss_of(encoder, tokens))
                weight.sub_(way, alpha=sign * step)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope.item() == pytest.approx(part.norm().item(), rel=1e-2), f"layer {layer}"


@every_family
def test_recomputing_changes_neither_loss_nor_gradients(family):
    encoder = prompt_encoder(family, head="mlp", dtype=torch.float32).train()
    tokens = batch_for(encoder)
    found = []
    for recompute in (False, True):
        torch.manual_seed(5)
        found.append(gradients_of(encoder, tokens, chunk_tokens=20, recompute=recompute))
    for name, gradient in found[0].items():
        assert gradient.norm() > 0
        assert torch.equal(gradient, found[1][name]), name


@every_family
def test_three_steps_reduce_the_loss_and_change_nothing_but_the_trained_part(family):
    encoder = prompt_encoder(family, dtype=torch.float32, head="mlp")
    backbone_before = {name: value.clone() for name, value in encoder.backbone.state_dict().items()}
    trained_before = {name: value.detach().clone() for name, value in trained(encoder).items()}
    tokens = batch_for(encoder)
    optimizer = torch.optim.AdamW(trained(encoder).values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(4):
        loss = loss_of(encoder, tokens)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[3] < losses[0]
    for name, value in trained(encoder).items():
        assert not torch.equal(value, trained_before[name]), name
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, backbone_before[name]), name
    assert all(not value.requires_grad and value.grad is None for value in encoder.backbone.parameters())


@every_family
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_half_precision_encoder_gives_nearly_the_same_embeddings_and_gradients(family, half):
    full = prompt_encoder(family, head="mlp", dtype=torch.float32)
    short = copy.deepcopy(full)
    short.backbone.to(half)
    tokens = batch_for(full)
    vectors = [encoder(tokens)[0] for encoder in (full, short)]
    assert short.backbone.dtype == half
    assert vectors[1].dtype == torch.float32
    assert F.cosine_similarity(*vectors).min() > 0.999
    expected, found = (gradients_of(encoder, tokens) for encoder in (full, short))
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.98, name


# --- fused CPU layers


@pytest.mark.parametrize("family", [family for family in FAMILIES if ROWS[family].fused])
@pytest.mark.parametrize("pooling", ["cls", "avg"])
def test_fused_layers_compute_the_embeddings_and_gradients_of_the_modules(family, pooling):
    encoder = prompt_encoder(family, pooling=pooling, head="mlp")
    for parameter in encoder.backbone.model.parameters():  # biases are 0 and norms 1 in a fresh encoder
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    tokens = batch_for(encoder)
    assert can_fuse(encoder.backbone.model, encoder.backbone.family.fused)
    found = []
    for fused in (True, False):
        encoder.backbone.use_fused_layers = fused
        found.append({"vectors": encoder(tokens)[0], **gradients_of(encoder, tokens)})
    for name, expected in found[1].items():
        assert expected.norm() > 0
        assert (found[0][name] - expected).norm() <= 1e-12 * expected.norm(), name


# --- files


@every_family
def test_a_saved_adapter_gives_the_same_embeddings(family, tmp_path):
    backbone = FrozenBackbone.load(save_small_encoder(tmp_path / "encoder", family))
    encoder = PromptEncoder(backbone, length=3, pooling="avg", projection_size=5, head="mlp").eval()
    save_adapter(encoder, tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter")
    sentences = ["w7 w8 w9", "w20", "w11 w7 w30 w31 w32"]
    assert (PromCSE(loaded).encode(sentences) == PromCSE(encoder).encode(sentences)).all()
    assert loaded.state_dict().keys() == encoder.state_dict().keys()
