"""Valid settings to change in tests."""

import copy
from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from promcse_pl.config import Config, SweepConfig
from promcse_pl.config.fields import settings
from support.folders import ROOT


def valid() -> dict[str, Any]:
    return composed()


def leaves() -> dict[str, Any]:
    """Return the type of every setting by dotted key."""
    return {key: setting.kind for key, setting in settings(Config).items()}


def put(raw: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    section, _, name = key.rpartition(".")
    (raw[section] if section else raw)[name] = value
    return raw


def composed(*overrides: str) -> dict[str, Any]:
    return copy.deepcopy(composed_once(*overrides))


def config_of(*overrides: str) -> Config:
    return Config.from_dict(composed(*overrides))


CONF = ROOT / "conf"


@cache
def composed_once(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        raw = OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)
    SweepConfig.from_dict(raw.pop("sweep"))
    return raw
