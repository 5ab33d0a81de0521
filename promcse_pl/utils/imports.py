"""Importing torch and what stands on it, without the garbage collector looking on."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unwatched_imports() -> Iterator[None]:
    """Hold the garbage collector back while torch is imported, and from what the imports made for good.

    They make half a million objects that live as long as the process. Looking through them again and again takes a tenth of the
    imports' time, and two seconds when the process ends; in forked processes it would also copy their memory. Where torch was
    there already nothing is changed: the objects may be a user's.
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
