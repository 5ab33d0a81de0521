"""Two steps on the real files, as `data=wiki` and `data=nli` name them."""

import io
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from support.folders import DATA, ROOT
from transformers import AutoTokenizer, RobertaConfig, RobertaModel

from promcse_pl import PromCSE
from promcse_pl.run_folder import read_history
from promcse_pl.runs.compose import config_of
from promcse_pl.runs.lifecycle import run_job

pytestmark = pytest.mark.realdata


def run_two_steps(folder: Path, *overrides: str) -> dict[str, float]:
    """Return what the history holds of the last step."""
    common = [
        f"data.dir={DATA}",
        "data.max_rows=24",
        "data.batch_size=8",
        f"data.cache_dir={folder / 'cache'}",
        "trainer.max_steps=2",
    ]
    common += ["trainer.log_every=1", "trainer.precision=float32", "evaluation=none", "data.dev=null", "tracking=local"]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        config = config_of(compose("config", overrides=[*common, *overrides]))
    results = run_job(config, folder / "run", Console(file=io.StringIO()))
    assert (results["rows"], results["steps"]) == (24, 2)
    last: dict[str, float] = {}
    for entry in read_history(folder / "run/metrics.jsonl"):
        last |= entry if entry["step"] == 2 else {}
    assert last["train/loss"] > 0
    return last


def test_wikipedia_trains_without_hinge_and_without_mlm(tmp_path):
    last = run_two_steps(tmp_path, "data=wiki", "model=minilm")
    assert "train/contrastive" in last
    assert not {"train/hinge", "train/mlm"} & set(last)


def test_nli_trains_with_the_hinge(tmp_path):
    last = run_two_steps(tmp_path, "data=nli", "model=minilm")
    assert last["train/loss"] == pytest.approx(last["train/contrastive"] + last["train/hinge"], rel=1e-5)
    assert last["train/hinge"] > 0


def test_the_unsupervised_roberta_recipe_trains_with_the_mlm_task(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=130, **sizes)).save_pretrained(
        tmp_path / "roberta"
    )
    AutoTokenizer.from_pretrained(DATA / "tokenizers/roberta-base").save_pretrained(tmp_path / "roberta")
    last = run_two_steps(tmp_path, "data=wiki", "model=roberta-base", f"model.path={tmp_path / 'roberta'}")
    assert last["train/loss"] == pytest.approx(last["train/contrastive"] + last["train/mlm"], rel=1e-5)
    # 0.1 of about log 50265 = 10.8 for a fresh head
    assert 0.5 < last["train/mlm"] < 2
    vectors = PromCSE.load(tmp_path / "run", device="cpu").encode(["A sentence.", "Another one."])
    assert vectors.shape == (2, 32)
    assert not any("mlm" in path.name for path in (tmp_path / "run/adapter").iterdir())
