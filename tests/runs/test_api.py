"""`promcse_pl.train`: files and rows in memory, callbacks and loggers, and what is in the run folder."""

import doctest
import inspect
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from support.encoders import save_small_encoder
from support.runs import word_rows

import promcse_pl
from promcse_pl.data.demo import demo_pairs
from promcse_pl.evaluation import suite
from promcse_pl.run_folder import read_config, read_history, read_status
from promcse_pl.runs import api
from promcse_pl.runs.lifecycle import resume_job, run_job
from promcse_pl.utils.errors import ConfigError, DataError

SETTINGS = [
    "model.pooling=cls",
    "prompt.length=4",
    "data.dev=null",
    "data.batch_size=4",
    "trainer.epochs=1",
    "trainer.log_every=1",
    "trainer.precision=float32",
    "trainer.device=cpu",
    "tracking=local",
]
ROWS = [tuple(row.split(",")) for row in word_rows(10)]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Return `promcse_pl.train` with a small encoder and settings for a run of 3 steps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    encoder = save_small_encoder(tmp_path / "encoder")

    def small_train(data, *overrides, **options):
        options = {"folder": tmp_path / "run", **options}
        return promcse_pl.train(data, model=encoder, overrides=[*SETTINGS, *overrides], **options)

    return small_train


def test_rows_in_memory_train_the_adapter_that_a_file_of_them_does(train, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("sent0,sent1,hard_neg\n" + "".join(",".join(row) + "\n" for row in ROWS))
    in_memory, from_file = train(ROWS), train(path, folder=tmp_path / "file")
    assert in_memory.encode(["w5 w6"]).shape == (1, 16)
    assert in_memory.adapter_hash() == from_file.adapter_hash()


def test_rows_in_memory_do_not_overwrite_other_rows(train, tmp_path):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/data.jsonl"
    path.write_text("years of work")
    with pytest.raises(
        ConfigError, match=r"run/data\.jsonl has other rows and is not overwritten\. Try: another folder"
    ):
        train(ROWS)
    assert path.read_text() == "years of work"


def test_a_file_of_the_same_rows_remains_if_the_run_does_not_start(train, tmp_path):
    train(ROWS)
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "run/data.jsonl", tmp_path / "other")
    with pytest.raises(DataError, match=r"data\.dev=missing\.csv does not exist"):
        train(ROWS, "data.dev=missing.csv", folder=tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["data.jsonl"]


def test_the_config_of_rows_in_memory_repeats_the_run(train, tmp_path):
    train(ROWS)
    config = read_config(tmp_path / "run/config.yaml")
    assert config.data.train == str(tmp_path / "run/data.jsonl")
    assert json.loads((tmp_path / "run/data.jsonl").read_text().splitlines()[0])["anchor"] == ROWS[0][0]
    run_job(config, tmp_path / "again")
    name = "adapter/adapter.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_a_run_on_rows_in_memory_is_resumed(train, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(suite, "evaluate", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            train(ROWS, "evaluation.tasks=[demo]")
    assert resume_job(tmp_path / "run")["rows"] == 10


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([row[0] for row in ROWS], "sentences"),
        ([{"text": row[0]} for row in ROWS], "sentences"),
        ([row[:2] for row in ROWS], "pairs"),
        ((list(row) for row in ROWS), "triplets"),
        ([{"negative": c, "anchor": a, "positive": b} for a, b, c in ROWS], "triplets"),
    ],
    ids=["texts", "text dictionaries", "pairs", "generator", "dictionaries"],
)
def test_rows_of_one_to_three_texts_are_trained_as_their_kind(rows, kind, train, tmp_path):
    train(rows, "trainer.max_steps=1")
    config = read_config(tmp_path / "run/config.yaml")
    assert config.data.kind == kind
    first = json.loads((tmp_path / "run/data.jsonl").read_text().splitlines()[0])
    assert list(first.values()) == list(ROWS[0][: len(first)])


def test_the_kind_of_a_file_can_be_overridden_and_a_text_file_has_sentences(train, tmp_path):
    pairs, sentences = tmp_path / "it's a file, of = pairs.csv", tmp_path / "sentences.txt"
    pairs.write_text("".join(",".join(row[:2]) + "\n" for row in ["ab", *ROWS]))
    sentences.write_text("".join(row[0] + "\n" for row in ROWS))
    train(pairs, "data=pairs", "trainer.max_steps=1")
    train(str(sentences), "trainer.max_steps=1", folder=tmp_path / "sentences")
    assert read_config(tmp_path / "run/config.yaml").data.train == str(pairs)
    assert read_config(tmp_path / "sentences/config.yaml").data.kind == "sentences"


