"""The local history, metrics.jsonl: one JSON object per line, always written, readable while the run is in progress."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.loggers.logger import Logger

from promcse_pl.utils.errors import DataError


class JsonlLogger(Logger):
    """Lightning logger that appends each set of metrics to a file as {"step": ..., "name": value, ...}.

    Args:
        path: The file; created if absent.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    @property
    def name(self) -> str:
        """Name of the file."""
        return self._path.name

    @property
    def version(self) -> str:
        """Empty: a run has one history."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a line."""
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        if not values:
            return
        line = json.dumps({"step": None if step is None else int(step), **values}) + "\n"
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(line)
        except OSError as error:
            raise DataError(f"cannot write {self._path}: {error.strerror}") from error

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Do nothing: config.yaml contains the settings."""
