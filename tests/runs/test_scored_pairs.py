"""Training on pairs with scores: reading, caching, batches, ranks and messages."""

import re
import shlex

import numpy as np
import pytest
import torch
from support.configs import config_of
from support.encoders import small_tokenizer
from support.runs import run_small

from promcse_pl.config import DataConfig
from promcse_pl.data.module import PromcseDataModule
from promcse_pl.data.sources import check_training_file
from promcse_pl.utils.errors import ConfigError, DataError

ROWS = [(f"w{5 + i} w7", f"w{6 + i} w8 w9", i / 4) for i in range(10)]
TESTED = [(f"w{5 + i} w20", f"w{6 + i} w21", i / 4) for i in range(6)]


def write(path, rows=ROWS, header="score,sentence1,sentence2", order=(2, 0, 1)):
    lines = [",".join(str(row[i]) for i in order) for row in rows]
    path.write_text("\n".join([header, *lines] if header else lines) + "\n")
    return path


def data_of(path, tmp_path, **settings):
    config = DataConfig(
        kind="scored_pairs", train=str(path), batch_size=4, cache_dir=str(tmp_path / "cache"), **settings
    )
    check_training_file(config, 0)
    data = PromcseDataModule(config, small_tokenizer(), longest_input=32, seed=0)
    data.setup()
    return data


def test_every_batch_has_the_score_of_each_row(tmp_path):
    data = data_of(write(tmp_path / "rows.csv"), tmp_path)
    for _ in range(2):  # tokenised, then from the cache
        batches = list(data.train_dataloader())
        assert sorted(row for batch in batches for row in batch.rows_B.tolist()) == list(range(10))
        for batch in batches:
            assert batch.views == 2
            assert batch.scores_B.tolist() == [ROWS[row][2] for row in batch.rows_B.tolist()]
            parts = [batch.for_rank(rank, 3) for rank in range(3)]
            assert torch.equal(torch.cat([part.scores_B for part in parts]), batch.scores_B)
        data = data_of(tmp_path / "rows.csv", tmp_path)
    assert data.token_rows.reused


@pytest.mark.parametrize(
    ("header", "order", "settings"),
    [
        ("", (0, 1, 2), {}),
        ("a,b,rating", (0, 1, 2), {"columns": ["a", "b", "rating"]}),
        ("rating,a,b", (2, 0, 1), {"columns": [1, 2, 0]}),
        ("query,similarity,passage", (0, 2, 1), {}),
    ],
)
def test_columns_are_matched_by_name_or_position(tmp_path, header, order, settings):
    data = data_of(write(tmp_path / "rows.csv", header=header, order=order), tmp_path, **settings)
    assert data.example == ROWS[0]
    assert np.array_equal(data.token_rows.scores_R, np.float32([row[2] for row in ROWS]))


def test_a_bad_score_is_reported_with_its_line_or_skipped(tmp_path):
    path = write(tmp_path / "rows.csv", [ROWS[0], (*ROWS[1][:2], "high"), *ROWS[2:]])
    with pytest.raises(DataError, match=r"rows.csv:3: column score must hold a finite number.*on_bad_row=skip"):
        data_of(path, tmp_path)
    data = data_of(path, tmp_path, on_bad_row="skip")
    assert len(data.token_rows) == len(data.token_rows.scores_R) == 9
    assert data.token_rows.bad_rows[0].line == 3


def test_constant_scores_are_refused(tmp_path):
    path = write(tmp_path / "rows.csv", [(*row[:2], 1) for row in ROWS])
    with pytest.raises(DataError, match=r"all scores \(10 rows\) are 1, but CoSENT needs pairs with different scores"):
        data_of(path, tmp_path)


def test_a_file_without_scores_names_the_command_for_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.csv", header="sentence1,sentence2", order=(0, 1))
    with pytest.raises(DataError, match=r"scored pairs need 3: sentence1, sentence2, score") as caught:
        check_training_file(DataConfig(kind="scored_pairs", train="rows.csv"), 0)
    overrides = shlex.split(re.search(r"run\.py (.*)", str(caught.value))[1])
    check_training_file(config_of(*overrides).data, 0)


def test_pairs_with_a_score_column_name_the_command_for_scored_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.csv")
    with pytest.raises(DataError, match="If score is a similarity score: ") as caught:
        check_training_file(DataConfig(kind="pairs", train="rows.csv"), 0)
    overrides = shlex.split(re.search(r"similarity score: .*?run\.py (.*)", str(caught.value))[1])
    config = config_of(*overrides)
    assert config.data.kind == "scored_pairs"
    check_training_file(config.data, 0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.hinge_weight=10", "loss.hinge_weight=10 needs hard negatives"),
        ("loss.hard_negative_logit=1", "no effect with data.kind=scored_pairs"),
        ("data.columns=[a,b]", r"data.columns=\[sentence1,sentence2,score\]"),
        ("data.dev=holdout", "data.dev=holdout needs triplets"),
    ],
)
def test_settings_without_effect_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        config_of("data=scored_pairs", "data.train=rows.csv", override)


def test_a_run_trains_on_scored_pairs_and_logs_the_first_row(tmp_path):
    write(tmp_path / "train.csv")
    results, output = run_small(tmp_path, data={"kind": "scored_pairs"}, loss={"hinge_weight": 0.0})
    assert results["rows"] == 10
    assert "first row: sentence1 'w5 w7', sentence2 'w6 w8 w9', score 0" in " ".join(output.split())
    history = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "train/cosent" in history


def test_a_run_warns_of_test_pairs_in_the_training_file(tmp_path):
    write(tmp_path / "train.csv")
    lines = [
        f"{row}\t{first}\t{second}\t{1 + score}" for row, (first, second, score) in enumerate([*ROWS[:4], *TESTED])
    ]
    (tmp_path / "senteval" / "SICK").mkdir(parents=True)
    (tmp_path / "senteval" / "SICK" / "SICK_test_annotated.txt").write_text("\n".join(["header", *lines]) + "\n")
    for max_rows, share in ((None, "40 %"), (2, "20 %")):
        data = {"kind": "scored_pairs", "dir": str(tmp_path), "max_rows": max_rows}
        evaluation = {"tasks": ["sick"], "frozen": False}
        _, output = run_small(tmp_path, f"run{max_rows}", data=data, loss={"hinge_weight": 0.0}, evaluation=evaluation)
        warning = f"train.csv contains {share} of the test pairs of SICK-R: their scores do not measure generalisation"
        assert warning in " ".join(output.split())
    _, output = run_small(tmp_path, "no evaluation", data=data, loss={"hinge_weight": 0.0})
    assert "do not measure" not in output
