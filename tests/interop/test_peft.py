import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.encoders import add_pipeline, save_small_encoder, small_backbone, small_tokens
from support.limits import memory_limit
from transformers import AutoModel

from promcse_pl.adapter import adapter_hash, load_adapter, save_adapter
from promcse_pl.interop.peft import FAMILIES, export_peft, import_peft
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.pipeline import TextSettings
from promcse_pl.models.tuning import Tuning
from promcse_pl.utils.errors import AdapterError, ConfigError

P = 5


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def prompt_encoder(folder: Path, family: str = "bert", **settings: object) -> PromptEncoder:
    save_small_encoder(folder, family)
    model = PromptEncoder(FrozenBackbone.load(str(folder)), length=P, **{"pooling": "avg", **settings})
    torch.nn.init.normal_(model.prompt.embedding.weight)
    return model.eval()


def states(backbone: FrozenBackbone, prompt_kv: torch.Tensor, offset: int) -> torch.Tensor:
    """Our hidden states of the real tokens of three sentences."""
    tokens = small_tokens([9, 4, 7], backbone.pad_id)
    with torch.no_grad():
        (states_NTD,) = backbone(tokens.ids_NT, tokens.mask_NT, prompt_kv, position_offset=offset)
    return states_NTD[tokens.mask_NT.bool()]


def peft_states(model: torch.nn.Module, pad_id: int, **extra: torch.Tensor) -> torch.Tensor:
    tokens = small_tokens([9, 4, 7], pad_id)
    with torch.no_grad():
        output = model.eval()(input_ids=tokens.ids_NT, attention_mask=tokens.mask_NT, **extra)
    return output.last_hidden_state[tokens.mask_NT.bool()]


def test_peft_reads_an_export_and_gives_our_hidden_states(tmp_path, family):
    peft = pytest.importorskip("peft")
    ours = prompt_encoder(tmp_path / "encoder", family)
    export_peft(ours, tmp_path / "peft")
    base = AutoModel.from_pretrained(tmp_path / "encoder")
    plain = peft_states(base, ours.backbone.pad_id)
    theirs = peft_states(peft.PeftModel.from_pretrained(base, tmp_path / "peft"), ours.backbone.pad_id)
    wanted = states(ours.backbone, ours.prompt(), P)
    torch.testing.assert_close(theirs, wanted, rtol=0, atol=2e-6)
    assert (theirs - plain).abs().max() > 0.1  # the prompt matters
    assert (states(ours.backbone, ours.prompt(), 0) - theirs).abs().max() > 0.1  # and so do the positions


def test_a_shared_prompt_is_exported_as_a_deep_one(tmp_path):
    ours = prompt_encoder(tmp_path / "encoder", kind="shared")
    export_peft(ours, tmp_path / "peft")
    again = import_peft(tmp_path / "peft")
    assert again.prompt.kind == "deep"
    assert torch.equal(again.prompt(), ours.prompt())
    assert len(again.prompt().unique(dim=0)) == 1


def test_an_input_prompt_and_a_low_rank_head_are_not_exported(tmp_path):
    for settings, message in (
        ({"kind": "input"}, r"prompt\.kind=input.*sentence-transformers"),
        ({"head": "low_rank"}, "the low-rank head cannot be stored"),
    ):
        with pytest.raises(AdapterError, match=message):
            export_peft(PromptEncoder(small_backbone(), length=P, **settings), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_an_adapter_that_peft_trained_and_saved_is_read_with_its_outputs(tmp_path, family):
    peft = pytest.importorskip("peft")
    save_small_encoder(tmp_path / "encoder", family)
    base = AutoModel.from_pretrained(tmp_path / "encoder")
    config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=P)
    theirs = peft.get_peft_model(base, config)
    tokens = small_tokens([9, 4, 7], base.config.pad_token_id)
    theirs(input_ids=tokens.ids_NT, attention_mask=tokens.mask_NT).last_hidden_state[:, 0, 0].sum().backward()
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    theirs.save_pretrained(tmp_path / "peft")
    ours = import_peft(tmp_path / "peft")
    assert (ours.prompt.length, ours.position_offset, ours.pooling, ours.head_mode) == (P, P, "avg", "none")
    assert (ours.prompt.dropout, ours.training) == (0.0, False)
    wanted = peft_states(theirs, ours.backbone.pad_id)
    torch.testing.assert_close(states(ours.backbone, ours.prompt(), P), wanted, rtol=0, atol=2e-6)


def test_a_projected_prefix_of_peft_is_read_as_the_tensor_it_makes(tmp_path):
    peft = pytest.importorskip("peft")
    save_small_encoder(tmp_path / "encoder")
    base = AutoModel.from_pretrained(tmp_path / "encoder")
    config = peft.PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=11
    )
    theirs = peft.get_peft_model(base, config)
    wanted = peft_states(theirs, 0)
    theirs.save_pretrained(tmp_path / "peft")
    ours = import_peft(tmp_path / "peft")
    torch.testing.assert_close(states(ours.backbone, ours.prompt(), P), wanted, rtol=0, atol=2e-6)


