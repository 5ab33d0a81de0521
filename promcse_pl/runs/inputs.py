"""What a run was begun with, so that a resumed one can refuse to go on with something else."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promcse_pl.config import DATA_SUITES, SUITES, Config, decides, flat_settings
from promcse_pl.data.sources import check_training_file, data_dir, dev_pairs, senteval_dir
from promcse_pl.evaluation.tasks import load_tasks
from promcse_pl.run_folder import INPUTS, read_json
from promcse_pl.tracking.wandb import resolve_mode
from promcse_pl.utils.errors import ConfigError, DataError, EncoderError
from promcse_pl.utils.files import write_text
from promcse_pl.utils.paths import expand, hide_home, is_folder

if TYPE_CHECKING:  # both import torch, and check_inputs runs without it
    from promcse_pl.data.module import PromcseDataModule
    from promcse_pl.models.encoder import PromptEncoder

log = logging.getLogger("promcse_pl")

_IGNORED_FIELDS = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""Fields of an encoder's config that describe its origin, or how it was loaded."""


def check_inputs(config: Config) -> None:
    """Check the files, folders and modes in a config, before torch is imported and a model is loaded (a second or two).

    Only the first rows of the training file are read, but all of the dev set and the evaluation files.

    Raises:
        ConfigError, DataError, EncoderError: A file, folder or mode is missing or invalid.
    """
    resolve_mode(config.tracking.wandb)
    path = config.model.path
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not is_folder(expand(path)):
        raise EncoderError(
            f"the encoder folder {path} does not exist (current folder: {Path.cwd()}). Try: model.path=FOLDER"
        )
    if set(config.evaluation.tasks) & set(DATA_SUITES):
        senteval_dir(config.data)
    dev = None if config.data.dev == "holdout" else dev_pairs(config.data)
    # a missing file must not show itself after hours of training
    for task in load_tasks(config.evaluation.tasks, data_dir(config.data)):
        if dev is not None and dev.sha256 in {file["sha256"] for file in task.files}:
            raise ConfigError(
                f"data.dev={config.data.dev} is also tested on ({task.name}): a model chosen by it has seen the answers. "
                "Try: data.dev=FILE with other pairs"
            )
    check_training_file(config.data, config.seed)


def describe_inputs(config: Config, encoder: PromptEncoder, data: PromcseDataModule) -> dict[str, Any]:
    """Return checksums of data, encoder and evaluation files, the settings, and properties of the machine."""
    import torch

    backbone = encoder.backbone
    encoder_config: Any = backbone.model.config  # all fields: dropout rates affect training, though not the embeddings
    fields = {name: value for name, value in encoder_config.to_dict().items() if name not in _IGNORED_FIELDS}
    return {
        "data.train": {"name": config.data.train, "sha256": data.token_rows.fingerprint},
        "data.dev": {"name": config.data.dev, "sha256": data.dev.sha256 if data.dev else None},
        "model.path": {
            "name": config.model.path,
            "sha256": backbone.identity.sha256,
            "config": json.loads(json.dumps(fields, default=str)),
            "tokenizer": backbone.identity.tokenizer,
        },
        "evaluation.tasks": own_files(config),
        "config": flat_settings(config.to_dict()),
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }


def own_files(config: Config) -> dict[str, str]:
    """Return the sha256 of every file in `evaluation.tasks`, by its name as typed; suites are left out."""
    names = [name for name in dict.fromkeys(config.evaluation.tasks) if name not in SUITES]
    tasks = load_tasks(names, data_dir(config.data))
    return {name: task.files[0]["sha256"] for name, task in zip(names, tasks, strict=True)}


def record_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Write inputs.json, or compare with it if it exists, and record execution settings that a resume has changed.

    Raises:
        DataError: A file or a setting is not what the run was begun with; the message names it.
    """
    path = folder / INPUTS
    if not path.exists():
        write_text(path, json.dumps(inputs, indent=2) + "\n")
        return
    try:
        before = hide_home(read_json(path))  # an earlier version wrote it out
        _compare_encoder(before["model.path"], inputs["model.path"], folder)
        for key in ("data.train", "data.dev", "model.path"):
            if before[key]["sha256"] != inputs[key]["sha256"]:
                raise DataError(
                    f"{key}={inputs[key]['name']} has changed since the run in {folder} began (or its tokenizer has): going on "
                    "would mix two data sets. Put the old one back, or start a new run"
                )
        for name, sha256 in before.get("evaluation.tasks", {}).items():  # absent: written by an earlier version
            if inputs["evaluation.tasks"].get(name, sha256) != sha256:
                raise DataError(
                    f"{name} in evaluation.tasks has changed since the run in {folder} started, so its scores would not be "
                    "comparable with earlier ones. Restore the old file, or start a new run"
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
        exact = "the dropout masks change, so the result will not be bit-identical to that of an uninterrupted run"
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


def _compare_encoder(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Reject an encoder whose config or tokenizer has changed since the start; runs of earlier versions recorded neither."""
    config: dict[str, Any] = before.get("config", {})
    changed = [
        f"{name} in its config.json was {str(value)[:80]} and is now {str(now['config'][name])[:80]}"
        for name, value in config.items()
        if name in now.get("config", {}) and now["config"][name] != value  # another transformers may drop or add fields
    ]
    if before.get("tokenizer", now.get("tokenizer")) != now.get("tokenizer"):
        changed.append("its tokenizer differs")
    if changed:
        raise DataError(
            f"model.path={now['name']} has changed since the run in {folder} started: {'; '.join(changed)}. Restore the old "
            "files, or start a new run"
        )
