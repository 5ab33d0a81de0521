"""The Hydra sweeper: turns overrides into the configs of jobs. Hydra finds plugins only in the package hydra_plugins."""

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
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from promcse_pl.config import Config, SweepConfig
from promcse_pl.runs.compose import config_of, hydra_errors, replace_prompts
from promcse_pl.sweeps.execute import run_sweep
from promcse_pl.sweeps.plan import SweepJob
from promcse_pl.sweeps.search import Interval, run_search
from promcse_pl.training.distributed import refuse_sweep
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.exit_codes import exit_code

# plain values: workers of other launchers unpickle them without importing this module
NODE = {"_target_": "hydra_plugins.promcse_sweeper.PromcseSweeper", "params": None}
ConfigStore.instance().store(group="hydra/sweeper", name="promcse", node=NODE, provider="promcse_pl")


class PromcseSweeper(Sweeper):
    """Passes the jobs of a command line to `promcse_pl.sweeps`, which plans, starts and records them.

    Args:
        params: Overrides of the sweep in a file of conf/sweep; those of the command line win.
    """

    hydra_context: HydraContext
    config: DictConfig

    def __init__(self, params: dict[str, Any] | None = None) -> None:
        self.params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the objects that Hydra passes before `sweep`."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> None:
        """Run the sweep; exit with its code unless it is 0."""

        def sweep() -> int:
            with hydra_errors():
                return self._sweep(arguments)

        if code := exit_code(sweep):
            sys.exit(code)

    def _sweep(self, arguments: list[str]) -> int:
        refuse_sweep()
        raw: Any = OmegaConf.to_container(self.config.sweep, resolve=True)
        settings = SweepConfig.from_dict(raw)
        typed: Any = OmegaConf.to_container(self.config.hydra.overrides.hydra, resolve=False)
        check_effects([*typed, *arguments], settings)
        folder = Path(str(self.config.hydra.sweep.dir))
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        lines = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        overrides = [entry for entry in parser.parse_overrides(lines) if not entry.key_or_group.startswith("sweep.")]
        space = {override.get_key_element(): _values(override) for override in overrides}
        launcher = str(self.config.hydra.runtime.choices["hydra/launcher"])
        check_launcher(settings.engine, launcher)
        launch = None if launcher == "basic" else self._launch
        if settings.trials is not None:
            return run_search(folder, arguments, space, settings, self._compose, launch)
        choices = []
        for key, values in space.items():
            if isinstance(values, Interval):
                raise ConfigError(
                    f"{key} has a range, which only a search takes. Try: sweep=optuna, or values with commas"
                )
            choices.append([f"{key}={value}" for value in values])
        jobs = [list(job) for job in itertools.product(*choices)]
        return run_sweep(folder, arguments, jobs, settings, self._compose, launch)

    def _compose(self, overrides: Sequence[str]) -> Config:
        with hydra_errors():
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, replace_prompts(overrides))
        return config_of(composed)

    def _launch(self, jobs: Sequence[SweepJob]) -> None:
        """Pass jobs to the Hydra launcher that the user chose; its workers call `promcse_pl.cli.run.run_composed`."""
        with hydra_errors():
            launcher = Plugins.instance().instantiate_launcher(
                hydra_context=self.hydra_context, task_function=self.task_function, config=self.config
            )
        launcher.launch([[*job.overrides, f"hydra.sweep.subdir={job.folder}"] for job in jobs], initial_job_idx=0)


def check_effects(overrides: Sequence[str], settings: SweepConfig) -> None:
    """Check that a sweep has no settings of single runs, and only a search those of searches: they would have no effect.

    Raises:
        ConfigError: An override has no effect.
    """
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key == "hydra.run.dir":
            raise ConfigError(f"{override} has no effect on a sweep. Try: hydra.sweep.dir={value}")
        if key in ("sweep.prune", "sweep.seed") and settings.trials is None and settings.resume is None:
            raise ConfigError(f"{override} has no effect without a search. Try: sweep=optuna, or leave it out")


def check_launcher(engine: str, launcher: str) -> None:
    """Check that the choice of `hydra/launcher` fits `sweep.engine`.

    Raises:
        ConfigError: The launcher does not fit.
    """
    if engine == "submitit" and not launcher.startswith("submitit"):
        raise ConfigError(
            f"sweep.engine=submitit needs hydra/launcher=submitit_slurm, got {launcher}. Try: sweep.engine=submitit on the "
            "command line, without hydra/launcher"
        )
    if engine == "ray" and launcher != "basic":
        raise ConfigError(
            f"hydra/launcher={launcher} has no effect with sweep.engine=ray. Try: sweep.engine=ray without hydra/launcher, or "
            f"sweep.engine=local hydra/launcher={launcher}"
        )


def _values(override: Override) -> list[str] | Interval:
    """Return the values of an override as text, or the interval to search."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if override.is_discrete_sweep():
        return list(override.sweep_string_iterator())
    value = override.value()
    assert isinstance(value, IntervalSweep)
    assert value.start is not None
    assert value.end is not None
    return Interval(value.start, value.end, log="log" in value.tags)