def test_explicit_positions_are_shifted_by_peft_too(tmp_path):
    peft = pytest.importorskip("peft")
    ours = prompt_encoder(tmp_path / "encoder")
    export_peft(ours, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "encoder"), tmp_path / "peft")
    given = peft_states(theirs, 0, position_ids=torch.arange(9).expand(3, 9))
    torch.testing.assert_close(given, states(ours.backbone, ours.prompt(), P), rtol=0, atol=2e-6)


@pytest.mark.parametrize("projection_size", [None, 7])
def test_export_and_import_give_the_same_vectors(tmp_path, family, projection_size):
    ours = prompt_encoder(tmp_path / "encoder", family, projection_size=projection_size, pooling="cls")
    export_peft(ours, tmp_path / "peft")
    again = import_peft(tmp_path / "peft", pooling="cls")
    tokens = small_tokens([9, 4, 7], ours.backbone.pad_id)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens)[0], ours(tokens)[0], rtol=0, atol=1e-6)
    save_adapter(again, tmp_path / "adapter")
    assert load_adapter(tmp_path / "adapter").pooling == "cls"


def test_the_config_is_what_peft_asks_for(tmp_path):
    ours = prompt_encoder(tmp_path / "encoder")
    export_peft(ours, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    wanted = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": str(tmp_path / "encoder"),
        "num_virtual_tokens": P,
        "token_dim": 16,
        "num_layers": 3,
        "num_attention_heads": 2,
    }
    assert wanted.items() <= config.items()
    (tensor,) = load_file(tmp_path / "peft" / "adapter_model.safetensors").values()
    assert torch.equal(tensor, ours.prompt.embedding.weight)  # the axes are in the same order


def test_the_encoder_may_lie_elsewhere_now(tmp_path):
    ours = prompt_encoder(tmp_path / "encoder")
    export_peft(ours, tmp_path / "peft")
    (tmp_path / "encoder").rename(tmp_path / "moved")
    again = import_peft(tmp_path / "peft", encoder=str(tmp_path / "moved"))
    assert again.backbone.identity.name == str(tmp_path / "moved")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match=r"names no encoder. Try: import_peft\(folder, encoder="):
        import_peft(tmp_path / "peft")


def test_what_peft_cannot_hold_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="head cannot be stored by PEFT"):
        export_peft(prompt_encoder(tmp_path / "encoder", head="mlp"), tmp_path / "peft")
    with pytest.raises(
        AdapterError, match="needs position_offset = prompt length >= 1; this adapter has position_offset 0"
    ):
        export_peft(prompt_encoder(tmp_path / "encoder", position_offset=0), tmp_path / "peft")
    with pytest.raises(AdapterError, match="and prompt length 0"):
        export_peft(PromptEncoder(small_backbone(), length=0), tmp_path / "peft")
    with pytest.raises(AdapterError, match="does not run on modernbert"):
        export_peft(PromptEncoder(small_backbone("modernbert"), length=P), tmp_path / "peft")
    with pytest.raises(AdapterError, match=r"the concatenated poolings \(cls\+avg\) cannot be stored by PEFT"):
        export_peft(prompt_encoder(tmp_path / "encoder", pooling="cls+avg"), tmp_path / "peft")
    dense = FrozenBackbone.load(add_pipeline(save_small_encoder(tmp_path / "dense")))
    with pytest.raises(AdapterError, match="the dense layers of the encoder cannot be stored by PEFT"):
        export_peft(PromptEncoder(dense, length=P), tmp_path / "peft")
    for text in (TextSettings(lower_case=True), TextSettings(prompts={"query": "w5 "}, default_prompt="query")):
        with pytest.raises(
            AdapterError, match="the default prompt and the lower case of texts cannot be stored by PEFT"
        ):
            export_peft(prompt_encoder(tmp_path / "encoder", text=text), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    export_peft(
        prompt_encoder(tmp_path / "encoder", head="mlp_train_only"), tmp_path / "peft"
    )  # the vectors have no head


def test_an_import_on_an_encoder_with_a_pipeline_is_saved_without_it(tmp_path):
    export_peft(prompt_encoder(tmp_path / "encoder"), tmp_path / "peft")
    add_pipeline(tmp_path / "encoder")
    imported = import_peft(tmp_path / "peft")
    save_adapter(imported, tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter")
    assert (loaded.width, loaded.text) == (imported.width, TextSettings())
    assert adapter_hash(loaded) == adapter_hash(imported)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "of the type LORA; only PREFIX_TUNING"),
        ({"num_transformer_submodules": 2}, "encoder-decoder"),
        ({"num_attention_heads": 4}, "num_attention_heads 4; .* has 2"),
        ({"num_layers": 2}, "num_layers 2; .* has 3"),
        ({"num_virtual_tokens": 6}, r"has shape \(5, 96\), expected \(6, 96\)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, change, message):
    export_peft(prompt_encoder(tmp_path / "encoder"), tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterError, match=message):
        import_peft(tmp_path / "peft")


def test_damaged_folders_are_refused(tmp_path):
    export_peft(prompt_encoder(tmp_path / "encoder"), tmp_path / "peft")
    config, weights = tmp_path / "peft" / "adapter_config.json", tmp_path / "peft" / "adapter_model.safetensors"
    tensor = load_file(weights)["prompt_embeddings"]
    with pytest.raises(ConfigError, match="pooling must be one of cls"):
        import_peft(tmp_path / "peft", pooling="mean")
    for tensors, message in (
        ({"prompt_embeddings": tensor, "classifier.weight": tensor.clone()}, "must hold prompt_embeddings alone"),
        ({"prompt_embeddings": tensor / 0}, "finite"),
    ):
        save_file(tensors, weights)
        with pytest.raises(AdapterError, match=message):
            import_peft(tmp_path / "peft")
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(AdapterError, match="is damaged"):
        import_peft(tmp_path / "peft")
    weights.unlink()
    with pytest.raises(AdapterError, match="incomplete"):
        import_peft(tmp_path / "peft")
    config.write_text("[]")
    with pytest.raises(AdapterError, match="must contain an object, got list"):
        import_peft(tmp_path / "peft")
    config.unlink()
    with pytest.raises(AdapterError, match="not a PEFT adapter"):
        import_peft(tmp_path / "peft")


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("sprung"),))


