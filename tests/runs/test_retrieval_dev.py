"""A retrieval set as dev set selects the best step, from training to the report of a sweep."""

import io
import json

import pytest
from rich.console import Console
from support.retrieval import small_beir
from support.runs import outcome, run_small, small_config

from promcse_pl import PromCSE
from promcse_pl.data.retrieval import load_retrieval
from promcse_pl.evaluation.dev import score_dev
from promcse_pl.run_folder import HISTORY, RESULTS, find_dev, read_history, read_results
from promcse_pl.runs.inputs import check_inputs
from promcse_pl.runs.lifecycle import resume_job
from promcse_pl.sweeps.collect import read_sweep
from promcse_pl.sweeps.ranking import find_best
from promcse_pl.sweeps.report import notes
from promcse_pl.sweeps.search import dev_evaluations
from promcse_pl.tracking.wandb import score_key
from promcse_pl.training import callbacks
from promcse_pl.utils.errors import ConfigError

pytest.importorskip("pytrec_eval", reason="needs the extra: pip install -e '.[retrieval]'")


def settings(folder, **data):
    small_beir(folder / "mine")
    return {
        "data": {"dev": str(folder / "mine"), **data},
        "trainer": {"epochs": 2, "eval_every": 1, "save_every": 2},
        "optim": {"lr": 0.1},
        "evaluation": {"tasks": [str(folder / "mine")]},
    }


def test_the_best_step_has_the_highest_ndcg_and_every_reader_finds_it(tmp_path):
    results, printed = run_small(tmp_path, "sweep/run", **settings(tmp_path))
    run = tmp_path / "sweep/run"
    scores = {
        entry["step"]: entry["dev/ndcg_at_10"] for entry in read_history(run / HISTORY) if "dev/ndcg_at_10" in entry
    }
    assert list(scores) == list(range(1, 7))
    assert results["dev_ndcg_at_10"] == pytest.approx(max(scores.values()), abs=1e-3)
    assert results["best_step"] == min(step for step, score in scores.items() if score == max(scores.values()))
    assert "dev_spearman" not in results
    dev = load_retrieval(tmp_path / "mine", "dev")
    assert 100 * score_dev(PromCSE.load(run), dev) == pytest.approx(results["dev_ndcg_at_10"], abs=0.01)
    assert (
        json.loads((run / "adapter/adapter.json").read_text())["training"]["dev_ndcg_at_10"]
        == results["dev_ndcg_at_10"]
    )
    assert "dev set: mine dev, 6 queries, 40 documents" in " ".join(printed.split())
    assert "dev nDCG@10" in " ".join(printed.split())
    assert find_dev(read_results(run), "dev_") == ("ndcg_at_10", results["dev_ndcg_at_10"])
    assert score_key("dev", "ndcg_at_10") == "dev/ndcg_at_10"
    assert set(results["scores"]["adapter"]) == {"mine test", "dev"}
    assert [score for _, score in dev_evaluations(run)] == [scores[step] for step in range(1, 6)]
    sweep = read_sweep(tmp_path / "sweep")
    assert (sweep.runs[0].metric, sweep.runs[0].dev, sweep.runs[0].state) == (
        "ndcg_at_10",
        results["dev_ndcg_at_10"],
        "finished",
    )
    best = find_best(sweep.runs)
    assert best is not None
    assert "ranked by mine dev, nDCG@10 x 100" in notes(sweep, [best.row], tests=False)
    (run / RESULTS).unlink()
    (run / "status.json").unlink()
    (unfinished,) = read_sweep(tmp_path / "sweep").runs
    assert (unfinished.metric, unfinished.dev) == ("ndcg_at_10", max(scores.values()))


def test_the_split_that_selects_the_best_step_cannot_be_a_task(tmp_path):
    raw = settings(tmp_path)
    raw["evaluation"] = {"tasks": [str(tmp_path / "mine/qrels/dev.tsv")]}
    with pytest.raises(
        ConfigError, match=r"is also in evaluation\.tasks \(mine dev\).*data\.dev=FOLDER/qrels/SPLIT\.tsv"
    ):
        check_inputs(small_config(tmp_path, **raw))
    raw["evaluation"] = {"tasks": [str(tmp_path / "mine")]}
    check_inputs(small_config(tmp_path, **raw))


def test_a_test_split_as_dev_set_is_a_warning(tmp_path):
    _, printed = run_small(
        tmp_path, **{**settings(tmp_path, dev=str(tmp_path / "mine/qrels/test.tsv")), "evaluation": {}}
    )
    assert "the best step is selected on the split test" in " ".join(printed.split())


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path, monkeypatch):
    raw = settings(tmp_path)
    run_small(tmp_path, "straight", **raw)
    calls, score = [], callbacks.score_dev

    def failing(model, dev):
        calls.append(dev.name)
        if len(calls) == 5:
            raise RuntimeError("killed on purpose")
        return score(model, dev)

    monkeypatch.setattr(callbacks, "score_dev", failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        run_small(tmp_path, "resumed", **raw)
    resume_job(tmp_path / "resumed", Console(file=io.StringIO()))
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "straight")
