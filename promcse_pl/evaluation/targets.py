"""Targets of an evaluation: an adapter, a run, a frozen encoder, an official checkpoint, or runs that differ by their seed."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promcse_pl.adapter_folder import DESCRIPTION, find_adapter
from promcse_pl.config import comparable_settings, decides, flat_settings
from promcse_pl.config.pooling import ALLOWED_POOLINGS, is_pooling, nearest_pooling
from promcse_pl.embedder import PromCSE
from promcse_pl.interop.official import CLASSES, import_official
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.device import pick_device
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.encoder_files import read_config
from promcse_pl.models.families import FAMILIES
from promcse_pl.models.hub import locate
from promcse_pl.models.pipeline import read_pipeline
from promcse_pl.run_folder import CONFIG, read_yaml, split_resolved
from promcse_pl.utils.errors import AdapterError, ConfigError, DataError
from promcse_pl.utils.files import current
from promcse_pl.utils.paths import expand, looks_like_path


@dataclass(frozen=True, slots=True)
class Member:
    """One model of a target: a function that loads it, and the seed of its training if that is known."""

    load: Callable[[], PromCSE]
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Models that are reported in one row of the results.

    Attributes:
        name: Name in tables.
        kind: Kind of the target in words.
        members: One model, or the runs of several seeds.
    """

    name: str
    kind: str
    members: tuple[Member, ...]


def find_targets(
    names: Sequence[str], *, pooling: str | None = None, encoder: str | None = None, device: str = "auto"
) -> list[Target]:
    """Resolve names to targets without reading weights.

    Args:
        names: Adapter or run folders, encoders (folder or hub id), official checkpoints (folder or hub id), folders of runs.
        pooling: Pooling of frozen encoders (None: their own in modules.json, else the usual one of their family) and official
            checkpoints (None: as in `promcse import`).
        encoder: Folder or hub id of the frozen encoder of all adapters (None: the name in each).
        device: Device of the models.

    Raises:
        AdapterError, ConfigError, DataError, EncoderError: A name that is no target, or runs that differ by more than the seed.
    """
    if pooling is not None and not is_pooling(pooling):
        raise ConfigError(
            f"--pooling must be one of {ALLOWED_POOLINGS}, got {pooling!r}. Try: --pooling {nearest_pooling(pooling)}"
        )
    if len(set(names)) < len(names):
        raise ConfigError(f"a target is given twice: {' '.join(names)}")
    pick_device(device)
    found = [_find(name, pooling, encoder, device) for name in names]
    if encoder is not None and not {"adapter", "runs over seeds"} & {target.kind for target in found}:
        raise ConfigError(f"--encoder {encoder} has no effect, since no target is an adapter. Try: leave it out")
    labels = [target.name for target in found]
    return [
        dataclasses.replace(target, name=name) if labels.count(target.name) > 1 else target
        for name, target in zip(names, found, strict=True)
    ]


def frozen_target(model: PromCSE) -> Target:
    """Return the encoder of an adapter before training as a target, with the text settings of the adapter.

    Its pooling is that of modules.json, else that of the adapter. If weights of the encoder were trained, the original ones are
    read again.
    """

    def load() -> PromCSE:
        backbone = model.encoder.backbone.base()
        pooling = backbone.pipeline.pooling or model.encoder.pooling
        plain = PromptEncoder(backbone, length=0, pooling=pooling, head="none", text=model.encoder.text).eval()
        return PromCSE(plain, model.tokenizer)

    return Target("frozen encoder", "frozen encoder", (Member(load),))


def _find(name: str, pooling: str | None, encoder: str | None, device: str) -> Target:
    folder = expand(name)
    real = Path(os.path.realpath(folder))  # Path.resolve raises for a link that leads to itself
    label = real.parent.name if real.name == "adapter" else real.name  # a run's adapter gets the name of its run
    if find_adapter(folder):
        return Target(label, "adapter", (_adapter_member(folder, encoder, device),))
    if folder.is_dir() and not (folder / "config.json").is_file():
        return Target(label, "runs over seeds", _seed_members(folder, encoder, device))
    is_path = looks_like_path(name) or ("/" in name and folder.parent.is_dir())
    if is_path and not folder.is_dir():
        raise AdapterError(f"the target {name} does not exist (current folder: {Path.cwd()})")
    source = locate(name, None, weights=())[0]
    config = read_config(source, name)
    official = set(config.architectures or ()) & set(CLASSES.values())
    label = label if folder.is_dir() else name.rpartition("/")[2]
    if official:

        def load() -> PromCSE:
            return PromCSE(import_official(name, pooling=pooling).encoder.to(pick_device(device)))

        return Target(label, "official checkpoint", (Member(load),))
    chosen = pooling or read_pipeline(source).pooling or FAMILIES[config.model_type].pooling

    def load_frozen() -> PromCSE:
        plain = PromptEncoder(FrozenBackbone.load(name), length=0, pooling=chosen, head="none").eval()
        return PromCSE(plain.to(pick_device(device)))

    return Target(label, f"frozen encoder, pooling {chosen}", (Member(load_frozen),))


def _adapter_member(folder: Path, encoder: str | None, device: str) -> Member:
    adapter = find_adapter(folder)
    assert adapter is not None
    try:
        training = json.loads(current(adapter, DESCRIPTION).read_text(encoding="utf-8"))["training"]
        seed = training.get("seed")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        seed = None  # loading the adapter reports what is wrong
    return Member(lambda: PromCSE.load(folder, encoder=encoder, device=device), seed)


def _seed_members(folder: Path, encoder: str | None, device: str) -> tuple[Member, ...]:
    runs = sorted(path for path in folder.iterdir() if find_adapter(path))
    if len(runs) < 2:
        raise AdapterError(
            f"{folder} is not an adapter ({DESCRIPTION}), run (adapter/{DESCRIPTION}), encoder or official checkpoint "
            f"(config.json), and holds {len(runs)} runs; a folder of seeds holds two or more"
        )
    members = [_adapter_member(run, encoder, device) for run in runs]
    seeds = [member.seed for member in members]
    for run, seed in zip(runs, seeds, strict=True):
        if seed is None or seeds.count(seed) > 1:
            raise DataError(f"the runs of {folder} must have different seeds, got {seed} for {run.name}")
    settings = [_settings(run) for run in runs]
    for run, setting in zip(runs, settings, strict=True):
        if setting != settings[0]:
            keys = sorted(key for key in {*setting, *settings[0]} if setting.get(key) != settings[0].get(key))
            raise DataError(
                f"the runs of {folder} must differ by the seed alone, but {runs[0].name} and {run.name} differ in "
                f"{', '.join(keys)}. Give them as separate targets: {shlex.join(map(str, runs))}"
            )
    return tuple(members)


def _settings(run: Path) -> dict[str, Any]:
    """Return the settings of a run that affect its adapter, flat; empty for an adapter without its run."""
    path = run / CONFIG
    if not path.is_file():
        return {}
    try:
        typed, resolved = split_resolved(read_yaml(path))
        settings = comparable_settings(flat_settings(typed) | resolved)
    except (ConfigError, AttributeError) as error:
        raise DataError(f"{path} cannot be read as settings: {error}") from error
    return {key: value for key, value in settings.items() if key != "seed" and decides(key) == "training"}
