"""Measure training and encoding against a plain path and against the peers, in one run on one machine.

    python experiments/speed/measure.py --data FOLDER

Rows are interleaved (A B C A B C ...), so that what else the machine does falls on all of them. Writes results.json and draws
README.md from it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from draw import draw
from rows import (
    ENCODING,
    LENGTH,
    MAX_LENGTH,
    SEED,
    TRAINING,
    TRIPLETS,
    batches,
    encoder_of,
    lever_off,
    texts,
    training_step,
)

from promcse_pl.evaluation.sts import TASKS, load_task
from promcse_pl.model.backbone import FrozenBackbone

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ROUNDS, ENCODE_ROUNDS, SENTENCES = 5, 3, 4000
PACKAGES = ("torch", "transformers", "sentence-transformers", "peft", "numpy")


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def matrix_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Return the machine's floating-point operations a second in a large square matrix product."""
    left, right = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    left @ right
    return 2 * size**3 / statistics.median(seconds(lambda: left @ right) for _ in range(5))


def training(data: Path, cache: Path) -> tuple[dict[str, list[float]], dict[str, list[float]], float]:
    """Return the seconds of every step by row, the matrix rates by type, and the real tokens of a step."""
    work = batches(data, cache, ROUNDS)
    steps = {row: training_step(row, work) for row in TRAINING}
    took: dict[str, list[float]] = {row: [] for row in TRAINING}
    rates: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for number in range(-1, ROUNDS):
        for row in TRAINING:
            with lever_off(row):
                elapsed = seconds(lambda row=row: steps[row](number))  # noqa: B023
            if number >= 0:  # the first round warms up
                took[row].append(elapsed)
        for name in rates:
            rates[name].append(matrix_rate(getattr(torch, name)))
    return took, rates, statistics.mean(int(batch.tokens.mask_NT.sum()) for batch in work)


def encoding(data: Path) -> dict[str, object]:
    sentences = texts(data, SENTENCES)
    encoders = {row: encoder_of(row) for row in ENCODING}
    took: dict[str, list[float]] = {row: [] for row in ENCODING}
    vectors = {}
    for encode in encoders.values():
        encode(sentences[:64])
    for _ in range(ENCODE_ROUNDS):
        for row, encode in encoders.items():
            took[row].append(seconds(lambda row=row, encode=encode: vectors.update({row: encode(sentences)})))
    tokenizer = FrozenBackbone.load("sentence-transformers/all-MiniLM-L6-v2").tokenizer
    tokens = sum(map(len, tokenizer(sentences, truncation=True, max_length=512 - LENGTH)["input_ids"]))
    exact = vectors["ours float32"]
    least = {row: float((vectors[row] * exact).sum(1).min()) for row in ENCODING if row.startswith("ours")}
    return {"seconds": took, "tokens": tokens, "least_cosine": least}


def sts(data: Path) -> dict[str, float]:
    """Return the seconds that the sentences of the seven STS tasks take: each once, and file by file in batches of 64."""
    parts = [part for task in TASKS for part in load_task(data / "senteval", task)]
    ours, peer = encoder_of("ours float32"), encoder_of("sentence-transformers")
    distinct = sorted({text for part in parts for text in (*part.first, *part.second)})

    def loop() -> None:
        for part in parts:
            for side in (part.first, part.second):
                for start in range(0, len(side), 64):
                    peer(list(side[start : start + 64]))

    return {"ours float32": seconds(lambda: ours(distinct)), "sentence-transformers by file": seconds(loop)}


def child(*arguments: str) -> str:
    command = [sys.executable, str(HERE / "measure.py"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()[-1]


def peak_bytes() -> int:
    """Return the most memory that this process has held (Linux; `getrusage` would count the parent's too)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def memory(row: str, data: Path, cache: Path) -> dict[str, int]:
    """Return the bytes a process holds before its first step and at most in three steps."""
    work = batches(data, cache, 3)
    step = training_step(row, work)
    before = peak_bytes()
    with lever_off(row):
        for number in range(3):
            step(number)
    return {"before": before, "peak": peak_bytes()}


def start_up(data: Path) -> float:
    """Return the seconds of a whole run of one step without evaluation, token cache warm."""
    options = [
        "data=nli",
        f"data.dir={data}",
        "data.dev=null",
        "evaluation.tasks=[]",
        "tracking=local",
        "trainer.max_steps=1",
    ]
    took = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "run.py", *options, f"hydra.run.dir={folder}/run"]
            took.append(
                seconds(lambda command=command: subprocess.run(command, cwd=ROOT, check=True, capture_output=True))
            )
    return took[-1]


def non_embedding_weights() -> int:
    model = FrozenBackbone.load("sentence-transformers/all-MiniLM-L6-v2").model
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embeddings."))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "promcse_speed")
    parser.add_argument("--memory", metavar="ROW", help="measure this row alone, in this process")
    options = parser.parse_args()
    data = options.data.resolve()
    if options.memory:
        print(json.dumps(memory(options.memory, data, options.cache)))
        return
    took, rates, tokens = training(data, options.cache)
    arguments = ("--data", str(data), "--cache", str(options.cache), "--memory")
    results = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "matrix_rate": {name: statistics.median(values) for name, values in rates.items()},
        },
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "work": {
            "triplets": TRIPLETS,
            "max_length": MAX_LENGTH,
            "prompt_length": LENGTH,
            "seed": SEED,
            "real_tokens": tokens,
            "weights": non_embedding_weights(),
            "rounds": ROUNDS,
            "sentences": SENTENCES,
        },
        "training_seconds": took,
        "memory": {row: json.loads(child(*arguments, row)) for row in TRAINING},
        "encoding": encoding(data),
        "sts_seconds": sts(data),
        "start_up_seconds": start_up(data),
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "README.md").write_text(draw(results))


if __name__ == "__main__":
    main()
