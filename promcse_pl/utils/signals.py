"""Signals that ask a run to stop: it saves first and ends with the code that schedulers expect."""

from __future__ import annotations

import math
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

SAME = 2.0
"""Seconds within which two SIGTERM or SIGUSR1 are one."""


class Stopped(BaseException):
    """A signal ended the run. Not an Exception: what guards against failures must let it through.

    Args:
        signum: The signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C; 143 for SIGTERM, and for SIGUSR1, by which schedulers announce it."""
        return 128 + (signal.SIGINT if self.signum == signal.SIGINT else signal.SIGTERM)


class StopSignals:
    """Turns the signals into `Stopped`: at once, or, while `deferred`, when the training loop asks after its step.

    A second signal is not deferred, unless it is the first one come again within two seconds. Outside the main thread, where
    Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferred = False
        self._last = -math.inf
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.getsignal(signum) for signum in SIGNALS}
            self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def install(self) -> None:
        """Put the handlers in their place (again: Lightning puts its own there)."""
        for signum in self._before:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        first, again = self.received is None, signum != signal.SIGINT and now - self._last < SAME
        self._last = now
        if again:  # to every process of a group, and passed on by the one that started this one
            return
        self.received = signum
        if not (self.deferred and first):
            raise Stopped(signum)
