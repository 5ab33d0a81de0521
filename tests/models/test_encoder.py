"""The prompt encoder on small encoders of every supported family: plain loops, chunks, training, what is frozen and saved."""

import math

import pytest
import torch
from support.encoders import NO_DROPOUT, SMALL, prompt_encoder, small_backbone, small_tokens, trained

from promcse_pl.config import LossConfig
from promcse_pl.config.pooling import POOLINGS
from promcse_pl.data.batch import Tokens
from promcse_pl.data.masking import IGNORED
from promcse_pl.losses.hybrid import hybrid_loss
from promcse_pl.models.backbone import SUPPORTED
from promcse_pl.models.cpu.chunks import padded_tokens, plan_chunks
from promcse_pl.models.encoder import HEADS, PromptEncoder

every_family = pytest.mark.parametrize("family", SUPPORTED)
LENGTHS = [9, 4, 12, 5, 9, 3]
KINDS = {"deep": {}, "projected": {"projection_size": 7}, "shared": {"kind": "shared"}}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def batch_for(encoder, lengths=None) -> Tokens:
    return small_tokens(lengths or LENGTHS, encoder.backbone.pad_id)


def with_mlm(tokens: Tokens, pad_id: int) -> Tokens:
    """A third of the real tokens masked, at least one in the first sentence and none in the second."""
    chance = torch.rand(tokens.ids_NT.shape, generator=torch.Generator().manual_seed(4))
    hidden_NT = (chance < 1 / 3) & tokens.mask_NT.bool()
    hidden_NT[0, 0], hidden_NT[1] = True, False
    masked = tokens.ids_NT.masked_fill(hidden_NT, 4)
    return Tokens(tokens.ids_NT, tokens.mask_NT, None, masked, tokens.ids_NT.masked_fill(~hidden_NT, IGNORED))


# --- the prompt


@every_family
@every_kind
def test_the_prompt_moves_the_vectors(family, kind):
    encoder = prompt_encoder(family, **kind)
    tokens = batch_for(encoder)
    before, _ = encoder(tokens)
    with torch.no_grad():
        encoder.prompt.embedding.weight += 0.1
    after, _ = encoder(tokens)
    assert (before - after).abs().max() > 1e-3


def slow_attention(attention, hidden_BTD, mask_BT, key_NPH, value_NPH):
    """Attention of one BERT layer, a query at a time, with the prompt's keys and values in front of the real tokens'."""
    heads, size = key_NPH.shape[0], key_NPH.shape[2]
    mixed_BTD = torch.zeros_like(hidden_BTD)
    for b, hidden_TD in enumerate(hidden_BTD):
        projected = [
            hidden_TD @ linear.weight.T + linear.bias for linear in (attention.query, attention.key, attention.value)
        ]
        for n in range(heads):
            columns = slice(n * size, (n + 1) * size)
            query_TH, key_TH, value_TH = (part[:, columns] for part in projected)
            real = [t for t in range(len(hidden_TD)) if mask_BT[b, t]]
            keys = [*key_NPH[n], *(key_TH[t] for t in real)]
            values = [*value_NPH[n], *(value_TH[t] for t in real)]
            for t, query_H in enumerate(query_TH):
                weights = [math.exp(float(query_H @ key_H) / math.sqrt(size)) for key_H in keys]
                total = sum(weights)
                for weight, value_H in zip(weights, values, strict=True):
                    mixed_BTD[b, t, columns] += weight / total * value_H
    return mixed_BTD


