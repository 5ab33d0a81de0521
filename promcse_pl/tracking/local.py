"""The local history: one JSON object a line, always written, readable while the run goes on."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.loggers.logger import Logger

from promcse_pl.utils.errors import DataError


class JsonlLogger(Logger):
    """Append every logged set of metrics to a file as {"step": ..., "name": value, ...}.

    Args:
        path: The file; made if absent.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    @property
    def name(self) -> str:
        """The file's name."""
        return self._path.name

    @property
    def version(self) -> str:
        """There is one history per run."""
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
        """Nothing: config.yaml beside the history holds them."""


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Return the entries of a history file, oldest first; a last line that was cut short is left out.

    Raises:
        DataError: The file is missing, or holds something else.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a history: {error}") from error
