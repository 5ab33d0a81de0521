"""Limits on memory and time for a block of code."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def memory_limit(more: int = 300_000_000, seconds: int = 30) -> Iterator[None]:
    """Refuse this process more memory than it has and `more` bytes; raise TimeoutError in what waits longer than `seconds`."""
    resource = pytest.importorskip("resource")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("reads /proc")

    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes more than {seconds} s")

    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
