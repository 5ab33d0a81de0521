"""Parse a plain dictionary into the dataclasses of the schema, without type coercion; errors name the key, value and remedy."""

from __future__ import annotations

import dataclasses
import difflib
import re
import reprlib
import types
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from promcse_pl.config.fields import Setting, section_name, settings
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.paths import run_command

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 300
_LONGEST_NAME, _LONGEST_TEXT = 255, 4000
"""Maximum bytes of one part of a path, and of a text: no file system takes longer names."""
_QUOTES = re.compile(r"[\"'\\]")
_NOT_PATHS = ("model.prompts", "data.prompts")
"""Settings with text that is never part of a path."""
OTHER_NAMES = {
    "data.batch_size": ("train_batch_size", "per_device_train_batch_size", "bs"),
    "data.max_length": ("max_seq_length", "max_seq_len", "max_len"),
    "data.train": ("train_file", "train_path"),
    "loss.temperature": ("temp", "tau"),
    "model.path": ("model_name", "model_name_or_path", "encoder"),
    "model.pooling": ("pooler", "pooler_type"),
    "optim.clip_norm": ("max_grad_norm", "gradient_clip_val"),
    "optim.lr": ("learning_rate",),
    "optim.schedule": ("lr_scheduler", "lr_scheduler_type"),
    "optim.warmup": ("warmup_ratio", "warmup_steps"),
    "prompt.length": ("pre_seq_len", "num_virtual_tokens"),
    "tuning.alpha": ("lora_alpha",),
    "tuning.rank": ("lora_r", "lora_rank"),
    "trainer.devices": ("gpus", "num_gpus", "num_processes"),
    "trainer.epochs": ("num_epochs", "num_train_epochs", "max_epochs"),
    "trainer.eval_every": ("eval_steps", "val_check_interval"),
    "trainer.patience": ("early_stopping", "early_stopping_patience"),
    "trainer.precision": ("fp16", "bf16", "dtype"),
    "trainer.save_every": ("save_steps",),
    "trainer.log_every": ("logging_steps", "log_every_n_steps"),
}
"""Names of a setting in other trainers and in the official code."""
ABSENT = {
    "gradient_accumulation_steps": "data.batch_size is the full batch of a step; trainer.chunk_tokens limits its memory",
}
"""Settings of other trainers that have no counterpart, and the reason."""
REMOVED = {
    "loss.distillation_weight": 0.0,
    "loss.hardness": 0.0,
    "loss.mask_false_negatives": False,
    "loss.symmetric": False,
    "prompt.init": "random",
    "trainer.average": None,
}
"""Settings of earlier versions, and the value without effect, which the config.yaml of their runs contains."""


@dataclass(slots=True)
class Section:
    """Base class of the dataclasses of settings.

    Creating an instance checks ranges and combinations; `from_dict` also checks keys and types.
    """

    def __post_init__(self) -> None:
        schema: Any = type(self)
        for key, setting in settings(schema).items():
            section, _, name = key.rpartition(".")
            if setting.range and section == section_name(schema) and not setting.range.allows(getattr(self, name)):
                raise _refused(setting, getattr(self, name), describe_range(setting))
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Raise ConfigError for settings that exclude each other."""

    @classmethod
    def from_dict(cls, raw: object) -> Self:
        """Build an instance from a plain dictionary of settings; absent settings get their defaults.

        Raises:
            ConfigError: An unknown key, a missing required setting, a wrong type, a value out of range, or settings that exclude
                each other. The message names the key, the value, what is allowed and what to type.
        """
        built: Self = _build(cls, raw)
        return built

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `from_dict` gives an equal instance back."""
        return dataclasses.asdict(self)


def is_removed_without_effect(key: str, value: object) -> bool:
    """Return whether a key is a setting of an earlier version, with the value that had no effect."""
    return key in REMOVED and value == REMOVED[key]


