"""Retrieval by exact search: nDCG@10, MRR@10 and Recall of every query, computed by trec_eval."""

# q queries, Q queries of a block, N documents, D width

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from promcse_pl.data.retrieval import RetrievalSet, RoleText
from promcse_pl.evaluation.statistics import Floats
from promcse_pl.evaluation.sts import Embeddings

METRICS = {"ndcg_at_10": "nDCG@10", "mrr_at_10": "MRR@10", "recall_at_10": "Recall@10", "recall_at_100": "Recall@100"}
"""Metrics in results and their names in tables; the first one is the score."""
DEPTH = 100
"""Number of documents that are ranked for each query."""
BLOCK_QUERIES = 256
"""Queries that are searched and scored at once."""


def score_queries(
    data: RetrievalSet, embeddings: Embeddings, progress: Callable[[int, int], None] = lambda *_: None
) -> dict[str, Floats]:
    """Rank all documents by cosine for every query, and score the ranking.

    The gain of a document in nDCG is its relevance (Järvelin and Kekäläinen 2002; not 2^relevance - 1). Ties keep
    the order of the corpus. A document with the id of the query is excluded, as in BEIR.

    Args:
        data: The retrieval set.
        embeddings: Unit embeddings of `data.texts`.
        progress: Called with the number of queries done and of all.

    Returns:
        (q,) values in [0, 1] by the names of `METRICS`, in the order of the queries.
    """
    from promcse_pl.index import (
        SentenceIndex,
    )  # imported here: a missing data file is reported before torch is imported

    documents = SentenceIndex()
    documents.add(
        np.stack([embeddings[RoleText("document", text)] for text in data.documents.values()]), [*data.documents]
    )
    queries = [*data.queries]
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for start in range(0, len(queries), BLOCK_QUERIES):
        block = queries[start : start + BLOCK_QUERIES]
        embeddings_QD = np.stack([embeddings[RoleText("query", data.queries[query])] for query in block])
        hits = documents.search(embeddings_QD, top_k=DEPTH + 1)  # one more than DEPTH, for the query itself
        ranked = {
            query: [document for document, _ in found if document != query][:DEPTH]
            for query, found in zip(block, hits, strict=True)
        }
        for name, scores in _trec_eval(ranked, data.relevance).items():
            values[name] += scores
        progress(start + len(block), len(queries))
    return {name: np.array(scores) for name, scores in values.items()}


def _trec_eval(ranked: dict[str, list[str]], relevance: dict[str, dict[str, int]]) -> dict[str, list[float]]:
    """Return the metrics of each query from its ranked documents; a query without ranked documents scores 0."""
    from pytrec_eval import RelevanceEvaluator

    judged = {query: relevance[query] for query in ranked}
    # trec_eval sorts by score, so the score is the negative rank
    runs = {query: {found: -float(rank) for rank, found in enumerate(ids)} for query, ids in ranked.items()}
    first = {query: dict([*run.items()][:10]) for query, run in runs.items()}  # trec_eval has no cut-off for MRR
    cut = RelevanceEvaluator(judged, {"ndcg_cut.10", "recall.10,100"}).evaluate(runs)
    reciprocal = RelevanceEvaluator(judged, {"recip_rank"}).evaluate(first)
    names = {"ndcg_at_10": "ndcg_cut_10", "recall_at_10": "recall_10", "recall_at_100": "recall_100"}
    scores = {name: [cut.get(query, {}).get(key, 0.0) for query in ranked] for name, key in names.items()}
    return scores | {"mrr_at_10": [reciprocal.get(query, {}).get("recip_rank", 0.0) for query in ranked]}
