"""The plan in a sweep's folder, the overrides of a resume, and the recorded end of a job."""

import dataclasses
import json
import signal

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from support.sweep_jobs import files, small_config

from promcse_pl.config import SweepConfig, check_overrides
from promcse_pl.run_folder import Status, locked, read_config, read_status, write_status
from promcse_pl.sweeps.execute import record_end, wait_for_earlier
from promcse_pl.sweeps.plan import (
    PLAN,
    Plan,
    SharedSettings,
    SweepJob,
    add_job,
    check_new,
    missing_jobs,
    plan_jobs,
    read_plan,
    resumed_arguments,
    without_home,
    write_plan,
    write_start,
)
from promcse_pl.utils.errors import ConfigError, DataError

JOBS = [SweepJob("0", ["optim.lr=0.01", "seed=1"]), SweepJob("1", ["optim.lr=0.02", "seed=1"])]


@pytest.fixture
def sweep(tmp_path):
    folder = tmp_path / "a 'sweep"
    write_plan(folder, Plan(["optim.lr=0.01,0.02", "seed=1"], JOBS))
    return folder


def test_a_plan_round_trips_through_its_file_in_the_documented_format(sweep):
    assert read_plan(sweep) == Plan(["optim.lr=0.01,0.02", "seed=1"], JOBS)
    assert json.loads((sweep / PLAN).read_text()) == {
        "format": 1,
        "overrides": ["optim.lr=0.01,0.02", "seed=1"],
        "jobs": [{"folder": job.folder, "overrides": job.overrides} for job in JOBS],
    }
    assert read_plan(sweep).varying(JOBS[1]) == ["optim.lr=0.02"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 2}', "has format 2; this version reads 1"),
        ('{"format": 1, "jobs": []}', "is damaged .KeyError"),
        ("{", "cannot be read: Expecting property name"),
        ("[]", "is damaged"),
    ],
)
def test_a_plan_that_cannot_be_read_is_an_error(text, message, tmp_path):
    (tmp_path / PLAN).write_text(text)
    with pytest.raises(DataError, match=message):
        read_plan(tmp_path)


@pytest.mark.parametrize("repeated", [[], ["seed=1", "optim.lr=0.01,0.02"]], ids=["alone", "all repeated"])
def test_a_resume_takes_the_settings_from_the_folder_and_the_launching_from_the_command(repeated, sweep):
    given = ["-m", *repeated, "sweep.parallel=3", "hydra.sweep.dir=elsewhere", "hydra/launcher=joblib"]
    resumed = resumed_arguments([*given, f"sweep.resume={sweep}"])
    quoted = str(sweep).replace("'", r"\'")
    assert resumed == [
        "-m",
        "optim.lr=0.01,0.02",
        "seed=1",
        "sweep.parallel=3",
        "hydra/launcher=joblib",
        f"sweep.resume='{quoted}'",
        f"hydra.sweep.dir='{quoted}'",
    ]


def test_a_resume_with_another_engine_leaves_out_the_settings_of_the_first(sweep):
    of_ray = ["sweep.engine=ray", "sweep.address=auto", "sweep.job_cpus=2", "sweep.job_gpus=1"]
    write_plan(sweep, Plan(["seed=1,2", *of_ray], JOBS))
    for engine, kept in ((["sweep.engine=local"], []), (["sweep.engine=ray"], of_ray[1:]), ([], of_ray[1:])):
        resumed = resumed_arguments([*engine, f"sweep.resume={sweep}"])
        assert resumed[:-2] == ["-m", "seed=1,2", of_ray[0], *kept, *engine]


def test_a_resume_with_other_settings_names_them(sweep):
    error = r"started with other overrides: optim.lr=0.01,0.03 is new; optim.lr=0.01,0.02 is missing. Try: python run.py -m sweep"
    with pytest.raises(ConfigError, match=error):
        resumed_arguments(["optim.lr=0.01,0.03", "seed=1", f"sweep.resume={sweep}"])
    with pytest.raises(ConfigError, match=r"holds no sweep: it has no sweep.json"):
        resumed_arguments([f"sweep.resume={sweep.parent}"])


