"""Failures of a run with real disks, memory limits and non-finite losses, and the files that remain."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file
from support.encoders import save_small_encoder
from support.processes import Ended, promcse
from support.runs import KILL_AT_STEP, small_config, word_rows, write_inputs_with_nan

from promcse_pl.run_folder import read_status, write_config
from promcse_pl.runs.failures import actionable_errors
from promcse_pl.training.checkpoint import newest_checkpoint
from promcse_pl.training.context import RunContext
from promcse_pl.training.distributed import Ranks
from promcse_pl.utils.errors import OutOfMemoryError
from promcse_pl.utils.signals import StopSignals


@contextmanager
def small_disk(mount_point: Path, options: str) -> Iterator[None]:
    mount_point.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mount_point)], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(mount_point)], check=True)


def config_file(folder: Path, **sections: dict) -> Path:
    return write_config(small_config(folder, **sections), folder / "start.yaml")


def one_line(done: Ended, message: str) -> None:
    assert done.code == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert message in f"{errors[0]}\n"


def test_a_full_disk_loses_only_the_steps_since_the_last_save_and_the_run_can_be_resumed(tmp_path):
    config = config_file(
        tmp_path,
        data={"batch_size": 2},
        trainer={"epochs": 200, "max_steps": 80, "save_every": 5, "log_every": 1},
    )
    with small_disk(tmp_path / "disk", "size=72k"):
        run = tmp_path / "disk/run"
        done = promcse(tmp_path / "log", "train", config, "--out", run)
        one_line(done, "No space left on device")
        saved = newest_checkpoint(run)
        assert saved is not None
        assert saved.step > 0
        assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")], "half-written"
        subprocess.run(["mount", "-o", "remount,size=4m", str(tmp_path / "disk")], check=True)
        again = promcse(tmp_path / "log", "train", "--resume", run)
        assert again.code == 0, again.stderr
        assert f"resuming after step {saved.step}" in again.stdout
        assert read_status(run).state == "finished"
        whole = promcse(tmp_path / "log", "train", config, "--out", tmp_path / "whole")
        assert whole.code == 0, whole.stderr
        name = "adapter/adapter.safetensors"
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_folder_that_cannot_be_written_is_a_one_line_error(tmp_path):
    config, run = config_file(tmp_path), tmp_path / "disk/run"
    with small_disk(tmp_path / "disk", "size=100k,ro"):
        done = promcse(tmp_path / "log", "train", config, "--out", run)
    one_line(done, f"cannot create the run folder {run}: Read-only file system")


def test_a_path_that_is_a_file_is_a_one_line_error(tmp_path):
    config = config_file(tmp_path)
    (tmp_path / "taken").write_text("mine")
    one_line(promcse(tmp_path / "log", "train", config, "--out", tmp_path / "taken"), "cannot create the run folder")
    assert (tmp_path / "taken").read_text() == "mine"


LIMIT = """
import resource, torch
import promcse_pl.training.fit, promcse_pl.evaluation.suite
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {room}, resource.RLIM_INFINITY))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "advice"),
    [
        ({"chunk_tokens": None, "recompute": "never"}, "trainer.recompute=always trainer.chunk_tokens=512"),
        pytest.param(
            {"chunk_tokens": 512, "recompute": "never"}, "trainer.recompute=always", marks=pytest.mark.exhaustive
        ),
        pytest.param(
            {"chunk_tokens": 100_000, "recompute": "always"}, "trainer.chunk_tokens=50000", marks=pytest.mark.exhaustive
        ),
    ],
    ids=["whole batch", "kept", "recomputed"],
)
def test_out_of_memory_prints_the_command_that_resumes_with_less_memory(trainer, advice, tmp_path):
    save_small_encoder(tmp_path / "encoder", hidden_size=256, intermediate_size=1024, num_attention_heads=4)
    (tmp_path / "train.csv").write_text("a,b,c\n" + "\n".join(word_rows(1500)) + "\n")
    config = config_file(tmp_path, data={"batch_size": 1500}, trainer=trainer)
    done = promcse(tmp_path / "log", "train", config, "--out", tmp_path / "run", before=LIMIT.format(room=180 * 2**20))
    one_line(done, f"out of memory. Try: python run.py resume={tmp_path}/run {advice}\n")
    status = read_status(tmp_path / "run")
    assert status.state == "failed"
    assert status.error.startswith("OutOfMemoryError: out of memory")
    script, *arguments = status.error.partition("Try: python ")[2].split()  # the advice, as it is typed
    assert script == "run.py"  # `promcse train` by another name
    again = promcse(tmp_path / "log", "train", *arguments)
    assert again.code == 0, again.stderr
    assert read_status(tmp_path / "run").state == "finished"
    for setting in advice.split():
        assert f"{setting} (was " in (tmp_path / "run/run.log").read_text()


def test_out_of_memory_at_minimal_settings_suggests_a_new_run(tmp_path):
    config = small_config(tmp_path, data={"batch_size": 8}, trainer={"chunk_tokens": 16, "recompute": "always"})
    run = RunContext(config=config, typed=config, folder=tmp_path, ranks=Ranks(), console=Console())
    message = r"Try: a new run with data\.batch_size=4; it affects training"
    with pytest.raises(OutOfMemoryError, match=message), actionable_errors(run):
        raise MemoryError


def test_a_non_finite_loss_saves_prompt_and_batch_and_sets_the_status_failed(tmp_path):
    write_inputs_with_nan(tmp_path)
    done = promcse(tmp_path / "log", "train", config_file(tmp_path, data={"batch_size": 10}), "--out", tmp_path / "run")
    one_line(done, "the loss of step 1 ")
    left = load_file(tmp_path / "run/non_finite.safetensors")
    assert left["batch.rows"].sort().values.tolist() == list(range(10))
    assert (left["batch.ids"] == 96).any()
    assert left["prompt.prompt.embedding.weight"].isfinite().all()
    assert str(tmp_path / "run/non_finite.safetensors") in done.stdout
    assert read_status(tmp_path / "run").state == "failed"
    assert "NonFiniteError: the loss of step 1" in read_status(tmp_path / "run").error


def test_a_token_cache_deleted_between_start_and_resume_is_rebuilt(tmp_path):
    config = config_file(tmp_path)
    assert promcse(tmp_path / "log", "train", config, "--out", tmp_path / "straight").code == 0
    stopped = promcse(tmp_path / "log", "train", config, "--out", tmp_path / "run", before=KILL_AT_STEP.format(step=2))
    assert stopped.code == 143, stopped.stderr
    shutil.rmtree(tmp_path / "cache")
    again = promcse(tmp_path / "log", "train", "--resume", tmp_path / "run")
    assert again.code == 0, again.stderr
    assert "tokenised now" in again.stdout
    name = "adapter/adapter.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_signal_handlers_are_restored_and_a_second_signal_stops_at_once(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        stop.deferred = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)  # to the whole group, and passed on by the process that started this one
        monkeypatch.setattr("promcse_pl.utils.signals.REPEAT_SECONDS", 0)
        with pytest.raises(BaseException, match="stopped by SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_twice_stops_at_once():
    with StopSignals() as stop:
        stop.deferred = True
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(BaseException, match="stopped by SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
