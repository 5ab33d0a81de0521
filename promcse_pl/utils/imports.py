"""Faster imports of torch and the libraries that use it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_gc() -> Iterator[None]:
    """Disable the garbage collector while torch is imported, and exclude the imported objects from it permanently.

    They are half a million objects that live as long as the process. Collecting them again and again takes a tenth of the import
    time, and two seconds at exit; in forked processes it would also copy their memory. If torch was imported before, nothing is
    changed: the objects may be the user's.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
