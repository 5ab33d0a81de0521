"""Processes: the processor cores they may use, and their end with the process that started them."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

SHARE = "PROMCSE_THREADS"
"""Threads of all ranks together, when a sweep shares the machine out among its jobs."""


_PR_SET_PDEATHSIG = 1


def cores() -> int:
    """Return the processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def end_with(starter: int, signum: int) -> None:
    """Have the kernel (Linux) send this process a signal when the one that started it ends; if it has, end at once."""
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != starter:
        sys.exit(1)