def test_a_job_that_is_not_valid_stops_all_and_is_named(tmp_path):
    files(tmp_path)

    def compose(overrides):
        return small_config(tmp_path, data={"train": overrides[0].partition("=")[2]})

    assert len(plan_jobs([[f"data.train={tmp_path}/train.csv", "seed=1"]], compose)) == 1
    with pytest.raises(
        DataError,
        match=r"no job was started; job data.train=/gone.csv seed=2: data.train=/gone.csv does not exist",
    ):
        plan_jobs([[f"data.train={tmp_path}/train.csv", "seed=1"], ["data.train=/gone.csv", "seed=2"]], compose)
    with pytest.raises(ConfigError, match="the sweep has no jobs"):
        plan_jobs([], compose)


def test_the_file_of_a_job_names_sweep_and_differences_for_the_tracker(sweep):
    config = small_config(sweep.parent, tracking={"tags": ["mine"]})
    write_start(sweep, read_plan(sweep), JOBS[1], config)
    tracking = read_config(sweep / "1/start.yaml").tracking
    assert (tracking.group, tracking.name, tracking.tags) == ("a 'sweep", "optim.lr=0.02", ["mine", "optim.lr=0.02"])
    config = small_config(sweep.parent, tracking={"group": "g", "name": "n"})
    write_start(sweep, read_plan(sweep), JOBS[1], config)
    tracking = read_config(sweep / "1/start.yaml").tracking
    assert (tracking.group, tracking.name) == ("g", "n")


def test_names_and_tags_of_long_paths_keep_their_last_part_and_fit(sweep):
    file = "data.train=/srv/clients/of/the/secret/merger/" + "documents-of-the-board/" * 4 + "train.csv"
    many = [file, *(f"loss.key{number}=0.123456789" for number in range(30))]
    write_start(sweep, read_plan(sweep), JOBS[1], small_config(sweep.parent), names=many)
    tracking = read_config(sweep / "1/start.yaml").tracking
    assert tracking.tags[0] == "data.train=train.csv"
    assert tracking.name.startswith("data.train=train.csv,loss.key0")
    assert len(tracking.name) == 128


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("data.train=/home/me/a.csv", "data.train='~/a.csv'"),
        ("data.train=/home/me/a.csv,/home/me/b.csv", "data.train='~/a.csv','~/b.csv'"),
        ("data.train=choice(/home/me/a.csv,x)", "data.train=choice('~/a.csv',x)"),
        ("evaluation.tasks=[sts,/home/me/a b.csv]", "evaluation.tasks=[sts,'~/a b.csv']"),
        ("data.dir='/home/me/my data'", "data.dir='~/my data'"),
        (r"data.train=/home/me/a\,b.csv", r"data.train=/home/me/a\,b.csv"),
        ("hydra.sweep.dir=/home/me/x", "hydra.sweep.dir=/home/me/x"),
        ("data.train=~/a.csv,b.csv", "data.train='~/a.csv',b.csv"),
        ("data.train=/home/meyer/a.csv", "data.train=/home/meyer/a.csv"),
        ("-m", "-m"),
    ],
)
def test_the_home_folder_leaves_an_override_before_hydra_reads_it(typed, kept, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert without_home(typed) == kept
    if not kept.startswith("-"):
        OverridesParser.create().parse_override(kept)


def test_jobs_of_another_sweeper_are_added_in_the_order_of_their_numbers(tmp_path):
    config = small_config(tmp_path)
    for number in (10, 2, 2):
        add_job(tmp_path / "sweep", SweepJob(str(number), [f"seed={number}"]), config)
    assert [job.folder for job in read_plan(tmp_path / "sweep").jobs] == ["2", "10"]


def test_a_folder_with_a_sweep_or_a_run_is_refused(sweep, tmp_path):
    with pytest.raises(
        ConfigError, match=r"already contains a sweep. Try: another folder, or python run.py -m sweep.resume="
    ):
        check_new(sweep, JOBS)
    (tmp_path / "runs/1").mkdir(parents=True)
    (tmp_path / "runs/1/config.yaml").write_text("")
    write_status(tmp_path / "runs/1", Status(state="running"))
    with pytest.raises(ConfigError, match=r"runs/1 already contains a run"):
        check_new(tmp_path / "runs", JOBS)


def test_missing_jobs_are_neither_finished_nor_pruned(tmp_path):
    plan = Plan(
        [], [SweepJob(state, []) for state in ("finished", "failed", "stopped", "running", "pruned", "absent", "torn")]
    )
    for job in plan.jobs[:5]:
        write_status(tmp_path / job.folder, Status(state=job.folder))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/status.json").write_text("{")
    assert [job.folder for job in missing_jobs(tmp_path, plan)] == ["failed", "stopped", "running", "absent", "torn"]


TRACEBACK = "Traceback (most recent call last):\n  File x\nImportError: no libfoo\n"


@pytest.mark.parametrize(
    ("code", "printed", "state", "error"),
    [
        (2, "loading\nerror: the encoder is gone\n", "failed", "the encoder is gone"),
        (1, TRACEBACK, "failed", TRACEBACK + "(exit code 1)"),
        (-signal.SIGSEGV, "", "failed", "(signal 11)"),
        (-signal.SIGKILL, "", "failed", "killed by SIGKILL: by the OOM killer when memory is full, "),
        (0, "hello\n", "failed", "hello\n(exit code 0)"),
        (143, "", "stopped", None),
        (-signal.SIGTERM, "", "stopped", None),
    ],
)
@pytest.mark.parametrize("before", [None, "running", "old failure"])
def test_a_job_that_could_not_say_how_it_ended_is_recorded(before, code, printed, state, error, tmp_path):
    if before:
        write_status(tmp_path, Status(state="running" if before == "running" else "failed", step=7, error="old"))
    began = read_status(tmp_path).updated + 1 if before == "old failure" else 0.0
    (tmp_path / "output.log").write_text(printed)
    status = record_end(tmp_path, code, began)
    assert status.state == read_status(tmp_path).state == state
    assert status.step == (7 if before else 0)
    assert status.error is None if error is None else status.error.startswith(error)


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("failed", 2), ("stopped", 143)])
def test_a_status_that_the_job_wrote_is_kept(state, code, tmp_path):
    write_status(tmp_path, Status(state=state, error="its own"))
    assert record_end(tmp_path, code, 0.0).error == "its own"
    assert read_status(tmp_path).state == state


