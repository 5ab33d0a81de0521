"""`promcse train`: config files, a user's own conf folder, and the earlier forms of the command."""

import os
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.plugins import Plugins
from support.folders import ROOT

from promcse_pl.cli.main import main
from promcse_pl.config import Config
from promcse_pl.config.parsing import REMOVED
from promcse_pl.run_folder import read_config, write_config
from promcse_pl.sweeps.execute import job_task
from promcse_pl.sweeps.plan import Plan, SweepJob, kept_overrides, write_plan, write_start
from promcse_pl.utils.paths import run_command

TEXTS = ["null", "", "ä, ü [1] {2} (3)", "${oc.env:HOME}", "a\\\\${x} \\ ${y}\\"]
MORE_TEXTS = ["1e3", "it's", 'a "b"', "back\\slash", "x=y", "~/folder", " padded ", "\\${x}"]


@pytest.fixture
def jobs(monkeypatch, tmp_path) -> list[tuple[Config, Path]]:
    """The configs and folders of the runs that the test starts; none of them is trained."""
    started: list[tuple[Config, Path]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "promcse_pl.runs.lifecycle.run_job", lambda config, folder, **_: started.append((config, folder))
    )
    return started


def composed(jobs: list[tuple[Config, Path]], *arguments: str) -> Config:
    """The config that a command line gives."""
    assert main(["train", *arguments]) == 0
    return jobs.pop()[0]


@pytest.mark.slow
@pytest.mark.parametrize("text", [*TEXTS, *(pytest.param(text, marks=pytest.mark.exhaustive) for text in MORE_TEXTS)])
def test_a_saved_config_gives_the_same_config_again(text, jobs):
    config = composed(jobs, "data=sentences", "data.train=x.txt", "optim.lr=1.5e-5", "trainer.max_steps=7")
    config.tracking.project, config.tracking.tags = text or "p", [text, "b"] if text else []
    write_config(config, "config.yaml")
    saved = read_config("config.yaml")
    assert composed(jobs, "config.yaml", "--out", "run") == saved
    with Path("config.yaml").open("a") as stream:
        stream.write("resolved:\n  trainer.device: cuda\n")
    assert composed(jobs, "--config", "config.yaml") == saved


def test_removed_settings_of_a_config_file_are_dropped_if_they_had_no_effect(jobs, capsys):
    config = composed(jobs, "data=demo")
    write_config(config, "config.yaml")
    tree = yaml.safe_load(Path("config.yaml").read_text())
    for key, without_effect in REMOVED.items():
        section, _, name = key.partition(".")
        tree[section][name] = without_effect
    Path("old.yaml").write_text(yaml.safe_dump(tree))
    assert composed(jobs, "--config", "old.yaml") == config
    tree["loss"]["symmetric"] = True
    Path("old.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", "--config", "old.yaml"]) == 2
    assert "loss.symmetric was removed, because" in capsys.readouterr().err


def test_prompts_of_a_config_file_are_kept_whatever_their_names_and_texts(jobs, tmp_path):
    prompts = {"a:b, c": TEXTS[-1], "${x}": "it's: ", "{retrieval}.query": "Instruct: a\nQuery: ", "s2p-query": ""}
    (tmp_path / "file.yaml").write_text(
        yaml.safe_dump({"model": {"prompts": prompts}, "data": {"prompts": ["x y", "", ""]}})
    )
    config = composed(jobs, "--config", "file.yaml")
    assert (config.model.prompts, config.data.prompts) == (prompts, ["x y", "", ""])
    write_config(config, "saved.yaml")
    assert composed(jobs, "--config", "saved.yaml") == config


