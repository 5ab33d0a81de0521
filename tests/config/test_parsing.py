"""From a dictionary or file to a config: types, ranges, combinations, missing settings and the messages for them."""

import typing
from typing import Any

import pytest
import yaml
from support.configs import composed, config_of, leaves, put, valid

from promcse_pl.config import Config, SweepConfig
from promcse_pl.run_folder import read_config, write_config
from promcse_pl.utils.errors import ConfigError

WRONG = {
    "a text": "nonsense",
    "a fraction": 0.5,
    "a whole number": 7,
    "a truth value": True,
    "a list": [[]],
    "settings": {"a": 1},
    "nothing": None,
}


def fits(hint: Any, kind: str) -> bool:
    """Whether the type alone lets a kind of value pass."""
    options = typing.get_args(hint) if typing.get_origin(hint) not in (typing.Literal, list) else ()
    options = options or (hint,)
    right = {"a text": str, "a fraction": float, "a whole number": int, "a truth value": bool, "nothing": type(None)}
    return right.get(kind) in options or (kind == "a whole number" and float in options)


@pytest.mark.parametrize(
    ("key", "kind"), [(key, kind) for key, hint in leaves().items() for kind in WRONG if not fits(hint, kind)]
)
def test_a_value_of_the_wrong_type_is_refused_with_key_value_allowed_and_remedy(key, kind):
    value = WRONG[kind]
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(put(valid(), key, value))
    message = str(caught.value)
    assert message.startswith(f"{key} must be ")
    assert f"got {value!r}. Try: python run.py " in message
    assert key in message.partition("Try: ")[2]


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("loss.margin", "abc", "python run.py loss.margin=0.2"),
        ("tracking.wandb", "onlin", "python run.py tracking.wandb=online"),
        ("model.pooling", "mean", "python run.py model.pooling=avg"),
        ("model.prompts", "query: ", "python run.py 'model.prompts={NAME: \"query: \"}'"),
        ("model.prompts", {"query": 7, 3: "it's"}, 'python run.py \'model.prompts={query: "7", NAME: "its"}\''),
        ("data.prompts", "query", "python run.py 'data.prompts=[query]'"),
        ("tracking.name", 7, "python run.py 'tracking.name=\"7\"'"),
        ("tracking.tags", "small", "python run.py 'tracking.tags=[small]'"),
        ("tracking.tags", [1], "python run.py 'tracking.tags=[\"1\"]'"),
        ("evaluation.tasks", "sts", "python run.py 'evaluation.tasks=[sts]'"),
        ("evaluation.tasks", ["st"], "python run.py 'evaluation.tasks=[sts]'"),
        ("data.columns", "sent0", "python run.py 'data.columns=[sent0]'"),
    ],
)
def test_the_remedy_for_a_wrong_type_is_near_to_what_was_typed(key, value, remedy):
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(put(valid(), key, value))
    assert str(caught.value).endswith(f"Try: {remedy}")


def test_the_remedies_for_numbers_that_shall_be_text_pass_the_command_line():
    config = config_of('tracking.name="7"', 'tracking.tags=["1","2"]')
    assert (config.tracking.name, config.tracking.tags) == ("7", ["1", "2"])


