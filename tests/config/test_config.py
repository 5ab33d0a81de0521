"""The schema, and the choices of conf/ against it."""

import ast
import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from support.configs import CONF, composed, leaves, put, valid

from promcse_pl.config import Config, SweepConfig, check_overrides, decides, schema, setting_keys
from promcse_pl.run_folder import read_config, write_config
from promcse_pl.utils.errors import ConfigError

MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
DATA_CHOICES = sorted(path.stem for path in (CONF / "data").glob("*.yaml") if path.stem[0] != "_")


def config_of(*overrides: str) -> Config:
    return Config.from_dict(composed(*overrides))


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def with_files(data: str) -> list[str]:
    """What a user must add to a choice of data."""
    return {"nli": ["data.dir=d"], "wiki": ["data.dir=d"], "demo": []}.get(data, ["data.train=my.csv"])


# --- every choice of conf/ -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", DATA_CHOICES)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_composes_with_every_kind_of_data(model, data):
    config = config_of(f"model={model}", f"data={data}", *with_files(data))
    views = {"nli": "triplets", "demo": "triplets", "wiki": "sentences"}.get(data, data)
    assert config.data.kind == views
    assert (config.loss.hinge_weight > 0) == (views == "triplets")


@pytest.mark.parametrize(
    "override",
    [
        f"{group}={choice}"
        for group in ("debug", "evaluation", "experiment", "loss", "optim", "prompt", "sweep", "tracking", "trainer")
        for choice in choices(group)
    ],
)
def test_every_other_choice_composes_into_a_valid_config(override):
    extra = ["data.dir=d"] if override in ("evaluation=sts", "evaluation=all") else []
    group, _, choice = override.partition("=")
    config = config_of(override, *extra)
    own = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())
    recipe = yaml.safe_load((CONF / "recipe/supervised/minilm.yaml").read_text())
    for key, value in own.items():
        if key in ("defaults", "hydra", "sweep"):
            continue
        for name, wanted in value.items() if isinstance(value, dict) else [(key, value)]:
            part = key if isinstance(value, dict) else group
            if isinstance(value, dict) or name not in recipe.get(
                part, {}
            ):  # the recipe of the pair wins over a plain group
                assert getattr(getattr(config, part), name) == wanted


def test_no_group_of_conf_is_left_without_a_test():
    tested = {"debug", "evaluation", "experiment", "loss", "optim", "prompt", "sweep", "tracking", "trainer"}
    assert {path.name for path in CONF.iterdir() if path.is_dir()} == tested | {"data", "model", "mode", "recipe"}


def test_every_sweep_names_settings_and_its_values_are_valid():
    files = [yaml.safe_load(path.read_text()) for path in (CONF / "sweep").glob("*.yaml")]
    swept = [whole["hydra"]["sweeper"]["params"] for whole in files if "hydra" in whole]
    assert len(swept) == 2
    for key, values in (pair for params in swept for pair in params.items()):
        assert key in [known for part in setting_keys().values() for known in part]
        values = re.sub(r"(tag|interval|choice|log)\b|[()]", "", values)
        for value in filter(None, values.split(",")):
            config_of(f"{key}={value}")


# supervised? model: batch, lr, P, MLM weight, epochs (Jiang et al. 2022 and the official README)
RECIPES = {
    ("wiki", "bert-base-uncased"): (256, 3e-2, 16, 0.0, 1),
    ("wiki", "bert-large-uncased"): (256, 3e-2, 10, 0.0, 1),
    ("wiki", "roberta-base"): (64, 3e-2, 14, 0.1, 1),
    ("wiki", "roberta-large"): (64, 1e-2, 10, 0.1, 1),
    ("nli", "bert-base-uncased"): (256, 1e-2, 12, 0.0, 10),
    ("nli", "bert-large-uncased"): (256, 5e-3, 12, 0.0, 10),
    ("nli", "roberta-base"): (512, 1e-2, 10, 0.0, 10),
    ("nli", "roberta-large"): (512, 5e-3, 10, 0.0, 10),
}


