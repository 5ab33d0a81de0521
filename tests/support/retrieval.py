"""Small folders in BEIR layout."""

import csv
import json
from pathlib import Path


def write_beir(
    folder: Path, corpus: dict[str, str], queries: dict[str, str], **splits: dict[tuple[str, str], int]
) -> Path:
    """Write a folder with one file of judgements for each split; returns the folder."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, texts in (("corpus", corpus), ("queries", queries)):
        lines = (json.dumps({"_id": key, "text": text}) for key, text in texts.items())
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for split, scores in splits.items():
        rows = "".join(f"{query}\t{document}\t{score}\n" for (query, document), score in scores.items())
        (folder / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}", encoding="utf-8")
    return folder


def small_beir(folder: Path) -> Path:
    """Twelve queries of the small tokenizer among forty documents, with two relevant documents each; splits dev and test."""
    corpus = {f"d{n}": f"w{5 + n} w{6 + 3 * n % 80} w{7 + 5 * n % 80}" for n in range(40)}
    queries = {f"q{n}": f"w{5 + 3 * n} w{6 + 2 * n}" for n in range(12)}
    scores = {(f"q{n}", f"d{3 * n % 40}"): 2 for n in range(12)} | {
        (f"q{n}", f"d{7 * n % 40}"): 1 for n in range(1, 12)
    }
    dev = {pair: score for pair, score in scores.items() if int(pair[0][1:]) < 6}
    return write_beir(folder, corpus, queries, dev=dev, test={pair: scores[pair] for pair in scores if pair not in dev})


def nli_beir(folder: Path, nli: Path, queries: int = 300, documents: int = 3000) -> Path:
    """Entailments of NLI triplets: the premise is the query, its hypothesis the relevant document among those of other rows."""
    corpus: dict[str, str] = {}
    ids: dict[str, str] = {}
    wanted: dict[str, str] = {}
    scores: dict[tuple[str, str], int] = {}
    with nli.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            document = ids.setdefault(row["sent1"], f"d{len(ids)}")
            corpus[document] = row["sent1"]
            if len(wanted) < queries and row["sent0"] not in wanted.values():
                wanted[f"q{len(wanted)}"] = row["sent0"]
                scores[f"q{len(wanted) - 1}", document] = 1
            if len(corpus) == documents:
                break
    return write_beir(folder, corpus, wanted, test=scores)
