"""Check texts from users."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from promcse_pl.utils.errors import DataError, TextTypeError


def list_of_texts(sentences: Iterable[str], caller: str) -> list[str]:
    """Return the strings of an iterable as a list; the iterable is consumed once.

    Raises:
        TextTypeError: Not an iterable of strings: None, bytes, a dict, a DataFrame, or an entry of another type.
        DataError: A text holds a lone surrogate.
    """
    if (
        not isinstance(sentences, Iterable)
        or isinstance(sentences, bytes | bytearray | memoryview | Mapping)
        or getattr(sentences, "ndim", 1) != 1  # iterating over a DataFrame gives its column names
    ):
        raise TextTypeError(
            f"{caller} needs a string or an iterable of strings, got {type(sentences).__name__} ({repr(sentences)[:80]}). "
            f'Try: {caller}(["A woman reads."])'
        )
    texts = list(sentences)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TextTypeError(f"sentence {position} must be a string, got {type(text).__name__} ({repr(text)[:200]})")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"sentence {position} holds a lone surrogate, which no tokenizer accepts") from None
    return texts
