"""Subprocesses of the package import nothing from the current folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.encoders import save_small_encoder
from support.folders import ROOT
from support.shadows import SHADOWS, imported_shadows, write_shadows

from promcse_pl.utils.interpreter import python_command

SETTINGS = (
    "data=triplets data.train=train.csv data.max_length=16 data.batch_size=8 data.dev=holdout model.path=encoder "
    "trainer.precision=float32 trainer.device=cpu trainer.max_steps=2 tracking.wandb=offline evaluation.frozen=false"
)


@pytest.fixture
def here(tmp_path) -> Path:
    """A folder with data, an encoder, and modules that leave a marker when they are imported."""
    folder = tmp_path / "here"
    save_small_encoder(folder / "encoder")
    rows = [f"w{row} w7,w{row} w8,w{row + 40}" for row in range(5, 45)]
    (folder / "train.csv").write_text("\n".join(["anchor,positive,negative", *rows]) + "\n")
    write_shadows(folder)
    return folder


def run(here: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "PYTHON"))}
    own = {"XDG_CACHE_HOME": str(here.parent / "cache"), "HF_HUB_OFFLINE": "1", "HOME": str(here.parent), **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=here, env={**clean, **own}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("how", ["trainer.devices=2 hydra.run.dir=run", "-m seed=1,2 hydra.sweep.dir=sweep"])
def test_ranks_jobs_and_the_wandb_process_import_nothing_from_the_current_folder(how, here):
    done = run(here, str(ROOT / "run.py"), *how.split(), *SETTINGS.split(), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert imported_shadows(here) == []
    assert [*here.glob("*/wandb/offline-run-*"), *here.glob("*/*/wandb/offline-run-*")], "W&B's process did not start"


def test_a_clone_that_is_the_current_folder_gives_a_subprocess_the_package_and_nothing_else(here, tmp_path):
    for name in SHADOWS:
        (here / f"{name}.py").rename(here / f"{name}.txt")
    shutil.copytree(ROOT / "promcse_pl", here / "promcse_pl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in SHADOWS:
        if name != "promcse_pl":
            (here / f"{name}.txt").rename(here / f"{name}.py")
    (here / "promcse_pl/probe.py").write_text(
        "import importlib.util, json, sys, promcse_pl\n"
        "def main(arguments):\n"
        "    print(json.dumps([arguments, sys.argv, promcse_pl.__file__, importlib.util.find_spec('h2') is None]))\n"
        "    return 7\n"
    )
    command = python_command("promcse_pl.probe:main", "one argument")
    command[command.index("-P") + 1] = str(here / "promcse_pl/utils/interpreter.py")
    done = run(here, *command[1:])
    assert done.returncode == 7, done.stderr
    arguments, argv, file, no_h2 = json.loads(done.stdout)
    assert (arguments, argv) == (["one argument"], ["promcse_pl.probe", "one argument"])
    assert (file, no_h2) == (str(here / "promcse_pl/__init__.py"), True)
    assert imported_shadows(here) == []


def test_a_users_pythonpath_is_kept(here, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/users_module.py").write_text("def main(arguments):\n    return len(arguments)\n")
    done = run(here, *python_command("users_module:main", "a", "b")[1:], PYTHONPATH=str(tmp_path / "lib"))
    assert done.returncode == 2, done.stderr
