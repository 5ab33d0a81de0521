"""`python run.py` in real processes, in an empty folder."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.encoders import save_small_encoder
from support.folders import ROOT
from support.light_commands import Ended, light_commands

from promcse_pl.sweeps.plan import read_plan

RUN = str(ROOT / "run.py")


def surroundings(cwd: Path, **environment: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    own = {"XDG_CACHE_HOME": str(cwd.parent / "cache"), "HF_HUB_OFFLINE": "1", "HOME": str(cwd.parent)}
    return {**clean, **own, **environment}


def start(cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python run.py ARGUMENTS` in a new interpreter."""
    return subprocess.run(
        [sys.executable, RUN, *arguments],
        cwd=cwd,
        env=surroundings(cwd, **environment),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def light(tmp_path_factory) -> Iterator[Callable[..., Ended]]:
    """Run `python run.py ARGUMENTS` as `start` does, but forked: for commands that end before torch is imported."""
    with light_commands(tmp_path_factory.mktemp("light")) as commands:
        yield lambda cwd, *arguments, **environment: commands.run(cwd, [*arguments], surroundings(cwd, **environment))


@pytest.fixture
def here(tmp_path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


MISTAKES = {
    "loss.margn=0.3": "loss.margn is not a setting. Did you mean loss.margin? Allowed under loss: loss.temperature, ",
    "loss.margin=-1": "loss.margin must be in [0, 2] (a difference of cosines), got -1.0. Try: python run.py loss.margin=0.2",
    "loss.margin=abc": "loss.margin must be a number, got 'abc'. Try: python run.py loss.margin=0.2",
    "model=robeta": "model=robeta is not a choice. Did you mean model=roberta-base",
    "data=triplets": "data.train is not set. Try: python run.py data=triplets data.train=FILE",
    "data.train=missing.csv": "data.train=missing.csv does not exist; searched ",
    "data=nli": "data.dev=stsb and evaluation.tasks=[sts,sick] read data.dir/senteval, but data.dir is not set. Try: ",
    "data=nli data.dir=/nowhere": "the folder data.dir=/nowhere does not exist (current folder: ",
    "resume=": "resume= names no folder. Try: python run.py resume=",
    "-m sweep.resume=": "sweep.resume= names no folder. Try: python run.py -m sweep.resume=",
    "resume=nowhere": "nowhere contains no run to resume: there is no such folder. Try: ",
    "data=nli data.dir=.": "data.dir=. has no senteval/ folder in it (SentEval's data: STS/, SICK/). Try: data.dir=FOLDER",
    "model.path=/nowhere": "the encoder folder /nowhere does not exist ",
    "tracking.wandb=onlin": "tracking.wandb must be one of auto, online, offline, disabled, got 'onlin'. Try: ",
    "seed=-1": "seed must be in [0, 2**32), got -1. Try: python run.py seed=42",
    "data.train=": "data.train must be `demo` or a file, got ''. Try: ",
    'model.prompts={query: "query: "': "model.prompts={query: is not a dictionary: put the whole setting in single quotes. Try: ",
    "seed": "Error parsing override 'seed' missing EQUAL",
    "seed=[1": "seed=[1: no viable alternative at input '[1'. A value with special characters needs quotes. Try: python run.py ",
    "seed=${x}": "seed: Interpolation key 'x' not found. Try: a value in place of ${...}",
    "loss.margin=0.1,0.2": "loss.margin=0.1,0.2 has several values. Try: python run.py -m loss.margin=0.1,0.2 (a job for each)",
    "model=minilm,bert-base": "model=minilm,bert-base has several values. Try: python run.py -m model=minilm,bert-base ",
    "seed=range(1,3)": "seed=range(1,3) has several values. Try: python run.py -m 'seed=range(1,3)' (a job for each), or ",
    "~model": "Error resolving interpolation '${tuning}/${mode}/${model}', possible interpolation keys: ",
    "data.train=/ä.csv": "data.train=/ä.csv: token recognition error at: 'ä'. A value with special characters needs quotes. ",
    "hydra.nope=1": "Could not override 'hydra.nope'. To append to your config use +hydra.nope=1. Try: ",
    "-cn nope": "Cannot find primary config 'nope'. Check that it's in your config search path. Try: ",
    "-m --cfg job": "argument -c/--cfg: not allowed with argument -m/--multirun. Try: python run.py --help",
    "--resolve": "--resolve has an effect only with --cfg or --help. Try: python run.py --cfg job",
    "sweep.parallel=2": "sweep.parallel=2 has no effect on a single run. Try: python run.py -m sweep.parallel=2",
    "hydra.sweep.dir=x": "hydra.sweep.dir=x has no effect on a single run. Try: python run.py -m hydra.sweep.dir=x",
    "-m seed=1,2 hydra.run.dir=x": "hydra.run.dir=x has no effect on a sweep. Try: hydra.sweep.dir=x",
    "-m seed=1,2 sweep.seed=3": "sweep.seed=3 has no effect without a search. Try: sweep=optuna, or leave it out",
    "-m seed=${x}": "no job was started; job seed=$\\{x\\}: seed: Interpolation key 'x' not found. Try: ",
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.items(), ids=MISTAKES)
def test_an_invalid_command_line_is_a_one_line_error_and_writes_nothing(arguments, message, light, here):
    done = light(here, *arguments.split())
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {message}")
    assert done.stdout == ""
    assert done.heavy == [], "a mistake must not wait for torch"
    assert list(here.iterdir()) == []


FILES = {
    "data=triplets data.train=bad.csv": (
        "my,four,unknown,columns\n1,2,3,4\n",
        "bad.csv has 4 columns (my, four, unknown, ",
    ),
    "data=triplets data.train=two.csv": (
        "a,b\n1,2\n",
        "two.csv has 2 columns (a, b); triplets need 3: anchor, positive, ",
    ),
    "data=pairs data.train=tabs.csv": (
        "a\tb\nx\ty\n",
        "tabs.csv: columns are separated by tabs, which does not match the suffix .csv",
    ),
    "data=pairs data.train=row.csv": (
        "a,b\nx,y\nx,y,z\n",
        "row.csv:3: 3 fields, the header has 2 (a text with ',' ",
    ),
    "data=pairs data.train=file.xlsx": ("PK", "file.xlsx: unknown format '.xlsx'. Allowed: .csv, .tsv, .txt, .jsonl, "),
    "data.dev=dev.csv": (
        "a,b\nx,y\n",
        "dev.csv has 2 columns (a, b); scored pairs need 3: sentence1, sentence2, score. ",
    ),
    "data.dev=same.csv": (
        "anchor,positive,score\nx,y,1\nv,w,1\n",
        "same.csv: all scores (2 rows) are 1, so ",
    ),
}


@pytest.mark.parametrize("arguments", FILES)
def test_an_error_in_a_data_file_is_reported_before_torch_is_imported_and_a_folder_created(arguments, light, here):
    content, message = FILES[arguments]
    (here / arguments.rpartition("=")[2]).write_text(content)
    before = sorted(here.iterdir())
    done = light(here, *arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.heavy == []
    assert sorted(here.iterdir()) == before


def test_an_error_in_a_data_file_stops_a_sweep_before_its_first_job(light, here):
    (here / "good.csv").write_text("a,b\n" + "x,y\n" * 3)
    (here / "bad.csv").write_text("a,b\nx\n")
    done = light(here, "-m", "data=pairs", "data.train=good.csv,bad.csv")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no job was started" in done.stderr
    assert "bad.csv:2: 1 field, the header has 2" in done.stderr
    assert sorted(path.name for path in here.iterdir()) == ["bad.csv", "good.csv"]


@pytest.mark.parametrize("folder", ["file", "file/run", "/proc/run", "x" * 300])
def test_a_run_folder_that_cannot_be_created_is_reported_in_one_line(folder, light, here):
    (here / "file").touch()
    done = light(here, f"hydra.run.dir={folder}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: cannot read or write {folder[:200]}")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in here.iterdir()] == ["file"]


def test_an_invalid_wandb_mode_in_the_environment_is_a_user_error(light, here):
    done = light(here, WANDB_MODE="nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "error: WANDB_MODE must be one of online, offline, disabled, got 'nonsense'. Try: unset WANDB_MODE"
    )
    assert list(here.iterdir()) == []


def test_a_user_error_changes_no_unrelated_folder(light, here):
    (here / "outputs/earlier").mkdir(parents=True)
    assert light(here, "seed=-1").returncode == 2
    assert [path.relative_to(here).as_posix() for path in here.rglob("*")] == ["outputs", "outputs/earlier"]


@pytest.mark.parametrize("out", ["--out=results/a", "hydra.run.dir=results/${now:%H}", "hydra.run.dir=results/b/a"])
def test_a_failed_start_removes_only_folders_that_it_created(out, light, here):
    (here / "results").mkdir()
    assert light(here, out, "data.train=typo.csv").returncode == 2
    assert [path.name for path in here.rglob("*")] == ["results"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [".env", "notes.txt", "adapter/chapter.txt"])
def test_a_run_does_not_start_in_a_folder_with_other_content(name, light, here):
    (here / "work" / name).parent.mkdir(parents=True)
    (here / "work" / name).write_text("mine")
    for arguments in (["hydra.run.dir=."], ["hydra.run.dir=../work"]):
        done = light(here / "work", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"a run needs a new or empty folder, but ~/work contains {name.split('/')[0]}. Try: " in done.stderr
        assert "Try: the same command with hydra.run.dir=NEW_FOLDER" in done.stderr
        assert [path.read_text() for path in here.rglob("*") if path.is_file()] == ["mine"], "nothing is added or lost"


@pytest.mark.parametrize(
    "module", ["promcse_pl.utils.errors", "omegaconf.errors", "hydra.types", "promcse_pl.config.schema"]
)
def test_ctrl_c_in_the_imports_ends_without_a_traceback(module, here):
    command = [sys.executable, "-X", "importtime", RUN, "-m", "seed=1,2"]
    process = subprocess.Popen(command, cwd=here, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.split()[-1] == module:
            process.send_signal(signal.SIGINT)
            break
    _, printed = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), printed
    assert "Traceback" not in printed
    assert list(here.iterdir()) == []


def test_cfg_job_shows_the_recipe_with_the_one_value_that_was_changed(light, here):
    done = light(here, "model=roberta-large", "loss.margin=0.2", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert (shown["optim"]["lr"], shown["data"]["batch_size"], shown["prompt"]["length"]) == (0.005, 512, 10)
    assert (shown["loss"]["margin"], shown["loss"]["hinge_weight"], shown["loss"]["temperature"]) == (0.2, 10.0, 0.05)
    assert (shown["trainer"]["epochs"], shown["data"]["kind"], shown["data"]["train"]) == (
        10,
        "triplets",
        "nli/nli_train.csv",
    )
    assert shown["model"]["path"] == "FacebookAI/roberta-large"
    assert list(here.iterdir()) == []


def test_help_lists_the_groups_without_importing_torch(here, light):
    done = light(here, "--help")
    assert done.returncode == 0
    for group in ("model: bert-base", "data: ", "loss: default", "sweep: "):
        assert group in done.stdout
    assert done.heavy == []


@pytest.mark.slow
@pytest.mark.exhaustive
def test_jobs_with_prompts_on_the_command_line_resolve_their_encoder_as_a_single_run_does(here):
    pytest.importorskip("sentence_transformers", exc_type=ImportError)
    from support.sentence_encoders import PROMPTS, save_sentence_encoder

    save_sentence_encoder(here / "encoder")
    (here / "train.csv").write_text("a,b,c\n" + "".join(f"w{row} w7,w{row} w8,w{row + 40}\n" for row in range(5, 25)))
    arguments = [
        *("data=triplets", "data.train=train.csv", "data.dev=null", "model.path=encoder", "debug=fast"),
        *("trainer.precision=float32", "trainer.device=cpu", 'model.prompts={query: "w90: ", other: ""}'),
    ]
    single = start(here, *arguments, 'data.prompts=[query,"w93 ",other]', "hydra.run.dir=single")
    assert single.returncode == 0, single.stderr
    assert "for sentence-transformers/all-MiniLM-L6-v2; it is not tuned for encoder\n" in single.stdout
    assert "first row: anchor 'w90: w5 w7', positive 'w93 w5 w8', negative 'w45'\n" in single.stdout
    sweep = start(
        here, "-m", *arguments, "data.prompts=[query,query,other],[other,other,query]", "hydra.sweep.dir=sweep"
    )
    assert sweep.returncode == 0, sweep.stderr
    runs = [here / "single", here / "sweep/0", here / "sweep/1"]
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
    assert [config["data"]["prompts"] for config in configs] == [
        ["query", "w93 ", "other"],
        ["query", "query", "other"],
        ["other", "other", "query"],
    ]
    for config in configs:
        assert (config["model"]["pooling"], config["model"]["max_length"]) == ("auto", "auto")
        assert config["model"]["prompts"] == {"query": "w90: ", "other": ""} != PROMPTS
        assert {key: config["resolved"][key] for key in ("model.pooling", "model.max_length")} == {
            "model.pooling": "cls",
            "model.max_length": 16,
        }


@pytest.mark.slow
def test_a_multirun_makes_a_complete_folder_and_an_adapter_of_its_own_for_every_job(here):
    save_small_encoder(here / "encoder")
    (here / "train.csv").write_text("a,b,c\n" + "".join(f"w{row} w7,w{row} w8,w{row + 40}\n" for row in range(5, 25)))
    done = start(
        here,
        "-m",
        "optim.lr=0.01,0.02",
        "debug=fast",
        "data=triplets",
        "data.train=train.csv",
        "data.max_length=16",
        "data.dev=null",
        "model.path=encoder",
        "trainer.precision=float32",
        "hydra.sweep.dir=sweep",
        "sweep.parallel=2",
    )
    assert done.returncode == 0, done.stderr
    assert "2 finished" in done.stdout
    assert "Traceback" not in done.stderr
    adapters = []
    for job, lr in enumerate((0.01, 0.02)):
        folder = here / "sweep" / str(job)
        names = {path.name for path in folder.iterdir()}
        assert {
            "adapter",
            "results.json",
            "metrics.jsonl",
            "config.yaml",
            "run.log",
            "start.yaml",
            "output.log",
        } <= names
        assert read_plan(here / "sweep").jobs[job].overrides[0] == f"optim.lr={lr}"
        assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["lr"] == lr
        adapters.append(load_file(folder / "adapter/adapter.safetensors"))
    assert set(adapters[0]) == set(adapters[1])
    assert not torch.equal(adapters[0]["prompt.embedding.weight"], adapters[1]["prompt.embedding.weight"])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_killed_and_resumed_from_the_command_line_is_bit_identical_to_an_uninterrupted_run(here):
    save_small_encoder(here / "encoder")
    (here / "train.csv").write_text("a,b,c\n" + "".join(f"w{row} w7,w{row} w8,w{row + 40}\n" for row in range(5, 45)))
    settings = (
        "data=triplets data.train=train.csv data.max_length=16 data.batch_size=4 data.dev=holdout trainer.epochs=15 "
        "trainer.save_every=5 trainer.precision=float32 model.path=encoder evaluation.tasks=[] tracking.wandb=disabled"
    )
    clean = {
        **os.environ,
        "XDG_CACHE_HOME": str(here.parent / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(here.parent),
    }
    command = [sys.executable, RUN, *settings.split(), "hydra.run.dir=killed"]
    with subprocess.Popen(command, cwd=here, env=clean, stdout=subprocess.DEVNULL) as process:
        while not (here / "killed/checkpoints/step-10").exists():
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
    assert not (here / "killed/results.json").exists()
    assert start(here, "resume=killed").returncode == 0
    assert start(here, *settings.split(), "hydra.run.dir=straight").returncode == 0
    for name in ("adapter.safetensors", "adapter.json"):
        assert (here / "killed/adapter" / name).read_bytes() == (here / "straight/adapter" / name).read_bytes()


def test_an_encoder_that_is_not_there_stops_a_multirun_before_its_first_job(light, here):
    done = light(here, "-m", "seed=1,2", "model.path=./missing", "hydra.sweep.dir=sweep")
    assert (done.returncode, done.stdout) == (2, "")
    job = "no job was started; job seed=1 model.path=./missing"
    assert done.stderr.startswith(f"error: {job}: the encoder folder ./missing does not exist")
    assert list(here.iterdir()) == []
