"""Whole sweeps from the command line: `python run.py -m`, with real jobs, failures and kills."""

import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from support.sweep_jobs import ROWS, SETTINGS, begin, files, run, small_config

from hydra_plugins.promcse_sweeper import check_launcher
from promcse_pl.cli import run as cli
from promcse_pl.cli.run import _with_launcher
from promcse_pl.run_folder import is_running, locked, read_config, read_status
from promcse_pl.sweeps import execute
from promcse_pl.sweeps.plan import SweepJob, add_job, missing_jobs, read_plan
from promcse_pl.utils.errors import ConfigError


def test_an_invalid_value_in_any_job_stops_the_sweep_before_the_first_job(tmp_path):
    files(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    code, printed, errors = run(tmp_path, "-m", "optim.lr=0.01,5", *SETTINGS)
    assert (code, printed) == (2, "")
    assert errors.startswith("error: no job was started; job optim.lr=5 ")
    assert errors.endswith(": optim.lr must be in (0, 1], got 5.0. Try: python run.py optim.lr=0.01\n")
    assert errors.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_two_sweeps_never_write_into_one_folder(tmp_path):
    files(tmp_path)
    with locked(tmp_path / "sweep"):
        code, printed, errors = run(tmp_path, "-m", "seed=1,2", *SETTINGS, "hydra.sweep.dir=sweep")
    assert (code, printed) == (2, "")
    assert errors.startswith("error: another process is running in sweep. Try: another folder")
    assert not (tmp_path / "sweep/0").exists()


@pytest.mark.slow
def test_a_killed_sweep_with_a_failed_job_is_resumed_with_the_missing_jobs_only(tmp_path):
    files(tmp_path)
    rows = [*ROWS, *ROWS, *ROWS[:20], "w5,only two"]  # the bad one behind those that are read before the first job
    (tmp_path / "bad.csv").write_text("\n".join(["a,b,c", *rows]) + "\n")
    long = [entry for entry in SETTINGS if not entry.startswith(("data.train=", "trainer.max_steps="))]
    sweep = tmp_path / "sweep"
    arguments = ["-m", "data.train=bad.csv,train.csv", *long, "trainer.max_steps=2000", "trainer.save_every=5"]
    parent = begin(tmp_path, *arguments, "hydra.sweep.dir=sweep")
    end = time.monotonic() + 100
    while not list(sweep.glob("1/checkpoints/step-*")):
        assert parent.poll() is None, parent.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    failed = read_status(sweep / "0")
    assert (failed.state, failed.error.partition(":")[0]) == ("failed", "DataError")
    assert "bad.csv" in failed.error
    parent.kill()
    printed = parent.communicate()[0]
    assert "job 0 failed, " in printed
    while is_running(sweep / "1"):
        assert time.monotonic() < end
        time.sleep(0.02)
    stopped = read_status(sweep / "1")
    assert stopped.state == "stopped"
    assert stopped.step > 0

    (tmp_path / "bad.csv").write_text("\n".join(["a,b,c", *ROWS[:20]]) + "\n")
    code, _, errors = run(tmp_path, *arguments[:-1], "trainer.save_every=6", "sweep.resume=sweep")
    assert code == 2
    assert "started with other overrides: trainer.save_every=6 is new; trainer.save_every=5 is missing" in errors
    resumed = begin(tmp_path, "-m", "sweep.resume=sweep", "sweep.parallel=2")
    while read_status(sweep / "1").state != "running" or read_status(sweep / "0").state != "running":
        assert resumed.poll() is None, resumed.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(resumed.pid, signal.SIGINT)
    time.sleep(0.3)
    os.killpg(resumed.pid, signal.SIGINT)
    printed, errors = resumed.communicate(timeout=60)
    assert resumed.returncode == 130, errors
    assert "to run the 2 unfinished jobs: python run.py -m sweep.resume=sweep" in printed
    assert "to view the results: promcse report sweep" in printed
    assert [job.folder for job in missing_jobs(sweep, read_plan(sweep))] == ["0", "1"]
    assert read_status(sweep / "1").state == "stopped"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_killed_sweep_can_be_resumed_until_all_jobs_are_finished(tmp_path):
    files(tmp_path)
    parent = begin(tmp_path, "-m", "seed=1,2", *SETTINGS, "hydra.sweep.dir=sweep")
    assert [parent.stdout.readline().split(",")[0] for _ in range(3)][2] == "job 0 finished"
    parent.kill()
    parent.communicate()
    first = (tmp_path / "sweep/0/results.json").stat().st_mtime_ns
    code, printed, errors = run(tmp_path, "-m", "sweep.resume=sweep")
    assert code == 0, errors
    assert "sweep sweep: 2 jobs, 1 to run" in printed
    assert "2 finished" in printed
    assert (tmp_path / "sweep/0/results.json").stat().st_mtime_ns == first
    code, printed, _ = run(tmp_path, "-m", "sweep.resume=sweep")
    assert code == 0
    assert "sweep sweep: 2 jobs, 0 to run" in printed
    assert "job 1 starts" not in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(["hydra/launcher=joblib"], id="joblib", marks=pytest.mark.exhaustive),
        pytest.param(["sweep.engine=submitit", "hydra/launcher=submitit_local"], id="submitit"),
    ],
)
def test_the_launchers_of_hydra_keep_working(launcher, tmp_path):
    files(tmp_path)
    code, printed, errors = run(tmp_path, "-m", *launcher, *SETTINGS, "hydra.sweep.dir=sweep")
    assert code == 0, errors
    assert read_status(tmp_path / "sweep/0").state == "finished"
    assert "1 finished" in printed
    assert json.loads((tmp_path / "sweep/0/results.json").read_text())["dev_spearman"] is not None


