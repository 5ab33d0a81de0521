"""Tune the MiniLM recipe on STS-B dev, and on nothing else.

    python experiments/minilm_recipe/study.py --data FOLDER [--runs FOLDER]

Runs what is missing (a finished run is not repeated), writes results.json and draws README.md from it.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMMON = ["data=nli", "data.max_rows=10000", "evaluation.tasks=[]", "tracking=local", "trainer.eval_every=20"]
TRIALS = [
    "optim.lr=3e-2 prompt.position_offset=0",
    "optim.lr=3e-2 prompt.position_offset=null",
    "optim.lr=1e-2 prompt.position_offset=0",
    "optim.lr=1e-2 prompt.position_offset=null",
]
KEPT = ("dev_spearman", "best_step", "steps", "trained_parameters", "training_seconds", "rows_per_second", "seed")


def run(trial: str, data: Path, runs: Path) -> dict:
    folder = runs / trial.replace(" ", "_").replace("=", "-")
    if not (folder / "results.json").is_file():
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        command = [sys.executable, "run.py", *COMMON, *trial.split(), f"data.dir={data}", f"hydra.run.dir={folder}"]
        subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((folder / "results.json").read_text())


def draw(study: dict) -> str:
    ranked = sorted(study["trials"], key=lambda trial: -trial["dev_spearman"])
    lines = [
        "# The MiniLM recipe",
        "",
        "What was tried for `model=minilm data=nli`, ranked by STS-B dev (Spearman x 100); no test set had a say.",
        f"One epoch of the first {study['rows']:,} NLI triplets; the frozen encoder has {study['frozen_dev']:.2f}.",
        "`position_offset=null` is the official shift by P = 10.",
        "",
        "| overrides | dev | best step | trained parameters | training seconds |",
        "|---|---|---|---|---|",
    ]
    for trial in ranked:
        lines.append(
            f"| `{trial['overrides']}` | {trial['dev_spearman']:.2f} | {trial['best_step']} of {trial['steps']} "
            f"| {trial['trained_parameters']:,} | {trial['training_seconds']:.0f} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in study["versions"].items())
    common = " ".join(study["common"])
    lines += [
        "",
        f"Seed {ranked[0]['seed']}; training data sha256-keyed token cache `{study['tokens'][:16]}`; {versions}.",
        f"Common overrides: `{common}`.",
        "Seconds are of a shared machine and say little.",
        "",
        "Drawn by `study.py` from `results.json`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "minilm_recipe")
    options = parser.parse_args()
    trials, last = [], {}
    for trial in TRIALS:
        last = run(trial, options.data.resolve(), options.runs.resolve())
        trials.append({"overrides": trial, **{key: last[key] for key in KEPT}})
        study = {
            "trials": trials,
            "common": COMMON,
            "rows": last["rows"],
            "frozen_dev": last["scores"]["frozen encoder"]["dev"],
            "tokens": last["tokens"]["cache"],
            "data": last["evaluation"]["tasks"],
            "versions": {**last["versions"], "transformers": transformers.__version__, "torch": torch.__version__},
            "machine": {**last["machine"], "processor": platform.machine()},
        }
        (HERE / "results.json").write_text(json.dumps(study, indent=2) + "\n")
        (HERE / "README.md").write_text(draw(study))


if __name__ == "__main__":
    main()
