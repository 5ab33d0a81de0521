"""Measure the effect of computing only the first token in the last layer, with `cls` pooling.

    python experiments/speed/first_token.py

Training and encoding with encoders of the paper's shapes and random weights, in interleaved runs. Writes
first-token.json, which `measure.py --draw` puts into README.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from machine import chunk_tokens_of, describe, seconds
from shapes import LENGTH, SEED, loss_of, random_batch, random_encoder

from promcse_pl.data.batch import Tokens
from promcse_pl.models import encoder as module
from promcse_pl.models.cpu.chunks import CHUNK_TOKENS
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.training.machine import choose_precision

HERE = Path(__file__).resolve().parent
CASES = [("bert-base", 96), ("roberta-large", 48)]
ROUNDS = 5
LEVERS = {"every token": False, "first token": True}


def training(encoder: PromptEncoder, tokens: Tokens) -> None:
    chunk_tokens = chunk_tokens_of(encoder.backbone.dtype, int(tokens.mask_NT.sum()))
    loss_of(encoder.train(), tokens, chunk_tokens).backward()
    encoder.zero_grad()


def encoding(encoder: PromptEncoder, tokens: Tokens) -> None:
    with torch.inference_mode():
        encoder.eval()(tokens, chunk_tokens=CHUNK_TOKENS["cpu"])


def interleaved(work: Callable[[], None]) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {name: [] for name in LEVERS}
    for number in range(-1, ROUNDS):
        for name, on in LEVERS.items():
            with patch.object(module, "needs_first_token", lambda _pooling, on=on: on):
                elapsed = seconds(work)
            if number >= 0:  # the first round warms up
                took[name].append(elapsed)
    return took


def main() -> None:
    dtype = getattr(torch, choose_precision("auto", torch.device("cpu"))[0])
    cases = []
    for shape, sentences in CASES:
        encoder, tokens = random_encoder(shape, dtype, "cls", "cpu"), random_batch(sentences)
        for work in (training, encoding):
            took = interleaved(lambda: work(encoder, tokens))  # noqa: B023
            case = {"shape": shape, "work": work.__name__, "sentences": sentences, "seconds": took}
            cases.append(case | {"precision": str(dtype).removeprefix("torch.")})
    results = {"machine": describe(), "seed": SEED, "prompt_length": LENGTH, "cases": cases}
    (HERE / "first-token.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
