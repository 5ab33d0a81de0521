"""The studies of experiments/paper: data, run folders, learning rates, verdicts and pages."""

import csv
import gzip
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import diagnostics
import estimate
import numpy as np
import pages
import pytest
import study
import training
from study import DEV, MODELS, PROMCSE, PROMCSE_EH, SHIFTED, STS, STUDIES, Row
from support.folders import DATA
from training import Workspace

import run
from promcse_pl.evaluation.statistics import Difference
from promcse_pl.runs.compose import CONF, compose_config

EH, PLAIN = Row(PROMCSE_EH, "table1/prompt_eh"), Row(PROMCSE, "table1/prompt")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Workspace:
    monkeypatch.setattr(study, "HERE", tmp_path / "pages")
    return Workspace("minilm", tmp_path / "data", tmp_path / "runs", 3)


def record(seed: int, value: float, **scores: float) -> dict[str, Any]:
    """Return the record of a run with one score on all tasks."""
    return {
        "seed": seed,
        "overrides": [f"seed={seed}", "optim.lr=3e-2"],
        "dev_spearman": value,
        "training_seconds": 60.0,
        "machine": {"threads": 1, "device": "cpu", "precision": "float32"},
        "versions": {"torch": "2"},
        "scores": {task: value for table in STUDIES.values() for task in table.tasks} | scores,
    }


def write(name: str, **rows: list[float]) -> None:
    """Write results of a study in which each given row has a score for each seed."""
    table = STUDIES[name]
    tree = {
        "data": {"nli": {"file": "nli/nli_train.csv", "rows": 5120, "sample_seed": 42, "sha256": "ab" * 32}},
        "frozen": dict.fromkeys(table.tasks, 80.0) | {DEV: 86.7},
        "rows": {
            row.name: {
                "preset": row.preset,
                "overrides": [*row.overrides],
                "runs": [record(42 + number, value) for number, value in enumerate(rows.get(row.name, []))],
            }
            for row in table.rows
        },
    }
    path = study.path_of(name) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"minilm": tree}))


def test_every_claim_compares_two_rows_of_its_study_with_the_sign_of_the_paper():
    for name, table in STUDIES.items():
        names = [row.name for row in table.rows]
        assert len(set(names)) == len(names)
        assert {point for _, points in table.curves for _, point in points} <= set(names)
        assert table.headline in (*table.tasks, DEV)
        for claim in table.claims:
            assert {claim.first, claim.second} <= set(names)
            assert claim.task in table.tasks
            task = claim.paper_task or claim.task
            for encoder in MODELS:
                first, second = (
                    pages.paper_scores(table, row, encoder).get(task) for row in (claim.first, claim.second)
                )
                if first is not None and second is not None and claim.expected != "equal":
                    assert (second > first) == (claim.expected == "higher"), (name, claim)


def test_the_scores_of_the_paper_average_to_its_averages():
    for row in STUDIES["table1"].rows:
        for encoder, scores in (row.paper or {}).items():
            assert set(scores) == set(STS)
            # the two averages that the paper itself does not compute from its cells
            tolerance = (
                0.16 if (row.name, encoder) in ((PROMCSE, "bert-base"), ("SimCSE + EH", "roberta-base")) else 0.011
            )
            mean = np.mean([scores[task] for task in STS[:-1]])
            assert scores["Avg"] == pytest.approx(mean, abs=tolerance)


def test_every_preset_of_a_study_exists():
    for table in STUDIES.values():
        assert all((CONF / "experiment" / f"{row.preset}.yaml").is_file() for row in table.rows)


def test_tables_share_the_runs_of_equal_settings(place):
    rows = {row.name: row for table in ("table1", "table4", "table5") for row in STUDIES[table].rows}
    assert place.run_folder(rows["PromCSE, m = 0.2"], 42) == place.run_folder(EH, 42)
    assert place.run_folder(rows["PromCSE, without EH"], 42) == place.run_folder(PLAIN, 42)
    folders = {place.run_folder(row, seed) for row in (EH, PLAIN, rows["PromCSE, m = 0"]) for seed in (42, 43)}
    assert len(folders) == 6


def test_the_overrides_of_a_run_compose_for_the_sample_and_for_the_whole_data(place):
    config = compose_config(place.overrides(EH, 43), {})
    assert (config.seed, config.data.batch_size, config.trainer.epochs, config.evaluation.tasks) == (43, 128, 1, [])
    assert config.data.train == str(place.runs / "data/3-nli_train.csv")
    whole = compose_config(Workspace("bert-base", place.data, place.runs, 0).overrides(EH, 43), {})
    assert (whole.data.batch_size, whole.trainer.epochs, whole.optim.lr) == (256, 10, 1e-2)
    assert whole.data.train == "nli/nli_train.csv"


