"""Runs of several real processes: equality with one process, exact resume, signals, killed ranks, consistency checks."""

import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import pytest
from support.encoders import NO_DROPOUT, save_small_encoder
from support.folders import ROOT
from support.processes import begin, end, promcse
from support.runs import KILL_AT_STEP, outcome, small_config, word_rows
from support.shadows import imported_shadows, write_shadows

from promcse_pl.config import Config
from promcse_pl.run_folder import is_running, read_config, read_history, read_status, write_config
from promcse_pl.runs.launcher import RankProcess, raise_failure, receive_error, send_error
from promcse_pl.runs.lifecycle import run_job
from promcse_pl.training.checkpoint import newest_checkpoint
from promcse_pl.utils import errors
from promcse_pl.utils.errors import DataError, LostRankError, NonFiniteError, OutOfMemoryError, RankError

KILLS = 4


def as_rank(rank: int, ranks: int, port: int) -> str:
    """What torchrun puts into the environment of a process."""
    given = {
        "RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return f"import os; os.environ.update({ {name: str(value) for name, value in given.items()} })\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def begin_ranks(log: Path, *arguments: object, ranks: int = 2, before: str = "") -> list:
    """Start `promcse ARGUMENTS` as the ranks of a run, as torchrun does."""
    port = free_port()
    return [
        begin(Path(f"{log}{rank}"), *arguments, before=as_rank(rank, ranks, port) + before) for rank in range(ranks)
    ]


def train(config: Path, folder: Path) -> tuple:
    return ("train", "--resume", folder) if (folder / "config.yaml").exists() else ("train", config, "--out", folder)


def ended(processes: list) -> list[int]:
    return [end(process) for process in processes]


def distributed(base: Path, ranks: int = 2, **sections: dict) -> Config:
    """27 steps in three epochs of 9, with dropout; 35 or 36 rows in batches of 4, and a last one of fewer rows than ranks."""
    (base / "train.csv").write_text("a,b,c\n" + "\n".join(word_rows(37)) + "\n")
    values = {
        "data": {"dev": "holdout", "batch_size": 4},
        "trainer": {"epochs": 3, "eval_every": 5, "save_every": 4, "log_every": 3, "devices": ranks},
    }
    return small_config(
        base, **{part: {**values.get(part, {}), **sections.get(part, {})} for part in {**values, **sections}}
    )


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> tuple[Path, Path]:
    """The config of a run of two processes and its uninterrupted run."""
    base = tmp_path_factory.mktemp("distributed")
    path = write_config(distributed(base), base / "start.yaml")
    assert ended(begin_ranks(base / "log", *train(path, base / "straight"))) == [0, 0]
    return path, base / "straight"


def test_only_rank_0_writes_and_prints_and_the_others_leave_nothing(long_run):
    config, straight = long_run
    names = {path.name for path in straight.iterdir()}
    assert names == {
        "adapter", "results.json", "metrics.jsonl", "config.yaml", "run.log", "status.json", "inputs.json", ".lock"
    }  # fmt: skip
    printed, other = (Path(f"{config.parent}/log{rank}.out").read_text() for rank in (0, 1))
    assert printed.count("dev set: ") == printed.count("adapter: ") == 1
    assert other == Path(f"{config.parent}/log1.err").read_text() == ""
    history = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history if "dev/spearman" in entry] == [5, 10, 15, 20, 25, 27]
    assert [entry["step"] for entry in history if "train/loss" in entry] == list(range(3, 28, 3))


@pytest.mark.parametrize("ranks", [2, 3])
def test_without_dropout_a_run_of_several_processes_is_the_run_of_one(ranks, tmp_path):
    save_small_encoder(tmp_path / "encoder", **NO_DROPOUT)
    # 13 rows in batches of 4: the last one has a row, fewer than ranks; each is counted once
    sections = {"data": {"dev": None}, "trainer": {"log_every": 1, "max_steps": 8}, "prompt": {"dropout": 0.0}}
    config = distributed(tmp_path, ranks, **sections)
    (tmp_path / "train.csv").write_text("a,b,c\n" + "\n".join(word_rows(13)) + "\n")
    path = write_config(config, tmp_path / "start.yaml")
    assert ended(begin_ranks(tmp_path / "log", *train(path, tmp_path / "several"), ranks=ranks)) == [0] * ranks
    run_job(single(config), tmp_path / "one")
    one, several = (read_history(tmp_path / name / "metrics.jsonl") for name in ("one", "several"))
    assert [entry["step"] for entry in several] == list(range(1, 9))
    for expected, found in zip(one, several, strict=True):
        for name in ("train/loss", "train/contrastive", "train/hinge", "train/gradient_norm", "train/lr"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), (expected["step"], name)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "several")]
    assert results[0]["steps"] == results[1]["steps"] == 8
    assert results[0]["rows"] == results[1]["rows"] == 13