@pytest.mark.parametrize("typed", ['{mine: "my text: "}', "{}"])
def test_prompts_on_the_command_line_replace_those_of_a_model_file(typed, jobs, tmp_path):
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/mine.yaml").write_text(
        "# @package _global_\nmodel: {path: x/y, prompts: {query: 'query: '}, pooling: auto, head: none}\n"
    )
    arguments = ["--config-dir", "conf", "model=mine"]
    assert composed(jobs, *arguments).model.prompts == {"query": "query: "}
    replaced = composed(jobs, *arguments, f"model.prompts={typed}").model.prompts
    assert replaced == yaml.safe_load(typed)


def test_overrides_win_over_a_config_file_wherever_they_stand(jobs):
    write_config(composed(jobs), "config.yaml")
    config = composed(jobs, "loss.margin=0.5", "--config", "config.yaml", "optim.lr=0.5")
    assert (config.loss.margin, config.optim.lr, config.prompt.length) == (0.5, 0.5, 10)


def test_a_partial_file_is_completed_by_the_defaults_of_conf(jobs, tmp_path):
    (tmp_path / "partial.yaml").write_text("loss:\n  margin: 0.3\noptim.lr: 1e-3\ntrainer:\n")
    expected = composed(jobs, "loss.margin=0.3", "optim.lr=0.001")
    assert composed(jobs, "--config", "partial.yaml") == expected


def test_a_partial_file_chooses_groups_by_name(jobs, tmp_path):
    (tmp_path / "partial.yaml").write_text("model: roberta-large\nloss: {margin: 0.3}\n")
    choice = ["data.dir=x", "loss.margin=0.3"]
    assert composed(jobs, "--config", "partial.yaml", "data.dir=x") == composed(jobs, "model=roberta-large", *choice)
    assert composed(jobs, "--config", "partial.yaml", "model=minilm", "data=demo").model.path.endswith("MiniLM-L6-v2")


def test_a_file_chooses_a_preset_in_a_subfolder(jobs, tmp_path):
    (tmp_path / "row.yaml").write_text("experiment: table1/prompt\nmodel: bert-base\n")
    config = composed(jobs, "--config", "row.yaml", "data.dir=x")
    assert config == composed(jobs, "experiment=table1/prompt", "model=bert-base", "data.dir=x")
    assert config.loss.hinge_weight == 0


def test_a_group_chosen_on_the_command_line_replaces_what_the_file_sets(jobs):
    write_config(composed(jobs), "config.yaml")
    config = composed(jobs, "--config", "config.yaml", "debug=fast", "model=bert-base", "data=demo", "optim.lr=0.2")
    assert (config.trainer.max_steps, config.data.max_rows, config.tracking.wandb) == (4, 64, "disabled")
    assert config.model.path == "google-bert/bert-base-uncased"
    assert (config.optim.lr, config.prompt.position_offset) == (0.2, 0), "the other settings are the file's"


@pytest.mark.parametrize("experiment", ["table1/full", "table1/unsup_prompt"])
def test_an_experiment_replaces_what_the_choices_in_its_file_set(experiment, jobs):
    write_config(composed(jobs, "prompt.dropout=0.3", "loss.temperature=0.3"), "config.yaml")
    chosen = [f"experiment={experiment}", "data.dir=x"]
    config, expected = composed(jobs, "--config", "config.yaml", *chosen), composed(jobs, *chosen)
    assert (config.data, config.tuning, config.evaluation) == (expected.data, expected.tuning, expected.evaluation)
    assert config.loss.hinge_weight == expected.loss.hinge_weight == 0
    assert config.loss.temperature == 0.3, "the other settings are the file's"
    if experiment == "table1/full":
        assert (config.optim, config.prompt) == (expected.optim, expected.prompt)


def test_a_model_replaces_no_data_of_a_config_file(jobs):
    write_config(composed(jobs, "data=triplets", "data.train=my.csv"), "config.yaml")
    config = composed(jobs, "--config", "config.yaml", "model=bert-base-uncased")
    assert (config.data.train, config.model.path) == ("my.csv", "google-bert/bert-base-uncased")


