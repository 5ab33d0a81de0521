"""A run that was killed and resumed equals the uninterrupted run, byte for byte except for times."""

import argparse
import dataclasses
import importlib
import json
import multiprocessing as mp
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.processes import PROCESSES, end
from support.runs import left, outcome, small_config, word_rows

from promcse_pl.cli import evaluate
from promcse_pl.config import Config
from promcse_pl.run_folder import is_running, locked, read_config, read_status, write_config, write_status
from promcse_pl.runs.lifecycle import resume_job, run_job
from promcse_pl.training.checkpoint import RunCheckpoints, newest_checkpoint
from promcse_pl.utils.errors import AdapterError, ConfigError, DataError, PromcseError
from promcse_pl.utils.signals import Stopped

KILLS, RUNS = (20, 3) if os.environ.get("PROMCSE_TESTS") == "all" else (8, 2)


def go(config: Path, folder: Path, die_at: int | None = None, die_in: str | None = None) -> None:
    """Start or resume a run in this process; die at the n-th file operation in the run folder, or in a part."""
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    if die_at is not None:
        left = [die_at]

        def count(event: str, arguments: tuple) -> None:
            if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate") and str(
                folder
            ) in str(arguments[0]):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
    if die_in is not None:
        module, name = die_in.split(":")
        setattr(importlib.import_module(module), name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    try:
        resume_job(folder) if (folder / "config.yaml").exists() else run_job(read_config(config), folder)
    except Stopped as stopped:
        os._exit(stopped.exit_code)
    except PromcseError:
        os._exit(2)


def start(*arguments: object) -> mp.Process:
    process = PROCESSES.Process(target=go, args=arguments)
    process.start()
    return process


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> tuple[Path, Path]:
    """The config of a run of 27 steps in three epochs of 9 with dropout, and its uninterrupted run.

    Evaluations and saves fall on different steps.
    """
    base = tmp_path_factory.mktemp("resume")
    (base / "train.csv").write_text("a,b,c\n" + "\n".join(word_rows(18)) + "\n")
    config = small_config(
        base,
        data={"dev": "holdout", "batch_size": 2},
        trainer={"epochs": 3, "eval_every": 5, "save_every": 4, "log_every": 3},
    )
    path = write_config(config, base / "start.yaml")
    assert end(start(path, base / "straight")) == 0
    return path, base / "straight"


def test_the_uninterrupted_run_covers_the_hard_cases_of_resuming(long_run):
    _, straight = long_run
    history = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history if "dev/spearman" in entry] == [5, 10, 15, 20, 25, 27]
    assert [entry["step"] for entry in history if "train/loss" in entry] == [3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert read_status(straight).state == "finished"
    assert not (straight / "checkpoints").exists()


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"prompt": {"kind": "shared"}}, id="shared", marks=pytest.mark.exhaustive),
        pytest.param(
            {"prompt": {"kind": "input"}, "model": {"head": "low_rank", "head_rank": 2}}, id="input and low_rank"
        ),
    ],
)
def test_a_resumed_run_of_another_kind_of_prompt_is_bit_identical(tmp_path, sections):
    config = small_config(
        tmp_path,
        data={"dev": "holdout", "batch_size": 2},
        trainer={"save_every": 1, "eval_every": 2},
        **sections,
    )
    path = write_config(config, tmp_path / "start.yaml")
    assert end(start(path, tmp_path / "straight")) == 0
    folder = tmp_path / "killed"  # at the first dev evaluation, step 2, with the checkpoint of step 1
    assert end(start(path, folder, None, "promcse_pl.training.callbacks:save_adapter")) == -signal.SIGKILL
    assert end(start(path, folder)) == 0
    assert outcome(folder) == outcome(tmp_path / "straight")


