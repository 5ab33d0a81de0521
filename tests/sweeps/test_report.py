"""`promcse report` on the terminal: order, seeds, damaged files, commands."""

import json
import math
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from support.sweep_folders import finish, start, write_sweep

from promcse_pl.cli.main import main
from promcse_pl.run_folder import CONFIG, HISTORY, RESULTS, STATUS, Status, locked, write_status
from promcse_pl.sweeps.collect import parse_overrides, read_sweep
from promcse_pl.sweeps.html import decimate, page_content, write_html
from promcse_pl.sweeps.plan import read_plan, write_plan
from promcse_pl.sweeps.ranking import find_best, rank, varied_settings
from promcse_pl.sweeps.report import commands, duration, failures


def report(capsys, *arguments: object) -> tuple[str, str]:
    assert main(["report", *map(str, arguments)]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_a_report_html_of_something_else_is_not_overwritten(tmp_path, capsys):
    write_sweep(tmp_path / "sweep", seed=[1, 2])
    (tmp_path / "sweep/report.html").write_text("<html>mine</html>")
    assert main(["report", str(tmp_path / "sweep")]) == 2
    assert "sweep/report.html exists and is not a report of promcse report" in capsys.readouterr().err
    assert (tmp_path / "sweep/report.html").read_text() == "<html>mine</html>"
    (tmp_path / "sweep/report.html").unlink()
    for _ in range(2):
        assert main(["report", str(tmp_path / "sweep")]) == 0


def test_runs_are_ranked_by_dev_and_show_what_varies(tmp_path, capsys):
    write_sweep(tmp_path / "s", loss__temperature=[0.03, 0.05], loss__margin=[0.1, 0.2])
    for name, score in zip("0123", (70.0, 72.5, math.nan, 71.0), strict=True):
        finish(tmp_path / "s" / name, [], score)
    sweep = read_sweep(str(tmp_path / "s"))
    assert varied_settings(sweep.runs) == ["loss.temperature", "loss.margin"]
    rows = rank(sweep.runs, by_seed=False)
    assert [(row.runs[0].name, row.rank) for row in rows] == [("1", 1), ("3", 2), ("0", 3), ("2", None)]
    out, err = report(capsys, tmp_path / "s")
    assert "72.50" in out
    assert "nan" in out
    assert "STS-B" not in out + err
    out, err = report(capsys, tmp_path / "s", "--test")
    assert "STS-B" in out
    assert "do not select settings by test scores" in err
    assert "STS-B" in (tmp_path / "s/report.html").read_text()


def test_seeds_are_grouped_by_everything_else(tmp_path, capsys):
    write_sweep(tmp_path / "s", loss__temperature=[0.03, 0.05], seed=[1, 2, 3])
    for name, score in zip("012345", (70.0, 71.0, 72.0, 80.0, 60.0, 61.0), strict=True):
        finish(tmp_path / "s" / name, [], score)
    first, second = rank(read_sweep(tmp_path / "s").runs, by_seed=True)
    assert (first.dev, first.std, first.n, [run.name for run in first.runs]) == (71.0, 1.0, 3, ["0", "1", "2"])
    assert second.dev == 67.0
    out, _ = report(capsys, tmp_path / "s")
    assert "71.00 ± 1.00" in out
    assert "repeat the best run (2, seed 3)" in out
    assert f"promcse train --config {tmp_path / 's/2/config.yaml'} --out outputs/repeat-" in "".join(out.split("\n"))
    out, _ = report(capsys, tmp_path / "s", "--runs")
    assert "±" not in out.split("repeat")[0]
    assert "repeat the best run (2, seed 3)" in out, "the best run of the best settings, however rows are grouped"
    assert "the highest mean over seeds" in out
    start(tmp_path / "s/1", ["seed=2"], "failed", "OutOfMemoryError: out of memory")
    row = rank(read_sweep(tmp_path / "s").runs, by_seed=True)[0]
    assert (row.dev, row.n, row.states) == (71.0, 2, "2 finished, 1 failed")


def test_a_run_that_a_search_repeats_counts_once(tmp_path):
    write_sweep(tmp_path / "s", loss__margin=[0.1, 0.2], seed=[1, 2, 2])
    for name, score in zip("012345", (70.0, 74.0, 74.0, 60.0, 60.0, 60.0), strict=True):
        finish(tmp_path / "s" / name, [], score)
    first, second = rank(read_sweep(tmp_path / "s").runs, by_seed=True)
    assert (first.dev, first.std, first.n) == (72.0, pytest.approx(math.sqrt(8)), 2)
    assert [run.name for run in first.seeds] == ["0", "1"]
    assert (second.dev, second.n, second.states) == (60.0, 2, "3 finished")
    start(tmp_path / "s/1", ["seed=2"], "failed")
    assert [run.name for run in rank(read_sweep(tmp_path / "s").runs, by_seed=True)[0].seeds] == ["0", "2"]


def test_every_state_is_named_and_damaged_files_are_messages(tmp_path, capsys):
    plan = write_sweep(tmp_path / "s", loss__margin=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    folders = [tmp_path / "s" / job.folder for job in plan.jobs]
    start(folders[1], [], "failed", "NonFiniteError: the loss of step 3 is not finite")
    start(folders[2], [], "running")
    shutil.rmtree(folders[3])
    (folders[4] / RESULTS).write_text('{"scores": ')
    (folders[5] / STATUS).write_text("[]")
    (folders[6] / HISTORY).write_text('{"step": 1, "train/loss": 2.0}\nnonsense\n{"step": 2, "tr')
    start(folders[7], [], "pruned")
    start(folders[8], [], "running")
    with locked(folders[8]):
        sweep = read_sweep(tmp_path / "s")
    states = [run.state for run in sweep.runs]
    assert states == [
        "finished",
        "failed",
        "killed",
        "not started",
        "damaged",
        "damaged",
        "finished",
        "pruned",
        "running",
    ]
    reported = {run.name: messages for run, messages in failures(sweep.runs)}
    assert sorted(reported) == ["1", "2", "4", "5", "6"]
    assert reported["1"] == ["NonFiniteError: the loss of step 3 is not finite"]
    assert RESULTS in reported["4"][0]
    assert STATUS in reported["5"][0]
    assert len(reported["6"]) == 1, "an incomplete last line is not a problem"
    assert f"{HISTORY}:2" in reported["6"][0]
    out, _ = report(capsys, tmp_path / "s")
    assert "the loss of step 3" in out
    assert f"python run.py -m sweep.resume={tmp_path / 's'}" in out


def test_an_unfinished_run_shows_its_best_so_far_and_is_not_ranked(tmp_path):
    write_sweep(tmp_path / "s", loss__margin=[0.1, 0.2])
    write_status(tmp_path / "s/1", Status(state="stopped"))
    rows = rank(read_sweep(tmp_path / "s").runs, by_seed=True)
    assert [(row.rank, row.dev) for row in rows][1] == (None, None)
    assert rows[1].runs[0].dev == pytest.approx(70 + 7 * math.sin(1.7) - 9 * math.exp(-3))


def test_runs_of_earlier_versions_have_the_default_of_a_setting_that_they_lack(tmp_path):
    for seed in (1, 2):
        finish(tmp_path / "s" / str(seed), [f"seed={seed}"], 70.0)
    path = tmp_path / "s/1" / CONFIG
    tree = yaml.safe_load(path.read_text())
    offset = tree["prompt"].pop("position_offset")
    tree["trainer"]["average"] = None  # removed, without effect
    path.write_text(yaml.safe_dump(tree))
    (row,) = rank(read_sweep(tmp_path / "s").runs, by_seed=True)
    assert [run.name for run in row.runs] == ["1", "2"]
    tree["trainer"]["average"] = 0.5  # a setting that this version cannot repeat
    path.write_text(yaml.safe_dump(tree))
    rows = rank(read_sweep(tmp_path / "s").runs, by_seed=True)
    assert [[run.name for run in row.runs] for row in rows] == [["1"], ["2"]]
    tree["prompt"]["position_offset"], tree["seed"] = offset, 2
    (tmp_path / "s/2" / CONFIG).write_text(yaml.safe_dump(tree))
    (row,) = rank(read_sweep(tmp_path / "s").runs, by_seed=True)
    assert [run.name for run in row.runs] == ["1", "2"]


def test_without_dev_scores_nothing_is_ranked(tmp_path, capsys):
    write_sweep(tmp_path / "s", loss__margin=[0.1, 0.2])
    for name in "01":
        finish(tmp_path / "s" / name, [], None)
    out, _ = report(capsys, tmp_path / "s")
    assert "nothing is ranked" in out
    assert "repeat" not in out


def test_scores_on_different_dev_sets_are_not_ranked_and_no_run_is_best(tmp_path, capsys):
    write_sweep(tmp_path / "s", loss__margin=[0.1, 0.2])
    path = tmp_path / "s/1" / RESULTS
    path.write_text(path.read_text().replace("demo dev", "STS-B dev"))
    sweep = read_sweep(tmp_path / "s")
    rows = rank(sweep.runs, by_seed=True)
    assert [row.rank for row in rows] == [None, None]
    assert commands(sweep) == []
    out, err = report(capsys, tmp_path / "s")
    assert "the runs are not ranked, since they were evaluated on different dev sets (STS-B dev, demo dev)" in err
    assert "70.00" in out
    page = (tmp_path / "s/report.html").read_text()
    assert (
        "charts of mean dev scores are left out: the runs are not ranked, since they were evaluated on different"
        in page
    )
    assert page_content(sweep, tests=False)["data"]["comparable"] is False


def with_dev_content(run: Path, sha256: str) -> None:
    results = json.loads((run / RESULTS).read_text())
    results["evaluation"] = {"tasks": {"dev": {"files": [{"name": "demo dev", "sha256": sha256}]}}}
    (run / RESULTS).write_text(json.dumps(results))


def test_dev_sets_of_the_same_name_and_different_content_are_not_compared(tmp_path, capsys):
    write_sweep(tmp_path / "s", loss__margin=[0.1, 0.2])
    with_dev_content(tmp_path / "s/0", "a" * 64)
    with_dev_content(tmp_path / "s/1", "b" * 64)
    assert find_best(read_sweep(tmp_path / "s").runs) is None
    _, err = report(capsys, tmp_path / "s")
    assert f"different dev sets (demo dev {'a' * 12}, demo dev {'b' * 12})" in err


def test_rows_held_out_by_seed_are_compared_as_long_as_they_are_the_same_for_each_seed(tmp_path):
    write_sweep(tmp_path / "s", loss__margin=[0.1, 0.2], seed=[1, 2])
    runs = read_sweep(tmp_path / "s").runs
    for run in runs:
        with_dev_content(run.folder, f"{run.settings['seed']}" * 64)
    assert find_best(read_sweep(tmp_path / "s").runs) is not None
    with_dev_content(runs[0].folder, "f" * 64)
    assert find_best(read_sweep(tmp_path / "s").runs) is None


def test_many_settings_take_one_column_that_names_what_is_unusual(tmp_path, capsys):
    write_sweep(tmp_path / "s", loss__margin=[0.1, 0.2, 0.3], data__max_length=[16, 32])
    unusual = ["loss.temperature=0.1", "prompt.length=5", "optim.lr=0.5", "data.batch_size=9", "trainer.epochs=7"]
    finish(tmp_path / "s/2", ["loss.margin=0.2", "data.max_length=16", *unusual], 80)
    (tmp_path / "s/sweep.json").unlink()
    (tmp_path / "s/2/start.yaml").unlink()
    out, _ = report(capsys, tmp_path / "s")
    table = out.split("ranked by")[0]
    assert max(map(len, table.splitlines())) <= 120
    cells = " ".join(line.removeprefix(" 1   2").strip() for line in table.splitlines())
    settings = (
        "data.batch_size=9, loss.temperature=0.1, loss.margin=0.2, prompt.length=5, optim.lr=0.5, trainer.epochs=7"
    )
    assert {name in cells for name in settings.split(", ")} == {True}
    assert "data.max_length=16" not in table, "the most frequent value is not repeated"
    assert table.count("data.max_length=32") == 3


def test_the_report_of_a_single_run_names_it(tmp_path, capsys):
    start(tmp_path / "my-run", ["loss.margin=0.2"], "running")
    out, _ = report(capsys, tmp_path / "my-run")
    assert "\nmy-run killed: the process ended without an error message" in out
    assert "no run is finished, so nothing is ranked\n" in out
    assert f"to resume my-run:\n  python run.py resume={tmp_path}/my-run\n" in out


def test_test_scores_are_warned_of_only_if_there_are_any(tmp_path, capsys):
    start(tmp_path / "my-run", ["loss.margin=0.2"], "failed", "DataError: no")
    _, err = report(capsys, tmp_path / "my-run", "--test")
    assert "do not select settings by test scores" not in err


@pytest.mark.parametrize("plan", [None, "{", '{"format": 9}', '{"format": 1, "overrides": [], "jobs": [{}]}'])
def test_runs_are_found_without_a_plan(tmp_path, capsys, plan):
    for name, margin in (("a/10", 0.1), ("a/9", 0.2), ("b c", 0.3)):
        finish(tmp_path / name, [f"loss.margin={margin}"], 70 + margin)
    (tmp_path / "a/9/wandb/files").mkdir(parents=True)
    (tmp_path / "a/9/wandb/files/config.yaml").write_text("wandb_version: 1")
    start(tmp_path / "a/9", ["loss.margin=0.2"], "stopped")
    if plan:
        (tmp_path / "sweep.json").write_text(plan)
    sweep = read_sweep(tmp_path)
    assert [run.name for run in sweep.runs] == ["a/9", "a/10", "b c"]
    assert varied_settings(sweep.runs) == ["loss.margin"]
    assert bool(sweep.warnings) == bool(plan)
    out, err = report(capsys, tmp_path)
    assert f"python run.py resume={tmp_path}/a/9" in out
    assert ("sweep.json" in err) == bool(plan)
    (repeat,) = (command for what, command in commands(sweep) if "repeat" in what)
    assert shlex.split(repeat)[2:4] == ["--config", str(tmp_path / "b c" / CONFIG)]


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "none"):
        assert main(["report", str(folder)]) == 2
        assert "Try: promcse report" in capsys.readouterr().err


def test_numbers_in_overrides_are_converted():
    given = ["optim.lr=1e-3", "+a=[1,2]", "model=bert-base", "loss.margin=0.10", "b=null", "c=x: y: z", "~d"]
    values = {"optim.lr": 0.001, "a": [1, 2], "model": "bert-base", "loss.margin": 0.1, "b": None, "c": "x: y: z"}
    assert parse_overrides(given) == values


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (math.nan, ""), (41.4, "41 s"), (59.6, "1 min 00 s"), (7500, "2 h 05 min")]
)
def test_times_are_readable(seconds, text):
    assert duration(seconds) == text