OUT_OF_RANGE = [
    ("model.path", " "),
    ("data.train", ""),
    ("model.max_length", 2),
    ("model.max_length", 2**30 + 1),
    ("model.head_rank", 0),
    ("model.head_rank", 1025),
    ("data.max_length", 2),
    ("data.max_length", 513),
    ("data.batch_size", 1),
    ("data.max_rows", 1),
    ("loss.temperature", 0),
    ("loss.temperature", -0.05),
    ("loss.temperature", 1e-38),
    ("loss.temperature", 10.1),
    ("loss.margin", -1),
    ("loss.margin", 2.01),
    ("loss.hinge_weight", -1),
    ("loss.hinge_weight", float("inf")),
    ("loss.hinge_weight", 1e38),
    ("loss.hard_negative_logit", float("inf")),
    ("loss.hard_negative_logit", -1e38),
    ("loss.mlm_weight", -0.1),
    ("loss.mlm_weight", 10.5),
    ("prompt.length", -1),
    ("prompt.length", 257),
    ("prompt.projection_size", 0),
    ("prompt.dropout", 1),
    ("prompt.dropout", -0.1),
    ("prompt.position_offset", -1),
    ("optim.lr", 0),
    ("optim.lr", 1.5),
    ("optim.clip_norm", 0),
    ("optim.clip_norm", float("inf")),
    *((f"trainer.{name}", 0) for name in ("epochs", "eval_every", "log_every", "save_every", "chunk_tokens")),
    ("trainer.max_steps", -1),
    ("trainer.patience", 0),
    ("tuning.rank", 0),
    ("tuning.rank", 1025),
    ("tuning.alpha", 0),
    ("trainer.devices", 0),
    ("trainer.devices", 65),
    ("trainer.num_nodes", 0),
    ("trainer.num_nodes", 1025),
    ("seed", -1),
    ("seed", 2**32),
    *((key, float("nan")) for key, hint in leaves().items() if fits(hint, "a fraction")),
]


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_and_the_remedy_is_valid(key, value):
    needed = {
        "prompt.projection_size": "prompt=projected",
        "model.head_rank": "model.head=low_rank",
        "tuning.rank": "tuning=lora",
        "tuning.alpha": "tuning=lora",
    }
    raw = composed(needed[key]) if key in needed else valid()
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(put(raw, key, value))
    message = str(caught.value)
    assert message.startswith(f"{key} must be ")
    assert f"got {value!r}" in message or f"got {float(value)!r}" in message
    remedy = message.partition("Try: python run.py ")[2]
    assert remedy.startswith(f"{key}=")
    Config.from_dict(put(raw, key, yaml.safe_load(remedy.partition("=")[2])))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.max_length", 3),
        ("data.max_length", 512),
        ("data.batch_size", 2),
        ("data.max_rows", 2),
        ("loss.temperature", 10),
        ("loss.temperature", 0.001),
        ("loss.margin", 0),
        ("loss.margin", 2),
        ("loss.hinge_weight", 0),
        ("loss.mlm_weight", 10),
        ("prompt.length", 0),
        ("prompt.length", 256),
        ("prompt.dropout", 0),
        ("prompt.position_offset", 0),
        ("optim.lr", 1),
        ("trainer.max_steps", 1),
        ("trainer.chunk_tokens", None),
        ("trainer.devices", 64),
        ("seed", 0),
        ("seed", 2**32 - 1),
    ],
)
def test_the_ends_of_a_range_are_allowed(key, value):
    raw = put(valid(), key, value)
    raw["model"]["head"] = "mlp"
    config = Config.from_dict(raw)
    section, _, name = key.rpartition(".")
    assert getattr(getattr(config, section) if section else config, name) == value


@pytest.mark.parametrize(
    ("pooling", "nearest"),
    [
        ("mean", "avg"),
        ("pooling_mode_mean_tokens", "avg"),
        ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len"),
        ("pooling_mode_weightedmean_tokens", "weightedmean"),
        ("pooling_mode_max_tokens", "max"),
        ("pooling_mode_cls_token", "cls"),
        ("pooling_mode_lasttoken", "lasttoken"),
        ("last_token", "lasttoken"),
        ("CLS", "cls"),
        ("avg_top3", "avg_top2"),
        ("cls+mean", "cls+avg"),
        ("cls+cls", "cls"),
        ("", "cls"),
    ],
)
def test_an_unknown_pooling_names_those_allowed_and_the_nearest(pooling, nearest):
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(put(valid(), "model.pooling", pooling))
    message = str(caught.value)
    assert message.startswith("model.pooling must be auto, cls, cls_before_pooler, avg, ")
    assert "or several of cls, max, avg, mean_sqrt_len, weightedmean, lasttoken joined by +" in message
    assert message.endswith(f"got {pooling!r}. Try: python run.py model.pooling={nearest}")
    assert config_of(f"model.pooling={nearest}").model.pooling == nearest