def shown(value: object) -> str:
    """Return the repr of a value, shortened for messages."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python does not format integers of more than 4300 digits
        return f"a {type(value).__name__} of thousands of digits"


def _build(schema: Any, raw: object, known: Mapping[str, Setting] | None = None) -> Any:  # noqa: ANN401
    """Return an instance of a dataclass of settings; `known` are the settings of the outermost one."""
    section, known = section_name(schema), known or settings(schema)
    if not isinstance(raw, dict):
        raise ConfigError(f"{section or 'the config'} must hold settings, got {shown(raw)}")
    kinds, values = get_type_hints(schema), {}
    for name in [name for name in raw if name not in kinds]:
        key = f"{section}.{name if isinstance(name, str) else shown(name)}".lstrip(".")
        if not is_removed_without_effect(key, raw[name]):
            raise unknown_key(key, known)
    for name, kind in kinds.items():
        setting = known.get(f"{section}.{name}".lstrip("."))
        if setting is None:
            values[name] = _build(kind, raw.get(name, {}), known)
        elif name in raw:
            try:
                values[name] = _cast(kind, raw[name], setting.key)
            except TypeError:
                raise _refused(setting, raw[name], describe(kind)) from None
        elif setting.default is dataclasses.MISSING:
            raise ConfigError(f"{setting.key} is not set. It must be {describe(kind)}. Try: {_command(setting, None)}")
    return schema(**values)


def _cast(kind: Any, value: object, key: str) -> Any:  # noqa: ANN401
    """Return a value as a type, or raise TypeError. An integer counts as a float, and nothing else is converted."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for option in options:
            with suppress(TypeError):
                return _cast(option, value, key)
    elif origin is list and isinstance(value, list):
        return [_cast(options[0], entry, key) for entry in value]
    elif origin is dict and isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {_cast(str, name, key): _cast(options[1], entry, key) for name, entry in value.items()}
    elif origin is Literal and isinstance(value, str) and value in options:
        return value
    elif kind is float and type(value) in (int, float):
        with suppress(OverflowError):
            return float(value)  # type: ignore[arg-type]
    elif kind is str and isinstance(value, str):
        return _checked_text(value, key)
    elif kind is type(value):
        return value
    raise TypeError


def _checked_text(value: str, key: str) -> str:
    """Return a text, or raise ConfigError if it cannot be a file name or be written to a file."""
    try:
        longest = max(len(part.encode()) for part in value.split("/"))
    except UnicodeEncodeError:
        raise ConfigError(f"{key} holds a lone surrogate, which is not text: {shown(value)}") from None
    most, slashes = (
        (_LONGEST_TEXT, "") if key in _NOT_PATHS else (_LONGEST_NAME, f", {_LONGEST_NAME} between two slashes,")
    )
    if "\0" in value or longest > most or len(value.encode()) > _LONGEST_TEXT:
        raise ConfigError(
            f"{key} must be text of at most {_LONGEST_TEXT} bytes{slashes} and without NUL characters, got {len(value)} "
            f"characters: {shown(value)}. Try: a shorter text"
        )
    return value


def describe(kind: Any) -> str:  # noqa: ANN401
    """Return a type in words."""
    origin, options = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(options)}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, options))
    if origin is list:
        return f"a list (like [a,b]) whose entries are {describe(options[0])}"
    if origin is dict:
        return f'a dictionary (like {{query: "query: "}}) whose values are {describe(options[1])}'
    return {int: "an integer", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}[kind]


def describe_range(setting: Setting) -> str:
    """Return the range of a number in words, and its other allowed values."""
    choices = [choice for option in get_args(setting.kind) for choice in get_args(option)]
    null = ["or null"] if types.NoneType in get_args(setting.kind) else []
    return ", ".join([str(setting.range), *choices, *null])


