"""Which type the frozen encoder computes in: measured, not guessed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from promcse_pl.embedder import pick_device
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
