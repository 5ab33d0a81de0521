"""The inputs of a run: settings, data, encoder and evaluation files. They are checked before a run starts, recorded in
inputs.json, and compared when it is resumed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promcse_pl.config import SENTEVAL_SUITES, SUITES, Config, decides, flat_settings
from promcse_pl.data.pairs import ScoredPairs
from promcse_pl.data.sources import cache_dir, check_training_file, data_dir, dev_set, senteval_dir
from promcse_pl.evaluation.tasks import load_tasks
from promcse_pl.run_folder import INPUTS, read_json
from promcse_pl.tracking.wandb import resolve_mode
from promcse_pl.utils.errors import ConfigError, DataError, EncoderError
from promcse_pl.utils.files import write_text
from promcse_pl.utils.paths import expand, hide_home, is_folder, looks_like_path

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
    _check_logger(config.tracking.logger)
    if config.tuning.weights == "lora" and importlib.util.find_spec("peft") is None:
        raise ConfigError("tuning.weights=lora needs the package peft. Try: pip install 'promcse_pl[peft]'")
    path = config.model.path
    if looks_like_path(path) and not is_folder(expand(path)):
        raise EncoderError(
            f"the encoder folder {path} does not exist (current folder: {Path.cwd()}). Try: model.path=FOLDER"
        )
    if set(config.evaluation.tasks) & set(SENTEVAL_SUITES):
        senteval_dir(config.data)
    dev = None if config.data.dev == "holdout" else dev_set(config.data)
    # evaluation files and MTEB data are read at the end of the run, but missing ones are reported now
    for task in load_tasks(config.evaluation.tasks, data_dir(config.data)):
        if task.load_data is not None:
            task.load_data(None, cache_dir(config.data.cache_dir))
        if dev is not None and dev.sha256 in {file["sha256"] for file in task.files}:
            advice = (
                "FILE with other pairs" if isinstance(dev, ScoredPairs) else "FOLDER/qrels/SPLIT.tsv with another split"
            )
            raise ConfigError(
                f"data.dev={config.data.dev} is also in evaluation.tasks ({task.name}), but the best step is selected on the dev "
                f"set. Try: data.dev={advice}"
            )
    check_training_file(config.data, config.seed)


def _check_logger(name: str) -> None:
    """Raise ConfigError if the package of `tracking.logger` is not installed."""
    if name in ("tensorboard", "mlflow") and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"tracking.logger={name} needs the package {name}. Try: pip install 'promcse_pl[{name}]', or tracking.logger=csv"
        )


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
            "pipeline": {
                "pooling": backbone.pipeline.pooling,
                **dataclasses.asdict(backbone.pipeline.text),
                "dense": backbone.identity.config.get("dense", []),
            },
        },
        "evaluation.tasks": _evaluation_files(config),
        "config": flat_settings(config.to_dict()),
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }


def ignores_pipeline(folder: Path) -> bool:
    """Return whether a run was started by a version that ignored the encoder's modules.json; resuming it ignores it too."""
    path = folder / INPUTS
    stored = read_json(path) if path.exists() else None
    encoder = stored.get("model.path") if isinstance(stored, dict) else None
    return isinstance(encoder, dict) and "pipeline" not in encoder


def _evaluation_files(config: Config) -> dict[str, str]:
    """Return the sha256 of each file in `evaluation.tasks` by its name as typed; suites are left out."""
    names = [name for name in dict.fromkeys(config.evaluation.tasks) if name not in SUITES]
    tasks = load_tasks(names, data_dir(config.data))
    return {name: task.files[0]["sha256"] for name, task in zip(names, tasks, strict=True) if task.files}