@pytest.mark.parametrize(("pair", "recipe"), RECIPES.items(), ids=map("-".join, RECIPES))
def test_model_and_data_alone_select_the_published_recipe(pair, recipe):
    data, model = pair
    config = config_of(f"model={model}", f"data={data}", "data.dir=d")
    assert (
        config.data.batch_size,
        config.optim.lr,
        config.prompt.length,
        config.loss.mlm_weight,
        config.trainer.epochs,
    ) == recipe
    supervised = data == "nli"
    assert config.model.path.split("/")[-1] == model
    assert (config.model.pooling, config.model.head) == ("cls", "mlp" if supervised else "mlp_train_only")
    assert (config.loss.temperature, config.loss.margin, config.loss.hinge_weight) == (
        0.05,
        0.2,
        10 if supervised else 0,
    )
    assert (config.data.max_length, config.trainer.eval_every, config.seed, config.optim.clip_norm) == (
        32,
        125,
        42,
        1.0,
    )
    assert (config.data.kind, config.data.dev) == ("triplets" if supervised else "sentences", "stsb")
    assert (config.prompt.kind, config.prompt.dropout, config.prompt.position_offset) == ("deep", None, None)
    assert config.trainer.max_steps is None


@pytest.mark.parametrize("model", ["bert-base", "bert-large"])
def test_the_short_name_of_a_model_selects_the_same_run(model):
    for data in ("nli", "wiki"):
        assert composed(f"model={model}", f"data={data}") == composed(f"model={model}-uncased", f"data={data}")


def test_a_model_of_the_paper_brings_the_papers_data():
    assert composed("model=roberta-large") == composed("model=roberta-large", "data=nli")


def test_an_override_wins_over_the_recipe_in_any_order():
    changes = [
        "optim.lr=0.5",
        "prompt.length=3",
        "data.batch_size=7",
        "trainer.epochs=2",
        "loss.mlm_weight=1",
        "model.head=none",
    ]
    choice = ["model=roberta-base", "data=wiki", "data.dir=d"]
    for order in (changes + choice, choice + changes):
        config = config_of(*order)
        assert (config.optim.lr, config.prompt.length, config.data.batch_size) == (0.5, 3, 7)
        assert (config.trainer.epochs, config.loss.mlm_weight, config.model.head) == (2, 1.0, "none")


def test_the_ablation_switches_the_hinge_off_and_changes_nothing_else():
    plain, ablation = composed("model=bert-base"), composed("model=bert-base", "experiment=no_hinge")
    plain["loss"]["hinge_weight"] = 0.0
    assert plain == ablation


def test_the_defaults_of_a_sweep_are_those_of_conf():
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        assert OmegaConf.to_container(compose("config").sweep) == dataclasses.asdict(SweepConfig())


def test_the_defaults_of_the_schema_are_those_of_conf_where_both_have_one():
    raw = composed("model=bert-base", "data=nli")
    for part in (schema.LossConfig, schema.PromptConfig, schema.OptimConfig, schema.TrackingConfig):
        section = next(field.name for field in dataclasses.fields(Config) if field.type == part.__name__)
        for field in dataclasses.fields(part):
            if field.default is not dataclasses.MISSING and field.name not in ("length",):  # the recipe sets it
                assert raw[section][field.name] == field.default, f"{section}.{field.name}"


def test_conf_holds_values_and_no_code_paths():
    for path in CONF.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert "_target_" not in text
        assert "promcse_pl." not in yaml.safe_dump(yaml.safe_load(text))


def test_an_unknown_key_does_not_compose():
    with pytest.raises(ConfigCompositionException):
        composed("loss.margn=0.3")