@pytest.mark.slow
def test_a_run_killed_at_any_moment_and_resumed_is_bit_identical_to_an_uninterrupted_run(long_run, tmp_path):
    config, straight = long_run
    chance, kills, runs, killed_at = random.Random(os.environ.get("PROMCSE_SEED", "1")), 0, 0, []
    began = time.perf_counter()
    assert end(start(config, tmp_path / "timed")) == 0
    length = time.perf_counter() - began
    while kills < KILLS or runs < RUNS or (len(set(killed_at)) <= 3 and runs < 5 * RUNS):
        folder = tmp_path / f"run{runs}"
        for attempt in range(8):  # most runs are resumed several times
            by_time = attempt % 2 == 0
            process = start(config, folder, None if by_time else chance.randint(1, 250))
            if by_time:
                process.join(chance.uniform(0.1, 1.0) * length)
                process.kill()
            code = end(process)
            if code == 0:
                break
            assert code == -signal.SIGKILL
            kills += 1
            status = read_status(folder) if folder.exists() else None
            killed_at.append(status.step if status else None)
            assert not is_running(folder)
        else:
            assert end(start(config, folder)) == 0
        assert outcome(folder) == outcome(straight), f"run {runs}, killed at {killed_at}"
        runs += 1
    print(f"\n{kills} kills in {runs} runs; saved steps when killed: {killed_at}")
    assert len(set(killed_at)) > 3, "the kills must fall into different parts of a run"


PARTS = {
    "a dev evaluation": "promcse_pl.training.callbacks:score_dev",
    "a save, before its files": "promcse_pl.training.checkpoint:save",
    "a save, behind its files": "promcse_pl.training.checkpoint:publish",
    "the saving of the adapter": "promcse_pl.adapter:_checksum",
    "the last evaluation": "promcse_pl.evaluation.suite:evaluate",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, id=name, marks=[] if name.startswith("a save") else [pytest.mark.exhaustive])
        for name, part in PARTS.items()
    ],
)
def test_a_run_killed_during_an_evaluation_or_save_is_bit_identical_to_an_uninterrupted_run(part, long_run, tmp_path):
    config, straight = long_run
    folder = tmp_path / "run"
    assert end(start(config, folder, None, part)) == -signal.SIGKILL
    assert read_status(folder).state == "running"
    assert end(start(config, folder)) == 0
    assert outcome(folder) == outcome(straight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGUSR1, 143, marks=pytest.mark.exhaustive), (signal.SIGINT, 130)],
    ids=["TERM", "USR1", "INT"],
)
def test_a_signal_saves_a_checkpoint_sets_the_exit_code_and_loses_no_step(signum, code, long_run, tmp_path):
    config, straight = long_run
    folder = tmp_path / "run"
    process = start(config, folder)
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.005)
    os.kill(process.pid, signum)
    assert end(process) == code
    status = read_status(folder)
    assert status.state == "stopped"
    assert newest_checkpoint(folder).step == status.step > 0
    assert (
        (folder / "run.log").read_text().endswith(f"to resume: python run.py resume={folder}\n")
    )  # no ERROR behind it
    assert end(start(config, folder)) == 0
    assert outcome(folder) == outcome(straight)


@pytest.fixture(scope="module")
def killed_run(long_run, tmp_path_factory) -> Path:
    """A run that died behind its second save."""
    config, _ = long_run
    folder = tmp_path_factory.mktemp("killed") / "run"
    process = start(config, folder)
    while not (folder / "checkpoints/step-8").exists():
        time.sleep(0.002)
    process.kill()
    end(process)
    return folder


@pytest.fixture
def stopped_run(killed_run, tmp_path) -> Path:
    """A copy of the killed run, which a test may resume or damage."""
    return shutil.copytree(killed_run, tmp_path / "stopped", symlinks=True)


