from pathlib import Path

import pytest
from support.encoders import save_small_adapter

from promcse_pl.corpus import rows
from promcse_pl.embedder import PromCSE


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> Path:
    return save_small_adapter(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def model(adapter) -> PromCSE:
    return PromCSE.load(adapter, device="cpu")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_ROWS", 4)