def _refused(setting: Setting, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{setting.key} must be {allowed}, got {shown(value)}. Try: {_command(setting, value)}")


def _command(setting: Setting, value: object) -> str:
    """Return the command that sets a valid value, as close as possible to a refused one."""
    key, kind = setting.key, setting.kind
    if get_origin(kind) in (Union, types.UnionType):
        kind = get_args(kind)[0]
    if get_origin(kind) is list:
        entries = value if isinstance(value, list) and value else [value]
        typed = f"'{key}=[{','.join(_near(get_args(kind)[0], entry) for entry in entries[:5])}]'"
    elif get_origin(kind) is dict:
        typed = f"'{key}={_near_dict(value)}'"
    elif kind is str:
        typed = f"'{key}={_near(kind, value)}'"
    elif get_origin(kind) is Literal:
        typed = f"{key}={_near(kind, value)}"
    else:
        example = setting.range.example if setting.range else None
        example = setting.default if example is None else example
        typed = f"{key}={example:g}" if type(example) in (int, float) else f"{key}={str(example or True).lower()}"
    return f"{run_command()} {'-m ' if key.startswith('sweep.') else ''}{typed}"


def _near(kind: Any, value: object) -> str:  # noqa: ANN401
    """Return a choice or text close to a value; Hydra takes a number for text only in quotes."""
    if get_origin(kind) is Literal:
        return str((difflib.get_close_matches(shown(value)[:60].strip("'"), get_args(kind), n=1) or get_args(kind))[0])
    if isinstance(value, str):
        return value[:60]
    return f'"{shown(value).lower()}"' if isinstance(value, bool | int | float) else "TEXT"


def _near_dict(value: object) -> str:
    """Return a valid dictionary close to a value; Hydra does not allow quoted keys."""
    entries = [*value.items()][:5] if isinstance(value, dict) and value else [("NAME", value)]
    near = []
    for name, entry in entries:
        valid = name if isinstance(name, str) and re.fullmatch(r"[a-zA-Z][\w.-]*", name) else "NAME"
        text = entry[:60] if isinstance(entry, str) else _near(str, entry)
        near.append(f'{valid}: "{_QUOTES.sub("", text)}"')
    return f"{{{', '.join(near)}}}"


def unknown_key(key: str, known: Collection[str]) -> ConfigError:
    """Return the error for a dotted key that is not a setting.

    Args:
        key: The unknown key.
        known: Dotted keys of all settings.
    """
    key = key[:100]
    section, _, name = key.rpartition(".")
    if key in known:  # in a file or dictionary: on the command line it is a setting
        return ConfigError(f"{key} must be written as a section. Try: {section}: {{{name}: VALUE}}")
    if key in REMOVED:
        return ConfigError(
            f"{key} was removed, because it gained less than 0.1 on the dev set (docs/decisions.md). Try: leave it out"
        )
    if name in ABSENT:
        return ConfigError(f"{key} is not a setting: {ABSENT[name]}. Try: leave it out")
    siblings = [other for other in known if section and other.rpartition(".")[0] == section]
    near = _nearest(key, known, siblings)
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    if siblings:
        return ConfigError(f"{key} is not a setting.{meant} Allowed under {section}: {', '.join(siblings)}")
    top = sorted({other.partition(".")[0] for other in known})
    return ConfigError(f"{key} is not a setting.{meant} Allowed: {', '.join(top)}")


def _nearest(key: str, known: Collection[str], siblings: Collection[str]) -> list[str]:
    """Return the settings closest to an unknown key: first by name without the section, then by the whole key."""
    name = key.rpartition(".")[2]
    names = {other: other.rpartition(".")[2] for other in known}
    if same := [other for other in known if names[other] == name]:  # without its section, or in another one
        return same[:3]
    if renamed := [other for other, others in OTHER_NAMES.items() if name.lower().replace("-", "_") in others]:
        return renamed
    for candidates in (siblings, known):
        if close := difflib.get_close_matches(name, [names[other] for other in candidates], n=2, cutoff=0.7):
            return [other for other in candidates if names[other] in close][:3]
    return difflib.get_close_matches(key, known, n=3, cutoff=0.6)