def test_the_learning_rate_is_the_one_with_the_best_dev_score(place):
    assert not any(line.startswith("optim.lr=") for line in place.overrides(EH, 42))
    write("learning_rate", **{"PromCSE + EH, lr = 3e-3": [87.0], "PromCSE + EH, lr = 1e-2": [87.5]})
    for row in (EH, PLAIN):
        assert "optim.lr=1e-2" in place.overrides(row, 42)
        assert "optim.lr-1e-2" in place.run_folder(row, 42).parts[-2]
    fixed = next(row for row in STUDIES["learning_rate"].rows if row.overrides == ("optim.lr=3e-3",))
    assert [line for line in place.overrides(fixed, 42) if "optim.lr" in line] == ["optim.lr=3e-3"]
    assert not any("optim.lr" in line for line in Workspace("mpnet", place.data, place.runs, 3).overrides(EH, 42))


def test_samples_keep_the_order_of_the_file_and_are_written_once(place):
    for source, name in training.SOURCES.items():
        (place.data / name).parent.mkdir(parents=True)
        assert source in name
    with (place.data / "nli/nli_train.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [["sent0", "sent1", "hard_neg"], *([f"a{n}\nb", f"p, {n}", "n"] for n in range(9))]
        )
    with gzip.open(place.data / "wiki/wiki.txt.gz", "wt") as stream:
        stream.writelines(f"line {n}, é\n" for n in range(9))
    about = {source: training.write_sample(place, source) for source in ("nli", "wiki")}
    with place.sample("nli").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["sent0", "sent1", "hard_neg"]
    assert [row[1] for row in rows] == sorted({f"p, {row[0][1]}" for row in rows})
    lines = place.sample("wiki").read_text().splitlines()
    assert (len(rows), len(lines)) == (3, 3)
    assert lines == sorted(lines)
    assert about["wiki"]["sha256"] == hashlib.sha256(place.sample("wiki").read_bytes()).hexdigest()
    (place.data / "nli/nli_train.csv").unlink()
    assert training.write_sample(place, "nli") == about["nli"]


def test_the_proxy_of_the_domain_shift_averages_subsets():
    scores = {"STS12": 0.0, "STS12 MSRpar": 1.0, "STS14": 0.0, "STS14 deft-forum": 2.0, "STS14 images": 3.0,
              "STS15 answers-forums": 4.0, "STS-B": 5.0, "SICK-R": 9.0, "Avg": 0.0}  # fmt: skip
    assert training.domain_scores(scores) == {SHIFTED: 5.0, study.OTHER: 3.0}


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.1, 0.3, ("**confirmed**", "**contradicted**", "differs (higher)")),
        (-0.3, -0.1, ("**contradicted**", "**confirmed**", "differs (lower)")),
        (-0.1, 0.3, ("not significant", "not significant", "no significant difference")),
        (None, None, ("no interval, so no verdict",) * 3),
    ],
)
def test_a_claim_is_judged_by_the_interval_of_the_difference(low, high, words):
    difference = Difference(0.1, low, high, 0.01, "5 seeds")
    assert tuple(pages.verdict(difference, expected) for expected in ("higher", "lower", "equal")) == words
    assert pages.verdict(None, "higher") == "not run"


def test_a_page_shows_the_paper_beside_means_intervals_and_verdicts(place):
    write("table1", **{PROMCSE: [81.0, 81.1, 81.2], PROMCSE_EH: [82.0, 82.1, 82.2]})
    pages.draw(["table1", "table3"])
    text = (study.path_of("table1") / "README.md").read_text()
    assert "| PromCSE + EH | 82.13 | 82.10 ± 0.10 [81.85, 82.35] |" in text
    assert (
        "| PromCSE + EH against PromCSE | Avg | +0.32 | +1.00 [0.77, 1.23], 3 seeds | < 0.001 | **confirmed** |" in text
    )
    assert "| PromCSE against SimCSE | Avg | +0.28 | not run |  | not run |" in text
    assert "| SimCSE | 81.53 | not run | not run | recipe | none |" in text
    assert str(place.data) not in text
    whole = (study.path_of("README.md")).read_text()
    assert (
        "[Table 1: semantic textual similarity](table1/README.md) | minilm | PromCSE + EH against PromCSE, Avg |"
        in whole
    )
    assert whole.count("| not run |") > 20
    assert not study.path_of("table3").exists()


def test_every_study_has_a_page_for_partial_results(place):
    for name, table in STUDIES.items():
        write(name, **{row.name: [80.0 + number, 80.5][: 2 if number else 1] for number, row in enumerate(table.rows)})
    assert run.main(["--draw"]) == 0
    for name, table in STUDIES.items():
        text = (study.path_of(name) / "README.md").read_text()
        assert all(f"| {row.name} |" in text for row in table.rows)
        assert (study.path_of(name) / "minilm.png").is_file() == bool(table.curves)
        assert "nan" not in text


