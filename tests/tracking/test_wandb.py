"""W&B: an offline run is read back from its own file; it contains no secrets, and W&B failures do not affect the run."""

import io
import json
import socket
import time
from pathlib import Path

import pytest
from rich.console import Console
from support.processes import promcse
from support.runs import SECRETS
from support.wandb_files import items, records, tracked_config
from wandb.proto.wandb_internal_pb2 import Record

from promcse_pl.run_folder import write_config
from promcse_pl.runs.lifecycle import run_job
from promcse_pl.tracking.wandb import SUMMARY, hide_folders, resolve_mode
from promcse_pl.training.module import PromcseModule
from promcse_pl.utils.errors import ConfigError, NonFiniteError


@pytest.fixture(scope="module")
def tracked(trained_run) -> list[Record]:
    return records(trained_run.folder)


def small_run(folder: Path, wandb_mode: str) -> tuple[dict, str]:
    printed = io.StringIO()
    return run_job(tracked_config(folder, wandb_mode), folder / "run", Console(file=printed)), printed.getvalue()


@pytest.fixture
def clean(tmp_path, monkeypatch) -> pytest.MonkeyPatch:
    """A home folder without a key, and no mode."""
    for name in (
        "WANDB_MODE",
        "WANDB_API_KEY",
        "WANDB_BASE_URL",
        "WANDB_IDENTITY_TOKEN_FILE",
        "NETRC",
        "WANDB_CONFIG_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


# --- what an offline run holds ---------------------------------------------------------------------------------------


def test_an_offline_run_holds_every_setting_and_its_own_names(tracked, trained_run):
    run = next(record.run for record in tracked if record.HasField("run"))
    config = items(run.config.update)
    sent = trained_run.config.to_dict()
    del sent["tracking"], sent["data"]["dir"], sent["data"]["cache_dir"]
    sent["data"]["dev"] = "dev.tsv"  # of a path the last part
    assert {name: value for name, value in config.items() if name != "_wandb"} == sent
    status = json.loads((trained_run.folder / "status.json").read_text())
    assert run.run_id == status["wandb_id"], "known before it began, for a resumed run"
    assert (run.job_type, run.entity) == ("train", "")
    assert (run.project, run.display_name, list(run.tags)) == ("test", "shared", ["short"])


def test_an_offline_run_holds_loss_parts_rate_gradient_norm_speed_and_dev_by_step(tracked):
    rows = [items(record.history.item) for record in tracked if record.HasField("history")]
    by_step: dict[int, dict[str, float]] = {}
    for row in rows:
        by_step.setdefault(int(row.get("step", -1)), {}).update(row)
    training = {"train/loss", "train/contrastive", "train/hinge", "train/gradient_norm", "train/lr"}
    speed = {"speed/rows_per_second", "speed/tokens_per_second", "speed/padding_share"}
    for step in range(1, 8):
        assert training | speed <= set(by_step[step]), step
    assert {step for step, row in by_step.items() if "dev/spearman" in row} == {2, 4, 6, 7}
    assert by_step[7]["train/lr"] == pytest.approx(0.1 / 7)


def test_the_history_of_wandb_is_the_local_history(tracked, trained_run):
    def numbers(rows) -> list[tuple[str, float]]:
        return [
            (name, value)
            for row in rows
            for name, value in row.items()
            if name.partition("/")[0] in ("train", "dev", "speed")
        ]

    local = [json.loads(line) for line in (trained_run.folder / "metrics.jsonl").read_text().splitlines()]
    there = [items(record.history.item) for record in tracked if record.HasField("history")]
    assert sorted(name for name, _ in numbers(there)) == sorted(name for name, _ in numbers(local))
    assert [value for _, value in sorted(numbers(there))] == pytest.approx(
        [value for _, value in sorted(numbers(local))]
    )


def test_the_summary_of_an_offline_run_holds_the_final_scores_and_the_table(tracked, trained_run):
    summary: dict = {}
    for record in tracked:
        if record.HasField("summary"):
            summary |= items(record.summary.update)
        if record.HasField("history"):
            summary |= items(record.history.item)
    assert summary["dev/spearman"] == trained_run.results["scores"]["adapter"]["dev"]
    for name in SUMMARY:
        assert summary.get(name) == trained_run.results[name]
    assert summary["results/_type"] == "table-file"
    (path,) = trained_run.folder.glob("wandb/offline-run-*/files/media/table/results_*.json")
    scores = trained_run.results["scores"]
    assert json.loads(path.read_text()) == {
        "columns": ["model", "dev"],
        "data": [["frozen encoder", scores["frozen encoder"]["dev"]], ["adapter", scores["adapter"]["dev"]]],
    }


def test_an_offline_run_is_closed_as_successful(tracked):
    exits = [record.exit.exit_code for record in tracked if record.HasField("exit")]
    assert exits == [0]


def test_no_secret_of_the_environment_is_in_any_file_of_the_run(tracked, trained_run):
    files = [path for path in trained_run.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        for name, secret in SECRETS.items():
            assert secret.encode() not in content, path
            assert name.encode() not in content, path
    assert not any(secret in trained_run.output for secret in SECRETS.values())


# --- which mode ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "setting", "mode"),
    [
        ("disabled", "online", "disabled"),
        ("offline", "online", "offline"),
        ("online", "disabled", "disabled"),
        ("dryrun", "online", "offline"),
        ("run", "auto", "online"),
        ("nonsense", "disabled", "disabled"),
        ("", "offline", "offline"),
        (None, "disabled", "disabled"),
        (None, "auto", "auto"),
    ],
)
def test_the_mode_of_the_environment_takes_precedence_except_over_disabled(environment, setting, mode, clean):
    if environment is not None:
        clean.setenv("WANDB_MODE", environment)
    assert resolve_mode(setting) == mode


def test_a_mode_that_does_not_exist_is_refused(clean):
    clean.setenv("WANDB_MODE", "nonsense")
    with pytest.raises(ConfigError, match="WANDB_MODE must be one of online, offline, disabled, got 'nonsense'"):
        resolve_mode("auto")


# --- trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_the_environment_decides_about_a_run_that_asks_for_online(mode, clean, tmp_path):
    clean.setenv("WANDB_MODE", mode)
    _, printed = small_run(tmp_path, "online")
    assert (tmp_path / "run/wandb").exists() == (mode == "offline")
    assert ("wandb sync" in printed) == (mode == "offline")


def test_a_run_without_scores_is_closed_too(clean, tmp_path):
    results, printed = small_run(tmp_path, "offline")
    assert results["scores"] == {}
    assert "warning" not in printed
    assert "wandb sync" in printed
    assert [record.exit.exit_code for record in records(tmp_path / "run") if record.HasField("exit")] == [0]


def test_a_run_that_fails_is_closed_as_failed_and_not_continued_by_the_next(clean, tmp_path):
    def broken(self, *_):
        raise NonFiniteError("broken on purpose")

    clean.setattr(PromcseModule, "on_train_batch_start", broken)
    with pytest.raises(NonFiniteError):
        small_run(tmp_path, "offline")
    assert [record.exit.exit_code for record in records(tmp_path / "run") if record.HasField("exit")] == [1]


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_makes_the_run_an_offline_one_after_some_seconds(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = write_config(tracked_config(tmp_path, "online"), tmp_path / "config.yaml")
    surroundings = {
        "HOME": str(tmp_path),
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",  # W&B reads it once per process
        "WANDB_API_KEY": "0" * 40,
    }
    before = (
        "import os, promcse_pl.tracking.wandb as tracking; assert tracking.START_SECONDS == 30; "
        f"tracking.START_SECONDS = 5; os.environ.pop('WANDB_MODE', None); os.environ.update({surroundings!r})"
    )
    begin = time.perf_counter()
    done = promcse(tmp_path / "log", "train", path, "--out", tmp_path / "run", before=before)
    assert time.perf_counter() - begin < 40
    assert done.code == 0, done.stderr
    assert "warning: W&B did not start online (" in done.stdout
    assert f"127.0.0.1:{port}" in done.stdout
    assert "wandb sync" in done.stdout, "the run is an offline one then"
    assert (tmp_path / "run/adapter/adapter.safetensors").is_file()
    assert "train/loss" in (tmp_path / "run/metrics.jsonl").read_text()
    assert "0" * 40 not in (tmp_path / "run/run.log").read_text()


def test_an_encoder_in_the_current_folder_is_a_path_and_not_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme/encoder").mkdir(parents=True)
    assert hide_folders({"model": {"path": "acme/encoder"}}) == {"model": {"path": "encoder"}}
    assert hide_folders("model.path=acme/encoder,model.path=acme/other") == "model.path=encoder,model.path=acme/other"


def test_of_a_path_with_a_single_slash_only_the_last_part_is_sent():
    sent = hide_folders(
        {
            "model": {"path": "owner/encoder"},
            "data": {"train": "acme/saved", "dev": "acme/devset"},
            "evaluation": {"tasks": ["sts", "acme/beir", "mteb:STS17"]},
        }
    )
    assert sent == {
        "model": {"path": "owner/encoder"},
        "data": {"train": "saved", "dev": "devset"},
        "evaluation": {"tasks": ["sts", "beir", "mteb:STS17"]},
    }
    assert hide_folders("data.train=acme/saved,model.path=owner/encoder,evaluation.tasks=[sts,acme/beir]") == (
        "data.train=saved,model.path=owner/encoder,evaluation.tasks=[sts,beir]"
    )
    assert hide_folders({"data": {"train": "/srv/acme,inc/x=1/[a].csv"}}) == {"data": {"train": "[a].csv"}}
    assert hide_folders("data.train='/srv/acme,inc/x.csv',loss.margin=0.2") == "data.train='x.csv',loss.margin=0.2"
    assert (hide_folders("acme/saved", "data.train"), hide_folders("acme/customers.csv")) == ("saved", "customers.csv")
