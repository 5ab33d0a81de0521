"""Pooling names: the values of `model.pooling`. `promcse_pl.models.pooling` implements them."""

from __future__ import annotations

import difflib

AUTO = "auto"
"""Value of `model.pooling` that selects the pooling in the encoder's modules.json, else the default of its family."""
POOLINGS = (
    "cls",
    "cls_before_pooler",
    "avg",
    "avg_top2",
    "avg_first_last",
    "max",
    "mean_sqrt_len",
    "weightedmean",
    "lasttoken",
)
JOINABLE = ("cls", "max", "avg", "mean_sqrt_len", "weightedmean", "lasttoken")
"""Poolings that can be joined by `+`, in the order in which sentence-transformers concatenates their embeddings."""
ALLOWED_POOLINGS = f"{', '.join(POOLINGS)}, or several of {', '.join(JOINABLE)} joined by +, such as cls+avg"
_OTHER_NAMES = {
    "mean": "avg",
    "average": "avg",
    "cls_token": "cls",
    "max_tokens": "max",
    "mean_tokens": "avg",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean_tokens": "weightedmean",
    "last": "lasttoken",
    "last_token": "lasttoken",
}
"""Names in sentence-transformers, without the prefix `pooling_mode_`, and in other libraries."""


def is_pooling(name: str) -> bool:
    """Return whether a name is a pooling, or different poolings of `JOINABLE` joined by `+`."""
    parts = name.split("+")
    return name in POOLINGS or (len(set(parts)) == len(parts) > 1 and set(parts) <= set(JOINABLE))


def nearest_pooling(name: str) -> str:
    """Return the valid name that is closest to an invalid one: the same pooling under another name, or a similar word."""
    parts = [part.strip().lower().removeprefix("pooling_mode_") for part in name[:100].split("+")]
    choices = POOLINGS if len(parts) == 1 else JOINABLE
    close = [_OTHER_NAMES.get(part) or (difflib.get_close_matches(part, choices, n=1) or choices)[0] for part in parts]
    return "+".join(dict.fromkeys(close))
