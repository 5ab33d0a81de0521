"""Sweeps on a local Ray cluster: results, failures, killed jobs, pruning and stopping are the same as with local processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from support.folders import ROOT
from support.sweep_jobs import ROWS, SETTINGS, begin, files, run, small_config

import promcse_pl.sweeps.ray_engine as ray_engine_module
from promcse_pl.config import SweepConfig
from promcse_pl.run_folder import checkpoint_folders, read_status
from promcse_pl.sweeps.collect import read_sweep
from promcse_pl.sweeps.execute import run_sweep
from promcse_pl.sweeps.plan import Plan, SweepJob, write_plan, write_start
from promcse_pl.sweeps.pool import Task, check_gpus
from promcse_pl.sweeps.ray_engine import ray_engine
from promcse_pl.utils.errors import ConfigError

needs_ray = pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed")
CLUSTER = """
import sys
import ray
from promcse_pl.config import SweepConfig
from promcse_pl.sweeps.ray_engine import _check_resources, ray_engine
from promcse_pl.utils.errors import ConfigError
with ray_engine(SweepConfig(engine="ray"), None):
    try:
        _check_resources(ray, SweepConfig(engine="ray", job_gpus=64.0), 1)
    except ConfigError as error:
        print(error, flush=True)
    sys.stdin.read()
"""
"""Starts the cluster of a sweep with `sweep.address=null`, which ends with this process."""
SEARCH = """
import sys
from pathlib import Path
from support.sweep_jobs import small_config
from promcse_pl.config import SweepConfig
from promcse_pl.sweeps import search
here = Path.cwd()
search.Search._should_prune = lambda self, name: bool(search.dev_evaluations(self.folder / name))
trainer = {"max_steps": 5000, "epochs": 5000, "eval_every": 5, "device": "cpu", "precision": "float32"}
compose = lambda _: small_config(here, data={"dev": "holdout", "max_length": 16, "batch_size": 8}, trainer=trainer)
settings = SweepConfig(engine="ray", address=sys.argv[1], trials=1)
sys.exit(search.run_search(here / "searched", ["x"], {"seed": ["1", "2"]}, settings, compose, None))
"""
"""A search that prunes its job at the first dev evaluation."""


class Cluster:
    """A Ray cluster, and the folder in which its sweeps run. It is also the home folder, which contains Ray's token."""

    def __init__(self, here: Path) -> None:
        self.here = here
        self.process = self.start(CLUSTER, stdin=subprocess.PIPE)
        self.printed = [self.process.stdout.readline() for _ in range(3)]
        assert self.printed[0].startswith("Ray cluster "), self.process.communicate()
        self.address = self.printed[0].split()[2].rstrip(":")
        self.settings = ["sweep.engine=ray", f"sweep.address={self.address}"]

    def start(self, script: str, *arguments: str, **options: object) -> subprocess.Popen[str]:
        own = {"HOME": str(self.here), "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.Popen(command, cwd=self.here, env={**os.environ, **own}, text=True, **streams)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_worker_niceness", "0")  # by default, workers wait until other tests leave a core free
        cluster = Cluster(files(tmp_path_factory.mktemp("ray")))
        processes = psutil.Process(cluster.process.pid).children(recursive=True)
        yield cluster
    cluster.process.communicate("", timeout=60)
    left = psutil.wait_procs(processes, timeout=30)[1]
    assert not left, f"processes are left behind: {left}"


