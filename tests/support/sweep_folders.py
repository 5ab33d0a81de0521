"""Sweep folders written by the package's own functions, with made-up scores instead of training."""

import json
import math
import time
from itertools import product
from pathlib import Path

from promcse_pl.config import Config
from promcse_pl.run_folder import CONFIG, HISTORY, LOCK, RESULTS, Status, write_config, write_status
from promcse_pl.sweeps.plan import Plan, SweepJob, write_plan, write_start
from promcse_pl.utils.files import write_text

BASE = {
    "model": {"path": "sentence-transformers/all-MiniLM-L6-v2"},
    "data": {"kind": "triplets", "train": "demo", "dev": "demo"},
}


def config_of(overrides: list[str]) -> Config:
    raw = json.loads(json.dumps(BASE))
    for key, value in (override.split("=", 1) for override in overrides):
        part, _, name = key.rpartition(".")
        (raw.setdefault(part, {}) if part else raw)[name] = json.loads(value)
    return Config.from_dict(raw)


def write_sweep(folder: Path, steps: int = 20, **choices: list[object]) -> Plan:
    """Write a finished sweep over all combinations; `loss__margin=[0.1, 0.2]` sweeps loss.margin."""
    names = [name.replace("__", ".") for name in choices]
    typed = [f"{name}={','.join(map(str, values))}" for name, values in zip(names, choices.values(), strict=True)]
    jobs = [
        [f"{name}={value}" for name, value in zip(names, values, strict=True)] for values in product(*choices.values())
    ]
    plan = Plan(typed, [SweepJob(str(number), overrides) for number, overrides in enumerate(jobs)])
    folder.mkdir(parents=True)
    write_plan(folder, plan)
    for number, job in enumerate(plan.jobs):
        write_start(folder, plan, job, config_of(job.overrides))
        finish(folder / job.folder, job.overrides, score=70 + 7 * math.sin(number * 1.7), steps=steps)
    return plan


def start(folder: Path, overrides: list[str], state: str, error: str | None = None) -> None:
    """Write the folder of a run in this state."""
    write_config(config_of(overrides), folder / CONFIG)
    (folder / LOCK).touch()
    write_status(folder, Status(state=state, error=error, started=time.time() - 61))


def finish(folder: Path, overrides: list[str], score: float | None, steps: int = 20) -> None:
    """Write the folder of a finished run with this dev score."""
    start(folder, overrides, "finished")
    lines = []
    for step in range(1, steps + 1):
        decay = math.exp(-3 * step / steps)
        entry = {
            "step": step,
            "train/ntxent": 1 + decay,
            "train/hinge": decay / 9,
            "train/loss": 1 + 2 * decay,
            "train/lr": decay,
        }
        lines.append(entry)
        if score is not None and step % max(1, steps // 5) == 0:
            lines.append({"step": step, "dev/spearman": score - 9 * decay, "dev/best_spearman": score - 9 * decay})
    write_text(folder / HISTORY, "".join(json.dumps(line) + "\n" for line in lines))
    tests = {"STS-B": 60 + len(str(folder)) % 7, "Avg": 61.5, **({} if score is None else {"dev": score})}
    results = {
        "scores": {"frozen encoder": {"dev": 45.0, "STS-B": 50.0}, "adapter": tests},
        "dev": None if score is None else "demo dev",
        "dev_spearman": score,
        "seconds": 61.4,
        "versions": {"promcse_pl": "0.1.0", "torch": "2.0.0"},
    }
    write_text(folder / RESULTS, json.dumps(results, indent=2) + "\n")
