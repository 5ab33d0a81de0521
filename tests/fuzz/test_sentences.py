"""Any text as a sentence: a finite unit vector, or one error that names the position; from Python and from the shell."""

import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.encoders import save_small_encoder
from support.fuzzing import examples, only_our_errors

from promcse_pl.adapter import save_adapter
from promcse_pl.cli.main import main
from promcse_pl.embedder import PromCSE
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.utils.errors import DataError

HARD = [
    *(
        "",
        " ",
        "\t\n",
        "\0",
        "\x07\x1b[31m",
        "\ud800",
        "a\udfff",
        "🏳️‍🌈👩‍👩‍👧",
        "\u202eabc\u202c שלום",
        "e\u0301" * 40,
        "\ufeff",
    ),
    *(
        "[PAD]",
        "[CLS] [SEP]",
        "[UNK]",
        "[MASK]",
        "</s>",
        "zzz qqq",
        "w5 " * 300,
        "\u200b",
        "\U000e0001",
        "Ａ１",
        "\x85\u2028",
    ),
]
TEXT = st.sampled_from(HARD) | st.text(st.characters(), max_size=60)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A prompt so long that its shift leaves 16 positions."""
    base = tmp_path_factory.mktemp("sentences")
    torch.manual_seed(0)
    backbone = FrozenBackbone.load(str(save_small_encoder(base / "encoder")))
    save_adapter(PromptEncoder(backbone, length=24, pooling="avg", head="mlp"), base / "adapter")
    return base / "adapter"


@pytest.fixture(scope="module")
def models(adapter) -> list[PromCSE]:
    torch.manual_seed(0)
    minilm = FrozenBackbone.load("sentence-transformers/all-MiniLM-L6-v2")
    return [PromCSE.load(adapter, device="cpu"), PromCSE(PromptEncoder(minilm, length=10, pooling="avg", head="none"))]


def halves(text: str) -> bool:
    """Whether text holds a lone surrogate."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


@examples(1200)
@given(sentences=st.lists(TEXT, max_size=5), which=st.sampled_from([0, 0, 0, 1]))
@example(sentences=HARD[:5], which=1)
@example(sentences=["w5 " * 300, "w5"], which=0)
@example(sentences=[""], which=0)
def test_any_sentences_give_unit_vectors_in_their_order(models, sentences, which):
    model = models[which]
    with only_our_errors("sentences") as errors:
        vectors = model.encode(sentences)
        assert vectors.shape == (len(sentences), model.width)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        if sentences:
            np.testing.assert_allclose(model.encode(sentences[-1]), vectors[-1], atol=1e-4)
    bad = [position for position, text in enumerate(sentences) if halves(text)]
    assert bool(errors) == bool(bad)
    assert not bad or f"sentence {bad[0]} " in errors[0]


@pytest.mark.parametrize("wrong", [None, 3, b"bytes", ["nested"], float("nan")], ids=repr)
def test_a_value_that_is_not_text_is_named(models, wrong):
    with pytest.raises(DataError, match="sentence 1 must be a string, got "):
        models[0].encode(["w5", wrong])


@pytest.mark.parametrize(
    "text", ["x" * 1_000_000, "w5 " * 330_000, "漢" * 330_000, "🙂" * 250_000], ids=["letters", "words", "han", "emoji"]
)
def test_a_sentence_of_a_megabyte_is_cut_in_bounded_time(models, text):
    for model in models:
        started = time.process_time()
        vectors = model.encode([text, "w5"])
        assert time.process_time() - started < 20
        assert np.isfinite(vectors).all()


def test_a_sentence_longer_than_the_encoder_allows_is_what_its_beginning_is(models):
    model = models[0]
    assert model.max_tokens == 40 - 24
    words = [f"w{5 + i}" for i in range(60)]
    whole, beginning = model.encode([" ".join(words), " ".join(words[: model.max_tokens - 2])])
    np.testing.assert_array_equal(whole, beginning)


def test_only_unknown_tokens_are_a_sentence_too(models):
    vectors = models[0].encode(["zzz", "qqq", "w5"])
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert not np.allclose(vectors[0], vectors[2])


def shell(monkeypatch, capsys, arguments: list[str], given: bytes = b"") -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    code = main(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@examples(400)
@given(
    lines=st.lists(st.binary(max_size=20) | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")), max_size=4)
)
def test_any_bytes_in_a_pipe(adapter, lines):
    with pytest.MonkeyPatch.context() as patch:
        out, err = io.StringIO(), io.StringIO()
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines))))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        with only_our_errors("pipes"):
            code = main(["encode", str(adapter), "-", "--out", "-"])
    assert code in (0, 2)
    if code:
        assert err.getvalue().startswith("error: ")
        assert len(err.getvalue().splitlines()) == 1
    else:
        assert all(len(json.loads(line)) == 16 for line in out.getvalue().splitlines())


@pytest.mark.parametrize(
    "arguments",
    [
        ["encode", "ADAPTER", "x" * 5000, "--out", "-"],
        ["encode", "x" * 5000, "s.txt", "--out", "v.npy"],
        ["encode", "ADAPTER", "s.txt", "--out", "x" * 300 + ".npy"],
        ["encode", "ADAPTER", "s.txt", "--out", "../" * 3 + "x" * 300 + "/v.npy"],
        ["encode", "ADAPTER", "~nobody-of-this-name/s.txt", "--out", "v.npy"],
        ["similarity", "ADAPTER", "\udcff", "w5"],
        ["search", "ADAPTER", "s.txt", "\udcff"],
        ["evaluate", "x" * 5000, "--tasks", "demo"],
        ["evaluate", "~nobody-of-this-name/x", "--tasks", "demo"],
        ["evaluate", "ADAPTER", "--tasks", "x" * 5000 + ".csv"],
        ["import", "x" * 5000, "-o", "out"],
        ["import", "/" + "x" * 5000, "-o", "out"],
        ["import", "~nobody-of-this-name/x", "-o", "out"],
        ["export", "ADAPTER", "--to", "official", "-o", "x" * 300],
        ["train", "x" * 5000, "--out", "out"],
        ["train", "--resume", "x" * 5000],
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_names_that_no_file_can_have_are_one_line(adapter, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.txt").write_text("w5 w6\nw7\n")
    code, _, err = shell(monkeypatch, capsys, [str(adapter) if part == "ADAPTER" else part for part in arguments])
    assert code == 2
    assert err.startswith("error: ")
    assert len(err) < 4000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.txt"]