def record_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Write inputs.json; if it exists, compare with it, and record execution settings that a resume has changed.

    Raises:
        DataError: A file or a setting has changed since the run started; the message names it.
    """
    path = folder / INPUTS
    if not path.exists():
        _write_inputs(path, inputs)
        return
    try:
        stored = hide_home(read_json(path))  # an earlier version wrote the home folder
        _compare_files(stored, inputs, folder)
        _compare_settings(stored, inputs, folder)
        torch_version, threads = stored["machine"].get("torch"), stored["machine"].get("threads")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); the run cannot be resumed") from error
    machine = inputs["machine"]
    if (torch_version, threads) != (machine["torch"], machine["threads"]):
        log.warning(
            "the run started with torch %s on %s threads and is resumed with torch %s on %s: the result will not be "
            "bit-identical to that of an uninterrupted run",
            torch_version,
            threads,
            machine["torch"],
            machine["threads"],
        )


def _write_inputs(path: Path, inputs: dict[str, Any]) -> None:
    write_text(path, json.dumps(inputs, indent=2) + "\n")


def _compare_files(stored: dict[str, Any], inputs: dict[str, Any], folder: Path) -> None:
    """Raise DataError if data, encoder or evaluation files have changed."""
    _compare_encoder(stored["model.path"], inputs["model.path"], folder)
    for key in ("data.train", "data.dev", "model.path"):
        if stored[key]["sha256"] != inputs[key]["sha256"]:
            raise DataError(
                f"{key}={inputs[key]['name']} has changed since the run in {folder} started (or its tokenizer has). Restore the "
                "old version, or start a new run"
            )
    for name, sha256 in stored.get("evaluation.tasks", {}).items():  # absent: written by an earlier version
        if inputs["evaluation.tasks"].get(name, sha256) != sha256:
            raise DataError(
                f"{name} in evaluation.tasks has changed since the run in {folder} started, so its scores would not be "
                "comparable with earlier ones. Restore the old file, or start a new run"
            )


def _compare_encoder(stored: dict[str, Any], encoder: dict[str, Any], folder: Path) -> None:
    """Raise DataError if the encoder's config, tokenizer or pipeline has changed; runs of earlier versions recorded none."""
    config: dict[str, Any] = stored.get("config", {})
    changed = [
        f"{name} in its config.json was {str(value)[:80]} and is now {str(encoder['config'][name])[:80]}"
        for name, value in config.items()
        if name in encoder["config"]
        and encoder["config"][name] != value  # other versions of transformers have other fields
    ]
    if stored.get("tokenizer", encoder["tokenizer"]) != encoder["tokenizer"]:
        changed.append("its tokenizer differs")
    pipeline = encoder["pipeline"]
    changed += [
        f"{name} in its sentence-transformers files was {str(value)[:80]} and is now {str(pipeline[name])[:80]}"
        for name, value in stored.get("pipeline", {}).items()
        if name in pipeline and pipeline[name] != value
    ]
    if changed:
        raise DataError(
            f"model.path={encoder['name']} has changed since the run in {folder} started: {'; '.join(changed)}. Restore the old "
            "files, or start a new run"
        )


def _compare_settings(stored: dict[str, Any], inputs: dict[str, Any], folder: Path) -> None:
    """Raise DataError if a setting that affects training has changed; log and record other changes."""
    settings, before = inputs["config"], stored["config"]
    # an earlier version stored no settings that it did not have
    changed = [key for key, value in settings.items() if decides(key) == "training" and before.get(key, value) != value]
    if changed:
        raise DataError(
            f"{folder}/config.yaml was changed since the run started: {', '.join(changed)}. Restore the old values, or start a "
            "new run with promcse train"
        )
    # an earlier version stored no settings of tracking and evaluation
    overridden = [key for key, value in settings.items() if before.get(key, value) != value]
    if overridden:
        shown = ", ".join(f"{key}={settings[key]} (was {before[key]})" for key in overridden)
        exact = "the dropout masks change, so the result will not be bit-identical to that of an uninterrupted run"
        log.info("resumed with %s%s", shown, f"; {exact}" if "trainer.chunk_tokens" in overridden else "")
        _write_inputs(folder / INPUTS, {**stored, "config": {**before, **settings}})