def test_a_bin_file_gives_its_tensors_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = prompt_encoder(tmp_path / "encoder")
    export_peft(ours, tmp_path / "peft")
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    path = tmp_path / "peft" / "adapter_model.bin"
    torch.save({"prompt_embeddings": ours.prompt.embedding.weight.detach()}, path)
    assert torch.equal(import_peft(tmp_path / "peft").prompt.embedding.weight, ours.prompt.embedding.weight)
    for write in (
        lambda: torch.save({"prompt_embeddings": Trap()}, path),
        lambda: path.write_bytes(pickle.dumps(Trap())),
    ):
        write()
        with pytest.raises(AdapterError, match="holds more than tensors"):
            import_peft(tmp_path / "peft")
    assert not Path("sprung").exists()


@pytest.mark.parametrize("kind", ["stride 0", "sparse"])
def test_a_prefix_that_declares_terabytes_is_rejected_before_memory_is_allocated(tmp_path, kind):
    export_peft(prompt_encoder(tmp_path / "encoder"), str(tmp_path / "peft"))
    (tmp_path / "peft/adapter_model.safetensors").unlink()
    tensor = torch.zeros(1).expand(10**6, 10**6) if kind == "stride 0" else torch.zeros(P, 96).to_sparse()
    torch.save({"prompt_embeddings": tensor}, tmp_path / "peft/adapter_model.bin")
    with memory_limit(), pytest.raises(AdapterError, match="is sparse, or declares more values than the file contains"):
        import_peft(str(tmp_path / "peft"))


@pytest.mark.parametrize("length", [10**12, -1, None, "5"])
def test_a_prompt_length_that_the_tensor_does_not_have_is_refused_before_memory_is_taken(tmp_path, length):
    export_peft(prompt_encoder(tmp_path / "encoder"), tmp_path / "peft")
    path = tmp_path / "peft/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_virtual_tokens": length}))
    with memory_limit(), pytest.raises(AdapterError, match=r"prompt_embeddings has shape \(5, 96\), expected"):
        import_peft(tmp_path / "peft", encoder=tmp_path / "encoder")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_a_fifo_instead_of_a_file_is_rejected_without_blocking(tmp_path, name):
    export_peft(prompt_encoder(tmp_path / "encoder"), tmp_path / "peft")
    if name.endswith(".bin"):
        (tmp_path / "peft/adapter_model.safetensors").unlink()
    (tmp_path / "peft" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "peft" / name)
    with memory_limit(), pytest.raises(AdapterError, match="it is a FIFO, not a regular file"):
        import_peft(tmp_path / "peft")


def test_trained_weights_are_refused_with_the_export_that_keeps_them(tmp_path):
    backbone = small_backbone()
    backbone.tune(Tuning("bias"))
    with pytest.raises(AdapterError, match=r"tuning.weights=bias.*xport to sentence-transformers instead"):
        export_peft(PromptEncoder(backbone, length=4), tmp_path / "out")
