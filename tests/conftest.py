"""Shared fixtures and skips."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from rich.console import Console
from support.encoders import small_backbone
from support.folders import DATA, GOLDEN
from support.runs import DEV_PAIRS, SECRETS, Run

from promcse_pl.config import Config
from promcse_pl.data.demo import demo_pairs
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.runs.lifecycle import run_job


@pytest.fixture
def backbone() -> FrozenBackbone:
    return small_backbone()


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores: some tests wait for time limits, servers and killed processes."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("PROMCSE_TESTS") != "all":
        exhaustive = [item for item in items if "exhaustive" in item.keywords]
        config.hook.pytest_deselected(items=exhaustive)
        items[:] = [item for item in items if item not in exhaustive]
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)  # else one worker would end with a slow file, the others idle
    for item in items:
        if "realdata" in item.keywords and not DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no data in {DATA}; set PROMCSE_DATA"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "golden" in item.keywords and not GOLDEN.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no golden numbers in {GOLDEN}; set PROMCSE_GOLDEN"))


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Run:
    """One short training of MiniLM on demo triplets, tracked offline, with secrets around.

    Many tests share and only read it: the first worker that needs it trains, the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    base = (base if worker_id == "master" else base.parent) / "trained"
    base.mkdir(exist_ok=True)
    config = _config_of_the_trained_run(base)
    with FileLock(base / "lock"):
        if not (base / "returned.json").exists():
            _train(config, base)
    returned = json.loads((base / "returned.json").read_text(encoding="utf-8"))
    return Run(base / "run", config, returned["results"], returned["printed"])


def _config_of_the_trained_run(base: Path) -> Config:
    return Config.from_dict(
        {
            "model": {"path": "sentence-transformers/all-MiniLM-L6-v2", "pooling": "avg", "head": "none"},
            "data": {
                "kind": "triplets",
                "train": "demo",
                "dev": str(base / "dev.tsv"),
                "max_rows": 30,
                "batch_size": 8,
                "cache_dir": str(base / "cache"),
            },
            "optim": {"lr": 0.1},
            "trainer": {
                "epochs": 2,
                "max_steps": 7,
                "eval_every": 2,
                "log_every": 1,
                "precision": "float32",
                "device": "cpu",
                "chunk_tokens": 512,
            },
            "tracking": {"wandb": "offline", "project": "test", "name": "shared", "tags": ["short"]},
        }
    )


def _train(config: Config, base: Path) -> None:
    shutil.rmtree(base / "run", ignore_errors=True)  # of a worker that failed
    rows = demo_pairs("dev")[:DEV_PAIRS]
    (base / "dev.tsv").write_text(
        "a\tb\tscore\n" + "".join(f"{a}\t{b}\t{score}\n" for a, b, score in rows), encoding="utf-8"
    )
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(base / "xdg"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("WANDB_MODE", raising=False)
        results = run_job(config, base / "run", Console(file=printed, width=100))
    returned = {"results": results, "printed": printed.getvalue()}
    (base / "returned.json").write_text(json.dumps(returned), encoding="utf-8")
