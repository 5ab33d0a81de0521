"""Jobs of seconds for sweeps: a small encoder made in memory and a file of triplets."""

import os
import subprocess
import sys
from pathlib import Path

from promcse_pl.config import Config
from support.encoders import save_small_encoder
from support.folders import ROOT

ROWS = [f"w{row} w7,w{row} w8,w{row + 40}" for row in range(5, 45)]


def files(folder: Path) -> Path:
    """Write encoder/ and train.csv; return the folder."""
    save_small_encoder(folder / "encoder")
    (folder / "train.csv").write_text("\n".join(["a,b,c", *ROWS]) + "\n")
    return folder


SETTINGS = [
    "data=triplets",
    "data.train=train.csv",
    "data.max_length=16",
    "data.batch_size=8",
    "data.dev=holdout",
    "model.path=encoder",
    "trainer.precision=float32",
    "trainer.device=cpu",
    "trainer.max_steps=4",
    "trainer.epochs=100",
    "tracking.wandb=disabled",
    "evaluation.frozen=false",
]
"""Of a job, for `python run.py` in that folder."""


def small_config(folder: Path, **sections: dict) -> Config:
    """A valid config on such files; only the parts that a test reads are needed."""
    raw: dict[str, dict] = {
        "model": {"path": str(folder / "encoder")},
        "data": {"kind": "triplets", "train": str(folder / "train.csv"), "cache_dir": str(folder / "cache")},
        "tracking": {"wandb": "disabled"},
    }
    return Config.from_dict({name: {**raw.get(name, {}), **sections.get(name, {})} for name in {**raw, **sections}})


def begin(here: Path, *arguments: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    own = {"XDG_CACHE_HOME": str(here / "cache"), "HF_HUB_OFFLINE": "1", "HOME": str(here), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=here,
        env={**clean, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(here: Path, *arguments: str) -> tuple[int, str, str]:
    process = begin(here, *arguments)
    printed, errors = process.communicate(timeout=200)
    return process.returncode, printed, errors
