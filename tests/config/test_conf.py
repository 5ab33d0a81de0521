"""Every choice of conf/ against the schema."""

import dataclasses
import re

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from support.configs import CONF, composed, config_of

from promcse_pl.config import Config, SweepConfig, TuningConfig, flat_settings
from promcse_pl.config.fields import settings
from promcse_pl.utils.errors import ConfigError

MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
DATA_CHOICES = sorted(path.stem for path in (CONF / "data").glob("*.yaml") if path.stem[0] != "_")


def choices(group: str) -> list[str]:
    return sorted(path.relative_to(CONF / group).with_suffix("").as_posix() for path in (CONF / group).rglob("*.yaml"))


def missing_groups(preset: str) -> bool:
    """Whether a preset selects a group or choice that conf/ does not have."""
    entries = yaml.safe_load((CONF / "experiment" / f"{preset}.yaml").read_text()).get("defaults", [])
    chosen = [entry.items() for entry in entries if isinstance(entry, dict)]
    return not all(
        (CONF / key.removeprefix("override /") / f"{choice}.yaml").is_file()
        for items in chosen
        for key, choice in items
    )


PRESETS = [
    pytest.param(preset, marks=pytest.mark.skipif(missing_groups(preset), reason="its group is not in conf/"))
    for preset in choices("experiment")
    if "/" in preset
]


def with_files(data: str) -> list[str]:
    """Overrides that a choice of data requires."""
    return {"nli": ["data.dir=d"], "wiki": ["data.dir=d"], "demo": []}.get(data, ["data.train=my.csv"])


@pytest.mark.parametrize(
    ("model", "data"),
    [
        pytest.param(model, data, marks=[] if model == "minilm" or data in ("nli", "wiki") else pytest.mark.exhaustive)
        for model in MODELS
        for data in DATA_CHOICES
    ],
)
def test_every_model_composes_with_every_kind_of_data(model, data):
    config = config_of(f"model={model}", f"data={data}", *with_files(data))
    views = {"nli": "triplets", "demo": "triplets", "wiki": "sentences"}.get(data, data)
    assert config.data.kind == views
    assert (config.loss.hinge_weight > 0) == (views == "triplets")


@pytest.mark.parametrize(
    "override",
    [
        f"{group}={choice}"
        for group in (
            "debug",
            "evaluation",
            "experiment",
            "loss",
            "optim",
            "prompt",
            "sweep",
            "tracking",
            "trainer",
            "tuning",
        )
        for choice in choices(group)
        if "/" not in choice
    ],
)
def test_every_other_choice_composes_into_a_valid_config(override):
    extra = ["data.dir=d"] if override in ("evaluation=sts", "evaluation=all") else []
    group, _, choice = override.partition("=")
    config = config_of(override, *extra)
    own = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())
    recipe = yaml.safe_load((CONF / "recipe/supervised/minilm.yaml").read_text())
    for key, value in (own or {}).items():
        if key in ("defaults", "hydra", "sweep"):
            continue
        for name, wanted in value.items() if isinstance(value, dict) else [(key, value)]:
            part = key if isinstance(value, dict) else group
            if isinstance(value, dict) or name not in recipe.get(
                part, {}
            ):  # the recipe of the pair wins over a plain group
                assert getattr(getattr(config, part), name) == wanted


