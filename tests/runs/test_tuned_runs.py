"""Runs with each `tuning`: trained weights, comparison with the pre-trained encoder, bit-identical resume."""

import importlib.util
import json

import pytest
import pytorch_lightning as pl
from support.runs import outcome, run_small, small_config, word_rows

from promcse_pl import PromCSE
from promcse_pl.runs.lifecycle import resume_job, run_job
from promcse_pl.utils.errors import ConfigError

PLAIN = {"prompt": {"length": 0}, "model": {"head": "none"}}
SECTIONS = {
    "bias": {**PLAIN, "tuning": {"weights": "bias"}},
    "lora": {**PLAIN, "tuning": {"weights": "lora", "rank": 2, "alpha": 4.0}},
    "full": {**PLAIN, "tuning": {"weights": "full"}},
    "head": {"prompt": {"length": 0}, "model": {"head": "low_rank", "head_rank": 2}},
    "lora and prompt": {"tuning": {"weights": "lora", "rank": 2, "alpha": 4.0}},
    "none": {**PLAIN, "trainer": {"max_steps": 0}},
}


@pytest.fixture
def dev(tmp_path):
    rows = [row.split(",")[:2] for row in word_rows(8)]
    path = tmp_path / "dev.tsv"
    path.write_text("a\tb\tscore\n" + "".join(f"{a}\t{b}\t{number}\n" for number, (a, b) in enumerate(rows)))
    return {"data": {"dev": str(path)}}


def run(folder, name, dev, **sections):
    return run_small(folder, name, **dev, **{"optim": {"lr": 0.02}, **sections})


@pytest.mark.parametrize("name", SECTIONS)
def test_a_run_trains_evaluates_and_compares_with_the_encoder_before_training(name, tmp_path, dev):
    results, log = run(tmp_path, "run", dev, **SECTIONS[name])
    frozen, _ = run(tmp_path, "prompt", dev)
    found, expected = (each["evaluation"]["targets"]["frozen encoder"] for each in (results, frozen))
    assert found["members"][0]["sha256"] == expected["members"][0]["sha256"]
    assert found["scores"] == expected["scores"]
    adapter = results["evaluation"]["targets"]["adapter"]["members"][0]
    assert adapter["sha256"] == PromCSE.load(tmp_path / "run", device="cpu").adapter_hash()
    assert results["dev_spearman"] == pytest.approx(results["scores"]["adapter"]["dev"], abs=0.01)
    assert ("the adapter contains the whole encoder (0 MB)" in log) == (name == "full")
    if name == "none":
        assert (results["steps"], results["trained_parameters"]) == (0, 0)
        assert results["scores"]["adapter"] == results["scores"]["frozen encoder"]
        assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == [0]
    else:
        assert results["trained_parameters"] > 0
        assert adapter["sha256"] != found["members"][0]["sha256"]


class Fail(pl.Callback):
    """Fails after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("on purpose")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("bias", marks=pytest.mark.exhaustive),
        pytest.param("lora", marks=pytest.mark.exhaustive),
        "full",
        "lora and prompt",
    ],
)
def test_a_resumed_run_is_bit_identical(name, tmp_path, dev):
    sections = {**dev, "optim": {"lr": 0.02}, **SECTIONS[name], "trainer": {"epochs": 2, "save_every": 1}}
    sections["trainer"] |= {"eval_every": 2, "chunk_tokens": 20}
    config = small_config(tmp_path, **sections)
    run_job(config, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="on purpose"):
        run_job(config, tmp_path / "resumed", callbacks=[Fail(4)])
    resume_job(tmp_path / "resumed")
    whole, resumed = outcome(tmp_path / "whole"), outcome(tmp_path / "resumed")
    assert {key for key in whole if whole[key] != resumed[key]} == set()
    folders = [tmp_path / run / "adapter" / "encoder" / "model.safetensors" for run in ("whole", "resumed")]
    if name == "full":
        assert folders[0].read_bytes() == folders[1].read_bytes()


def test_nothing_to_train_is_refused_unless_it_is_asked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"leaves nothing to train. Try: .*trainer.max_steps=0"):
        small_config(tmp_path, **PLAIN)
    small_config(tmp_path, **SECTIONS["none"])


def test_a_missing_peft_is_named_before_torch_is_imported(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "peft" else find_spec(name, *rest)
    )
    with pytest.raises(ConfigError, match=r"tuning.weights=lora needs the package peft. Try: pip install"):
        run_small(tmp_path, **SECTIONS["lora"])


@pytest.mark.parametrize(("weights", "precision"), [("full", "float32"), ("bias", "float32"), ("none", "bfloat16")])
def test_auto_selects_float32_on_a_cpu_where_weights_train(weights, precision, tmp_path, monkeypatch):
    monkeypatch.setattr("promcse_pl.training.machine.measure_bfloat16_gain", lambda _device: 2.0)
    results, _ = run_small(tmp_path, tuning={"weights": weights}, trainer={"precision": "auto"})
    assert results["machine"]["precision"] == precision
