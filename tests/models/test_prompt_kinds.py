"""Shared and input prompts: values and gradients against plain loops, chunks, padding, and training steps."""

import math

import pytest
import torch
from support.encoders import NO_DROPOUT, SMALL, prompt_encoder, small_backbone, small_tokens, trained

from promcse_pl.config import LossConfig
from promcse_pl.config.pooling import POOLINGS
from promcse_pl.data.batch import Tokens
from promcse_pl.losses.hybrid import hybrid_loss
from promcse_pl.models import hooks
from promcse_pl.models.cpu.layers import can_fuse
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.families import FAMILIES
from promcse_pl.training.machine import activation_bytes
from promcse_pl.utils.errors import ConfigError, EncoderError

LENGTHS = [9, 4, 12, 5, 9, 3]
P = 4
WITH_INPUT = [family for family, row in FAMILIES.items() if row.embeddings]
every_input_family = pytest.mark.parametrize("family", WITH_INPUT)
both_kinds = pytest.mark.parametrize("kind", ["shared", "input"])


def batch_for(encoder: PromptEncoder) -> Tokens:
    return small_tokens(LENGTHS, encoder.backbone.pad_id)


def loss_of(encoder: PromptEncoder, tokens: Tokens, **options: object) -> torch.Tensor:
    vectors, _ = encoder(tokens, train_head=True, **options)
    return hybrid_loss(*vectors.view(3, 2, -1), LossConfig(temperature=0.5, margin=0.2, hinge_weight=1.0)).total


def gradients_of(encoder: PromptEncoder, tokens: Tokens, **options: object) -> dict[str, torch.Tensor]:
    encoder.zero_grad()
    loss_of(encoder, tokens, **options).backward()
    return {name: parameter.grad.clone() for name, parameter in trained(encoder).items()}


def slow_states(encoder: PromptEncoder, tokens: Tokens) -> list[list[torch.Tensor]]:
    """Hidden states (T, D) of each sentence and layer of BERT, with the prompt vectors prepended to the embedded tokens.

    Sentences are computed one at a time without padding, a query and a head at a time.
    """
    bert, heads = encoder.backbone.model, SMALL["num_attention_heads"]
    size = SMALL["hidden_size"] // heads
    found = []
    for ids_T, mask_T in zip(tokens.ids_NT, tokens.mask_NT, strict=True):
        length = int(mask_T.sum())
        embeddings = bert.embeddings
        embedded = embeddings.word_embeddings.weight[ids_T[:length]] + embeddings.token_type_embeddings.weight[0]
        embedded = embeddings.LayerNorm(embedded + embeddings.position_embeddings.weight[:length])
        hidden_SD = torch.cat([encoder.prompt.embedding.weight, embedded])
        states = [hidden_SD[P:]]
        for layer in bert.encoder.layer:
            attention = layer.attention.self
            query, key, value = (part(hidden_SD) for part in (attention.query, attention.key, attention.value))
            mixed_SD = torch.zeros_like(hidden_SD)
            for n in range(heads):
                columns = slice(n * size, (n + 1) * size)
                for s in range(len(hidden_SD)):
                    scores = [float(query[s, columns] @ other[columns]) / math.sqrt(size) for other in key]
                    total = sum(map(math.exp, scores))
                    for score, other in zip(scores, value, strict=True):
                        mixed_SD[s, columns] += math.exp(score) / total * other[columns]
            between = layer.attention.output(mixed_SD, hidden_SD)
            hidden_SD = layer.output(layer.intermediate(between), between)
            states.append(hidden_SD[P:])
        found.append(states)
    return found


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "library"])
@torch.no_grad()
def test_an_input_prompt_equals_a_loop_with_its_vectors_in_front_of_the_embedded_tokens(fused):
    encoder = prompt_encoder(kind="input", length=P)
    encoder.backbone.use_fused_layers = fused
    tokens = small_tokens([5, 3])
    states = encoder.backbone(tokens.ids_NT, tokens.mask_NT, encoder.prompt(), all_layers=True)
    assert len(states) == SMALL["num_hidden_layers"] + 1
    for row, expected in enumerate(slow_states(encoder, tokens)):
        for state, wanted in zip(states, expected, strict=True):
            assert state.shape[1] == 5
            torch.testing.assert_close(state[row, : len(wanted)], wanted, rtol=0, atol=1e-12)


