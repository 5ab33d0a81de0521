"""`promcse train --config FILE`: the settings of a YAML file as overrides of conf/.

The file may be untrusted: it can set the settings of runs and sweeps, not those of Hydra, and its values are plain text without
interpolation.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hydra.core.override_parser.types import Quote, QuotedString

from promcse_pl.config import Config, flat_settings
from promcse_pl.run_folder import split_resolved
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.paths import expand, require_regular_file
from promcse_pl.utils.streams import visible


def file_overrides(file: str, typed: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return the settings of a YAML file as overrides, without those that the command line overrides.

    A top-level name such as `model: roberta-large` chooses from that group; everything else sets a value. A group chosen on the
    command line replaces the section of its name, and all that its file in conf/ sets.

    Args:
        file: Any part of a config, for example RUN/config.yaml.
        typed: Overrides of the command line.
        folders: conf/ and a folder of the user's, whose subfolders are the groups.

    Raises:
        ConfigError: The file cannot be read, or does not contain settings.
    """
    settings = flat_settings(_read(expand(file)))
    for key in settings:
        if not re.fullmatch(r"\w+(\.\w+)*", key) or key.split(".")[0] == "hydra":
            raise ConfigError(
                f"{file}: {visible(key[:100])} is not a setting of a run or sweep. Try: it on the command line"
            )
    for override in typed:
        key, _, value = override.lstrip("+~").partition("=")
        settings.pop(key, None)
        groups = [folder / key for folder in folders if key and (folder / key).is_dir()]
        files = [
            path for group in groups for choice in value.split(",") if (path := group / f"{choice}.yaml").is_file()
        ]
        replaced = {setting for path in files for setting in flat_settings(_read(path))}
        if groups:
            replaced |= {setting for setting in settings if setting.startswith(f"{key}.")}
        settings = {setting: entry for setting, entry in settings.items() if setting not in replaced}
    return [f"{key}={value if _is_word(key, value) else _literal(value)}" for key, value in settings.items()]


def _is_word(key: str, value: object) -> bool:
    """Return whether a value is the choice of a group, or text for a setting that takes none: YAML reads 1e-3 as text."""
    if not isinstance(value, str) or not re.fullmatch(r"[-+\w.]+", value):
        return False
    section, _, name = key.partition(".")
    schema = get_type_hints(Config).get(section)
    hint = get_type_hints(schema).get(name) if dataclasses.is_dataclass(schema) else None
    return not name or (hint is not None and "str" not in str(hint))


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(require_regular_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = getattr(error, "strerror", None) or str(error)[:1000]
        raise ConfigError(f"cannot read the config {path}: {why}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must contain settings such as seed: 1, got {str(tree)[:80]}")
    typed, _ = split_resolved(tree)
    return {str(key): value for key, value in typed.items() if value is not None}


def _literal(value: object) -> str:
    """Return a value in the syntax of Hydra's overrides."""
    if isinstance(value, str):
        plain = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # ${ would be an interpolation, of environment variables too
        return QuotedString(plain, Quote.single).with_quotes()
    if isinstance(value, list):
        return f"[{','.join(map(_literal, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{_literal(entry)}' for key, entry in value.items())}}}"
    return json.dumps(value)
