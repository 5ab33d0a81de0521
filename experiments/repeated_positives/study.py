"""Measure the effect of `loss.mask_false_negatives` on pairs of which many share their positive.

    python experiments/repeated_positives/study.py --data DATA [--runs FOLDER] [--encoder FOLDER] [--draw]

The anchors are NLI hypotheses, the positives their premises: as with questions and answers, several anchors have the same
positive. The dev set is a retrieval of premises that are not in the training data. Skips finished runs, writes results.json and
generates README.md from it. --draw uses the existing results.json.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

from promcse_pl.evaluation.statistics import mean_over_seeds, seed_difference

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TRAINING = "nli/nli_train.csv"
SEEDS = (42, 43, 44)
SETTINGS = ("loss.mask_false_negatives=false", "loss.mask_false_negatives=true")
BATCH = 128
COMMON = (
    "model=minilm",
    "data=pairs",
    f"data.batch_size={BATCH}",
    "trainer.epochs=3",
    "trainer.eval_every=9",
    "trainer.precision=float32",  # `auto` could differ between runs
    "evaluation.tasks=[]",
    "tracking=local",
)
TRAINED_FROM, DEV_ROWS = 4, 3
"""Rows of a premise: at least TRAINED_FROM for training, exactly DEV_ROWS for the dev set."""
DEV_PREMISES = 2000
DEV_QUERIES = 500
ROW_SEED = 42


def write_data(source: Path, folder: Path) -> dict:
    """Write train.csv and the retrieval set dev/ from NLI triplets; return a description."""
    with source.open(encoding="utf-8", newline="") as stream:
        rows = [(row["sent0"].strip(), row["sent1"].strip()) for row in csv.DictReader(stream)]
    by_premise = defaultdict(list)
    for premise, hypothesis in dict.fromkeys(rows):
        by_premise[premise].append(hypothesis)
    train = [(text, premise) for premise, texts in by_premise.items() if len(texts) >= TRAINED_FROM for text in texts]
    dev = [premise for premise, texts in by_premise.items() if len(texts) == DEV_ROWS]
    dev = random.Random(ROW_SEED).sample(dev, DEV_PREMISES)

    (folder / "dev" / "qrels").mkdir(parents=True, exist_ok=True)
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([("anchor", "positive"), *train])
    corpus = [{"_id": f"d{number}", "title": "", "text": premise} for number, premise in enumerate(dev)]
    queries = [
        {"_id": f"q{number}", "text": by_premise[premise][0]} for number, premise in enumerate(dev[:DEV_QUERIES])
    ]
    for name, lines in (("corpus", corpus), ("queries", queries)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / "dev" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    qrels = "".join(f"q{number}\td{number}\t1\n" for number in range(DEV_QUERIES))
    (folder / "dev" / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return {
        "file": TRAINING,
        "sha256": hashlib.sha256((folder / "train.csv").read_bytes()).hexdigest(),
        "rows": len(train),
        "premises": len({premise for _, premise in train}),
        "share_with_copy": share_with_copy([premise for _, premise in train]),
        "queries": len(queries),
        "documents": len(corpus),
    }


def share_with_copy(positives: list[str], epochs: int = 100) -> float:
    """Return the share of rows whose positive also occurs in another row of their batch, over random epochs."""
    chance, copies, total = random.Random(ROW_SEED), 0, 0
    for _ in range(epochs):
        order = chance.sample(positives, len(positives))
        for start in range(0, len(order), BATCH):
            counts = Counter(order[start : start + BATCH])
            copies += sum(count for count in counts.values() if count > 1)
            total += sum(counts.values())
    return copies / total


def run(folder: Path, overrides: list[str]) -> dict:
    """Train a run, unless it is finished; return its results."""
    if not (folder / "results.json").is_file():
        arguments = [f"resume={folder}"] if (folder / "config.yaml").is_file() else [*overrides, "--out", str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "run.py", *arguments], cwd=ROOT, env=environment, check=True)
    return json.loads((folder / "results.json").read_text())


def train_all(data: Path, runs: Path, encoder: Path | None) -> dict:
    """Train all runs; return the study."""
    about = write_data(data / TRAINING, runs / "data")
    local = [f"data.train={runs / 'data' / 'train.csv'}", f"data.dev={runs / 'data' / 'dev'}"]
    local += [f"model.path={encoder}"] if encoder else []
    trials = []
    for seed in SEEDS:
        for setting in SETTINGS:
            folder = runs / setting.replace("=", "-") / f"seed{seed}"
            results = run(folder, [*COMMON, setting, f"seed={seed}", *local])
            kept = ("dev_ndcg_at_10", "best_step", "steps", "training_seconds", "machine", "versions")
            trials.append({"setting": setting, "seed": seed, **{key: results[key] for key in kept}})
    return {"data": about, "frozen": results["scores"]["frozen encoder"]["dev"], "common": COMMON, "trials": trials}


def page(study: dict) -> str:
    """Return the page of the study."""
    data, trials = study["data"], study["trials"]
    scores = {name: [each["dev_ndcg_at_10"] for each in trials if each["setting"] == name] for name in SETTINGS}
    lines = []
    for name in SETTINGS:
        mean, std, low, high = mean_over_seeds(scores[name])
        best = ", ".join(f"{each['best_step']}" for each in trials if each["setting"] == name)
        lines.append(f"| `{name}` | {mean:.2f} ± {std:.2f} [{low:.2f}, {high:.2f}] | {best} of {trials[0]['steps']} |")
    difference = seed_difference(scores[SETTINGS[0]], scores[SETTINGS[1]], is_paired=True)
    machine, versions = (
        trials[0]["machine"],
        ", ".join(f"{name} {each}" for name, each in trials[0]["versions"].items()),
    )
    minutes = sum(each["training_seconds"] for each in trials) / 60
    return "\n".join(
        [
            "# Masking false negatives where positives repeat",
            "",
            f"MiniLM, trained on {data['rows']:,} pairs of an NLI hypothesis and its premise. {data['premises']} premises occur in "
            f"{TRAINED_FROM} or more pairs each; in batches of {BATCH}, {data['share_with_copy']:.0%} of the rows have a copy of "
            f"their positive in another row. Dev set: {data['queries']} hypotheses as queries and {data['documents']:,} premises "
            "as documents, one of them relevant; no premise of the training data is among them.",
            "",
            "| setting | dev nDCG@10 | best step |",
            "| --- | --- | --- |",
            f"| frozen encoder | {study['frozen']:.2f} |  |",
            *lines,
            "",
            f"With the mask against without: {difference.verdict}.",
            "",
            f"Seeds {', '.join(map(str, SEEDS))}; mean ± standard deviation and 95 % interval over seeds, differences paired by "
            f"seed. `{' '.join(study['common'])}`. Data: `{data['file']}`, sha256 of the pairs `{data['sha256'][:16]}`. "
            f"{minutes:.0f} minutes of training with {machine['threads']} threads of a {machine['device']}, "
            f"{machine['precision']}; {versions}.",
            "",
            "Generated by `study.py` from `results.json`.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with nli/")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "repeated_positives")
    parser.add_argument("--encoder", type=Path, help="folder of the encoder, if it cannot be downloaded")
    parser.add_argument(
        "--draw", action="store_true", help="generate the page from results.json without running anything"
    )
    options = parser.parse_args()
    if not options.draw:
        if options.data is None:
            parser.error("--data or --draw is required")
        encoder = options.encoder.resolve() if options.encoder else None
        study = train_all(options.data.resolve(), options.runs.resolve(), encoder)
        (HERE / "results.json").write_text(json.dumps(study, indent=2) + "\n")
    (HERE / "README.md").write_text(page(json.loads((HERE / "results.json").read_text())))


if __name__ == "__main__":
    main()
