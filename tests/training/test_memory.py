"""`trainer.recompute=auto` depends on measured bytes; recomputation does not change the result."""

import re

import pytest
import torch
from support.encoders import save_small_encoder, small_backbone, small_tokens

from promcse_pl.config import Config
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.runs.lifecycle import run_job
from promcse_pl.training.machine import activation_bytes, free_bytes


def batch_activation_bytes(encoder, tokens):
    """Bytes of all tensors that autograd keeps for a batch, counted with hooks."""
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
def test_the_activations_of_a_batch_are_those_of_one_sentence_times_its_size(family):
    encoder = PromptEncoder(small_backbone(family), length=4).train()
    tokens = small_tokens([10] * 40, encoder.backbone.pad_id)
    assert 40 * activation_bytes(encoder, 10) == pytest.approx(batch_activation_bytes(encoder, tokens), rel=0.25)


def test_measuring_activations_changes_no_mode_and_no_random_state():
    encoder = PromptEncoder(small_backbone("bert"), length=4).eval()
    state = torch.get_rng_state()
    activation_bytes(encoder, 8)
    assert not encoder.training
    assert torch.equal(torch.get_rng_state(), state)


def test_free_memory_respects_the_limit_of_a_container(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr("promcse_pl.training.machine._CGROUP", tmp_path)
    free = free_bytes(cpu)
    assert free > 1e8
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_bytes(cpu) == 300
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(cpu) > 1000


@pytest.fixture
def train(tmp_path):
    """Return a function that trains a small encoder for three steps and returns its adapter's bytes and its log."""
    encoder = save_small_encoder(tmp_path / "encoder")
    rows = "".join(f"w{5 + row} w7,w{6 + row} w8,w{40 + row}\n" for row in range(12))
    (tmp_path / "rows.csv").write_text("a,b,c\n" + rows)

    def run(name, **trainer):
        config = Config.from_dict(
            {
                "model": {"path": str(encoder), "pooling": "avg", "head": "none"},
                "data": {
                    "kind": "triplets",
                    "train": str(tmp_path / "rows.csv"),
                    "dev": None,
                    "batch_size": 4,
                    "max_length": 20,
                    "cache_dir": str(tmp_path / "cache"),
                },
                "trainer": {"epochs": 1, "precision": "float32", "device": "cpu", "chunk_tokens": 16, **trainer},
                "tracking": {"wandb": "disabled"},
            }
        )
        run_job(config, tmp_path / name)
        weights = (tmp_path / name / "adapter" / "adapter.safetensors").read_bytes()
        return weights, (tmp_path / name / "run.log").read_text()

    return run


def test_recomputation_trains_a_bit_identical_adapter(train):
    kept, _ = train("kept", recompute="never")
    again, said = train("again", recompute="always")
    assert again == kept
    assert "chunks are recomputed" not in said


def test_recomputation_is_enabled_and_logged_if_memory_is_too_small(train, monkeypatch):
    kept, said = train("roomy")
    assert "chunks are recomputed" not in said
    calls = []
    plain = PromptEncoder.forward
    monkeypatch.setattr(
        PromptEncoder, "forward", lambda self, *rest, **named: calls.append(named) or plain(self, *rest, **named)
    )
    monkeypatch.setattr("promcse_pl.training.machine.free_bytes", lambda _device: 100_000)
    tight, said = train("tight")
    assert tight == kept
    assert re.search(
        r"the activations of a batch would take 0\.\d GB of 0\.0 GB free memory: chunks are recomputed", said
    )
    assert [call["recompute"] for call in calls if "recompute" in call] == [True] * 3


def test_the_chunk_size_of_the_device_is_written_to_the_run_folder(train, tmp_path):
    train("auto", chunk_tokens="auto")
    assert "chunk_tokens: 512" in (tmp_path / "auto" / "config.yaml").read_text()
