"""`trainer.recompute=auto` depends on measured bytes; recomputation does not change the result."""

import re

import pytest
import torch
import yaml
from support.encoders import save_small_encoder, small_backbone, small_tokenizer, small_tokens

from promcse_pl.config import Config
from promcse_pl.data.tokens import load_tokens, memory_source
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.run_folder import read_resolved_config
from promcse_pl.runs.lifecycle import run_job
from promcse_pl.training import machine
from promcse_pl.training.machine import (
    MAX_MEMORY_FRACTION,
    StepMemory,
    activation_bytes,
    divide_batch,
    fit_chunk_tokens,
    free_bytes,
    measure_memory,
)


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
    cpu, own = torch.device("cpu"), tmp_path / "self"
    monkeypatch.setattr("promcse_pl.training.machine._CGROUP", tmp_path)
    monkeypatch.setattr("promcse_pl.training.machine._OWN_CGROUP", own)
    free = free_bytes(cpu)
    assert free > 1e8

    def limit(group, limit, used, cached):
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon {used - cached}\ninactive_file {cached}\n")

    own.write_text("4:memory:/other\n0::/job/step\n")
    limit(tmp_path / "job/step", "max", 700, 0)
    assert free_bytes(cpu) > 1e8
    limit(tmp_path / "job", 1000, 700, 100)
    assert free_bytes(cpu) == 400  # of a parent of the own group, without the cache of files
    limit(tmp_path / "job/step", 500, 300, 0)
    assert free_bytes(cpu) == 200
    limit(tmp_path, 150, 50, 10)
    assert free_bytes(cpu) == 110
    own.write_text("0::/\n")
    assert free_bytes(cpu) == 110
    (tmp_path / "memory.stat").unlink()
    assert free_bytes(cpu) == 100
    own.write_text("4:memory:/job\n")  # version 1 alone: its limits are not read
    limit(tmp_path, "max", 50, 10)
    assert free_bytes(cpu) > 1e8


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


@pytest.mark.parametrize(
    ("batch_tokens", "threads", "tokens"),
    [(6_000, 2, 1_800), (3_413, 2, 2_048), (3_414, 2, 1_025), (24_000, 16, 1_800), (24_000, 64, 512), (10, 1, 512)],
)
def test_in_bfloat16_on_a_cpu_chunks_are_large_and_equally_many_for_all_threads(batch_tokens, threads, tokens):
    assert divide_batch(batch_tokens, threads) == tokens


def test_chunks_in_bfloat16_are_small_if_they_are_recomputed(train, tmp_path):
    train("recomputed", chunk_tokens="auto", precision="bfloat16", recompute="always")
    assert read_resolved_config(tmp_path / "recomputed/config.yaml").trainer.chunk_tokens == 512


def test_a_run_in_bfloat16_on_a_cpu_records_its_chunk_size(train, tmp_path):
    _, said = train("bfloat16", chunk_tokens="auto", precision="bfloat16")
    assert "chunk size: 512 tokens (trainer.chunk_tokens)" in said
    assert read_resolved_config(tmp_path / "bfloat16/config.yaml").trainer.chunk_tokens == 512


def test_a_chunk_is_the_largest_power_of_two_that_fits_or_the_maximum_if_the_batch_fits():
    for free in (0, 1, 5, 1_000, 123_456, 10**6, 80 * 10**9):
        for token_bytes in (1, 7, 1_000, 2_000_000):
            for batch_tokens in (1, 300, 49_152):
                memory, halved = StepMemory(free, token_bytes, batch_tokens), 16_384
                budget = MAX_MEMORY_FRACTION * free
                if token_bytes * batch_tokens > budget:
                    while halved > 1 and halved * token_bytes > budget:
                        halved //= 2
                assert fit_chunk_tokens(16_384, memory) == halved
    assert fit_chunk_tokens(8_192, None) == 8_192


def test_the_memory_of_a_step_counts_the_batch_of_a_rank_and_both_passes_of_the_mlm_task(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda _device: 10**9)
    encoder = PromptEncoder(small_backbone(), length=4).train()
    source = memory_source("rows", 9 * [("w5 w6 w7 w8", "w5 w6 w7", "w5 w6 w7")])  # 6, 5 and 5 tokens, 5.3 on average
    rows = load_tokens(source, small_tokenizer(), max_length=20, cache_dir=tmp_path)

    def measured(**sections):
        data = {"kind": "triplets", "train": "demo", "batch_size": 7}
        config = Config.from_dict({"model": {"path": "small"}, "data": data, **sections})
        return measure_memory(config, encoder, rows, torch.device("cpu"))

    one, two = measured(), measured(trainer={"devices": 2})
    trained = encoder.prompt.embedding.weight.nbytes
    assert one == StepMemory(10**9 - 5 * trained, -(-activation_bytes(encoder, 6) // 6), 7 * 3 * 6)
    assert two == StepMemory(one.free // 2, one.token_bytes, 4 * 3 * 6)
    with_mlm = measured(loss={"mlm_weight": 0.1})
    assert with_mlm.token_bytes == -(-2 * activation_bytes(encoder, 6) // 6)


def test_the_chunk_size_of_a_device_with_little_memory_is_measured_recorded_and_kept(train, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_MEMORY_DEVICES", ("cpu",))  # as on a GPU
    monkeypatch.setattr(machine, "free_bytes", lambda _device: 300_000)
    small, said = train("small", chunk_tokens="auto")
    path = tmp_path / "small/config.yaml"
    tokens = yaml.safe_load(path.read_text())["resolved"]["trainer.chunk_tokens"]
    assert tokens in (8, 16, 32)
    assert f"chunk size: {tokens} tokens (trainer.chunk_tokens)" in said
    assert "chunks are recomputed" in said
    typed, _ = train("typed", chunk_tokens=tokens)
    assert typed == small
    monkeypatch.setattr(machine, "free_bytes", lambda _device: 10**9)
    assert read_resolved_config(path).trainer.chunk_tokens == tokens  # what a resumed run uses
    train("large", chunk_tokens="auto")
    assert read_resolved_config(tmp_path / "large/config.yaml").trainer.chunk_tokens == 512
