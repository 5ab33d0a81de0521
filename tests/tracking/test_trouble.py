"""W&B unreachable, hanging, killed or out of disk: the run continues and finishes in time without orphans; resumed runs."""

import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support.wandb_files import items, records
from support.wandb_files import tracked_config as small_config
from support.wandb_server import Server, serving

from promcse_pl.config import TrackingConfig
from promcse_pl.run_folder import read_history, read_status, write_config
from promcse_pl.tracking import wandb as tracking
from promcse_pl.tracking.wandb import WandbRun, open_run
from promcse_pl.tracking.wandb_process import _is_known

KEY = "0123456789" * 4


@pytest.fixture
def online(tmp_path, monkeypatch, caplog) -> Iterator[pytest.MonkeyPatch]:
    """A key, and an empty home folder."""
    for name in ("WANDB_MODE", "NETRC", "WANDB_CONFIG_DIR", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracking, "STOP_SECONDS", 60)  # ends by itself, on a busy machine late
    caplog.set_level(logging.INFO, "promcse_pl")
    yield monkeypatch
    left = family()
    for process in left:
        process.kill()
    assert not left, "a process was left"


@pytest.fixture
def server(online) -> Iterator[Server]:
    with serving() as server:
        online.setenv("WANDB_BASE_URL", server.url)
        yield server


def begin(folder: Path, mode: str = "online", lines: int = 3) -> WandbRun:
    write_history(folder, lines)
    run = open_run(TrackingConfig(wandb=mode, project="test"), folder, "id1", job_type="train", name="n", config={})
    assert run is not None
    return run


def write_history(folder: Path, lines: int) -> None:
    folder.mkdir(exist_ok=True)
    entries = [json.dumps({"step": step, "train/loss": 1 / step}) + "\n" for step in range(1, lines + 1)]
    (folder / "metrics.jsonl").write_text("".join(entries))


def patiently(what, seconds: float = 120):
    """Return the first true value of a function."""
    patience = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < patience, "it did not come"
        time.sleep(0.05)
    return found


def family() -> list[psutil.Process]:
    """W&B's child processes of this process: the follower and its service."""
    mine = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "wandb" in " ".join(process.cmdline()):
                mine.append(process)
        except psutil.Error:
            continue
    return mine


def service() -> psutil.Process | None:
    return next((process for process in family() if "wandb-core" in process.name()), None)


