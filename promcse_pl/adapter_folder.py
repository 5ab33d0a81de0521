"""Find and identify adapter folders, without importing torch so that commands can check early."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from promcse_pl.utils.errors import AdapterError
from promcse_pl.utils.files import current, own_description, refuse_taken

WEIGHTS, DESCRIPTION = "adapter.safetensors", "adapter.json"
BUNDLED_NAME = "encoder"
BUNDLED = f"./{BUNDLED_NAME}"
"""Name of an encoder that is stored in the adapter's folder."""


def find_adapter(folder: Path) -> Path | None:
    """Return the adapter folder of a run (`adapter`), or the folder itself if it is an adapter; otherwise None."""
    for path in (folder / "adapter", folder):
        if os.path.exists(current(path, DESCRIPTION)):  # noqa: PTH110  (Path.exists raises for a name that is too long)
            return path
    return None


def written_description(folder: Path) -> dict[str, Any] | None:
    """Return the description of an adapter written by this package; None if absent or written by another program."""
    about = own_description(folder, DESCRIPTION, {"format", "promcse_pl", "encoder"})
    return about if about and isinstance(about["encoder"], dict) else None


def check_target(folder: Path) -> None:
    """Check that an adapter may be written to a folder: it is absent, empty, or an adapter of this package.

    Raises:
        AdapterError: The folder has other content, or cannot be read.
    """
    if written_description(folder) is None:
        refuse_taken(folder, error=AdapterError)
