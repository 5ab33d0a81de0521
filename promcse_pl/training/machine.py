"""Which type the frozen encoder computes in: measured, not guessed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from promcse_pl.data.batch import Tokens
from promcse_pl.embedder import pick_device
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.utils.errors import PromcseError, write_error

GAIN = 1.3
"""bfloat16 is chosen when its matrix product is at least so many times faster than float32's."""
_ROWS, _WIDTH, _REPEATS = 512, 768, 5


def measure_bfloat16_gain(device: torch.device) -> float:
    """Return how many times faster a bfloat16 matrix product is than a float32 one on a device (some 50 ms)."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        rows, weight = (torch.ones(size, _WIDTH, dtype=dtype, device=device) for size in (_ROWS, 4 * _WIDTH))
        times = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            result = F.linear(rows, weight)
            result[0, 0].item()  # waits for a GPU
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    return seconds[0] / seconds[1]


def choose_dtype(setting: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the type for a `trainer.precision` setting, and a line that says why."""
    if setting != "auto":
        return getattr(torch, setting), f"{setting} (of the config)"
    gain = measure_bfloat16_gain(device)
    dtype = torch.bfloat16 if gain >= GAIN else torch.float32
    return (
        dtype,
        f"{str(dtype).removeprefix('torch.')} (a bfloat16 product is {gain:.1f}x as fast as a float32 one here)",
    )


def measure(arguments: Sequence[str]) -> int:
    """Write the number of threads and the precision that `auto` selects per device to a JSON file; return an exit code.

    Args:
        arguments: The path of the file, then values of `trainer.device`.
    """
    result, *devices = arguments
    try:
        chosen = {device: choose_dtype("auto", pick_device(device))[0] for device in devices}
    except PromcseError as error:
        write_error(error)
        return 2
    precision = {device: str(dtype).removeprefix("torch.") for device, dtype in chosen.items()}
    Path(result).write_text(json.dumps({"threads": torch.get_num_threads(), "precision": precision}), encoding="utf-8")
    return 0


SHARE = 0.5
"""Part of the free memory that the kept tensors may take; the rest is for the work on a chunk and for others."""
_CGROUP = Path("/sys/fs/cgroup")
_PROBE = 4  # sentences


def kept_bytes(encoder: PromptEncoder, length: int) -> int:
    """Return how many bytes the backward pass of one sentence keeps, for an encoder in training mode.

    Args:
        encoder: The model.
        length: Tokens of the sentence, special ones included.
    """
    sizes: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = encoder.backbone.device
    ids_NT = torch.full((_PROBE, length), min(5, len(encoder.backbone.word_embeddings) - 1), device=device)
    training = encoder.training
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, note):
        encoder.train()
        kept = encoder.encode_chunk(Tokens(ids_NT, torch.ones_like(ids_NT)), encoder.prompt())
    encoder.train(training)
    del kept
    return sum(sizes.values()) // _PROBE


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device, or in the container around a CPU; None where nothing tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))
