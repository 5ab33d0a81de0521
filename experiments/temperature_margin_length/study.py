"""Measure the effect of temperature, margin and prompt length on the dev score of MiniLM with NLI triplets.

    python experiments/temperature_margin_length/study.py --data DATA [--runs FOLDER] [--parallel N] [--draw]

Runs the sweep of 27 jobs on a fixed subset of DATA's NLI triplets, and the centre of the grid with two more seeds to estimate
the variance over seeds. Writes results.json and generates README.md and the plots from it. Resumes unfinished sweeps. --draw
uses the existing results.json.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KEYS = ("loss.temperature", "loss.margin", "prompt.length")
GRID = ["loss.temperature=0.03,0.05,0.1", "loss.margin=0.1,0.2,0.3", "prompt.length=6,10,16"]
SEEDS = ["seed=43,44"]
"""Further seeds of the centre of the grid; the grid itself has seed 42."""
COMMON = ["data=nli", "evaluation.tasks=[]", "evaluation.frozen=false", "tracking=local", "trainer.precision=float32"]
"""The precision is fixed: `auto` could differ between jobs."""
TRAINING = "nli/nli_train.csv"
ROW_SEED = 42
KEPT = ("dev_spearman", "best_step", "steps", "rows", "training_seconds", "seed")


def subset(source: Path, rows: int, target: Path) -> str:
    """Write a seeded sample of the triplets in their order; return its sha256."""
    with source.open(encoding="utf-8", newline="") as stream:
        header, *triplets = list(csv.reader(stream))
    chosen = sorted(random.Random(ROW_SEED).sample(range(len(triplets)), rows))
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header, *(triplets[row] for row in chosen)])
    return hashlib.sha256(target.read_bytes()).hexdigest()


def sweep(folder: Path, overrides: list[str], parallel: int) -> list[dict]:
    """Run or resume a sweep; return the settings and results of each job."""
    started = (folder / "sweep.json").is_file()
    where = [f"sweep.resume={folder}"] if started else [*overrides, f"hydra.sweep.dir={folder}"]
    command = [sys.executable, str(ROOT / "run.py"), "-m", *where, f"sweep.parallel={parallel}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    jobs = []
    for job in json.loads((folder / "sweep.json").read_text())["jobs"]:
        results = json.loads((folder / job["folder"] / "results.json").read_text())
        values = dict(entry.split("=", 1) for entry in job["overrides"])
        jobs.append(
            {
                **{key: float(values[key]) for key in KEYS if key in values},
                **{name: results[name] for name in KEPT},
                "interval": [
                    results["evaluation"]["targets"]["adapter"]["scores"]["dev"][end] for end in ("low", "high")
                ],
                "versions": results["versions"],
                "machine": results["machine"],
            }
        )
    return jobs


def values_of(study: dict, key: str) -> list[float]:
    return sorted({job[key] for job in study["grid"]})


def score(study: dict, **wanted: float) -> float:
    found = [job["dev_spearman"] for job in study["grid"] if all(job[key] == value for key, value in wanted.items())]
    return statistics.mean(found)


def pictures(study: dict) -> None:
    """Draw a heat map for each prompt length, and the score over the prompt length."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    temperatures, margins, lengths = (values_of(study, key) for key in KEYS)
    scores = [job["dev_spearman"] for job in study["grid"]]
    figure, axes = plt.subplots(1, len(lengths), figsize=(3.4 * len(lengths), 3.2), squeeze=False, layout="constrained")
    for axis, length in zip(axes[0], lengths, strict=True):
        table = [
            [score(study, **dict(zip(KEYS, (temperature, margin, length), strict=True))) for margin in margins]
            for temperature in temperatures
        ]
        image = axis.imshow(table, vmin=min(scores), vmax=max(scores), cmap="viridis")
        for row, line in enumerate(table):
            for column, value in enumerate(line):
                dark = value < (min(scores) + max(scores)) / 2
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
        axis.set_xticks(range(len(margins)), [f"{margin:g}" for margin in margins])
        axis.set_yticks(range(len(temperatures)), [f"{temperature:g}" for temperature in temperatures])
        axis.set(title=f"prompt length {length:g}", xlabel="margin", ylabel="temperature")
    figure.colorbar(image, ax=axes, label="dev Spearman x 100")
    figure.savefig(HERE / "heatmaps.png", dpi=130)
    plt.close(figure)

    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for temperature in temperatures:
        line = [score(study, **{KEYS[0]: temperature, KEYS[2]: length}) for length in lengths]
        axis.plot(lengths, line, marker="o", label=f"temperature {temperature:g}")
    axis.set(xlabel="prompt length", ylabel="dev Spearman x 100\nmean over margins", xticks=lengths)
    axis.legend()
    figure.savefig(HERE / "length.png", dpi=130)
    plt.close(figure)


