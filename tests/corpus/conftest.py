from pathlib import Path

import pytest
from support.encoders import save_small_encoder

from promcse_pl.adapter import save_adapter
from promcse_pl.corpus import rows
from promcse_pl.embedder import PromCSE
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    backbone = FrozenBackbone.load(str(save_small_encoder(folder / "encoder")))
    save_adapter(PromptEncoder(backbone, length=3, pooling="avg"), folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="session")
def model(adapter) -> PromCSE:
    return PromCSE.load(adapter, device="cpu")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_ROWS", 4)
