"""--prompt-name and --prompt of `promcse encode`, `similarity` and `search`."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.encoders import save_small_encoder

from promcse_pl import PromCSE
from promcse_pl.adapter import save_adapter
from promcse_pl.cli.main import main
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.pipeline import TextSettings

PROMPTS = {"query": "w90 w91 ", "document": "w92 "}
LINES = ["w5 w6", "w7 w8 w9", "w10", "w11 w12"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    backbone = FrozenBackbone.load(save_small_encoder(folder / "encoder"))
    text = TextSettings(prompts=PROMPTS, default_prompt="document")
    save_adapter(PromptEncoder(backbone, length=3, pooling="avg", text=text), folder / "adapter")
    (folder / "lines.txt").write_text("\n".join(LINES) + "\n")
    return folder / "adapter"


@pytest.fixture
def model(adapter) -> PromCSE:
    return PromCSE.load(adapter, device="cpu")


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ([], "w92 "),
        (["--prompt-name", "query"], "w90 w91 "),
        (["--prompt", "w93 w94 "], "w93 w94 "),
        (["--prompt", ""], ""),
    ],
)
def test_encode_and_similarity_put_the_prompt_in_front_of_sentences(options, prompt, adapter, model, tmp_path, capsys):
    out = tmp_path / "vectors.npy"
    assert main(["encode", str(adapter), str(adapter.parent / "lines.txt"), "--out", str(out), *options]) == 0
    expected = model.encode([prompt + line for line in LINES], prompt="")
    assert np.array_equal(np.load(out), expected)
    capsys.readouterr()
    assert main(["similarity", str(adapter), LINES[0], LINES[1], *options]) == 0
    assert float(capsys.readouterr().out) == pytest.approx(float(expected[0] @ expected[1]), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "query", "document"),
    [
        ([], "w92 ", "w92 "),
        (["--prompt-name", "query"], "w90 w91 ", "w92 "),
        (["--prompt-name", "query", "--document-prompt", "w93 "], "w90 w91 ", "w93 "),
        (["--prompt", "", "--document-prompt-name", "query"], "", "w90 w91 "),
    ],
)
def test_search_has_one_prompt_for_queries_and_one_for_documents(options, query, document, adapter, model, capsys):
    corpus = str(adapter.parent / "lines.txt")
    assert main(["search", str(adapter), corpus, "w7 w8", "--top-k", "4", *options]) == 0
    found = dict(reversed(line.split("\t")) for line in capsys.readouterr().out.splitlines())
    cosines = model.encode([document + line for line in LINES], prompt="") @ model.encode(query + "w7 w8", prompt="")
    assert {line: float(cosine) for line, cosine in found.items()} == pytest.approx(
        dict(zip(LINES, map(float, cosines), strict=True)), abs=1e-4
    )


@pytest.mark.parametrize("command", ["encode", "similarity", "search"])
def test_an_unknown_prompt_name_is_refused_with_the_known_ones(command, adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = str(adapter.parent / "lines.txt")
    inputs = {"encode": [lines, "--out", "x.npy"], "similarity": ["w5", "w6"], "search": [lines, "w5"]}[command]
    prefixes = ["", "document-"] if command == "search" else [""]
    for prefix in prefixes:
        assert main([command, str(adapter), *inputs, f"--{prefix}prompt-name", "passage"]) == 2
        assert capsys.readouterr().err == (
            f"error: --{prefix}prompt-name passage: the adapter has no such prompt (known: query, document). "
            f"Try: --{prefix}prompt 'passage: ' for the text itself\n"
        )
        assert main([command, str(adapter), *inputs, f"--{prefix}prompt-name", "qury"]) == 2
        assert f"no such prompt (known: query, document). Try: --{prefix}prompt-name query\n" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_prompt_is_given_by_name_or_as_text(adapter, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["similarity", str(adapter), "w5", "w6", "--prompt", "w7 ", "--prompt-name", "query"])
    assert caught.value.code == 2
    assert "argument --prompt-name: not allowed with argument --prompt" in capsys.readouterr().err


def test_the_help_of_search_explains_the_prompts_of_queries_and_documents(capsys):
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "prompt of the queries: a name in adapter.json" in text
    assert 'text to put in front of the sentences of FILE; "" for none' in text


def test_joined_poolings_are_evaluated(adapter, tmp_path, capsys):
    (tmp_path / "pairs.csv").write_text("a,b,score\n" + "".join(f"w{i} w5,w{i} w{i + 9},{i}\n" for i in range(6, 20)))
    encoder, pairs = str(adapter.parent / "encoder"), str(tmp_path / "pairs.csv")
    assert main(["evaluate", encoder, "--tasks", pairs, "--pooling", "cls+max", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/results.json").read_text())["targets"]
    assert main(["evaluate", encoder, "--tasks", pairs, "--pooling", "mean"]) == 2
    error = capsys.readouterr().err
    assert "--pooling must be one of cls, cls_before_pooler, avg" in error
    assert error.endswith("got 'mean'. Try: --pooling avg\n")
