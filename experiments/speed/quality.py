"""Measure the effect of precision: dev scores of runs, and STS scores of one adapter by the type of the encoder.

    python experiments/speed/quality.py --data FOLDER RUN...

RUN: finished runs that differ only by seed and trainer.precision; the adapter of the first is evaluated. Writes quality.json,
which `measure.py --draw` puts into README.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

from machine import describe

from promcse_pl.embedder import PromCSE
from promcse_pl.evaluation.embeddings import EmbeddingCache
from promcse_pl.evaluation.report import headline
from promcse_pl.evaluation.suite import evaluate
from promcse_pl.evaluation.targets import Member, Target
from promcse_pl.evaluation.tasks import load_tasks

HERE = Path(__file__).resolve().parent
TYPES = ("float32", "bfloat16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    options = parser.parse_args()
    runs = [json.loads((run / "results.json").read_text()) for run in options.runs]
    targets = [
        Target(dtype, dtype, (Member(partial(PromCSE.load, options.runs[0], device="cpu", dtype=dtype)),))
        for dtype in TYPES
    ]
    with tempfile.TemporaryDirectory() as folder:
        tree = evaluate(targets, load_tasks(["sts", "sick"], options.data), EmbeddingCache(Path(folder)))
    results = {
        "machine": describe(),
        "runs": [
            {
                "seed": run["seed"],
                "precision": run["machine"]["precision"],
                "dev": run["dev_spearman"],
                "steps": run["steps"],
            }
            for run in runs
        ],
        "scores": headline(tree),
        "comparisons": [entry for entry in tree["comparisons"] if entry["task"] == "Avg"],
        "tasks": tree["tasks"],
    }
    (HERE / "quality.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
