"""Compose the config of a run from conf/ with Hydra; shared by the command line and the Python API."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from promcse_pl.config import Config, check_overrides, path_advice
from promcse_pl.run_folder import read_yaml
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.paths import run_command

CONF = Path(__file__).parents[1] / "conf"
TYPED: ContextVar[Sequence[str]] = ContextVar("TYPED", default=())
"""Arguments of `promcse train` as typed, for the commands in messages."""
_NOT_OF_A_RUN = ("hydra", "sweep")
"""Sections of a composed config that are not settings of a run."""


def config_groups(folders: Sequence[Path] = (CONF,)) -> dict[str, list[str]]:
    """Return the groups of configuration folders and the choices of each; those in a subfolder are FOLDER/CHOICE."""
    groups: dict[str, list[str]] = {}
    for path in sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()):
        names = (file.relative_to(path).with_suffix("").as_posix() for file in path.rglob("[!_]*.yaml"))
        groups.setdefault(path.name, []).extend(sorted(names))
    return groups


def typed_command(*more: str, sweep: bool = False) -> str:
    """Return the command as typed, with more arguments, or as a sweep."""
    typed = list(TYPED.get())
    if sweep:
        other_modes = ("--multirun", "--run", "--cfg=", "--resolve", "--info=", "--shell-completion")
        typed = ["-m", *(argument for argument in typed if not argument.startswith(other_modes))]
    return f"{run_command()} {shlex.join([*typed, *more])}"


def escaped(text: str) -> str:
    """Return text for a config in which `${` is not an interpolation (of environment variables too)."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def quoted(text: str) -> str:
    """Return text as the value of an override, without interpolation."""
    return QuotedString(escaped(text), Quote.single).with_quotes()


def replace_prompts(overrides: Sequence[str]) -> list[str]:
    """Insert `model.prompts=null` before `model.prompts={...}`: Hydra merges dictionaries, and the override must replace them."""
    return [
        line
        for override in overrides
        for line in (["model.prompts=null", override] if override.startswith("model.prompts={") else [override])
    ]


def compose_config(overrides: Sequence[str], values: Mapping[str, str]) -> Config:
    """Compose the config of a run outside of a Hydra application.

    Args:
        overrides: Overrides as on the command line.
        values: Values by dotted key, applied after the overrides; they need no quotes and are not interpolated.

    Raises:
        ConfigError: An override or the composed config is not valid.
    """
    check_overrides(overrides, config_groups())
    with hydra_errors():
        with _initialized():
            composed = compose("config", overrides=replace_prompts(overrides))
        for key, value in values.items():
            OmegaConf.update(composed, key, escaped(value))
    return config_of(composed)


def preset_section(group: str, name: str, section: str) -> dict[str, Any]:
    """Return a section of a file in conf/, or of the file that it is based on.

    Args:
        group: Folder in conf/: `model`, `recipe` or `recipe/tuning`.
        name: File in it, without suffix.
        section: Section of the settings.
    """
    tree = read_yaml(CONF / group / f"{name}.yaml")
    found: dict[str, Any] = tree[section] if section in tree else preset_section(group, tree["defaults"][0], section)
    return found


def recipe_note(config: Config, model: str) -> str | None:
    """Return a note if the learning rate comes from the recipe of another encoder; otherwise None.

    Args:
        config: The composed config.
        model: Choice of the group model, which selects the recipe.
    """
    preset = CONF / "model" / f"{model}.yaml"
    encoder = preset_section("model", model, "model")["path"] if preset.is_file() else config.model.path
    if encoder == config.model.path:
        return None
    name = f"{'unsupervised' if config.data.kind == 'sentences' else 'supervised'}/{model}"
    for group, recipe in (("recipe", name), ("recipe/tuning", f"full/{name}")):
        if not (CONF / group / f"{recipe}.yaml").is_file():
            continue
        lr = preset_section(group, recipe, "optim")["lr"]
        if lr == config.optim.lr:
            origin = f"the recipe {recipe} for {encoder}"
            return f"optim.lr={lr:g} comes from {origin}; it is not tuned for {config.model.path}"
    return None


@contextmanager
def _initialized() -> Iterator[None]:
    """Initialise Hydra for conf/; a Hydra application that trains keeps its own Hydra afterwards."""
    application, version = GlobalHydra.instance().hydra, VersionBase.instance()
    version_base = version.version_base
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            yield
    finally:
        GlobalHydra.instance().hydra = application
        version.version_base = version_base


@contextmanager
def hydra_errors() -> Iterator[None]:
    """Raise what Hydra and OmegaConf refuse as a ConfigError of one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(refusal(error)) from error


def refusal(error: Exception) -> str:
    """Return what Hydra or OmegaConf refused, without the lines that do not help a user."""
    group, _, choice = (getattr(error, "missing_cfg_file", None) or "").partition("/")
    if advice := path_advice(group, choice):
        return f"{group}={choice} is not a choice. {advice}"
    # if Hydra rewords these lines, the message is only longer
    noise = ("See https:", "full_key:", "object_type=", "Config search path:", "provider=")
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(noise))


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
        raise ConfigError(f"{missing[0]} is not set. Try: {typed_command(f'{missing[0]}=FILE')}")
    return Config.from_dict(raw)
