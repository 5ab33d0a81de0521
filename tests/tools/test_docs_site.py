"""The documentation site: its reference pages are complete. `mkdocs build --strict` in CI checks links and navigation."""

import os
import re

import docs_site
from support.folders import ROOT

import promcse_pl
from promcse_pl.cli.main import build_parsers

INTERNAL = {"__init__", "files"}


def test_the_api_page_has_the_public_names_and_all_modules_of_interop():
    listed = re.findall(r"^::: promcse_pl\.(\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert set(promcse_pl.__all__) - {"__version__"} <= set(listed)
    modules = {path.stem for path in ROOT.glob("promcse_pl/interop/*.py")} - INTERNAL
    assert modules == {name.split(".")[1] for name in listed if name.startswith("interop.")}


def test_the_command_line_page_has_every_argument_of_every_command():
    before = dict(os.environ)
    _, *sections = re.split(r"^## promcse ", docs_site.cli_reference(), flags=re.MULTILINE)
    assert os.environ == before
    _, commands = build_parsers()
    assert [section.partition("\n")[0] for section in sections] == list(commands)
    for section, parser in zip(sections, commands.values(), strict=True):
        arguments = re.findall(r"^  (\S.*?)(?:  .*)?$", parser.format_help(), re.MULTILINE)
        assert arguments
        assert re.findall(r"^- `(.*?)`: \S", section, re.MULTILINE) == arguments


def test_the_site_has_all_pages_and_the_files_that_they_link_to():
    files = docs_site.site_files()
    assert {"README.md", "CHANGELOG.md", "docs/sweeps.md", "experiments/speed/README.md"} <= files
    assert {"docs/method.svg", "experiments/soak/soak.png", "promcse_pl/data/columns.py"} <= files


def test_the_diagram_of_the_packages_becomes_a_table():
    page = docs_site.on_page_markdown((ROOT / "docs/architecture.md").read_text())
    assert "mermaid" not in page
    assert "| `sweeps` | many runs | `runs` |" in page