def test_a_run_of_a_config_file_gets_the_given_folder_or_one_named_after_the_file(jobs, tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 7\n")
    (tmp_path / "${x}'s file.yaml").write_text("seed: 7\n")
    assert main(["train", "--config", "mine.yaml", "--out", "new folder/run=1"]) == 0
    assert main(["train", "--config", "mine.yaml", "--out", "${x} it's"]) == 0
    assert jobs.pop()[1].relative_to(tmp_path) == Path("${x} it's")
    assert main(["train", "--config", "mine.yaml", "hydra.run.dir=other"]) == 0
    assert main(["train", "--config", "mine.yaml"]) == 0
    assert main(["train", "--config", "${x}'s file.yaml"]) == 0
    given, other, default, strange = (folder.relative_to(tmp_path) for _, folder in jobs)
    assert (given, other) == (Path("new folder/run=1"), Path("other"))
    assert default.parts[0] == "outputs"
    assert default.name.endswith("-mine")
    assert strange.name.endswith("-__x__s_file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("loss: {margn: 0.3}", "loss.margn is not a setting. Did you mean loss.margin?"),
        ("model: robeta", "model=robeta is not a choice. Did you mean model=roberta-base"),
        ("defaults: [data]", "defaults is not a setting."),
        ("- a", "file.yaml must contain settings such as seed: 1, got ['a']"),
        ("a: b: c", "cannot read the config file.yaml: mapping values are not allowed here"),
        ("seed: ${x}", "seed must be an integer, got '${x}'"),
        ("model: ../other", "file.yaml: model=../other is not a choice. Allowed: bert-base, "),
        ("model: [minilm, ../other]", "file.yaml: model=../other is not a choice. Allowed: bert-base, "),
        ("model: 'minilm,../other'", "file.yaml: model=minilm,../other is not a choice."),
        ("recipe: ../../../evil", "recipe=../../../evil is not a choice. Allowed: supervised/bert-base"),
        (
            "experiment: table1/prompteh",
            "experiment=table1/prompteh is not a choice. Did you mean experiment=table1/prompt_eh",
        ),
        ("experiment: ../model/minilm", "experiment=../model/minilm is not a choice. Allowed: no_hinge, "),
        ("model: &a {x: *a}", "file.yaml: a value contains itself."),
        ("evaluation: {tasks: &a [*a]}", "file.yaml: a value contains itself."),
        ("seed: 2026-11-27", "seed must be text, a number, true, false, null or a list of these, got 2026-11-27"),
        ("evaluation: {tasks: [{'a:1},${oc.env:HOME},{b': 2}]}", "evaluation.tasks must be text, a number, "),
        ("data: {columns: [['a', {b: 2}]]}", "data.columns must be text, a number, "),
        (
            "hydra: {callbacks: {x: {_target_: os.getcwd}}}",
            "file.yaml: hydra.callbacks.x._target_ is not a setting of a run or",
        ),
        (
            "hydra/launcher: x",
            "file.yaml: hydra/launcher is not a setting of a run or sweep. Try: it on the command line",
        ),
        ("+seed: 1", "file.yaml: +seed is not a setting of a run or sweep."),
        ("loss: {'margin=1 x': 1}", "file.yaml: loss.margin=1 x is not a setting of a run or sweep."),
        (None, "cannot read the config file.yaml: No such file or directory"),
    ],
)
def test_an_invalid_config_file_is_a_one_line_error_and_writes_nothing(content, message, jobs, tmp_path, capsys):
    if content:
        (tmp_path / "file.yaml").write_text(content)
    assert main(["train", "--config", "file.yaml"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1
    assert jobs == []
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("form", ["{0}", "[no_hinge, {0}]", "'no_hinge,{0}'"])
@pytest.mark.parametrize("group", ["experiment", "data", "recipe", "mode"])
def test_a_config_file_selects_no_file_outside_of_the_conf_folders(group, form, jobs, tmp_path, capsys):
    (tmp_path / "evil.yaml").write_text("# @package _global_\nseed: 666\n")
    conf = ROOT / "promcse_pl/conf"
    for target in (tmp_path / "evil", Path(os.path.relpath(tmp_path / "evil", conf / group))):
        (tmp_path / "file.yaml").write_text(f"{group}: {form.format(target)}\n")
        for flags in ([], ["-m"], ["hydra.searchpath=[file://.]"]):
            assert main(["train", "--config", "file.yaml", *flags]) == 2
            assert f"{target} is not a choice" in capsys.readouterr().err or form != "{0}"
    assert jobs == []


def test_a_config_file_without_its_option_is_named_in_the_message(jobs, capsys):
    assert main(["train", "mine.yaml"]) == 2
    assert capsys.readouterr().err == "error: mine.yaml is not KEY=VALUE. Try: python run.py --config mine.yaml\n"


def test_a_job_of_a_sweep_starts_in_a_folder_of_any_name(jobs, tmp_path):
    folder = tmp_path / "lr=0.1 ~"
    config = composed(jobs, "seed=7")
    write_start(folder, Plan([]), SweepJob("0", []), config, names=[])
    assert main(job_task(folder, SweepJob("0", [])).arguments) == 0
    ((started, run),) = jobs
    assert (started.seed, run) == (7, folder / "0")


@pytest.mark.parametrize("typed", ["~/x", "'~/x'"])
def test_the_home_folder_may_be_part_of_a_run_folder(typed, jobs, monkeypatch):
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    assert main(["train", f"hydra.run.dir={typed}"]) == 0
    assert jobs.pop()[1] == Path("home/x").absolute()


def test_a_path_without_its_setting_gets_the_setting(jobs, capsys):
    for argument, message in (
        ("my.csv", "my.csv is not KEY=VALUE. Try: python run.py data=triplets data.train=my.csv"),
        ("my.txt", "my.txt is not KEY=VALUE. Try: python run.py data=sentences data.train=my.txt"),
        ("data=my.csv", "data=my.csv is not a choice. Try: python run.py data=triplets data.train=my.csv"),
        ("model=/tmp/enc", "model=/tmp/enc is not a choice. Try: python run.py model.path=/tmp/enc"),
        ("model=org/name", "model=org/name is not a choice. Try: python run.py model.path=org/name"),
    ):
        assert main(["train", argument]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    assert jobs == []


def test_a_saved_config_says_how_to_repeat_the_run(jobs):
    config = composed(jobs)
    write_config(config, "config.yaml")
    comment = Path("config.yaml").read_text().splitlines()[0]
    assert comment == "# promcse train --config THIS_FILE repeats the run"
    assert composed(jobs, "--config", "config.yaml") == config


@pytest.fixture
def my_conf(tmp_path) -> Path:
    """A user's conf folder."""
    files = {
        "data/mine.yaml": "defaults: [/data/_base@data, _self_]\ndata: {kind: triplets, train: my.csv, dev: holdout}\n",
        "experiment/wide.yaml": "defaults: [override /model: mine]\nloss: {margin: 0.7}\n",
        "model/mine.yaml": "model: {path: ./encoder, revision: null, pooling: cls, head: none}\n",
        "ablation/short.yaml": "prompt: {length: 3}\n",
    }
    for name, content in files.items():
        (tmp_path / "my_conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "my_conf" / name).write_text(f"# @package _global_\n{content}")
    return tmp_path / "my_conf"


def test_a_users_conf_folder_adds_choices_and_groups(my_conf, jobs):
    config = composed(jobs, "data=mine", "--config-dir", "my_conf", "experiment=wide", "+ablation=short")
    assert (config.data.train, config.data.max_length, config.loss.margin) == ("my.csv", 32, 0.7)
    assert (config.model.path, config.prompt.length) == ("./encoder", 3)
    assert composed(jobs, "hydra.searchpath=[file://my_conf]", "experiment=wide").loss.margin == 0.7


def test_a_wrong_choice_names_those_of_the_users_conf_folder_too(my_conf, jobs, capsys):
    assert main(["train", "--config-dir=my_conf", "data=mime"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: data=mime is not a choice. Did you mean data=mine? Allowed: demo, "
    )
    assert main(["train", "--config-dir=nowhere"]) == 2
    assert "nowhere' not found. Try: python run.py --help" in capsys.readouterr().err


@pytest.fixture
def sweeps(monkeypatch) -> list[tuple[Path, list[str], list[list[str]]]]:
    """Folder, overrides and the jobs' overrides of the sweeps that the test starts; no job is started."""
    Plugins.instance()  # imports the sweeper
    started: list[tuple[Path, list[str], list[list[str]]]] = []
    sweeper = sys.modules["hydra_plugins.promcse_sweeper"]
    monkeypatch.setattr(sweeper, "run_sweep", lambda *arguments: started.append(arguments[:3]))
    return started


def test_a_sweep_of_a_users_conf_folder_can_be_resumed(my_conf, jobs, sweeps, tmp_path):
    given = ["--config-dir=my_conf", "experiment=wide", "seed=1,2"]
    assert main(["train", "-m", *given, "--out", "sweep"]) == 0
    write_plan(tmp_path / "sweep", Plan(kept_overrides(sweeps[0][1])))
    assert main(["train", "-m", "--config-dir=my_conf", "sweep.resume=sweep"]) == 0
    assert sweeps[1][1][:2] == ["experiment=wide", "seed=1,2"]


def test_the_config_file_of_a_sweep_is_part_of_its_overrides(jobs, sweeps, tmp_path):
    (tmp_path / "partial.yaml").write_text("data: triplets\nloss: {margin: 0.3}\n")
    assert main(["train", "-m", "--config=partial.yaml", "data.train=my.csv", "seed=1,2", "--out=sweep"]) == 0
    ((folder, _, combinations),) = sweeps
    assert folder == Path("sweep")
    expected = ["data=triplets", "loss.margin=0.3", "data.train=my.csv"]
    assert combinations == [[*expected, f"seed={seed}"] for seed in (1, 2)]


def test_tab_completion_answers_for_both_entry_points(monkeypatch, capsys):
    for program, line, arguments in (
        ("run.py", "python run.py loss.mar", ["train", "-sc", "query=bash"]),
        ("bin/promcse", "promcse train loss.mar", ["-sc", "query=bash"]),
    ):
        monkeypatch.setattr("sys.argv", [program])
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("PROMCSE_ENTRY_POINT", "")
        assert main(arguments) == 0
        assert capsys.readouterr().out == "loss.margin=\n"


def test_messages_name_the_command_that_was_used(monkeypatch, capsys):
    monkeypatch.setenv("PROMCSE_ENTRY_POINT", "")
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/promcse"])
    assert main(["train", "resume="]) == 2
    assert (
        capsys.readouterr().err == "error: resume= names no folder. Try: promcse train resume=outputs/DATE/TIME-NAME\n"
    )
    assert os.environ["PROMCSE_ENTRY_POINT"] == "promcse train", "the processes that a run starts name it too"
    assert run_command("seed=1") == "promcse train seed=1"


def test_help_shows_the_options_and_the_groups(capsys):
    assert main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "usage: python run.py [OPTIONS]",
        "--config FILE",
        "--config-dir FOLDER",
        "model: bert-base, ",
        "loss:\n",
    ):
        assert part in printed


def test_every_example_of_the_conf_folder_is_reached_through_the_package():
    files = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    assert files == {path.relative_to(ROOT / "promcse_pl/conf") for path in (ROOT / "promcse_pl/conf").rglob("*.yaml")}
    assert all(yaml.safe_load((ROOT / "conf" / path).read_text()) for path in files)
