"""Searches: proposed jobs, pruning, and resuming."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import optuna
import pytest
from support.folders import ROOT
from support.sweep_jobs import SETTINGS, files, run, small_config

from promcse_pl.config import Config, SweepConfig
from promcse_pl.run_folder import Status, read_config, read_status, write_status
from promcse_pl.sweeps import execute, pool, search
from promcse_pl.sweeps.plan import SharedSettings, read_plan
from promcse_pl.sweeps.pool import Task
from promcse_pl.sweeps.search import Interval, corners, run_search
from promcse_pl.utils.errors import ConfigError

SPACE = {
    "seed": ["3"],
    "optim.lr": Interval(1e-3, 1e-1, log=True),
    "prompt.length": Interval(4.0, 8.0),
    "loss.margin": ["0.1", "0.2"],
}


def compose_in(folder: Path):
    def compose(overrides):
        values = dict(entry.split("=") for entry in overrides)
        return small_config(
            folder,
            data={"dev": "holdout"},
            optim={"lr": float(values["optim.lr"])},
            prompt={"length": int(values["prompt.length"])},
            loss={"margin": float(values["loss.margin"])},
        )

    return compose


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """A search of quick jobs: the third one is poor."""
    files(tmp_path)

    def task(folder: Path, job) -> Task:
        run = folder / job.folder
        good = "poor" if job.folder == "2" else "good"
        return Task(job.folder, "support.scripted_jobs:quick_run", [str(run), good], run / "output.log")

    monkeypatch.setattr(execute, "job_task", task)
    monkeypatch.setattr(pool, "PRELOAD", ())
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/tests")

    def go(folder: Path, **settings: object) -> int:
        return run_search(folder, ["sweep=x"], SPACE, SweepConfig(**settings), compose_in(tmp_path), None)

    return go


def study(folder: Path) -> optuna.Study:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "search.journal")))
    return optuna.load_study(storage=storage, study_name="sweep")


def measured(folder: Path, pool: pool.Pool, configs: Iterable[Config]) -> SharedSettings:
    """In place of `measure_shared`, which imports torch in a process of its own."""
    return SharedSettings(parallel=1, threads=1, share=1, precision={"auto": "float32"})


@pytest.mark.slow
def test_a_poor_job_is_pruned_with_a_checkpoint_and_not_failed(scripted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search, "measure_shared", measured)
    assert scripted(tmp_path / "sweep", trials=4) == 0
    states = [trial.state.name for trial in study(tmp_path / "sweep").trials]
    assert states == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]
    assert read_status(tmp_path / "sweep/2").state == "pruned"
    assert "3 finished, 1 pruned" in capsys.readouterr().out
    assert [job.folder for job in read_plan(tmp_path / "sweep").jobs] == ["0", "1", "2", "3"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_search_proposes_in_its_space_and_a_resumed_one_the_same_as_one_that_was_not_stopped(scripted, tmp_path):
    scripted(tmp_path / "whole", trials=5)
    scripted(tmp_path / "parts", trials=2)
    scripted(tmp_path / "parts", trials=5, resume="parts")
    scripted(tmp_path / "other", trials=5, seed=7)
    plan = read_plan(tmp_path / "whole")
    assert read_plan(tmp_path / "parts").jobs == plan.jobs
    assert read_plan(tmp_path / "other").jobs != plan.jobs
    assert len({tuple(job.overrides) for job in plan.jobs}) == 5
    for job in plan.jobs:
        values = dict(entry.split("=") for entry in job.overrides)
        assert values["seed"] == "3"
        assert 1e-3 <= float(values["optim.lr"]) <= 1e-1
        assert 4 <= int(values["prompt.length"]) <= 8
        assert values["loss.margin"] in ("0.1", "0.2")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_results_that_a_killed_search_did_not_record_are_recorded_on_resume(scripted, tmp_path, monkeypatch):
    monkeypatch.setattr(search.Search, "_record", lambda *_: None)
    scripted(tmp_path / "sweep", trials=2)
    monkeypatch.undo()
    assert [trial.state.name for trial in study(tmp_path / "sweep").trials] == ["RUNNING", "RUNNING"]
    before = (tmp_path / "sweep/1/results.json").stat().st_mtime_ns
    run_search(tmp_path / "sweep", [], SPACE, SweepConfig(trials=2, resume="x"), compose_in(tmp_path), None)
    assert [trial.value for trial in study(tmp_path / "sweep").trials] == [80.0, 80.0]
    assert (tmp_path / "sweep/1/results.json").stat().st_mtime_ns == before


def test_a_launcher_gets_every_job_and_what_failed_is_tried_again(tmp_path):
    files(tmp_path)
    launched: list[list[str]] = []

    def launch(jobs):
        launched.append([job.folder for job in jobs])
        for job in jobs:
            failed = job.folder == "1" and len(launched) <= 2
            (tmp_path / "sweep" / job.folder / "results.json").write_text(json.dumps({"dev_spearman": 70.0}))
            write_status(tmp_path / "sweep" / job.folder, Status(state="failed" if failed else "finished"))

    def go(**settings: object) -> int:
        settings = SweepConfig(trials=5, parallel=2, **settings)
        return run_search(tmp_path / "sweep", ["x"], SPACE, settings, compose_in(tmp_path), launch)

    assert go() == 1
    assert launched == [["0", "1"], ["2", "3"], ["4"]]
    (tmp_path / "sweep/1/status.json").write_text("[]")  # damaged
    assert go(resume="x") == 0
    assert launched[3:] == [["1"]]
    assert {trial.state.name for trial in study(tmp_path / "sweep").trials} == {"COMPLETE"}


def finish(folder: Path, jobs) -> None:
    for job in jobs:
        (folder / job.folder / "results.json").write_text(json.dumps({"dev_spearman": 70.0}))
        write_status(folder / job.folder, Status(state="finished"))


def test_a_search_that_was_stopped_between_jobs_prints_how_to_resume_it(tmp_path, capsys):
    files(tmp_path)

    def launch(jobs):
        finish(tmp_path / "sweep", jobs)
        raise KeyboardInterrupt

    settings = SweepConfig(trials=5, parallel=2)
    assert run_search(tmp_path / "sweep", ["x"], SPACE, settings, compose_in(tmp_path), launch) == 130
    assert "to run the 3 unfinished jobs: python run.py -m sweep.resume=" in capsys.readouterr().out


def test_an_error_of_a_launcher_is_a_warning_and_the_states_of_the_jobs_count(tmp_path, capsys):
    files(tmp_path)

    def launch(jobs):
        finish(tmp_path / "sweep", jobs)
        raise RuntimeError("job 7 has no result\nand a long log")

    settings = SweepConfig(trials=2)
    assert run_search(tmp_path / "sweep", ["x"], SPACE, settings, compose_in(tmp_path), launch) == 0
    assert capsys.readouterr().out.count("warning: the launcher failed: RuntimeError: job 7 has no result\n") == 2


def test_a_search_whose_trials_were_all_left_out_is_an_error(tmp_path):
    files(tmp_path)
    compose, composed = compose_in(tmp_path), []

    def picky(overrides):
        composed.append(overrides)
        if len(composed) > 2:  # the corners
            raise ConfigError("these exclude each other")
        return compose(overrides)

    with pytest.raises(ConfigError, match="all 3 trials were left out"):
        run_search(tmp_path / "sweep", ["x"], SPACE, SweepConfig(trials=3), picky, lambda _: None)


@pytest.mark.slow
def test_settings_that_exclude_each_other_are_left_out_and_the_search_goes_on(scripted, tmp_path, monkeypatch, capsys):
    compose = compose_in(tmp_path)
    composed: list[object] = []

    def picky(overrides):
        composed.append(overrides)
        if len(composed) == 4:  # two corners, one job, then this one
            raise ConfigError("these exclude each other")
        return compose(overrides)

    monkeypatch.setattr(search, "measure_shared", measured)
    assert run_search(tmp_path / "sweep", ["x"], SPACE, SweepConfig(trials=2), picky, None) == 0
    assert [trial.state.name for trial in study(tmp_path / "sweep").trials] == ["COMPLETE", "FAIL"]
    assert "is left out: these exclude each other" in capsys.readouterr().out
    assert [job.folder for job in read_plan(tmp_path / "sweep").jobs] == ["0"]


def test_the_dev_evaluation_after_the_last_step_prunes_nothing(tmp_path):
    write_status(tmp_path, Status(state="running", step=50, steps=100))
    entries = [{"step": step, "dev/spearman": 1.0} for step in (30, 100)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert search.dev_evaluations(tmp_path) == [(30, 1.0)]


def test_every_value_and_both_ends_of_every_range_are_checked_before_the_first_job(tmp_path):
    assert list(corners({**SPACE, "prompt.length": Interval(4, 8)})) == [
        ["seed=3", "optim.lr=0.001", "prompt.length=4", "loss.margin=0.1"],
        ["seed=3", "optim.lr=0.1", "prompt.length=8", "loss.margin=0.2"],
    ]
    files(tmp_path)
    with pytest.raises(ConfigError, match=r"no job was started.*loss.margin must be in \[0, 2\]"):
        run_search(
            tmp_path / "s",
            [],
            {**SPACE, "loss.margin": ["0.1", "3"]},
            SweepConfig(trials=1),
            compose_in(tmp_path),
            None,
        )
    for key, values, message in (
        (
            "optim.lr",
            Interval(3e-2, 1e-3),
            r"^optim.lr=interval\(0.03,0.001\) must have two numbers, the smaller one first",
        ),
        ("optim.lr", Interval(1e-3, math.inf), "must have two numbers"),
        ("optim.warmup", Interval(0, 0.1, log=True), "cannot be searched in the logarithm: its ends must be above 0"),
        ("prompt.length", Interval(4.2, 4.8), r"contains no integer, but prompt.length is one"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_search(tmp_path / "s", [], {**SPACE, key: values}, SweepConfig(trials=1), compose_in(tmp_path), None)
    with pytest.raises(ConfigError, match="the search space has a single point"):
        list(corners({"seed": ["3"]}))
    with pytest.raises(ConfigError, match=r"a search needs a dev score, but data.dev=null"):
        run_search(tmp_path / "s", [], SPACE, SweepConfig(trials=1), lambda _: small_config(tmp_path), None)
    assert not (tmp_path / "s").exists()


def test_a_search_of_real_runs_as_it_is_typed(tmp_path):
    files(tmp_path)
    space = ["optim.lr=tag(log,interval(0.001,0.1))", "prompt.length=interval(2,4)"]
    code, printed, errors = run(
        tmp_path, "-m", "sweep=optuna", *space, *SETTINGS, "sweep.trials=2", "sweep.parallel=2", "hydra.sweep.dir=s"
    )
    assert code == 0, errors
    assert "2 finished" in printed
    for number, trial in enumerate(study(tmp_path / "s").trials):
        assert trial.value == json.loads((tmp_path / f"s/{number}/results.json").read_text())["dev_spearman"]
        assert re.search(
            rf"length: {trial.params['prompt.length']}\n", (tmp_path / f"s/{number}/config.yaml").read_text()
        )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_search_fixes_precision_and_threads_for_all_jobs_at_its_first_start(scripted, tmp_path):
    scripted(tmp_path / "parts", trials=2)
    shared = read_plan(tmp_path / "parts").shared
    assert shared.parallel == 1
    assert set(shared.precision) == {"auto"}
    other = {"float32": "bfloat16", "bfloat16": "float32"}[shared.precision["auto"]]
    raw = json.loads((tmp_path / "parts/sweep.json").read_text())
    raw["settled"]["precision"]["auto"] = other
    (tmp_path / "parts/sweep.json").write_text(json.dumps(raw))
    scripted(tmp_path / "parts", trials=4, resume="parts")
    chosen = [read_config(tmp_path / f"parts/{job}/start.yaml").trainer.precision for job in range(4)]
    assert chosen == [shared.precision["auto"]] * 2 + [other] * 2
