"""Measure the machine: rate of a large matrix product, time, and memory of a process."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from promcse_pl.models.cpu.chunks import CHUNK_TOKENS
from promcse_pl.training.machine import divide_batch

SLOW = 5e9
"""Operations per second below which a processor has no instructions for a type."""
PACKAGES = ("promcse_pl", "torch", "transformers", "sentence-transformers", "peft", "numpy")


def describe() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}{', AMX' if has_amx() else ''})",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def has_amx() -> bool:
    """Return whether the processor multiplies bfloat16 matrices with AMX (Linux)."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and " amx_bf16 " in f"{info.read_text()} "


def chunk_tokens_of(dtype: torch.dtype, real_tokens: int) -> int:
    """Return the chunk size of `trainer.chunk_tokens=auto` on a CPU."""
    is_divided = dtype == torch.bfloat16
    return divide_batch(real_tokens, torch.get_num_threads()) if is_divided else CHUNK_TOKENS["cpu"]


def wait(device: str) -> None:
    """Synchronise the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def matrix_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Return the floating-point operations per second of a large square matrix product, of a small one if that takes minutes."""
    size = 8192 if device == "cuda" else 2048
    if device == "cpu" and (rate := _product_rate(512, dtype, device, 1)) < SLOW:
        return rate
    return _product_rate(size, dtype, device, 5)


def _product_rate(size: int, dtype: torch.dtype, device: str, times: int) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right
    return 2 * size**3 / statistics.median(seconds(lambda: left @ right, device) for _ in range(times))


def peak_bytes(device: str = "cpu") -> int:
    """Return the peak memory of this process: of the GPU, or (Linux) of the machine."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # not getrusage: a child process starts with its parent's maximum
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def reset_peak(device: str) -> None:
    """Let the peak memory of a GPU start at what is in use; that of a process only grows."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def in_own_process(script: str, *arguments: object) -> Any:  # noqa: ANN401  (what the script prints last, as JSON)
    """Run a script of this folder and return what it printed."""
    command = [sys.executable, str(Path(script).resolve()), *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
