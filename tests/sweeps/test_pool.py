"""Pools with real processes, signals and kills; the tasks are small functions, since a run takes seconds to start."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.folders import ROOT
from support.sweep_jobs import files, small_config

from promcse_pl.config import SweepConfig
from promcse_pl.run_folder import write_config
from promcse_pl.sweeps.pool import check_gpus, slot_environments, visible_devices
from promcse_pl.utils.errors import ConfigError

HEAVY = ("torch._", "transformers.", "pytorch_lightning", "torchmetrics", "scipy", "promcse_pl.")
PARENT = """
import os, sys
from pathlib import Path
from promcse_pl.sweeps import pool
folder, parallel, jobs, job = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
pool.JOB_GRACE_SECONDS, pool.PRELOAD = 0.5 if "stubborn" in job else 15, (os.environ["PRELOAD"],)
tasks = (pool.Task(str(n), job[0], [str(n), *job[1:]], folder / f"{n}.out") for n in range(jobs))
lock = os.open(folder, os.O_RDONLY)
runner = pool.Pool(pool.LocalEngine(parallel, lock=lock, can_fork=os.environ["CAN_FORK"] == "1"))
runner.run(tasks, lambda running, code: print("ended", running.task.name, code, flush=True))
sys.exit(runner.exit_code or 0)
"""


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, f"not within 20 s: {what}"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


class Parent:
    """A process with a pool, in its own session like that of a terminal."""

    def __init__(
        self, folder: Path, parallel: int, jobs: int, *job: str, preload: str = "json", can_fork: bool = True
    ) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                PARENT,
                str(folder),
                str(parallel),
                str(jobs),
                *(job or ["support.scripted_jobs:patient"]),
            ],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}:{ROOT}/tests:{folder}",
                "PRELOAD": preload,
                "CAN_FORK": str(int(can_fork)),
            },
            stdout=subprocess.PIPE,
            stderr=(folder / "parent.err").open("wb"),
            text=True,
            start_new_session=True,
        )

    def began(self, name: int) -> int:
        path = self.folder / f"{name}.began"
        until(lambda: path.exists() and path.read_text(), f"{name} began")
        return int(path.read_text())

    def go(self, name: int) -> None:
        (self.folder / f"{name}.go").write_text("")

    def ctrl_c(self) -> None:
        """What a terminal does: every process of the foreground group gets it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def said(self) -> str:
        return (self.folder / "parent.err").read_text()

    def end(self) -> tuple[int, list[str]]:
        printed, _ = self.process.communicate(timeout=20)
        return self.process.returncode, printed.splitlines()


def test_tasks_run_in_parallel_slots_with_equal_shares_of_the_threads(tmp_path):
    parent = Parent(tmp_path, 2, 3)
    parent.began(0)
    parent.began(1)
    time.sleep(0.3)
    assert not (tmp_path / "2.began").exists()
    parent.go(1)
    parent.began(2)
    parent.go(2)
    parent.go(0)
    code, printed = parent.end()
    assert code == 0
    assert printed[0] == "ended 1 0"
    assert {*printed[1:]} == {"ended 0 0", "ended 2 0"}
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (tmp_path / "2.out").read_text() == f"threads {share} ['2'] \n"


def test_ctrl_c_once_waits_for_running_jobs_and_starts_no_more(tmp_path):
    parent = Parent(tmp_path, 1, 2)
    job = parent.began(0)
    parent.ctrl_c()
    time.sleep(0.3)
    assert alive(job)
    parent.go(0)
    assert parent.end() == (
        130,
        ["Ctrl-C: waiting for 1 running; press it again to stop them (they save first)", "ended 0 0"],
    )
    assert not (tmp_path / "1.began").exists()
    assert not (tmp_path / "0.saved").exists()


@pytest.mark.parametrize("can_fork", [True, False], ids=["forked", "new interpreter"])
def test_ctrl_c_twice_stops_running_tasks_and_waits_until_they_have_saved(can_fork, tmp_path):
    parent = Parent(tmp_path, 2, 3, can_fork=can_fork)
    parent.began(0)
    parent.began(1)
    parent.ctrl_c()
    time.sleep(0.3)
    parent.ctrl_c()
    code, printed = parent.end()
    assert code == 130
    assert {*printed[1:]} == {"ended 0 143", "ended 1 143"}
    assert (tmp_path / "0.saved").exists()
    assert (tmp_path / "1.saved").exists()


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.exhaustive)],
    ids=["TERM", "USR1"],
)
def test_sigterm_is_passed_on_and_waited_for(number, tmp_path):
    parent = Parent(tmp_path, 1, 2)
    parent.began(0)
    parent.process.send_signal(number)
    assert parent.end() == (143, ["ended 0 143"])
    assert (tmp_path / "0.saved").exists()
    assert not (tmp_path / "1.began").exists()