def test_times_are_those_of_all_processes_without_the_time_between_them(stopped_run, long_run):
    config, straight = long_run
    newest = newest_checkpoint(stopped_run)
    checkpoints = RunCheckpoints(stopped_run)
    state = checkpoints.load_checkpoint(newest.path)
    saver = state["callbacks"]["Saver"]
    assert 0 < saver["seconds"] < saver["run_seconds"]
    saver["seconds"], saver["run_seconds"] = 5000.0, 7000.0  # a long run that was resumed after a day
    checkpoints.save_checkpoint(state, newest.path)
    day = 24 * 3600
    before = read_status(stopped_run)
    standing = dataclasses.replace(before, started=before.started - day)
    worked = before.updated - before.started
    (stopped_run / "status.json").write_text(
        json.dumps({**dataclasses.asdict(standing), "updated": before.updated - day})
    )
    assert end(start(config, stopped_run)) == 0
    assert outcome(stopped_run) == outcome(straight)
    results = json.loads((stopped_run / "results.json").read_text())
    assert 5000 < results["training_seconds"] < 6000
    assert 7000 < results["seconds"] < 8000
    lines = (stopped_run / "run.log").read_text().splitlines()
    seconds = [int(line.split(", ")[-1].removesuffix(" s")) for line in lines if " of 27: loss" in line]
    assert seconds == sorted(seconds)
    assert 5000 <= seconds[-1] < 6000
    after = read_status(stopped_run)
    assert worked < after.updated - after.started < worked + 600


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_skipped_for_the_previous_one(stopped_run, long_run):
    config, straight = long_run
    newest = newest_checkpoint(stopped_run)
    tensors = newest.path / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    assert newest_checkpoint(stopped_run).step == newest.step - 4
    assert end(start(config, stopped_run)) == 0
    assert outcome(stopped_run) == outcome(straight)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_without_a_valid_checkpoint_the_run_starts_over(name, stopped_run, long_run):
    config, straight = long_run
    for path in (stopped_run / "checkpoints").iterdir():
        (path / name).write_bytes((path / name).read_bytes()[:-7])
    assert newest_checkpoint(stopped_run) is None
    assert end(start(config, stopped_run)) == 0
    assert outcome(stopped_run) == outcome(straight)


@pytest.mark.slow
@pytest.mark.parametrize("all_lost", [False, True])
def test_checkpoints_newer_than_a_truncated_history_are_not_used(all_lost, stopped_run, long_run):
    config, straight = long_run
    history = stopped_run / "metrics.jsonl"
    older = newest_checkpoint(stopped_run).step - 4
    if all_lost:
        history.unlink()
    else:  # a power cut may keep the checkpoint's file and lose the end of this one
        history.write_bytes(history.read_bytes()[: newest_checkpoint(stopped_run).history_bytes - 1])
    found = newest_checkpoint(stopped_run)
    assert found is None if all_lost else found.step == older
    assert end(start(config, stopped_run)) == 0
    assert outcome(stopped_run) == outcome(straight)


def test_a_resumed_run_leaves_files_that_it_did_not_write(stopped_run, long_run):
    config, straight = long_run
    mine = [".git/HEAD", ".env", ".venv/bin/python", ".status.json.tmp", "notes/x.txt", "checkpoints/notes/x.txt"]
    for name in mine:
        (stopped_run / name).parent.mkdir(parents=True, exist_ok=True)
        (stopped_run / name).write_text("mine")
    leftover = stopped_run / ".promcse_pl-0123456789abcdef"
    leftover.write_text("of a killed process")
    assert end(start(config, stopped_run)) == 0
    assert [(stopped_run / name).read_text() for name in mine] == ["mine"] * len(mine)
    assert not leftover.exists()
    assert not [path for path in (stopped_run / "checkpoints").iterdir() if path.name != "notes"]
    kept = {name.split("/")[0] for name in mine}
    assert outcome(stopped_run) | {"left": left(stopped_run) - kept} == outcome(straight)


def test_an_unrelated_adapter_folder_is_rejected_before_training(stopped_run):
    shutil.rmtree(stopped_run / "adapter")
    (stopped_run / "adapter").mkdir()
    (stopped_run / "adapter/chapter.txt").write_text("mine")
    history = (stopped_run / "metrics.jsonl").read_bytes()
    with pytest.raises(AdapterError, match="adapter already exists and is not overwritten"):
        resume_job(stopped_run)
    assert (stopped_run / "adapter/chapter.txt").read_text() == "mine"
    assert (stopped_run / "metrics.jsonl").read_bytes() == history


