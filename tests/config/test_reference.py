"""docs/configuration.md."""

import importlib.util
import re

import pytest
from support.folders import ROOT

from promcse_pl.config import Config, SweepConfig
from promcse_pl.config.fields import settings


@pytest.fixture(scope="module")
def generator():
    """The module tools/write_configuration.py."""
    spec = importlib.util.spec_from_file_location("write_configuration", ROOT / "tools/write_configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_page_is_up_to_date(generator, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["write_configuration.py", "--check"])
    assert generator.main() == 0, capsys.readouterr().err


def test_the_reference_page_describes_every_setting(generator):
    page = generator.PAGE.read_text(encoding="utf-8").replace("\n  ", " ")
    for key in (*settings(Config), *settings(SweepConfig)):
        (text,) = re.findall(rf"^- \*\*`{key}`\*\* \(.*?\) — (\S.*)", page, re.M)
        assert len(text) > 15, key


@pytest.mark.parametrize("content", [None, "old"])
def test_an_outdated_reference_page_is_reported_with_the_command_that_writes_it(
    generator, content, monkeypatch, capsys, tmp_path
):
    page, current = tmp_path / "configuration.md", generator.PAGE.read_text(encoding="utf-8")
    if content:
        page.write_text(content)
    monkeypatch.setattr(generator, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["write_configuration.py", "--check"])
    assert generator.main() == 1
    error = capsys.readouterr().err
    assert error == "docs/configuration.md is not up to date. Run: python tools/write_configuration.py\n"
    monkeypatch.setattr("sys.argv", ["write_configuration.py"])
    assert generator.main() == 0
    assert page.read_text(encoding="utf-8") == current
