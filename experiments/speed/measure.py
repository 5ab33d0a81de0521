"""Measure training and encoding against a plain path and against the peers, in one run on one machine.

    python experiments/speed/measure.py --data FOLDER

Rows are interleaved (A B C A B C ...), so that what else the machine does falls on all of them. Writes results.json and draws
README.md from it and from what the other scripts of this folder measured; `--draw` draws alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from draw import draw
from machine import describe, in_own_process, matrix_rate, peak_bytes, seconds
from rows import (
    ENCODING,
    LENGTH,
    MAX_LENGTH,
    NAME,
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
ROUNDS, ENCODE_ROUNDS, SENTENCES = 5, 2, 4000


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
    tokenizer = FrozenBackbone.load(NAME).tokenizer
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


def memory(row: str, data: Path, cache: Path) -> dict[str, int]:
    """Return the bytes a process holds before its first step and at most in two steps."""
    work = batches(data, cache, 2)
    step = training_step(row, work)
    before = peak_bytes()
    with lever_off(row):
        for number in range(2):
            step(number)
    return {"before": before, "peak": peak_bytes()}


def non_embedding_weights() -> int:
    model = FrozenBackbone.load(NAME).model
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embeddings."))


def measure(data: Path, cache: Path) -> dict[str, object]:
    took, rates, tokens = training(data, cache)
    arguments = ("--data", data, "--cache", cache, "--memory")
    with ThreadPoolExecutor(2) as pool:
        peaks = pool.map(partial(in_own_process, __file__, *arguments), TRAINING)
        held = dict(zip(TRAINING, peaks, strict=True))
    return {
        "machine": describe() | {"matrix_rate": {name: statistics.median(values) for name, values in rates.items()}},
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
        "memory": held,
        "encoding": encoding(data),
        "sts_seconds": sts(data),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "promcse_speed")
    parser.add_argument("--memory", metavar="ROW", help="measure this row alone, in this process")
    parser.add_argument("--draw", action="store_true", help="draw the page from what was measured before")
    options = parser.parse_args()
    if not options.draw and options.data is None:
        parser.error("--data is needed: a folder with nli/, wiki/ and senteval/ in it")
    if options.memory:
        print(json.dumps(memory(options.memory, options.data.resolve(), options.cache)))
        return
    if not options.draw:
        results = measure(options.data.resolve(), options.cache)
        (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "README.md").write_text(draw(HERE))


if __name__ == "__main__":
    main()