def finding(study: dict) -> list[str]:
    """Compare the scores with the variance over seeds."""
    scores = [job["dev_spearman"] for job in study["grid"]]
    best = max(study["grid"], key=lambda job: job["dev_spearman"])
    lines = [
        f"Dev scores range from {min(scores):.2f} to {max(scores):.2f}; the best settings are "
        f"{', '.join(f'{key} {best[key]:g}' for key in KEYS)}."
    ]
    noise = [job["dev_spearman"] for job in study["seeds"]]
    if len(noise) < 2:
        return [*lines, "The variance over seeds was not measured, so the settings are not ranked."]
    deviation = statistics.stdev(noise)
    lines.append(
        f"The centre of the grid scores {statistics.mean(noise):.2f} ± {deviation:.2f} (standard deviation) over "
        f"{len(noise)} seeds."
    )
    for key in KEYS:
        means = {value: score(study, **{key: value}) for value in values_of(study, key)}
        span = max(means.values()) - min(means.values())
        # a mean over k jobs that share a seed: a rough comparison, not a significance test
        said = "more than" if span > 2 * deviation else "within"
        shown = ", ".join(f"{value:g}: {mean:.2f}" for value, mean in means.items())
        lines.append(
            f"Means by {key}: {shown}. Their range of {span:.2f} is {said} two standard deviations over seeds."
        )
    low, high = best["interval"]
    return [
        *lines,
        f"The 95 % confidence interval of the best score over dev pairs is [{low:.2f}, {high:.2f}], wider than the range of the "
        "grid. The differences above are on the same pairs.",
        "The results are for one encoder, one data set of this size, the default learning rate and three seeds.",
    ]


def page(study: dict) -> str:
    rows = sorted(study["grid"], key=lambda job: -job["dev_spearman"])
    machine = rows[0]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items())
    seconds = [job["training_seconds"] for job in rows]
    return "\n".join(
        [
            "# Temperature, margin and prompt length",
            "",
            f"`python run.py -m {' '.join(GRID)}` with MiniLM on {study['rows']:,} of the NLI triplets (a sample "
            f"with seed {ROW_SEED} of `{TRAINING}`, sha256 of the sample "
            f"`{study['training_sha256'][:16]}`), evaluated on STS-B dev. No test set was evaluated.",
            "",
            "![heat maps](heatmaps.png)",
            "",
            "![prompt length](length.png)",
            "",
            *(f"- {line}" for line in finding(study)),
            "",
            f"| {' | '.join(KEYS)} | dev | best step | training seconds |",
            "|---|---|---|---|---|---|",
            *(
                f"| {' | '.join(f'{job[key]:g}' for key in KEYS)} | {job['dev_spearman']:.2f} "
                f"| {job['best_step']} of {job['steps']} | {job['training_seconds']:.0f} |"
                for job in rows
            ),
            "",
            f"Seed {rows[0]['seed']}; `{' '.join(study['common'])}`; {machine['threads']} threads of a {machine['device']}, "
            f"{machine['precision']}; {sum(seconds) / 60:.0f} minutes of training in total; {versions}.",
            "",
            "Generated by `study.py` from `results.json`.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with nli/ and senteval/")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "temperature_margin_length")
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--grid", nargs="+", default=GRID, help="another grid, for a test of the script")
    parser.add_argument("--draw", action="store_true", help="generate the page from results.json without running jobs")
    options = parser.parse_args()
    if not options.draw:
        if options.data is None:
            parser.error("--data or --draw is required")
        data, runs = options.data.resolve(), options.runs.resolve()
        digest = subset(data / TRAINING, options.rows, runs / "train.csv")
        common = [*COMMON, "trainer.eval_every=20"]
        own = [f"data.dir={data}", f"data.train={runs / 'train.csv'}"]
        study = {
            "grid": sweep(runs / "grid", [*options.grid, *common, *own], options.parallel),
            "seeds": sweep(runs / "seeds", [*SEEDS, *common, *own], options.parallel) if options.grid == GRID else [],
            "rows": options.rows,
            "training_sha256": digest,
            "common": common,
        }
        middle = {KEYS[0]: 0.05, KEYS[1]: 0.2, KEYS[2]: 10.0}
        if study["seeds"]:
            study["seeds"] += [job for job in study["grid"] if all(job[key] == value for key, value in middle.items())]
        (HERE / "results.json").write_text(json.dumps(study, indent=2) + "\n")
    study = json.loads((HERE / "results.json").read_text())
    pictures(study)
    (HERE / "README.md").write_text(page(study))


if __name__ == "__main__":
    main()
