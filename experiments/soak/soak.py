"""Run a long training with checkpoints and evaluations every few steps, and monitor its memory, files and threads.

python experiments/soak/soak.py [--minutes 30]

A run that would last for days is sampled every few seconds, together with its child processes, and stopped by SIGTERM.
Afterwards, its run folder and temporary folder are searched for temporary files. Writes results.json, soak.png and README.md.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from scipy.stats import theilslopes

from promcse_pl.version import __version__

HERE = Path(__file__).resolve().parent
SETTINGS = [
    "data=demo",
    "data.batch_size=16",
    "trainer.epochs=10000",
    "trainer.eval_every=10",
    "trainer.save_every=3",
    "trainer.log_every=1",
    "evaluation.tasks=[]",
    "seed=1",
]
SECONDS = 5.0
WARM_UP = 0.2
"""Share of the time that is excluded from the slopes: allocator, caches and thread pools still grow."""
COLUMNS = ("seconds", "memory_mb", "files", "threads", "children")
MEMORY_LIMIT, COUNT_LIMIT = 0.1, 1.0
"""Maximum growth per hour: of the memory as a share, of files and threads as a count."""


def sample(process: psutil.Process, started: float) -> dict[str, float]:
    """Return memory, open files and threads of a process and its children; memory is USS, without shared and mapped files."""
    processes = [process, *process.children(recursive=True)]
    memory = files = threads = 0
    for each in processes:
        try:
            memory += each.memory_full_info().uss
            files += each.num_fds()
            threads += each.num_threads()
        except psutil.NoSuchProcess:  # a child that has just exited
            continue
    values = (round(time.monotonic() - started, 1), round(memory / 2**20, 1), files, threads, len(processes) - 1)
    return dict(zip(COLUMNS, values, strict=True))


def watch(minutes: float, work: Path) -> dict:
    """Run, sample and stop the training; return samples, exit code and remaining files."""
    run, temporary = work / "run", work / "tmp"
    temporary.mkdir()
    command = [sys.executable, str(HERE.parents[1] / "run.py"), *SETTINGS, f"hydra.run.dir={run}"]
    environment = os.environ | {"TMPDIR": str(temporary), "WANDB_MODE": "offline"}
    with (work / "output.txt").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        watched, started, samples = psutil.Process(process.pid), time.monotonic(), []
        while process.poll() is None and time.monotonic() - started < 60 * minutes:
            samples.append(sample(watched, started))
            time.sleep(SECONDS)
        process.send_signal(signal.SIGTERM)
        exit_code = process.wait(timeout=120)
    if exit_code != 143:
        sys.exit((work / "output.txt").read_text()[-4000:])
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    left = sorted(
        str(path.relative_to(work))
        for folder in (run, temporary)
        for path in folder.rglob("*")
        if (path.name.endswith(".tmp") or folder == temporary) and path.is_file()
    )
    return {
        "samples": samples,
        "exit_code": exit_code,
        "steps": max(entry["step"] for entry in entries),
        "looks": sum("dev/spearman" in entry for entry in entries),
        "left": left,
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
    }


def slope_per_hour(samples: list[dict], column: str) -> list[float]:
    """Return the Theil-Sen slope of a column after the warm-up, with its 95 % interval, per hour."""
    kept = samples[int(WARM_UP * len(samples)) :]
    hours = np.array([row["seconds"] for row in kept]) / 3600
    slope, _, low, high = theilslopes([row[column] for row in kept], hours)
    return [round(float(value), 3) for value in (slope, low, high)]


def draw(results: dict) -> str:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    samples = results["samples"]
    minutes = [row["seconds"] / 60 for row in samples]
    figure, axes = plt.subplots(3, sharex=True, figsize=(7, 5), layout="constrained")
    for axis, (column, label) in zip(
        axes, {"memory_mb": "memory (MB)", "files": "open files", "threads": "threads"}.items(), strict=True
    ):
        axis.plot(minutes, [row[column] for row in samples], lw=1)
        axis.axvspan(0, minutes[int(WARM_UP * len(samples))], color="0.9", lw=0)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("minutes; grey: warm-up, excluded from the slopes")
    figure.savefig(HERE / "soak.png", dpi=120)
    counts, slopes = results["counts"], results["slopes_per_hour"]
    lines = [
        "# Soak test",
        "",
        f"`python run.py {' '.join(results['settings'])}` for {results['minutes']:g} minutes: {counts['steps']:,} steps, "
        f"a checkpoint every 3 steps ({counts['steps'] // 3:,}), {counts['looks']:,} dev evaluations, W&B offline; then SIGTERM "
        f"(exit code {counts['exit_code']}). The process and its children are sampled every {SECONDS:g} s.",
        "",
        "| after the warm-up | mean | slope per hour [95 %] | limit |",
        "|---|---:|---:|---|",
    ]
    for column, name in {"memory_mb": "memory, MB", "files": "open files", "threads": "threads"}.items():
        slope, low, high = slopes[column]
        mean = results["means"][column]
        flat = abs(slope) < (MEMORY_LIMIT * mean if column == "memory_mb" else COUNT_LIMIT)
        lines.append(
            f"| {name} | {mean:,.1f} | {slope:+.2f} [{low:+.2f}, {high:+.2f}] | {'met' if flat else 'EXCEEDED'} |"
        )
    lines += [
        "",
        f"Limits of the slope (Theil-Sen), per hour: {100 * MEMORY_LIMIT:.0f} % of the memory, one file, one thread. Memory "
        f"grew by {100 * slopes['memory_mb'][0] / results['means']['memory_mb']:.1f} % per hour; it is measured as USS, "
        "without memory shared between processes.",
        "",
        f"Temporary files left in the run folder or the temporary folder: {', '.join(counts['left']) or 'none'}. "
        f"Checkpoints: {', '.join(counts['checkpoints'])}.",
        "",
        "![memory, open files and threads over time](soak.png)",
        "",
        f"{results['threads']} threads of a CPU, promcse_pl {results['versions']['promcse_pl']}, "
        f"torch {results['versions']['torch']}. Generated by `soak.py` from `results.json`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        seen = watch(options.minutes, Path(work))
    samples = seen.pop("samples")
    kept = samples[int(WARM_UP * len(samples)) :]
    watched = ("memory_mb", "files", "threads")
    results = {
        "settings": SETTINGS,
        "minutes": options.minutes,
        "counts": seen,
        "means": {column: round(float(np.mean([row[column] for row in kept])), 1) for column in watched},
        "slopes_per_hour": {column: slope_per_hour(samples, column) for column in watched},
        "threads": torch.get_num_threads(),
        "versions": {"promcse_pl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "samples": samples,
    }
    (HERE / "results.json").write_text(json.dumps(results) + "\n")
    (HERE / "README.md").write_text(draw(results))


if __name__ == "__main__":
    main()
