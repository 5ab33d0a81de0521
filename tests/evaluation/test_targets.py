"""Resolution of target names on the command line."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.encoders import add_pipeline, save_small_encoder
from support.folders import GOLDEN

from promcse_pl.adapter import save_adapter
from promcse_pl.config import Config
from promcse_pl.embedder import PromCSE
from promcse_pl.evaluation.targets import find_targets, frozen_target
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.pipeline import TextSettings
from promcse_pl.run_folder import write_config
from promcse_pl.utils.errors import AdapterError, ConfigError, DataError

SENTENCES = ["w5 w6 w7", "w8"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_small_encoder(tmp_path_factory.mktemp("encoders") / "tiny-bert")


def save_run(folder: Path, bert: Path, seed: int | None, lr: float = 0.1) -> Path:
    torch.manual_seed(seed or 0)
    encoder = PromptEncoder(FrozenBackbone.load(str(bert)), length=2, pooling="avg")
    save_adapter(encoder, folder / "adapter", training={} if seed is None else {"seed": seed})
    raw = {"seed": seed or 0, "optim": {"lr": lr}, "tracking": {"name": str(seed)}}
    raw["data"], raw["model"] = {"kind": "triplets", "train": "demo"}, {"path": str(bert)}
    write_config(Config.from_dict(raw), folder / "config.yaml")
    return folder


def only(name, **options):
    (target,) = find_targets([str(name)], device="cpu", **options)
    return target


def test_an_adapter_and_the_run_it_lies_in_are_the_same_target(tmp_path, bert):
    run = save_run(tmp_path / "my-run", bert, seed=3)
    for folder in (run, run / "adapter"):
        target = only(folder)
        assert (target.name, target.kind, [member.seed for member in target.members]) == ("my-run", "adapter", [3])
        assert target.members[0].load().encoder.prompt.length == 2


def test_an_encoder_is_frozen_and_pooled_by_the_mean_unless_asked_otherwise(bert):
    target = only(bert)
    model = target.members[0].load()
    assert (target.name, target.kind) == ("tiny-bert", "frozen encoder, pooling avg")
    assert (model.encoder.prompt.length, model.encoder.pooling, model.encoder.head_mode) == (0, "avg", "none")
    assert only(bert, pooling="cls").members[0].load().encoder.pooling == "cls"


def test_an_encoder_with_a_pipeline_is_pooled_as_in_its_folder_unless_asked_otherwise(tmp_path):
    folder = add_pipeline(save_small_encoder(tmp_path / "encoder"))
    target = only(folder)
    model = target.members[0].load()
    assert (target.kind, model.encoder.pooling, model.width) == ("frozen encoder, pooling cls", "cls", 8)
    assert (model.max_tokens, model.encoder.text.default_prompt) == (20, "query")
    assert only(folder, pooling="max").kind == "frozen encoder, pooling max"


def test_the_frozen_encoder_of_an_adapter_is_pooled_as_in_its_folder_and_gets_the_texts_of_the_adapter(tmp_path, bert):
    folder = add_pipeline(save_small_encoder(tmp_path / "encoder"))
    adapter = PromCSE(PromptEncoder(FrozenBackbone.load(folder), length=2, pooling="max"))
    frozen, published = frozen_target(adapter).members[0].load(), only(folder).members[0].load()
    np.testing.assert_array_equal(frozen.encode(SENTENCES), published.encode(SENTENCES))
    text = TextSettings(lower_case=True, prompts={"other": "w9 "}, default_prompt="other")
    prompted = PromCSE(PromptEncoder(FrozenBackbone.load(folder), length=2, pooling="max", text=text))
    frozen = frozen_target(prompted).members[0].load()
    np.testing.assert_allclose(frozen.encode(SENTENCES), published.encode(SENTENCES, prompt="w9 "), atol=1e-6)
    assert abs(frozen.encode(SENTENCES) - published.encode(SENTENCES)).max() > 1e-3
    plain = frozen_target(PromCSE(PromptEncoder(FrozenBackbone.load(bert), length=2, pooling="max"))).members[0].load()
    assert (plain.encoder.pooling, plain.encoder.prompt.length) == ("max", 0)


@pytest.mark.golden
def test_an_official_checkpoint_is_seen_in_its_config():
    folder = next(GOLDEN.glob("eval_sts_*/expected.json")).parent
    target = only(folder, pooling="cls")
    assert (target.name, target.kind) == (folder.name, "official checkpoint")
    model = target.members[0].load()
    assert (model.encoder.pooling, model.encode(SENTENCES).shape) == ("cls", (2, model.width))


def test_a_folder_of_runs_is_one_target_with_a_member_for_each_seed(tmp_path, bert):
    for seed in (1, 2, 3):
        save_run(tmp_path / f"seed{seed}", bert, seed)
    (tmp_path / "notes").mkdir()
    target = only(tmp_path)
    assert (target.kind, [member.seed for member in target.members]) == ("runs over seeds", [1, 2, 3])
    first, second = (member.load().encode(SENTENCES) for member in target.members[:2])
    assert abs(first - second).max() > 1e-4


def test_runs_that_differ_by_more_than_the_seed_are_refused_with_what_differs(tmp_path, bert):
    folder = tmp_path / "my sweep"
    save_run(folder / "a", bert, 1)
    save_run(folder / "b", bert, 2, lr=0.2)
    (folder / "sweep.json").write_text("{}")
    with pytest.raises(DataError, match=r"differ by the seed alone, but a and b differ in optim\.lr") as caught:
        only(folder)
    targets = find_targets(shlex.split(str(caught.value).partition("separate targets: ")[2]))
    assert [target.name for target in targets] == ["a", "b"]


def test_a_run_of_an_earlier_version_differs_from_others_by_its_settings_alone(tmp_path, bert):
    for seed in (1, 2):
        save_run(tmp_path / str(seed), bert, seed)
    path = tmp_path / "1/config.yaml"
    tree = yaml.safe_load(path.read_text())
    del tree["prompt"]["position_offset"]
    tree["loss"]["symmetric"], tree["trainer"]["average"] = False, None
    path.write_text(yaml.safe_dump(tree))
    assert len(only(tmp_path).members) == 2
    tree["loss"]["symmetric"] = True  # of both runs: they are comparable, although this version cannot repeat them
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(DataError, match=r"differ by the seed alone, but 1 and 2 differ in loss\.symmetric"):
        only(tmp_path)
    tree["seed"] = 2
    (tmp_path / "2/config.yaml").write_text(yaml.safe_dump(tree))
    assert len(only(tmp_path).members) == 2
    path.write_text("[1]")
    with pytest.raises(DataError, match=r"1/config.yaml cannot be read as settings"):
        only(tmp_path)


def test_runs_of_the_same_or_of_no_seed_are_refused(tmp_path, bert):
    save_run(tmp_path / "a", bert, 1)
    save_run(tmp_path / "b", bert, 1)
    with pytest.raises(DataError, match="different seeds, got 1 for a"):
        only(tmp_path)
    save_run(tmp_path / "c/a", bert, None)
    save_run(tmp_path / "c/b", bert, None)
    with pytest.raises(DataError, match="got None for a"):
        only(tmp_path / "c")


def test_an_unknown_target_is_an_error_without_a_request_to_the_hub(tmp_path, bert, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    with pytest.raises(AdapterError, match="holds 0 runs; a folder of seeds holds two or more"):
        only("outputs")
    for name in ("outputs/typo", "./typo", "/no/such/folder", "a/b/c"):
        with pytest.raises(AdapterError, match=f"the target {name} does not exist"):
            only(name)
    with pytest.raises(ConfigError, match=r"--pooling must be one of cls, .*, got 'mean'"):
        only(bert, pooling="mean")
    with pytest.raises(ConfigError, match="given twice"):
        find_targets([str(bert), str(bert)])


def test_targets_of_one_name_are_named_by_their_paths(tmp_path, bert):
    names = [str(save_run(tmp_path / parent / "run", bert, 1)) for parent in ("x", "y")]
    assert [target.name for target in find_targets([*names, str(bert)])] == [*names, "tiny-bert"]


def test_the_frozen_encoder_of_an_adapter_keeps_its_pooling_and_loses_prompt_and_head(tmp_path, bert):
    model = only(save_run(tmp_path / "run", bert, 1)).members[0].load()
    frozen = frozen_target(model).members[0].load()
    expected = only(bert).members[0].load().encode(SENTENCES)
    assert abs(frozen.encode(SENTENCES) - expected).max() < 1e-6


def test_runs_with_equal_training_settings_are_seeds_of_one_target(tmp_path, bert):
    for seed in (1, 2):
        save_run(tmp_path / f"seed{seed}", bert, seed)
        config = tmp_path / f"seed{seed}/config.yaml"
        raw = yaml.safe_load(config.read_text())
        raw["trainer"] |= {"save_every": seed, "recompute": "always" if seed == 1 else "auto"}
        config.write_text(yaml.safe_dump(raw))
    assert len(only(tmp_path).members) == 2