@pytest.mark.parametrize("model", ["minilm", "bert-base", "roberta-large"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_row_of_a_table_composes_for_every_kind_of_encoder(preset, model):
    config = config_of(f"experiment={preset}", f"model={model}", "data.dir=d")
    table, _, row = preset.partition("/")
    is_supervised = table == "table1" and not row.startswith("unsup")
    assert config.data.kind == ("triplets" if is_supervised else "sentences")
    assert (config.data.dev, config.evaluation.tasks) == ("stsb", ["sts", "sick"])
    assert config.loss.hinge_weight == (10 if row.endswith("_eh") else 0)
    assert (config.loss.temperature, config.loss.margin) == (0.05, 0.2)
    tuning = getattr(config, "tuning", None)
    assert (tuning is not None and tuning.weights == "full") == ("full" in row)
    assert "full" in row or config.prompt.kind == (row if row in ("shared", "input") else "deep")


@pytest.mark.parametrize("model", ["minilm", "bert-base"])
def test_a_row_that_two_tables_share_is_one_config(model):
    ours, theirs = (
        config_of(f"experiment={preset}", f"model={model}", "data.dir=d")
        for preset in ("table3/per_layer", "table1/unsup_prompt")
    )
    assert ours == theirs
    assert config_of("experiment=table1/prompt", f"model={model}", "data.dir=d") == config_of(
        "experiment=no_hinge", f"model={model}", "data=nli", "data.dir=d"
    )


@pytest.mark.parametrize(("model", "data"), [("minilm", "demo"), ("bert-base", "wiki"), ("roberta-large", "nli")])
def test_a_head_alone_wins_over_the_recipe(model, data):
    config = config_of(f"model={model}", f"data={data}", "data.dir=d", "tuning=head")
    assert (config.prompt.length, config.model.head, config.model.head_rank) == (0, "low_rank", 8)
    assert config.tuning == TuningConfig()


@pytest.mark.parametrize("choice", ["head", "none"])
def test_without_a_prompt_and_trained_weights_there_is_no_masked_language_modelling(choice):
    roberta = ("model=roberta-base", "data=wiki", "data.dir=d")
    assert config_of(*roberta).loss.mlm_weight > 0
    assert config_of(*roberta, f"tuning={choice}").loss.mlm_weight == 0


def test_no_group_of_conf_is_left_without_a_test():
    tested = {"debug", "evaluation", "experiment", "loss", "optim", "prompt", "sweep", "tracking", "trainer", "tuning"}
    assert {path.name for path in CONF.iterdir() if path.is_dir()} == tested | {"data", "model", "mode", "recipe"}


def test_every_sweep_names_settings_and_its_values_are_valid():
    files = [yaml.safe_load(path.read_text()) for path in (CONF / "sweep").glob("*.yaml")]
    swept = [whole["hydra"]["sweeper"]["params"] for whole in files if "hydra" in whole]
    assert len(swept) == 2
    for key, values in (pair for params in swept for pair in params.items()):
        assert key in settings(Config)
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


# batch, lr, epochs (SimCSE, Gao et al. 2021: README and example scripts)
SIMCSE_RECIPES = {
    ("wiki", "bert-base"): (64, 3e-5, 1),
    ("wiki", "bert-large"): (64, 1e-5, 1),
    ("wiki", "roberta-base"): (512, 1e-5, 1),
    ("wiki", "roberta-large"): (512, 3e-5, 1),
    ("nli", "bert-base"): (512, 5e-5, 3),
    ("nli", "bert-large"): (512, 1e-5, 3),
    ("nli", "roberta-base"): (512, 5e-5, 3),
    ("nli", "roberta-large"): (512, 1e-5, 3),
}


@pytest.mark.parametrize(("pair", "recipe"), SIMCSE_RECIPES.items(), ids=map("-".join, SIMCSE_RECIPES))
def test_full_fine_tuning_selects_the_recipe_of_simcse(pair, recipe):
    data, model = pair
    config = config_of("tuning=full", f"model={model}", f"data={data}", "data.dir=d")
    assert (config.data.batch_size, config.optim.lr, config.trainer.epochs) == recipe
    optim = config.optim
    assert (optim.schedule, optim.warmup, optim.weight_decay, optim.clip_norm) == ("linear", 0.0, 0.0, 1.0)
    assert (config.loss.temperature, config.loss.mlm_weight, config.data.max_length) == (0.05, 0.0, 32)
    assert (config.model.pooling, config.model.head) == ("cls", "mlp" if data == "nli" else "mlp_train_only")
    assert config_of("tuning=full", f"model={model}", f"data={data}", "data.dir=d", "optim.lr=0.1").optim.lr == 0.1


@pytest.mark.parametrize("model", ["bert-base", "bert-large"])
def test_the_short_name_of_a_model_selects_the_same_full_fine_tuning(model):
    for data in ("nli", "wiki"):
        rest = ["tuning=full", f"data={data}", "data.dir=d"]
        assert composed(f"model={model}", *rest) == composed(f"model={model}-uncased", *rest)


@pytest.mark.parametrize(("tuning", "lr"), [("full", 2e-5), ("lora", 3e-4), ("bitfit", 1e-3)])
def test_other_trained_weights_have_a_starting_point(tuning, lr):
    for model in ("minilm", "mpnet", *(() if tuning == "full" else ("bert-base",))):
        config = config_of(f"tuning={tuning}", f"model={model}", "data=nli", "data.dir=d")
        assert (config.optim.lr, config.optim.warmup) == (lr, 0.1)
        if model != "bert-base":
            assert (config.data.batch_size, config.trainer.epochs, config.model.head) == (128, 1, "none")


SENTENCE_ENCODERS = [model for model in MODELS if not model.startswith(("bert-", "roberta-"))]


@pytest.mark.parametrize("data", ["nli", "wiki"])
@pytest.mark.parametrize("model", SENTENCE_ENCODERS)
def test_a_sentence_encoder_keeps_its_pooling_and_positions(model, data):
    config = config_of(f"model={model}", f"data={data}", "data.dir=d")
    assert (config.model.pooling, config.model.head, config.model.max_length) == ("auto", "none", "auto")
    assert (config.prompt.length, config.prompt.position_offset) == (10, 0)
    assert (config.data.batch_size, config.trainer.epochs, config.loss.mlm_weight) == (128, 1, 0.0)
    assert config.optim.lr == (3e-2 if data == "nli" and model in ("minilm", "mpnet") else 1e-2)


def test_the_prompts_of_an_encoder_without_dropout_have_dropout_where_two_views_must_differ():
    rates = {
        model: config_of(f"model={model}", "data=wiki", "data.dir=d").prompt.dropout for model in SENTENCE_ENCODERS
    }
    assert {model for model, rate in rates.items() if rate == 0.1} == {
        "nomic",
        "qwen3-embedding-0.6b",
        "embeddinggemma",
    }
    assert {config_of(f"model={model}", "data=nli", "data.dir=d").prompt.dropout for model in rates} == {None}


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


@pytest.mark.parametrize(
    ("choice", "weights", "length"),
    [("prompt", "none", 10), ("full", "full", 0), ("lora", "lora", 0), ("bitfit", "bias", 0), ("none", "none", 0)],
)
def test_a_tuning_wins_over_the_recipe_and_an_override_over_the_tuning(choice, weights, length):
    config = config_of(f"tuning={choice}")
    assert (config.tuning.weights, config.prompt.length) == (weights, length)
    assert config.prompt.position_offset == 0  # of the recipe
    both = config_of("prompt.length=7", f"tuning={choice}", "optim.lr=0.25", "trainer.max_steps=3")
    assert (both.tuning.weights, both.prompt.length, both.optim.lr) == (weights, 7, 0.25)


def test_the_default_tuning_changes_no_setting():
    assert flat_settings({"tuning": composed("tuning=prompt")["tuning"]}) == {
        key: setting.default for key, setting in settings(Config).items() if key.startswith("tuning.")
    }
    assert composed() == composed("tuning=prompt")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tuning.rank=4"], r"tuning.rank=4 has no effect with tuning.weights=none. Try: .* tuning=lora tuning.rank=4"),
        (["tuning=full", "tuning.alpha=4"], "tuning.alpha=4 has no effect with tuning.weights=full"),
        (["tuning.weights=lora"], "tuning.weights=lora needs tuning.rank, got null. Try: .* tuning=lora"),
        (["tuning=none", "debug=fast"], "leaves nothing to train. Try: .*trainer.max_steps=0 to evaluate"),
        (
            ["tuning=head", "loss.mlm_weight=0.1"],
            "loss.mlm_weight=0.1 has no effect with prompt.length=0 .* Try: loss.mlm_weight=0",
        ),
        (
            ["trainer.max_steps=0", "trainer.patience=2"],
            "trainer.patience=2 has no effect with .* Try: trainer.patience=null",
        ),
    ],
)
def test_settings_of_a_tuning_without_effect_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config_of(*overrides)
    config_of("tuning=lora", "tuning.rank=4")
    config_of("tuning=none", "debug=fast", "trainer.max_steps=0")


