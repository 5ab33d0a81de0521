"""The studies of experiments/paper: data, run folders, learning rates, verdicts and pages."""

import contextlib
import csv
import dataclasses
import gzip
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diagnostics
import estimate
import numpy as np
import pages
import pytest
import scipy
import scoring
import study
import torch
import training
from study import DEV, MODELS, PROMCSE, PROMCSE_EH, SHIFTED, STS, STUDIES, Row
from support.encoders import save_small_adapter, small_encoder
from support.folders import ROOT
from training import Workspace

import run
from promcse_pl import PromCSE
from promcse_pl.adapter import save_adapter
from promcse_pl.cli.main import main
from promcse_pl.data.demo import demo_pairs, demo_triplets
from promcse_pl.evaluation.targets import Member
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.run_folder import write_config
from promcse_pl.runs.compose import CONF, compose_config
from promcse_pl.utils.errors import ConfigError, DataError

EH, PLAIN = Row(PROMCSE_EH, "table1/prompt_eh"), Row(PROMCSE, "table1/prompt")


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Workspace:
    monkeypatch.setattr(study, "HERE", tmp_path / "pages")
    return Workspace("minilm", tmp_path / "data", tmp_path / "runs", 3)


def record(seed: int, value: float, **scores: float) -> dict[str, Any]:
    """Return the record of a run with one score on all tasks."""
    return {
        "seed": seed,
        "overrides": [f"seed={seed}", "optim.lr=3e-2"],
        "dev_spearman": value,
        "trained_parameters": 46_080,
        "trained_share": 0.002,
        "best_step": 30,
        "steps": 40,
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
    path = study.study_folder(name) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"minilm-3": tree}))