@every_kind
@torch.no_grad()
def test_a_prompted_bert_equals_a_loop_with_the_prompt_in_front_of_keys_and_values(kind):
    length, heads = 3, SMALL["num_attention_heads"]
    encoder = prompt_encoder(length=length, **kind)
    tokens = batch_for(encoder, [5, 3])
    flat = encoder.prompt.embedding.weight
    if "projection_size" in kind:
        first, _, second = encoder.prompt.trans
        flat = torch.tanh(flat @ first.weight.T + first.bias) @ second.weight.T + second.bias
    bert = encoder.backbone.model
    hidden = bert.embeddings.word_embeddings.weight[tokens.ids_NT]
    hidden = hidden + bert.embeddings.token_type_embeddings.weight[0]
    hidden = bert.embeddings.LayerNorm(hidden + bert.embeddings.position_embeddings.weight[length : length + 5])
    states = [hidden]
    for number, layer in enumerate(bert.encoder.layer):
        width = SMALL["hidden_size"]
        start = 0 if kind == KINDS["shared"] else 2 * number * width  # the official order: K0, V0, K1, V1, ...
        key_PD, value_PD = flat[:, start : start + width], flat[:, start + width : start + 2 * width]
        key_NPH, value_NPH = (part.view(length, heads, -1).transpose(0, 1) for part in (key_PD, value_PD))
        mixed = slow_attention(layer.attention.self, hidden, tokens.mask_NT, key_NPH, value_NPH)
        hidden = layer.attention.output(mixed, hidden)
        hidden = layer.output(layer.intermediate(hidden), hidden)
        states.append(hidden)
    ours = encoder.backbone(tokens.ids_NT, tokens.mask_NT, encoder.prompt(), position_offset=length, all_layers=True)
    real_NT = tokens.mask_NT.bool()
    for state, expected in zip(ours, states, strict=True):
        torch.testing.assert_close(state[real_NT], expected[real_NT], rtol=0, atol=1e-12)


# --- positions


@pytest.mark.parametrize("family", ["bert", "electra", "modernbert"])
def test_positions_start_at_the_offset(family):
    tokens = small_tokens([4, 2])
    positions = small_backbone(family).positions(tokens.ids_NT, tokens.mask_NT, 7)
    assert [row[real].tolist() for row, real in zip(positions, tokens.mask_NT.bool(), strict=True)] == [
        [7, 8, 9, 10],
        [7, 8],
    ]


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta"])
def test_roberta_positions_start_at_the_offset_plus_2_and_pads_keep_the_padding_number(family):
    tokens = small_tokens([4, 2], pad_id=1)
    assert small_backbone(family).positions(tokens.ids_NT, tokens.mask_NT, 7).tolist() == [
        [9, 10, 11, 12],
        [9, 10, 1, 1],
    ]


@pytest.mark.parametrize(("family", "first"), [("bert", 4), ("electra", 4), ("roberta", 6), ("xlm-roberta", 6)])
@pytest.mark.parametrize("offset", [None, 0, 3])
def test_the_encoder_reads_only_the_position_vectors_behind_the_offset(family, first, offset):
    encoder = prompt_encoder(family, length=4, position_offset=offset)
    first = first if offset is None else first - 4 + offset
    tokens = batch_for(encoder, [5, 5])
    matrix = encoder.backbone.model.embeddings.position_embeddings.weight.data
    before, _ = encoder(tokens)
    for index in range(first + 7):
        kept = matrix[index].clone()
        matrix[index] += torch.linspace(-1, 1, len(kept))
        moved, _ = encoder(tokens)
        matrix[index] = kept
        assert torch.equal(moved, before) == (index not in range(first, first + 5)), f"position {index}"


@pytest.mark.parametrize(("family", "longest"), [("bert", 36), ("electra", 36), ("roberta", 34), ("xlm-roberta", 34)])
def test_the_longest_input_fits_and_one_more_token_does_not(family, longest):
    encoder = prompt_encoder(family, length=4)
    assert encoder.longest_input == longest
    encoder(batch_for(encoder, [longest]))
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        encoder(batch_for(encoder, [longest + 1]))


# --- state


@pytest.mark.parametrize("kind", [*KINDS.values(), {"kind": "input"}], ids=[*KINDS, "input"])
def test_the_state_holds_the_trained_part_alone_and_round_trips(kind):
    encoder = prompt_encoder(head="mlp", **kind)
    state = encoder.state_dict()
    assert state.keys() == trained(encoder).keys()
    assert not any("backbone" in name for name in torch.nn.ModuleDict({"inner": encoder}).state_dict())
    other = PromptEncoder(encoder.backbone, length=4, pooling="avg", head="mlp", **kind)
    other = other.double().eval()
    tokens = batch_for(encoder)
    assert not torch.equal(other(tokens)[0], encoder(tokens)[0])
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(tokens)[0], encoder(tokens)[0])


