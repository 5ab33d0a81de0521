"""A sweep in W&B: one run with a table of its jobs and the best adapter; one command uploads what is offline."""

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import Run
from support.wandb_files import items, records
from support.wandb_server import serving

from promcse_pl.cli.main import main
from promcse_pl.run_folder import Status, write_config, write_status
from promcse_pl.sweeps.execute import summarise
from promcse_pl.sweeps.plan import Plan, SweepJob, write_plan, write_start
from promcse_pl.sweeps.wandb_report import read_tracked_sweep, report_sections
from promcse_pl.sweeps.wandb_summary import publish_sweep


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
            (job / "results.json").write_text(json.dumps({"dev_spearman": dev, "seconds": 60.5, "scores": {}}))
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
    sent = {
        key: value for r in records(sweep) if r.HasField("summary") for key, value in items(r.summary.update).items()
    }
    assert (sent["best/job"], sent["best/loss.temperature"], sent["jobs_finished"]) == ("1", 0.05, 2)
    assert upload is not None
    done = subprocess.run(
        f"{sys.executable} -m {upload} --dry-run", shell=True, capture_output=True, text=True, check=True
    )
    assert "run-sweep-id0.wandb" in done.stderr + done.stdout


def test_an_online_sweep_uploads_its_best_adapter_under_an_alias_and_resumes_its_run(sweep, monkeypatch, caplog):
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


MARGINS = {0.1: {1: 70.0, 2: 71.0, 3: 72.0}, 0.2: {1: 80.0, 2: 60.0, 3: 61.0}}
"""Dev score of each seed. The best settings are 0.1, with a mean of 71; the best single run is one of 0.2, with a mean of 67."""


@pytest.fixture
def seeds(trained_run: Run, sweep, tmp_path) -> tuple[Path, Plan]:
    """A finished sweep over two margins and three seeds, tracked offline."""
    folder = tmp_path / "seeds"
    jobs = [(margin, seed, score) for margin, scores in MARGINS.items() for seed, score in scores.items()]
    plan = Plan([], [SweepJob(str(n), [f"loss.margin={m}", f"seed={s}"]) for n, (m, s, _) in enumerate(jobs)])
    write_plan(folder, plan)
    tracking = dataclasses.replace(trained_run.config.tracking, wandb="offline", group=None)
    for job, (margin, seed, score) in zip(plan.jobs, jobs, strict=True):
        loss = dataclasses.replace(trained_run.config.loss, margin=margin)
        config = dataclasses.replace(trained_run.config, loss=loss, seed=seed, tracking=tracking)
        write_start(folder, plan, job, config)
        write_config(config, folder / job.folder / "config.yaml")
        write_status(folder / job.folder, Status(state="finished", wandb_id=f"id{job.folder}"))
        results = {"dev_spearman": score, "dev": "my dev", "seconds": 1.0, "scores": {"adapter": {"dev": score}}}
        (folder / job.folder / "results.json").write_text(json.dumps(results))
        (folder / job.folder / "adapter").mkdir()
    return folder, plan


def test_terminal_report_html_and_wandb_name_the_same_best_run(seeds, capsys):
    folder, plan = seeds
    assert summarise(folder, plan, None) == 0
    assert (
        "best on dev: 71.00 ± 1.00 (mean of 3 seeds), its best seed 72.00, job 2 (loss.margin=0.1 seed=3)"
        in capsys.readouterr().out
    )
    for arguments in ([], ["--runs"]):
        assert main(["report", str(folder), *arguments]) == 0
        assert "repeat the best run (2, seed 3)" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert "repeat the best run (2, seed 3)" in page
    assert "repeat the best run (3" not in page
    sent = {k: v for r in records(folder) if r.HasField("summary") for k, v in items(r.summary.update).items()}
    assert (sent["best/job"], sent["best/dev/spearman"], sent["best/loss.margin"]) == ("2", 72.0, 0.1)
    assert (sent["best/dev/mean"], sent["best/seeds"]) == (71.0, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb_workspaces.*")
def test_the_report_of_a_trained_run_has_the_interval_of_its_dev_score(trained_run):
    score = trained_run.results["evaluation"]["targets"]["adapter"]["scores"]["dev"]
    tracked = read_tracked_sweep(trained_run.folder)
    sections = {section.name: section for section in report_sections(tracked, "test", "")}
    text = " ".join(sections["Summary"].paragraphs)
    assert f"{score['value']:.2f} (Spearman x 100, 1 seed, 95 % confidence interval over the dev set " in text
    assert f"[{score['low']:.2f}, {score['high']:.2f}]" in text
    assert sections["Training curves"].panels[0].y == ["train/loss"]


def test_with_two_dev_sets_no_run_is_best_and_every_output_gives_the_reason(seeds, capsys):
    folder, plan = seeds
    path = folder / "4/results.json"
    path.write_text(path.read_text().replace("my dev", "other dev"))
    why = "the runs are not ranked, since they were evaluated on different dev sets (my dev, other dev)"
    assert summarise(folder, plan, None) == 0
    printed = capsys.readouterr().out
    assert f"warning: {why}\n" in printed
    assert "best on dev" not in printed
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr()
    assert f"warning: {why}\n" in printed.err
    assert "repeat the best" not in printed.out
    assert "repeat the best" not in (folder / "report.html").read_text()
    sent = {k: v for r in records(folder) if r.HasField("summary") for k, v in items(r.summary.update).items()}
    assert [key for key in sent if key.startswith("best/")] == ["best/none"]
    assert sent["best/none"] == why


def test_a_sweep_id_that_is_a_path_is_refused_and_the_sweep_still_succeeds(seeds, capsys):
    folder, plan = seeds
    (folder / "wandb").mkdir()
    (folder / "wandb/sweep-id").write_text("../../x")
    assert summarise(folder, plan, None) == 0
    assert "warning: the sweep has no W&B summary run: " in (printed := capsys.readouterr().out)
    assert "sweep-id must contain a name without / and .., got '../../x'. Try: rm " in printed