def test_a_decimated_curve_keeps_its_ends_spikes_and_gaps():
    values = [math.sin(step / 50) for step in range(10_000)]
    values[4321], values[5000] = 9.0, math.nan
    steps, thin = decimate(range(10_000), values, 100)
    assert len(steps) <= 105
    assert (steps[0], steps[-1]) == (0, 9999)
    assert thin[steps.index(4321)] == 9.0
    assert thin[steps.index(5000)] is None
    assert decimate([1, 2], [0.123456, 2.0], 100) == [[1, 2], [0.12346, 2.0]]


def test_text_of_runs_is_escaped_in_the_page(tmp_path):
    markup = "</script><!--&\u2028<img src=x>\udcff"
    write_sweep(tmp_path / "s", loss__margin=[0.1, 0.2])
    finish(tmp_path / "s/1", [], math.nan)
    sweep = read_sweep(tmp_path / "s")
    for run in sweep.runs:
        run.name, run.encoder, run.error = (f"{markup}{run.name}" for _ in range(3))
        run.settings[markup] = f'{markup}"{run.name}'
    page = write_html(sweep, tests=True).read_text()
    assert "<img" not in page
    assert page.count("</script>") == 3
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["settings"] == ["loss.margin", markup]
    assert data["runs"][1]["dev"] is None