def test_a_history_that_is_a_folder_is_an_error(stopped_run):
    (stopped_run / "metrics.jsonl").unlink()
    (stopped_run / "metrics.jsonl").mkdir()
    with pytest.raises(DataError, match=r"metrics.jsonl cannot be written: Is a directory"):
        resume_job(stopped_run)


def test_other_entries_of_the_checkpoints_folder_are_kept(stopped_run, long_run):
    config, straight = long_run
    for name in ("step-old", "step-", "step-٣", "notes"):
        (stopped_run / "checkpoints" / name).mkdir()
    assert end(start(config, stopped_run)) == 0
    assert {path.name for path in (stopped_run / "checkpoints").iterdir()} == {"step-old", "step-", "step-٣", "notes"}
    assert outcome(stopped_run) | {"left": left(stopped_run) - {"checkpoints"}} == outcome(straight)


def test_no_checkpoint_holds_the_frozen_encoder_or_a_pickle(stopped_run):
    newest = newest_checkpoint(stopped_run).path
    assert {path.name for path in newest.iterdir()} == {"tensors.safetensors", "state.json"}
    trained = sum(tensor.numel() for tensor in load_file(stopped_run / "adapter/adapter.safetensors").values())
    # values, two moments of AdamW and the best so far; beside them states of random generators
    stored = [tensor for tensor in load_file(newest / "tensors.safetensors").values() if tensor.is_floating_point()]
    assert sum(tensor.numel() for tensor in stored) <= 4 * trained + 100
    assert len(list((stopped_run / "checkpoints").iterdir())) <= 2


def test_a_changed_data_file_is_rejected_by_name_and_no_file_is_modified(stopped_run, long_run):
    config = read_config(long_run[0])
    train = Path(config.data.train)
    before, history = train.read_text(), (stopped_run / "metrics.jsonl").read_bytes()
    train.write_text(before.replace("w7", "w9"))
    try:
        with pytest.raises(DataError, match=rf"data\.train={re.escape(str(train))} has changed since the run in"):
            resume_job(stopped_run)
    finally:
        train.write_text(before)
    assert history.startswith((stopped_run / "metrics.jsonl").read_bytes())
    assert newest_checkpoint(stopped_run) is not None


def test_a_replaced_encoder_is_rejected_by_name(stopped_run, long_run):
    weights = Path(read_config(long_run[0]).model.path) / "model.safetensors"
    before = weights.read_bytes()
    tensors = load_file(weights)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, weights, metadata={"format": "pt"})
    try:
        with pytest.raises(DataError, match=r"model\.path=.* has changed since the run"):
            resume_job(stopped_run)
    finally:
        weights.write_bytes(before)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"hidden_act": "relu"}, "hidden_act in its config.json was gelu and is now relu"),
        ("config.json", {"hidden_dropout_prob": 0.3}, "hidden_dropout_prob in its config.json was 0.1 and is now 0.3"),
        ("tokenizer.json", {"normalizer": None}, "its tokenizer differs"),
    ],
)
def test_another_config_or_tokenizer_of_the_encoder_is_refused_by_name(stopped_run, long_run, name, change, message):
    path = Path(read_config(long_run[0]).model.path) / name
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), **change}))
    try:
        with pytest.raises(DataError, match=rf"model\.path=.* has changed since the run in .*: {message}"):
            resume_job(stopped_run)
    finally:
        path.write_text(before)


def test_a_run_of_an_earlier_version_that_recorded_only_weights_is_resumed(stopped_run):
    path = stopped_run / "inputs.json"
    inputs = json.loads(path.read_text())
    del inputs["model.path"]["config"], inputs["model.path"]["tokenizer"], inputs["evaluation.tasks"]
    path.write_text(json.dumps(inputs))
    assert resume_job(stopped_run)["steps"] == 27


