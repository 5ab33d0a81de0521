"""`compose_config`: literal values, use inside of another Hydra application, and advice on paths as choices."""

import re
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase
from support.folders import ROOT

from promcse_pl.runs import api
from promcse_pl.runs.compose import TYPED, compose_config, recipe_note, typed_command
from promcse_pl.utils.errors import ConfigError


@pytest.mark.parametrize(
    "text", ["${oc.env:HOME}/x.csv", "${missing}", "\\${x}", "a\\\\${x} \\ ${y}\\", "it's, [1] {2}.csv"]
)
def test_values_are_literal(text):
    config = compose_config(["data=triplets"], {"data.train": text, "model.path": text})
    assert (config.data.train, config.model.path) == (text, text)


def test_a_hydra_application_can_compose_and_keeps_its_own_hydra(tmp_path):
    (tmp_path / "mine.yaml").write_text("size: 3\n")
    with initialize_config_dir(version_base="1.2", config_dir=str(tmp_path)):
        assert compose_config(["seed=7"], {}).seed == 7
        with pytest.raises(ConfigError):
            compose_config(["loss.margin=["], {})
        assert compose("mine", overrides=["size=4"]).size == 4
        assert str(VersionBase.instance().getbase()) == "1.2"
    assert not GlobalHydra.instance().is_initialized()
    assert compose_config([], {}).seed == 42
    assert not GlobalHydra.instance().is_initialized()


def test_a_path_as_the_choice_of_a_group_gets_the_setting_that_takes_it():
    for override, advice in (
        ("model=/tmp/enc", "model.path=/tmp/enc"),
        ("model=org/name", "model.path=org/name"),
        ("data=my.csv", "data=triplets data.train=my.csv"),
        ("data=/tmp/my.txt.gz", "data=sentences data.train=/tmp/my.txt.gz"),
    ):
        with pytest.raises(ConfigError) as caught:
            compose_config([override], {})
        assert str(caught.value) == f"{override} is not a choice. Try: python run.py {advice}"


@pytest.mark.parametrize("flags", [["--cfg=job", "--resolve"], ["--run"], ["--info=all"], ["--multirun"], []])
def test_the_command_of_a_sweep_has_no_other_mode(flags):
    token = TYPED.set(["--config", "x.yaml", *flags, "seed=1,2"])
    try:
        assert typed_command(sweep=True) == "python run.py -m --config x.yaml seed=1,2"
        assert typed_command("data.train=FILE").endswith("seed=1,2 data.train=FILE")
    finally:
        TYPED.reset(token)


def test_the_run_folder_of_python_is_named_as_that_of_the_command_line(monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls) -> datetime:  # type: ignore[override]
            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(api, "datetime", Clock)
    layout = yaml.safe_load((ROOT / "promcse_pl/conf/config.yaml").read_text())["hydra"]["run"]["dir"]
    for group, choice in (("model", "bert-base"), ("data", "nli")):
        layout = layout.replace(f"${{hydra:runtime.choices.{group}}}", choice)
    layout = re.sub(r"\$\{now:([^}]*)\}", r"\1", layout)
    assert api._new_folder("bert-base", "nli") == Path(f"{Clock.now():{layout}}")


def test_the_note_on_a_recipe_of_another_encoder_names_the_recipe_of_full_fine_tuning():
    rest = ["model=bert-base", "data.dir=d", "tuning=full"]
    config = compose_config(rest, {"model.path": "mine"})
    assert recipe_note(config, "bert-base") == (
        "optim.lr=5e-05 comes from the recipe full/supervised/bert-base for google-bert/bert-base-uncased; it is not "
        "tuned for mine"
    )
    assert recipe_note(compose_config([*rest, "optim.lr=0.5"], {"model.path": "mine"}), "bert-base") is None
    assert recipe_note(compose_config(rest, {}), "bert-base") is None
