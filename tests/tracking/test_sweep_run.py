"""A sweep in W&B: one run with a table of its jobs and the best adapter; one command uploads what is offline."""

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run
from server import serving
from test_wandb import items, records

from promcse_pl.folder import Status, write_config, write_status
from promcse_pl.tracking.sweep import publish_sweep


@pytest.fixture
def sweep(trained_run: Run, tmp_path, monkeypatch, caplog) -> Path:
    """Two finished jobs and a failed one."""
    folder = tmp_path / "my sweep"
    for number, (temperature, dev) in enumerate(((0.03, 70.0), (0.05, 75.5), (0.1, None))):
        job = folder / str(number)
        loss = dataclasses.replace(trained_run.config.loss, temperature=temperature)
        tracking = dataclasses.replace(trained_run.config.tracking, wandb="auto", group=None)
        write_config(dataclasses.replace(trained_run.config, loss=loss, tracking=tracking), job / "config.yaml")
        write_status(job, Status(state="finished" if dev else "failed", wandb_id=f"id{number}"))
        if dev:
            (job / "results.json").write_text(json.dumps({"dev_spearman": dev, "seconds": 60.5}))
            (job / "adapter").mkdir()
            (job / "adapter/adapter.json").write_text("{}")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC", "WANDB_CONFIG_DIR", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    caplog.set_level(logging.INFO, "promcse_pl")
    return folder


ROWS = [["0", 0.03, 70.0, "finished", 60.5, "id0"], ["1", 0.05, 75.5, "finished", 60.5, "id1"]]
ROWS += [["2", 0.1, None, "failed", None, "id2"]]


def test_an_offline_sweep_has_a_run_with_the_table_of_its_jobs_and_one_command_uploads_all(sweep):
    (sweep / "0/wandb/offline-run-20260101_000000-id0").mkdir(parents=True)
    upload = publish_sweep(sweep)
    run = next(r.run for r in records(sweep) if r.HasField("run"))
    assert (run.job_type, run.run_group, run.display_name, run.run_id) == (
        "sweep",
        "my sweep",
        "my sweep",
        "sweep-id0",
    )
    (table,) = sweep.glob("wandb/offline-run-*/files/media/table/jobs_*.json")
    assert json.loads(table.read_text()) == {
        "columns": ["job", "loss.temperature", "dev", "status", "seconds", "run"],
        "data": ROWS,
    }
    summary = {
        key: value for r in records(sweep) if r.HasField("summary") for key, value in items(r.summary.update).items()
    }
    assert (summary["best/job"], summary["best/loss.temperature"], summary["jobs_finished"]) == ("1", 0.05, 2)
    assert upload is not None
    done = subprocess.run(
        f"{sys.executable} -m {upload} --dry-run", shell=True, capture_output=True, text=True, check=True
    )
    assert "run-sweep-id0.wandb" in done.stderr + done.stdout


def test_an_online_sweep_uploads_its_best_adapter_under_an_alias_and_goes_on_with_its_run(sweep, monkeypatch, caplog):
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        publish_sweep(sweep)
        made = [v.get("input", v) for o, v in server.operations if o == "CreateArtifact"]
        publish_sweep(sweep)
    (best,) = [artifact for artifact in made if "best-of-my-sweep" in json.dumps(artifact)]
    assert "best" in [alias["alias"] for alias in best["aliases"]]
    assert list(server.runs) == ["sweep-id0"], "called twice, one run"
    assert server.runs["sweep-id0"]["jobType"] == "sweep"
    assert server.runs["sweep-id0"]["summary"]["best/job"] == "1"
    assert "WARNING" not in caplog.text


def test_a_sweep_without_tracking_does_nothing(sweep, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    publish_sweep(sweep)
    assert not (sweep / "wandb").exists()
