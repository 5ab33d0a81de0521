"""Hydra's side of a sweep: overrides in, composed configs out. Hydra accepts plugins only from the package hydra_plugins."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from promcse_pl.config import Config, SweepConfig
from promcse_pl.runs.compose import config_of
from promcse_pl.sweeps.execute import run_sweep
from promcse_pl.sweeps.plan import SweepJob
from promcse_pl.sweeps.search import Interval, run_search
from promcse_pl.training.distributed import refuse_sweep
from promcse_pl.utils.errors import ConfigError, PromcseError, write_error

# plain values: workers of other launchers unpickle them without importing this module
NODE = {"_target_": "hydra_plugins.promcse_sweeper.PromcseSweeper", "params": None}
ConfigStore.instance().store(group="hydra/sweeper", name="promcse", node=NODE, provider="promcse_pl")


class PromcseSweeper(Sweeper):
    """Hands the jobs of a command line to `promcse_pl.sweeps`, which plans, starts and records them.

    Args:
        params: The sweep's overrides of a file in conf/sweep; the command line wins over them.
    """

    hydra_context: HydraContext
    config: DictConfig

    def __init__(self, params: dict[str, Any] | None = None) -> None:
        self.params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra knows."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> None:
        """Run the sweep, and leave with its exit code unless all went well."""
        try:
            code = self._sweep(arguments)
        except PromcseError as error:
            write_error(error)
            code = 2
        if code:
            sys.exit(code)

    def _sweep(self, arguments: list[str]) -> int:
        refuse_sweep()
        raw: Any = OmegaConf.to_container(self.config.sweep, resolve=True)
        settings = SweepConfig.from_dict(raw)
        folder = Path(str(self.config.hydra.sweep.dir))
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        lines = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        overrides = [one for one in parser.parse_overrides(lines) if not one.key_or_group.startswith("sweep.")]
        space = {one.get_key_element(): _values(one) for one in overrides}
        launcher = str(self.config.hydra.runtime.choices["hydra/launcher"])
        launch = None if launcher == "basic" else self._launch
        if settings.trials is not None:
            return run_search(folder, arguments, space, settings, self._compose, launch)
        choices = []
        for key, values in space.items():
            if isinstance(values, Interval):
                raise ConfigError(f"{key} is given a range to search in. Try: sweep=optuna, or values with commas")
            choices.append([f"{key}={value}" for value in values])
        jobs = [list(job) for job in itertools.product(*choices)]
        return run_sweep(folder, arguments, jobs, settings, self._compose, launch)

    def _compose(self, overrides: Sequence[str]) -> Config:
        try:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(" ".join(line.strip() for line in str(error).splitlines())) from error
        return config_of(composed)

    def _launch(self, jobs: Sequence[SweepJob]) -> None:
        """Give jobs to the launcher that the user chose; each of its workers calls run.py's main."""
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self.hydra_context, task_function=self.task_function, config=self.config
        )
        launcher.launch([[*job.overrides, f"hydra.sweep.subdir={job.folder}"] for job in jobs], initial_job_idx=0)


def _values(one: Override) -> list[str] | Interval:
    """Return an override's values as text, or the range to search in."""
    if not one.is_sweep_override():
        return [one.get_value_element_as_str()]
    if one.is_discrete_sweep():
        return list(one.sweep_string_iterator())
    value = one.value()
    assert isinstance(value, IntervalSweep)
    assert value.start is not None
    assert value.end is not None
    return Interval(value.start, value.end, log="log" in value.tags)