@every_input_family
def test_an_input_prompt_takes_no_positions_and_no_place_from_the_tokens(family):
    encoder = prompt_encoder(family, kind="input", length=P)
    assert encoder.position_offset == 0
    assert encoder.longest_input == prompt_encoder(family, length=0).longest_input
    assert prompt_encoder(family, kind="input", position_offset=3).position_offset == 3
    assert encoder.prompt.embedding.weight.shape == (P, encoder.backbone.word_embeddings.shape[1])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITH_INPUT])
def test_an_encoder_with_other_positions_refuses_an_input_prompt(family):
    backbone = small_backbone(family)
    with pytest.raises(ConfigError, match=rf"kind=input .*\({family}\) has relative.* Try: prompt\.kind=shared"):
        PromptEncoder(backbone, length=P, kind="input")
    PromptEncoder(backbone, length=P, kind="shared")


def test_an_encoder_that_ignores_the_vectors_is_refused(monkeypatch):
    def append_zeros(embeddings):
        def hook(_module, _inputs, embedded_BTE):
            vectors = hooks._input_prompt.get()
            return None if vectors is None else torch.cat([embedded_BTE, 0 * vectors.detach()], dim=1)

        embeddings.register_forward_hook(hook)

    monkeypatch.setattr("promcse_pl.models.backbone.register_input_prompt_hook", append_zeros)
    with pytest.raises(EncoderError, match="ignores vectors beside its input embeddings"):
        small_backbone()


@every_input_family
def test_fused_layers_and_a_first_token_alone_give_the_same_embeddings_and_gradients(family):
    encoder = prompt_encoder(family, kind="input", pooling="cls", head="low_rank")
    tokens = batch_for(encoder)
    fused = FAMILIES[family].fused
    assert not fused or can_fuse(encoder.backbone.model, fused)
    (states,) = encoder.backbone(tokens.ids_NT, tokens.mask_NT, encoder.prompt())
    whole = encoder.head(states[:, 0])
    found = {}
    for use_fused in (True, False):
        encoder.backbone.use_fused_layers = use_fused
        torch.testing.assert_close(encoder(tokens)[0], whole, rtol=0, atol=1e-12)
        (first,) = encoder.backbone(tokens.ids_NT, tokens.mask_NT, encoder.prompt(), first_token=True)
        assert first.shape[1] == (1 if FAMILIES[family].first_token or (use_fused and fused) else max(LENGTHS))
        found[use_fused] = gradients_of(encoder, tokens)
    for name, gradient in found[True].items():
        assert gradient.norm() > 0
        assert (gradient - found[False][name]).norm() <= 1e-12 * gradient.norm(), name


@every_input_family
def test_padding_batch_composition_and_order_do_not_change_an_embedding(family):
    for pooling in POOLINGS:
        encoder = prompt_encoder(family, kind="input", pooling=pooling)
        tokens = batch_for(encoder)
        together = encoder(tokens)[0]
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        reordered = encoder(tokens.select(order, tokens.mask_NT.shape[1]), chunk_tokens=20)[0]
        torch.testing.assert_close(reordered, together[order], rtol=0, atol=1e-6)
        shifts = [max(LENGTHS) - length for length in LENGTHS]
        left = Tokens(
            *(
                torch.stack([row.roll(shift) for row, shift in zip(part, shifts, strict=True)])
                for part in (tokens.ids_NT, tokens.mask_NT)
            )
        )
        torch.testing.assert_close(encoder(left)[0], together, rtol=0, atol=1e-6)


@both_kinds
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "library"])
def test_every_gradient_is_the_slope_of_the_loss(kind, fused):
    encoder = prompt_encoder(kind=kind, head="low_rank", head_rank=2)
    encoder.backbone.use_fused_layers = fused
    tokens = batch_for(encoder)
    for name, gradient in gradients_of(encoder, tokens).items():
        weight = trained(encoder)[name]
        for index in torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(0))[:6]:
            losses = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    weight.view(-1)[index] += step
                    losses.append(float(loss_of(encoder, tokens)))
                    weight.view(-1)[index] -= step
            slope = (losses[0] - losses[1]) / 2e-5
            assert slope == pytest.approx(float(gradient.view(-1)[index]), rel=1e-5, abs=1e-8), name


