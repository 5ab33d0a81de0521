"""Metadata of a setting that the schema declares in `Annotated`: its range, and what it affects."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

Decides = Literal["training", "scores", "execution"]
"""What a setting affects: the trained adapter (the default), only its evaluation scores, or only how the run is executed
(memory, speed, checkpoints, logs)."""
SCORES: Decides = "scores"
EXECUTION: Decides = "execution"


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Allowed interval of a number, and its words in messages. It excludes NaN and infinity, and allows None and text (`auto`).

    Attributes:
        ge, gt, le, lt: Bounds: greater or equal, greater, less or equal, less.
        note: Unit of the number, or reason for the bounds.
        example: Valid value; None for the default of the setting.
    """

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf
    note: str = ""
    example: float | None = None

    def allows(self, value: object) -> bool:
        """Return whether a value is in the interval or not a number."""
        return not isinstance(value, int | float) or (self.ge <= value <= self.le and self.gt < value < self.lt)

    def __str__(self) -> str:
        low, high = max(self.ge, self.gt), min(self.le, self.lt)
        if high == math.inf:
            text = f"at least {_bound(low)}" if low == self.ge else f"> {_bound(low)} and finite"
        else:
            text = f"in {'[' if low == self.ge else '('}{_bound(low)}, {_bound(high)}{']' if high == self.le else ')'}"
        return f"{text} {self.note}".rstrip()


def _bound(value: float) -> str:
    power = int(value).bit_length() - 1
    return f"2**{power}" if power > 20 and value == 2**power else f"{value:g}"


class Setting(NamedTuple):
    """One field of the schema; `default` is `dataclasses.MISSING` if it is required."""

    key: str
    kind: Any
    default: Any
    range: Range | None
    decides: Decides


def section_name(schema: type) -> str:
    """Return the section of a dataclass of settings: `loss` for LossConfig, empty for Config."""
    return schema.__name__.removesuffix("Config").lower()


@cache
def settings(schema: Any, decides: Decides = "training") -> dict[str, Setting]:  # noqa: ANN401
    """Return the settings of a dataclass and of its sections by dotted key.

    Args:
        schema: Dataclass of settings.
        decides: What a setting affects if it declares nothing; a section's declaration applies to its settings.
    """
    found: dict[str, Setting] = {}
    hints = get_type_hints(schema, include_extras=True)
    for item in dataclasses.fields(schema):
        hint = hints[item.name]
        kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        affects = next((note for note in notes if note in get_args(Decides)), decides)
        if hasattr(kind, "__dataclass_fields__"):
            found |= settings(kind, affects)
            continue
        key = f"{section_name(schema)}.{item.name}".lstrip(".")
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        limits = next((note for note in notes if isinstance(note, Range)), None)
        found[key] = Setting(key, kind, default, limits, affects)
    return found