@pytest.mark.parametrize("pooling", ["auto", "max", "lasttoken", "cls+avg", "max+cls+weightedmean"])
def test_poolings_of_sentence_transformers_and_joined_ones_are_allowed(pooling):
    assert config_of(f"model.pooling={pooling}").model.pooling == pooling


@pytest.mark.parametrize(
    ("typed", "prompts"),
    [
        ('model.prompts={query: "query: "}', {"query": "query: "}),
        ("model.prompts={retrieval.query: 'a: b', s2p-query: x}", {"retrieval.query": "a: b", "s2p-query": "x"}),
        ("model.prompts={}", {}),
        ("model.prompts=null", None),
    ],
)
def test_prompts_are_set_on_the_command_line(typed, prompts):
    assert config_of(typed).model.prompts == prompts


def test_the_remedies_for_prompts_of_a_wrong_type_pass_the_command_line():
    for value in ("query: ", {"query": 7, 3: "it's"}, [], 0.5):
        with pytest.raises(
            ConfigError, match=r"^model\.prompts must be a dictionary \(like \{query: \"query: \"\}\)"
        ) as caught:
            Config.from_dict(put(valid(), "model.prompts", value))
        remedy = str(caught.value).partition("Try: python run.py ")[2]
        assert config_of(remedy.strip("'")).model.prompts


def test_a_prompt_may_be_longer_than_a_file_name_but_not_without_limit():
    text = "Instruct: " + 300 * "w"
    assert Config.from_dict(put(valid(), "model.prompts", {"query": text})).model.prompts == {"query": text}
    assert Config.from_dict(put(valid(), "data.prompts", [text, "", ""])).data.prompts == [text, "", ""]
    with pytest.raises(ConfigError, match=r"^model\.prompts must be text of at most 4000 bytes and without NUL"):
        Config.from_dict(put(valid(), "model.prompts", {"query": 5000 * "w"}))


def test_every_setting_with_a_range_has_a_test_of_it():
    ranged = {key for key, hint in leaves().items() if {int, float} & {hint, *typing.get_args(hint)}}
    assert ranged <= {key for key, _ in OUT_OF_RANGE}


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["data=pairs", "data.train=x.csv", "loss.hinge_weight=1"], ["loss.hinge_weight=1", "data.kind=pairs"]),
        (["data=sentences", "data.train=x", "loss.hinge_weight=1"], ["loss.hinge_weight=1", "data.kind=sentences"]),
        (
            ["data=pairs", "data.train=x.csv", "loss.hard_negative_logit=1"],
            ["loss.hard_negative_logit=1", "data.kind=pairs"],
        ),
        (["model.pooling=cls_before_pooler", "model.head=mlp"], ["model.pooling=cls_before_pooler", "model.head=mlp"]),
        (["prompt.projection_size=8"], ["prompt.projection_size=8", "prompt.kind=deep"]),
        (["prompt.kind=projected"], ["prompt.projection_size", "prompt.kind=projected"]),
        (["prompt=shared", "prompt.projection_size=8"], ["prompt.projection_size=8", "prompt.kind=shared"]),
        (["prompt=input", "prompt.length=0"], ["prompt.kind=input", "got 0", "prompt=deep prompt.length=0"]),
        (["model.head=mlp", "model.head_rank=4"], ["model.head_rank=4", "model.head=mlp"]),
        (["prompt.length=0"], ["prompt.length=0", "model.head=none"]),
        (["tuning=lora", "prompt.dropout=0.1"], ["prompt.dropout=0.1", "prompt.length=0"]),
        (["data=pairs", "data.train=x.csv", "data.dev=holdout"], ["data.dev=holdout", "data.kind=pairs"]),
        (["data=pairs", "data.train=demo"], ["demo", "data.kind=pairs"]),
        (["data.columns=[a,b]"], ["data.columns", "3 columns", "data.kind=triplets"]),
        (["data.dev=stsb"], ["data.dev=stsb", "data.dir"]),
        (["data.prompts=[query]"], ["data.prompts", "3 entries", "data.kind=triplets", "'data.prompts=[query,"]),
        (["model.default_prompt=q", 'model.prompts={query: "q: "}'], ["model.default_prompt", "(query)", "'q'"]),
        (["model.default_prompt=q", "model.prompts={}"], ["model.default_prompt", "it is empty", "=null"]),
        (["evaluation=sts"], ["evaluation.tasks=[sts,sick]", "data.dir"]),
        (["evaluation.tasks=[demo,geometry,my.csv]"], ["evaluation.tasks=[geometry]", "data.dir"]),
        (["evaluation.tasks=[demo,transfr]"], ["'transfr'", "'evaluation.tasks=[demo,transfer]'"]),
    ],
)
def test_settings_that_exclude_each_other_are_refused_and_named(overrides, names):
    with pytest.raises(ConfigError) as caught:
        config_of(*overrides)
    assert all(name in str(caught.value) for name in names)
    assert "Try: " in str(caught.value)


