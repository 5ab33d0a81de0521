"""`promcse encode`, `similarity`, `train` and the parser, on the adapter of the shared run."""

import gzip
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from support.encoders import save_small_encoder

from promcse_pl import PromCSE, __version__
from promcse_pl.adapter import save_adapter
from promcse_pl.cli.main import main
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.run_folder import Status, write_status

SENTENCES = ["A woman is reading.", "Someone reads a book.", "The dog sleeps."]


def test_encode_writes_unit_vectors_in_the_order_of_the_lines(trained_run, tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text("\n".join(SENTENCES) + "\n")
    out = tmp_path / "vectors.npy"
    assert main(["encode", str(trained_run.folder), str(tmp_path / "corpus.txt"), "--out", str(out)]) == 0
    vectors = np.load(out)
    assert (vectors.shape, vectors.dtype) == ((3, 384), np.float32)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-6)
    assert np.allclose(vectors, PromCSE.load(trained_run.folder / "adapter", device="cpu").encode(SENTENCES), atol=1e-6)
    assert capsys.readouterr().out == f"{out}: 3 x 384 float32, unit length\n"
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.txt", "vectors.npy"}


@pytest.mark.parametrize("subfolder", ["", "adapter"])
def test_the_adapter_of_an_unfinished_run_is_reported_as_such(trained_run, tmp_path, capsys, subfolder):
    run = shutil.copytree(trained_run.folder, tmp_path / "run")
    for state, message in (("finished", ""), ("stopped", "the run is not finished: this is its best adapter so far\n")):
        status = json.loads((run / "status.json").read_text())
        (run / "status.json").write_text(json.dumps({**status, "state": state}))
        assert main(["similarity", str(run / subfolder), "One.", "Two."]) == 0
        assert capsys.readouterr().err == message


def test_encode_reads_gzipped_text(trained_run, tmp_path):
    with gzip.open(tmp_path / "corpus.txt.gz", "wt") as stream:
        stream.write("\n".join(SENTENCES[:2]) + "\n")
    out = tmp_path / "vectors.npy"
    assert (
        main(["encode", str(trained_run.folder / "adapter"), str(tmp_path / "corpus.txt.gz"), "--out", str(out)]) == 0
    )
    assert np.load(out).shape == (2, 384)