# --- the schema's errors ---------------------------------------------------------------------------------------------


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
        ("model.pooling", "mean", "python run.py model.pooling=cls"),
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
    *(
        (f"trainer.{name}", 0)
        for name in ("epochs", "max_steps", "eval_every", "log_every", "save_every", "chunk_tokens")
    ),
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
    raw = composed("prompt=projected") if key == "prompt.projection_size" else valid()
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
        (["prompt.length=0"], ["prompt.length=0", "model.head=none"]),
        (["data=pairs", "data.train=x.csv", "data.dev=holdout"], ["data.dev=holdout", "data.kind=pairs"]),
        (["data=pairs", "data.train=demo"], ["demo", "data.kind=pairs"]),
        (["data.columns=[a,b]"], ["data.columns", "3 columns", "data.kind=triplets"]),
        (["data.dev=stsb"], ["data.dev=stsb", "data.dir"]),
        (["evaluation=sts"], ["evaluation.tasks=[sts,sick]", "data.dir"]),
        (["evaluation.tasks=[demo,geometry,my.csv]"], ["evaluation.tasks=[geometry]", "data.dir"]),
        (["evaluation.tasks=[demo,transfr]"], ["'transfr'", "'evaluation.tasks=[transfer]'"]),
    ],
)
def test_settings_that_exclude_each_other_are_refused_and_named(overrides, names):
    with pytest.raises(ConfigError) as caught:
        config_of(*overrides)
    assert all(name in str(caught.value) for name in names)
    assert "Try: " in str(caught.value)


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
    allowed = message.partition("Allowed")[2]
    if section in setting_keys() and section:
        assert all(known in allowed for known in setting_keys()[section])
    else:
        assert all(part in allowed for part in (*setting_keys(), "seed"))


def test_an_unknown_key_in_a_saved_config_is_refused():
    raw = valid()
    raw["loss"]["margn"] = 0.1
    with pytest.raises(ConfigError, match=r"loss\.margn is not a setting\. Did you mean loss\.margin"):
        Config.from_dict(raw)
    with pytest.raises(ConfigError, match=r"extra is not a setting\."):
        Config.from_dict({**valid(), "extra": 1})


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


@pytest.mark.parametrize("key", ["model", "data.kind", "data.train", "model.path"])
def test_a_missing_setting_is_named(key):
    raw = valid()
    section, _, name = key.rpartition(".")
    del (raw[section] if section else raw)[name]
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(raw)
    assert str(caught.value).startswith(f"{key} is not set. It must be ")
    assert "Config" not in str(caught.value).removeprefix(key)


@pytest.mark.parametrize("raw", [None, [], "text", 3])
def test_what_holds_no_settings_is_refused(raw):
    with pytest.raises(ConfigError, match="must hold settings"):
        Config.from_dict(raw)
    with pytest.raises(ConfigError, match="loss must hold settings"):
        Config.from_dict({**valid(), "loss": raw})


# --- round trips and documentation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=roberta-base", "data=wiki", "data.dir='/däta'", "seed=7", "tracking.tags=[a,b]"],
        ["prompt=projected", "data=triplets", "data.train=t.csv", "data.columns=[0,b,c]", "prompt.dropout=0.25"],
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


def test_every_setting_is_documented_beneath_it():
    tree = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    documented = set()
    for section in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for node, after in zip(section.body, section.body[1:], strict=False):
            text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
            if isinstance(node, ast.AnnAssign) and isinstance(text, str) and text.strip():
                documented.add((section.name, node.target.id))
    sections = {name: hint for name, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)}
    wanted = {(hint.__name__, field.name) for hint in sections.values() for field in dataclasses.fields(hint)}
    assert wanted | {("Config", "seed")} <= documented


def test_what_a_setting_decides_is_marked_on_its_field():
    keys = [key for part in setting_keys().values() for key in part]
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


def test_every_alias_refers_to_an_existing_setting():
    every = {key for part in setting_keys().values() for key in part}
    assert set(schema._OTHER_NAMES) <= every
    names = [name for others in schema._OTHER_NAMES.values() for name in others]
    assert len(names) == len(set(names))
    assert not {*names, *schema._ABSENT} & {key.rpartition(".")[2] for key in every}


@pytest.mark.parametrize(
    "key", ["weight_decay", "optim.weight_decay", "optim.warmup_steps", "gradient_accumulation_steps"]
)
def test_settings_that_are_absent_on_purpose_have_their_own_error(key):
    with pytest.raises(ConfigError, match=rf"{key} is not a setting: .*\. Try: leave it out"):
        check_overrides([f"{key}=1"], {})


def test_errors_of_sweep_settings_suggest_a_sweep_command():
    for raw in ({"parallel": 0}, {"parallel": "two"}, {"trials": 0}, {"seed": -1}):
        with pytest.raises(ConfigError) as caught:
            SweepConfig.from_dict(raw)
        remedy = str(caught.value).partition("Try: python run.py -m sweep.")[2]
        name, _, value = remedy.partition("=")
        SweepConfig.from_dict({name: yaml.safe_load(value)})
