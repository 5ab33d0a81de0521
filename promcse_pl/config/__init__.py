"""The settings of a run and of a sweep: schema, defaults, ranges and messages. May import `utils` only."""

from promcse_pl.config.overrides import (
    check_overrides,
    decides,
    flat_settings,
    is_dictionary,
    is_integer,
    path_advice,
    resumed_with,
    unquoted_dictionary,
)
from promcse_pl.config.schema import (
    DATA_SUITES,
    SUITES,
    WIDTH,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    SweepConfig,
    TrackingConfig,
    TrainerConfig,
    check_tasks,
)

__all__ = [
    "DATA_SUITES",
    "SUITES",
    "WIDTH",
    "Config",
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "SweepConfig",
    "TrackingConfig",
    "TrainerConfig",
    "check_overrides",
    "check_tasks",
    "decides",
    "flat_settings",
    "is_dictionary",
    "is_integer",
    "path_advice",
    "resumed_with",
    "unquoted_dictionary",
]
