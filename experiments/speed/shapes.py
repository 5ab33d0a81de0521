"""Measure training steps of encoders of several sizes and families with random weights: tokens/s, share of the limit, memory.

    python experiments/speed/shapes.py [--device cuda]
    python experiments/speed/shapes.py --families [--device cuda]

Writes shapes-cpu.json, shapes-cuda.json, families-cpu.json or families-cuda.json, which `measure.py --draw` puts into README.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from machine import describe, in_own_process, matrix_rate, peak_bytes, seconds
from transformers import AutoConfig, AutoModel

from promcse_pl.config import LossConfig
from promcse_pl.data.batch import Tokens
from promcse_pl.losses.hybrid import hybrid_loss
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.cpu.chunks import CHUNK_TOKENS
from promcse_pl.models.cpu.layers import can_fuse
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.identity import EncoderId

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
LENGTH, LONGEST, SEED, STEPS = 10, 32, 1, 3
CASES = {
    "shapes-cpu": [("MiniLM", 384), ("bert-base", 384), ("roberta-large", 96), ("roberta-large", 1536)],
    "shapes-cuda": [("MiniLM", 1536), ("bert-base", 1536), ("roberta-large", 384), ("roberta-large", 1536)],
    "families-cpu": [("mpnet", 384), ("Qwen3 0.6B", 96)],
    "families-cuda": [("mpnet", 1536), ("Qwen3 0.6B", 384)],
}
"""Shapes and sentences of a batch: 1,536 are the 512 triplets of the paper's roberta-large."""


def random_batch(sentences: int, device: str) -> Tokens:
    """Return sentences with uniformly distributed lengths of 6 to 32 tokens."""
    generator = torch.Generator().manual_seed(SEED)
    lengths_N = torch.randint(6, LONGEST + 1, (sentences,), generator=generator)
    mask_NT = (torch.arange(LONGEST) < lengths_N.unsqueeze(1)).long()
    ids_NT = torch.randint(1000, 20000, mask_NT.shape, generator=generator) * mask_NT + 1 - mask_NT
    return Tokens(ids_NT, mask_NT).to(device)


def random_encoder(shape: str, dtype: torch.dtype, pooling: str, device: str) -> PromptEncoder:
    torch.manual_seed(SEED)
    family, changes = SHAPES[shape]
    with torch.device(device):
        model = AutoModel.from_config(AutoConfig.for_model(family, **changes), dtype=dtype)
    backbone = FrozenBackbone(model, EncoderId(shape, None, "0" * 64))
    return PromptEncoder(backbone, length=LENGTH, pooling=pooling).to(device)


def measure(shape: str, sentences: int, recompute: bool, device: str) -> dict[str, object]:
    encoder = random_encoder(shape, torch.bfloat16, "avg", device).train()
    backbone = encoder.backbone
    named = backbone.model.named_parameters()
    weights = sum(p.numel() for name, p in named if not name.startswith(("embeddings.", "embed_tokens.")))
    optimizer = torch.optim.AdamW(encoder.prompt.parameters(), lr=3e-2)
    tokens = random_batch(sentences, device)
    before = peak_bytes(device)

    def step() -> None:
        vectors, _ = encoder(tokens, chunk_tokens=CHUNK_TOKENS[device], recompute=recompute)
        views = vectors.view(3, -1, vectors.shape[1])
        hybrid_loss(*views, LossConfig(temperature=0.05, margin=0.2, hinge_weight=10.0)).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    took = [seconds(step, device) for _ in range(STEPS if sentences < 1000 or device == "cuda" else 1)]
    return {
        "shape": shape,
        "sentences": sentences,
        "recompute": recompute,
        "fused": can_fuse(backbone.model, backbone.family.fused),
        "seconds": min(took),
        "tokens": int(tokens.mask_NT.sum()),
        "weights": weights,
        "rate": matrix_rate(torch.bfloat16, device),
        "before": before,
        "peak": peak_bytes(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--families", action="store_true", help="measure mpnet and a decoder")
    parser.add_argument(
        "--case", nargs=3, metavar=("SHAPE", "SENTENCES", "RECOMPUTE"), help="measure it in this process"
    )
    options = parser.parse_args()
    if options.case:
        shape, sentences, recompute = options.case
        print(json.dumps(measure(shape, int(sentences), recompute == "True", options.device)))
        return
    name = f"{'families' if options.families else 'shapes'}-{options.device}"
    cases = [
        in_own_process(__file__, "--device", options.device, "--case", shape, sentences, recompute)
        for shape, sentences in CASES[name]
        for recompute in ((False, True) if sentences < 1000 or options.device == "cuda" else (True,))
    ]
    results = {"machine": describe(), "seed": SEED, "prompt_length": LENGTH, "cases": cases}
    (HERE / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
