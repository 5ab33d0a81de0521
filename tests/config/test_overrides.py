"""Settings by dotted key: unknown keys, choices of groups, and what a setting affects."""

import pytest
from support.configs import config_of, valid

from promcse_pl.config import Config, check_overrides, decides, is_integer, parsing
from promcse_pl.config.fields import settings
from promcse_pl.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("loss.margn", "loss.margin"),
        ("loss.temp", "loss.temperature"),
        ("data.batchsize", "data.batch_size"),
        ("optim.learning_rate", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("batch_size", "data.batch_size"),
        ("per_device_train_batch_size", "data.batch_size"),
        ("max_seq_length", "data.max_length"),
        ("temp", "loss.temperature"),
        ("num_epochs", "trainer.epochs"),
        ("trainer.precison", "trainer.precision?"),
        ("prompt.lenght", "prompt.length?"),
        ("trainer.chunk_token", "trainer.chunk_tokens?"),
        ("sed", "seed"),
        ("los.margin", "loss.margin"),
        ("trainer.max_step", "trainer.max_steps"),
        ("lr", "optim.lr"),
        ("trainer.batch_size", "data.batch_size"),
    ],
)
def test_an_unknown_key_names_the_nearest_and_what_is_allowed(key, meant):
    with pytest.raises(ConfigError) as caught:
        check_overrides([f"{key}=1"], {"loss": ["default"], "data": ["demo"]})
    message = str(caught.value)
    assert message.startswith(f"{key} is not a setting.")
    assert meant is None or f"Did you mean {meant}" in message
    section = key.rpartition(".")[0]
    siblings = [known for known in settings(Config) if section and known.startswith(f"{section}.")]
    allowed = message.partition("Allowed")[2]
    assert all(name in allowed for name in siblings or [known.partition(".")[0] for known in settings(Config)])


def test_an_unknown_key_in_a_saved_config_is_refused():
    raw = valid()
    raw["loss"]["margn"] = 0.1
    with pytest.raises(ConfigError, match=r"loss\.margn is not a setting\. Did you mean loss\.margin"):
        Config.from_dict(raw)
    with pytest.raises(ConfigError, match=r"extra is not a setting\."):
        Config.from_dict({**valid(), "extra": 1})
    with pytest.raises(ConfigError, match=r"^loss\.margin must be written as a section\. Try: loss: {margin: VALUE}$"):
        Config.from_dict({**valid(), "loss.margin": 0.1})


@pytest.mark.parametrize(
    "argument",
    ["loss.margin=0.3", "+loss.margin=0.3", "++seed=1", "model=minilm", "model=minilm,bert-base", "experiment=null",
     "hydra.run.dir=x", "hydra/launcher=basic", "-m", "--cfg", "job", "~debug", "model=choice(minilm,bert-base)"],
)  # fmt: skip
def test_hydras_own_forms_pass_the_check_of_the_command_line(argument):
    check_overrides(
        [argument], {"model": ["minilm", "bert-base"], "experiment": ["no_hinge"], "debug": ["fast"], "loss": []}
    )


@pytest.mark.parametrize("argument", ["model=minlm", "model=minilm,minlm", "model=minlm.yaml"])
def test_an_unknown_choice_of_a_group_names_the_nearest_and_all(argument):
    with pytest.raises(ConfigError) as caught:
        check_overrides([argument], {"model": ["bert-base", "minilm"]})
    assert str(caught.value) == "model=minlm is not a choice. Did you mean model=minilm? Allowed: bert-base, minilm"


def test_a_choice_in_a_subfolder_is_checked_with_its_folder():
    groups = {"experiment": ["no_hinge", "table1/full", "table1/prompt_eh"]}
    check_overrides(["experiment=table1/full,no_hinge,table1/prompt_eh"], groups)
    with pytest.raises(ConfigError, match="Did you mean experiment=table1/prompt_eh"):
        check_overrides(["experiment=table1/full,table1/prompteh"], groups)
    with pytest.raises(ConfigError, match=r"experiment=\.\./x is not a choice"):
        check_overrides(["experiment=../x"], groups)


def test_every_alias_refers_to_an_existing_setting():
    every = set(settings(Config))
    assert set(parsing.OTHER_NAMES) <= every
    names = [name for others in parsing.OTHER_NAMES.values() for name in others]
    assert len(names) == len(set(names))
    assert not {*names, *parsing.ABSENT} & {key.rpartition(".")[2] for key in every}


@pytest.mark.parametrize("key", parsing.REMOVED)
def test_a_removed_setting_is_dropped_where_it_had_no_effect_and_else_an_error(key):
    section, _, name = key.partition(".")
    raw = config_of("data=demo").to_dict()
    assert Config.from_dict({**raw, section: {**raw[section], name: parsing.REMOVED[key]}}).to_dict() == raw
    message = rf"^{key} was removed, because it gained less than 0\.1 on the dev set \(docs/decisions.md\). Try: leave it out$"
    with pytest.raises(ConfigError, match=message):
        Config.from_dict({**raw, section: {**raw[section], name: 0.5}})
    with pytest.raises(ConfigError, match=message):
        check_overrides([f"{key}=0.5"], {})


@pytest.mark.parametrize("key", ["gradient_accumulation_steps", "trainer.gradient_accumulation_steps"])
def test_settings_that_are_absent_on_purpose_have_their_own_error(key):
    with pytest.raises(ConfigError, match=rf"{key} is not a setting: .*\. Try: leave it out"):
        check_overrides([f"{key}=1"], {})


def test_what_a_setting_decides_is_marked_on_its_field():
    keys = list(settings(Config))
    execution = {key for key in keys if decides(key) == "execution" and not key.startswith("tracking.")}
    assert execution == {
        "data.cache_dir",
        *(f"trainer.{name}" for name in ("log_every", "save_every", "chunk_tokens", "recompute")),
    }
    assert {key for key in keys if decides(key) == "scores"} == {"evaluation.tasks", "evaluation.frozen"}
    assert all(decides(key) == "execution" for key in keys if key.startswith("tracking."))
    assert {decides(key) for key in ("seed", "optim.lr", "trainer.precision", "data", "no.such", "seed.x")} == {
        "training"
    }


@pytest.mark.parametrize("argument", ["model.prompts={query:", 'model.prompts={query: "a: ", document:'])
def test_a_dictionary_that_the_shell_has_split_gets_a_command_with_quotes(argument):
    advice = r"put the whole setting in single quotes\. Try: python run\.py 'model\.prompts=\{query: \"query: \"\}'$"
    with pytest.raises(ConfigError, match=advice):
        check_overrides([argument, "query: }"], {})
    check_overrides(['model.prompts={query: "query: "}', "model.prompts={}", "model.prompts=null"], {})


@pytest.mark.parametrize(
    ("key", "whole"),
    [
        *((key, True) for key in ("prompt.length", "model.max_length", "trainer.max_steps")),
        *(
            (key, False)
            for key in ("optim.lr", "trainer.precision", "evaluation.frozen", "evaluation.tasks", "no.such")
        ),
    ],
)
def test_integer_settings_may_also_allow_null_and_words(key, whole):
    assert is_integer(key) is whole
