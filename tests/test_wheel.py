"""The wheel works without the clone: built, installed into an empty environment and used in an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.folders import ROOT
from support.shadows import imported_shadows, write_shadows

pytestmark = pytest.mark.slow
ROWS = ["A woman is reading.,Someone reads.,A woman is running.", "A dog sleeps.,A pet rests.,A dog barks."] * 10


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution, built from a copy of what the build reads."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    for name in ("conf", "hydra_plugins", "promcse_pl"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for kind in ("sdist", "wheel"):
        code = f"from setuptools.build_meta import build_{kind}; build_{kind}({str(folder)!r})"
        run([sys.executable, "-c", code], source)
    shutil.rmtree(source)
    return folder


@pytest.fixture(scope="module")
def here(built, tmp_path_factory) -> Path:
    """An empty folder beside a fresh environment with the wheel; dependencies are those of the tests' environment."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", "venv"], folder)
    python = folder / "venv/bin/python"
    (wheel,) = built.glob("*.whl")
    run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)], folder)
    (site_packages,) = folder.glob("venv/lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "here").mkdir()
    return folder / "here"


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "PYTHON", "PROMCSE"))}
    environment = {**kept, "HOME": str(cwd.parent), "XDG_CACHE_HOME": str(cwd.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def promcse(here: Path, *arguments: str) -> str:
    return run([str(here.parent / "venv/bin/promcse"), *arguments], here).stdout


def test_wheel_and_sdist_contain_all_of_conf_and_the_sweeper(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    wanted = {f"promcse_pl/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}
    package = [path for path in (ROOT / "promcse_pl").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    wanted |= {"hydra_plugins/promcse_sweeper.py", *(str(path.relative_to(ROOT)) for path in package)}
    assert wanted <= names
    assert wanted <= set(members)
    assert all(members[name].isfile() for name in wanted), "no symbolic links: pip would install them dangling"
    assert not [name for name in {*names, *members} if name.startswith("tests")]


def test_the_package_and_the_sweeper_come_from_the_wheel(here):
    code = "import promcse_pl, hydra_plugins.promcse_sweeper as sweeper; print(promcse_pl.__file__, sweeper.__file__)"
    printed = run([str(here.parent / "venv/bin/python"), "-c", code], here).stdout.split()
    assert all(path.startswith(str(here.parent / "venv/lib")) for path in printed)


@pytest.mark.slow
def test_the_default_run_imports_nothing_from_the_current_folder(here):
    write_shadows(here)
    short = ["debug=fast", "trainer.max_steps=2", "evaluation.tasks=[]", "evaluation.frozen=false"]
    promcse(here, "train", *short, "tracking.wandb=offline")
    (folder,) = here.glob("outputs/*/*-minilm-demo")
    assert (folder / "results.json").exists()
    assert list(folder.glob("wandb/offline-run-*")), "W&B's process did not start"
    assert imported_shadows(here) == []
    assert "already finished" in promcse(here, "train", f"resume={folder}")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_on_ones_own_file_and_its_repetition_from_the_saved_config(here):
    (here / "my.csv").write_text("\n".join(["anchor,positive,hard_negative", *ROWS]) + "\n")
    own = ["data=triplets", "data.train=my.csv", "loss.margin=0.2", "data.dev=null", "debug=fast"]
    promcse(here, "train", *own, "--out", "first")
    promcse(here, "train", "--config", "first/config.yaml", "--out", "second")
    first, second = (here / name / "adapter/adapter.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_sweep_over_a_partial_config_with_a_conf_folder(here):
    (here / "partial.yaml").write_text("data: {dev: null}\nevaluation: {tasks: [], frozen: false}\n")
    (here / "my_conf/experiment").mkdir(parents=True)
    (here / "my_conf/experiment/short.yaml").write_text("# @package _global_\nprompt: {length: 3}\n")
    mine = ["--config", "partial.yaml", "--config-dir", "my_conf", "experiment=short", "debug=fast"]
    printed = promcse(here, "train", "-m", "loss.margin=0.1,0.2", *mine, "--out", "sweep")
    assert "2 finished" in printed
    assert (here / "sweep/1/results.json").exists()
    assert "length: 3" in (here / "sweep/1/config.yaml").read_text()


def test_messages_name_the_installed_command(here):
    with pytest.raises(AssertionError, match=r"several values\. Try: promcse train -m loss\.margin=0\.1,0\.2"):
        promcse(here, "train", "loss.margin=0.1,0.2")