class Count(pl.Callback):
    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, *_):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}


def test_callbacks_and_loggers_are_passed_to_the_trainer(train, tmp_path):
    count, logger = Count(), CSVLogger(tmp_path / "csv", name="", version="")
    train(ROWS, callbacks=[count], loggers=[logger])
    assert count.steps == 3
    header, *lines = (tmp_path / "csv/metrics.csv").read_text().splitlines()
    assert "train/loss" in header
    assert len(lines) == 3
    assert (tmp_path / "run/metrics.jsonl").exists()


class Stateful(pl.Callback):
    def __init__(self, first: object, later: object) -> None:
        self.state, self.later, self.steps = first, later, 0

    def on_train_batch_end(self, *_):
        self.state, self.steps = self.later, self.steps + 1

    def state_dict(self):
        return {"state": self.state}


@pytest.mark.parametrize(("first", "steps"), [(Path("x"), 0), (1, 3)], ids=["at the start", "at the save"])
def test_a_callback_state_that_cannot_be_saved_is_an_error_that_names_the_class(first, steps, train, tmp_path):
    callback = Stateful(first, Path("x"))
    with pytest.raises(ConfigError, match=r"callback Stateful cannot be saved: .* but not PosixPath"):
        train(ROWS, callbacks=[callback])
    assert callback.steps == steps
    assert read_status(tmp_path / "run").state == "failed"


def test_a_callback_that_saves_checkpoints_itself_is_refused_before_training(train, tmp_path):
    count = Count()
    with pytest.raises(
        ConfigError, match=r"the callback ModelCheckpoint cannot save .* Try: trainer\.save_every=STEPS"
    ):
        train(ROWS, callbacks=[count, ModelCheckpoint(tmp_path)])
    assert count.steps == 0


def test_a_state_dict_that_works_only_during_training_is_accepted(train):
    class Late(pl.Callback):
        def on_train_start(self, *_):
            self.seen = 1

        def state_dict(self):
            return {"seen": self.seen}

    train(ROWS, callbacks=[Late()])


class Monitor(pl.Callback):
    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def on_train_batch_end(self, trainer, *_):
        if "dev/spearman" in trainer.callback_metrics:
            self.values[trainer.global_step] = float(trainer.callback_metrics["dev/spearman"])


def test_callbacks_can_monitor_the_dev_score_of_the_history(train, tmp_path):
    (tmp_path / "dev.tsv").write_text("".join(f"w{i} w{i + 1}\tw{i + 2}\t{i % 5}\n" for i in range(5, 25)))
    dev = [f"data.dev={tmp_path}/dev.tsv", "trainer.eval_every=2", "trainer.epochs=4", "optim.lr=1e-9"]
    monitor, stopping = Monitor(), EarlyStopping("dev/spearman", min_delta=5, patience=1, mode="max")
    train(ROWS, *dev, callbacks=[monitor, stopping])
    history = read_history(tmp_path / "run/metrics.jsonl")
    scores = {entry["step"]: entry["dev/spearman"] for entry in history if "dev/spearman" in entry}
    assert list(scores) == [2, 4, 6], "stopped after the second of four epochs of three steps"
    assert monitor.values == pytest.approx({step: scores[step - step % 2] for step in range(2, 7)})
    assert float(stopping.best_score) == pytest.approx(scores[2])
    train(ROWS, *dev, "trainer.max_steps=6", folder=tmp_path / "without")
    names = [set(entry) for entry in read_history(tmp_path / "without/metrics.jsonl")]
    assert [set(entry) for entry in history] == names


def test_a_resume_warns_that_callbacks_and_loggers_are_missing(train, tmp_path):
    class Interrupt(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(ROWS, callbacks=[Interrupt()], loggers=[CSVLogger(tmp_path / "csv")])
    assert read_status(tmp_path / "run").callbacks == ["Interrupt", "CSVLogger"]
    assert "resumed without" not in (tmp_path / "run/run.log").read_text()
    resume_job(tmp_path / "run")
    assert "WARNING the run is resumed without Interrupt, CSVLogger" in (tmp_path / "run/run.log").read_text()


@pytest.mark.parametrize("callbacks", ["Count", [1], None])
def test_a_damaged_list_of_callbacks_in_the_status_is_an_error(callbacks, tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"state": "stopped", "callbacks": callbacks}))
    with pytest.raises(DataError, match="callbacks cannot be"):
        read_status(tmp_path)


