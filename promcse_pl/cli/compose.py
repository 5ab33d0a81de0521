"""From what Hydra composed to the config of a job."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from promcse_pl.config import Config
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.paths import run_command

TYPED: ContextVar[Sequence[str]] = ContextVar("TYPED", default=())
"""Arguments of `promcse train` as typed, for the commands in messages."""
NOT_OF_A_JOB = ("hydra", "sweep")
"""Parts of a composed config that no job reads."""


def typed_command(before: str | None = None, after: str | None = None) -> str:
    """Return the command as typed, with one more argument before or after the others."""
    arguments = [argument for argument in (before, *TYPED.get(), after) if argument is not None]
    return f"{run_command()} {shlex.join(arguments)}"


def config_of(composed: DictConfig) -> Config:
    """Return the valid config of what Hydra composed.

    Raises:
        ConfigError: It is not valid, a value is missing, or an interpolation refers to a setting that does not exist.
    """
    try:
        job = OmegaConf.masked_copy(composed, [str(key) for key in composed if key not in NOT_OF_A_JOB])
        raw: Any = OmegaConf.to_container(job, resolve=True)
        missing = sorted(str(key) for key in OmegaConf.missing_keys(job))
    except OmegaConfBaseException as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(f"{error.full_key or 'the config'}: {why}. Try: a value in place of ${{...}}") from error
    if missing:
        raise ConfigError(f"{missing[0]} is not set. Try: {typed_command(after=f'{missing[0]}=FILE')}")
    return Config.from_dict(raw)
