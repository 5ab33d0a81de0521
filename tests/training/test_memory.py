"""The decision to run chunks twice rests on measured bytes."""

import pytest
import torch
from conftest import small_backbone, small_tokens

from promcse_pl.model.encoder import PromptEncoder
from promcse_pl.training.memory import free_bytes, kept_bytes


def really_kept(encoder, tokens):
    """Bytes of all tensors that autograd keeps for a batch, by hand."""
    seen = {}
    weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, note):
        kept = encoder.encode_chunk(tokens, encoder.prompt())
    del kept
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_the_bytes_of_one_sentence_tell_those_of_a_batch(family):
    encoder = PromptEncoder(small_backbone(family), length=4).train()
    tokens = small_tokens([10] * 40, encoder.backbone.pad_id)
    assert 40 * kept_bytes(encoder, 10) == pytest.approx(really_kept(encoder, tokens), rel=0.25)


def test_measuring_leaves_mode_and_chance_as_they_were():
    encoder = PromptEncoder(small_backbone("bert"), length=4).eval()
    state = torch.get_rng_state()
    kept_bytes(encoder, 8)
    assert not encoder.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr("promcse_pl.training.memory._CGROUP", tmp_path)
    free = free_bytes(cpu)
    assert free > 1e8
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_bytes(cpu) == 300
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(cpu) > 1000