def test_a_task_that_does_not_stop_is_killed_in_the_end(tmp_path):
    parent = Parent(tmp_path, 1, 1, "support.scripted_jobs:patient", "stubborn")
    parent.began(0)
    parent.process.terminate()
    assert parent.end() == (143, ["ended 0 -9"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "can_fork",
    [True, pytest.param(False, marks=pytest.mark.exhaustive)],
    ids=["forked", "new interpreter"],
)
def test_a_killed_parent_leaves_no_orphan(can_fork, tmp_path):
    parent = Parent(tmp_path, 2, 3, "support.scripted_jobs:patient", "slowly", can_fork=can_fork)
    jobs = [parent.began(0), parent.began(1)]
    held = [path.resolve() for job in jobs for path in Path(f"/proc/{job}/fd").iterdir()]
    assert tmp_path not in held, "a job must not hold the sweep's lock"
    parent.process.kill()
    until(lambda: not any(map(alive, jobs)), "the jobs have ended")
    for job in (0, 1):
        assert (tmp_path / f"{job}.saved").read_text() == "1", "a second signal would have interrupted the save"
    assert not (tmp_path / "2.began").exists()
    parent.process.wait()


def test_a_killed_job_is_reported_and_the_others_run(tmp_path):
    parent = Parent(tmp_path, 2, 3)
    parent.began(0)
    os.kill(parent.began(1), signal.SIGKILL)
    parent.began(2)
    parent.go(0)
    parent.go(2)
    code, printed = parent.end()
    assert code == 0
    assert printed[0] == "ended 1 -9"


def test_ctrl_c_in_the_imports_starts_nothing(tmp_path):
    begun = tmp_path / "imports"
    (tmp_path / "slow_import.py").write_text(f"import time\nopen({str(begun)!r}, 'w').close()\ntime.sleep(60)\n")
    parent = Parent(tmp_path, 1, 2, preload="slow_import")
    until(begun.exists, "the imports have begun")
    parent.ctrl_c()
    assert parent.end()[0] == 130, "and 20 s are less than the imports take"
    assert not (tmp_path / "0.began").exists()


def test_output_of_an_import_is_ignored_and_a_failed_import_is_reported(tmp_path):
    (tmp_path / "chatty.py").write_text("print('a chatty import')\n")
    parent = Parent(tmp_path, 1, 1, "support.scripted_jobs:broken", preload="chatty")
    assert parent.end() == (0, ["ended 0 1"])
    parent = Parent(tmp_path, 1, 1, preload="not_there")
    assert parent.end()[0] == 1
    assert "could not be imported" in parent.said()
    assert "Try: pip install promcse_pl" in parent.said()


def test_a_process_that_cannot_be_started_is_reported_and_running_jobs_are_stopped(tmp_path):
    (tmp_path / "crowded.py").write_text(
        "import errno, os, time\n"
        "fork, left = os.fork, [1]\n"
        "def crowded():\n"
        "    if left and left.pop():\n"
        "        return fork()\n"
        "    while not os.path.exists('0.began'):\n"
        "        time.sleep(0.01)\n"
        "    raise OSError(errno.EAGAIN, '')\n"
        "os.fork = crowded\n"
    )
    parent = Parent(tmp_path, 2, 2, preload="crowded")
    code, _ = parent.end()
    assert code == 1
    assert (
        "a job's process cannot be started: Resource temporarily unavailable. Try: python run.py -m " in parent.said()
    )
    assert (tmp_path / "0.saved").exists()


def test_an_error_of_ours_in_a_task_is_in_its_output_and_the_next_one_runs(tmp_path):
    code, printed = Parent(tmp_path, 1, 2, "support.scripted_jobs:broken").end()
    assert code == 0
    assert printed == ["ended 0 1", "ended 1 1"]
    assert (tmp_path / "1.out").read_text().endswith("LookupError: broken 1\n")


@pytest.mark.slow
def test_a_job_finds_what_it_imports_already_imported_and_cuda_untouched(tmp_path):
    files(tmp_path)
    write_config(small_config(tmp_path, data={"max_length": 20}), tmp_path / "config.yaml")
    script = f"""
import importlib, sys, torch
from promcse_pl.sweeps.pool import PRELOAD
asked = []  # CUDA that was asked for anything cannot be used in a forked process
own = {{name: getattr(torch.cuda, name) for name in ("is_available", "device_count", "init")}}
for name in own: setattr(torch.cuda, name, lambda name=name: asked.append(name))
for name in PRELOAD: importlib.import_module(name)
for name in own: setattr(torch.cuda, name, own[name])
if asked: sys.exit(f"asked of CUDA: {{asked}}")
before = set(sys.modules)
from promcse_pl.cli.main import main
code = main(["train", "config.yaml", "--out", "run"])
late = sorted(name for name in set(sys.modules) - before if name.startswith({HEAVY}))
sys.exit(f"imported late: {{late}}" if late else code)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr


def test_jobs_of_several_processes_must_find_their_gpus(monkeypatch, tmp_path):
    files(tmp_path)
    config = small_config(tmp_path, trainer={"devices": 2, "device": "auto"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(ConfigError, match=r"need 4 GPUs, this machine has 3. Try: sweep.parallel=1"):
        check_gpus(config, SweepConfig(parallel=2))
    assert check_gpus(config, SweepConfig(parallel=1)) is config
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check_gpus(config, SweepConfig(parallel=2)) is config


def test_devices_are_shared_out_by_what_the_process_may_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,GPU-8a")
    assert visible_devices() == ["3", "5", "GPU-8a"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slot_environments(2)] == ["3", "5,GPU-8a"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slot_environments(4)] == ["3", "3", "5", "GPU-8a"]
    assert slot_environments(1) == [{}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_devices() == []
    assert all("CUDA_VISIBLE_DEVICES" not in slot for slot in slot_environments(2))
