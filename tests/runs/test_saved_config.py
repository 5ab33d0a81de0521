"""config.yaml keeps the settings as typed, for new runs, and beside them what was resolved, for resumed runs."""

import json

import pytest
import yaml
from support.runs import outcome, run_small, small_config

from promcse_pl.evaluation import suite
from promcse_pl.evaluation.targets import find_targets
from promcse_pl.run_folder import read_config, read_resolved_config
from promcse_pl.runs.lifecycle import resume_job, run_job
from promcse_pl.training import machine
from promcse_pl.utils.errors import ConfigError, DataError

AUTO = {"precision": "auto", "device": "auto", "chunk_tokens": "auto"}


@pytest.fixture
def gain(monkeypatch):
    """Return a function that sets how many times as fast bfloat16 is on this machine."""

    def set_gain(value: float) -> None:
        monkeypatch.setattr(machine, "measure_bfloat16_gain", lambda _device: value)

    set_gain(2.0)
    return set_gain


@pytest.fixture
def failed_run(tmp_path, gain):
    """A run that was trained in bfloat16 and failed in its evaluation, with a checkpoint."""

    def fail(*_, **__):
        raise RuntimeError("on purpose")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "evaluate", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            run_small(tmp_path, "failed", trainer=AUTO, evaluation={"tasks": ["demo"]})
    return tmp_path / "failed"


def precision_of(results):
    return results["machine"]["precision"]


def test_the_saved_config_keeps_auto_and_records_the_resolved_values(tmp_path, gain):
    run_small(tmp_path, trainer=AUTO)
    raw = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert {name: raw["trainer"][name] for name in AUTO} == AUTO
    assert raw["resolved"] == {"trainer.device": "cpu", "trainer.precision": "bfloat16", "trainer.chunk_tokens": 512}
    config = read_resolved_config(tmp_path / "run/config.yaml").trainer
    assert (config.device, config.precision, config.chunk_tokens) == ("cpu", "bfloat16", 512)
    assert json.loads((tmp_path / "run/inputs.json").read_text())["config"]["trainer.precision"] == "bfloat16"


def test_values_that_were_typed_are_not_repeated_as_resolved(tmp_path):
    run_small(tmp_path, trainer={"chunk_tokens": None})
    assert "resolved" not in yaml.safe_load((tmp_path / "run/config.yaml").read_text())


def test_a_saved_config_repeats_the_run_on_a_machine_with_another_device_and_precision(tmp_path, gain, monkeypatch):
    run_small(tmp_path, trainer=AUTO)
    path = tmp_path / "run/config.yaml"
    path.write_text(path.read_text().replace("trainer.device: cpu", "trainer.device: cuda"))  # as on a GPU server
    gain(1.0)
    assert precision_of(run_job(read_config(path), tmp_path / "again")) == "float32"
    assert read_config(tmp_path / "again/config.yaml") == read_config(path)
    assert read_resolved_config(tmp_path / "again/config.yaml").trainer.device == "cpu"


def test_a_resumed_run_keeps_the_precision_that_was_resolved_at_its_start(failed_run, tmp_path, gain):
    straight, _ = run_small(tmp_path, "straight", trainer=AUTO, evaluation={"tasks": ["demo"]})
    gain(1.0)
    assert precision_of(resume_job(failed_run)) == "bfloat16"
    assert outcome(failed_run) == outcome(tmp_path / "straight")
    assert precision_of(straight) == "bfloat16"


def test_an_override_on_resume_replaces_a_resolved_value(failed_run):
    resume_job(failed_run, overrides=["trainer.chunk_tokens=64"])
    config = failed_run / "config.yaml"
    assert read_config(config).trainer.chunk_tokens == read_resolved_config(config).trainer.chunk_tokens == 64


def test_a_resolved_setting_that_was_edited_by_hand_is_reported(failed_run):
    path = failed_run / "config.yaml"
    path.write_text(path.read_text().replace("precision: auto", "precision: float32"))
    with pytest.raises(DataError, match=r"config\.yaml was changed since the run started: trainer\.precision"):
        resume_job(failed_run)


def test_a_config_of_an_earlier_version_with_resolved_values_only_is_resumed_and_repeated(failed_run, tmp_path, gain):
    path = failed_run / "config.yaml"
    old = read_resolved_config(path).to_dict()
    path.write_text(yaml.safe_dump(old))
    gain(1.0)
    assert precision_of(resume_job(failed_run)) == "bfloat16"
    assert precision_of(run_job(read_config(path), tmp_path / "again")) == "bfloat16"
    name = "adapter/adapter.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (failed_run / name).read_bytes()


@pytest.mark.parametrize("section", ["[1]", "{data.train: other.csv}", "text"])
def test_a_damaged_section_of_resolved_values_is_reported(section, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(small_config(tmp_path).to_dict()) + f"resolved: {section}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: the section resolved may only contain model\.revision, "):
        read_config(path)


def test_runs_over_seeds_are_compared_by_their_resolved_values(tmp_path, gain):
    for seed, factor in ((1, 2.0), (2, 2.0), (3, 1.0)):
        gain(factor)
        config = small_config(tmp_path, trainer=AUTO)
        config.seed = seed
        run_job(config, tmp_path / f"seeds/{seed}")
        if seed == 2:
            assert len(find_targets([str(tmp_path / "seeds")])[0].members) == 2
    with pytest.raises(DataError, match=r"must differ by the seed alone, but 1 and 3 differ in trainer\.precision"):
        find_targets([str(tmp_path / "seeds")])
