"""Signals that stop a run: it saves first and exits with the code that schedulers expect."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

REPEAT_SECONDS = 2.0
"""Two SIGTERM or SIGUSR1 within this time count as one: a group gets a signal that its leader also passes on."""


class Stopped(BaseException):
    """A signal stopped the run. Not an Exception, so that handlers of failures do not catch it.

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
        """130 for Ctrl-C; 143 for SIGTERM and for SIGUSR1, which schedulers send before SIGTERM."""
        return 128 + (signal.SIGINT if self.signum == signal.SIGINT else signal.SIGTERM)


@contextmanager
def handled_by(handler: Callable[[int], None]) -> Iterator[bool]:
    """Call a function on each stop signal; gives False outside the main thread, where Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield False
        return
    before = {signum: signal.signal(signum, lambda signum, _: handler(signum)) for signum in STOP_SIGNALS}
    try:
        yield True
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


class StopSignals:
    """Context that turns stop signals into `Stopped`: at once or, while `deferred`, when the training loop checks after its step.

    A second signal is not deferred, unless it repeats the first one (`REPEAT_SECONDS`).

    Attributes:
        received: The last signal; None: none yet.
        deferred: Whether the first signal is only recorded.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferred = False
        self._last = -math.inf
        self._stack = ExitStack()
        self._is_main_thread = False

    def __enter__(self) -> StopSignals:
        self._is_main_thread = self._stack.enter_context(handled_by(self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def install(self) -> None:
        """Install the handlers again: Lightning replaces them."""
        if self._is_main_thread:
            for signum in STOP_SIGNALS:
                signal.signal(signum, lambda signum, _: self._handle(signum))

    def _handle(self, signum: int) -> None:
        now = time.monotonic()
        is_first, is_repeated = self.received is None, signum != signal.SIGINT and now - self._last < REPEAT_SECONDS
        self._last = now
        if is_repeated:
            return
        self.received = signum
        if not (self.deferred and is_first):
            raise Stopped(signum)
