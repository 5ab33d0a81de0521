"""What a run writes and prints holds no secret of the environment and no name of a home folder, and still repeats the run."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from support.folders import ROOT
from support.processes import Ended, promcse
from support.runs import KILL_AT_STEP, small_config

from promcse_pl.adapter import load_adapter
from promcse_pl.run_folder import read_config, read_status, write_config

sys.path.append(str(ROOT / "tests/tracking"))
from support.wandb_files import parse

USER = "erika-mustermann-äö"
SECRETS = {
    "WANDB_API_KEY": "5ec2e7" * 6 + "cafe",
    "HF_TOKEN": "hf_planted0token0of0the0environment",
    "MY_SECRET": "hunter2-of-the-environment",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret",
}


def surroundings(home: Path, extra: str = "") -> str:
    own = {**SECRETS, "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "HF_HUB_OFFLINE": "1"}
    return (
        f"import os; os.environ.update({own!r}); os.environ.pop('WANDB_MODE', None); os.chdir({str(home)!r})\n{extra}"
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A home folder with the inputs of a run, a config without ~, and one bad row in the data."""
    home = tmp_path_factory.mktemp("home") / USER
    home.mkdir()
    sections = {
        "data": {"on_bad_row": "skip", "dev": str(home / "dev.tsv")},
        "tracking": {"wandb": "offline"},
        "evaluation": {"tasks": [str(home / "dev2.tsv")]},
    }
    config = small_config(home, **sections)
    (home / "train.csv").write_text((home / "train.csv").read_text() + "w5,,w6\n")
    for name, words in (("dev.tsv", "w9"), ("dev2.tsv", "w8")):
        (home / name).write_text("a\tb\tscore\n" + "".join(f"w{i} {words}\tw{i + 3}\t{i % 5}\n" for i in range(5, 20)))
    write_config(config, home / "start.yaml")
    return home


@pytest.fixture(scope="module")
def finished(home) -> list[Ended]:
    """A run that was stopped at its second step and resumed, in that home folder."""
    run = home / "runs/first"
    ended = [
        promcse(
            home / "log",
            "train",
            home / "start.yaml",
            "--out",
            run,
            before=surroundings(home, KILL_AT_STEP.format(step=1)),
        )
    ]
    ended.append(promcse(home / "log", "train", "--resume", run, before=surroundings(home)))
    assert [end.code for end in ended] == [143, 0], [end.stderr for end in ended]
    return ended


def leaks(content: bytes, home: Path) -> list[str]:
    forms = {text for text in (USER, str(home)) for text in (text, json.dumps(text)[1:-1])}
    wanted = {form.encode() for form in forms} | {str(home).encode("utf-16-le")}
    wanted |= {text.encode() for pair in SECRETS.items() for text in pair}
    # where W&B keeps the results table for a later `wandb sync`; it stays in this file and is not uploaded
    content = content.replace(f"{home}/.local/share/wandb/artifacts/staging/".encode(), b"")
    return [text.decode(errors="replace") for text in wanted if text in content]


def closed(path: Path) -> bytes:
    """The content of a file of W&B once its own process, which outlives ours, has written the end."""
    patience = time.monotonic() + 20
    while not any(record.HasField("exit") for record in parse(path.read_bytes())):
        assert time.monotonic() < patience
        time.sleep(0.1)
    return path.read_bytes()


def test_no_file_of_a_run_and_nothing_printed_holds_a_secret_or_the_home_folder(home, finished):
    files = [path for path in (home / "runs").rglob("*") if path.is_file()]
    assert {".wandb", ".yaml", ".json", ".jsonl", ".log", ".txt", ".safetensors"} <= {path.suffix for path in files}
    contents = {path: closed(path) if path.suffix == ".wandb" else path.read_bytes() for path in files}
    found = {str(path.relative_to(home)): leaks(content, home) for path, content in contents.items()}
    found |= {
        f"stdout {number}": leaks(f"{end.stdout}{end.stderr}".encode(), home) for number, end in enumerate(finished)
    }
    assert not {name: texts for name, texts in found.items() if texts}
    assert "~/" in (home / "runs/first/config.yaml").read_text()
    assert "~/train.csv:" in (home / "runs/first/bad_rows.txt").read_text()


def test_the_saved_config_with_its_short_paths_repeats_the_run_and_the_adapter_finds_its_encoder(
    home, finished, monkeypatch
):
    run = home / "runs/first"
    assert read_config(run / "config.yaml").data.train == "~/train.csv"
    again = promcse(home / "log", "train", run / "config.yaml", "--out", home / "again", before=surroundings(home))
    assert again.code == 0, again.stderr
    name = "adapter/adapter.safetensors"
    assert (home / "again" / name).read_bytes() == (run / name).read_bytes()
    monkeypatch.setenv("HOME", str(home))
    assert load_adapter(run).backbone.identity.name == "~/encoder"


def test_a_run_that_fails_leaves_no_home_folder_either(home):
    folder = home / "failing"
    shutil.rmtree(folder, ignore_errors=True)
    good = (home / "train.csv").read_text().splitlines()[:11]
    late = [*good, *(good[1:] * 9), "w5,,w6"]  # behind the rows that are read before a folder is made
    (home / "late.csv").write_text("\n".join(late) + "\n")
    config = small_config(home, data={"on_bad_row": "stop", "train": str(home / "late.csv")})
    write_config(config, home / "failing.yaml")
    done = promcse(home / "log", "train", home / "failing.yaml", "--out", folder, before=surroundings(home))
    assert done.code == 2
    assert "~/late.csv:102: column sent1 is empty" in done.stderr
    assert "~/late.csv:102" in read_status(folder).error
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert not leaks(path.read_bytes(), home), path
    assert not leaks(f"{done.stdout}{done.stderr}".encode(), home)
    assert os.environ.get("MY_SECRET") is None


@pytest.mark.slow
def test_reports_evaluations_and_sweeps_hold_none_either(home, finished):
    scores, sweep = home / "scores", home / "sweep"
    ended = [
        promcse(home / "log", "report", home / "runs", before=surroundings(home)),
        promcse(
            home / "log",
            "evaluate",
            home / "runs/first",
            "--tasks",
            home / "dev2.tsv",
            "--out",
            scores,
            "--format",
            "markdown",
            before=surroundings(home),
        ),
    ]
    settings = (
        f"-m seed=1,2 debug=fast data=triplets data.train={home}/train.csv data.on_bad_row=skip data.dev={home}/dev.tsv "
        f"data.max_length=16 model.path={home}/encoder tracking.wandb=offline hydra.sweep.dir=sweep"
    )
    ended.append(promcse(home / "log", "train", *settings.split(), before=surroundings(home)))
    ended.append(promcse(home / "log", "report", sweep, before=surroundings(home)))
    assert [end.code for end in ended] == [0, 0, 0, 0], [end.stderr for end in ended]
    files = [home / "runs/report.html", *(path for top in (scores, sweep) for path in top.rglob("*") if path.is_file())]
    assert {"results.md", "report.html", "sweep.json", "output.log", "start.yaml"} <= {path.name for path in files}
    contents = {path: closed(path) if path.suffix == ".wandb" else path.read_bytes() for path in files}
    found = {str(path.relative_to(home)): leaks(content, home) for path, content in contents.items()}
    found |= {
        f"printed {number}": leaks(f"{end.stdout}{end.stderr}".encode(), home) for number, end in enumerate(ended)
    }
    assert not {name: texts for name, texts in found.items() if texts}
