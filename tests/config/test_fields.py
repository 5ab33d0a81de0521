"""Ranges, and the table of all settings."""

import dataclasses
import math
import typing

import pytest

from promcse_pl.config import Config, LossConfig, SweepConfig, TrainerConfig
from promcse_pl.config.fields import Range, section_name, settings
from promcse_pl.utils.errors import ConfigError

RANGED = {
    key: setting for schema in (Config, SweepConfig) for key, setting in settings(schema).items() if setting.range
}


@pytest.mark.parametrize(
    ("interval", "words", "inside", "outside"),
    [
        (Range(ge=0, le=2), "in [0, 2]", [0, 2], [-0.01, 2.01]),
        (Range(gt=0, lt=1), "in (0, 1)", [0.5], [0, 1]),
        (Range(ge=0, lt=2**32), "in [0, 2**32)", [2**32 - 1], [2**32]),
        (Range(ge=1, le=1024, note="machines"), "in [1, 1024] machines", [1024], [1025, 10**400]),
        (Range(ge=2), "at least 2", [2, 10**9], [1]),
        (Range(gt=0), "> 0 and finite", [1e-9], [0]),
    ],
)
def test_a_range_has_words_and_excludes_nan_and_infinity(interval, words, inside, outside):
    assert str(interval) == words
    assert all(interval.allows(value) for value in [*inside, None, "auto"])
    assert not any(interval.allows(value) for value in [*outside, math.nan, math.inf, -math.inf])


def test_every_number_has_a_range_and_an_example_in_it():
    for schema in (Config, SweepConfig):
        numbers = {key for key, setting in settings(schema).items() if {int, float} & set(_options(setting.kind))}
        assert numbers <= RANGED.keys()
    for setting in RANGED.values():
        example = setting.default if setting.range.example is None else setting.range.example
        assert example is not None
        assert setting.range.allows(example)
        assert setting.range.allows(setting.default)


def test_a_range_also_holds_for_an_instance_that_is_created_or_replaced_in_python():
    with pytest.raises(
        ConfigError, match=r"^loss\.margin must be in \[0, 2\] \(a difference of cosines\), got 3\. Try: "
    ):
        LossConfig(margin=3)
    with pytest.raises(ConfigError, match=r"^trainer\.epochs must be at least 1, got 0\. Try: "):
        dataclasses.replace(TrainerConfig(), epochs=0)


def test_the_name_of_a_dataclass_is_its_section_in_the_config():
    kinds = {name: kind for name, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)}
    assert len(kinds) == 9
    assert {name: section_name(kind) for name, kind in kinds.items()} == {name: name for name in kinds}
    assert (section_name(Config), section_name(SweepConfig)) == ("", "sweep")


def _options(kind):
    return () if typing.get_origin(kind) in (list, typing.Literal) else (kind, *typing.get_args(kind))
