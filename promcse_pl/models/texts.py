"""Check texts from users, and turn them into token ids."""

# N sentences, T tokens

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from promcse_pl.data.batch import Tokens
from promcse_pl.data.tokens import require_embeddings
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


def tokenize(tokenizer: Any, sentences: Sequence[str], longest: int, vocabulary: int | None = None) -> Tokens:  # noqa: ANN401
    """Return the token ids of sentences.

    Args:
        tokenizer: A transformers tokenizer.
        sentences: N texts.
        longest: Maximum number of tokens; longer texts are truncated.
        vocabulary: V, the rows of the encoder's embedding matrix; None: not checked.

    Returns:
        Tokens, padded at the end.

    Raises:
        DataError: The encoder has no embedding for a token.
    """
    encoded = tokenizer(
        list(sentences),
        truncation=True,
        max_length=longest,
        padding=True,
        padding_side="right",
        return_token_type_ids=False,
        return_tensors="pt",
    )
    if vocabulary is not None:
        require_embeddings(tokenizer, encoded["input_ids"].numpy(), vocabulary, "the texts cannot be encoded")
    return Tokens(encoded["input_ids"], encoded["attention_mask"])
