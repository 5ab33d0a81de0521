"""What a run was begun with, so that a resumed one can refuse to go on with something else."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from promcse_pl.config import Config, decides, flat_settings
from promcse_pl.data.module import PromcseDataModule
from promcse_pl.errors import DataError
from promcse_pl.files import write_text
from promcse_pl.folder import INPUTS, read_json
from promcse_pl.model.encoder import PromptEncoder
from promcse_pl.paths import hide_home

log = logging.getLogger("promcse_pl")


def describe_inputs(config: Config, encoder: PromptEncoder, data: PromcseDataModule) -> dict[str, Any]:
    """Return checksums of the data and the encoder, the settings, and the machine's part."""
    return {
        "data.train": {"name": config.data.train, "sha256": data.token_rows.fingerprint},
        "data.dev": {"name": config.data.dev, "sha256": data.dev.sha256 if data.dev else None},
        "model.path": {"name": config.model.path, "sha256": encoder.backbone.identity.sha256},
        "config": flat_settings(config.to_dict()),
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }


def record_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Write inputs.json; where it is there already, compare, and note settings of the execution that a resume has changed.

    Raises:
        DataError: A file or a setting is not what the run was begun with; the message names it.
    """
    path = folder / INPUTS
    if not path.exists():
        write_text(path, json.dumps(inputs, indent=2) + "\n")
        return
    try:
        before = hide_home(read_json(path))  # an earlier version wrote it out
        for key in ("data.train", "data.dev", "model.path"):
            if before[key]["sha256"] != inputs[key]["sha256"]:
                raise DataError(
                    f"{key}={inputs[key]['name']} has changed since the run in {folder} began (or its tokenizer has): going on "
                    "would mix two data sets. Put the old one back, or start a new run"
                )
        settings, stored = inputs["config"], before["config"]
        changed = [key for key, value in settings.items() if decides(key) == "training" and stored[key] != value]
        # an earlier version stored no settings of tracking and evaluation
        moved = [key for key, value in settings.items() if key not in changed and stored.get(key, value) != value]
        machine = dict(before["machine"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); the run cannot be resumed") from error
    if changed:
        raise DataError(
            f"{folder}/config.yaml was changed since the run began: {', '.join(changed)}. Put the old values back, or start a "
            "new run with promcse train"
        )
    if moved:
        shown = ", ".join(f"{key}={settings[key]} (was {stored[key]})" for key in moved)
        exact = "the dropout masks are drawn anew, so the result will not be bit for bit that of the uninterrupted run"
        log.info("resumed with %s%s", shown, f"; {exact}" if "trainer.chunk_tokens" in moved else "")
        write_text(path, json.dumps({**before, "config": {**stored, **settings}}, indent=2) + "\n")
    if machine != inputs["machine"]:
        log.warning(
            "the run began with torch %s on %s threads and goes on with torch %s on %s: the result will not be bit for bit what "
            "it would have been",
            machine.get("torch"),
            machine.get("threads"),
            inputs["machine"]["torch"],
            inputs["machine"]["threads"],
        )