def test_a_job_whose_earlier_process_still_saves_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("promcse_pl.sweeps.execute.JOB_GRACE_SECONDS", 0.3)
    with locked(tmp_path / "0"), pytest.raises(ConfigError, match=r"another process is running in .*0\. Try: wait"):
        wait_for_earlier(tmp_path, JOBS)
    wait_for_earlier(tmp_path, JOBS)


def test_settings_of_the_sweep_are_known_and_no_part_of_a_job():
    check_overrides(["sweep.parallel=2", "sweep.trials=3", "sweep=optuna"], {"sweep": ["optuna"]})
    with pytest.raises(ConfigError, match=r"sweep.paralel is not a setting. Did you mean sweep.parallel"):
        check_overrides(["sweep.paralel=2"], {"sweep": ["optuna"]})
    assert SweepConfig.from_dict({"parallel": 2}).trials is None


@pytest.mark.parametrize("name", ["../victim", "/abs", "a/b", "", ".", "..", None, 0])
def test_the_folder_of_a_job_is_never_a_path(name, sweep):
    raw = json.loads((sweep / PLAN).read_text())
    raw["jobs"][1]["folder"] = name
    (sweep / PLAN).write_text(json.dumps(raw))
    with pytest.raises(DataError, match="the folder of a job must be a unique name without") as caught:
        read_plan(sweep)
    assert str(sweep / PLAN) in str(caught.value)
    assert str(name) in str(caught.value)


def test_two_jobs_never_share_a_folder(sweep):
    write_plan(sweep, Plan([], [JOBS[0], JOBS[0]]))
    with pytest.raises(DataError, match="must be a unique name without"):
        read_plan(sweep)


