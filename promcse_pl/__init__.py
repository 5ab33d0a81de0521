"""PromCSE: sentence embeddings from a soft prompt on a frozen encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from promcse_pl.version import __version__

if TYPE_CHECKING:
    from promcse_pl.embedder import PromCSE

__all__ = ["PromCSE", "__version__"]


def __getattr__(name: str) -> object:
    """Import PromCSE, and torch with it, only when it is asked for."""
    if name == "PromCSE":
        from promcse_pl.embedder import PromCSE

        return PromCSE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
