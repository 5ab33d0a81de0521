"""Measure the time to the first training step, of a run and of the jobs of a sweep, and the time of the imports alone.

    python experiments/speed/startup.py --data DATA

Writes startup.json, which `measure.py --draw` puts into README.md. Token cache and disk cache are warm: the first round is
excluded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe, seconds

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OPTIONS = ["data=nli", "data.dev=null", "evaluation.tasks=[]", "evaluation.frozen=false", "tracking=local"]
SHORT = ["trainer.precision=float32", "trainer.max_steps=1"]
IMPORTS = "import torch, transformers.modeling_utils, pytorch_lightning"
REPEATS = 5


def first_step(run: Path) -> float:
    """Return the start time of a run's first step in seconds since 1970, computed from the time of its adapter."""
    trained = json.loads((run / "results.json").read_text())["training_seconds"]
    return min(path.stat().st_mtime for path in (run / "adapter").iterdir()) - trained


def of_a_run(options: list[str], folder: Path) -> float:
    entered = time.time()
    command = [sys.executable, "run.py", *options, f"hydra.run.dir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return first_step(folder) - entered


def of_a_sweep(options: list[str], folder: Path) -> list[float]:
    """Return the seconds of three jobs: the first from the start of the command, the others from the end of the previous job."""
    entered = time.time()
    command = [sys.executable, "run.py", "-m", "seed=1,2,3", *options, f"hydra.sweep.dir={folder}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    began = [entered]
    assert process.stdout is not None
    for line in process.stdout:
        if " finished, " in line:
            began.append(time.time())
    if process.wait():
        raise SystemExit("the sweep failed")
    return [first_step(folder / str(job)) - began[job] for job in range(3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds nli/")
    options = [*OPTIONS, *SHORT, f"data.dir={parser.parse_args().data.resolve()}"]
    found: dict[str, list[float]] = {"imports": [], "run": [], "sweep": [], "later": []}
    for repeat in range(REPEATS + 1):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            imports = seconds(lambda: subprocess.run([sys.executable, "-c", IMPORTS], check=True))
            run = of_a_run(options, folder / "run")
            first, *later = of_a_sweep(options, folder / "sweep")
        if repeat:
            for row, values in (("imports", [imports]), ("run", [run]), ("sweep", [first]), ("later", later)):
                found[row] += [round(value, 3) for value in values]
    (HERE / "startup.json").write_text(json.dumps({"machine": describe(), "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
