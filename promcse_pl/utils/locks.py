"""A lock for objects that are copied and pickled."""

from __future__ import annotations

import threading
from types import TracebackType


class Lock:
    """A lock that is new in a copy or an unpickled object."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()