def test_a_test_file_that_changed_is_refused_by_name(tmp_path):
    test_file = tmp_path / "test.tsv"
    test_file.write_text("".join(f"w{i} w{i + 1}\tw{i + 2}\t{i % 5}\n" for i in range(5, 25)))
    config = small_config(tmp_path, evaluation={"tasks": [str(test_file), "demo"]}, trainer={"save_every": 1})
    path = write_config(config, tmp_path / "start.yaml")
    process = start(path, tmp_path / "run", None, "promcse_pl.runs.pipeline:_evaluate")
    assert end(process) == -signal.SIGKILL
    before = test_file.read_text()
    test_file.write_text(before.replace("w7", "w9"))
    with pytest.raises(
        DataError, match=rf"{re.escape(str(test_file))} in evaluation\.tasks has changed since the run in"
    ):
        resume_job(tmp_path / "run")
    test_file.write_text(before)
    assert resume_job(tmp_path / "run")["scores"]["adapter"]["test.tsv"]


def test_a_setting_that_was_changed_by_hand_is_refused_by_name(stopped_run):
    path = stopped_run / "config.yaml"
    path.write_text(path.read_text().replace("temperature: 0.05", "temperature: 0.1"))
    with pytest.raises(DataError, match=r"config.yaml was changed since the run started: loss.temperature"):
        resume_job(stopped_run)


def test_a_second_process_is_rejected_while_the_first_is_running(stopped_run, long_run):
    with locked(stopped_run):
        assert is_running(stopped_run)
        process = start(long_run[0], stopped_run)
        assert end(process) == 2
        assert newest_checkpoint(stopped_run) is not None
    assert not is_running(stopped_run)


def test_resuming_a_finished_run_changes_nothing(long_run):
    _, straight = long_run
    before = outcome(straight)
    assert resume_job(straight)["steps"] == read_status(straight).steps
    assert outcome(straight) == before