@pytest.mark.parametrize(
    ("left_out", "missing"),
    [
        ("model", "model.path"),
        ("data", "data.kind"),
        *((key, key) for key in ("data.kind", "data.train", "model.path")),
    ],
)
def test_a_missing_setting_is_named(left_out, missing):
    raw = valid()
    section, _, name = left_out.rpartition(".")
    del (raw[section] if section else raw)[name]
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(raw)
    assert str(caught.value).startswith(f"{missing} is not set. It must be ")
    assert "Config" not in str(caught.value)


@pytest.mark.parametrize("raw", [None, [], "text", 3])
def test_a_value_without_settings_is_rejected(raw):
    with pytest.raises(ConfigError, match="must hold settings"):
        Config.from_dict(raw)
    with pytest.raises(ConfigError, match="loss must hold settings"):
        Config.from_dict({**valid(), "loss": raw})


def test_errors_of_sweep_settings_suggest_a_sweep_command():
    for raw in ({"parallel": 0}, {"parallel": "two"}, {"trials": 0}, {"seed": -1}):
        with pytest.raises(ConfigError) as caught:
            SweepConfig.from_dict(raw)
        remedy = str(caught.value).partition("Try: python run.py -m sweep.")[2]
        name, _, value = remedy.partition("=")
        SweepConfig.from_dict({name: yaml.safe_load(value)})


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=roberta-base", "data=wiki", "data.dir='/däta'", "seed=7", "tracking.tags=[a,b]"],
        ["prompt=projected", "data=triplets", "data.train=t.csv", "data.columns=[0,b,c]", "prompt.dropout=0.25"],
        [
            "model.prompts={b: 'b: ', a: ''}",
            "model.default_prompt=a",
            "data.prompts=[a,'x y','']",
            "model.pooling=cls+avg",
        ],
    ],
)
def test_a_config_comes_back_equal_from_its_dictionary_and_from_its_file(overrides, tmp_path):
    config = config_of(*overrides)
    assert Config.from_dict(config.to_dict()) == config
    assert read_config(write_config(config, tmp_path / "config.yaml")) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe", None])
def test_a_config_file_that_cannot_be_read_is_one_error_with_its_path(content, tmp_path):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read the config .*config\.yaml"):
        read_config(path)


def test_an_empty_config_file_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="the config must hold settings"):
        read_config(tmp_path / "config.yaml")


@pytest.mark.parametrize(("data", "remedy"), [("data=demo", "data.dev=holdout"), ("data=wiki", "data.dev=FILE")])
def test_a_patience_without_a_dev_set_is_refused(data, remedy):
    raw = composed(data, "trainer.patience=3", "data.dir=d")
    raw["data"]["dev"] = None
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(raw)
    expected = f"trainer.patience=3 needs a dev set, but data.dev is null. Try: trainer.patience=null, or {remedy}"
    assert str(caught.value) == expected
    for key, value in (("trainer.patience", None), ("data.dev", remedy.partition("=")[2])):
        Config.from_dict(put({**raw, "trainer": dict(raw["trainer"]), "data": dict(raw["data"])}, key, value))
