"""The model card of an adapter: its content, and when it is written."""

import dataclasses
import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from support.encoders import save_small_adapter, save_small_encoder
from support.runs import run_small

from promcse_pl.adapter import adapter_files, load_adapter, read_checked, save_adapter, training_summary
from promcse_pl.embedder import PromCSE
from promcse_pl.model_card import CARD, encoder_metadata, is_generated, may_replace_card, model_card
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.hub import card_metadata
from promcse_pl.models.pipeline import TextSettings
from promcse_pl.models.tuning import Tuning
from promcse_pl.models.weights import file_sha256
from promcse_pl.utils.errors import AdapterError


@pytest.fixture
def adapter(tmp_path) -> Path:
    return save_small_adapter(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of a second with a dev set, a test file and the frozen encoder."""
    folder = tmp_path_factory.mktemp("run")
    for name, shift in (("dev.tsv", 0), ("test.tsv", 3)):
        rows = (f"w{5 + i} w7\tw{6 + (i + shift) % 5} w{9 + i}\t{i % 6}\n" for i in range(20))
        (folder / name).write_text("a\tb\tscore\n" + "".join(rows))
    run_small(folder, data={"dev": str(folder / "dev.tsv")}, evaluation={"tasks": [str(folder / "test.tsv")]})
    return folder / "run"


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def cells(card: str) -> dict[str, str]:
    """First and second column of all tables."""
    rows = (line.strip("|").split("|") for line in card.splitlines() if line.startswith("| "))
    return {row[0].strip(): row[1].strip().strip("`") for row in rows}


def about(adapter: Path) -> dict:
    return json.loads((adapter / "adapter.json").read_text())


# --- content


def test_the_card_of_a_run_has_its_encoder_data_settings_and_scores_with_intervals(run):
    card, found = (run / "adapter" / CARD).read_text(), about(run / "adapter")
    results = json.loads((run / "results.json").read_text())
    table = cells(card)
    assert table["sha256 of the encoder's weights"] == found["encoder"]["sha256"]
    assert (table["prompt"], table["pooling"], table["head"]) == ("deep, 4 slots", "cls", "mlp")
    assert table["trained parameters"].startswith(f"{results['trained_parameters']:,} ")
    assert table["training data"] == "train.csv"
    assert table["sha256 of the training data"] == file_sha256(run.parent / "train.csv")
    assert (table["training rows"], table["optimiser steps"], table["seed"]) == ("10", "3", "42")
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert (settings["loss.margin"], settings["data.batch_size"], settings["optim.lr"]) == (0.2, 4, 0.01)
    assert str(run.parent) not in card.replace(found["encoder"]["name"], "")  # the path of the data stays private
    for task, label in (("test.tsv", "test.tsv"), ("dev", "dev.tsv (dev set)")):
        (line,) = [line for line in card.splitlines() if line.startswith(f"| {label} |")]
        for target in ("frozen encoder", "adapter"):
            score = results["evaluation"]["targets"][target]["scores"][task]
            assert f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]" in line
    entries = metadata(card)["model-index"][0]["results"]
    assert {entry["dataset"]["name"]: entry["metrics"][0]["value"] for entry in entries} == {
        "test.tsv": results["scores"]["adapter"]["test.tsv"],
        "dev.tsv (dev set)": results["scores"]["adapter"]["dev"],
    }


def test_the_metadata_are_valid_for_the_hub(run):
    data = huggingface_hub.ModelCard((run / "adapter" / CARD).read_text()).data
    assert (data.library_name, data.pipeline_tag) == ("promcse_pl", "sentence-similarity")
    assert [result.metric_type for result in data.eval_results] == ["spearman", "spearman"]
    assert data.base_model is None  # a local folder
    assert data.license is None


def test_licence_and_language_are_those_of_the_encoders_card(tmp_path):
    model = FrozenBackbone.load("sentence-transformers/all-MiniLM-L6-v2")
    save_adapter(PromptEncoder(model, length=2, pooling="avg"), tmp_path / "adapter")
    card = (tmp_path / "adapter" / CARD).read_text()
    found = metadata(card)
    assert (found["license"], found["language"]) == ("apache-2.0", "en")
    assert (found["base_model"], found["base_model_relation"]) == (model.identity.name, "adapter")
    assert "Licence of the encoder: apache-2.0 (from its model card)." in card
    assert "Languages: en (model card of the encoder)." in card
    assert "Texts are truncated to 256 tokens." in card


@pytest.mark.parametrize(
    ("encoder", "link", "expected"),
    [
        ("someone/encoder", "LICENSE.md", "https://huggingface.co/someone/encoder/blob/v1/LICENSE.md"),
        ("someone/encoder", "https://example.org/licence", "https://example.org/licence"),
        ("./other", "LICENSE.md", None),
    ],
)
def test_a_relative_link_to_the_licence_of_the_encoder_is_absolute_in_the_card(encoder, link, expected, monkeypatch):
    monkeypatch.setattr("promcse_pl.model_card.card_metadata", lambda *_, **__: {"license_link": link})
    assert encoder_metadata(encoder, "v1").get("license_link") == expected


def test_the_card_of_an_encoder_in_the_adapter_is_not_that_of_another_encoder_in_the_current_folder(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (save_small_encoder(tmp_path / "encoder") / CARD).write_text("---\nlicense: mit\n---\n")
    backbone = FrozenBackbone.load(str(save_small_encoder(tmp_path / "other")))
    backbone.identity = dataclasses.replace(backbone.identity, name="./encoder")
    save_adapter(PromptEncoder(backbone, length=2, pooling="avg"), tmp_path / "adapter")
    assert "license" not in metadata((tmp_path / "adapter" / CARD).read_text())


def test_without_test_scores_the_card_has_the_dev_score(adapter):
    found, parameters = read_checked(adapter)
    for metric, label in (("spearman", "Spearman"), ("ndcg_at_10", "nDCG@10")):
        found["training"] = {"rows": 3, f"dev_{metric}": 81.2345}
        card = model_card(found, name="small", parameters=parameters, encoder_card={})
        assert cells(card)["dev score"] == f"81.23 ({label} x 100)"
        assert "The adapter has no recorded test scores." in card


@pytest.mark.parametrize("readme", [None, "no metadata", "---\n- a list\n---\n", "---\n{broken\n---\n", b"\xff\xfe"])
def test_without_metadata_the_licence_is_said_to_be_unknown(tmp_path, readme):
    folder = save_small_encoder(tmp_path / "encoder")
    if readme is not None:
        (folder / CARD).write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    assert card_metadata(str(folder), None) == {}
    save_adapter(PromptEncoder(FrozenBackbone.load(str(folder)), length=2, pooling="avg"), tmp_path / "adapter")
    card = (tmp_path / "adapter" / CARD).read_text()
    assert "license" not in metadata(card)
    assert "is unknown: its model card was not found. Look it up" in card


def test_the_card_names_trained_weights_text_prompts_and_positions(tmp_path):
    backbone = FrozenBackbone.load(str(save_small_encoder(tmp_path / "encoder")))
    backbone.tune(Tuning("lora", 3, 6.0))
    text = TextSettings(max_length=None, lower_case=False, prompts={"query": "q: "}, default_prompt="query")
    save_adapter(PromptEncoder(backbone, length=4, pooling="avg", text=text), tmp_path / "adapter")
    card = (tmp_path / "adapter" / CARD).read_text()
    assert cells(card)["trained weights of the encoder"] == "lora, rank 3, alpha 6.0"
    assert 'Text prompts (`prompt_name` of `encode`): `query` (`"q: "`). Default: `query`.' in card
    assert "truncated to the 40 positions of the encoder, minus the position offset of 4." in card


def test_names_from_outside_cannot_add_lines_to_a_card(adapter):
    found, parameters = read_checked(adapter)
    evil = "data|`x`\n\n## Injected\n<script>"
    found["encoder"]["name"] = evil
    found["training"] = {"dev": evil, "data": {"name": evil, "sha256": evil}, "stopped_early": evil, "rows": 3}
    card = model_card(found, name='a "b" $c', parameters=parameters, encoder_card={"language": evil, "license": evil})
    titles = ["Usage", "Model", "Training", "Evaluation", "Licence", "Limitations"]
    assert [line[3:] for line in card.splitlines() if line.startswith("## ")] == titles
    assert metadata(card)["license"] == evil  # quoted by YAML


@pytest.mark.parametrize("training", [{"evaluation": 3}, {"evaluation": {"tasks": {}}}, {"data": [1]}, {"settings": 1}])
def test_a_training_summary_of_another_program_is_an_error_that_names_a_way_out(adapter, training):
    encoder = load_adapter(adapter)
    with pytest.raises(AdapterError, match=r"training in adapter.json .* Try: (.*)$") as caught:
        save_adapter(encoder, adapter, training=training)
    command = str(caught.value).partition("Try: ")[2]
    exec(command.replace("FOLDER", repr(str(adapter))), {"save_adapter": save_adapter, "load_adapter": load_adapter})
    assert about(adapter)["training"] == {}


# --- when it is written


def test_a_generated_card_is_recognised_until_it_is_edited(adapter):
    card = (adapter / CARD).read_text()
    assert is_generated(card)
    for edited in (card.replace("adapter", "Adapter", 1), card + "mine\n", card[:-2], card[1:], "", card + card):
        assert not is_generated(edited)


@pytest.mark.parametrize("written", ["mine", None, "edited"])
def test_a_save_replaces_its_own_card_and_no_other(adapter, written):
    before = (adapter / CARD).read_text()
    if written:
        (adapter / CARD).write_text(written if written == "mine" else f"{before}edited\n")
    kept = (adapter / CARD).read_text()
    save_adapter(load_adapter(adapter), adapter, training={"rows": 77})
    after = (adapter / CARD).read_text()
    assert (after == kept) is bool(written)
    assert ("| training rows | 77 |" in after) is not bool(written)
    assert about(adapter)["training"] == {"rows": 77}


def test_a_readme_that_is_no_readable_file_is_kept(adapter):
    (adapter / CARD).unlink()
    assert may_replace_card(adapter)
    (adapter / CARD).mkdir()
    assert not may_replace_card(adapter)
    save_adapter(load_adapter(adapter), adapter)
    assert (adapter / CARD).is_dir()


def test_a_loaded_adapter_keeps_its_training_until_its_tensors_change(run, tmp_path):
    model = PromCSE.load(run, device="cpu")
    model.save_pretrained(tmp_path / "copy")
    assert about(tmp_path / "copy")["training"] == about(run / "adapter")["training"]
    for name in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (run / "adapter" / name).read_bytes()
    with torch.no_grad():
        next(iter(model.encoder.prompt.parameters())).add_(1e-3)
    model.save_pretrained(tmp_path / "changed")
    assert about(tmp_path / "changed")["training"] == {}
    card = (tmp_path / "changed" / CARD).read_text()
    assert "Not recorded" in card
    assert "model-index" not in metadata(card)


def test_a_loaded_adapter_keeps_no_training_if_its_settings_change(run):
    model = PromCSE.load(run, device="cpu")
    assert training_summary(model.encoder)
    for name, value in (
        ("pooling", "avg"),
        ("position_offset", 1),
        ("text", dataclasses.replace(model.encoder.text, max_length=9)),
    ):
        before = getattr(model.encoder, name)
        setattr(model.encoder, name, value)
        assert training_summary(model.encoder) == {}, name
        setattr(model.encoder, name, before)
    assert training_summary(model.encoder)


def test_the_files_of_an_adapter_are_those_that_its_checksum_covers(tmp_path):
    backbone = FrozenBackbone.load(str(save_small_encoder(tmp_path / "encoder")))
    backbone.identity = dataclasses.replace(backbone.identity, name="./encoder")
    save_adapter(PromptEncoder(backbone, length=2, pooling="avg"), tmp_path / "adapter")
    (tmp_path / "adapter/encoder/notes.txt").write_text("mine")
    (tmp_path / "adapter/notes.txt").write_text("mine")
    found, _ = read_checked(tmp_path / "adapter")
    (tmp_path / "copy").mkdir()
    for name, path in adapter_files(tmp_path / "adapter", found).items():
        (tmp_path / "copy" / name).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "copy" / name)
    copy, original = (PromCSE.load(tmp_path / name, device="cpu") for name in ("copy", "adapter"))
    assert np.array_equal(copy.encode(["w5 w6"]), original.encode(["w5 w6"]))
    assert not list((tmp_path / "copy").rglob("notes.txt"))