@pytest.mark.parametrize("change", ["missing", "unknown", "backbone"])
def test_a_state_with_other_names_is_refused(change):
    encoder = prompt_encoder(head="mlp")
    state = encoder.state_dict()
    if change == "missing":
        del state["head.dense.bias"]
    else:
        state["backbone.model.more" if change == "backbone" else "more"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"head\.dense\.bias" if change == "missing" else "more"):
        encoder.load_state_dict(state, strict=True)


def test_train_mode_never_thaws_the_backbone():
    encoder = prompt_encoder().train()
    encoder(batch_for(encoder))[0].sum().backward()
    assert not any(parameter.requires_grad for parameter in encoder.backbone.parameters())
    assert all(parameter.grad is None for parameter in encoder.backbone.parameters())


@pytest.mark.parametrize("length", [0, 4])
def test_padding_far_from_every_token_stays_finite_with_attention_dropout(length):
    # ModernBERT's window holds no real token for a far padding position: without a prompt that row sees nothing at all
    encoder = prompt_encoder("modernbert", length=length, changes={"attention_dropout": 0.1}).train()
    assert torch.isfinite(encoder(batch_for(encoder, [20, 3]))[0]).all()


# --- heads


def test_the_head_is_a_linear_layer_and_tanh_on_the_pooled_vector():
    encoder = prompt_encoder(head="mlp")
    tokens = batch_for(encoder)
    (states,) = encoder.backbone(tokens.ids_NT, tokens.mask_NT, encoder.prompt(), position_offset=4)
    pooled = torch.stack([state[:length].mean(0) for state, length in zip(states, LENGTHS, strict=True)])
    expected = torch.tanh(pooled @ encoder.head.dense.weight.T + encoder.head.dense.bias)
    torch.testing.assert_close(encoder(tokens)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_the_test_time_vector_leaves_out_a_head_for_training_only(head):
    encoder = prompt_encoder(head=head)
    tokens = batch_for(encoder)
    same = torch.equal(encoder(tokens, train_head=True)[0], encoder(tokens)[0])
    assert same == (head != "mlp_train_only")
    if not encoder.has_test_head:
        assert torch.equal(encoder(tokens)[0], prompt_encoder(head="none")(tokens)[0])


def test_a_low_rank_head_starts_as_the_identity_and_adds_a_low_rank_product():
    torch.manual_seed(0)
    encoder = PromptEncoder(small_backbone(), length=0, head="low_rank", head_rank=3, pooling="avg").double().eval()
    plain = PromptEncoder(encoder.backbone, length=0, pooling="avg").double().eval()
    tokens = batch_for(encoder)
    assert torch.equal(encoder(tokens)[0], plain(tokens)[0])
    up, down = encoder.head.up.weight, encoder.head.down.weight
    assert (tuple(up.shape), tuple(down.shape)) == ((SMALL["hidden_size"], 3), (3, SMALL["hidden_size"]))
    torch.nn.init.normal_(up)
    expected = torch.stack([h + up @ (down @ h) for h in plain(tokens)[0]])
    torch.testing.assert_close(encoder(tokens)[0], expected, rtol=0, atol=1e-12)


# --- chunks


@pytest.mark.parametrize("budget", [1, 7, 12, 25, 60, 10_000])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_chunks_are_a_permutation_within_the_budget_longest_first(count, budget):
    lengths = torch.randint(1, 20, (count,), generator=torch.Generator().manual_seed(count))
    chunks = plan_chunks(lengths, budget)
    assert sorted(row for rows in chunks for row in rows.tolist()) == list(range(count))
    for rows in chunks:
        assert len(rows) == 1 or len(rows) * int(lengths[rows].max()) <= budget
    assert torch.equal(lengths[torch.cat(chunks)] if chunks else lengths, lengths.sort(descending=True).values)


def test_no_budget_is_one_chunk_in_the_given_order():
    (rows,) = plan_chunks(torch.tensor([3, 9, 1]), None)
    assert rows.tolist() == [0, 1, 2]


def test_padded_tokens_counts_rows_times_longest_of_each_chunk():
    tokens = small_tokens([9, 4, 12, 5])
    assert padded_tokens(tokens.lengths(), tokens.ids_NT.shape[1], None) == 48
    assert padded_tokens(tokens.lengths(), tokens.ids_NT.shape[1], 24) == 12 * 2 + 5 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(
    ("pooling", "head"),
    [
        pytest.param(pooling, head, marks=[] if pooling == "avg" or head == "none" else pytest.mark.exhaustive)
        for pooling in POOLINGS
        for head in HEADS
    ],
)
def test_chunks_change_neither_vectors_nor_loss_nor_gradients(pooling, head, family, dtype):
    encoder = prompt_encoder(family, pooling=pooling, head=head, dtype=dtype, changes=NO_DROPOUT).train()
    tokens = with_mlm(batch_for(encoder), encoder.backbone.pad_id)
    direction = torch.randn(SMALL["hidden_size"], generator=torch.Generator().manual_seed(5)).to(dtype)

    def result(chunk_tokens):
        encoder.zero_grad()
        vectors, hidden = encoder(tokens, train_head=True, chunk_tokens=chunk_tokens)
        # each hidden vector has its own weight, so that their order matters
        mlm = (hidden @ direction * torch.arange(1, len(hidden) + 1)).mean() / len(hidden)
        views = vectors.view(3, 2, -1)
        loss = hybrid_loss(*views, LossConfig(temperature=0.5, margin=0.2, hinge_weight=1.0), mlm=mlm).total
        loss.backward()
        return [vectors, hidden, loss, *(parameter.grad.clone() for parameter in trained(encoder).values())]

    whole = result(None)
    for budget in (1, 13, 24):
        for chunked, expected in zip(result(budget), whole, strict=True):
            # the pooled embeddings of these two are longer than those of a mean, so that the head amplifies their rounding
            rounding = 2e-6 if pooling in ("mean_sqrt_len", "lasttoken") else 1e-6
            tolerance = rounding if dtype == torch.float32 else 1e-12
            scale = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(chunked, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 13])
