"""Tests and files that the documentation refers to exist, and its example of a new family works."""

import re
import tomllib
from pathlib import Path
from typing import Any

import grimp
import torch
from support.encoders import prompt_encoder, small_encoder, small_tokens

from promcse_pl.models import backbone
from promcse_pl.models.families import FAMILIES, SUPPORTED

ROOT = Path(__file__).resolve().parents[1]


def test_every_test_that_a_page_names_exists():
    named = [
        match for page in ROOT.glob("docs/*.md") for match in re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text())
    ]
    assert len(named) > 10
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in _text(ROOT / file)]
    assert not missing


def test_every_link_to_a_file_leads_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/README.md")]
    dead = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not dead


def test_the_example_of_a_new_family_takes_a_prompt(monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding-an-encoder.md").read_text(), re.DOTALL)
    assert example.count("\n") < 30
    scope: dict[str, Any] = {}
    exec(example, scope)
    (name,) = scope["FAMILIES"]
    assert name not in SUPPORTED
    monkeypatch.setitem(FAMILIES, name, scope["FAMILIES"][name])
    monkeypatch.setattr(backbone, "SUPPORTED", (*SUPPORTED, name))
    encoder = prompt_encoder(name, changes={"pad_token_id": 1})  # loading checks the gradient of every layer's prompt
    tokens = small_tokens([9, 4], encoder.backbone.pad_id)
    plain = small_encoder(name, pad_token_id=1).double().eval()
    expected = plain(input_ids=tokens.ids_NT, attention_mask=tokens.mask_NT).last_hidden_state
    real = tokens.mask_NT.bool()
    (without,) = encoder.backbone(tokens.ids_NT, tokens.mask_NT, None)
    torch.testing.assert_close(without[real], expected[real], rtol=0, atol=1e-12)
    (states,) = encoder.backbone(tokens.ids_NT, tokens.mask_NT, encoder.prompt())
    assert (states - without)[real].abs().max() > 1e-2


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