def single(config: Config) -> Config:
    raw = config.to_dict()
    raw["trainer"]["devices"] = 1
    return Config.from_dict(raw)


def test_ranks_killed_at_any_moment_and_resumed_are_bit_identical_to_an_uninterrupted_run(long_run, tmp_path):
    config, straight = long_run
    chance, folder, killed_at = random.Random(os.environ.get("PROMCSE_SEED", "1")), tmp_path / "run", []
    for kill in range(KILLS):
        processes = begin_ranks(tmp_path / "log", *train(config, folder))
        wanted = kill * 5 // 4 * 4  # the launcher detects a rank that dies before the process group exists
        sign = folder / (f"checkpoints/step-{wanted}" if wanted else "inputs.json")
        while processes[0].is_alive() and not sign.exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        victim = chance.randrange(2)
        processes[victim].kill()
        began = time.monotonic()
        codes = ended(processes)
        assert codes[victim] == -signal.SIGKILL
        assert time.monotonic() - began < 10, "the other rank must not wait for ever"
        if codes[1 - victim]:  # it may have been done
            assert codes[1 - victim] == 2
            assert (
                "lost the connection to another process of the run"
                in Path(f"{tmp_path}/log{1 - victim}.err").read_text()
            )
        assert not is_running(folder)
        status = read_status(folder) if folder.exists() else None
        killed_at.append(status.step if status else None)
    assert ended(begin_ranks(tmp_path / "log", *train(config, folder))) == [0, 0]
    assert outcome(folder) == outcome(straight), f"killed at {killed_at}"
    assert len(set(killed_at)) > 2


def test_a_signal_to_one_rank_saves_and_stops_all_at_the_same_step(long_run, tmp_path):
    config, straight = long_run
    folder = tmp_path / "run"
    processes = begin_ranks(tmp_path / "log", *train(config, folder))
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.002)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert ended(processes) == [143, 143]
    status = read_status(folder)
    assert status.state == "stopped"
    assert newest_checkpoint(folder).step == status.step > 0
    assert ended(begin_ranks(tmp_path / "log", *train(config, folder))) == [0, 0]
    assert outcome(folder) == outcome(straight)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_resumed_run_of_three_ranks_is_bit_identical(tmp_path):
    config = write_config(distributed(tmp_path, 3), tmp_path / "start.yaml")
    assert ended(begin_ranks(tmp_path / "log", *train(config, tmp_path / "straight"), ranks=3)) == [0, 0, 0]
    processes = begin_ranks(tmp_path / "log", *train(config, tmp_path / "run"), ranks=3)
    while not (tmp_path / "run/checkpoints/step-8").exists():
        time.sleep(0.002)
    processes[2].kill()
    assert ended(processes) == [2, 2, -signal.SIGKILL]
    assert ended(begin_ranks(tmp_path / "log", *train(config, tmp_path / "run"), ranks=3)) == [0, 0, 0]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "straight")