def test_a_failed_run_is_reported_and_the_others_are_recorded(place, monkeypatch):
    def train(_: Workspace, row: Row, seed: int) -> dict[str, Any]:
        if row.name == PROMCSE and seed == 43:
            raise subprocess.CalledProcessError(2, "run.py")
        return record(seed, 80.0)

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training, "write_sample", lambda *_: {"file": "f", "rows": 3, "sample_seed": 1, "sha256": "0"})
    monkeypatch.setattr(training, "frozen_member", lambda _: None)
    monkeypatch.setattr(training, "adapter_member", lambda _: None)

    def score(_: None, suite: str, data: Path, file: Path) -> dict[str, float]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"scores": {}, "tasks": {"t": {}}}')
        return {"Avg": 81.0}

    monkeypatch.setattr(training, "score", score)
    failed = training.run_study("table1", STUDIES["table1"], place, (42, 43), lambda _: None)
    assert len(failed) == 1
    assert failed[0].startswith("PromCSE, seed 43: exit code 2")
    rows = study.read_results("table1")["minilm"]["rows"]
    assert {name: len(row["runs"]) for name, row in rows.items()} == {
        row.name: 1 if row.name == PROMCSE else 2 for row in STUDIES["table1"].rows
    }


def test_a_dry_run_estimates_the_steps_and_reports_invalid_rows(place, capsys):
    whole = Workspace("roberta-large", place.data, place.runs, 0)
    steps, hours, memory = estimate.estimate("roberta-large", compose_config(whole.overrides(EH, 42), {}), 0)
    assert steps == 10 * 539  # 275,601 rows in batches of 512
    assert hours > 0.5
    assert memory > 10
    bad = Row("bad", "table1/prompt", ("loss.margin=0.1",))  # no effect without the hinge
    table = study.Study("t", "a", (EH, bad))
    (problem,) = estimate.dry_run("t", table, place, (42, 43))
    assert problem.startswith("bad: loss.margin=0.1 has no effect")
    printed = capsys.readouterr().out
    assert "1 steps of 128 rows" in printed
    assert "experiment=table1/prompt_eh" in printed


def test_the_cosine_of_an_ensemble_is_the_mean_of_the_cosines(trained_run):
    models = [diagnostics.variant(trained_run.folder, seed=seed) for seed in (1, 2)]
    texts = ["A woman is reading.", "Someone reads.", "A dog barks."]
    cosines = [model.encode(texts) @ model.encode(texts).T for model in models]
    assert np.abs(cosines[0] - cosines[1]).max() > 1e-4
    both = diagnostics.Ensemble(models)
    embeddings = both.encode(texts)
    assert embeddings.shape == (3, both.width)
    np.testing.assert_allclose(embeddings @ embeddings.T, np.mean(cosines, axis=0), atol=1e-6)


def test_a_variant_keeps_the_trained_prompt_unless_it_gets_a_seed(trained_run):
    texts = ["A woman is reading.", "Someone reads."]
    trained = training.adapter_member(trained_run.folder).load().encode(texts)
    np.testing.assert_array_equal(diagnostics.variant(trained_run.folder).encode(texts), trained)
    assert np.abs(diagnostics.variant(trained_run.folder, seed=42).encode(texts) - trained).max() > 1e-3
    both = diagnostics.variant(trained_run.folder, pooling="cls+avg")
    embeddings = both.encode(texts)
    assert embeddings.shape == (2, 2 * trained.shape[1])
    mean = embeddings[:, trained.shape[1] :]
    np.testing.assert_allclose(mean / np.linalg.norm(mean, axis=1, keepdims=True), trained, atol=1e-6)


@pytest.mark.realdata
@pytest.mark.slow
def test_a_study_trains_scores_and_is_not_repeated(place, monkeypatch):
    small = Workspace(
        "minilm", DATA, place.runs, 16, None, ("data.batch_size=16", "trainer.max_steps=1", "data.dev=null")
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.runs / "cache"))
    monkeypatch.setitem(training.SUITES, "sts", ["demo"])
    monkeypatch.setattr(training, "domain_scores", lambda _: {})
    table = study.Study("t", "a", (EH,), tasks=("demo test",), headline="demo test")
    said: list[str] = []
    assert training.run_study("small", table, small, (42,), said.append) == []
    (only,) = study.read_results("small")["minilm"]["rows"][PROMCSE_EH]["runs"]
    assert (only["steps"], only["rows"]) == (1, 16)
    assert only["scores"]["demo test"] != study.read_results("small")["minilm"]["frozen"]["demo test"]
    assert str(DATA) not in json.dumps(study.read_results("small"))
    before = {path: path.stat().st_mtime_ns for path in small.folder.rglob("*.json")}
    monkeypatch.setattr(subprocess, "run", None)  # a second call starts no run
    assert training.run_study("small", table, small, (42,), said.append) == []
    assert {path: path.stat().st_mtime_ns for path in small.folder.rglob("*.json")} == before
