"""Tests that need a GPU: `pytest -m gpu`. The other files test the same equalities on a CPU."""

import pytest
import torch
from support.encoders import FAMILIES, small_backbone, small_tokens

from promcse_pl.config import LossConfig
from promcse_pl.data.batch import TrainBatch
from promcse_pl.embedder import PromCSE
from promcse_pl.losses.hybrid import hybrid_loss
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import LowRankHead, PromptEncoder
from promcse_pl.training.machine import activation_bytes, free_bytes

pytestmark = pytest.mark.gpu
LENGTHS = [9, 4, 12, 5, 5, 11, 3, 8, 10]
GPU = torch.device("cuda")
FLOAT64 = {
    *("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "ernie", "electra"),
    *("mpnet", "distilbert", "albert"),
}
"""Families that compute everything in float64 if asked to; others compute norms or rotations in float32."""


def loss_and_gradient(encoder, device, **options):
    encoder.to(device).zero_grad()
    vectors, _ = encoder(small_tokens(LENGTHS, encoder.backbone.pad_id).to(device), train_head=True, **options)
    loss = hybrid_loss(*vectors.view(3, 3, -1), LossConfig(temperature=0.5, margin=0.2, hinge_weight=10.0)).total
    loss.backward()
    return loss.detach().cpu(), encoder.prompt.embedding.weight.grad.cpu()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_the_cpu(family, recompute):
    encoder = PromptEncoder(small_backbone(family), length=4, pooling="avg").double().eval()
    loss, gradient = loss_and_gradient(encoder, "cpu")
    for chunk_tokens in (None, 20):
        loss_gpu, gradient_gpu = loss_and_gradient(encoder, GPU, chunk_tokens=chunk_tokens, recompute=recompute)
        bound = 1e-9 if family in FLOAT64 else 1e-5
        torch.testing.assert_close(loss_gpu, loss, rtol=bound, atol=0)
        assert (gradient_gpu - gradient).norm() <= bound * gradient.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_does_not_wait_for_the_gpu(family):
    encoder = PromptEncoder(small_backbone(family), length=4, pooling="avg").to(GPU).train()
    tokens = small_tokens(LENGTHS, encoder.backbone.pad_id)
    tokens.lengths_N = torch.tensor(LENGTHS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        vectors, _ = encoder(tokens.pin_memory().to(GPU), train_head=True, chunk_tokens=20)
        loss = hybrid_loss(*vectors.view(3, 3, -1), LossConfig(temperature=0.5, margin=0.2, hinge_weight=10.0)).total
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_recomputed_chunks_drop_the_same_and_leave_the_generator_as_it_was():
    encoder = PromptEncoder(small_backbone(), length=4, pooling="avg", dropout=0.3).double().to(GPU).train()
    found = []
    for recompute in (False, True):
        torch.manual_seed(3)
        found.append(
            (*loss_and_gradient(encoder, GPU, chunk_tokens=20, recompute=recompute), torch.rand(3, device=GPU))
        )
    for kept, again in zip(*found, strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-12, atol=1e-15)


def test_bfloat16_is_near():
    encoder = PromptEncoder(FrozenBackbone.load("sentence-transformers/all-MiniLM-L6-v2"), length=10, pooling="avg")
    texts = ["a man is playing a guitar", "someone plays an instrument", "the stock market fell"]
    exact = PromCSE(encoder.to(GPU)).encode(texts)
    rounded = PromptEncoder(
        FrozenBackbone.load("sentence-transformers/all-MiniLM-L6-v2", dtype=torch.bfloat16), length=10, pooling="avg"
    )
    rounded.load_state_dict(encoder.state_dict())
    assert (PromCSE(rounded.to(GPU)).encode(texts) * exact).sum(1).min() > 0.999


def test_a_pinned_batch_is_the_batch():
    tokens = small_tokens(LENGTHS)
    pinned = TrainBatch(tokens, 3, torch.arange(3)).pin_memory()
    assert pinned.tokens.ids_NT.is_pinned()
    assert torch.equal(pinned.tokens.to(GPU).ids_NT.cpu(), tokens.ids_NT)


def test_activation_bytes_of_one_sentence_are_measured():
    encoder = PromptEncoder(small_backbone(), length=4).to(GPU).train()
    assert 0 < activation_bytes(encoder, 10) < free_bytes(GPU)


def test_memory_that_torch_has_cached_counts_as_free():
    before = free_bytes(GPU)
    block = torch.empty(2**28, dtype=torch.uint8, device=GPU)
    assert free_bytes(GPU) < before - 2**27
    del block
    assert free_bytes(GPU) == pytest.approx(before, abs=2**26)


def test_a_low_rank_head_on_the_gpu_is_exported_for_sentence_transformers():
    pytest.importorskip("sentence_transformers")
    from promcse_pl.interop import sentence_transformers as interop

    head = LowRankHead(6, 2)
    torch.nn.init.normal_(head.up.weight)
    expected = interop._dense(head).linear.weight
    torch.testing.assert_close(interop._dense(head.to(GPU)).linear.weight, expected, rtol=1e-5, atol=1e-6)
