"""Checks of data files before a run."""

import itertools
import re

import pytest
from support.encoders import small_tokenizer

from promcse_pl.config import DataConfig
from promcse_pl.data import sources
from promcse_pl.data.sources import FIRST_ROWS, check_training_file, dev_set, find_file, load_sources
from promcse_pl.data.tokens import RowSource, load_tokens, memory_source
from promcse_pl.utils.errors import ConfigError, DataError


def config(train="my.csv", **settings) -> DataConfig:
    return DataConfig(**{"kind": "triplets", "train": str(train), **settings})


def test_no_data_dir_is_suggested_for_an_absolute_path(tmp_path):
    with pytest.raises(DataError) as caught:
        find_file(f"{tmp_path}/no.csv", config(), "data.train")
    assert str(caught.value) == f"data.train={tmp_path}/no.csv does not exist. Check the path"
    with pytest.raises(DataError, match=r"Try: data\.train=FILE, or data\.dir=FOLDER with no\.csv in it"):
        find_file("no.csv", config(), "data.train")


def test_the_first_rows_are_read_and_no_more(tmp_path, monkeypatch):
    path = tmp_path / "my.csv"
    path.write_text("a,b,c\n" + "x,y,z\n" * (FIRST_ROWS - 1) + "x,y\n")
    with pytest.raises(DataError, match=rf"my\.csv:{FIRST_ROWS + 1}: 2 fields, the header has 3"):
        check_training_file(config(path), 0)
    path.write_text("a,b,c\n" + "x,y,z\n" * FIRST_ROWS + "x,y\n")
    check_training_file(config(path), 0)
    read = sources.stream_rows
    taken = itertools.count()
    monkeypatch.setattr(
        sources, "stream_rows", lambda *args, **options: (row for row in read(*args, **options) if next(taken) >= 0)
    )
    check_training_file(config(path), 0)
    assert next(taken) == FIRST_ROWS


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("a,b,c\nx,y,z\n", {}, "my.csv has 1 row; a batch needs at least 2"),
        ("a,b,c\nx,y,z\nx,v,w\n", {"dev": "holdout"}, "too few different anchors (1) to hold some out"),
        ("a,b,c\nx,y,\n", {"on_bad_row": "skip"}, "has no usable row: 1 bad rows"),
        ("", {}, "my.csv is empty (0 bytes)"),
        ("a,b\nx,y\n", {}, "my.csv has 2 columns (a, b); triplets need 3"),
    ],
)
def test_a_file_that_cannot_be_trained_on_is_refused(tmp_path, content, settings, message):
    (tmp_path / "my.csv").write_text(content)
    with pytest.raises(DataError, match=re.escape(message)):
        check_training_file(config(tmp_path / "my.csv", **settings), 0)


def test_skipped_rows_do_not_change_the_fingerprint_of_the_rows_that_are_not_held_out_and_are_listed(tmp_path):
    def training_rows(*bad: str) -> RowSource:
        (tmp_path / "my.csv").write_text("".join(["a,b,c\n", *(f"x{i},y{i},z{i}\n" for i in range(20)), *bad]))
        return load_sources(config(tmp_path / "my.csv", dev="holdout", on_bad_row="skip"), 0)[0]

    source = training_rows()
    assert source.fingerprint == memory_source("", list(source.rows([]))).fingerprint, "as in earlier versions"
    for bad in ([], ["x,y\n"], ["x,y\n", "x,,z\n"], []):
        source = training_rows(*bad)
        assert source.fingerprint == training_rows().fingerprint
        tokens = load_tokens(source, small_tokenizer(), max_length=8, cache_dir=tmp_path / "cache")
        assert [row.line for row in tokens.bad_rows] == [22 + number for number in range(len(bad))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "sentence1,sentence2\na,b\n",
            "dev.csv has 2 columns (sentence1, sentence2); scored pairs need 3: sentence1, sen",
        ),
        ("a,b,score\nx,y,1\nv,w,1\n", "all scores (2 rows) are 1"),
        ("a,b,score\nx,y,1\n", "all scores (1 rows) are 1"),
    ],
)
def test_a_dev_file_without_a_correlation_is_refused_before_training(tmp_path, content, message):
    (tmp_path / "dev.csv").write_text(content)
    with pytest.raises((DataError, ConfigError), match=re.escape(message)):
        dev_set(config(dev=str(tmp_path / "dev.csv")))