def test_a_group_of_a_single_run_has_a_row_among_the_groups_and_one_among_the_runs(tmp_path):
    plan = write_sweep(tmp_path / "s", loss__margin=[0.1, 0.2], seed=[1, 2])
    plan.jobs.pop()
    write_plan(tmp_path / "s", plan)
    page = write_html(read_sweep(tmp_path / "s"), tests=False).read_text()
    assert (page.count('class="grouped"'), page.count('class="single"')) == (2, 3)


def test_the_page_has_test_scores_only_if_asked(tmp_path):
    write_sweep(tmp_path / "s", loss__margin=[0.1, 0.2])
    sweep = read_sweep(tmp_path / "s")
    hidden, shown = (page_content(sweep, tests=tests) for tests in (False, True))
    assert "STS-B" not in json.dumps(hidden)
    assert "STS-B" in shown["columns"]
    assert ("frozen encoder", "dev 45.00, STS-B 50.00") in shown["facts"]


def test_the_page_names_the_sweep_its_settings_data_encoder_baseline_date_and_versions(tmp_path):
    write_sweep(tmp_path / "2026-01-31/12-00-00", loss__margin=[0.1, 0.2])
    content = page_content(read_sweep(tmp_path / "2026-01-31/12-00-00"), tests=False)
    assert content["title"] == "Sweep 2026-01-31/12-00-00: loss.margin"
    assert str(tmp_path) not in content["title"]
    facts = dict(content["facts"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", facts.pop("started"))
    assert facts == {
        "training data": "demo",
        "encoder": "sentence-transformers/all-MiniLM-L6-v2",
        "dev set": "demo dev",
        "frozen encoder": "dev 45.00",
        "versions": "promcse_pl 0.1.0, torch 2.0.0",
    }


@pytest.mark.slow
def test_a_report_of_trained_runs(trained_run, tmp_path, capsys, monkeypatch):
    import dataclasses
    import io

    from rich.console import Console

    from promcse_pl.runs.lifecycle import run_job

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = dataclasses.replace(
        trained_run.config,
        seed=43,
        trainer=dataclasses.replace(trained_run.config.trainer, max_steps=3),
        tracking=dataclasses.replace(trained_run.config.tracking, wandb="disabled"),
    )
    results = run_job(config, tmp_path / "s/1", Console(file=io.StringIO()))
    shutil.copytree(trained_run.folder, tmp_path / "s/0")
    sweep = read_sweep(tmp_path / "s")
    assert varied_settings(sweep.runs) == ["trainer.max_steps", "seed"]
    assert [run.dev for run in sweep.runs] == [trained_run.results["dev_spearman"], results["dev_spearman"]]
    curves = page_content(sweep, tests=False)["data"]["runs"][1]["curves"]
    assert curves["train/loss"][0] == [1, 2, 3]
    assert "dev/spearman" in curves
    out, _ = report(capsys, tmp_path / "s")
    assert f"{results['dev_spearman']:.2f}" in out


def test_the_report_does_not_import_torch(tmp_path):
    import subprocess

    write_sweep(tmp_path / "s", loss__margin=[0.1, 0.2])
    code = f"import sys; from promcse_pl.cli.main import main; main(['report', {str(tmp_path / 's')!r}]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert not {"torch", "numpy", "transformers", "wandb", "hydra"} & set(done.stdout.split())
    assert Path(tmp_path / "s/report.html").stat().st_size > 4_000_000


def test_runs_without_a_plan_are_grouped_by_training_settings(tmp_path):
    for seed, every in ((1, 10), (2, 50)):
        finish(tmp_path / str(seed), [f"seed={seed}", f"trainer.save_every={every}"], 70.0 + seed)
    assert [len(row.runs) for row in rank(read_sweep(tmp_path).runs, by_seed=True)] == [2]


def test_runs_that_were_trained_in_different_precisions_are_reported_unless_the_sweep_varies_it(tmp_path, capsys):
    write_sweep(tmp_path / "s", loss__margin=[0.1, 0.2])
    for name, precision in (("0", "float32"), ("1", "bfloat16")):
        path = tmp_path / "s" / name / RESULTS
        path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": {"precision": precision}}))
    _, err = report(capsys, tmp_path / "s")
    assert (
        "warning: the runs were trained in different precisions (bfloat16, float32), which changes scores slightly"
        in err
    )
    plan = read_plan(tmp_path / "s")
    for job, precision in zip(plan.jobs, ("float32", "bfloat16"), strict=True):
        job.overrides.append(f"trainer.precision={precision}")
    write_plan(tmp_path / "s", plan)
    _, err = report(capsys, tmp_path / "s")
    assert "precisions" not in err
