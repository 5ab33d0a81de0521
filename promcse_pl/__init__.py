"""PromCSE: sentence embeddings from a soft prompt on a frozen encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from promcse_pl.version import __version__

if TYPE_CHECKING:
    from promcse_pl.embedder import PromCSE
    from promcse_pl.runs.api import train

__all__ = ["PromCSE", "__version__", "train"]


def __getattr__(name: str) -> object:
    """Import PromCSE (and torch with it) and train when they are used first."""
    if name == "PromCSE":
        from promcse_pl.embedder import PromCSE

        return PromCSE
    if name == "train":
        from promcse_pl.runs.api import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
