"""Retrieval metrics equal a slow plain loop; ties, prompts, bootstrap, tables and MTEB tasks."""

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from support.encoders import prompt_encoder, small_tokenizer
from support.folders import DATA
from support.retrieval import nli_beir, small_beir, write_beir

from promcse_pl import PromCSE
from promcse_pl.data.retrieval import RoleText, load_retrieval
from promcse_pl.evaluation.dev import dev_score, dev_texts, score_dev
from promcse_pl.evaluation.embeddings import EmbeddingCache, encode_texts
from promcse_pl.evaluation.plots import draw
from promcse_pl.evaluation.report import render, tables
from promcse_pl.evaluation.retrieval import METRICS, score_queries
from promcse_pl.evaluation.statistics import resample_counts
from promcse_pl.evaluation.suite import evaluate
from promcse_pl.evaluation.targets import Member, Target, find_targets
from promcse_pl.evaluation.tasks import load_tasks, retrieval_task
from promcse_pl.models.pipeline import TextSettings
from promcse_pl.utils.errors import ConfigError, DataError

pytest.importorskip("pytrec_eval", reason="needs the extra: pip install -e '.[retrieval]'")


def model_of(**settings):
    return PromCSE(prompt_encoder(head="none", dtype=torch.float32, **settings), small_tokenizer())


@pytest.fixture(scope="module")
def model():
    return model_of()


def random_set(folder, documents=250, queries=20):
    """Random unit vectors, three levels of relevance, and a document with the id of each query."""
    rng = np.random.default_rng(5)
    corpus = {f"d{n}": f"document {n}" for n in range(documents)} | {f"q{n}": f"query {n}" for n in range(queries)}
    wanted = {f"q{n}": f"query {n}" for n in range(queries)}
    scores = {}
    for query in wanted:
        for document in rng.choice(documents, 12, replace=False):
            scores[query, f"d{document}"] = int(rng.integers(0, 4))
    data = load_retrieval(write_beir(folder, corpus, wanted, test=scores), "test")
    vectors = {text: rng.normal(size=8).astype(np.float32) for text in dict.fromkeys(data.texts)}
    return data, {text: vector / np.linalg.norm(vector) for text, vector in vectors.items()}


def slow_metrics(data, embeddings, query):
    """The metrics of a query from their definitions."""
    vector = embeddings[RoleText("query", data.queries[query])].astype(np.float64)
    cosines = {
        document: float(vector @ embeddings[RoleText("document", text)].astype(np.float64))
        for document, text in data.documents.items()
        if document != query
    }
    ranked = sorted(
        cosines, key=lambda document: -round(cosines[document], 6)
    )  # stable: ties keep the order of the corpus
    gains = [max(0, data.relevance[query].get(document, 0)) for document in ranked]
    ideal = sorted((max(0, gain) for gain in data.relevance[query].values()), reverse=True)
    dcg, best = (sum(gain / math.log2(rank + 2) for rank, gain in enumerate(part[:10])) for part in (gains, ideal))
    relevant = sum(gain > 0 for gain in ideal)
    first = next((1 / (rank + 1) for rank, gain in enumerate(gains[:10]) if gain > 0), 0.0)
    recall = [sum(gain > 0 for gain in gains[:cut]) / relevant for cut in (10, 100)]
    return dict(zip(METRICS, (dcg / best, first, *recall), strict=True))


def test_the_metrics_of_every_query_equal_a_slow_plain_loop_with_graded_relevance(tmp_path):
    data, embeddings = random_set(tmp_path / "set")
    found = score_queries(data, embeddings)
    slow = [slow_metrics(data, embeddings, query) for query in data.queries]
    for metric in METRICS:
        assert found[metric].tolist() == pytest.approx([scores[metric] for scores in slow], abs=1e-6)
        assert 0 < found[metric].mean() < 1


def test_equal_cosines_keep_the_order_of_the_corpus(tmp_path):
    corpus = dict.fromkeys(("b", "c", "a"), "same")
    for first, rank in (("b", 1), ("c", 2), ("a", 3)):
        data = load_retrieval(write_beir(tmp_path / "set", corpus, {"q": "w"}, test={("q", first): 1}), "test")
        vector = np.array([0.6, 0.8], dtype=np.float32)
        scores = score_queries(data, dict.fromkeys(data.texts, vector))
        assert scores["mrr_at_10"].tolist() == pytest.approx([1 / rank])


