"""Short runs: their configs, data, results and interruption."""

import io
import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file, save_file

from promcse_pl.config import Config
from promcse_pl.runs.lifecycle import run_job
from support.encoders import save_small_encoder

SECRETS = {"MY_SECRET": "hunter2-of-the-environment", "WANDB_API_KEY": "c0ffee" * 6 + "beef"}
"""Planted in the environment of the trained run; none of them may reach a file."""


DEV_PAIRS = 40


@dataclass(frozen=True)
class Run:
    """A finished run and what it printed."""

    folder: Path
    config: Config
    results: dict[str, object]
    output: str


def word_rows(rows: int, width: int = 3) -> list[str]:
    """Sentences of the small tokenizer, each row different."""
    return [
        ",".join(f"w{5 + (7 * row + 3 * position) % 80} w{6 + row % 70} w{10 + position}" for position in range(width))
        for row in range(rows)
    ]


def write_inputs_with_nan(folder: Path) -> None:
    """A small encoder whose embedding of the word w96 is NaN, and ten triplets of which the last consists of this word."""
    weights = save_small_encoder(folder / "encoder") / "model.safetensors"
    tensors = load_file(weights)
    tensors["embeddings.word_embeddings.weight"][96] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    rows = [*word_rows(9), "w96 w96,w96,w96"]
    (folder / "train.csv").write_text("sent0,sent1,hard_neg\n" + "\n".join(rows) + "\n")


def small_config(folder: Path, **sections: dict) -> Config:
    """A run of a second: a small encoder made in memory, a file of triplets, no tracking."""
    if not (folder / "encoder").is_dir():
        save_small_encoder(folder / "encoder")
    train = folder / "train.csv"
    if not train.exists():
        train.write_text("sent0,sent1,hard_neg\n" + "\n".join(word_rows(10)) + "\n")
    raw: dict[str, dict] = {
        "model": {"path": str(folder / "encoder"), "pooling": "cls", "head": "mlp"},
        "data": {
            "kind": "triplets",
            "train": str(train),
            "max_length": 16,
            "batch_size": 4,
            "cache_dir": str(folder / "cache"),
        },
        "prompt": {"length": 4},
        "trainer": {"epochs": 1, "eval_every": 2, "log_every": 1, "precision": "float32", "device": "cpu"},
        "tracking": {"wandb": "disabled"},
    }
    return Config.from_dict({name: {**raw.get(name, {}), **sections.get(name, {})} for name in {**raw, **sections}})


def run_small(folder: Path, name: str = "run", **sections: dict) -> tuple[dict, str]:
    printed = io.StringIO()
    return run_job(small_config(folder, **sections), folder / name, Console(file=printed)), printed.getvalue()


TIMES = re.compile(r'"(speed/(rows|tokens)_per_second|seconds|training_seconds|rows_per_second)": [\d.e+-]+')


def outcome(folder: Path) -> dict[str, object]:
    """What must be equal: adapter and history and results to the byte, without times."""
    files = {name: (folder / "adapter" / name).read_bytes() for name in ("adapter.safetensors", "adapter.json")}
    texts = {name: TIMES.sub("", (folder / name).read_text()) for name in ("metrics.jsonl", "results.json")}
    return {**files, **texts, "config.yaml": (folder / "config.yaml").read_bytes(), "left": left(folder)}


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


KILL_AT_STEP = """
import os, signal
from promcse_pl.training.module import PromcseModule
step = PromcseModule.training_step
def at_step(module, *arguments):
    if module.global_step == {step}:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(module, *arguments)
PromcseModule.training_step = at_step
"""
