"""Settings by dotted key: what a key affects, command-line overrides, and the overrides of a resumed run."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from promcse_pl.config.fields import Decides, settings
from promcse_pl.config.parsing import is_removed_without_effect, shown, unknown_key
from promcse_pl.config.schema import Config, SweepConfig
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.paths import SUFFIXES, file_suffix, run_command


def decides(key: str) -> Decides:
    """Return what a dotted key of a job's config affects; keys that are not in the schema count as training."""
    setting = settings(Config).get(key)
    return setting.decides if setting else "training"


def is_integer(key: str) -> bool:
    """Return whether a dotted key of a job's config is a setting that holds an integer (or null, or a word such as `auto`)."""
    kinds = {kind for kind in _kinds(key) if get_origin(kind) is not Literal}
    return kinds - {types.NoneType} == {int}


def is_list(key: str) -> bool:
    """Return whether a dotted key of a job's config is a setting that holds a list."""
    return any(get_origin(kind) is list for kind in _kinds(key))


def _kinds(key: str) -> tuple[Any, ...]:
    """Return the types that a setting allows; empty for an unknown key."""
    setting = settings(Config).get(key)
    if setting is None:
        return ()
    is_union = get_origin(setting.kind) in (Union, types.UnionType)
    return get_args(setting.kind) if is_union else (setting.kind,)


@cache
def _dictionaries() -> set[str]:
    """Return the settings that hold a dictionary."""
    return {key for key in settings(Config) if any(get_origin(kind) is dict for kind in _kinds(key))}


def is_dictionary(key: str) -> bool:
    """Return whether a dotted key of a job's config is a setting that holds a dictionary."""
    return key in _dictionaries()


def unquoted_dictionary(argument: str) -> ConfigError:
    """Return the error for an override with a dictionary that the shell has split or stripped of its quotes."""
    key = argument.partition("=")[0]
    example = f'{key}={{query: "query: "}}'
    return ConfigError(
        f"{argument[:200]} is not a dictionary: put the whole setting in single quotes. Try: {run_command()} '{example}'"
    )


def flat_settings(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree of settings by dotted key; a dictionary that is the value of a setting stays one."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        is_section = isinstance(value, Mapping) and f"{prefix}{key}" not in _dictionaries()
        flat |= flat_settings(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return flat


def comparable_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run, by dotted key, so that they can be compared with those of other versions.

    Settings that an earlier version lacks get their defaults, and removed ones without effect are left out.
    """
    defaults = {key: setting.default for key, setting in settings(Config).items() if setting.default is not MISSING}
    return defaults | {key: value for key, value in stored.items() if not is_removed_without_effect(key, value)}


def resumed_with(config: Config, overrides: Sequence[str]) -> Config:
    """Return the config of a resumed run with overrides of its execution settings.

    Args:
        config: Config of the run.
        overrides: `key=value`, the value as YAML.

    Raises:
        ConfigError: An unknown key, a key that affects training or scores, or an invalid value.
    """
    check_overrides(overrides, {})
    tree = config.to_dict()
    changeable = [key for key, setting in settings(Config).items() if setting.decides == "execution"]
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or key not in changeable:
            raise ConfigError(
                f"{override[:200]} cannot be changed when resuming, since it may affect training or scores. Allowed: "
                f"{', '.join(changeable)}. Try: leave {key} out, or start a new run"
            )
        try:
            value = yaml.safe_load(text) if text.strip() else ""
        except (ValueError, RecursionError, yaml.YAMLError):
            raise ConfigError(f"the value of {key} cannot be read: {shown(text)}. Try: {key}='\"TEXT\"'") from None
        section, _, name = key.rpartition(".")
        tree[section][name] = value
    return Config.from_dict(tree)


def check_overrides(arguments: Sequence[str], groups: Mapping[str, Sequence[str]]) -> None:
    """Check that each `key=value` argument names a setting, or a group of conf/ and a choice of it, before Hydra composes.

    Args:
        arguments: The command line.
        groups: Groups of conf/, and the choices of each.

    Raises:
        ConfigError: With the nearest keys or choices.
    """
    known = {**settings(Config), **settings(SweepConfig)}
    sections = {key.partition(".")[0] for key in known}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if re.search(r"\d{1000}", value):  # Hydra's parser fails on it
            raise ConfigError(f"{key[:100]} is a number of over a thousand digits. Try: {run_command('--help')}")
        if argument.startswith("-") or not equals:
            continue
        key = key.lstrip("+~").partition("@")[0]
        if is_dictionary(key) and value.startswith("{") and not value.rstrip().endswith("}"):
            raise unquoted_dictionary(argument)
        section = re.split("[./]", key, maxsplit=1)[0]
        if groups.get(key):
            _check_choice(key, value, groups[key])
        elif key not in known and key not in sections and section != "hydra" and ("." in key or section not in groups):
            raise unknown_key(key, known)


def path_advice(group: str, value: str) -> str | None:
    """Return how to train with a file or an encoder that was given as a choice of conf/; None for other values."""
    if group == "data" and (suffix := file_suffix(Path(value))) in SUFFIXES:
        kind = "sentences" if suffix == ".txt" else "triplets"
        return f"Try: {run_command(f'data={kind}', f'data.train={value}')}"
    if group == "model" and "/" in value:
        return f"Try: {run_command(f'model.path={value}')}"
    return None


def _check_choice(group: str, value: str, choices: Sequence[str]) -> None:
    """Check one choice, or those of a sweep, of a group of conf/; Hydra's own syntax is left to Hydra."""
    # a slash is part of a choice, or of a path or hub id, for which Hydra's refusal has advice
    syntax = r"[\w./-]+" if any("/" in choice for choice in choices) else r"[\w.-]+"
    for choice in value.split(","):
        name = choice.strip().removesuffix(".yaml")[:100]
        if re.fullmatch(syntax, name) and name not in (*choices, "null"):
            if advice := path_advice(group, name):
                raise ConfigError(f"{group}={name} is not a choice. {advice}")
            near = difflib.get_close_matches(name, choices, n=3)
            meant = f" Did you mean {' or '.join(f'{group}={one}' for one in near)}?" if near else ""
            raise ConfigError(f"{group}={name} is not a choice.{meant} Allowed: {', '.join(choices)}")