def until(condition: Callable[[], object], sweep: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert sweep.poll() is None, sweep.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@needs_ray
@pytest.mark.slow
def test_good_failing_and_killed_jobs_are_recorded_and_a_local_resume_has_the_adapter_of_an_unbroken_job(cluster):
    rows = [*ROWS, *ROWS, *ROWS[:20], "w5,only two"]  # the bad row is not read before the first job
    (cluster.here / "bad.csv").write_text("\n".join(["a,b,c", *rows]) + "\n")
    (cluster.here / "copy.csv").write_text((cluster.here / "train.csv").read_text())
    settings = [entry for entry in SETTINGS if not entry.startswith(("data.train=", "trainer.max_steps="))]
    more = ["data.train=copy.csv,bad.csv,train.csv", "trainer.max_steps=40", "trainer.save_every=10"]
    of_ray = ["sweep.parallel=2", "sweep.job_cpus=1", "hydra.sweep.dir=on_ray", *cluster.settings]
    process = begin(cluster.here, "-m", *more, *settings, *of_ray)
    sweep = cluster.here / "on_ray"
    until(lambda: checkpoint_folders(sweep / "0"), process)
    os.kill(read_status(sweep / "0").pid, signal.SIGKILL)
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 1, printed + errors
    assert "2 failed, 1 finished" in printed
    assert "; 2 in parallel, 1 thread per job\n" in printed
    assert read_status(sweep / "0").error.startswith("killed by SIGKILL")
    assert read_status(sweep / "1").error.startswith("DataError: ")
    code, printed, errors = run(cluster.here, "-m", "sweep.resume=on_ray", "sweep.engine=local", "sweep.parallel=1")
    assert (code, "2 finished, 1 failed" in printed) == (1, True), printed + errors
    assert "resuming after step" in (sweep / "0/run.log").read_text()
    resumed, unbroken = ((sweep / job / "adapter/adapter.safetensors").read_bytes() for job in "02")
    assert resumed == unbroken
    runs = {run.name: run for run in read_sweep(sweep).runs}
    assert (runs["0"].dev, runs["0"].precision) == (runs["2"].dev, runs["2"].precision)


@needs_ray
@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_search_on_ray_stops_a_poor_job_which_saves(cluster):
    process = cluster.start(SEARCH, cluster.address)
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 0, printed + errors
    assert "1 pruned" in printed
    status = read_status(cluster.here / "searched/0")
    assert (status.state, status.step > 0) == ("pruned", True)
    assert checkpoint_folders(cluster.here / "searched/0")


@needs_ray
@pytest.mark.slow
def test_a_job_that_no_node_can_run_is_announced_and_ends_with_the_sweep(cluster):
    assert "sweep.job_cpus=1 sweep.job_gpus=64 do not fit on a node of the Ray cluster" in cluster.printed[2]
    assert cluster.printed[2].endswith("Try: sweep.job_cpus=1 sweep.job_gpus=0\n")
    process = begin(cluster.here, "-m", *SETTINGS, *cluster.settings, "sweep.job_gpus=64", "hydra.sweep.dir=waiting")
    lines = [process.stdout.readline() for _ in range(4)]
    assert lines[1].startswith("warning: sweep.job_cpus=1 sweep.job_gpus=64 do not fit"), lines
    assert lines[3] == "job 0 starts\n"
    process.terminate()
    assert "job 0 stopped" in process.communicate(timeout=60)[0]
    assert process.returncode == 143


def test_a_missing_package_and_a_missing_cluster_are_errors_of_one_line(monkeypatch):
    if find_spec("ray"):
        settings = SweepConfig(engine="ray", address="127.0.0.1:1")
        message = r"sweep.address=127.0.0.1:1: cannot connect to a Ray cluster .*refused.* Try: ray start --head on "
        with pytest.raises(ConfigError, match=message), ray_engine(settings, None):
            pass
    monkeypatch.setitem(sys.modules, "ray", None)
    message = r"^this needs Ray. Try: pip install 'promcse_pl\[ray\]'$"
    with pytest.raises(ConfigError, match=message), ray_engine(SweepConfig(engine="ray"), None):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"job_cpus": 2},
            r"job_cpus=2 has no effect with sweep.engine=local. Try: sweep.engine=ray, or sweep.job_cpus=null",
        ),
        ({"engine": "submitit", "address": "auto"}, r"sweep.address=auto has no effect with sweep.engine=submitit"),
        ({"engine": "ray", "address": "ray://x:1"}, r"sweep.address must be auto, HOST:PORT or null, got 'ray://x:1'"),
        (
            {"engine": "ray", "job_gpus": 1.5},
            r"sweep.job_gpus above 1 must be a whole number, got 1.5. Try: sweep.job_gpus=2",
        ),
    ],
)
def test_settings_of_the_engine_without_effect_are_errors(settings, message):
    with pytest.raises(ConfigError, match=message):
        SweepConfig.from_dict(settings)


def test_a_job_on_ray_has_no_rank_of_the_command_that_started_ray(tmp_path, monkeypatch):
    given: dict[str, str] = {}
    monkeypatch.setattr(ray_engine_module, "start_process", lambda _, environment, **options: given.update(environment))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "KEPT"):
        monkeypatch.setenv(name, "4")
    task = Task("0", "promcse_pl.cli.main:main", [], Path("output.log"))
    ray_engine_module.JobActor().start(task, {"OMP_NUM_THREADS": "3"}, tmp_path)
    assert (given["KEPT"], given["OMP_NUM_THREADS"]) == ("4", "3")
    assert not [name for name in given if name.endswith(("RANK", "WORLD_SIZE")) or name.startswith("SLURM")]


def test_a_resumed_sweep_checks_the_gpus_of_its_jobs(tmp_path):
    config, plan = small_config(files(tmp_path), trainer={"devices": 2}), Plan(["seed=1"], [SweepJob("0", ["seed=1"])])
    (tmp_path / "sweep/0").mkdir(parents=True)
    write_start(tmp_path / "sweep", plan, plan.jobs[0], config)
    write_plan(tmp_path / "sweep", plan)
    settings = SweepConfig(engine="ray", job_gpus=1.0, resume="sweep")
    with pytest.raises(
        ConfigError, match=r"no job was started; job seed=1: sweep.job_gpus=1, but .* Try: sweep.job_gpus=2"
    ):
        run_sweep(tmp_path / "sweep", [], [], settings, lambda _: config, None)


def test_a_job_on_ray_needs_a_gpu_for_each_rank(tmp_path):
    files(tmp_path)
    for device, ranks, gpus, is_valid in (
        ("cpu", 2, None, True),
        ("auto", 2, None, True),
        ("auto", 1, 0.5, True),
        ("auto", 2, 1.0, False),
        ("cuda", 1, None, False),
        ("cuda", 2, 2.0, True),
    ):
        config = small_config(tmp_path, trainer={"devices": ranks, "device": device})
        settings = SweepConfig(engine="ray", job_gpus=gpus)
        if is_valid:
            assert check_gpus(config, settings) is config
            continue
        with pytest.raises(ConfigError, match=rf"trainer.devices={ranks} needs {ranks}. Try: sweep.job_gpus={ranks}"):
            check_gpus(config, settings)
