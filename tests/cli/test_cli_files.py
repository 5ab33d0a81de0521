"""`promcse encode`, `search` and `similarity` on files and pipes."""

import gzip
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.encoders import save_small_adapter
from support.folders import ROOT

from promcse_pl.cli.main import main
from promcse_pl.embedder import PromCSE
from promcse_pl.run_folder import read_status

CORPUS = ["w5 w6", "w7", "w8 w9 w10", "w11 w12 w13 w14", "w40 zażółć"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return save_small_adapter(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def model(adapter) -> PromCSE:
    return PromCSE.load(adapter)


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f"{sentence}\n" for sentence in CORPUS), encoding="utf-8")
    return path


@pytest.fixture
def promcse(adapter, capsys, monkeypatch):
    """Run a command on the adapter; gives exit code, standard output and standard error."""

    def run(command: str, *arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main([command, str(adapter), *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_encode_writes_the_vectors_of_a_file(promcse, model, corpus, tmp_path):
    code, out, err = promcse("encode", corpus, "--out", tmp_path / "v.npy")
    assert (code, out, err) == (0, f"{tmp_path / 'v.npy'}: 5 x 16 float32, unit length\n", "")
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), model.encode(CORPUS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt", "v.npy"]  # and no temporary file


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_encode_reads_a_pipe_and_prints_json_lines_that_give_the_same_floats_back(promcse, model, ending):
    stdin = b"\xef\xbb\xbf" + (ending or "\n").join(CORPUS).encode() + ending.encode()
    code, out, err = promcse("encode", "-", "--out", "-", stdin=stdin)
    assert (code, err) == (0, "")
    vectors = np.array([json.loads(line) for line in out.splitlines()], dtype=np.float32)
    np.testing.assert_array_equal(vectors, model.encode(CORPUS))


def test_a_bar_is_drawn_on_a_terminal_and_only_on_standard_error(promcse, corpus, monkeypatch):
    plain = promcse("encode", corpus, "--out", "-")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich: take the stream for a terminal
    _, out, err = promcse("encode", corpus, "--out", "-")
    assert "encoding" in err
    assert out == plain[1]
    assert "encoding" in promcse("search", corpus, "w7")[2]


def test_search_prints_the_hits_of_a_query_with_their_scores(promcse, model, corpus):
    model.build_index(CORPUS)
    for options, settings in (
        ([], {}),
        (["--top-k", "2", "--threshold", "-1"], {"top_k": 2, "threshold": -1}),
        (["--threshold", "0.99"], {"threshold": 0.99}),
    ):
        wanted = "".join(f"{score:.4f}\t{sentence}\n" for sentence, score in model.search("w7", **settings))
        assert wanted.startswith("1.0000\tw7\n")
        assert promcse("search", corpus, "w7", *options) == (0, wanted, "")


def test_search_reads_queries_from_a_pipe_and_keeps_those_without_a_hit(promcse, model, corpus):
    model.build_index(CORPUS)
    queries = ["w40 zażółć", "w77 w78"]
    code, out, err = promcse("search", corpus, "-", "--threshold", "0.9999", stdin="\n".join(queries).encode())
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines == [
        {"query": "w40 zażółć", "hits": [{"sentence": "w40 zażółć", "score": 1.0}]},
        {"query": "w77 w78", "hits": []},
    ]


def test_search_reads_the_corpus_from_a_pipe_and_says_when_nothing_is_near(promcse, model):
    stdin = "\n".join(CORPUS).encode()
    code, out, _ = promcse("search", "-", "w7", stdin=stdin)
    assert (code, out.splitlines()[0]) == (0, "1.0000\tw7")
    code, out, err = promcse("search", "-", "w77", "--threshold", "1", stdin=stdin)
    assert (code, out) == (0, "")
    assert err == "no sentence has a cosine >= 1.0. Try: leave --threshold out\n"


def test_a_column_whose_name_is_not_known_is_reported(promcse, tmp_path):
    path = tmp_path / "corpus.csv"
    for name, note in (("文本", f"{path}: sentence=文本 (by position)\n"), ("sentence", "")):
        path.write_text(f"{name}\nw5 w6\n")
        assert promcse("encode", path, "--out", tmp_path / "v.npy")[2] == note


def test_similarity_of_two_sentences_is_one_number(promcse, model):
    wanted = f"{float(model.similarity('w5 w6', 'w7 w8')):.4f}\n"
    assert promcse("similarity", "w5 w6", "w7 w8") == (0, wanted, "")


def test_similarity_of_two_files_is_a_cosine_a_line(promcse, model, corpus, tmp_path):
    other = tmp_path / "other.txt.gz"
    other.write_bytes(gzip.compress("\n".join(reversed(CORPUS)).encode()))
    cosines = [float(model.similarity(a, b)) for a, b in zip(CORPUS, reversed(CORPUS), strict=True)]
    code, out, err = promcse("similarity", corpus, other)
    assert (code, err) == (0, "")
    np.testing.assert_allclose([float(line) for line in out.splitlines()], cosines, atol=6e-5)
    assert promcse("similarity", "-", other, stdin=corpus.read_bytes())[:2] == (0, out)


def test_errors_say_what_was_given_and_exit_with_2(promcse, corpus, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("w5\n")
    for arguments, message in (
        (
            ("encode", corpus, "--out", "v.txt"),
            "--out must end in .npy, be - for standard output, or be a folder, got v.txt",
        ),
        (("encode", corpus, "--out", tmp_path / "no" / "v.npy"), "does not exist"),
        (("encode", tmp_path / "no.txt", "--out", "-"), "no.txt does not exist"),
        (("encode", "-", "--out", "-"), "standard input is empty"),
        (("search", corpus, "w7", "--top-k", "0"), "top_k must be an integer >= 1, got 0"),
        (("search", corpus, "w7", "--threshold", "2"), "threshold must lie in [-1, 1] (a cosine), got 2.0"),
        (
            ("search", "-", "-"),
            "standard input can be read only once, got two arguments -. Try: a file for one of them",
        ),
        (("similarity", "-", "-"), "standard input can be read only once"),
        (("similarity", corpus, short), f"got 5 in {corpus} and 1 in {short}"),
        (("similarity", corpus, "w7 w8"), f"got one file: {corpus}"),
        (("similarity", "w7 w8", "typo.txt"), "got one file: typo.txt"),
        (("similarity", "typo.txt", "tpyo.txt"), "typo.txt does not exist"),
    ):
        code, out, err = promcse(*arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("error: ")
        assert message in err
    for stdin, message in (
        (b"w5\n\nw6", "standard input:2: the line is empty"),
        (b"w\xff", "standard input is not UTF-8"),
    ):
        code, _, err = promcse("encode", "-", "--out", "-", stdin=stdin)
        assert code == 2
        assert message in err


def test_a_long_sentence_is_not_looked_up_as_a_file(promcse):
    code, out, _ = promcse("similarity", "w5" * 200, "w6" * 200)
    assert (code, out) == (0, "1.0000\n")  # both are the unknown word


def test_a_folder_that_may_not_be_written_is_an_error_and_leaves_nothing(promcse, corpus, tmp_path, monkeypatch):
    (tmp_path / "v.npy").mkdir()
    code, _, err = promcse("encode", corpus, "--out", tmp_path / "v.npy")
    assert code == 2
    assert f"cannot write {tmp_path / 'v.npy'}: it is a folder. Try: --out {tmp_path / 'v.npy'}/embeddings.npy" in err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr("promcse_pl.embedder.PromCSE.load", lambda *_, **__: pytest.fail("loaded"))
    assert promcse("encode", corpus, "--out", tmp_path / "w.npy")[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt", "v.npy"]


@pytest.mark.slow
def test_a_closed_output_pipe_ends_a_command_without_an_error(adapter, tmp_path):
    (tmp_path / "many.txt").write_text("w5 w6\n" * 2000)

    def start(command: str, *arguments: str) -> subprocess.Popen[bytes]:
        whole = [sys.executable, "-m", "promcse_pl.cli.main", command, str(adapter), *arguments]
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        return subprocess.Popen(whole, cwd=ROOT, env=buffered, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    with start("encode", str(tmp_path / "many.txt"), "--out", "-") as much, start("similarity", "w5", "w6") as little:
        little.stdout.close()  # its one line is still in the buffer when the command ends
        assert much.stdout.readline().startswith(b"[")
        much.stdout.close()
        for process in (much, little):
            assert (process.wait(100), process.stderr.read()) == (0, b"")


@pytest.mark.parametrize("output", ["full", "closed"])
def test_a_full_output_is_an_error_and_a_closed_output_is_not(output, trained_run, tmp_path):
    shutil.copytree(trained_run.folder, tmp_path / "run")
    command = [sys.executable, "-m", "promcse_pl.cli.main", "report", str(tmp_path / "run")]
    shell = f"{shlex.join(command)} {'> /dev/full' if output == 'full' else '>&-'}"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    wanted = (2, "error: cannot read or write the output: No space left on device\n") if output == "full" else (0, "")
    assert (done.returncode, done.stderr) == wanted


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_closed_output_pipe_does_not_stop_a_run(trained_run, tmp_path):
    command = [
        sys.executable,
        "-m",
        "promcse_pl.cli.main",
        "train",
        str(trained_run.folder / "config.yaml"),
        "--out",
        "run",
    ]
    quiet = {**os.environ, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=quiet, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(100), process.stderr.read()) == (0, b"")
    assert read_status(tmp_path / "run").state == "finished"
    assert "adapter: run/adapter" in (tmp_path / "run/run.log").read_text()