@both_kinds
def test_chunks_and_recomputing_change_neither_loss_nor_gradients(kind):
    encoder = prompt_encoder(kind=kind, head="low_rank", changes=NO_DROPOUT).train()
    tokens = batch_for(encoder)
    whole = gradients_of(encoder, tokens)
    for options in ({"chunk_tokens": 13}, {"chunk_tokens": 13, "recompute": True}):
        for name, gradient in gradients_of(encoder, tokens, **options).items():
            torch.testing.assert_close(gradient, whole[name], rtol=0, atol=1e-12)


@both_kinds
def test_recomputing_draws_the_same_dropout_masks(kind):
    encoder = prompt_encoder(kind=kind, dropout=0.3, dtype=torch.float32).train()
    tokens, found = batch_for(encoder), []
    for recompute in (False, True):
        torch.manual_seed(5)
        found.append(gradients_of(encoder, tokens, chunk_tokens=20, recompute=recompute)["prompt.embedding.weight"])
    assert torch.equal(*found)
    assert activation_bytes(encoder, 8) > 0


@pytest.mark.parametrize(
    ("kind", "shape"), [("deep", (3, 2, 5, 2, P, 8)), ("shared", (3, 2, 5, 2, P, 8)), ("input", (5, P, 16))]
)
def test_dropout_is_separate_for_every_sentence_and_layer(kind, shape):
    prompt = prompt_encoder(kind=kind, dropout=0.5).prompt.train()
    dropped = prompt.drop(prompt(), 5)
    assert tuple(dropped.shape) == shape
    kept = dropped != 0
    of_sentence = kept.unbind(prompt.sentence_dim)
    assert not any(torch.equal(of_sentence[0], other) for other in of_sentence[1:])
    if kind == "shared":
        assert not torch.equal(kept[0], kept[1])
    torch.testing.assert_close(dropped[kept], (2 * prompt().expand(shape))[kept])
    assert torch.equal(prompt.eval().drop(prompt(), 5), prompt())


@both_kinds
def test_three_training_steps_equal_those_of_a_plain_loop(kind):
    """A hand-written AdamW, on the gradients of one padded batch through transformers' modules."""
    encoder, plain = (prompt_encoder(kind=kind, head="low_rank") for _ in range(2))
    plain.backbone.use_fused_layers = False
    tokens, lr = batch_for(encoder), 1e-2
    optimizer = torch.optim.AdamW(trained(encoder).values(), lr=lr, weight_decay=0.0)
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in trained(plain).items()}
    for step in range(1, 4):
        optimizer.zero_grad()
        loss_of(encoder, tokens, chunk_tokens=20).backward()
        optimizer.step()
        for name, gradient in gradients_of(plain, tokens).items():
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.999).add_(0.001 * gradient.square())
            size = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            trained(plain)[name].data.sub_(lr * size)
    for name, weight in trained(encoder).items():
        torch.testing.assert_close(weight, trained(plain)[name], rtol=0, atol=1e-9)


@both_kinds
def test_a_bfloat16_encoder_gives_nearly_the_same_embeddings_and_gradients(kind):
    full, half = (prompt_encoder(kind=kind, dtype=torch.float32) for _ in range(2))
    half.backbone.to(torch.bfloat16)
    tokens = batch_for(full)
    assert torch.cosine_similarity(full(tokens)[0], half(tokens)[0]).min() > 0.999
    expected, found = (gradients_of(encoder, tokens)["prompt.embedding.weight"] for encoder in (full, half))
    assert found.dtype == torch.float32
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.98


def test_a_shared_prompt_trains_2_d_numbers_per_slot_and_an_input_prompt_one_vector():
    width = SMALL["hidden_size"]
    sizes = {kind: sum(p.numel() for p in trained(prompt_encoder(kind=kind)).values()) for kind in ("shared", "input")}
    assert sizes == {"shared": P * 2 * width, "input": P * width}


def test_the_mlm_pass_gets_the_input_prompt_and_keeps_the_order_of_the_labels():
    encoder = prompt_encoder(kind="input")
    tokens = batch_for(encoder)
    masked_NT = (torch.arange(max(LENGTHS)) % 3 == 1) & tokens.mask_NT.bool()
    tokens.mlm_ids_NT = tokens.ids_NT.masked_fill(masked_NT, 4)
    tokens.mlm_labels_NT = tokens.ids_NT.masked_fill(~masked_NT, -100)
    (states,) = encoder.backbone(tokens.mlm_ids_NT, tokens.mask_NT, encoder.prompt())
    torch.testing.assert_close(encoder(tokens, chunk_tokens=20)[1], states[masked_NT], rtol=0, atol=1e-12)