def test_every_claim_compares_two_rows_of_its_study_with_the_sign_of_the_paper():
    for name, table in STUDIES.items():
        names = [row.name for row in table.rows]
        assert len(set(names)) == len(names)
        assert {point for _, points in table.curves for _, point in points} <= set(names)
        assert table.headline in (*table.tasks, DEV)
        for claim in table.claims:
            assert {claim.first, claim.second} <= set(names)
            assert claim.task in table.tasks
            assert claim.proxy in (None, *table.tasks)
            assert claim.expected != "equal" or claim.task not in pages.THREE_DECIMALS  # the margin is in points
            for encoder in MODELS:
                first, second = (
                    pages.paper_scores(table, row, encoder).get(claim.task) for row in (claim.first, claim.second)
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


def test_tables_share_the_runs_of_equal_settings(workspace):
    rows = {row.name: row for table in ("table1", "table4", "table5") for row in STUDIES[table].rows}
    assert workspace.run_folder(rows["PromCSE, m = 0.2"], 42) == workspace.run_folder(EH, 42)
    assert workspace.run_folder(rows["PromCSE, without EH"], 42) == workspace.run_folder(PLAIN, 42)
    folders = {workspace.run_folder(row, seed) for row in (EH, PLAIN, rows["PromCSE, m = 0"]) for seed in (42, 43)}
    assert len(folders) == 6
    settings = {(row.preset, row.overrides) for table in STUDIES.values() for row in table.rows}
    settings |= {(EH.preset, (line,)) for line in ("trainer.epochs=10", "trainer.eval_every=100", "data.batch_size=64")}
    assert len({workspace.run_folder(Row("", *setting), 42) for setting in settings}) == len(settings)


def test_the_overrides_of_a_run_compose_for_the_sample_and_for_the_whole_data(workspace):
    config = compose_config(workspace.overrides(EH, 43), {})
    assert (config.seed, config.data.batch_size, config.trainer.epochs, config.evaluation.tasks) == (43, 128, 1, [])
    assert config.data.train == str(workspace.runs / "data/3-nli_train.csv")
    whole = compose_config(Workspace("bert-base", workspace.data, workspace.runs, 0).overrides(EH, 43), {})
    assert (whole.data.batch_size, whole.trainer.epochs, whole.optim.lr) == (256, 10, 1e-2)
    assert whole.data.train == "nli/nli_train.csv"


def grid(**scores: float) -> dict[str, list[float]]:
    """Return the dev scores of the learning rates of PromCSE + EH by row."""
    return {f"{PROMCSE_EH}, lr = {rate.replace('_', '-')}": [score] for rate, score in scores.items()}


def test_the_learning_rate_is_the_one_with_the_best_dev_score(workspace):
    assert not any(line.startswith("optim.lr=") for line in workspace.overrides(EH, 42))
    write("learning_rate", **grid(**{"3e-3": 87.0, "1e-2": 87.5, "3e-2": 87.2}))
    for row in (EH, PLAIN):
        assert "optim.lr=1e-2" in workspace.overrides(row, 42)
        assert "optim.lr-1e-2" in workspace.run_folder(row, 42).parts[-2]
    table = pages.selection_table(study.read_results("learning_rate")["minilm-3"])
    assert table[3:5] == ["| `experiment=table1/prompt_eh` | 1e-2 | 3 | 87.5000 |", ""]
    write("learning_rate", **grid(**{"3e-3": 87.0, "1e-2": 87.5, "3e-2": 87.6}))
    assert "3e-2, the highest" in pages.selection_table(study.read_results("learning_rate")["minilm-3"])[3]
    write("learning_rate", **grid(**{"3e-3": 87.0, "1e-2": 87.5, "3e-2": 87.2}))
    fixed = next(row for row in STUDIES["learning_rate"].rows if row.overrides == ("optim.lr=3e-3",))
    assert [line for line in workspace.overrides(fixed, 42) if "optim.lr" in line] == ["optim.lr=3e-3"]
    # other methods, models and samples use the recipe
    others = [(workspace, Row("SimCSE", "table1/full"))]
    others += [
        (Workspace(name, workspace.data, workspace.runs, rows), EH) for name, rows in (("mpnet", 3), ("minilm", 4))
    ]
    assert not any("optim.lr" in line for other, row in others for line in other.overrides(row, 42))


def test_a_learning_rate_needs_the_complete_grid_of_its_method(workspace, capsys):
    write("learning_rate", **grid(**{"3e-3": 87.0, "1e-2": 87.5}))
    with pytest.raises(ConfigError, match="3e-2 of table1/prompt_eh were not run for minilm-3") as error:
        workspace.overrides(PLAIN, 42)
    command = str(error.value).partition("run.py ")[2]
    assert run.main([*shlex.split(command), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("optim.lr=") == 3
    assert workspace.overrides(Row("SimCSE", "table1/full"), 42)


def test_samples_keep_the_order_of_the_file_and_are_written_once(workspace):
    for source, name in training.SOURCES.items():
        (workspace.data / name).parent.mkdir(parents=True)
        assert source in name
    with (workspace.data / "nli/nli_train.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [["sent0", "sent1", "hard_neg"], *([f"a{n}\nb", f"p, {n}", "n"] for n in range(9))]
        )
    with gzip.open(workspace.data / "wiki/wiki.txt.gz", "wt") as stream:
        stream.writelines(f"line {n}, é\n" for n in range(9))
    about = {source: training.write_sample(workspace, source) for source in ("nli", "wiki")}
    with workspace.sample("nli").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["sent0", "sent1", "hard_neg"]
    assert [row[1] for row in rows] == sorted({f"p, {row[0][1]}" for row in rows})
    lines = workspace.sample("wiki").read_text().splitlines()
    assert (len(rows), len(lines)) == (3, 3)
    assert lines == sorted(lines)
    assert about["wiki"]["sha256"] == hashlib.sha256(workspace.sample("wiki").read_bytes()).hexdigest()
    assert training.write_sample(workspace, "nli") == about["nli"]
    with (workspace.data / "nli/nli_train.csv").open("a") as stream:
        stream.write("a9,p,n\n")
    for other in (workspace, dataclasses.replace(workspace, rows=0)):
        (other.folder / "data.json").unlink(missing_ok=True)  # as for samples of an earlier version
        with pytest.raises(DataError, match="Try: --runs NEW_FOLDER") if other.rows else contextlib.nullcontext():
            training.write_sample(other, "nli")


def test_runs_on_the_whole_data_are_not_mixed_with_runs_on_other_data(workspace):
    whole = dataclasses.replace(workspace, rows=0)
    path = whole.data / "nli/nli_train.csv"
    path.parent.mkdir(parents=True)
    path.write_text("sent0,sent1,hard_neg\na,b,c\n")
    assert training.write_sample(whole, "nli") == training.write_sample(whole, "nli")
    path.write_text("sent0,sent1,hard_neg\na,b,d\n")
    with pytest.raises(DataError, match="other rows"):
        training.write_sample(whole, "nli")


def test_the_proxy_of_the_domain_shift_averages_subsets():
    scores = {"STS12": 0.0, "STS12 MSRpar": 1.0, "STS14": 0.0, "STS14 deft-forum": 2.0, "STS14 images": 3.0,
              "STS15 answers-forums": 4.0, "STS-B": 5.0, "SICK-R": 9.0, "Avg": 0.0}  # fmt: skip
    assert scoring.domain_scores(scores) == {SHIFTED: 5.5, study.OTHER: 3.25}


def results(**rows: list[float]) -> dict[str, Any]:
    """Return results of rows with a score for each seed from 42."""
    return {"rows": {name: {"runs": [record(42 + n, value) for n, value in enumerate(rows[name])]} for name in rows}}


@pytest.mark.parametrize(
    ("second", "verdicts"),
    [
        ([81.0, 82.1, 83.2], ("confirmed", "contradicted", "not significant")),
        ([79.0, 79.9, 81.1], ("contradicted", "confirmed", "not significant")),
        ([80.0, 81.1, 82.2], ("not significant", "not significant", "not significant")),
        ([80.1, 81.11, 82.12], ("confirmed", "contradicted", "confirmed")),  # significant, but within the margin
        ([80.01, 80.99, 82.0], ("not significant", "not significant", "confirmed")),
        ([80.0, 81.0, 82.0], ("no interval, so no verdict",) * 3),
        ([80.5], ("fewer than 2 common seeds",) * 3),
        ([], ("not run",) * 3),
    ],
)
def test_a_claim_is_judged_by_the_differences_paired_by_seed(second, verdicts):
    model = results(first=[80.0, 81.0, 82.0], second=second)
    claims = [study.Claim("first", "second", expected) for expected in ("higher", "lower", "equal")]
    assert tuple(pages.judge(model, claim).verdict for claim in claims) == verdicts


def test_a_claim_of_no_difference_is_confirmed_if_the_interval_of_90_percent_is_within_the_margin():
    for values in np.random.default_rng(0).normal(0.1, 0.12, (60, 4)):
        mean, half = np.mean(values), scipy.stats.t.ppf(0.95, 3) * np.std(values, ddof=1) / 2
        is_inside = abs(mean) + half < pages.MARGIN
        assert (pages.p_of_equivalence(values) < 0.05) == is_inside


def test_holm_multiplies_the_smallest_p_by_the_number_of_tests():
    assert pages.holm([0.04, 0.01, 0.03, 0.9]) == pytest.approx([0.09, 0.04, 0.09, 0.9])
    assert pages.holm([]) == []


def test_the_summary_bolds_only_what_is_significant_after_the_correction(workspace):
    scores = {"SimCSE": [79.7, 80.6, 81.8], "SimCSE + EH": [90.0, 91.0, 92.1]}
    write("table1", **scores, **{PROMCSE: [80.0, 81.0, 82.0], PROMCSE_EH: [80.3, 81.4, 82.2]})
    lines = pages.summary().splitlines()
    ends = {
        comparison: next(line for line in lines if f"| {comparison}, Avg |" in line).split(" | ")[-3:]
        for comparison in (f"{PROMCSE_EH} against {PROMCSE}", f"{PROMCSE} against SimCSE", "SimCSE + EH against SimCSE")
    }
    assert ends.pop("SimCSE + EH against SimCSE") == ["< 0.001", "< 0.001", "**confirmed** |"]
    assert [*ends.values()] == [
        ["0.035", "0.070", "confirmed, not after adjustment |"]
    ] * 2  # two of four tests have this p


def test_the_domain_claim_is_a_proxy_unless_cxc_is_scored():
    claim = STUDIES["domain"].claims[0]
    model = results(**{claim.first: [80.0, 81.0, 82.0], claim.second: [81.0, 82.1, 83.2]})
    assert pages.judge(model, claim).verdict == "confirmed"
    for row in model["rows"].values():
        for one in row["runs"]:
            del one["scores"]["CxC-STS"]
    judgement = pages.judge(model, claim)
    assert (judgement.task, judgement.verdict) == (SHIFTED, "confirmed (proxy)")
    assert pages.claim_cells(STUDIES["domain"], "minilm-3", judgement)[1] == f"{SHIFTED} (proxy of CxC-STS)"


def test_a_page_shows_the_paper_beside_means_intervals_and_verdicts(workspace):
    write("table1", **{PROMCSE: [81.0, 81.1, 81.2], PROMCSE_EH: [82.0, 81.9, 82.4]})
    pages.draw(["table1", "table3"])
    text = (study.study_folder("table1") / "README.md").read_text()
    assert "| PromCSE + EH | 82.13 | 82.10 ± 0.26 [81.44, 82.76] |" in text
    assert (
        "| PromCSE + EH against PromCSE | Avg | +0.32 | +1.00 [0.50, 1.50], 3 paired seeds | 0.013 | confirmed |"
        in text
    )
    assert "| PromCSE against SimCSE | Avg | +0.28 |  |  | not run |" in text
    assert "| SimCSE | 81.53 | not run | not run |  |  | none |" in text
    assert str(workspace.data) not in text
    whole = (study.summary_page()).read_text()
    assert (
        "[Table 1: semantic textual similarity](table1/README.md) | minilm-3 | PromCSE + EH against PromCSE, Avg |"
        in whole
    )
    assert whole.count("| not run |") > 20
    assert not study.study_folder("table3").exists()


def test_rows_without_a_claim_of_the_paper_are_compared_with_the_baseline_by_seed(workspace):
    write(
        "options",
        **{PROMCSE_EH: [87.0, 87.4, 87.2], "symmetric NT-Xent": [87.2, 87.5, 87.5], "biases, lr = 1e-3": [87.0]},
    )
    low, high = scipy.stats.ttest_1samp([0.2, 0.1, 0.3], 0.0).confidence_interval(0.95)
    lines = pages.baseline_table(STUDIES["options"], study.read_results("options")["minilm-3"])
    cells = {line.split(" | ")[0][2:]: line.split(" | ")[3] for line in lines if line.startswith("| ")}
    assert cells.pop("row") == "dev against PromCSE + EH |"
    assert cells == {
        "---": "--- |",
        "symmetric NT-Xent (removed)": f"+0.20 [{low:.2f}, {high:.2f}], 3 paired seeds |",
        "biases, lr = 1e-3": "+0.00, 1 seed |",
    }
    pages.draw(["options"])
    further = study.summary_page().read_text().partition("## Further pages")[2]
    assert [line for line in further.splitlines() if line.startswith("- ")] == [
        "- [Options beyond the paper](options/README.md)"
    ]


def test_the_best_option_is_compared_with_the_baseline_on_the_test_sets(workspace):
    rows = {PROMCSE_EH: [87.0, 87.4, 87.2], "biases, lr = 1e-3": [87.5, 87.8, 88.0]}
    write("best_option", **rows)
    model = study.read_results("best_option")["minilm-3"]
    for row in model["rows"].values():
        for one in row["runs"]:
            one["scores"]["Avg"] = 168 - one["dev_spearman"]
    table = "\n".join(pages.baseline_table(STUDIES["best_option"], model))
    assert "Avg against PromCSE + EH" in table
    assert "| -0.57 [" in table


def test_the_best_option_has_the_highest_dev_score_of_the_options_that_can_be_run():
    rows = json.loads((ROOT / "experiments/paper/options/results.json").read_text())["minilm-5120"]["rows"]
    runnable = study.selected_rows(STUDIES["options"], [])
    means = {
        row.name: np.mean([run["dev_spearman"] for run in rows[row.name]["runs"]])
        for row in runnable
        if rows[row.name]["runs"]
    }
    assert [row.name for row in STUDIES["best_option"].rows] == [PROMCSE_EH, max(means, key=means.__getitem__)]


def test_a_row_whose_setting_was_removed_is_shown_but_not_run(workspace, capsys):
    write("options", **{PROMCSE_EH: [87.0], "symmetric NT-Xent": [87.2]})
    removed = {row.name for row in STUDIES["options"].rows if row.is_removed}
    assert "symmetric NT-Xent" in removed
    assert removed.isdisjoint(row.name for row in study.selected_rows(STUDIES["options"], []))
    with pytest.raises(SystemExit):
        run.parse(["options", "--data", "data", "--only", "symmetric"])
    assert "symmetric NT-Xent was removed from the code; its page shows" in capsys.readouterr().err
    # removed rows have the same preset
    assert run.parse(["options", "--data", "data", "--only", "table1/prompt_eh"]).studies == ["options"]
    page = pages.study_page("options", STUDIES["options"], study.read_results("options"))
    assert page.count("| symmetric NT-Xent (removed) |") == 2
    assert "weighted negatives" not in page


def test_every_study_has_a_page_for_partial_results(workspace):
    for name, table in STUDIES.items():
        write(name, **{row.name: [80.0 + number, 80.5][: 2 if number else 1] for number, row in enumerate(table.rows)})
    assert run.main(["--draw"]) == 0
    for name, table in STUDIES.items():
        text = (study.study_folder(name) / "README.md").read_text()
        assert all(f"| {pages.name_of(row)} |" in text for row in table.rows)
        assert (study.study_folder(name) / "minilm-3.png").is_file() == bool(table.curves)
        assert "nan" not in text


@pytest.fixture
def fake_runs(monkeypatch) -> dict[tuple[str, int], BaseException | float]:
    """Replace training and scoring; return the errors or dev scores by row and seed, 80 by default."""
    outcomes: dict[tuple[str, int], BaseException | float] = {}

    def train(_: Workspace, row: Row, seed: int) -> dict[str, Any]:
        outcome = outcomes.get((row.name, seed), 80.0)
        if isinstance(outcome, BaseException):
            raise outcome
        return record(seed, outcome)

    origin = {"data": {"nli": {"sha256": "0"}}, "tasks": {}, "encoder": {"sha256": "e"}}
    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training, "describe_origin", lambda *_: origin)
    monkeypatch.setattr(training, "frozen_member", lambda *_: None)
    monkeypatch.setattr(training, "adapter_member", lambda _: None)
    monkeypatch.setattr(training, "score", lambda *_: {"Avg": 81.0})
    return outcomes


def seeds_by_row(key: str = "minilm-3") -> dict[str, list[int]]:
    """Return the recorded seeds of the rows of table 1."""
    rows = study.read_results("table1")[key]["rows"]
    return {name: [run["seed"] for run in row["runs"]] for name, row in rows.items()}


def test_a_failed_run_is_reported_and_the_others_are_recorded(workspace, fake_runs):
    fake_runs[PROMCSE, 43] = subprocess.CalledProcessError(2, "run.py")
    fake_runs["SimCSE", 42] = DataError("constant embeddings")
    failed = training.run_study("table1", STUDIES["table1"], workspace, (42, 43), lambda _: None)
    assert failed[0] == "SimCSE, seed 42: constant embeddings"
    assert failed[1].startswith("PromCSE, seed 43: exit code 2")
    other = {row.name: [42, 43] for row in STUDIES["table1"].rows}
    assert seeds_by_row() == other | {PROMCSE: [42], "SimCSE": [43]}


def test_a_rerun_merges_runs_by_row_and_seed(workspace, fake_runs):
    table = STUDIES["table1"]
    training.run_study("table1", table, workspace, (42, 43), lambda _: None)
    before = seeds_by_row()
    fake_runs[PROMCSE, 42] = 85.0
    training.run_study("table1", table, workspace, (42,), lambda _: None)
    training.run_study("table1", table, workspace, (44,), lambda _: None, ("table1/prompt",))
    training.run_study("table1", table, dataclasses.replace(workspace, rows=4), (42,), lambda _: None)
    assert seeds_by_row() == before | {PROMCSE: [42, 43, 44], PROMCSE_EH: [42, 43, 44]}
    runs = study.read_results("table1")["minilm-3"]["rows"][PROMCSE]["runs"]
    assert [one["dev_spearman"] for one in runs] == [85.0, 80.0, 80.0]
    assert seeds_by_row("minilm-4") == {row.name: [42] for row in table.rows}
    fake_runs[PROMCSE, 43] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        training.run_study("table1", table, workspace, (43,), lambda _: None, (PROMCSE,))
    assert seeds_by_row()[PROMCSE_EH] == [42, 43, 44]


def test_runs_with_another_learning_rate_are_not_averaged():
    old, new = record(42, 80.0), record(43, 81.0) | {"overrides": ["seed=43", "optim.lr=1e-2"]}
    assert training.add_record([old], new) == [new]
    assert training.add_record([new], old | {"overrides": ["seed=42", "optim.lr=1e-2"]})[1:] == [new]


def test_results_of_other_data_are_not_merged(workspace):
    write("table1", **{PROMCSE: [80.0]})
    with pytest.raises(DataError, match="results of minilm-3 with other data: nli"):
        training.check_origin("table1", "minilm-3", {"data": {"nli": {"sha256": "cd"}}})
    training.check_origin("table1", "minilm-4", {"data": {"nli": {"sha256": "cd"}}})


def test_a_run_folder_with_other_settings_is_refused(workspace, monkeypatch):
    folder, overrides = workspace.run_folder(EH, 42), workspace.overrides(EH, 42)
    folder.mkdir(parents=True)
    config = compose_config([*overrides, "trainer.log_every=3"], {})
    write_config(config, folder / "config.yaml")
    (folder / "results.json").write_text(json.dumps(dict.fromkeys(training.RECORD_KEYS, 1)))
    moved = dataclasses.replace(workspace, data=workspace.data / "moved")
    assert training.train(moved, EH, 42)["seed"] == 42
    write_config(compose_config([*overrides, "optim.lr=0.5"], {}), folder / "config.yaml")
    with pytest.raises(ConfigError, match=r"optim\.lr=0\.5, not 0\.03\. Try: --runs NEW_FOLDER"):
        training.train(workspace, EH, 42)


def test_an_error_of_a_study_does_not_stop_the_next_study(workspace, monkeypatch, capsys):
    def run_study(name: str, *_: object) -> list[str]:
        if name == "table7":
            raise DataError("no transfer data")
        return []

    monkeypatch.setattr(training, "run_study", run_study)
    assert run.main(["table7", "table1", "--data", str(workspace.data)]) == 1
    assert capsys.readouterr().err == "failed: table7: no transfer data\n"


def test_only_selects_rows_by_name_or_preset(capsys):
    table = STUDIES["table1"]
    supervised = study.selected_rows(table, ["table1/full", "table1/prompt"])
    assert [row.name for row in supervised] == ["SimCSE", "SimCSE + EH", PROMCSE, PROMCSE_EH]
    assert [row.name for row in study.selected_rows(table, ["unsup"])] == [study.UNSUP_SIMCSE, study.UNSUP_PROMCSE]
    assert study.selected_rows(table, []) == table.rows
    assert run.parse(["--data", "x", "--only", "m = 0.2"]).studies == ["table4"]
    with pytest.raises(SystemExit):
        run.parse(["table1", "--data", "x", "--only", "m = 0.2"])
    assert "no row of these studies contains m = 0.2" in capsys.readouterr().err


def test_a_dry_run_estimates_the_steps_and_reports_invalid_rows(workspace, capsys):
    whole = Workspace("roberta-large", workspace.data, workspace.runs, 0)
    steps, hours, memory = estimate.estimate("roberta-large", compose_config(whole.overrides(EH, 42), {}), 0)
    assert steps == 10 * 539  # 275,601 rows in batches of 512
    assert hours > 0.5
    assert memory > 10
    bad = Row("bad", "table1/prompt", ("loss.margin=0.1",))  # no effect without the hinge
    table = study.Study("t", "a", (EH, bad))
    (problem,) = estimate.dry_run("t", table, workspace, (42, 43))
    assert problem.startswith("bad: loss.margin=0.1 has no effect")
    printed = capsys.readouterr().out
    assert "1 steps of 128 rows" in printed
    assert "experiment=table1/prompt_eh" in printed


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter of a small encoder, whose prompt differs enough from an initial one to matter."""
    folder = tmp_path_factory.mktemp("small")
    encoder = PromCSE.load(save_small_adapter(folder)).encoder
    for weight in encoder.prompt.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    save_adapter(encoder, folder / "trained")
    return folder / "trained"


def test_the_cosine_of_an_ensemble_is_the_mean_of_the_cosines(adapter):
    models = [diagnostics.load_variant(adapter, seed=seed) for seed in (1, 2)]
    texts = ["w5 w6 w7", "w8 w9", "w20 w21 w5 w30"]
    cosines = [model.encode(texts) @ model.encode(texts).T for model in models]
    assert np.abs(cosines[0] - cosines[1]).max() > 1e-4
    both = diagnostics.Ensemble(models)
    embeddings = both.encode(texts)
    assert embeddings.shape == (3, both.width)
    np.testing.assert_allclose(embeddings @ embeddings.T, np.mean(cosines, axis=0), atol=1e-6)


def test_a_variant_keeps_the_trained_prompt_unless_it_gets_a_seed(adapter):
    texts = ["w5 w6 w7", "w8 w9"]
    trained = scoring.adapter_member(adapter).load().encode(texts)
    np.testing.assert_array_equal(diagnostics.load_variant(adapter).encode(texts), trained)
    assert np.abs(diagnostics.load_variant(adapter, seed=42).encode(texts) - trained).max() > 1e-3
    both = diagnostics.load_variant(adapter, pooling="cls+avg")
    embeddings = both.encode(texts)
    assert embeddings.shape == (2, 2 * trained.shape[1])
    mean = embeddings[:, trained.shape[1] :]
    np.testing.assert_allclose(mean / np.linalg.norm(mean, axis=1, keepdims=True), trained, atol=1e-6)


def test_cached_scores_are_those_of_the_same_model_and_data(adapter, tmp_path, monkeypatch):
    evaluated: list[str] = []
    files = {"demo test": [{"name": "a", "rows": 2, "sha256": "1"}]}
    monkeypatch.setattr(scoring, "files_of", lambda *_: files)
    monkeypatch.setattr(
        scoring, "_evaluate", lambda model, *_: {"Avg": float(len(evaluated))} | {model.adapter_hash(): 1}
    )

    def score(seed: int) -> dict[str, float]:
        member = Member(lambda: diagnostics.load_variant(adapter, seed=seed))
        return scoring.score(member, ("transfer",), tmp_path, tmp_path / "scores")

    assert scoring.score(Member(lambda: pytest.fail("loaded")), (), tmp_path, tmp_path) == {}
    first = score(1)
    evaluated.append("first")
    assert score(1) == first
    assert score(2) != first
    evaluated.append("second")
    before = score(2)
    files["demo test"][0]["sha256"] = "2"
    assert score(2) != before


def test_variants_are_paired_with_the_adapters_by_seed():
    dev = {"trained": [80.0, 81.0, 82.0], "random": [79.0, 80.1, 80.9], "one seed": [70.0]}
    variants = {name: {str(42 + n): value for n, value in enumerate(values)} for name, values in dev.items()}
    single = dict.fromkeys((study.FROZEN, "mean of the cosines"), 80.0)
    rows = {row[0]: row for row in pages.diagnostics_rows({"variants": variants, "single": single})}
    assert rows["random"][2] == "-1.00 [-1.25, -0.75]"
    assert rows["one seed"][2] == "fewer than 2 common seeds"
    assert rows[study.FROZEN][2] == "-1.00 [-3.48, 1.48]"
    assert rows["mean of the cosines"][2] == "-1.00"
    assert rows["trained"][2] == ""


def test_diagnostics_are_merged_by_seed(workspace):
    def write_scores(seed: int, **settings: str) -> dict[str, Any]:
        runs = [record(seed, 80.0) | settings]
        diagnostics._write(workspace, {"data": {}}, runs, "variants", {"trained": {str(seed): 1.0}})
        return study.read_results("diagnostics")["minilm-3"]

    write_scores(42)
    tree = write_scores(43)
    assert [one["seed"] for one in tree["runs"]] == [42, 43]
    assert [*tree["variants"]["trained"]] == ["42", "43"]
    assert [*write_scores(44, overrides=["optim.lr=1"])["variants"]["trained"]] == ["44"]  # type: ignore[arg-type]
    pages.draw_diagnostics()
    assert "## minilm-3" in (study.study_folder("diagnostics") / "README.md").read_text()


def write_data(folder: Path) -> Path:
    """Write 40 triplets and 20 dev pairs of the demo data where the studies read theirs."""
    nli, dev = folder / training.SOURCES["nli"], folder / "senteval/STS/STSBenchmark/sts-dev.csv"
    for file in (nli, dev):
        file.parent.mkdir(parents=True)
    rows = [("sent0", "sent1", "hard_neg"), *demo_triplets()[:40]]
    with nli.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    dev.write_text(
        "".join(f"x\tx\tx\t{n}\t{score}\t{a}\t{b}\n" for n, (a, b, score) in enumerate(demo_pairs("dev")[:20]))
    )
    return folder


def save_encoder(folder: Path) -> Path:
    """Write a small encoder with the tokenizer of MiniLM."""
    tokenizer = FrozenBackbone.load("sentence-transformers/all-MiniLM-L6-v2").tokenizer
    tokenizer.save_pretrained(folder)
    small_encoder("bert", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    return folder


def test_a_study_trains_scores_and_is_not_repeated(workspace, monkeypatch):
    small = Workspace(
        "minilm",
        write_data(workspace.data),
        workspace.runs,
        16,
        save_encoder(workspace.runs / "encoder"),
        ("data.batch_size=16", "trainer.max_steps=1", "data.dev=null", f"data.cache_dir={workspace.runs}/cache"),
    )

    def run_here(command: list[str], *, cwd: Path, env: dict[str, str], check: bool) -> None:
        """Run the command without the seconds that another process needs."""
        assert (command[:2], cwd, check) == ([sys.executable, "run.py"], ROOT, True)
        assert main(["train", *command[2:]]) == 0

    monkeypatch.setattr(
        training, "subprocess", SimpleNamespace(run=run_here, CalledProcessError=subprocess.CalledProcessError)
    )
    monkeypatch.setitem(scoring.SUITES, "sts", ["demo"])
    monkeypatch.setattr(scoring, "domain_scores", lambda _: {})
    table = study.Study("t", "a", (EH,), tasks=("demo test",), headline="demo test")
    said: list[str] = []
    assert training.run_study("small", table, small, (42,), said.append) == []
    (only,) = study.read_results("small")["minilm-16"]["rows"][PROMCSE_EH]["runs"]
    assert (only["steps"], only["rows"]) == (1, 16)
    assert only["scores"]["demo test"] != study.read_results("small")["minilm-16"]["frozen"]["demo test"]
    assert str(workspace.data) not in json.dumps(study.read_results("small"))
    before = {path: path.stat().st_mtime_ns for path in small.folder.rglob("*.json")}
    monkeypatch.setattr(training, "subprocess", None)  # a second call starts no run
    assert training.run_study("small", table, small, (42,), said.append) == []
    assert {path: path.stat().st_mtime_ns for path in small.folder.rglob("*.json")} == before
    shutil.rmtree(small.run_folder(EH, 42))  # another machine has results.json alone
    assert training.run_study("small", table, small, (42,), said.append) == []
    assert said[-1].endswith("in results.json")
