"""Tests and files that the documentation refers to exist."""

import re
import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]


def test_every_test_that_a_page_names_exists():
    named = [
        match for page in ROOT.glob("docs/*.md") for match in re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text())
    ]
    assert len(named) > 10
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in _text(ROOT / file)]
    assert not missing


def test_every_link_to_a_file_leads_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*/README.md")]
    dead = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not dead


def _drawn() -> set[tuple[str, str]]:
    """The arrows of the diagram in docs/architecture.md."""
    diagram = (ROOT / "docs/architecture.md").read_text().split("```mermaid")[1].split("```")[0]
    return set(re.findall(r'^ *(\w+)(?:\[".*?"\])? --> (\w+)', diagram, re.MULTILINE))


def test_the_diagram_has_the_layers_of_the_import_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    names = {name.removeprefix("promcse_pl.") for layer in layers for name in layer.split(" | ")}
    assert {name for arrow in _drawn() for name in arrow} == names - {"version"}


def test_the_arrows_of_the_diagram_are_the_imports_without_those_along_a_longer_path():
    graph = grimp.build_graph("promcse_pl", "hydra_plugins", cache_dir=None)
    packages: dict[str, set[str]] = {}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            importer, target = _package(module), _package(imported)
            if importer != target and not {importer, target} & {"promcse_pl", "version"}:
                packages.setdefault(importer, set()).add(target)

    def reached(package: str) -> set[str]:
        below = packages.get(package, set())
        return below.union(*map(reached, below))

    expected = {
        (package, target)
        for package, targets in packages.items()
        for target in targets
        if not any(target in reached(other) for other in targets)
    }
    assert _drawn() == expected


def _package(module: str) -> str:
    return module.removeprefix("promcse_pl.").partition(".")[0]


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
