"""Chunks in threads and recomputed chunks give the values of one plain pass, dropout included."""

import gc
import weakref

import pytest
import torch
from support.encoders import small_backbone, small_tokens

from promcse_pl.config import LossConfig
from promcse_pl.data.batch import Tokens
from promcse_pl.losses.hybrid import hybrid_loss
from promcse_pl.models.cpu.chunks import _workers, plan_chunks, run_chunks
from promcse_pl.models.encoder import PromptEncoder

LENGTHS = [9, 4, 12, 5, 9, 3, 7, 7, 11]
# one family for each way in which the prompt reaches the layers; tests/models/test_families.py covers all
every_family = pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "modernbert", "albert"])


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"{count} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def prompt_encoder(family, **options) -> PromptEncoder:
    return PromptEncoder(small_backbone(family), length=4, pooling="avg", **options)


def batch(encoder, *, mlm=False) -> Tokens:
    tokens = small_tokens(LENGTHS, encoder.backbone.pad_id)
    if mlm:
        hidden_NT = tokens.mask_NT.bool() & (torch.arange(tokens.mask_NT.shape[1]) % 3 == 1)
        tokens.mlm_ids_NT = tokens.ids_NT.masked_fill(hidden_NT, 4)
        tokens.mlm_labels_NT = tokens.ids_NT.masked_fill(~hidden_NT, -100)
    return tokens


def loss_of(vectors, hidden):
    loss = hybrid_loss(*vectors.view(3, 3, -1), LossConfig(temperature=0.05, margin=0.2, hinge_weight=10.0)).total
    return loss if hidden is None else loss + hidden.square().mean()


def gradients_of(encoder):
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def loss_and_gradients(encoder, tokens, **options):
    encoder.zero_grad()
    loss = loss_of(*encoder(tokens, train_head=True, **options))
    loss.backward()
    return loss.detach(), gradients_of(encoder)


def assert_equal(found, expected, bound):
    assert found.keys() == expected.keys()
    assert len(found) == 3
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= bound * expected[name].norm(), name


both = [
    pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"]),
    pytest.mark.parametrize("mlm", [False, True], ids=["plain", "mlm"]),
]


@every_family
@both[0]
@both[1]
def test_loss_and_every_gradient_equal_the_plain_pass_without_dropout(family, threads, recompute, mlm):
    encoder = prompt_encoder(family, head="mlp").double().eval()
    tokens = batch(encoder, mlm=mlm)
    plain_loss, plain = loss_and_gradients(encoder, tokens)
    loss, gradients = loss_and_gradients(encoder, tokens, chunk_tokens=20, recompute=recompute)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-12, atol=0)
    assert_equal(gradients, plain, 1e-12)


@every_family
@pytest.mark.parametrize(
    "recompute", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["kept", "recomputed"]
)
@both[1]
def test_in_float32_they_agree_to_1e_6(family, threads, recompute, mlm):
    """The loss's own gradient is taken once: cosines near 1 over a temperature of 0.05 magnify any rounding twentyfold."""
    encoder = prompt_encoder(family, head="mlp").eval()
    tokens = batch(encoder, mlm=mlm)

    def outputs(**options):
        encoder.zero_grad()
        return [output for output in encoder(tokens, train_head=True, **options) if output is not None]

    plain = outputs()
    detached = [output.detach().requires_grad_() for output in plain]
    plain_loss = loss_of(*detached, *([] if mlm else [None]))
    plain_loss.backward()
    upstream = [output.grad for output in detached]
    torch.autograd.backward(plain, upstream)
    expected = gradients_of(encoder)
    found = outputs(chunk_tokens=20, recompute=recompute)
    torch.autograd.backward(found, upstream)
    torch.testing.assert_close(loss_of(*found, *([] if mlm else [None])), plain_loss, rtol=1e-6, atol=0)
    assert_equal(gradients_of(encoder), expected, 1e-6)


