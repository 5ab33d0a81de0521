"""Identity of a tokenizer: everything that affects its token ids."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_IGNORED_SETTINGS = ("is_local", "local_files_only", "model_max_length", "name_or_path", "tokenizer_class")
"""Settings of a tokenizer that depend on its location, or that every call overrides."""


def tokenizer_fingerprint(tokenizer: Any) -> str:  # noqa: ANN401  (a transformers tokenizer)
    """Return the hex sha256 of everything that affects the token ids: vocabulary, normalisation, special tokens, truncation side.

    A copy written by `save_pretrained` has the same fingerprint.
    """
    described: list[object] = [
        type(tokenizer).__name__,
        tokenizer.pad_token_id,
        tokenizer.truncation_side,
        tokenizer.split_special_tokens,
    ]
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # State of the last call; every call sets its own.
        backend.update(truncation=None, padding=None)
        described.append(backend)
    else:
        settings = {
            key: value
            for key, value in tokenizer.init_kwargs.items()
            if value is not None and key not in _IGNORED_SETTINGS and not key.endswith("_file")
        }
        described += [tokenizer.get_vocab(), settings]
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