def test_hidden_states_of_masked_tokens_are_in_the_row_major_order_of_the_labels(chunk_tokens):
    encoder = prompt_encoder()
    tokens = with_mlm(batch_for(encoder), encoder.backbone.pad_id)
    (states,) = encoder.backbone(tokens.mlm_ids_NT, tokens.mask_NT, encoder.prompt(), position_offset=4)
    indices = [
        (n, t) for n in range(len(LENGTHS)) for t in range(max(LENGTHS)) if tokens.mlm_labels_NT[n, t] != IGNORED
    ]
    assert len(indices) > 5
    _, hidden = encoder(tokens, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(hidden, torch.stack([states[n, t] for n, t in indices]), rtol=0, atol=1e-12)


def test_without_an_mlm_task_no_hidden_states_are_returned():
    encoder = prompt_encoder()
    assert encoder(batch_for(encoder))[1] is None


@pytest.mark.gpu
def test_chunks_of_a_batch_on_a_gpu_equal_those_on_the_cpu():
    encoder = prompt_encoder()
    tokens = with_mlm(batch_for(encoder), encoder.backbone.pad_id)
    expected = encoder(tokens, chunk_tokens=13)
    for ours, theirs in zip(encoder.cuda()(tokens.to("cuda"), chunk_tokens=13), expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pooling", ["avg", "cls", "lasttoken"])
def test_sentences_that_are_padded_at_the_start_are_not_trimmed(pooling):
    encoder = PromptEncoder(small_backbone(), length=4, pooling=pooling).double().eval()
    right = small_tokens([9, 4, 12, 5])
    rows = [torch.arange(12).roll(12 - int(length)) for length in right.lengths()]  # the padding moves to the start
    left = Tokens(
        *(
            torch.stack([row[order] for row, order in zip(part, rows, strict=True)])
            for part in (right.ids_NT, right.mask_NT)
        )
    )
    assert left.mask_NT[:, -1].all()
    for chunk_tokens in (None, 12):
        torch.testing.assert_close(encoder(left, chunk_tokens=chunk_tokens)[0], encoder(right)[0], rtol=0, atol=1e-12)