@every_family
def test_with_dropout_neither_threads_nor_recomputing_change_a_mask(family, threads):
    encoder = prompt_encoder(family, dropout=0.3).double().train()
    tokens = batch(encoder, mlm=True)

    def step(count, *, recompute):
        torch.set_num_threads(count)
        torch.manual_seed(1)
        loss, gradients = loss_and_gradients(encoder, tokens, chunk_tokens=20, recompute=recompute)
        return loss, gradients["prompt.embedding.weight"], torch.get_rng_state()

    first, again, recomputed, alone = (
        step(threads, recompute=False),
        step(threads, recompute=False),
        step(threads, recompute=True),
        step(1, recompute=False),
    )
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    for other in (recomputed, alone):
        torch.testing.assert_close(other[:2], first[:2], rtol=1e-11, atol=1e-13)
        assert torch.equal(other[2], first[2])


def test_two_steps_drop_differently_and_so_do_the_chunks_of_a_step():
    encoder = prompt_encoder("bert", dropout=0.3).train()
    same = Tokens(torch.full((6, 5), 7), torch.ones(6, 5, dtype=torch.long))
    first, second = (encoder(same, chunk_tokens=5)[0] for _ in range(2))
    together = torch.cat([first, second])
    assert torch.pdist(together).min() > 1e-3


def test_encoding_in_eval_mode_draws_nothing_from_the_generator():
    encoder = prompt_encoder("bert").eval()
    state = torch.get_rng_state()
    encoder(batch(encoder), chunk_tokens=20)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_in_a_chunk_reaches_the_caller(threads):
    def run(rows, prompt_kv):
        if 3 in rows:
            raise ValueError("row 3")
        return (prompt_kv * rows.sum(),)

    with pytest.raises(ValueError, match="row 3"):
        run_chunks(run, torch.ones(2, requires_grad=True), plan_chunks(torch.tensor([4, 4, 4, 4]), 4))


def test_recomputing_keeps_no_tensor_of_a_chunk(threads):
    kept = []

    def run(rows, prompt_kv):
        middle = prompt_kv.sin() * rows.sum()
        kept.append(weakref.ref(middle))
        return (middle.cos(),)

    prompt = torch.ones(2, requires_grad=True)
    chunks = plan_chunks(torch.tensor([4, 4, 4, 4]), 4)
    outputs = run_chunks(run, prompt, chunks, recompute=True)
    gc.collect()
    assert len(kept) == 4
    assert all(reference() is None for reference in kept)
    sum(output.sum() for (output,) in outputs).backward()
    expected = sum(-(torch.ones(2).sin() * rows.sum()).sin() * torch.ones(2).cos() * rows.sum() for rows in chunks)
    torch.testing.assert_close(prompt.grad, expected)


def test_a_prompt_changed_between_the_passes_is_refused():
    prompt = torch.ones(2, requires_grad=True)
    ((output,),) = run_chunks(lambda rows, kv: (kv * 2,), prompt, [torch.tensor([0])], recompute=True)
    with torch.no_grad():
        prompt += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_worker_uses_one_core_and_the_calling_thread_keeps_all():
    before = torch.get_num_threads()
    _workers.cache_clear()
    try:
        torch.set_num_threads(2)
        pool = _workers(2, 1)
        assert list(pool.map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        _workers.cache_clear()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_autocast_of_the_caller_applies_in_all_threads_and_in_the_backward_pass(recompute, threads):
    torch.set_num_threads(threads)
    seen = []

    def run(rows, prompt_kv):
        product = prompt_kv @ prompt_kv
        seen.append(product.dtype)
        return (product.float().sum() * rows,)

    prompt_kv = torch.ones(2, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = run_chunks(run, prompt_kv, [1.0, 2.0, 3.0, 4.0], recompute=recompute)
    sum(value for (value,) in found).backward()
    assert seen == [torch.bfloat16] * (8 if recompute else 4)
