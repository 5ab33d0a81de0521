"""Measure training and encoding, and compare them with a plain path and with other libraries.

    python experiments/speed/measure.py --data FOLDER

Rows are interleaved (A B C B C A ...), so that other load on the machine affects all of them. Writes results-TYPE.json, where
TYPE is the precision that `run.py` selects on this machine, and generates README.md from all results; `--draw` only generates it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from draw import draw
from machine import describe, has_amx, in_own_process, matrix_rate, peak_bytes, seconds
from rows import (
    ENCODING,
    EXPORTED,
    LENGTH,
    MAX_LENGTH,
    NAME,
    NEEDS_BFLOAT16,
    SEED,
    TRAINING,
    TRIPLETS,
    batches,
    encoder_of,
    lever_off,
    texts,
    training_step,
)

from promcse_pl.data.pairs import TASKS, load_task
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.training.machine import choose_precision

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ROUNDS, ENCODE_ROUNDS, SENTENCES, STS_PART = 5, 3, 600, 20


def of_this_machine(rows: tuple[str, ...], default: torch.dtype) -> list[str]:
    return [row for row in rows if default == torch.bfloat16 or row not in NEEDS_BFLOAT16]


def training(
    data: Path, cache: Path, default: torch.dtype
) -> tuple[dict[str, list[float]], dict[str, list[float]], float]:
    """Return the seconds of every step by row, the matrix rates by type, and the real tokens of a step."""
    work = batches(data, cache, ROUNDS)
    rows = of_this_machine(TRAINING, default)
    steps = {row: training_step(row, work, default) for row in rows}
    took: dict[str, list[float]] = {row: [] for row in rows}
    rates: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for number in range(-1, ROUNDS):
        for row in rows[number:] + rows[:number]:
            with lever_off(row):
                elapsed = seconds(lambda row=row: steps[row](number))  # noqa: B023
            if number >= 0:  # the first round warms up
                took[row].append(elapsed)
        for name in rates:
            rates[name].append(matrix_rate(getattr(torch, name)))
    return took, rates, statistics.mean(int(batch.tokens.mask_NT.sum()) for batch in work)


def encoding(data: Path, default: torch.dtype) -> dict[str, object]:
    sentences = texts(data, SENTENCES)
    exported = [row for row, runtime in EXPORTED.items() if find_spec(runtime)]
    rows = [*of_this_machine(ENCODING, default), *exported]
    encoders = {row: encoder_of(row) for row in rows}
    took: dict[str, list[float]] = {row: [] for row in rows}
    vectors = {}
    for encode in encoders.values():
        encode(sentences[:64])
    for number in range(ENCODE_ROUNDS):
        for row in rows[number:] + rows[:number]:
            took[row].append(seconds(lambda row=row: vectors.update({row: encoders[row](sentences)})))
    tokenizer = FrozenBackbone.load(NAME).tokenizer
    tokens = sum(map(len, tokenizer(sentences, truncation=True, max_length=512 - LENGTH)["input_ids"]))
    exact = vectors["ours float32"]
    least = {row: float((vectors[row] * exact).sum(1).min()) for row in rows if row != "sentence-transformers"}
    return {"seconds": took, "tokens": tokens, "least_cosine": least}


def sts(data: Path) -> dict[str, float]:
    """Return the seconds for every STS_PART-th pair of the seven STS tasks: each text once, and file by file in batches of 64."""
    parts = [part for task in TASKS for part in load_task(data / "senteval", task)]
    sides = [side[::STS_PART] for part in parts for side in (part.first, part.second)]
    ours, peer = encoder_of("ours float32"), encoder_of("sentence-transformers")
    distinct = sorted({text for side in sides for text in side})

    def loop() -> None:
        for side in sides:
            for start in range(0, len(side), 64):
                peer(list(side[start : start + 64]))

    return {"ours float32": seconds(lambda: ours(distinct)), "sentence-transformers by file": seconds(loop)}


def memory(row: str, data: Path, cache: Path, default: torch.dtype) -> dict[str, int]:
    """Return the bytes a process holds before its first step and at most in that step."""
    work = batches(data, cache, 1)
    step = training_step(row, work, default)
    before = peak_bytes()
    with lever_off(row):
        step(0)
    return {"before": before, "peak": peak_bytes()}


def non_embedding_weights() -> int:
    model = FrozenBackbone.load(NAME).model
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embeddings."))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(data: Path, cache: Path, default: torch.dtype) -> dict[str, object]:
    took, rates, tokens = training(data, cache, default)
    rows = [*took, *(["bfloat16"] if default == torch.float32 else [])]  # memory does not depend on the speed
    arguments = ("--data", data, "--cache", cache, "--default", name_of(default), "--memory")
    with ThreadPoolExecutor(2) as pool:
        peaks = [pool.submit(partial(in_own_process, __file__, *arguments), row) for row in reversed(rows)]
        held = {row: peak.result() for row, peak in zip(rows, reversed(peaks), strict=True)}
    return {
        "precision": name_of(default),
        "machine": describe() | {"matrix_rate": {name: statistics.median(values) for name, values in rates.items()}},
        "work": {
            "triplets": TRIPLETS,
            "max_length": MAX_LENGTH,
            "prompt_length": LENGTH,
            "seed": SEED,
            "real_tokens": tokens,
            "weights": non_embedding_weights(),
            "sentences": SENTENCES,
            "sts_part": STS_PART,
        },
        "training_seconds": took,
        "memory": held,
        "encoding": encoding(data, default),
        "sts_seconds": sts(data),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "promcse_speed")
    parser.add_argument("--default", choices=["auto", "float32", "bfloat16"], default="auto", help="type of `ours`")
    parser.add_argument("--memory", metavar="ROW", help="measure the memory of this row alone, in this process")
    parser.add_argument("--draw", action="store_true", help="draw the page from what was measured before")
    options = parser.parse_args()
    if not options.draw and options.data is None:
        parser.error("--data is needed: a folder with nli/, wiki/ and senteval/ in it")
    default = getattr(torch, choose_precision(options.default, torch.device("cpu"))[0])
    if options.memory:
        print(json.dumps(memory(options.memory, options.data.resolve(), options.cache, default)))
        return
    if not options.draw:
        results = measure(options.data.resolve(), options.cache, default)
        kind = name_of(default) + ("-amx" if has_amx() else "")
        (HERE / f"results-{kind}.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "README.md").write_text(draw(HERE))


if __name__ == "__main__":
    main()