def test_the_defaults_of_a_sweep_are_those_of_conf():
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        assert OmegaConf.to_container(compose("config").sweep) == dataclasses.asdict(SweepConfig())


BASE_CHOICES = {
    "data": "_base",
    "loss": "default",
    "prompt": "deep",
    "optim": "adamw",
    "trainer": "auto",
    "tracking": "wandb",
    "evaluation": "none",
}


@pytest.mark.parametrize(("group", "choice"), BASE_CHOICES.items())
def test_the_base_choice_of_a_group_holds_the_defaults_of_the_schema(group, choice):
    values = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())
    if group == "loss":
        values |= yaml.safe_load((CONF / "mode/supervised.yaml").read_text())["loss"]
    required = ("data.kind", "data.train", "data.dev")  # every choice of data sets them
    expected = {key: setting.default for key, setting in settings(Config).items() if key.startswith(f"{group}.")}
    assert flat_settings({group: values}) == {key: value for key, value in expected.items() if key not in required}


def test_the_default_command_differs_from_the_schema_by_its_model_data_and_recipe_alone():
    files = ("model/minilm", "data/demo", "evaluation/demo", "recipe/supervised/minilm")
    chosen = {"model.max_length"}  # set in config.yaml: the schema keeps the limit of runs of earlier versions
    for name in files:
        tree = yaml.safe_load((CONF / f"{name}.yaml").read_text())
        chosen |= set(flat_settings({"evaluation": tree} if "tasks" in tree else tree))
    composed_settings = flat_settings(composed())
    differing = {key for key, setting in settings(Config).items() if composed_settings[key] != setting.default}
    assert differing <= chosen
    assert {"model.path", "data.train", "optim.lr"} <= differing


def test_a_partial_config_gets_the_defaults_of_the_schema():
    raw = {"model": {"path": "encoder"}, "data": {"kind": "triplets", "train": "my.csv"}, "loss": {"margin": 0.1}}
    config = Config.from_dict(raw)
    given = flat_settings(raw)
    expected = {key: given.get(key, setting.default) for key, setting in settings(Config).items()}
    assert flat_settings(config.to_dict()) == expected


def test_only_the_encoder_and_the_training_data_are_required():
    required = {key for key, setting in settings(Config).items() if setting.default is dataclasses.MISSING}
    assert required == {"model.path", "data.kind", "data.train"}


def test_conf_holds_values_and_no_code_paths():
    for path in CONF.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert "_target_" not in text
        assert "promcse_pl." not in yaml.safe_dump(yaml.safe_load(text))


def test_an_unknown_key_does_not_compose():
    with pytest.raises(ConfigCompositionException):
        composed("loss.margn=0.3")