def test_a_corpus_that_holds_only_the_query_itself_scores_0(tmp_path):
    data = load_retrieval(write_beir(tmp_path / "s", {"q": "a", "d": "b"}, {"q": "a"}, test={("q", "d"): 1}), "test")
    alone = type(data)(data.name, data.queries, {"q": "a"}, data.relevance, data.sha256)
    scores = score_queries(alone, {text: np.ones(2, dtype=np.float32) for text in alone.texts})
    assert {metric: values.tolist() for metric, values in scores.items()} == {metric: [0.0] for metric in METRICS}


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "default", "query", "document"),
    [
        ({"query": "w5 ", "document": "w6 ", "passage": "w7 "}, None, "w5 ", "w6 "),
        ({"passage": "w7 ", "corpus": "w8 "}, "corpus", "w8 ", "w7 "),
        ({"clustering": "w9 "}, "clustering", "w9 ", "w9 "),
        ({}, None, "", ""),
    ],
)
def test_queries_and_documents_get_their_prompts_also_from_the_cache(prompts, default, query, document, tmp_path):
    model = model_of(text=TextSettings(prompts=prompts, default_prompt=default))
    texts = ["w10 w11", RoleText("query", "w10 w11"), RoleText("document", "w10 w11")]
    expected = [model.encode("w10 w11"), *(model.encode("w10 w11", prompt=prompt) for prompt in (query, document))]
    cache = EmbeddingCache(tmp_path)
    for _ in range(2):
        found = cache.embeddings(model, [*texts, RoleText("query", "w12")])
        for text, vector in zip(texts, expected, strict=True):
            assert np.allclose(found[text], vector, atol=1e-6)
    assert cache.encoded == 1 + len(dict.fromkeys(texts)) if prompts else cache.encoded > 0
    assert encode_texts(model, texts).keys() == set(texts)


# --- suite and reports -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    small_beir(folder / "retrieval/one")
    small_beir(folder / "retrieval/two")
    (folder / "retrieval/readme").mkdir()
    targets = [
        Target(name, "adapter", (Member(lambda seed=seed: seed),))
        for name, seed in (("a", model), ("b", model_of(length=2)))
    ]
    return evaluate(targets, load_tasks(["retrieval"], folder), EmbeddingCache(folder / "cache"))


def test_the_suite_scores_every_folder_with_an_interval_over_queries(tree, model, tmp_path):
    scores = tree["targets"]["a"]["scores"]
    assert list(scores) == ["one test", "two test"]
    data = load_retrieval(small_beir(tmp_path / "one"), "test")
    values = score_queries(data, encode_texts(model, dict.fromkeys(data.texts)))
    assert scores["one test"]["value"] == pytest.approx(100 * values["ndcg_at_10"].mean())
    counts = np.concatenate([*resample_counts(len(data), seed=[0, *b"one test"])])
    low, high = np.quantile(100 * counts @ values["ndcg_at_10"] / len(data), [0.025, 0.975])
    assert (scores["one test"]["low"], scores["one test"]["high"]) == pytest.approx((low, high))
    for metric in ("mrr_at_10", "recall_at_10", "recall_at_100"):
        assert scores["one test"][metric] == pytest.approx(100 * values[metric].mean())
    assert [row["task"] for row in tree["comparisons"]] == ["one test", "two test"]
    assert (tree["tasks"]["one test"]["unit"], tree["tasks"]["one test"]["rows"]) == ("nDCG@10 x 100", 6)


def test_tables_and_plots_hold_the_score_and_the_further_metrics(tree, tmp_path):
    console = Console(file=io.StringIO(), width=80)
    for table in tables(tree):
        console.print(table)
    text, score = " ".join(console.file.getvalue().split()), tree["targets"]["a"]["scores"]["one test"]
    for shown in (text, " ".join(render(tree, "markdown").replace("|", " ").split())):
        assert f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]" in shown
        assert f"one test Recall@100 {score['recall_at_100']:.2f}" in shown
        assert "MRR and Recall x 100" in shown
    assert "| nDCG@10 x 100 | one test | two test |" in render(tree, "markdown")
    assert draw(json.loads(json.dumps(tree)), tmp_path / "plot.svg")[0].exists()


def test_the_suite_without_a_folder_names_what_it_looks_for(tmp_path):
    with pytest.raises(DataError, match=r"retrieval has no folder in BEIR layout"):
        load_tasks(["retrieval"], tmp_path)
    with pytest.raises(ConfigError, match=r"data folder with retrieval/ in it"):
        load_tasks(["retrieval"], None)


def test_a_folder_or_a_split_of_it_is_a_task(tmp_path):
    folder = small_beir(tmp_path / "mine")
    found = load_tasks([str(folder), str(folder / "qrels/dev.tsv")], None)
    assert [task.name for task in found] == ["mine test", "mine dev"]


def test_the_dev_score_is_the_mean_ndcg_with_and_without_the_cache(model, tmp_path):
    dev = load_retrieval(small_beir(tmp_path / "mine"), "dev")
    cached = EmbeddingCache(tmp_path / "cache").embeddings(model, dev_texts(dev))
    score = retrieval_task(dev, "dev", "dev").score(cached, lambda *_: None)
    assert score_dev(model, dev) == pytest.approx(dev_score(dev, cached)) == pytest.approx(score.value / 100)


@pytest.mark.realdata
@pytest.mark.exhaustive
def test_frozen_minilm_finds_the_hypothesis_of_an_nli_premise(tmp_path):
    folder = nli_beir(tmp_path / "nli", DATA / "nli/nli_train.csv")
    targets = find_targets(["sentence-transformers/all-MiniLM-L6-v2"])
    tree = evaluate(targets, load_tasks([str(folder)], None), EmbeddingCache(tmp_path / "cache"))
    score = tree["targets"]["all-MiniLM-L6-v2"]["scores"]["nli test"]
    assert score["low"] < score["value"] < score["high"]
    metrics = [score[name] for name in ("value", "low", "high", "mrr_at_10", "recall_at_10", "recall_at_100")]
    assert metrics == pytest.approx([89.16, 86.40, 91.88, 86.96, 96.00, 99.00], abs=0.1)  # as in docs/evaluation.md
