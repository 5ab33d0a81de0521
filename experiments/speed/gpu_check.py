"""Check and measure training on a GPU: tests, synchronisations, equality with the CPU, tokens/s, MFU and memory.

    make gpu-check
    python experiments/speed/gpu_check.py

Runs `pytest -m gpu`, then training steps of encoders with random weights, in about 8 minutes. Writes gpu-check.json and generates
README.md. Exit codes: 0, 1 if a check fails, 2 without a GPU. `--device cpu` runs this script with tiny encoders, to test it: the
page says that the figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from draw import draw
from machine import describe, matrix_rate
from shapes import (
    LENGTH,
    SEED,
    loss_of,
    measure,
    non_embedding_weights,
    random_batch,
    random_encoder,
    training_step,
)

from promcse_pl.models.cpu.chunks import CHUNK_TOKENS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENCODERS = ("MiniLM", "bert-base", "roberta-large", "Qwen3 0.6B")
COMPARED = 24
"""Sentences of the batch where loss and gradient are compared and synchronisations counted."""
CASES = [(2048, False), (4096, False), (8192, False), (16384, False), (32768, False), (16384, True)]
"""Chunk size and recomputation."""
BOUND = 1e-4
"""Maximum relative difference of loss and gradient from those of the CPU in float32. The rounding of the CPU, compared with
float64, is 6e-6 for Qwen3 and below 1e-6 for the others. Rounding to TF32 is 5e-4."""
TEST_SECONDS = 240
"""Time limit of `pytest -m gpu`."""
CASE_SECONDS = 420
"""No case starts later than this after the start of the check, which should take less than 8 minutes."""
OUT_OF_TIME = f"not measured: time limit of {CASE_SECONDS} s"


@dataclass(frozen=True)
class Work:
    """The training steps that are measured.

    Attributes:
        device: Device type.
        dtype: Type of the frozen encoder.
        sentences: Sentences of a batch.
        changes: Changes of each encoder's config.
    """

    device: str
    dtype: torch.dtype
    sentences: int
    changes: dict[str, int] = field(default_factory=dict)


GPU = Work("cuda", torch.bfloat16, 1536)
"""The 512 triplets of the paper's roberta-large."""
TINY = Work(
    "cpu",
    torch.float32,
    12,
    {
        "vocab_size": 20000,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "intermediate_size": 48,
    },
)
TINY_NOTE = "Tiny encoders on a CPU, to test `gpu_check.py`: these figures are not for publication."


def run_tests() -> dict[str, Any]:
    """Run `pytest -m gpu` and return its exit code and the last line of its output."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q"]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=TEST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"exit_code": None, "summary": f"not finished after {TEST_SECONDS} s"}
    print(done.stdout)
    return {"exit_code": done.returncode, "summary": (done.stdout.strip().splitlines() or ["no output"])[-1]}


def count_synchronisations(step: Callable[[], None]) -> int:
    """Return how often torch reports in a step that the CPU waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)


def differences_from_cpu(shape: str, work: Work) -> dict[str, float]:
    """Return the relative differences of loss and gradient from those of the CPU, in float32 without dropout.

    On the device, the batch is split into chunks.
    """
    tokens, found = random_batch(COMPARED), []
    encoder = random_encoder(shape, torch.float32, "avg", "cpu", **work.changes).eval()
    for device, chunk_tokens in (("cpu", 16384), (work.device, 128)):
        encoder.to(device).zero_grad()
        loss = loss_of(encoder, tokens.to(device), chunk_tokens)
        loss.backward()
        found.append((loss.detach().cpu(), encoder.prompt.embedding.weight.grad.cpu()))
    (loss_cpu, gradient_cpu), (loss, gradient) = found
    return {
        "loss": float((loss - loss_cpu).abs() / loss_cpu),
        "gradient": float((gradient - gradient_cpu).norm() / gradient_cpu.norm()),
    }


def synchronisations(shape: str, work: Work) -> int | None:
    """Return the synchronisations of a training step; None without a GPU."""
    if work.device != "cuda":
        return None
    encoder = random_encoder(shape, work.dtype, "avg", work.device, **work.changes).train()
    step = training_step(encoder, random_batch(COMPARED), work.device, CHUNK_TOKENS["cuda"], recompute=False)
    step()  # the optimiser allocates its state
    return count_synchronisations(step)


def measure_cases(shape: str, work: Work, end: float) -> dict[str, Any]:
    """Measure an encoder with all chunk sizes.

    Args:
        shape: Name of the encoder.
        work: Device, type and batch.
        end: Value of `time.perf_counter()` after which no case starts.

    Returns:
        The number of weights, and the cases; one that was not measured has a `problem`.
    """
    encoder = random_encoder(shape, work.dtype, "avg", work.device, **work.changes).train()
    cases = []
    for chunk_tokens, recompute in CASES:
        case: dict[str, Any] = {"chunk_tokens": chunk_tokens, "recompute": recompute}
        if time.perf_counter() > end:
            case["problem"] = OUT_OF_TIME
        else:
            try:
                case |= measure(encoder, work.sentences, chunk_tokens, recompute=recompute)
            except torch.OutOfMemoryError:
                case["problem"] = "out of memory"
                encoder.zero_grad()
        cases.append(case)
    return {"weights": non_embedding_weights(encoder), "cases": cases}


def failures(results: dict[str, Any]) -> list[str]:
    """Return what is wrong, one sentence each."""
    found = [] if results["tests"]["exit_code"] == 0 else [f"pytest -m gpu: {results['tests']['summary']}"]
    for encoder in results["encoders"]:
        if encoder["synchronisations"]:
            found.append(f"{encoder['shape']}: {encoder['synchronisations']} synchronisations in a step")
        found += [
            f"{encoder['shape']}: the {name} differs from the CPU's by {value:.1e}, more than {BOUND:.0e}"
            for name, value in encoder["differences"].items()
            if not value <= BOUND
        ]
        if late := sum(case.get("problem") == OUT_OF_TIME for case in encoder["cases"]):
            found.append(f"{encoder['shape']}: {late} of {len(CASES)} cases {OUT_OF_TIME}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, default=HERE, help="folder of gpu-check.json and README.md")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and options.folder == HERE:
        parser.error("--device cpu only tests this script. Try: --folder FOLDER")
    work = GPU if options.device == "cuda" else TINY
    if work is GPU and not torch.cuda.is_available():
        print(f"error: no CUDA device found by torch {torch.__version__}; nothing was measured", file=sys.stderr)
        return 2
    started, results = time.perf_counter(), {} if work is GPU else {"note": TINY_NOTE}
    results |= {
        "machine": describe(),
        "seed": SEED,
        "prompt_length": LENGTH,
        "tests": run_tests() if work is GPU else {"exit_code": 0, "summary": "not run"},
        "rate": matrix_rate(work.dtype, work.device),
        "sentences": work.sentences,
        "encoders": [
            {
                "shape": shape,
                "differences": differences_from_cpu(shape, work),
                "synchronisations": synchronisations(shape, work),
            }
            for shape in ENCODERS
        ],
    }
    for encoder in results["encoders"]:  # after all comparisons, which have no time limit
        encoder |= measure_cases(encoder["shape"], work, started + CASE_SECONDS)
    results["failures"], results["seconds"] = failures(results), time.perf_counter() - started
    (options.folder / "gpu-check.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.folder / "README.md").write_text(draw(options.folder))
    for failure in results["failures"]:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
