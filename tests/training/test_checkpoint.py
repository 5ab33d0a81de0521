"""Checkpoints of large states: memory while they are written, read and kept."""

import gc
import tracemalloc

import torch

from promcse_pl.training.checkpoint import RunCheckpoints, _checksum, newest_checkpoint

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
