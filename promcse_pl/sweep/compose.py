"""From what Hydra composed to the config of a job."""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf

from promcse_pl.config import Config
from promcse_pl.errors import ConfigError

NOT_OF_A_JOB = ("hydra", "sweep")
"""Parts of a composed config that no job reads."""


def config_of(composed: DictConfig) -> Config:
    """Return the valid config of what Hydra composed.

    Raises:
        ConfigError: It is not valid, or a value is missing.
    """
    job = OmegaConf.masked_copy(composed, [key for key in composed if key not in NOT_OF_A_JOB])
    missing = sorted(str(key) for key in OmegaConf.missing_keys(job))
    if missing:
        raise ConfigError(f"{missing[0]} is not set. Try: python run.py {' '.join(sys.argv[1:])} {missing[0]}=FILE")
    raw: Any = OmegaConf.to_container(job, resolve=True)
    return Config.from_dict(raw)
