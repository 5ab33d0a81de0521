"""Measure training steps of encoders of several sizes and families with random weights: tokens/s, share of the limit, memory.

    python experiments/speed/shapes.py [--families]

Writes shapes-cpu.json or families-cpu.json, which `measure.py --draw` puts into README.md. `gpu_check.py` measures such steps on
a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from machine import chunk_tokens_of, describe, in_own_process, matrix_rate, peak_bytes, reset_peak, seconds
from torch import Tensor
from transformers import AutoConfig, AutoModel

from promcse_pl.config import LossConfig, OptimConfig
from promcse_pl.data.batch import Tokens
from promcse_pl.losses.hybrid import hybrid_loss
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.cpu.chunks import CHUNK_TOKENS
from promcse_pl.models.cpu.layers import can_fuse
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.identity import EncoderId
from promcse_pl.training.optimizer import build_optimizer

HERE = Path(__file__).resolve().parent
SHAPES = {
    "MiniLM": (
        "bert",
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
    "bert-base": ("bert", {}),
    "roberta-large": (
        "roberta",
        {
            "vocab_size": 50265,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "max_position_embeddings": 514,
        },
    ),
    "mpnet": ("mpnet", {"max_position_embeddings": 514}),
    "Qwen3 0.6B": (
        "qwen3",
        {
            "vocab_size": 32000,  # instead of 151,669: the embeddings do not affect the time
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
        },
    ),
}
LENGTH, LONGEST, SEED = 10, 32, 1
ROUNDS, GPU_ROUNDS, GPU_STEPS = 3, 2, 5
"""Rounds of one step on a CPU (one round of large batches), and of several on a GPU, which computes a step while the next one is
launched."""
CASES = {
    "shapes-cpu": [("MiniLM", 384), ("bert-base", 384), ("roberta-large", 96), ("roberta-large", 1536)],
    "families-cpu": [("mpnet", 384), ("Qwen3 0.6B", 96)],
}
"""Shapes and sentences of a batch: 1,536 are the 512 triplets of the paper's roberta-large."""
LOSS = LossConfig(temperature=0.05, margin=0.2, hinge_weight=10.0)


def random_batch(sentences: int) -> Tokens:
    """Return sentences with uniformly distributed lengths of 6 to 32 tokens."""
    generator = torch.Generator().manual_seed(SEED)
    lengths_N = torch.randint(6, LONGEST + 1, (sentences,), generator=generator)
    mask_NT = (torch.arange(LONGEST) < lengths_N.unsqueeze(1)).long()
    ids_NT = torch.randint(1000, 20000, mask_NT.shape, generator=generator) * mask_NT + 1 - mask_NT
    return Tokens(ids_NT, mask_NT, lengths_N=lengths_N)


def random_encoder(shape: str, dtype: torch.dtype, pooling: str, device: str, **smaller: int) -> PromptEncoder:
    torch.manual_seed(SEED)
    family, changes = SHAPES[shape]
    with torch.device(device):
        model = AutoModel.from_config(AutoConfig.for_model(family, **{**changes, **smaller}), dtype=dtype)
    backbone = FrozenBackbone(model, EncoderId(shape, None, "0" * 64))
    return PromptEncoder(backbone, length=LENGTH, pooling=pooling).to(device)


def non_embedding_weights(encoder: PromptEncoder) -> int:
    named = encoder.backbone.model.named_parameters()
    return sum(p.numel() for name, p in named if not name.startswith(("embeddings.", "embed_tokens.", "pooler.")))


def loss_of(encoder: PromptEncoder, tokens: Tokens, chunk_tokens: int, *, recompute: bool = False) -> Tensor:
    vectors, _ = encoder(tokens, train_head=True, chunk_tokens=chunk_tokens, recompute=recompute)
    return hybrid_loss(*vectors.view(3, -1, vectors.shape[1]), LOSS).total


def training_step(
    encoder: PromptEncoder, tokens: Tokens, device: str, chunk_tokens: int, *, recompute: bool
) -> Callable[[], None]:
    """Return a function that uploads the batch and updates the prompt."""
    trained = list(encoder.prompt.parameters())
    optimizer = build_optimizer(trained, OptimConfig(lr=3e-2))
    batch = tokens.pin_memory() if device == "cuda" else tokens

    def step() -> None:
        loss_of(encoder, batch.to(device), chunk_tokens, recompute=recompute).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(encoder: PromptEncoder, sentences: int, chunk_tokens: int, *, recompute: bool) -> dict[str, object]:
    """Return the time of the fastest step and the memory of all steps."""
    device = encoder.backbone.device.type
    tokens = random_batch(sentences)
    step = training_step(encoder, tokens, device, chunk_tokens, recompute=recompute)
    reset_peak(device)
    before = peak_bytes(device)
    rounds, steps = (GPU_ROUNDS, GPU_STEPS) if device == "cuda" else (ROUNDS if sentences < 1000 else 1, 1)

    def run() -> None:
        for _ in range(steps):
            step()

    took = [seconds(run, device) / steps for _ in range(rounds)]
    return {
        "sentences": sentences,
        "recompute": recompute,
        "seconds": min(took),
        "tokens": int(tokens.mask_NT.sum()),
        "before": before,
        "peak": peak_bytes(device),
    }


def measure_shape(shape: str, sentences: int, *, recompute: bool) -> dict[str, object]:
    encoder = random_encoder(shape, torch.bfloat16, "avg", "cpu").train()
    real_tokens = int(random_batch(sentences).mask_NT.sum())
    chunk_tokens = CHUNK_TOKENS["cpu"] if recompute else chunk_tokens_of(torch.bfloat16, real_tokens)
    return {
        "shape": shape,
        "fused": can_fuse(encoder.backbone.model, encoder.backbone.family.fused),
        "weights": non_embedding_weights(encoder),
        **measure(encoder, sentences, chunk_tokens, recompute=recompute),
        "rate": matrix_rate(torch.bfloat16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", action="store_true", help="measure mpnet and a decoder")
    parser.add_argument(
        "--case", nargs=3, metavar=("SHAPE", "SENTENCES", "RECOMPUTE"), help="measure it in this process"
    )
    options = parser.parse_args()
    if options.case:
        shape, sentences, recompute = options.case
        print(json.dumps(measure_shape(shape, int(sentences), recompute=recompute == "True")))
        return
    name = "families-cpu" if options.families else "shapes-cpu"
    cases = [
        in_own_process(__file__, "--case", shape, sentences, recompute)
        for shape, sentences in CASES[name]
        for recompute in ((False, True) if sentences < 1000 else (True,))
    ]
    results = {"machine": describe(), "seed": SEED, "prompt_length": LENGTH, "cases": cases}
    (HERE / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
