"""`promcse evaluate`, and the same suites at the end of a run."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from promcse_pl.cli.main import main
from promcse_pl.data.demo import demo_pairs
from promcse_pl.runs.inputs import check_inputs
from promcse_pl.runs.lifecycle import run_job
from promcse_pl.utils.errors import ConfigError, DataError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_text("".join(f"{a}\t{b}\t{score}\n" for a, b, score in demo_pairs("test")[:60]))
    return path


def test_two_targets_are_scored_compared_written_and_drawn(trained_run, mine, tmp_path, capsys):
    out, plot = tmp_path / "out", tmp_path / "plot.png"
    other = mine.with_name("other.tsv")
    other.write_text("".join(mine.read_text().splitlines(keepends=True)[:50]))
    command = ["evaluate", MINILM, str(trained_run.folder), "--tasks", f"{other},{mine}", "--out", str(out)]
    assert main([*command, "--plot", str(plot), "--device", "cpu"]) == 0
    tree = json.loads((out / "results.json").read_text())
    assert list(tree["targets"]) == ["all-MiniLM-L6-v2", "run"]
    assert [target["kind"] for target in tree["targets"].values()] == ["frozen encoder, pooling avg", "adapter"]
    assert [(row["second"], row["task"]) for row in tree["comparisons"]] == [("run", "other.tsv"), ("run", "mine.tsv")]
    printed = capsys.readouterr()
    for target in tree["targets"].values():
        for score in target["scores"].values():
            assert f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]" in printed.out
    assert printed.err == f"{plot}\n"
    assert plot.stat().st_size > 1000
    assert {path.name for path in out.iterdir()} == {"results.json"}


@pytest.mark.parametrize(
    ("form", "file", "start"), [("markdown", "results.md", "| Sp"), ("latex", "results.tex", r"\beg")]
)
def test_the_tables_are_printed_and_written_in_the_form_that_is_asked_for(
    form, file, start, mine, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", MINILM, "--tasks", str(mine), "--format", form, "--out", "out", "--plot"]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "scores.pdf").read_bytes().startswith(b"%PDF")
    assert printed.startswith(start)
    assert (tmp_path / "out" / file).read_text() == printed


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_and_the_command_give_the_same_scores(trained_run, tmp_path):
    data = dataclasses.replace(trained_run.config.data, cache_dir=str(tmp_path / "cache"))
    evaluation = dataclasses.replace(trained_run.config.evaluation, tasks=["demo"], frozen=False)
    tracking = dataclasses.replace(trained_run.config.tracking, wandb="disabled")
    config = dataclasses.replace(trained_run.config, data=data, evaluation=evaluation, tracking=tracking)
    results = run_job(config, tmp_path / "run", Console(file=io.StringIO()))
    assert list(results["scores"]["adapter"]) == ["demo test", "dev"]
    assert (
        main(["evaluate", str(tmp_path / "run"), "--tasks", "demo", "--out", str(tmp_path / "o"), "--device", "cpu"])
        == 0
    )
    tree = json.loads((tmp_path / "o/results.json").read_text())
    score = tree["targets"]["run"]["scores"]["demo test"]
    of_run = results["evaluation"]["targets"]["adapter"]["scores"]["demo test"]
    assert score == pytest.approx(of_run, abs=0.01)  # other neighbours in a batch, other rounding
    assert "selected on these pairs" in results["evaluation"]["tasks"]["dev"]["protocol"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["T", "--tasks", "sick,stss"], "got 'stss'. Try: the same command with --tasks sick,sts"),
        (["T", "--tasks", "demo", "--plot", "x.jpg"], "a plot must end in .pdf, .png, .svg, got x.jpg"),
        (
            ["T", "--tasks", "sts"],
            "the tasks sts are read from a data folder with senteval/ in it, but none is given. Try: --data FOLDER",
        ),
        (["T", "--tasks", "sts", "--data", "nowhere"], "cannot read nowhere/senteval/STS"),
        (["T", "--tasks", "missing.csv"], "missing.csv does not exist"),
        (["./typo", "--tasks", "demo"], "the target ./typo does not exist"),
        ([MINILM, "--tasks", "demo", "--pooling", "mean"], "--pooling must be one of"),
    ],
)
def test_a_user_error_has_exit_code_2_and_a_message(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_link_that_leads_to_itself_is_no_target(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert main(["evaluate", "./loop", "--tasks", "demo"]) == 2
    assert "the target ./loop does not exist" in capsys.readouterr().err


def test_a_plot_that_cannot_be_written_is_an_error_and_leaves_no_file(mine, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    for path in (mine / "x.png", Path("/proc/x.png")):
        assert main(["evaluate", MINILM, "--tasks", str(mine), "--plot", str(path)]) == 2
        message = capsys.readouterr().err
        assert str(path) in message
        assert "can be written" in message or "cannot write" in message
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "xdg"] == before


def test_results_that_cannot_be_written_are_an_error_before_the_evaluation(mine, capsys, monkeypatch):
    monkeypatch.setattr("promcse_pl.evaluation.suite.evaluate", lambda *_: pytest.fail("evaluated"))
    for out in (mine, mine / "folder"):
        assert main(["evaluate", MINILM, "--tasks", str(mine), "--out", str(out)]) == 2
        assert f"cannot write to {out}: {mine} is not a writable folder" in capsys.readouterr().err


def test_the_tables_are_printed_even_if_they_cannot_be_written(mine, tmp_path, capsys, monkeypatch):
    def fail(path: Path, text: str) -> None:
        raise DataError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("promcse_pl.utils.files.write_text", fail)
    assert main(["evaluate", MINILM, "--tasks", str(mine), "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert "mine.tsv" in printed.out
    assert "No space left" in printed.err


def test_results_of_something_else_are_not_overwritten(trained_run, mine, tmp_path, capsys):
    before = (trained_run.folder / "results.json").read_bytes()
    command = ["evaluate", MINILM, "--tasks", str(mine), "--device", "cpu", "--format", "markdown", "--out"]
    assert main([*command, str(trained_run.folder)]) == 2
    assert (
        "run/results.json exists and was not written by promcse evaluate. Try: --out with another"
        in capsys.readouterr().err
    )
    assert (trained_run.folder / "results.json").read_bytes() == before
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper/results.md").write_text("mine")
    assert main([*command, str(tmp_path / "paper")]) == 2
    assert [path.read_text() for path in (tmp_path / "paper").iterdir()] == ["mine"]
    for _ in range(2):  # an evaluation replaces its own
        assert main([*command, str(tmp_path / "out")]) == 0


def test_a_run_may_not_be_chosen_by_pairs_that_it_is_tested_on(trained_run, mine):
    data = dataclasses.replace(trained_run.config.data, dev=str(mine))
    evaluation = dataclasses.replace(trained_run.config.evaluation, tasks=[str(mine)])
    config = dataclasses.replace(trained_run.config, data=data, evaluation=evaluation)
    with pytest.raises(
        ConfigError, match=r"is also in evaluation\.tasks \(mine\.tsv\), but the best step is selected on the dev set"
    ):
        check_inputs(config)
    renamed = mine.rename(mine.with_name("sts-test.tsv"))
    config = dataclasses.replace(config, data=dataclasses.replace(data, dev=str(renamed)))
    with pytest.raises(ConfigError, match=r"is a test set \(by its name\)"):
        check_inputs(dataclasses.replace(config, evaluation=trained_run.config.evaluation))
