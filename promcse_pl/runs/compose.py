"""From what Hydra composed to the config of a job."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from promcse_pl.config import Config
from promcse_pl.utils.errors import ConfigError

NOT_OF_A_JOB = ("hydra", "sweep")
"""Parts of a composed config that no job reads."""


def config_of(composed: DictConfig) -> Config:
    """Return the valid config of what Hydra composed.

    Raises:
        ConfigError: It is not valid, a value is missing, or one refers to a setting that is not there.
    """
    try:
        job = OmegaConf.masked_copy(composed, [str(key) for key in composed if key not in NOT_OF_A_JOB])
        raw: Any = OmegaConf.to_container(job, resolve=True)
        missing = sorted(str(key) for key in OmegaConf.missing_keys(job))
    except OmegaConfBaseException as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(f"{error.full_key or 'the config'}: {why}. Try: a value in place of ${{...}}") from error
    if missing:
        raise ConfigError(
            f"{missing[0]} is not set. Try: python run.py {shlex.join([*sys.argv[1:], f'{missing[0]}=FILE'])}"
        )
    return Config.from_dict(raw)
