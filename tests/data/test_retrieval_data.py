"""Folders in BEIR layout are read; errors name the file and line."""

import dataclasses
import hashlib
import importlib.util
import json

import pytest
from support.retrieval import small_beir, write_beir

from promcse_pl.config import DataConfig
from promcse_pl.data.retrieval import RoleText, is_retrieval, load_retrieval
from promcse_pl.data.sources import dev_set
from promcse_pl.utils.errors import ConfigError, DataError

pytest.importorskip("pytrec_eval", reason="needs the extra: pip install -e '.[retrieval]'")

GOOD = ({"d1": "one", "d2": "two"}, {"q1": "first", "q2": "second"})


def test_a_split_has_its_judged_queries_all_documents_and_titles_in_front(tmp_path):
    folder = write_beir(tmp_path / "set", *GOOD, test={("q1", "d1"): 2, ("q1", "d2"): 0}, dev={("q2", "d2"): 1})
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "d3", "title": "A title", "text": "and text", "metadata": {}}) + "\n\n")
    data = load_retrieval(folder, "test")
    assert (data.name, data.queries, data.relevance) == ("set test", {"q1": "first"}, {"q1": {"d1": 2, "d2": 0}})
    assert data.documents == {"d1": "one", "d2": "two", "d3": "A title and text"}
    assert (len(data), data.size) == (1, "1 queries, 3 documents")
    assert data.texts[:2] == (RoleText("query", "first"), RoleText("document", "one"))
    files = [folder / name for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")]
    digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    assert data.sha256 == hashlib.sha256(digests.encode()).hexdigest()


def test_the_split_is_the_wanted_one_else_the_only_one_or_the_file_that_is_named(tmp_path):
    folder = write_beir(tmp_path / "set", *GOOD, dev={("q1", "d1"): 1})
    assert load_retrieval(folder, "test").name == "set dev"
    write_beir(folder, *GOOD, train={("q2", "d2"): 1})
    assert load_retrieval(folder, "dev").name == "set dev"
    assert load_retrieval(folder / "qrels/train.tsv", "test").name == "set train"
    with pytest.raises(DataError, match=r"has the splits dev, train, but no test\. Try: .*qrels/dev\.tsv$") as raised:
        load_retrieval(folder, "test")
    advised = str(raised.value).partition("Try: ")[2]
    assert load_retrieval(type(folder)(advised), "test").name == "set dev"


@pytest.mark.parametrize(
    ("splits", "advice"),
    [
        (("test", "train"), "train"),
        (("test", "train", "validation"), "validation"),
        (("a", "test"), "a"),
        (("other", "test", "validation"), "validation"),
    ],
)
def test_the_split_test_is_never_advised_for_a_dev_set(splits, advice, tmp_path):
    folder = write_beir(tmp_path / "set", *GOOD, **{split: {("q1", "d1"): 1} for split in splits})
    for named in ("set", "set/qrels/dev.tsv"):
        config = DataConfig(kind="triplets", train="demo", dev=named, dir=str(tmp_path))
        with pytest.raises(DataError, match=rf"the splits (are )?{', '.join(splits)}") as raised:
            dev_set(config)
        advised = str(raised.value).partition("Try: ")[2]
        assert advised == str(folder / f"qrels/{advice}.tsv")
        assert dev_set(dataclasses.replace(config, dev=advised)).name == f"set {advice}"


def test_a_missing_split_lists_the_others_and_advises_none_for_a_dev_set_if_only_test_exists(tmp_path):
    folder = write_beir(tmp_path / "set", *GOOD, test={("q1", "d1"): 1})
    with pytest.raises(DataError, match=r"dev\.tsv does not exist; the splits are test\.$"):
        load_retrieval(folder / "qrels/dev.tsv", "dev")
    with pytest.raises(DataError, match=r"dev\.tsv does not exist; the splits are test\. Try: .*qrels/test\.tsv$"):
        load_retrieval(folder / "qrels/dev.tsv", "test")


def test_a_query_without_a_relevant_document_is_left_out(tmp_path):
    folder = write_beir(tmp_path / "set", *GOOD, test={("q1", "d1"): 1, ("q2", "d2"): 0})
    assert list(load_retrieval(folder, "test").queries) == ["q1"]


QRELS = "query-id\tcorpus-id\tscore\n"
BROKEN = {
    "no corpus": ("corpus.jsonl", None, r"corpus\.jsonl does not exist"),
    "an empty corpus": ("corpus.jsonl", "", r"corpus\.jsonl is empty"),
    "a blank corpus": ("corpus.jsonl", "\n\n", r"corpus\.jsonl has no rows"),
    "a broken line": ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": ', r"corpus\.jsonl:2: not a JSON object"),
    "a list": ("corpus.jsonl", "[1]\n", r"corpus\.jsonl:1: expected a JSON object"),
    "no text": (
        "queries.jsonl",
        '{"_id": "q1", "body": "a"}\n',
        r"queries\.jsonl:1: _id and text must be strings, got \['_id', 'body'\]",
    ),
    "an id twice": ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n' * 2, r"corpus\.jsonl:2: the _id 'd1' occurs twice"),
    "a surrogate": ("queries.jsonl", '{"_id": "q1", "text": "\\ud800"}\n', r"queries\.jsonl:1: a lone surrogate"),
    "no qrels": ("qrels/test.tsv", None, r"has no qrels/test\.tsv"),
    "an unknown query": (
        "qrels/test.tsv",
        f"{QRELS}q1\td1\t1\nq9\td1\t1\n",
        r"test\.tsv:3: the query 'q9' is not in .*queries",
    ),
    "an unknown document": (
        "qrels/test.tsv",
        f"{QRELS}q1\td1\t1\nq1\td9\t1\n",
        r"test\.tsv:3: the document 'd9' is not in .*corpus",
    ),
    "no relevant one": ("qrels/test.tsv", f"{QRELS}q1\td1\t0\n", r"test\.tsv has no relevant document: all 1 scores"),
    "only a header": ("qrels/test.tsv", QRELS, r"test\.tsv has no judgements"),
    "a score in words": (
        "qrels/test.tsv",
        f"{QRELS}q1\td1\thigh\n",
        r"test\.tsv:2: the score 'high' is not an integer",
    ),
    "trec format": ("qrels/test.tsv", "q1 0 d1 1\n", r"test\.tsv:1: expected query-id, corpus-id and score separated"),
    "two scores": ("qrels/test.tsv", f"{QRELS}q1\td1\t1\nq1\td1\t2\n", r"test\.tsv:3: a second, different score"),
    "itself": (
        "qrels/test.tsv",
        f"{QRELS}x\tx\t1\n",
        r"test\.tsv:2: the document 'x' is relevant to the query with the same id",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_names_file_and_line(name, content, message, tmp_path):
    folder = write_beir(tmp_path / "set", *GOOD, test={("q1", "d1"): 1})
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    assert is_retrieval(folder)
    with pytest.raises(DataError, match=message):
        load_retrieval(folder, "test")


def test_without_the_package_one_line_has_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"Try: pip install 'promcse_pl\[retrieval\]'"):
        load_retrieval(tmp_path, "test")


def test_data_dev_takes_a_folder_in_beir_layout_with_its_split_dev(tmp_path):
    small_beir(tmp_path / "mine")
    dev = dev_set(DataConfig(kind="triplets", train="demo", dev="mine", dir=str(tmp_path)))
    assert (dev.name, dev.metric) == ("mine dev", "ndcg_at_10")
