"""Shared fixtures: folders from the environment, small encoders made in memory."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from promcse_pl.model.backbone import EncoderId, FrozenBackbone

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(os.environ.get("PROMCSE_GOLDEN", ROOT / "../shared/golden")).resolve()
DATA = Path(os.environ.get("PROMCSE_DATA", ROOT / "../shared/data")).resolve()

SMALL = {
    "vocab_size": 97,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}


def small_encoder(family: str, **changes: object) -> torch.nn.Module:
    torch.manual_seed(1)
    return AutoModel.from_config(AutoConfig.for_model(family, **{**SMALL, **changes}))


def small_backbone(family: str = "bert", **changes: object) -> FrozenBackbone:
    return FrozenBackbone(small_encoder(family, **changes), EncoderId(f"small-{family}", None, "0" * 64))


@pytest.fixture
def backbone() -> FrozenBackbone:
    return small_backbone()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "realdata" in item.keywords and not DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no data in {DATA}; set PROMCSE_DATA"))
        if "golden" in item.keywords and not GOLDEN.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no golden numbers in {GOLDEN}; set PROMCSE_GOLDEN"))