def test_a_finished_run_without_results_says_how_to_evaluate_its_adapter(long_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(long_run[1], folder)
    (folder / "results.json").unlink()
    with pytest.raises(
        DataError, match=r"is finished, but its results\.json is missing.*: promcse evaluate .*/run"
    ) as caught:
        resume_job(folder)
    commands = argparse.ArgumentParser().add_subparsers()
    evaluate.add_parser(commands)
    commands.choices["evaluate"].parse_args(shlex.split(str(caught.value).partition("promcse evaluate ")[2]))


def test_a_run_that_fails_before_training_can_be_resumed_when_the_cause_is_fixed(tmp_path):
    config = small_config(tmp_path)
    weights = tmp_path / "encoder/model.safetensors"
    weights.rename(tmp_path / "model.safetensors")
    with pytest.raises(PromcseError):
        run_job(config, tmp_path / "run")
    advice = (
        "nothing was trained yet. If a setting is wrong, start a new run in another folder; otherwise fix the cause, then: "
        "python run.py resume="
    )
    assert advice in (tmp_path / "run/run.log").read_text()
    (tmp_path / "model.safetensors").rename(weights)
    assert resume_job(tmp_path / "run")["steps"] == 3


def test_a_setting_that_the_encoder_refuses_on_resume_keeps_the_folder(tmp_path):
    config = small_config(tmp_path, model={"default_prompt": "qury"})
    weights = tmp_path / "encoder/model.safetensors"
    weights.rename(tmp_path / "model.safetensors")
    with pytest.raises(PromcseError):
        run_job(config, tmp_path / "run")
    (tmp_path / "model.safetensors").rename(weights)
    before = left(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"model\.default_prompt"):
        resume_job(tmp_path / "run")
    assert left(tmp_path / "run") == before


def test_a_folder_without_a_run_is_refused_and_a_damaged_status_too(tmp_path, stopped_run):
    with pytest.raises(ConfigError, match=r"contains no run to resume: it has no config.yaml"):
        resume_job(tmp_path)
    (stopped_run / "status.json").write_text("{")
    with pytest.raises(DataError, match=r"status.json cannot be read: Expecting property name"):
        resume_job(stopped_run)


def test_a_new_run_does_not_start_in_the_folder_of_an_unfinished_one(stopped_run, long_run):
    with pytest.raises(
        ConfigError, match=r"already contains a run. Try: python run.py resume=.* to resume it, or another folder"
    ):
        run_job(read_config(long_run[0]), stopped_run)


def test_a_status_round_trips_through_its_file(tmp_path, long_run):
    status = read_status(long_run[1])
    write_status(tmp_path, status.at(3, 9))
    again = read_status(tmp_path)
    assert (again.step, again.steps, again.state, again.started) == (3, 9, status.state, status.started)
    assert Config.from_dict(read_config(long_run[0]).to_dict()).trainer.save_every == 4


EXACT = ["trainer.recompute=always", "trainer.save_every=3", "tracking.tags=[late]", "data.cache_dir=null"]


def test_execution_settings_can_be_changed_on_resume_with_a_bit_identical_result(
    stopped_run, long_run, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    resume_job(stopped_run, overrides=EXACT)
    wanted = outcome(long_run[1])
    for name in ("adapter.safetensors", "metrics.jsonl"):
        assert outcome(stopped_run)[name] == wanted[name]
    config = read_config(stopped_run / "config.yaml")
    assert (config.trainer.recompute, config.trainer.save_every, config.tracking.tags) == ("always", 3, ["late"])
    stored = json.loads((stopped_run / "inputs.json").read_text())["config"]
    assert (stored["trainer.recompute"], stored["trainer.save_every"]) == ("always", 3)
    log = (stopped_run / "run.log").read_text()
    assert "resumed with " in log
    assert "trainer.save_every=3 (was 4)" in log
    assert "will not be bit-identical" not in log


def test_changed_chunk_tokens_are_recorded_and_reported_to_change_the_dropout(stopped_run, long_run):
    resume_job(stopped_run, overrides=["trainer.chunk_tokens=12"])
    assert read_config(stopped_run / "config.yaml").trainer.chunk_tokens == 12
    assert json.loads((stopped_run / "inputs.json").read_text())["config"]["trainer.chunk_tokens"] == 12
    said = re.search(r"INFO resumed with (.*)", (stopped_run / "run.log").read_text())[1]
    assert said.startswith("trainer.chunk_tokens=12 (was ")
    assert said.endswith(
        "; the dropout masks change, so the result will not be bit-identical to that of an uninterrupted run"
    )
    assert outcome(stopped_run)["metrics.jsonl"] != outcome(long_run[1])["metrics.jsonl"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=0.1", r"optim\.lr=0\.1 cannot be changed when resuming, .* Allowed: data\.cache_dir, "),
        ("trainer.precision=float32", r"trainer\.precision=float32 cannot be changed when resuming"),
        ("evaluation.tasks=[demo]", r"evaluation\.tasks=\[demo\] cannot be changed when resuming"),
        ("trainer=cpu", r"trainer=cpu cannot be changed when resuming"),
        ("sweep.parallel=2", r"sweep\.parallel=2 cannot be changed when resuming"),
        ("trainer.recompute", r"trainer\.recompute cannot be changed when resuming"),
        ("trainer.chunk_token=8", r"trainer\.chunk_token is not a setting\. Did you mean trainer\.chunk_tokens"),
        ("trainer.chunk_tokens=0", r"trainer\.chunk_tokens must be at least 1, auto, or null, got 0"),
        ("trainer.chunk_tokens=", r"trainer\.chunk_tokens must be an integer or one of auto or null, got ''"),
        ("trainer.chunk_tokens=[", r"the value of trainer\.chunk_tokens cannot be read: '\['"),
    ],
)
def test_settings_that_affect_the_result_are_rejected_on_resume(override, message, stopped_run):
    before = (stopped_run / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=message):
        resume_job(stopped_run, overrides=[override])
    assert (stopped_run / "config.yaml").read_bytes() == before
