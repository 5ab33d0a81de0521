"""Runs on an encoder of sentence-transformers: pooling, dense layers, length, prompts and lower case come from its folder."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console
from support.encoders import save_small_encoder
from support.runs import outcome, run_small, small_config

pytest.importorskip("sentence_transformers", reason="needs the extra: pip install -e '.[st]'", exc_type=ImportError)

from sentence_transformers import SentenceTransformer
from support.sentence_encoders import DENSE, PROMPTS, save_sentence_encoder

import promcse_pl
from promcse_pl import PromCSE
from promcse_pl.config import Config
from promcse_pl.evaluation import suite
from promcse_pl.evaluation.targets import frozen_target
from promcse_pl.models.texts import tokenize
from promcse_pl.run_folder import read_config, read_resolved_config
from promcse_pl.runs.lifecycle import resume_job, run_job
from promcse_pl.training.fit import build_data, build_encoder
from promcse_pl.utils.errors import ConfigError, DataError

OWN = {"pooling": "auto", "max_length": "auto", "head": "none"}
"""Settings of the model that leave everything to the folder of the encoder."""
SENTENCES = ["w5 W6 w7", "w8", "w9 " * 30]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_sentence_encoder(tmp_path_factory.mktemp("st") / "encoder")


@pytest.fixture
def folder(encoder, tmp_path) -> Path:
    """A folder for a run with a copy of the encoder in it."""
    shutil.copytree(encoder, tmp_path / "encoder")
    return tmp_path


def resolved(run: Path) -> dict[str, object]:
    section = yaml.safe_load((run / "config.yaml").read_text())["resolved"]
    return {key: value for key, value in section.items() if key.startswith("model.")}


def adapter(run: Path) -> dict[str, object]:
    return json.loads((run / "adapter/adapter.json").read_text())


def test_a_run_takes_pooling_length_and_prompts_from_the_folder_and_records_them(folder):
    _, printed = run_small(folder, model=OWN, data={"max_length": 32})
    assert resolved(folder / "run") == {"model.pooling": "cls", "model.max_length": 16, "model.prompts": PROMPTS}
    assert read_config(folder / "run/config.yaml").model.pooling == "auto"
    about = adapter(folder / "run")
    assert about["pooling"] == "cls"
    assert about["text"] == {"max_length": 16, "lower_case": True, "prompts": PROMPTS, "default_prompt": None}
    assert PromCSE.load(folder / "run", device="cpu").encode("w5").shape == (DENSE,)
    assert "\npooling: cls (modules.json of the encoder)\n" in printed
    shown = ", ".join(f"{name} {prompt!r}" for name, prompt in sorted(PROMPTS.items()))
    texts = "at most 16 tokens (max_seq_length of the encoder); lower case (do_lower_case of the encoder)"
    assert f"\ntexts: {texts}; prompts {shown} (of the encoder)\n" in printed


def test_the_frozen_encoder_of_a_run_equals_sentence_transformers(folder):
    run_small(folder, model=OWN)
    frozen = frozen_target(PromCSE.load(folder / "run", device="cpu")).members[0].load()
    reference = SentenceTransformer(str(folder / "encoder"), device="cpu")
    for name in (None, *PROMPTS):
        expected = reference.encode(SENTENCES, prompt_name=name, normalize_embeddings=True)
        assert np.abs(frozen.encode(SENTENCES, prompt_name=name) - expected).max() < 1e-6


def test_the_adapter_encodes_texts_as_the_tokens_of_training_were_made(folder):
    row = ("W5 w6 w10", "w8 w6 W11", "w11 " * 30)
    (folder / "train.csv").write_text("sent0,sent1,hard_neg\n" + "\n".join([",".join(row)] * 3) + "\n")
    prompts = ["query", "w91 W93 ", ""]
    config = small_config(folder, model=OWN, data={"max_length": 32, "prompts": prompts})
    encoder = build_encoder(config)
    ids, lengths = build_data(config, encoder, lambda _: None).token_rows.fetch(np.array([0]))
    run_job(config, folder / "run")
    model = PromCSE.load(folder / "run", device="cpu")
    for position, (text, prompt) in enumerate(zip(row, ["w90 w91 ", "w91 W93 ", ""], strict=True)):
        tokens = tokenize(
            model.tokenizer, model.encoder.text.prepare([text], prompt, tokenizer=model.tokenizer), model.max_tokens
        )
        assert tokens.ids_NT[0].tolist() == ids[position, : lengths[position]].tolist()
    assert lengths.tolist() == [7, 7, 16]
    assert 1 not in ids, "every word is known: texts were converted to lower case"


def test_training_prompts_change_the_tokens_and_the_first_row_of_the_log(folder):
    _, plain = run_small(folder, "plain", model=OWN)
    _, printed = run_small(folder, "prompted", model=OWN, data={"prompts": ["query", "document", "w7 w8: "]})
    assert "first row: anchor 'w5 w6 w10', positive 'w8 w6 w11', negative 'w11 w6 w12'\n" in plain
    row = "first row: anchor 'w90 w91 w5 w6 w10', positive 'w92 w8 w6 w11', negative 'w7 w8: w11 w6 w12'\n"
    assert row in printed
    used = [
        json.loads((folder / name / "results.json").read_text())["tokens"]["cache"] for name in ("plain", "prompted")
    ]
    assert used[0] != used[1]


def test_the_default_prompt_is_in_front_of_training_and_dev_texts(tmp_path):
    save_sentence_encoder(tmp_path / "encoder", default_prompt="query")
    (tmp_path / "dev.tsv").write_text("a\tb\tscore\n" + "".join(f"w{i} w9\tw{i} w10\t{i}\n" for i in range(10, 20)))
    _, printed = run_small(tmp_path, model=OWN, data={"dev": str(tmp_path / "dev.tsv")})
    assert "first row: anchor 'w90 w91 w5 w6 w10', positive 'w90 w91 w8 w6 w11'" in printed
    assert "default prompt query (of the encoder)\n" in printed
    assert resolved(tmp_path / "run")["model.default_prompt"] == "query"
    model = PromCSE.load(tmp_path / "run", device="cpu")
    assert (model.encode("w5") == model.encode("w5", prompt_name="query")).all()
    assert (model.encode("w5") != model.encode("w5", prompt="")).any()

    _, printed = run_small(tmp_path, "without", model={**OWN, "prompts": {}})
    assert "first row: anchor 'w5 w6 w10'" in printed
    assert adapter(tmp_path / "without")["text"]["default_prompt"] is None


def test_settings_win_over_the_folder_and_the_log_names_both(folder):
    model = {**OWN, "pooling": "avg", "max_length": 9, "prompts": {"mine": "w93 "}, "default_prompt": "mine"}
    _, printed = run_small(folder, model=model)
    assert "model." not in str(yaml.safe_load((folder / "run/config.yaml").read_text())["resolved"])
    assert "\npooling: avg (model.pooling; the encoder's own is cls)\n" in printed
    assert "\ntexts: at most 9 tokens (model.max_length; the encoder's own is 16); lower case" in printed
    assert (
        "; prompts mine 'w93 ' (model.prompts; the encoder's own are document, query); default prompt mine" in printed
    )
    about = adapter(folder / "run")
    assert about["pooling"] == "avg"
    assert about["text"] == {"max_length": 9, "lower_case": True, "prompts": {"mine": "w93 "}, "default_prompt": "mine"}


def test_unsupervised_training_without_any_dropout_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text("".join(f"w{i} w{i + 1}\n" for i in range(5, 25)))
    encoder = save_small_encoder(tmp_path / "encoder", "nomic_bert")
    config = {
        "model": {"path": str(encoder), "pooling": "avg", "head": "none"},
        "data": {"kind": "sentences", "train": str(tmp_path / "train.txt")},
        "loss": {"hinge_weight": 0},
    }
    with pytest.raises(ConfigError, match=r"data\.kind=sentences needs dropout.* has none\. Try: prompt\.dropout=0\.1"):
        build_encoder(Config.from_dict(config))
    assert build_encoder(Config.from_dict({**config, "prompt": {"dropout": 0.1}})).prompt.dropout == 0.1
    bert = save_small_encoder(tmp_path / "bert")
    assert build_encoder(Config.from_dict({**config, "model": {**config["model"], "path": str(bert)}}))


def test_an_encoder_without_modules_json_gets_the_usual_pooling_of_its_family(tmp_path):
    _, printed = run_small(tmp_path, model=OWN)
    assert "\npooling: avg (default for bert encoders)\n" in printed
    assert "\ntexts: " not in printed
    assert resolved(tmp_path / "run") == {"model.pooling": "avg", "model.max_length": None}
    assert read_resolved_config(tmp_path / "run/config.yaml").model.max_length is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"data": {"prompts": ["query", "documnt", ""]}},
            r"^data\.prompts: 'documnt' is not the name of a prompt \(known: document, query\), and a text must contain a "
            r"space or a colon\. Try: 'data\.prompts=\[\"query\",document,\"\"\]'$",
        ),
        (
            {"data": {"prompts": ["passage", "", ""]}},
            r"'passage' is not the name of a prompt .* Try: 'data\.prompts=\[\"passage: \",\"\",\"\"\]'$",
        ),
        (
            {"model": {**OWN, "default_prompt": "passage"}},
            r"^model\.default_prompt must be the name of a prompt of the encoder \(document, query\), got 'passage'\. Try: "
            r"model\.default_prompt=document$",
        ),
    ],
)
def test_an_unknown_prompt_is_refused_with_the_known_names(section, message, folder):
    with pytest.raises(ConfigError, match=message):
        run_small(folder, **{"model": OWN, **section})


def fail_in_evaluation(folder: Path, **sections: dict) -> Path:
    """Return the folder of a run that failed after its training, with a checkpoint."""

    def fail(*_, **__):
        raise RuntimeError("on purpose")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "evaluate", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            run_small(folder, "failed", evaluation={"tasks": ["demo"]}, **sections)
    return folder / "failed"


def test_a_resumed_run_keeps_the_resolved_values_and_equals_an_uninterrupted_one(folder):
    sections = {"model": OWN, "data": {"prompts": ["query", "document", "document"]}}
    failed = fail_in_evaluation(folder, **sections)
    before = resolved(failed)
    printed = io.StringIO()
    resume_job(failed, Console(file=printed))
    run_small(folder, "straight", evaluation={"tasks": ["demo"]}, **sections)
    assert resolved(failed) == before
    assert "pooling: cls (modules.json of the encoder)\n" in printed.getvalue()
    assert outcome(failed) == outcome(folder / "straight")


@pytest.mark.parametrize(
    ("file", "content", "name"),
    [
        ("sentence_bert_config.json", '{"max_seq_length": 16, "do_lower_case": false}', "lower_case"),
        (
            "config_sentence_transformers.json",
            '{"prompts": {"query": "w94 "}, "default_prompt_name": "query"}',
            "prompts",
        ),
        ("1_Pooling/config.json", '{"word_embedding_dimension": 16, "pooling_mode_max_tokens": true}', "pooling"),
    ],
)
def test_a_changed_pipeline_of_the_encoder_is_refused_on_resume(folder, file, content, name):
    failed = fail_in_evaluation(folder, model=OWN)
    (folder / "encoder" / file).write_text(content)
    with pytest.raises(
        DataError, match=rf"model\.path=.* has changed since the run in .* started: {name} in its sentence-"
    ):
        resume_job(failed)


def test_a_run_of_an_earlier_version_is_resumed_without_the_pipeline(encoder, tmp_path):
    """That version did not read modules.json, had no settings for it and recorded none."""
    run_small(tmp_path, "straight", evaluation={"tasks": ["demo"]})
    failed = fail_in_evaluation(tmp_path)
    for name in (
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "modules.json",
        "1_Pooling",
        "2_Dense",
    ):
        copy = shutil.copytree if (encoder / name).is_dir() else shutil.copy
        copy(encoder / name, tmp_path / "encoder" / name)
    config, inputs = (
        yaml.safe_load((failed / "config.yaml").read_text()),
        json.loads((failed / "inputs.json").read_text()),
    )
    for key in ("model.max_length", "model.prompts", "model.default_prompt", "data.prompts"):
        section, _, name = key.partition(".")
        del config[section][name], inputs["config"][key]
    del inputs["model.path"]["pipeline"]
    (failed / "config.yaml").write_text(yaml.safe_dump(config))
    (failed / "inputs.json").write_text(json.dumps(inputs))
    resume_job(failed)
    name = "adapter/adapter.safetensors"
    assert (failed / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert adapter(failed)["text"] == adapter(tmp_path / "straight")["text"]


def test_train_takes_the_pipeline_from_the_folder_and_says_for_which_encoder_the_recipe_is(
    encoder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [("w5 w6", "w5 w7", "w8 w9"), ("w10 w11", "w10 w12", "w13"), ("w14", "w15", "w16")]
    overrides = [
        "data.dev=null",
        "data.batch_size=2",
        "trainer.precision=float32",
        "trainer.device=cpu",
        "tracking=local",
    ]
    model = promcse_pl.train(rows, model=encoder, overrides=overrides, folder=tmp_path / "run")
    text = model.encoder.text
    assert (model.encoder.pooling, text.max_length, dict(text.prompts), text.lower_case) == ("cls", 16, PROMPTS, True)
    note = (
        "optim.lr=0.03 comes from the recipe supervised/minilm for sentence-transformers/all-MiniLM-L6-v2; it is not "
    )
    assert f"{note}tuned for {encoder}\n" in capsys.readouterr().out
    promcse_pl.train(rows, model=encoder, overrides=[*overrides, "optim.lr=0.01"], folder=tmp_path / "other")
    assert "made for" not in capsys.readouterr().out


def test_truncation_by_the_length_of_the_encoder_is_reported_with_its_setting(folder):
    (folder / "train.csv").write_text("sent0,sent1,hard_neg\n" + f"{'w5 ' * 30},w6,w7\n" * 3)
    _, printed = run_small(folder, model=OWN, data={"max_length": 32})
    assert "33.3 % of the sentences (3) are truncated to 16 tokens, the value of model.max_length\n" in printed
