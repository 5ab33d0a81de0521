from pathlib import Path

import pytest

from promcse_pl.corpus.inputs import find_inputs
from promcse_pl.utils.errors import DataError


@pytest.fixture
def corpus(tmp_path) -> Path:
    for name in (
        "a.txt",
        "sub/b.csv.gz",
        "sub/deep/c.jsonl",
        ".hidden/d.txt",
        "_tmp/e.txt",
        ".f.txt",
        "_g.txt",
        "notes.md",
        "out/a.txt-00000.parquet",
    ):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("w5\n")
    return tmp_path / "corpus"


def names(*given: object, out: Path) -> list[str]:
    return [file.name for file in find_inputs([*given], out=out)]


def test_a_folder_gives_its_data_files_without_hidden_ones_and_the_output(corpus):
    assert names(corpus, out=corpus / "out") == ["a.txt", "sub--b.csv.gz", "sub--deep--c.jsonl"]


def test_a_pattern_skips_the_same_names_as_a_folder(corpus):
    assert names(corpus / "*.txt", out=corpus / "out") == ["a.txt"]
    assert names(corpus / "**/*.txt", out=corpus / "out") == ["a.txt"]
    assert names(corpus / "_g.txt", out=corpus / "out") == ["_g.txt"]
    with pytest.raises(DataError, match=r"names that start with \. or _ are skipped in folders and patterns"):
        names(corpus / "_*.txt", out=corpus / "out")


def test_a_pattern_names_files_by_their_path_below_its_fixed_part(corpus):
    assert names(corpus / "sub" / "*.gz", out=corpus / "out") == ["b.csv.gz"]
    assert names(str(corpus / "**/*.jsonl"), out=corpus / "out") == ["sub--deep--c.jsonl"]


def test_files_that_are_given_twice_are_read_once_and_sorted_by_name(corpus):
    given = (corpus / "sub/deep/c.jsonl", corpus / "a.txt", corpus / "*.txt")
    assert names(*given, out=corpus / "out") == ["a.txt", "c.jsonl"]


def test_equal_names_are_an_error_whose_advice_works(corpus):
    (corpus / "sub/a.txt").write_text("w6\n")
    with pytest.raises(DataError, match="would have the same output names") as error:
        names(corpus / "a.txt", corpus / "sub/a.txt", out=corpus / "out")
    pattern = str(error.value).split("Try: ")[1].split(" (one")[0].strip("'")
    assert names(pattern, out=corpus / "out") == ["a.txt", "sub--a.txt"]


def test_an_input_inside_the_output_folder_is_an_error_that_says_so(corpus):
    with pytest.raises(DataError, match=r"is inside the output folder .* Try: --out .*-embeddings"):
        names(corpus / "a.txt", out=corpus)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("missing.txt", "missing.txt does not exist; the current folder is "),
        ("*.parquet", r"\*.parquet matches no data file"),
        ("notes.md", "unknown format. Allowed: .csv"),
        ("-", "Try: a file instead of -, or --out FILE.npy"),
    ],
)
def test_what_cannot_be_read_is_an_error(given, message, corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    with pytest.raises(DataError, match=message):
        names(given, out=corpus / "out")
