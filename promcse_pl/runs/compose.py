"""Compose the config of a run from conf/ with Hydra; shared by the command line and the Python API."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from promcse_pl.config import Config, check_overrides
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.paths import run_command

CONF = Path(__file__).parents[1] / "conf"
TYPED: ContextVar[Sequence[str]] = ContextVar("TYPED", default=())
"""Arguments of `promcse train` as typed, for the commands in messages."""
_NOT_OF_A_RUN = ("hydra", "sweep")
"""Sections of a composed config that are not settings of a run."""


def config_groups(folders: Sequence[Path] = (CONF,)) -> dict[str, list[str]]:
    """Return the groups of configuration folders and the choices of each; recipe/ is selected by mode and model."""
    groups: dict[str, list[str]] = {}
    for path in sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()):
        groups.setdefault(path.name, []).extend(sorted(file.stem for file in path.glob("[!_]*.yaml")))
    return groups


def typed_command(before: str | None = None, after: str | None = None) -> str:
    """Return the command as typed, with one more argument before or after the others."""
    arguments = [argument for argument in (before, *TYPED.get(), after) if argument is not None]
    return f"{run_command()} {shlex.join(arguments)}"


def escaped(text: str) -> str:
    """Return text for a config in which `${` is not an interpolation (of environment variables too)."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def quoted(text: str) -> str:
    """Return text as the value of an override, without interpolation."""
    return QuotedString(escaped(text), Quote.single).with_quotes()


def compose_config(overrides: Sequence[str], values: Mapping[str, str]) -> Config:
    """Compose the config of a run outside of a Hydra application.

    Args:
        overrides: Overrides as on the command line.
        values: Values by dotted key, applied after the overrides; they need no quotes and are not interpolated.

    Raises:
        ConfigError: An override or the composed config is not valid.
    """
    check_overrides(overrides, config_groups())
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            composed = compose("config", overrides=list(overrides))
        for key, value in values.items():
            OmegaConf.update(composed, key, escaped(value))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(line.strip() for line in str(error).splitlines())) from error
    return config_of(composed)


def config_of(composed: DictConfig) -> Config:
    """Validate a config that Hydra has composed.

    Raises:
        ConfigError: It is not valid, a value is missing, or a value refers to a setting that does not exist.
    """
    try:
        job = OmegaConf.masked_copy(composed, [str(key) for key in composed if key not in _NOT_OF_A_RUN])
        raw: Any = OmegaConf.to_container(job, resolve=True)
        missing = sorted(str(key) for key in OmegaConf.missing_keys(job))
    except OmegaConfBaseException as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(f"{error.full_key or 'the config'}: {why}. Try: a value in place of ${{...}}") from error
    if missing:
        raise ConfigError(f"{missing[0]} is not set. Try: {typed_command(after=f'{missing[0]}=FILE')}")
    return Config.from_dict(raw)
