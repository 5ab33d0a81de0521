"""`promcse models`."""

import io
import re

import pytest
from rich.console import Console
from support.configs import CONF
from support.encoders import small_backbone

from promcse_pl.cli.main import main
from promcse_pl.cli.models import TESTED, families_table, presets_table, prompt_entry
from promcse_pl.models.families import FAMILIES

PRESETS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


def printed(table, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue().splitlines()


def test_every_family_and_every_preset_has_a_row(capsys):
    assert main(["models"]) == 0
    families, presets = (
        [re.split(r" {2,}", line.strip()) for line in part.splitlines() if line.strip()]
        for part in capsys.readouterr().out.split("Presets")
    )
    assert [row[0] for row in families if row[0] in FAMILIES] == [*FAMILIES]
    assert [row[0] for row in presets if row[0] in PRESETS] == PRESETS
    assert ["mpnet", "replaced attention", "after padding id", "avg", "yes"] in families
    assert ["minilm", "sentence-transformers/all-MiniLM-L6-v2", "auto", "tested"] in presets
    assert ["bert-base", "google-bert/bert-base-uncased", "cls", "not run"] in presets


def test_the_tables_fit_a_terminal_of_80_columns_without_truncated_names():
    for table, names in ((families_table(), FAMILIES), (presets_table(), PRESETS)):
        lines = printed(table, 80)
        assert max(map(len, lines)) <= 80
        assert not any("…" in line for line in lines)
        assert set(names) <= {line.split()[0] for line in lines if line.strip()}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_table_names_how_the_prompt_enters(model_type):
    modules = [*small_backbone(model_type).model.modules()]
    ours = any(type(module).__module__.startswith("promcse_pl.models.families") for module in modules)
    assert (prompt_entry(FAMILIES[model_type]) == "replaced attention") == ours


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_that_was_not_run_says_so_in_its_file(name):
    text = (CONF / "model" / f"{name}.yaml").read_text()
    if "\nmodel:" in text:  # the others repeat another preset
        assert ("# Not run on the published weights.\n" in text) == (name not in TESTED)
