"""Checkpoints: memory while they are written, read and kept; which of them stay; tensors that share memory; random states."""

import gc
import tracemalloc

import pytest
import torch

from promcse_pl.run_folder import checkpoint_folders
from promcse_pl.training.checkpoint import RunCheckpoints, _checksum, newest_checkpoint, random_state, set_random_state
from promcse_pl.utils.errors import ConfigError, DataError

ENTRIES = 12_347
"""A size that no other tensor has."""


def test_a_run_keeps_no_tensor_of_the_checkpoint_that_it_resumes_from(tmp_path):
    folder = tmp_path / "checkpoints/step-3"
    folder.parent.mkdir()
    RunCheckpoints(tmp_path).save_checkpoint({"global_step": 3, "x": torch.arange(ENTRIES)}, folder)
    newest = newest_checkpoint(tmp_path)
    assert (newest.path, newest.step, newest.history_bytes) == (folder, 3, 0)
    gc.collect()
    assert not [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and each.numel() == ENTRIES]
    assert torch.equal(RunCheckpoints(tmp_path).load_checkpoint(folder)["x"], torch.arange(ENTRIES))


def test_the_checksum_does_not_copy_the_tensors():
    content = bytes(2**22)
    tracemalloc.start()
    try:
        _checksum({"step": 1}, content)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def save(run, step, **state):
    folder = run / "checkpoints" / f"step-{step}"
    folder.parent.mkdir(exist_ok=True)
    RunCheckpoints(run).save_checkpoint({"global_step": step, **state}, folder)
    return RunCheckpoints(run).load_checkpoint(folder)


def test_a_run_that_could_not_resume_from_its_newest_checkpoints_replaces_them(tmp_path):
    history = tmp_path / "metrics.jsonl"
    history.write_text("{}\n")
    for step in (5000, 5100):
        save(tmp_path, step)
    history.unlink()
    assert newest_checkpoint(tmp_path) is None
    for step in (100, 200, 300):
        save(tmp_path, step)
        assert newest_checkpoint(tmp_path).step == step
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-200", "step-300"]


def test_a_checkpoint_that_a_callback_saves_elsewhere_removes_none_of_the_run(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    RunCheckpoints(tmp_path).save_checkpoint({"global_step": 2}, tmp_path / "mine.ckpt")
    assert (tmp_path / "mine.ckpt").is_dir()
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-1", "step-2"]


@pytest.mark.parametrize("path", ["results", "results/scores.csv"])
def test_a_path_that_is_not_a_checkpoint_is_not_replaced(path, tmp_path):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text("years of work")
    with pytest.raises(
        DataError, match=r"results is not a checkpoint and is not replaced\. Try: a new path in trainer\."
    ):
        RunCheckpoints(tmp_path).save_checkpoint({"global_step": 2}, tmp_path / "results")
    assert (tmp_path / path).read_text() == "years of work"


def test_tensors_that_share_memory_are_saved(tmp_path):
    whole = torch.arange(12.0)
    state = {
        "whole": whole,
        "same": whole,
        "part": whole[3:7],
        "turned": whole.view(3, 4).T,
        "empty": [torch.empty(0)] * 2,
    }
    read = save(tmp_path, 1, callbacks={"mine": state})["callbacks"]["mine"]
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in ("whole", "same", "part", "turned"))
    with pytest.raises(
        ConfigError, match=r"the state of the callback mine cannot be saved: .* but not sparse tensors. Try"
    ):
        save(tmp_path, 2, callbacks={"mine": whole.to_sparse()})


def test_a_run_resumes_with_fewer_gpus_than_an_earlier_version_saved_the_state_of(monkeypatch):
    restored = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    state = random_state()
    assert state["cuda"] == [torch.tensor([7])]
    set_random_state(state)
    set_random_state({**state, "cuda": [torch.tensor([1]), torch.tensor([2])]})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    set_random_state({**state, "cuda": [torch.tensor([1]), torch.tensor([2])]})
    assert [each.item() for each in restored] == [7, 1, 2]