def test_a_job_folder_that_is_a_link_is_read_but_never_written_to(sweep, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (sweep / "1").symlink_to(victim)
    (tmp_path / "link").symlink_to(victim)
    with pytest.raises(DataError, match="1 is a symbolic link"):
        missing_jobs(sweep, read_plan(sweep))
    with pytest.raises(ConfigError, match=r"link is a symbolic link, but a job needs a new or empty folder"):
        check_new(sweep.parent, [SweepJob("link", [])])
    assert list(victim.iterdir()) == []


def test_a_new_sweep_does_not_write_into_a_folder_with_other_content(tmp_path):
    (tmp_path / "0").mkdir()
    check_new(tmp_path, JOBS)
    (tmp_path / "0/start.yaml").touch()
    check_new(tmp_path, JOBS)
    (tmp_path / "0/thesis.tex").touch()
    with pytest.raises(
        ConfigError, match=r"/0 contains thesis\.tex\. Try: the same command with hydra\.sweep\.dir=NEW_FOLDER"
    ):
        check_new(tmp_path, JOBS)


def test_the_wandb_id_of_a_status_is_never_a_path(tmp_path):
    write_status(tmp_path, Status(state="stopped", wandb_id="../../x"))
    with pytest.raises(DataError, match="wandb_id must be a name without /"):
        read_status(tmp_path)


SHARED = SharedSettings(parallel=2, threads=3, share=3, precision={"cpu": "bfloat16"})


def test_shared_settings_are_saved_and_a_resume_keeps_the_number_of_jobs(sweep):
    write_plan(sweep, Plan(["seed=1,2"], JOBS, SHARED))
    assert read_plan(sweep).shared == SHARED
    assert "sweep.parallel=2" in resumed_arguments([f"sweep.resume={sweep}"])
    again = resumed_arguments(["sweep.parallel=5", f"sweep.resume={sweep}"])
    assert [entry for entry in again if entry.startswith("sweep.parallel=")] == ["sweep.parallel=5"]
    for launcher in ("hydra/launcher=joblib", "sweep.engine=submitit"):
        resumed = resumed_arguments([launcher, f"sweep.resume={sweep}"])
        assert not any("sweep.parallel" in entry for entry in resumed)


@pytest.mark.parametrize(
    "settled",
    [
        {},
        {"parallel": 0},
        {"threads": "8"},
        {"share": True},
        {"precision": {"cpu": "float64"}},
        {"precision": []},
        {"x": 1},
        [],
    ],
)
def test_shared_settings_are_validated_when_they_are_read(settled, sweep):
    raw = json.loads((sweep / PLAN).read_text())
    whole = dataclasses.asdict(SHARED)
    raw["settled"] = {**whole, **settled} if settled and isinstance(settled, dict) else settled
    (sweep / PLAN).write_text(json.dumps(raw))
    with pytest.raises(DataError, match="is damaged"):
        read_plan(sweep)


def test_the_shared_precision_applies_to_jobs_with_precision_auto(tmp_path):
    files(tmp_path)
    for given, device, becomes in (
        ("auto", "cpu", "bfloat16"),
        ("float32", "cpu", "float32"),
        ("auto", "cuda", "auto"),
    ):
        config = small_config(tmp_path, trainer={"precision": given, "device": device})
        assert SHARED.apply(config).trainer.precision == becomes


@pytest.mark.parametrize(
    ("weights", "becomes"), [("none", "bfloat16"), ("lora", "bfloat16"), ("full", "auto"), ("bias", "auto")]
)
def test_jobs_that_train_weights_of_the_encoder_do_not_get_the_shared_precision(weights, becomes, tmp_path):
    files(tmp_path)
    tuning = {"weights": weights, **({"rank": 2, "alpha": 4.0} if weights == "lora" else {})}
    config = small_config(tmp_path, trainer={"precision": "auto", "device": "cpu"}, tuning=tuning)
    assert SHARED.apply(config).trainer.precision == becomes
