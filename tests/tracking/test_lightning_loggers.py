"""`tracking.logger`: files of Lightning's loggers, their continuation on resume, and missing packages."""

import csv
import importlib.util
import os
import signal
from pathlib import Path

import pytest
import yaml
from pytorch_lightning.loggers import CSVLogger
from support.runs import run_small, small_config

from promcse_pl.run_folder import read_history
from promcse_pl.runs.inputs import check_inputs
from promcse_pl.runs.lifecycle import resume_job
from promcse_pl.tracking import lightning
from promcse_pl.training.module import PromcseModule
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.signals import Stopped


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that trains 3 steps with a logger, and fails before step 3 and resumes if asked to."""
    pairs = "".join(f"w{i} w{i + 1}\tw{i + 2}\t{i % 5}\n" for i in range(5, 25))
    for name in ("dev.tsv", "test.tsv"):
        (tmp_path / name).write_text(pairs.replace("w7", "w9") if name == "dev.tsv" else pairs)

    def train(logger: str, name: str, is_resumed: bool = False) -> Path:
        options = {
            "data": {"dev": str(tmp_path / "dev.tsv")},
            "evaluation": {"tasks": [str(tmp_path / "test.tsv")], "frozen": False},
            "trainer": {"save_every": 1, "eval_every": 1},
            "tracking": {"wandb": "disabled", "logger": logger, "project": "mine", "tags": ["short"]},
        }
        if not is_resumed:
            run_small(tmp_path, name, **options)
            return tmp_path / name
        step = PromcseModule.training_step

        def fail_at_the_last_step(module, *arguments):
            if module.global_step == 2:
                raise RuntimeError("on purpose")
            return step(module, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(PromcseModule, "training_step", fail_at_the_last_step)
            with pytest.raises(RuntimeError, match="on purpose"):
                run_small(tmp_path, name, **options)
        resume_job(tmp_path / name)
        return tmp_path / name

    return train


def without_speed(rows):
    return [{name: value for name, value in row.items() if not name.startswith("speed/")} for row in rows]


def test_the_csv_logger_has_the_history_and_the_test_scores(run):
    folder = run("csv", "run")
    with (folder / "csv/metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    history = read_history(folder / "metrics.jsonl")
    assert [int(row["step"]) for row in rows] == [*(entry["step"] for entry in history), 3]
    for row, entry in zip(rows, history, strict=False):
        assert {name: float(value) for name, value in row.items() if value} == pytest.approx(entry)
    assert float(rows[-1]["test/test.tsv"])
    settings = yaml.safe_load((folder / "csv/hparams.yaml").read_text())
    assert settings["loss.margin"] == 0.2
    assert settings["model.path"] == "encoder", "of paths the last part"
    assert not any(name.startswith("tracking.") or name in ("data.dir", "data.cache_dir") for name in settings)


def test_a_stopped_run_has_the_csv_file_of_its_steps(tmp_path, monkeypatch):
    step = PromcseModule.training_step

    def stop_at_the_last_step(module, *arguments):
        if module.global_step == 2:
            assert (tmp_path / "run/csv/metrics.csv").exists(), "written while the run trains"
            os.kill(os.getpid(), signal.SIGTERM)
        return step(module, *arguments)

    monkeypatch.setattr(PromcseModule, "training_step", stop_at_the_last_step)
    with pytest.raises(Stopped):
        run_small(tmp_path, "run", tracking={"wandb": "disabled", "logger": "csv"})
    with (tmp_path / "run/csv/metrics.csv").open() as stream:
        steps = [int(row["step"]) for row in csv.DictReader(stream)]
    assert steps == [entry["step"] for entry in read_history(tmp_path / "run/metrics.jsonl")]
    assert steps


def test_a_resumed_run_continues_the_csv_file(run):
    files = [run("csv", "straight") / "csv/metrics.csv", run("csv", "resumed", is_resumed=True) / "csv/metrics.csv"]
    straight, resumed = (list(csv.DictReader(path.open())) for path in files)
    assert without_speed(resumed) == without_speed(straight)


def test_tensorboard_has_the_history_the_settings_and_one_value_per_step_after_a_resume(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run("tensorboard", "run", is_resumed=True)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    history = read_history(folder / "metrics.jsonl")
    for name in ("train/loss", "dev/spearman"):
        wanted = [(entry["step"], pytest.approx(entry[name])) for entry in history if name in entry]
        assert [(event.step, event.value) for event in events.Scalars(name)] == wanted
    assert "test/test.tsv" in events.Tags()["scalars"]
    assert yaml.safe_load((folder / "tensorboard/hparams.yaml").read_text())["loss.margin"] == 0.2


def test_mlflow_has_the_history_and_the_settings_and_no_user_name(run, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = run("mlflow", "run", is_resumed=True)
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["loss.margin"] == "0.2"
    assert found.data.tags == {"short": "true", "mlflow.runName": "run"}
    losses = {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, "train/loss")}
    history = read_history(folder / "metrics.jsonl")
    assert losses == pytest.approx({entry["step"]: entry["train/loss"] for entry in history if "train/loss" in entry})
    assert "test/test.tsv" in found.data.metrics


def test_the_settings_are_logged_once_to_the_mlflow_run_of_a_resumed_run(tmp_path, monkeypatch):
    logged = []

    class Recording(CSVLogger):
        def log_hyperparams(self, params=None):
            logged.append(params)

    def logger(_config, folder):
        (folder / "mlflow_run.txt").touch()
        return Recording(folder)

    monkeypatch.setattr(lightning, "_mlflow_logger", logger)
    config = small_config(tmp_path, tracking={"wandb": "disabled", "logger": "mlflow"})
    for step in (0, 2):
        lightning.build_logger(config, tmp_path, step)
    assert [params["loss.margin"] for params in logged] == [0.2]


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_package_is_reported_before_training_with_the_command_that_installs_it(name, tmp_path, monkeypatch):
    if importlib.util.find_spec(name):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    config = small_config(tmp_path, tracking={"wandb": "disabled", "logger": name})
    with pytest.raises(ConfigError, match=rf"tracking\.logger={name} needs .*Try: pip install 'promcse_pl\[{name}\]'"):
        check_inputs(config)


def test_without_a_logger_no_other_files_are_written(run):
    names = {path.name for path in run("none", "run").iterdir()}
    assert not names & {"csv", "tensorboard", "mlflow.db", "mlflow_run.txt", "lightning_logs"}