@pytest.mark.parametrize("what", ["config", "data"])
def test_ranks_with_different_settings_stop_before_training(what, tmp_path):
    raw = distributed(tmp_path).to_dict()
    if what == "config":
        other = Config.from_dict({**raw, "loss": {**raw["loss"], "temperature": 0.1}})
    else:  # the same settings, but another file at the same relative path
        shutil.copytree(tmp_path / "encoder", tmp_path / "there/encoder")
        (tmp_path / "there/train.csv").write_text("a,b,c\n" + "\n".join(word_rows(30)) + "\n")
        raw["data"]["train"], raw["model"]["path"] = "train.csv", "encoder"
        other = Config.from_dict(raw)
    configs = [write_config(Config.from_dict(raw), tmp_path / "0.yaml"), write_config(other, tmp_path / "1.yaml")]
    port = free_port()
    processes = [
        begin(
            tmp_path / f"log{rank}", "train", configs[rank], "--out", tmp_path / "run",
            before=as_rank(rank, 2, port) + f"os.chdir({str(tmp_path / ('there' if rank and what == 'data' else ''))!r})",
        )
        for rank in range(2)
    ]  # fmt: skip
    assert ended(processes) == [2, 2]
    for rank in range(2):
        error = Path(f"{tmp_path}/log{rank}.err").read_text()
        assert error.startswith("error: rank 1 differs from rank 0 (")
        assert ("loss.temperature: 0.05 and 0.1; config sha256: " if what == "config" else "data.train: ") in error
        assert "Traceback" not in error
    if what == "config":  # corrected settings can be run in the same folder
        assert not (tmp_path / "run").exists()
    else:
        assert read_status(tmp_path / "run").state == "failed"
        assert not (tmp_path / "run/metrics.jsonl").exists()


def test_another_number_of_processes_than_the_run_began_with_is_refused_by_name(long_run, tmp_path):
    _, straight = long_run
    folder = shutil.copytree(straight, tmp_path / "run")
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "state": "stopped"}))
    before = as_rank(0, 3, free_port())
    refused = promcse(tmp_path / "log", "train", "--resume", folder, before=before)
    assert refused.code == 2
    assert "torchrun started 3 processes, but trainer.devices=2 x trainer.num_nodes=1 are 2" in refused.stderr
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("devices: 2", "devices: 1"))
    refused = promcse(tmp_path / "log", "train", "--resume", folder)
    assert refused.code == 2
    assert "config.yaml was changed since the run started: trainer.devices. " in refused.stderr
    assert DataError.__name__ in read_status(folder).error


# --- the launcher: `python run.py trainer=ddp`, no torchrun ------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Return the living processes whose parent a process is."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_setting_that_the_encoder_refuses_leaves_no_folder_of_a_run_on_two_ranks(tmp_path):
    config = write_config(distributed(tmp_path, model={"default_prompt": "qury"}), tmp_path / "wrong.yaml")
    refused = promcse(tmp_path / "log", "train", config, "--out", tmp_path / "run")
    assert refused.code == 2
    assert refused.stderr.startswith("error: model.default_prompt must be the name of a prompt")
    assert "nothing was trained" not in refused.stdout
    assert not (tmp_path / "run").exists()


SLEEPING_RANKS = f"""
import os
from promcse_pl.runs import launcher
real = launcher.python_command
launcher.python_command = lambda target, *arguments: real("support.scripted_jobs:sleeping_rank", *arguments)
os.environ["PYTHONPATH"] = {str(ROOT / "tests")!r}
"""
"""The launcher starts new processes in the same way, but they import no torch and train nothing."""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_the_launcher_passes_a_signal_on_and_leaves_no_orphan_if_killed(signum, code, long_run, tmp_path):
    folder = tmp_path / "run"
    starter = begin(tmp_path / "log", *train(long_run[0], folder), before=SLEEPING_RANKS)
    while not all((folder / f"{rank}.pid").exists() and (folder / f"{rank}.pid").read_text() for rank in (0, 1)):
        assert starter.is_alive(), Path(f"{tmp_path}/log.err").read_text()
        time.sleep(0.01)
    ranks = [int((folder / f"{rank}.pid").read_text()) for rank in (0, 1)]
    assert is_running(folder)
    os.kill(starter.pid, signum)
    assert end(starter) == code
    deadline = time.monotonic() + 5
    while any(map(alive, ranks)) or is_running(folder):
        assert time.monotonic() < deadline, "orphans"
        assert signum == signal.SIGKILL, "the launcher must wait for the ranks"
        time.sleep(0.01)


