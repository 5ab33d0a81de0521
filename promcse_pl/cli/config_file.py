"""`promcse train --config FILE`: the settings of a YAML file as overrides of conf/.

The file may be untrusted: it can set the settings of runs and sweeps, not those of Hydra, and its values are plain text without
interpolation.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from promcse_pl.config import Config, check_overrides, flat_settings
from promcse_pl.config.fields import settings as every_setting
from promcse_pl.config.parsing import is_removed_without_effect
from promcse_pl.run_folder import read_yaml, split_resolved
from promcse_pl.runs.compose import config_groups, quoted
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.paths import expand
from promcse_pl.utils.streams import visible


def file_overrides(file: str, typed: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return the settings of a YAML file as overrides, without those that the command line overrides.

    A top-level name such as `model: roberta-large` chooses from that group; everything else sets a value. A group chosen on the
    command line replaces the section of its name, and all that its file in conf/ sets or chooses. The data set that a model
    chooses is only a default and replaces nothing.

    Args:
        file: Any part of a config, for example RUN/config.yaml.
        typed: Overrides of the command line.
        folders: conf/ and a folder of the user's, whose subfolders are the groups.

    Raises:
        ConfigError: The file cannot be read, or does not contain settings.
    """
    read = flat_settings(_read(expand(file)))
    # config.yaml of an earlier version has removed settings without effect
    settings = {key: value for key, value in read.items() if not is_removed_without_effect(key, value)}
    groups = config_groups(folders)
    for key in settings:
        if not re.fullmatch(r"\w+(\.\w+)*", key) or key.split(".")[0] == "hydra":
            raise ConfigError(
                f"{file}: {visible(key[:100])} is not a setting of a run or sweep. Try: it on the command line"
            )
        if "." not in key and key not in every_setting(Config):
            _check_choice(file, key, settings[key], groups)
    for override in typed:
        key, _, value = override.lstrip("+~").partition("=")
        settings.pop(key, None)
        if key and any((folder / key).is_dir() for folder in folders):
            replaced = {name for choice in value.split(",") for name in _set_by(key, choice, folders)}
            settings = {
                setting: entry
                for setting, entry in settings.items()
                if setting not in replaced and setting.split(".")[0] not in replaced
            }
    return [f"{key}={_value(key, value)}" for key, value in settings.items()]


def _set_by(group: str, choice: str, folders: Sequence[Path]) -> Iterator[str]:
    """Yield the section of a group and the settings in a choice's file and in the files of its `defaults`."""
    yield group
    for path in (folder / group / f"{choice}.yaml" for folder in folders):
        tree = read_yaml(path) if path.is_file() else None
        if not isinstance(tree, dict):
            continue
        yield from flat_settings(tree)
        for entry in tree.get("defaults") or ():  # CHOICE of this group, or {"override /GROUP": CHOICE}
            for key, other in (entry if isinstance(entry, dict) else {f"override /{group}": entry}).items():
                selected = str(key).removeprefix("override /")
                if selected != key and (group, selected) != ("model", "data"):
                    yield from _set_by(selected, str(other), folders)


def _check_choice(file: str, group: str, value: object, groups: Mapping[str, Sequence[str]]) -> None:
    """Check that a file selects only choices of conf/ and the user's folder: Hydra would also load a path to any other file."""
    choices = groups.get(group, [])
    for choice in value if isinstance(value, list) else [value]:
        check_overrides([f"{group}={choice}"], groups)
        if choice not in choices:
            raise ConfigError(
                f"{file}: {group}={visible(str(choice)[:100])} is not a choice. Allowed: {', '.join(choices) or 'none'}"
            )


def _is_word(key: str, value: object) -> bool:
    """Return whether a value is the choice of a group, or text for a setting that takes none: YAML reads 1e-3 as text."""
    if not isinstance(value, str) or not re.fullmatch(r"[-+\w./]+", value):
        return False
    section, _, name = key.partition(".")
    schema = get_type_hints(Config).get(section)
    hint = get_type_hints(schema).get(name) if dataclasses.is_dataclass(schema) else None
    return not name or (hint is not None and "str" not in str(hint))


def _read(path: Path) -> dict[str, Any]:
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must contain settings such as seed: 1, got {str(tree)[:80]}")
    typed, _ = split_resolved(tree)
    return {str(key): value for key, value in typed.items() if value is not None}


def _value(key: str, value: object) -> str:
    if isinstance(value, Mapping):  # the value of a dictionary setting; sections have been flattened before
        return _dictionary(key, value)
    return str(value) if _is_word(key, value) else _literal(key, value)


def _literal(key: str, value: object) -> str:
    """Return a value in the syntax of Hydra's overrides."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        return f"[{','.join(_literal(key, entry) for entry in value)}]"
    if value is None or isinstance(value, int | float):
        return json.dumps(value)
    raise ConfigError(
        f"{key} must be text, a number, true, false, null or a list of these, got {visible(str(value)[:80])}"
    )


def _dictionary(key: str, value: Mapping[str, object]) -> str:
    """Return a dictionary in the syntax of Hydra's overrides, which does not allow quoted keys."""
    return f"{{{','.join(f'{_escaped(str(name))}:{_literal(key, text)}' for name, text in value.items())}}}"


def _escaped(name: str) -> str:
    return re.sub(r"[\\()\[\]{}:=,\s]", r"\\\g<0>", name)