def test_similarity_prints_the_cosine(trained_run, capsys):
    assert main(["similarity", str(trained_run.folder), SENTENCES[0], SENTENCES[1]]) == 0
    alike = float(capsys.readouterr().out)
    assert main(["similarity", str(trained_run.folder), SENTENCES[0], SENTENCES[2]]) == 0
    unlike = float(capsys.readouterr().out)
    assert -1 <= unlike < alike <= 1
    model = PromCSE.load(trained_run.folder, device="cpu")
    assert alike == pytest.approx(float(model.similarity(SENTENCES[0], SENTENCES[1])), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "RUN", "corpus.txt", "--out", "vectors.csv"], "--out must end in .npy"),
        (["encode", "RUN", "corpus.txt", "--out", "nowhere/v.npy"], "the folder of --out nowhere/v.npy does not exist"),
        (["encode", "RUN", "missing.txt", "--out", "v.npy"], "missing.txt does not exist; the current folder is "),
        (["encode", "RUN", "corpus.pdf", "--out", "v.npy"], "corpus.pdf"),
        (["encode", "missing", "corpus.txt", "--out", "v.npy"], "missing is not an adapter: there is no such folder"),
        (["similarity", "missing", "a", "b"], "missing is not an adapter: there is no such folder"),
        (["train", "missing.yaml", "--out", "run"], "cannot read the config missing.yaml: "),
    ],
)
def test_a_user_error_has_exit_code_2_and_a_message_and_writes_nothing(
    arguments, message, trained_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("corpus.txt", "corpus.pdf"):
        (tmp_path / name).write_text("A line.\n")
    code = main([str(trained_run.folder) if argument == "RUN" else argument for argument in arguments])
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.txt", "corpus.pdf"}


def test_a_failed_encode_leaves_an_older_file_as_it_was(tmp_path):
    (tmp_path / "v.npy").write_bytes(b"older")
    (tmp_path / "corpus.txt").write_text("A line.\n")
    assert (
        main(["encode", str(tmp_path / "missing"), str(tmp_path / "corpus.txt"), "--out", str(tmp_path / "v.npy")]) == 2
    )
    assert (tmp_path / "v.npy").read_bytes() == b"older"


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"promcse {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["encode", "--help"]])
def test_help_and_version_do_not_wait_for_torch(arguments):
    command = [sys.executable, "-X", "importtime", "-m", "promcse_pl.cli.main", *arguments]
    start_time = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert time.perf_counter() - start_time < 5  # takes 0.1 s on an idle machine
    imports = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imports
    assert not imports & {"torch", "numpy", "transformers", "wandb", "hydra", "rich"}


def test_without_a_command_the_usage_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "usage: promcse" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("similarty a b c", "similarity"),
        ("serch", "search"),
        ("search a b c --treshold 0.1", "--threshold"),
        ("evaluate a --tasks sts --format=mardown", "markdown"),
    ],
)
def test_a_command_or_option_that_does_not_exist_names_the_nearest_in_one_line(arguments, meant, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("error: ")
    assert f". Did you mean {meant}? Try: promcse " in message


@pytest.mark.parametrize("command", ["evaluate a --tasks sts", "export a --to peft --out b"])
def test_an_option_of_another_command_is_refused_with_the_help_of_the_command(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--prompt-name", "query"])
    assert caught.value.code == 2
    expected = f"error: unrecognized arguments: --prompt-name query. Try: promcse {command.split()[0]} --help\n"
    assert capsys.readouterr().err == expected


@pytest.fixture
def moved_encoder(tmp_path) -> tuple[str, str]:
    """A run whose encoder has been moved, and the new folder of the encoder."""
    encoder = save_small_encoder(tmp_path / "encoder")
    adapter = PromptEncoder(FrozenBackbone.load(encoder), length=3, pooling="cls")
    save_adapter(adapter, tmp_path / "run/adapter", training={"seed": 1})
    encoder.rename(tmp_path / "moved")
    return str(tmp_path / "run"), str(tmp_path / "moved")


@pytest.mark.parametrize("command", ["similarity", "encode", "search", "evaluate", "export"])
def test_the_encoder_of_an_adapter_can_be_given_if_it_was_moved(command, moved_encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run, moved = moved_encoder
    lines, pairs, out = tmp_path / "lines.txt", tmp_path / "pairs.csv", tmp_path / "out.npy"
    lines.write_text("w5 w6\nw7\n")
    pairs.write_text("sentence1,sentence2,score\nw5,w6,1\nw7,w8,2\nw9,w5,3\n")
    arguments = {
        "similarity": [run, "w5", "w6"],
        "encode": [run, str(lines), "--out", str(out)],
        "search": [run, str(lines), "w5"],
        "evaluate": [run, "--tasks", str(pairs), "--device", "cpu"],
        "export": [run, "--to", "sentence-transformers", "--out", str(out)],
    }[command]
    assert main([command, *arguments]) == 2
    message = capsys.readouterr().err
    where = f"the encoder folder {tmp_path}/encoder does not exist (named in {tmp_path}/run/adapter/adapter.json, "
    assert where in message
    assert "Try: --encoder FOLDER (in Python: PromCSE.load(..., encoder=FOLDER))\n" in message
    assert main([command, *arguments, "--encoder", f"{moved}2"]) == 2
    assert f"the encoder folder {moved}2 does not exist (current folder" in capsys.readouterr().err
    assert main([command, *arguments, "--encoder", moved]) == 0


def test_an_encoder_for_targets_without_adapter_is_refused(moved_encoder, tmp_path, capsys):
    _, moved = moved_encoder
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2,score\nw5,w6,1\nw7,w8,2\nw9,w5,3\n")
    assert main(["evaluate", moved, "--tasks", str(tmp_path / "pairs.csv"), "--encoder", moved]) == 2
    assert "--encoder" in capsys.readouterr().err


def test_a_run_without_an_adapter_is_not_said_to_have_one(tmp_path, capsys):
    write_status(tmp_path, Status(state="failed"))
    assert main(["export", str(tmp_path), "--to", "sentence-transformers", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "best adapter so far" not in message
    assert f"{tmp_path} is not an adapter: it has no adapter.json" in message
