"""Turn texts into token ids."""

# N sentences, T tokens

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from promcse_pl.data.batch import Tokens
from promcse_pl.data.tokens import require_embeddings


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
    mask_NT = encoded["attention_mask"]
    return Tokens(encoded["input_ids"], mask_NT, lengths_N=mask_NT.sum(1))
