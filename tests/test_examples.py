"""The examples in docstrings and in the README run unchanged."""

import doctest
import re

import pytest
from support.folders import ROOT

import promcse_pl.embedder
import promcse_pl.index


@pytest.mark.parametrize("module", [promcse_pl.embedder, promcse_pl.index], ids=lambda module: module.__name__)
def test_docstring_examples_run(module, trained_run, tmp_path):
    examples = doctest.DocTestFinder().find(module, extraglobs={"run": trained_run.folder, "folder": tmp_path})
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    results = [runner.run(example) for example in examples]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0


def test_the_readmes_python_runs(trained_run):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    code = blocks[0].replace("outputs/DATE/TIME-minilm-demo", str(trained_run.folder))
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["embeddings"].shape == (2, 384)


def test_the_readmes_install_and_test_commands_are_those_of_ci():
    shell = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shell[0].strip().endswith(".venv/bin/python run.py")
    (development,) = [block.strip() for block in shell if "pytest" in block]
    install, test = development.split(" && ")
    steps = (ROOT / ".ci/run").read_text().splitlines()
    assert install.replace("pip install", "pip install -q") in steps
    assert test.removesuffix(' -m "not slow"') in steps  # CI also runs the slow tests
