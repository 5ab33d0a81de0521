"""The standard streams as a caller may leave them: closed, full, or with nobody who reads."""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import suppress

_UNSAFE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except the tab, line and paragraph separators, bidirectional controls, and lone surrogates."""


def visible(text: str) -> str:
    """Return a line of text with control characters escaped, since names and messages may come from untrusted files.

    For terminals and log files; results (embeddings, sentences, JSON) are written unescaped.
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def open_streams() -> None:
    """Give streams that the caller has closed to /dev/null, and write characters that their encoding lacks as escapes."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # or the next file to be opened would be taken for one
        pass
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Have what is still buffered for standard output, and what comes, go nowhere: Python's last flush would complain."""
    with suppress(OSError):  # a stream that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
