"""`promcse models`: list the supported encoder families and the presets for `model=`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from promcse_pl.models.families.family import Family

TESTED = ("minilm", "mpnet")
"""Presets that were run on their published weights."""
_POSITIONS = {"from_zero": "from 0", "after_padding_id": "after padding id", "none": "relative only"}


def add_parser(commands: Any) -> None:  # noqa: ANN401  (argparse's type is private)
    """Add the command's parser."""
    parser = commands.add_parser("models", help="list the supported encoder families and the presets for model=")
    parser.set_defaults(run=run)


def run(_options: argparse.Namespace) -> None:
    """Print a table of the families and one of the presets."""
    from promcse_pl.utils.terminal import output_console

    console = output_console()
    console.print(families_table())
    console.print()
    console.print(presets_table())


def families_table() -> Table:
    """Return the families: how the prompt enters their attention, positions, usual pooling, fused CPU layers."""
    from promcse_pl.models.families import FAMILIES

    table = _table(
        "Encoder families (model_type in config.json)",
        "model_type",
        "prompt enters by",
        "positions",
        "pooling",
        "fused",
    )
    for model_type, family in FAMILIES.items():
        fused = "yes" if family.fused else "no"
        table.add_row(model_type, prompt_entry(family), _POSITIONS[family.positions], family.pooling, fused)
    table.caption = "pooling: default if there is no modules.json; fused: has fused CPU layers"
    return table


def prompt_entry(family: Family) -> str:
    """Return how the prompt enters the attention of a family."""
    if family.replace_attention:
        return "replaced attention"
    if family.in_call_order:
        return "order of calls"
    return "numbered layers" if family.attention else "attention interface"


def presets_table() -> Table:
    """Return the presets: encoder, pooling, and whether they were run on the published weights."""
    from promcse_pl.runs.compose import config_groups, preset_section

    table = _table("Presets (python run.py model=NAME)", "model=", "encoder", "pooling", "weights")
    for name in config_groups()["model"]:
        model = preset_section("model", name, "model")
        table.add_row(name, model["path"], model["pooling"], "tested" if name in TESTED else "not run")
    table.caption = "pooling: auto reads modules.json; weights: whether the preset was run with the published weights"
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
