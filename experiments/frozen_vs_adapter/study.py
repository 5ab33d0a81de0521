"""Does the adapter beat its frozen encoder, and by how much, over seeds?

    python experiments/frozen_vs_adapter/study.py --data DATA [--runs FOLDER] [--tasks sts,sick,transfer,geometry]

Trains the MiniLM recipe on DATA's NLI triplets with every seed, evaluates the frozen encoder and the runs together, writes
results.json beside this file, and draws README.md and the plots from it. Started again it goes on where it stopped: a finished
run is not repeated, and vectors are kept.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from promcse_pl.config import DATA_SUITES
from promcse_pl.evaluation.embeddings import EmbeddingCache
from promcse_pl.evaluation.plots import check_plot, draw
from promcse_pl.evaluation.report import render
from promcse_pl.evaluation.suite import evaluate
from promcse_pl.evaluation.targets import find_targets
from promcse_pl.evaluation.tasks import load_tasks

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
SEEDS = (42, 43, 44)
OVERRIDES = ["data=nli", "evaluation=none", "tracking=local", "trainer.precision=bfloat16"]
"""The precision is fixed: measured anew for each run, it could differ between the seeds."""
TRAINING = "nli/nli_train.csv"


def train(seed: int, data: Path, folder: Path) -> dict:
    """Train one seed unless its run is finished; an unfinished one begins anew."""
    if not (folder / "results.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "run.py", *OVERRIDES, f"seed={seed}", f"data.dir={data}", f"hydra.run.dir={folder}"]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    results = json.loads((folder / "results.json").read_text())
    kept = (
        "seed",
        "rows",
        "steps",
        "best_step",
        "dev",
        "dev_spearman",
        "trained_parameters",
        "training_seconds",
        "machine",
    )
    return {name: results[name] for name in kept}


def page(study: dict) -> str:
    runs = study["runs"]
    best = ", ".join(
        f"{run['dev_spearman']:.2f} (step {run['best_step']} of {run['steps']}, seed {run['seed']})" for run in runs
    )
    seconds = ", ".join(f"{run['training_seconds']:.0f}" for run in runs)
    machine = runs[0]["machine"]
    return "\n".join(
        [
            "# Frozen encoder against adapter",
            "",
            f"`{ENCODER}`, frozen, against adapters of {len(runs)} seeds: {runs[0]['trained_parameters']:,} trained parameters, "
            f"{runs[0]['rows']:,} NLI triplets (`{TRAINING}`, sha256 `{study['training_sha256'][:16]}`), `python run.py "
            f"{' '.join(study['overrides'])}`. The step was chosen by {runs[0]['dev']}: {best}.",
            "",
            "![scores](scores.png)",
            "",
            *(["![cosines by gold score](scores-density.png)", ""] if (HERE / "scores-density.png").is_file() else []),
            render(study["evaluation"], "markdown"),
            f"Trained in {seconds} s with {machine['threads']} threads of a {machine['device']}. Protocols: "
            "[docs/evaluation.md](../../docs/evaluation.md). "
            "Drawn by `study.py` from `results.json`.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "frozen_vs_adapter")
    parser.add_argument("--tasks", default=",".join(suite for suite in DATA_SUITES if suite != "cxc"))
    options = parser.parse_args()
    data, runs = options.data.resolve(), options.runs.resolve()
    tasks = load_tasks(options.tasks.split(","), data)
    check_plot(HERE / "scores.png")
    trained = [train(seed, data, runs / "adapters" / f"seed{seed}") for seed in SEEDS]
    targets = find_targets([ENCODER, str(runs / "adapters")], device="cpu")
    evaluation = evaluate(
        targets, tasks, EmbeddingCache(runs / "vectors"), lambda what, done, total: print(what, done, total)
    )
    study = {
        "runs": trained,
        "overrides": OVERRIDES,
        "training_sha256": hashlib.sha256((data / TRAINING).read_bytes()).hexdigest(),
        "evaluation": evaluation,
    }
    (HERE / "results.json").write_text(json.dumps(study, indent=2) + "\n")
    draw(evaluation, HERE / "scores.png")
    (HERE / "README.md").write_text(page(study))


if __name__ == "__main__":
    main()
