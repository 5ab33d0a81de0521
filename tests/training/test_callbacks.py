"""Selection of the best step, early stopping, and measurement of the speed."""

import json

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from support.encoders import small_backbone, small_tokenizer

from promcse_pl.config import DataConfig, LossConfig, OptimConfig
from promcse_pl.data.module import PromcseDataModule
from promcse_pl.data.pairs import ScoredPairs
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.training import callbacks
from promcse_pl.training.callbacks import BestByDev, History
from promcse_pl.training.module import PromcseModule
from promcse_pl.utils.errors import DataError

PAIRS = ScoredPairs.of("dev", [("w5 w6", "w7", 1.0), ("w8", "w9 w10", 0.0), ("w11", "w12", 0.5)])


def train(tmp_path, steps: int, *watching: pl.Callback, loggers: bool | list = False) -> PromcseModule:
    rows = [f"w{5 + row} w7,w{6 + row} w8,w{40 + row}" for row in range(10)]
    (tmp_path / "rows.csv").write_text("a,b,c\n" + "\n".join(rows) + "\n")
    config = DataConfig(
        kind="triplets", train=str(tmp_path / "rows.csv"), batch_size=4, cache_dir=str(tmp_path / "cache")
    )
    data = PromcseDataModule(config, small_tokenizer(), longest_input=32, seed=0)
    torch.manual_seed(5)
    encoder = PromptEncoder(small_backbone(), length=4, head="mlp")
    module = PromcseModule(encoder, loss=LossConfig(), optim=OptimConfig(), total_steps=steps)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(watching),
        logger=loggers,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    return module


@pytest.mark.parametrize(
    ("scores", "best"),
    [([0.1, 0.4, 0.4, 0.3], 2), ([0.5, 0.4, 0.3, 0.2], 1), ([0.1, 0.2, 0.3, 0.4], 4), ([-0.5, -0.6, -0.4, -0.4], 3)],
)
def test_the_strictly_better_step_is_kept_and_restored_at_the_end(scores, best, tmp_path, monkeypatch):
    states = []

    def scripted(model, dev):
        states.append({name: tensor.clone() for name, tensor in model.encoder.state_dict().items()})
        return scores[len(states) - 1]

    monkeypatch.setattr(callbacks, "score_dev", scripted)
    watch = BestByDev(PAIRS, small_tokenizer(), every=1)
    module = train(tmp_path, 4, watch)
    assert (watch.best_step, watch.best_score) == (best, scores[best - 1])
    assert watch.history == list(enumerate(scores, start=1))
    assert all(torch.equal(tensor, states[best - 1][name]) for name, tensor in module.encoder.state_dict().items())
    others = [state for step, state in enumerate(states, start=1) if step != best]
    assert not any(torch.equal(state["head.dense.weight"], states[best - 1]["head.dense.weight"]) for state in others)


@pytest.mark.parametrize(
    ("every", "steps", "evaluated"), [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (3, 6, [3, 6]), (100, 2, [2])]
)
def test_the_dev_set_is_evaluated_every_n_steps_and_at_the_last_step(every, steps, evaluated, tmp_path):
    watch = BestByDev(PAIRS, small_tokenizer(), every=every)
    train(tmp_path, steps, watch)
    assert [step for step, _ in watch.history] == evaluated


def test_a_dev_evaluation_changes_no_random_state_and_no_training_mode(tmp_path):
    evaluated = train(tmp_path, 3, BestByDev(PAIRS, small_tokenizer(), every=1))
    state = torch.random.get_rng_state()
    without = train(tmp_path, 3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert evaluated.encoder.training == without.encoder.training


class States(pl.Callback):
    """Keeps the trained tensors after every step."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.after.append({name: tensor.clone() for name, tensor in pl_module.encoder.state_dict().items()})


def equals(module: PromcseModule, expected: dict[str, torch.Tensor]) -> bool:
    tensors = module.encoder.state_dict()
    return all(torch.allclose(tensors[name].double(), tensor.double(), atol=1e-7) for name, tensor in expected.items())


def script(monkeypatch, scores: list[float]) -> None:
    given = iter(scores)
    monkeypatch.setattr(callbacks, "score_dev", lambda _, dev: next(given))


@pytest.mark.parametrize(
    ("scores", "patience", "last", "best"),
    [
        ([0.1, 0.4, 0.3, 0.4, 0.9, 0.9], 2, 4, 2),
        ([0.5, 0.4, 0.9, 0.9, 0.9, 0.9], 1, 2, 1),
        ([0.5, 0.4, 0.6, 0.5, 0.7, 0.6], 2, None, 5),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.4], 1, None, 5),  # the last step is not an early stop
        ([0.5, 0.4, 0.3, 0.2, 0.1, 0.0], None, None, 1),
    ],
)
def test_training_stops_when_the_patience_is_exhausted(scores, patience, last, best, tmp_path, monkeypatch):
    script(monkeypatch, scores)
    states, watch = States(), BestByDev(PAIRS, small_tokenizer(), every=1, patience=patience)
    module = train(tmp_path, len(scores), watch, states)
    assert len(states.after) == len(watch.history) == (last or len(scores))
    reason = f"no better dev score in {patience} evaluations since step {best}"
    assert watch.stopped_early == (reason if last else None)
    assert watch.best_step == best
    assert equals(module, states.after[best - 1])


def test_a_step_without_a_dev_score_after_the_best_one_counts_as_not_better(tmp_path, monkeypatch, caplog):
    def collapse(model, _):
        if steps.pop(0):
            return 0.3
        raise DataError("all 3 similarities equal 1.0: a correlation is not defined")

    monkeypatch.setattr(callbacks, "score_dev", collapse)
    steps, watch = [True, False, False, True], BestByDev(PAIRS, small_tokenizer(), every=1, patience=2)
    states = States()
    with caplog.at_level("WARNING", "promcse_pl"):
        module = train(tmp_path, 4, watch, states)
    assert (watch.best_step, [step for step, _ in watch.history]) == (1, [1, 2, 3])
    assert watch.stopped_early == "no better dev score in 2 evaluations since step 1"
    assert equals(module, states.after[0])
    assert "no dev score at step 2: all 3 similarities equal 1.0" in caplog.text
    steps = [False]
    with pytest.raises(DataError, match=r"^no dev score at step 1: all 3 .* Try: a new run with a smaller optim.lr$"):
        train(tmp_path, 1, BestByDev(PAIRS, small_tokenizer(), every=1))


def test_the_history_counts_rows_and_tokens_and_leaves_the_ragged_batch_in(tmp_path):
    watch = History(1, None)
    train(tmp_path, 3, watch)
    assert watch.total_rows == 10
    assert watch.total_seconds > 0


class StopAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("killed on purpose")


def test_an_interrupted_run_has_its_best_adapter_on_disk(tmp_path, monkeypatch):
    scores = iter([0.1, 0.4, 0.3])
    monkeypatch.setattr(callbacks, "score_dev", lambda _, dev: next(scores))
    watch = BestByDev(PAIRS, small_tokenizer(), every=1, save_to=tmp_path / "adapter")
    with pytest.raises(RuntimeError, match="on purpose"):
        train(tmp_path, 4, watch, StopAt(3))
    stored = load_file(tmp_path / "adapter/adapter.safetensors")
    assert stored.keys() == watch._best.keys()
    assert all(torch.equal(tensor, watch._best[name]) for name, tensor in stored.items())
    assert json.loads((tmp_path / "adapter/adapter.json").read_text())["training"] == {
        "best_step": 2,
        "dev_spearman": 40.0,
    }
