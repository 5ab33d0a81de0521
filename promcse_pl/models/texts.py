"""Turn texts into token ids."""

# N sentences, T tokens

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from promcse_pl.data.batch import Tokens
from promcse_pl.data.tokens import require_embeddings
from promcse_pl.utils.errors import DataError


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
        DataError: The encoder has no embedding for a token, or a text has no tokens.
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
    # torch may have another default device
    ids_NT, mask_NT = (encoded[name].long().cpu() for name in ("input_ids", "attention_mask"))
    if vocabulary is not None:
        require_embeddings(tokenizer, ids_NT.numpy(), vocabulary, "the texts cannot be encoded")
    lengths_N = mask_NT.sum(1)
    if not lengths_N.all():
        text = sentences[int(lengths_N.argmin())]
        raise DataError(f"a text has no tokens and cannot be encoded: {text[:80]!r}")
    return Tokens(ids_NT, mask_NT, lengths_N=lengths_N)
