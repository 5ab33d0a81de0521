"""Compare the adapters of an encoder with the frozen encoder over three seeds.

    python experiments/frozen_vs_adapter/study.py --data DATA [--runs FOLDER] [--tasks sts,sick,transfer,geometry]
    python experiments/frozen_vs_adapter/study.py --data DATA --model mpnet [--encoder FOLDER]

Trains the recipe of a model on DATA's NLI triplets with every seed, evaluates the frozen encoder and the runs, writes
results.json in the folder of the model and generates README.md and the plots from it. Finished runs are skipped and embeddings
are cached.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
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
SEEDS = (42, 43, 44)
OVERRIDES = ["data=nli", "evaluation=none", "tracking=local", "trainer.precision=bfloat16"]
"""The precision is fixed: `auto` could differ between the seeds."""
TRAINING = "nli/nli_train.csv"


@dataclass(frozen=True)
class Model:
    """An encoder of the study.

    Attributes:
        encoder: Hub id, named on the page.
        folder: Folder of results.json and of the page.
        tasks: Default suites.
        overrides: Overrides of the recipe.
        note: Paragraph of the page about the comparison; empty for none.
    """

    encoder: str
    folder: Path
    tasks: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    note: str = ""


MODELS = {
    "minilm": Model(
        "sentence-transformers/all-MiniLM-L6-v2", HERE, tuple(suite for suite in DATA_SUITES if suite != "cxc")
    ),
    "mpnet": Model(
        "sentence-transformers/all-mpnet-base-v2",
        HERE / "mpnet",
        ("sts", "sick"),
        ("trainer.max_steps=57",),  # a quarter of an epoch; the dev score peaks earlier
        "The paper reports an average of 83.26 for RoBERTa-base and 85.10 for RoBERTa-large with the energy hinge (EH). This is "
        "not a like-for-like comparison: those adapters start from encoders that were pre-trained by masked language modelling "
        "alone, whereas all-mpnet-base-v2 was already trained contrastively on a billion sentence pairs, NLI among them. The "
        "gain over the frozen encoder is what the adapter adds.",
    ),
}


def train(seed: int, overrides: list[str], folder: Path) -> dict:
    """Train one seed unless its run is finished; an unfinished run is restarted."""
    if not (folder / "results.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "run.py", *overrides, f"seed={seed}", f"hydra.run.dir={folder}"]
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


def falls(evaluation: dict) -> str:
    """Return a sentence about the tasks on which the adapters score lower than the frozen encoder."""
    rows = [f"{row['task']} {row['verdict']}" for row in evaluation["comparisons"] if row["difference"] < 0]
    return f"Tasks on which the adapters score lower: {'; '.join(rows) or 'none'}."


def page(model: Model, study: dict) -> str:
    """Return the page of a model from its results."""
    runs = study["runs"]
    best = ", ".join(
        f"{run['dev_spearman']:.2f} (step {run['best_step']} of {run['steps']}, seed {run['seed']})" for run in runs
    )
    seconds = ", ".join(f"{run['training_seconds']:.0f}" for run in runs)
    machine = runs[0]["machine"]
    protocols = Path(os.path.relpath(ROOT / "docs" / "evaluation.md", model.folder)).as_posix()
    return "\n".join(
        [
            "# Adapter compared with the frozen encoder",
            "",
            f"Frozen `{model.encoder}` and adapters of {len(runs)} seeds: {runs[0]['trained_parameters']:,} trained parameters, "
            f"{runs[0]['rows']:,} NLI triplets (`{TRAINING}`, sha256 `{study['training_sha256'][:16]}`), `python run.py "
            f"{' '.join(study['overrides'])}`. Best step by {runs[0]['dev']}: {best}.",
            "",
            "![scores](scores.png)",
            "",
            *(
                ["![cosines by gold score](scores-density.png)", ""]
                if (model.folder / "scores-density.png").is_file()
                else []
            ),
            *([model.note, ""] if model.note else []),
            falls(study["evaluation"]),
            "",
            render(study["evaluation"], "markdown"),
            f"Training took {seconds} s with {machine['threads']} threads of a {machine['device']}. Protocols: "
            f"[docs/evaluation.md]({protocols}). "
            "Generated by `study.py` from `results.json`.",
            "",
        ]
    )


def evaluate_runs(model: Model, encoder: str, tasks: list[str], data: Path, runs: Path) -> dict:
    """Evaluate the frozen encoder and the runs of all seeds; the results name the encoder by its hub id."""
    frozen, adapters = find_targets([encoder, str(runs / "adapters")], device="cpu")
    frozen = dataclasses.replace(frozen, name=model.encoder.rpartition("/")[2])
    evaluation = evaluate(
        [frozen, adapters],
        load_tasks(tasks, data),
        EmbeddingCache(runs / "vectors"),
        lambda what, done, total: print(what, done, total),
    )
    for target in evaluation["targets"].values():
        for member in target["members"]:
            member["encoder"] = model.encoder
    return evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--encoder", type=Path, help="folder of the encoder, if it cannot be downloaded")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "frozen_vs_adapter")
    parser.add_argument("--tasks", help="suites, separated by commas (default: those of the model)")
    options = parser.parse_args()
    model = MODELS[options.model]
    tasks = options.tasks.split(",") if options.tasks else [*model.tasks]
    data, runs = options.data.resolve(), options.runs.resolve() / options.model
    load_tasks(tasks, data)  # missing files are reported before the training
    model.folder.mkdir(exist_ok=True)
    check_plot(model.folder / "scores.png")
    overrides = [f"model={options.model}", *OVERRIDES, *model.overrides]
    encoder = str(options.encoder.resolve()) if options.encoder else model.encoder
    local = [f"data.dir={data}", *([f"model.path={encoder}"] if options.encoder else [])]
    study = {
        "runs": [train(seed, [*overrides, *local], runs / "adapters" / f"seed{seed}") for seed in SEEDS],
        "overrides": overrides,
        "training_sha256": hashlib.sha256((data / TRAINING).read_bytes()).hexdigest(),
        "evaluation": evaluate_runs(model, encoder, tasks, data, runs),
    }
    (model.folder / "results.json").write_text(json.dumps(study, indent=2) + "\n")
    draw(study["evaluation"], model.folder / "scores.png")
    (model.folder / "README.md").write_text(page(model, study))


if __name__ == "__main__":
    main()