def test_ctrl_c_saves_the_run_and_raises_keyboard_interrupt(train, tmp_path):
    class Interrupt(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(ROWS, callbacks=[Interrupt()])
    status = read_status(tmp_path / "run")
    assert (status.state, status.step) == ("stopped", 2)


def test_a_run_without_folder_is_put_where_the_command_line_puts_it(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(ROWS, "trainer.max_steps=1", folder=None)
    (run,) = tmp_path.glob("outputs/*/*")
    assert re.fullmatch(r"outputs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-encoder-triplets", str(run.relative_to(tmp_path)))
    assert (run / "results.json").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data holds no rows"),
        ([("a", "b"), ("a",)], "data: row 1 must hold 2 texts that are not blank"),
        ([("a", " ")], "data: row 0 must hold 2 texts that are not blank"),
        ([("a", "b", "c", "d")], "data: row 0 must hold 1, 2 or 3 texts"),
        ([7], "data: row 0 must hold 1, 2 or 3 texts, got 7"),
        ([{"anchor": "a", "score": "b"}], "the keys of a row must be anchor, positive, got anchor, score in row 0"),
        ({"anchor": ["a"], "positive": ["b"]}, r"data must be a file or an iterable of rows, got dict"),
        ("missing.csv", r"data\.train=missing\.csv does not exist"),
    ],
)
def test_data_that_cannot_be_trained_on_is_reported_before_a_folder_is_made(data, message, train, tmp_path):
    with pytest.raises(DataError, match=message):
        train(data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.margn=0.1", r"loss\.margn is not a setting\. Did you mean loss\.margin"),
        ("loss.margin=7", r"loss\.margin must be in \[0, 2\]"),
        ("loss.margin=[", r"."),
        ("hydra.run.dir=x", r"hydra\.run\.dir=x has no effect in train\(\)\. Try: the argument folder"),
        ("hydra/launcher=joblib", r"hydra/launcher=joblib has no effect in train\(\)"),
        ("sweep.parallel=2", r"sweep\.parallel=2 has no effect in train\(\)"),
        ("sweep=optuna", r"sweep=optuna has no effect in train\(\)"),
        ("++data.train=x.csv", r"has no effect, since train\(\) sets data\.train\. Try: the argument data"),
        ("model.path=x", r"has no effect, since train\(\) sets model\.path\. Try: the argument model"),
        ("evaluation.tasks=[missing.csv]", r"missing\.csv does not exist"),
    ],
)
def test_wrong_overrides_are_reported_before_a_folder_is_left(override, message, train, tmp_path):
    with pytest.raises((ConfigError, DataError), match=message):
        train(ROWS, override)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("existed", [False, True])
def test_a_setting_that_the_encoder_refuses_can_be_corrected_in_the_same_folder(existed, train, tmp_path):
    if existed:
        (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match=r"data\.prompts: 'qurey' is not the name of a prompt"):
        train(ROWS, "data.prompts=[qurey,'','']")
    assert (tmp_path / "run").exists() == existed
    assert not existed or list((tmp_path / "run").iterdir()) == []
    train(ROWS)
    assert read_status(tmp_path / "run").state == "finished"


def test_a_model_that_resembles_a_name_of_conf_gets_the_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = r"^model='mpnett' is neither a model in conf/model nor an encoder\. Did you mean model='mpnet'"
    with pytest.raises(ConfigError, match=message):
        promcse_pl.train(ROWS, model="mpnett", overrides=SETTINGS, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_encoder_whose_name_resembles_one_of_conf_is_trained(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").rename("mpnett")
    model = promcse_pl.train(ROWS, model="mpnett", overrides=SETTINGS, folder=tmp_path / "run")
    assert model.encode(["w5 w6"]).shape == (1, 16)


def test_overrides_given_as_text_are_reported_with_the_list_to_type():
    with pytest.raises(
        ConfigError, match=r"overrides must be a list, got 'loss\.margin=0\.1'\. Try: overrides=\['loss"
    ):
        api.train(ROWS, overrides="loss.margin=0.1")


def test_callbacks_are_refused_for_processes_that_they_cannot_reach(train, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be sent to the 2 processes of trainer\.devices"):
        train(ROWS, "trainer.devices=2", callbacks=[Count()])
    assert not (tmp_path / "run").exists()


def test_the_example_of_the_docstring_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in ("promcse_pl.data.sources", "promcse_pl.evaluation.tasks"):  # fewer pairs
        monkeypatch.setattr(f"{module}.demo_pairs", lambda split: demo_pairs(split)[:40])
    names: dict[str, object] = {}
    for example in doctest.DocTestParser().get_examples(inspect.getdoc(api.train)):
        exec(example.source, names)
    assert names["embeddings"].shape == (1, 384)
