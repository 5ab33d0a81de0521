"""Standard streams that are closed, full or not read, and text that is safe to print."""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import suppress

_UNSAFE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except the tab; line and paragraph separators; bidirectional controls; lone surrogates."""


def visible(text: str) -> str:
    """Return a line of text with control characters escaped, since names and messages may come from untrusted files.

    For terminals and log files; results (embeddings, sentences, JSON) are written unescaped.
    """
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def open_streams() -> None:
    """Redirect closed standard streams to /dev/null, and escape characters that their encoding does not have."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next opened file would get its descriptor
        pass
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Discard buffered and later standard output: flushing it at exit would fail."""
    with suppress(OSError):  # a stream without a file descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