def test_a_job_of_another_sweeper_does_not_return_the_score_of_other_settings(tmp_path, monkeypatch):
    name = "tracking.name=x-${seed}"  # compared as typed
    add_job(tmp_path / "sweep", SweepJob("0", [name, "seed=1"]), small_config(tmp_path))
    monkeypatch.setattr(execute, "run_single", lambda _folder, job: float(job.overrides == [name, "seed=1"]))
    for seed in (1, 2):
        hydra = OmegaConf.create({"overrides": {"task": [name, f"seed={seed}"]}})
        monkeypatch.setattr(cli, "HydraConfig", SimpleNamespace(get=lambda hydra=hydra: hydra))
        if seed == 1:
            assert cli._run_apart({}, tmp_path / "sweep/0") == 1
        else:
            with pytest.raises(ConfigError, match=r"sweep/0 has a job with other settings\. Try: .*hydra\.sweep\.dir="):
                cli._run_apart({}, tmp_path / "sweep/0")


def test_sweep_parallel_is_not_silently_ignored_by_another_launcher(tmp_path):
    files(tmp_path)
    code, _, errors = run(tmp_path, "-m", "hydra/launcher=joblib", "sweep.parallel=2", *SETTINGS)
    assert code == 2
    assert errors.startswith(
        "error: sweep.parallel applies to sweep.engine=local and ray only. Try: hydra.launcher.array_parallelism (submitit), "
        "hydra.launcher.n_jobs (joblib)"
    )


