"""Runs with early stopping and other schedules: their records, and exact resume after an interruption."""

from pathlib import Path

import pytest
from support.runs import outcome, small_config, word_rows

from promcse_pl.config import Config
from promcse_pl.run_folder import read_history, read_status
from promcse_pl.runs import pipeline
from promcse_pl.runs.lifecycle import resume_job, run_job
from promcse_pl.training.callbacks import BestByDev
from promcse_pl.training.module import PromcseModule

REASON = "no better dev score in 2 evaluations since step 6"


class InterruptedRunError(Exception):
    """Raised in the middle of a run."""


def config_in(folder: Path, **sections: dict) -> Config:
    """Return the config of a run of 27 steps in three epochs, with dropout; evaluations and saves fall on different steps."""
    folder.mkdir(exist_ok=True)
    (folder / "train.csv").write_text("a,b,c\n" + "\n".join(word_rows(18)) + "\n")
    data = {"batch_size": 2, **sections["data"]}
    trainer = {"epochs": 3, "eval_every": 3, "save_every": 4, "log_every": 3, **sections["trainer"]}
    optim = {"schedule": "cosine", "warmup": 0.2, "weight_decay": 0.1}
    return small_config(folder, data=data, trainer=trainer, optim=optim)


def stopping(folder: Path) -> Config:
    return config_in(folder, data={"dev": "holdout"}, trainer={"patience": 2})


def interrupt(monkeypatch, config: Config, folder: Path, step: int | None) -> None:
    """Start a run and interrupt it at a step, or in the final evaluation."""

    def at_step(module, *arguments):
        if module.global_step == step:
            raise InterruptedRunError
        return training_step(module, *arguments)

    def at_end(*_):
        raise InterruptedRunError

    training_step = PromcseModule.training_step
    with monkeypatch.context() as patch:
        if step is None:
            patch.setattr(pipeline, "_evaluate", at_end)
        else:
            patch.setattr(PromcseModule, "training_step", at_step)
        with pytest.raises(InterruptedRunError):
            run_job(config, folder)


@pytest.fixture
def best_at_step_6(monkeypatch):
    monkeypatch.setattr(BestByDev, "_score", lambda _, module: -abs(module.global_step - 6) / 100)


@pytest.mark.usefixtures("best_at_step_6")
def test_an_early_stop_is_recorded_and_exact_on_resume(tmp_path, monkeypatch):
    config, straight = stopping(tmp_path), tmp_path / "straight"
    results = run_job(config, straight)
    assert (results["steps"], results["best_step"], results["stopped_early"]) == (12, 6, REASON)
    status = read_status(straight)
    assert (status.state, status.stopped_early, status.step, status.steps) == ("finished", REASON, 12, 27)
    log = (straight / "run.log").read_text()
    assert f"training stopped early after step 12 of 27: {REASON}" in log
    assert "step 12 of 27: loss" in log
    history = read_history(straight / "metrics.jsonl")
    assert [entry["step"] for entry in history if "dev/spearman" in entry] == [3, 6, 9, 12]
    for step in (5, 9, None):
        folder = tmp_path / f"interrupted{step}"
        interrupt(monkeypatch, config, folder, step)
        resume_job(folder)
        assert outcome(folder) == outcome(straight), step
        assert read_status(folder).stopped_early == REASON
    before = outcome(straight)
    assert resume_job(straight)["steps"] == 12
    assert outcome(straight) == before


def test_a_patience_without_effect_is_reported(tmp_path):
    config = config_in(tmp_path, data={"dev": "holdout"}, trainer={"patience": 8})
    run_job(config, tmp_path / "run")
    assert "trainer.patience=8 has no effect on a run of 9 dev evaluations" in (tmp_path / "run/run.log").read_text()
