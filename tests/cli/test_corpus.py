"""`promcse encode --out FOLDER`, `index` and `search` on the index."""

import io
import json
import math
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.encoders import save_small_adapter

from promcse_pl.cli.main import main

TEXTS = [f"w{i + 10} w{i + 11}" for i in range(12)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return save_small_adapter(tmp_path_factory.mktemp("small"))


@pytest.fixture
def corpus(tmp_path) -> Path:
    (tmp_path / "corpus").mkdir()
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)]
    (tmp_path / "corpus/a.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "corpus"


def test_a_corpus_is_encoded_indexed_and_searched(adapter, corpus, tmp_path, capsys, monkeypatch):
    pytest.importorskip("faiss")
    out = str(tmp_path / "the out")
    encode = ["encode", str(adapter), f"{corpus}/*.jsonl", "--out", out, "--rows-per-shard", "5"]
    assert main([*encode, "--shard", "0/2"]) == 0
    assert main(encode) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1] == (f"{out}: new: 5 x 16 float32, unit length, in 1 shard; 2 finished before")
    assert "a.jsonl-00000.parquet" not in printed.out
    assert "a.jsonl-00000: 5 texts so far, " in printed.err
    assert "0 h 00 min left" in printed.err
    assert main(["index", out, "--kind", "flat"]) == 0
    command = shlex.split(capsys.readouterr().out.split("promcse ")[1])
    assert main(["search", str(adapter), command[2], "w13 w14", "--top-k", "1"]) == 0
    assert capsys.readouterr().out == "1.0000\tw13 w14\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"w13 w14\n")))
    assert main(["search", str(adapter), f"{out}/flat", "-", "--top-k", "1"]) == 0
    hit = {"sentence": "w13 w14", "score": 1.0, "columns": {"id": 3}}
    assert json.loads(capsys.readouterr().out) == {"query": "w13 w14", "hits": [hit]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "v.npy", "--text", "text"], "--text has no effect with --out v.npy. Try: --out FOLDER"),
        (["more.txt", "--out", "v.npy"], "--out v.npy takes one file, got 2. Try: --out FOLDER"),
        (["--out", "out", "--shard", "2"], "--shard must be I/N with 0 <= I < N, such as 0/8, got 2"),
        (["--out", "out", "--shard", "8/8"], "--shard must be I/N with 0 <= I < N, such as 0/8, got 8/8"),
        (["--out", "out", "--shard", "0/0"], "such as 0/8, got 0/0"),
        (["--out", "out", "--rows-per-shard", "0"], "--rows-per-shard must be at least 1, got 0"),
        (["--out", "out", "--text", "body"], "Try: --text text"),
        (["--out", "taken"], "taken already exists and is not overwritten"),
        (["missing.txt", "--out", "out"], "missing.txt does not exist"),
        (["--out", "v.npy", "--engine", "ray"], "--engine has no effect with --out v.npy. Try: --out FOLDER"),
        (["--out", "out", "--workers", "2"], "--workers has no effect without --engine ray. Try: --engine ray"),
        (["--out", "out", "--engine", "local", "--address", "auto"], "--address has no effect without --engine ray"),
        (["--out", "out", "--engine", "ray", "--shard", "0/2"], "distributes all shards. Try: without --shard"),
    ],
)
def test_errors_exit_with_2_and_say_what_to_type(arguments, message, adapter, corpus, capsys, monkeypatch):
    monkeypatch.chdir(corpus)
    (corpus / "taken").mkdir()
    (corpus / "taken/notes.txt").write_text("mine")
    assert main(["encode", str(adapter), "a.jsonl", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_pattern_needs_a_folder(adapter, corpus, capsys, monkeypatch):
    monkeypatch.chdir(corpus)
    assert main(["encode", str(adapter), "*.jsonl", "--out", "v.npy"]) == 2
    assert "--out v.npy takes one file, and *.jsonl is a pattern. Try: --out FOLDER" in capsys.readouterr().err


def test_columns_that_are_not_finite_are_printed_as_null(adapter, tmp_path, capsys, monkeypatch):
    pytest.importorskip("faiss")
    table = pa.table({"text": ["w11 w12"], "x": [math.nan], "deep": [[{"y": math.inf, "z": 1.5}]]})
    pq.write_table(table, tmp_path / "a.parquet")
    out = str(tmp_path / "out")
    assert main(["encode", str(adapter), str(tmp_path / "a.parquet"), "--out", out]) == 0
    assert main(["index", out, "--kind", "flat"]) == 0
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"w11 w12\n")))
    assert main(["search", str(adapter), f"{out}/flat", "-"]) == 0
    (hit,) = json.loads(capsys.readouterr().out)["hits"]
    assert hit["columns"] == {"x": None, "deep": [{"y": None, "z": 1.5}]}


@pytest.mark.parametrize("name", ["out", "v.npy"])
def test_the_home_folder_of_out_is_expanded(name, adapter, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(corpus)
    (corpus / "a.txt").write_text("w1\n")
    assert main(["encode", str(adapter), "a.txt", f"--out=~/{name}"]) == 0
    assert (tmp_path / name).exists()
    assert not (corpus / "~").exists()


def test_options_of_documents_have_no_effect_on_an_index(adapter, corpus, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["encode", str(adapter), str(corpus), "--out", out]) == 0
    assert main(["search", str(adapter), out, "w11", "--document-prompt", "x"]) == 2
    assert "have no effect on an index" in capsys.readouterr().err
    assert main(["search", str(adapter), out, "w11"]) == 2
    assert f"Try: promcse index {out} --kind ivfpq" in capsys.readouterr().err