def test_the_engine_submitit_selects_the_launcher_for_slurm(monkeypatch, tmp_path):
    given = ["sweep.engine=submitit", "hydra.launcher.partition=gpu"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^sweep.engine=submitit needs SLURM, but this machine has no srun. Try: "):
        _with_launcher(given)
    (tmp_path / "srun").touch(mode=0o755)
    assert _with_launcher(given) == [*given, "hydra/launcher=submitit_slurm"]
    for others in ([*given, "hydra/launcher=submitit_local"], [*given, "sweep.engine=local"], ["seed=1,2"]):
        assert _with_launcher(others) == others
    check_launcher("submitit", "submitit_local")
    check_launcher("local", "joblib")
    for engine, launcher, message in (
        ("submitit", "joblib", "sweep.engine=submitit needs hydra/launcher=submitit_slurm, got joblib"),
        ("ray", "joblib", "hydra/launcher=joblib has no effect with sweep.engine=ray"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_launcher(engine, launcher)


def test_a_sweep_json_with_a_folder_outside_the_sweep_is_rejected_and_the_folder_untouched(tmp_path):
    files(tmp_path)
    victim = tmp_path / "victim"
    (victim / ".git").mkdir(parents=True)
    (victim / "thesis.tex").write_text("years of work")
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    jobs = [{"folder": "../victim", "overrides": SETTINGS}]
    (sweep / "sweep.json").write_text(json.dumps({"format": 1, "overrides": SETTINGS, "jobs": jobs}))
    code, printed, errors = run(tmp_path, "-m", "sweep.resume=sweep")
    assert (code, printed) == (2, "")
    assert errors.startswith("error: sweep/sweep.json: the folder of a job must be a unique name without")
    assert "../victim" in errors
    assert sorted(path.name for path in victim.iterdir()) == [".git", "thesis.tex"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_resumed_sweep_keeps_threads_and_precision_of_its_first_start(tmp_path):
    files(tmp_path)
    settings = [entry for entry in SETTINGS if not entry.startswith("trainer.precision=")]
    arguments = ["-m", "trainer.precision=auto,bfloat16", *settings, "hydra.sweep.dir=sweep"]
    code, printed, errors = run(tmp_path, *arguments, "sweep.parallel=2")
    assert code == 0, errors
    plan = json.loads((tmp_path / "sweep/sweep.json").read_text())
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    precision = plan["settled"]["precision"]["cpu"]
    assert plan["settled"] == {"parallel": 2, "threads": share, "share": share, "precision": {"cpu": precision}}
    threads = f"{share} thread{'s' if share > 1 else ''} per job"
    assert f"sweep sweep: 2 jobs, 2 to run; 2 in parallel, {threads}, precision {precision}\n" in printed
    assert [read_config(tmp_path / f"sweep/{job}/start.yaml").trainer.precision for job in (0, 1)] == [
        precision,
        "bfloat16",
    ]

    # as if it had been settled on another machine, and both jobs were still to run
    other = {"float32": "bfloat16", "bfloat16": "float32"}[precision]
    plan["settled"]["precision"] = {"cpu": other}
    (tmp_path / "sweep/sweep.json").write_text(json.dumps(plan))
    for job in (0, 1):
        start = tmp_path / f"sweep/{job}/start.yaml"
        start.rename(tmp_path / "start.yaml")
        shutil.rmtree(start.parent)
        start.parent.mkdir()
        (tmp_path / "start.yaml").rename(start)
    code, printed, errors = run(tmp_path, "-m", "sweep.resume=sweep", "sweep.parallel=1")
    assert code == 0, errors
    assert (
        f"sweep sweep: 2 jobs, 2 to run; 1 in parallel, {threads} (as in the first start with sweep.parallel=2), precision "
        in printed
    )
    machine = json.loads((tmp_path / "sweep/0/results.json").read_text())["machine"]
    assert (machine["threads"], machine["precision"]) == (share, precision), "start.yaml holds the precision"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_sweep_of_an_older_version_is_resumed_as_it_was(tmp_path):
    files(tmp_path)
    code, _, errors = run(tmp_path, "-m", *SETTINGS, "hydra.sweep.dir=sweep")
    assert code == 0, errors
    plan = json.loads((tmp_path / "sweep/sweep.json").read_text())
    del plan["settled"]
    (tmp_path / "sweep/sweep.json").write_text(json.dumps(plan))
    (tmp_path / "sweep/0/status.json").unlink()
    (tmp_path / "sweep/0/results.json").unlink()
    code, printed, errors = run(tmp_path, "-m", "sweep.resume=sweep")
    assert code == 0, errors
    assert "1 finished" in printed
    assert "at a time" not in printed


def test_a_device_that_is_not_there_stops_a_sweep_before_its_first_job(tmp_path):
    files(tmp_path)
    settings = [entry for entry in SETTINGS if not entry.startswith(("trainer.precision=", "trainer.device="))]
    code, printed, errors = run(tmp_path, "-m", *settings, "trainer.device=mps", "hydra.sweep.dir=sweep")
    assert (code, printed) == (2, "")
    assert errors.startswith("error: trainer.precision=auto cannot be measured: there is no mps device on this machine")
    assert not (tmp_path / "sweep/sweep.json").exists()
