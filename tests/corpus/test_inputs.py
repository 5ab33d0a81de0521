import os
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


def test_the_advice_for_equal_names_starts_at_the_last_common_folder(tmp_path):
    for name in ("a/x/f.txt", "b/x/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("w5\n")
    with pytest.raises(DataError, match="would have the same output names") as error:
        names(tmp_path / "a/x/f.txt", tmp_path / "b/x/f.txt", out=tmp_path / "out")
    pattern = str(error.value).split("Try: ")[1].split(" (one")[0].strip("'")
    assert names(pattern, out=tmp_path / "out") == ["a--x--f.txt", "b--x--f.txt"]


def test_links_to_folders_are_followed_once_and_add_no_second_name(corpus, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/h.txt").write_text("w6\n")
    for name, target in (("link", "elsewhere"), ("again", "corpus/sub"), ("loop", "corpus"), ("_link", "elsewhere")):
        (corpus / name).symlink_to(tmp_path / target)
    assert names(corpus, out=corpus / "out") == ["a.txt", "link--h.txt", "sub--b.csv.gz", "sub--deep--c.jsonl"]


def test_a_folder_below_that_cannot_be_read_is_an_error(corpus, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"the folder .*/sub/deep cannot be read: Permission denied"):
        names(corpus, out=corpus / "out")


def test_saved_datasets_below_a_folder_are_inputs_and_encoded_corpora_are_not(corpus):
    for name, content in (
        ("sub/saved/state.json", "{}"),
        ("sub/saved/dataset_info.json", "{}"),
        ("sub/deep/state.json", "{}"),
        ("lost+found/d.txt", "w5"),
        ("sub/saved/more.txt", "w5"),
        ("splits/dataset_dict.json", '{"splits": ["train"]}'),
        ("splits/train/state.json", "{}"),
        ("splits/train/dataset_info.json", "{}"),
        ("encoded/a.txt-00000.parquet", ""),
        ("encoded/manifest.json", '{"format": 1, "promcse_pl": "1", "settings": {}, "inputs": []}'),
    ):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text(content)
    found = ["a.txt", "splits--train", "sub--b.csv.gz", "sub--deep--c.jsonl", "sub--saved"]
    assert names(corpus, out=corpus / "out") == found
    assert names(corpus / "encoded", out=corpus / "out") == ["a.txt-00000.parquet"]


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