def logged(folder: Path) -> list[int]:
    """Steps of the one offline run."""
    return [items(r.history.item)["step"] for r in records(folder) if r.HasField("history")]


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_a_server_that_accepts_and_never_answers_makes_the_run_an_offline_one(online, tmp_path, caplog):
    online.setattr(tracking, "START_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0), backlog=20) as silent:
        online.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.perf_counter()
        run = begin(tmp_path / "run")
        assert time.perf_counter() - started < 1.5, "the start is waited for"
        patiently(lambda: "W&B did not start online (" in caplog.text)
        run.finish()
    assert f"wandb login && wandb sync {tmp_path}/run/wandb/offline-run-" in caplog.text
    assert logged(tmp_path / "run") == [1, 2, 3]
    assert not family()


def test_a_server_that_hangs_at_the_end_is_abandoned_after_the_limit_with_the_upload_command(
    online, server, tmp_path, caplog
):
    online.setattr(tracking, "FINISH_SECONDS", 4)
    run = begin(tmp_path / "run")
    patiently(lambda: server.runs)
    patiently(lambda: "W&B run: http" in caplog.text)
    server.hangs.set()
    processes, started = family(), time.perf_counter()
    run.finish()
    assert 3 < time.perf_counter() - started < 7
    assert "W&B did not finish in 4 s; the run's folder is complete without it" in caplog.text
    assert f"wandb login && wandb sync --include-online {tmp_path}/run/wandb/run-" in caplog.text
    assert gone(processes)
    (kept,) = (tmp_path / "run/wandb").glob("run-*/run-id1.wandb")
    assert kept.stat().st_size > 0


def test_if_the_service_is_killed_in_training_the_whole_run_is_logged_offline(server, tmp_path, caplog):
    run = begin(tmp_path / "run")
    patiently(lambda: "W&B run: http" in caplog.text)
    service().kill()
    write_history(tmp_path / "run", 6)
    patiently(lambda: "W&B stopped online (" in caplog.text)
    run.finish()
    assert "did not finish" not in caplog.text
    assert "the W&B run is offline. To upload it: wandb login && wandb sync" in caplog.text
    assert logged(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


def test_a_service_that_is_stopped_offline_is_killed_after_the_limit(online, tmp_path, caplog):
    online.setattr(tracking, "FINISH_SECONDS", 4)
    run = begin(tmp_path / "run", "offline")
    patiently(lambda: run._directory)
    processes = family()
    service().suspend()
    run.finish()
    assert "W&B did not finish in 4 s" in caplog.text
    assert "to upload what W&B has of the run: wandb login && wandb sync" in caplog.text
    assert gone(processes)


@pytest.mark.slow
def test_the_processes_of_a_killed_run_end_by_themselves_even_if_the_service_hangs(online, tmp_path):
    code = f"""
import sys, time
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from pathlib import Path
import test_trouble
test_trouble.tracking.FINISH_SECONDS = 2
run = test_trouble.begin(Path({str(tmp_path / "run")!r}), "offline")
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    patiently(lambda: list((tmp_path / "run").glob("wandb/offline-run-*/run-id1.wandb")), 60)
    processes = family()
    service().suspend()
    process.kill()
    process.wait()
    assert len(processes) == 2
    patiently(lambda: gone(processes), 20)


@pytest.mark.slow
@pytest.mark.parametrize("free", [0, 24])
def test_a_full_disk_for_wandb_is_a_warning_and_the_run_is_complete(free, online, tmp_path, caplog):
    disk = tmp_path / "run/wandb"
    disk.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        (disk / "full").write_bytes(bytes((256 - free) * 1024))
        run = begin(tmp_path / "run", "offline", 2000)
        run.finish()
        assert "W&B stopped offline (OSError: [Errno 28] No space left on device)" in caplog.text
        assert "to upload what W&B has of the run: wandb login && wandb sync" in caplog.text
        assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2000
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_run_resumed_with_another_log_interval_sends_all_later_entries(server, tmp_path):
    begin(tmp_path / "run", lines=5).finish(1)
    (tmp_path / "run/metrics.jsonl").write_text(
        '{"step": 4, "train/loss": 1}\n{"step": 5, "dev/spearman": 2}\n{"step": 8, "train/loss": 1}\n'
    )
    run = open_run(TrackingConfig(wandb="online", project="test"), tmp_path / "run", "id1", name="n", config={})
    run.finish()
    sent = [entry for _, entry in sorted(server.runs["id1"]["history"].items())]
    assert [entry["step"] for entry in sent] == [1, 2, 3, 4, 5, 5, 8]
    assert sent[5]["dev/spearman"] == 2, "the run was killed during this evaluation"
    assert _is_known({"step": 5, "dev/spearman": 2}, sent[5])


def test_a_resumed_run_continues_its_wandb_run_with_every_entry_once(server, tmp_path, caplog):
    run = begin(tmp_path / "run", lines=5)
    run.finish(1)
    assert server.runs["id1"]["complete"] == 1
    write_history(tmp_path / "run", 3)  # the save was at step 3: 4 and 5 come again
    run = begin(tmp_path / "run", lines=8)
    run.finish(summary={"test/STS12": 70.5, "dev/spearman": 80.25})
    there = server.runs["id1"]
    assert [entry["step"] for _, entry in sorted(there["history"].items())] == [*range(1, 9)]
    assert there["complete"] == 0
    assert (there["summary"]["test/STS12"], there["summary"]["dev/spearman"]) == (70.5, 80.25)
    assert len(server.runs) == 1
    assert "WARNING" not in caplog.text
    assert "wandb sync" not in caplog.text, "nothing is left to upload"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "mode"),
    [
        ("environment", "online"),
        ("netrc", "online"),
        ("netrc and saved address", "online"),
        ("netrc of another server", "offline"),
        ("broken netrc", "offline"),
        ("nowhere", "offline"),
    ],
)
def test_auto_is_online_if_wandb_finds_a_key_of_the_server(source, mode, server, online, tmp_path, caplog):
    host = "api.wandb.ai" if "another" in source else server.url.removeprefix("http://")
    if source != "environment":
        online.delenv("WANDB_API_KEY")
    if "netrc" in source:
        entry = "machine" if "broken" in source else f"machine {host}\n  login user\n  password {KEY}\n"
        (tmp_path / ".netrc").write_text(entry)
        (tmp_path / ".netrc").chmod(0o600)
    if "saved" in source:
        online.delenv("WANDB_BASE_URL")
        (tmp_path / ".config/wandb").mkdir(parents=True)
        (tmp_path / ".config/wandb/settings").write_text(f"[default]\nbase_url = {server.url}\n")
    begin(tmp_path / "run", "auto").finish()
    assert bool(server.runs) == (mode == "online")
    assert bool(list(tmp_path.glob("run/wandb/offline-run-*"))) == (mode == "offline")
    assert ("the W&B run is offline. To upload it" in caplog.text) == (mode == "offline")
    assert "WARNING" not in caplog.text
    assert KEY not in caplog.text


SLOWLY = """
import sys, time
from promcse_pl.cli.main import main
from promcse_pl.training.module import PromcseModule
step = PromcseModule.training_step
PromcseModule.training_step = lambda *arguments: (time.sleep(0.3), step(*arguments))[1]
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_killed_and_resumed_job_is_one_complete_run_on_the_server(server, tmp_path):
    config, run = small_config(tmp_path, "online"), tmp_path / "run"
    trainer = replace(config.trainer, epochs=20, max_steps=20, save_every=1, log_every=1)
    write_config(replace(config, trainer=trainer), tmp_path / "config.yaml")
    train = [sys.executable, "-c", SLOWLY, "train"]
    killed = subprocess.Popen([*train, str(tmp_path / "config.yaml"), "--out", str(run)], stdout=subprocess.DEVNULL)
    patiently(lambda: server.runs and list(run.glob("checkpoints/step-*")), 60)
    killed.kill()
    killed.wait()
    resumed = subprocess.run([*train, "--resume", str(run)], capture_output=True, text=True, check=False, timeout=120)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step" in resumed.stdout
    assert list(server.runs) == [read_status(run).wandb_id]
    there = server.runs[read_status(run).wandb_id]
    sent = [entry["step"] for _, entry in sorted(there["history"].items())]
    assert sent == [entry["step"] for entry in read_history(run / "metrics.jsonl")]
    assert sent[-1] == 20
    assert there["complete"] == 0


def test_a_run_resumed_offline_is_one_folder_with_all_entries(online, tmp_path, caplog):
    run = begin(tmp_path / "run", "offline", lines=5)
    patiently(lambda: list((tmp_path / "run").glob("wandb/offline-run-*/run-id1.wandb")))
    os.kill(run._follower.pid, signal.SIGKILL)
    run.finish(1)
    time.sleep(1.1)  # W&B names folders by the second
    begin(tmp_path / "run", "offline", lines=8).finish()
    assert logged(tmp_path / "run") == [*range(1, 9)]


def test_the_printed_command_uploads_an_offline_run(server, tmp_path, caplog):
    begin(tmp_path / "run", "offline").finish(summary={"test/avg": 1.5})
    command = shlex.split(caplog.text.partition("wandb login && ")[2].partition("\n")[0])
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=180
    )
    assert done.returncode == 0, done.stderr
    there = server.runs["id1"]
    assert [entry["step"] for _, entry in sorted(there["history"].items())] == [1, 2, 3]
    assert there["summary"]["test/avg"] == 1.5
    assert KEY not in caplog.text + done.stdout + done.stderr


def test_tracking_imports_no_wandb():
    code = "import sys, promcse_pl.tracking.wandb, promcse_pl.sweeps.wandb_summary; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