@pytest.mark.slow
def test_the_launcher_stops_all_ranks_if_one_dies_and_they_import_nothing_from_the_current_folder(long_run, tmp_path):
    config, straight = long_run
    folder, here = tmp_path / "run", tmp_path / "here"
    here.mkdir()
    write_shadows(here)
    starter = begin(tmp_path / "log", *train(config, folder), before=f"import os; os.chdir({str(here)!r})")
    while not (folder / "checkpoints/step-8").exists():
        assert starter.is_alive(), Path(f"{tmp_path}/log.err").read_text()
        time.sleep(0.002)
    ranks = children(starter.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    assert end(starter) == 2
    assert time.monotonic() - began < 15
    error = Path(f"{tmp_path}/log.err").read_text()
    assert "error: rank 1 of 2 was killed by SIGKILL (exit code -9)" in error
    assert f"python run.py resume={folder}" in error
    assert read_status(folder).error.startswith("RankError: rank 1 of 2 was killed by SIGKILL")
    assert not any(map(alive, ranks))
    assert imported_shadows(here) == []
    (folder / "run-rank1.log").unlink()  # kept, because the run failed
    assert ended(begin_ranks(tmp_path / "log", *train(config, folder))) == [0, 0]
    assert outcome(folder) == outcome(straight)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_whose_launcher_is_killed_and_later_stopped_is_bit_identical_to_an_uninterrupted_run(long_run, tmp_path):
    config, straight = long_run
    folder = tmp_path / "run"
    for signum, code, saved in ((signal.SIGKILL, -signal.SIGKILL, "step-4"), (signal.SIGTERM, 143, "step-16")):
        starter = begin(tmp_path / "log", *train(config, folder))
        # the save may be of the process before, which went on until it was killed
        while len(ranks := children(starter.pid)) < 2 or not (folder / "checkpoints" / saved).exists():
            assert starter.is_alive(), Path(f"{tmp_path}/log.err").read_text()
            time.sleep(0.002)
        os.kill(starter.pid, signum)
        assert end(starter) == code
        deadline = time.monotonic() + 5
        while any(map(alive, ranks)) or is_running(folder):
            assert time.monotonic() < deadline, "orphans"
            time.sleep(0.01)
    assert read_status(folder).state == "stopped"
    assert ended(begin_ranks(tmp_path / "log", *train(config, folder))) == [0, 0]
    assert outcome(folder) == outcome(straight)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_job_of_a_multirun_trains_one_run_on_both_ranks_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_small_encoder(tmp_path / "encoder", **NO_DROPOUT)
    (tmp_path / "train.csv").write_text("a,b,c\n" + "\n".join(word_rows(11)) + "\n")
    arguments = [
        "-m", "seed=1,2", "trainer=ddp", "trainer.devices=2", "trainer.epochs=2", "trainer.max_steps=4",
        "trainer.log_every=1", "data=triplets",
        "data.train=train.csv", "data.dev=null", "data.max_length=16", "data.batch_size=4", "data.cache_dir=cache",
        "model.path=encoder", "prompt.dropout=0", "trainer.precision=float32", "trainer.device=cpu",
        "tracking.wandb=offline", "hydra.sweep.dir=sweep",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = sorted(path.parent for path in (tmp_path / "sweep").rglob("results.json"))
    assert len(runs) == 2
    losses = []
    for run, seed in zip(runs, (1, 2), strict=True):
        config = read_config(run / "config.yaml")
        assert (config.seed, config.trainer.devices) == (seed, 2)
        assert not list(run.glob("run-rank*"))
        assert [path.name.split("-")[-1] for path in run.glob("wandb/offline-run-*")] == [read_status(run).wandb_id]
        # had a rank trained something else, no step would have the loss that a single process finds
        untracked = replace(single(config), tracking=replace(config.tracking, wandb="disabled"))
        one = run_job(untracked, tmp_path / f"one{seed}")
        assert one["steps"] == 4
        losses.append([entry["train/loss"] for entry in read_history(run / "metrics.jsonl")])
        alone = [entry["train/loss"] for entry in read_history(tmp_path / f"one{seed}/metrics.jsonl")]
        assert losses[-1] == pytest.approx(alone, rel=1e-4)
    assert losses[0] != losses[1]


NOT_FINITE = NonFiniteError("the loss of step 3")
DEFECT = RankError("RuntimeError: a defect")
LOST = LostRankError("rank 0 of 2 lost the connection to another process of the run (closed)")


@pytest.mark.parametrize(
    ("reported", "codes", "kind", "message"),
    [
        ((NOT_FINITE, NOT_FINITE), [2, 2], NonFiniteError, "^the loss of step 3$"),
        (
            (LOST, OutOfMemoryError("out of memory. Try: less")),
            [2, 2],
            RankError,
            r"^rank 1 of 2 ended with exit code 2: out of memory\. Try: less \(its output: .*run-rank1\.log\)\. To resume",
        ),
        ((LOST, None), [2, -11], RankError, "by SIGSEGV"),
        ((DataError("the disk"), RankError("RuntimeError: nothing known")), [2, -9], RankError, "^rank 1 of 2 was killed"),
        ((DEFECT, None), [1, 0], RankError, "^rank 0 of 2 ended with exit code 1: RuntimeError: a defect"),
    ],
)  # fmt: skip
def test_the_error_is_that_of_the_rank_that_failed_by_itself(reported, codes, kind, message, tmp_path):
    (tmp_path / "run-rank1.log").write_text("INFO\n")
    with pytest.raises(kind, match=message):
        raise_failure(tmp_path, [rank for rank, code in enumerate(codes) if code], codes, reported)


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PromcseError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_a_rank_reaches_the_launcher_with_its_class(kind):
    receiver, sender = Pipe(duplex=False)
    send_error(sender, kind("a cause \udc80 é"))
    error = receive_error(receiver)
    assert type(error) is kind
    assert str(error) == "a cause ? é"


@pytest.mark.parametrize("character", ["x", "\x1b", "\U0001f600"])
def test_a_long_error_is_cut_so_that_the_pipe_holds_it_unread(character):
    receiver, sender = Pipe(duplex=False)
    os.set_blocking(sender.fileno(), False)
    send_error(sender, DataError(character * 100_000))
    assert str(receive_error(receiver)) == character * 3000


def test_an_error_of_an_unknown_class_is_a_rank_error():
    receiver, sender = Pipe(duplex=False)
    sender.send_bytes(b'["KeyboardInterrupt", "text"]')
    assert type(receive_error(receiver)) is RankError


@pytest.mark.parametrize(
    "sent",
    [b"", struct.pack("!i", 50) + b'["DataEr', b"\0\0", struct.pack("!i", 3) + b"[1]", struct.pack("!i", 2) + b"\xff{"],
    ids=["nothing", "cut text", "cut header", "another value", "not JSON"],
)
def test_a_rank_that_is_killed_while_it_reports_has_no_error(sent, tmp_path, monkeypatch):
    def write(_command, environment, **_options):
        os.write(int(environment["PROMCSE_ERROR_PIPE"]), sent)
        return type("Child", (), {"poll": lambda _self: -9})()

    monkeypatch.setattr("promcse_pl.runs.launcher.start_process", write)
    process = RankProcess(tmp_path, 0, 2, 0, tmp_path / "store")
    assert [process.poll(), process.poll()] == [-9, -9]
    assert process.error is None


BEST_AT_STEP_5 = """
from promcse_pl.training.callbacks import BestByDev
BestByDev._score = lambda watch, module: -abs(module.global_step - 5) / 100
"""


@pytest.mark.slow
def test_all_ranks_stop_early_after_the_same_step(tmp_path):
    path = write_config(distributed(tmp_path, trainer={"patience": 2}), tmp_path / "start.yaml")
    straight, folder = tmp_path / "straight", tmp_path / "run"
    assert ended(begin_ranks(tmp_path / "log", *train(path, straight), before=BEST_AT_STEP_5)) == [0, 0]
    results = json.loads((straight / "results.json").read_text())
    assert (results["steps"], results["best_step"]) == (15, 5)
    killed = begin_ranks(tmp_path / "log", *train(path, folder), before=BEST_AT_STEP_5 + KILL_AT_STEP.format(step=9))
    assert ended(killed) == [143, 143]
    assert ended(begin_ranks(tmp_path / "log", *train(path, folder), before=BEST_AT_STEP_5)) == [0, 0]
    assert outcome(folder) == outcome(straight)
