"""Profile a training step and compute a lower bound for each part.

    python experiments/speed/parts.py --data FOLDER [--dtype float32]

One thread, one step of the default row. The time of a part is its share of the profiled step times the duration of a step
without the profiler. Its lower bound is the number of operations over the rate of a large matrix product, or the bytes read and
written over the rate of an in-place product of two tensors of a chunk's size. Only real tokens count.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from machine import matrix_rate, seconds
from rows import LENGTH, Step, batches, our_step, prompt_encoder
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from promcse_pl.training.machine import choose_precision

STEPS = 5
OPERATIONS = {
    "matrix products": ("mm", "addmm", "addmm_"),
    "attention products": ("bmm", "baddbmm", "baddbmm_"),
    "GELU": ("gelu", "gelu_backward"),
    "LayerNorm": ("native_layer_norm", "native_layer_norm_backward"),
    "softmax": ("_softmax", "_softmax_backward_data"),
    "products and masks of dropout": ("mul", "mul_", "ge", "addcmul"),
    "residuals": ("add", "add_"),
    "copies and padding": ("copy_", "cat", "fill_", "index_copy_", "index_select"),
}
REST = "all else: Python, random bits, autograd, allocation"


def floors(mask_NT: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Return the lower bound of each part in seconds; parts that an ideal step does not have are omitted.

    Elements read and written by each token and layer, forward and backward, D wide and N x S attention weights: GELU 5 x 4 D;
    two LayerNorms 2 x 5 D; softmax 5 N S; dropout of two hidden states and the weights 7 each; two residuals 6 D each.
    """
    model = prompt_encoder(dtype).backbone
    config = model.model.config
    lengths_N = mask_NT.sum(1).double()
    tokens, seen = float(lengths_N.sum()), float((lengths_N * (lengths_N + LENGTH)).sum())
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    weights = sum(p.numel() for p in model.model.encoder.layer.parameters() if p.ndim == 2)
    operations = matrix_rate(dtype)
    states, other = (torch.ones(512, width, dtype=dtype) for _ in range(2))
    took = min(seconds(lambda: states.mul_(other)) for _ in range(100))
    elements = 3 * states.numel() / took
    attention = layers * config.num_attention_heads * seen
    return {
        "matrix products": 4 * weights * tokens / operations,
        "attention products": 12 * layers * width * seen / operations,
        "GELU": layers * tokens * 5 * inner / elements,
        "LayerNorm": layers * tokens * 10 * width / elements,
        "softmax": 5 * attention / elements,
        "products and masks of dropout": (layers * tokens * 14 * width + 7 * attention) / elements,
        "residuals": layers * tokens * 12 * width / elements,
    }


def parts(step: Step) -> dict[str, float]:
    """Return the share of a profiled step that each part takes."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step(0)
    own = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in found.key_averages()}
    total = sum(own.values())
    shares = {part: sum(own.get(name, 0.0) for name in names) / total for part, names in OPERATIONS.items()}
    return shares | {REST: 1 - sum(shares.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "promcse_speed")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)
    precision, why = choose_precision(options.dtype, torch.device("cpu"))
    dtype = getattr(torch, precision)
    work = batches(options.data.resolve(), options.cache, 1)
    step = our_step(work, dtype=dtype)
    step(0)
    shares = parts(step)
    took = statistics.median(seconds(lambda: step(0)) for _ in range(STEPS))
    least = floors(work[0].tokens.mask_NT, dtype)
    print(f"{why}; one thread; {int(work[0].tokens.mask_NT.sum()):,} real tokens; a step of {1000 * took:,.0f} ms\n")
    print("| part | ms | floor, ms |\n|---|---|---|")
    for part, share in shares.items():
        floor = f"{1000 * least[part]:,.0f}" if part in least else ""
        print(f"| {part} | {1000 * share * took:,.0f} | {floor} |")
    print(f"| together | {1000 * took:,.0f} | {1000 * sum(least.values()):,.0f} |")


if __name__ == "__main__":
    main()
