"""Trained encoder weights: selection, gradients over chunks, state dict, adapters and merging."""

import copy
import dataclasses
import json
import shutil
import sys

import pytest
import torch
from support.encoders import NO_DROPOUT, every_family, prompt_encoder, save_small_encoder, small_backbone, small_tokens
from torch import nn

from promcse_pl import PromCSE
from promcse_pl.adapter import load_adapter, save_adapter
from promcse_pl.adapter_folder import BUNDLED
from promcse_pl.evaluation.targets import frozen_target
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.cpu.layers import can_fuse
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.tuning import Tuning, merge_lora
from promcse_pl.utils.errors import AdapterError, ConfigError, EncoderError

BIAS, LORA, FULL = Tuning("bias"), Tuning("lora", rank=3, alpha=6.0), Tuning("full")
WITHOUT_BIAS = {"eurobert", "t5", "mt5", "umt5", "modernbert", "llama", "mistral", "qwen3", "gemma3_text"}
LENGTHS = [9, 4, 12, 5, 9, 3, 7, 7, 11]
SENTENCES = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13 w14"]
every_tuning = pytest.mark.parametrize("tuning", [BIAS, LORA, FULL], ids=lambda tuning: tuning.weights)


def tuned(family: str, tuning: Tuning, *, length: int = 0, **options: object) -> PromptEncoder:
    """An encoder in float64 and eval mode whose trained weights differ from their initial values."""
    backbone = small_backbone(family, **(NO_DROPOUT if family == "bert" else {}))
    torch.manual_seed(4)
    backbone.tune(tuning)
    encoder = PromptEncoder(backbone, length=length, **{"pooling": "avg", **options}).double().eval()
    move(encoder)
    return encoder


def move(encoder: PromptEncoder) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in encoder.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator).to(weight))


def gradients(encoder: PromptEncoder, **options: object) -> dict[str, torch.Tensor]:
    encoder.zero_grad()
    vectors, _ = encoder(small_tokens(LENGTHS, encoder.backbone.pad_id), train_head=True, **options)
    vectors.sin().square().sum().backward()
    return {name: weight.grad.clone() for name, weight in encoder.named_parameters() if weight.grad is not None}


@every_family
@every_tuning
def test_every_family_trains_saves_and_loads_its_weights(family, tuning, tmp_path):
    folder = save_small_encoder(tmp_path / "encoder", family)
    backbone = FrozenBackbone.load(folder)
    if tuning == BIAS and family in WITHOUT_BIAS:
        with pytest.raises(ConfigError, match=rf"{family} encoders have no bias vectors. Try: tuning=lora"):
            backbone.tune(tuning)
        return
    backbone.tune(tuning)
    encoder = PromptEncoder(backbone, length=2, pooling="avg").eval()
    found = gradients(encoder, chunk_tokens=20)
    trained = {name for name, weight in encoder.named_parameters() if weight.requires_grad}
    assert set(found) == trained == set(encoder.state_dict())
    # B = 0 hides A; a key bias, and a row of relative positions that no sentence has, may have a gradient of 0
    assert sum(float(gradient.abs().max()) > 0 for gradient in found.values()) >= len(trained) / 2
    move(encoder)
    expected, _ = encoder(small_tokens(LENGTHS, backbone.pad_id))
    save_adapter(encoder, tmp_path / "adapter")
    again = load_adapter(tmp_path / "adapter")
    found, _ = again(small_tokens(LENGTHS, backbone.pad_id))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in encoder.state_dict().items())


def test_the_selected_weights_are_those_of_the_definitions():
    backbone = small_backbone()
    names = {name for name, _ in backbone.model.named_parameters()}
    used = {name for name in names if not name.startswith("pooler.")}
    backbone.tune(FULL)
    assert set(backbone.tuned_names) == used
    backbone = small_backbone()
    backbone.tune(BIAS)
    assert set(backbone.tuned_names) == {name for name in used if name.endswith(".bias")}
    linear = {
        name
        for name, module in small_backbone().model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("encoder.layer.")
    }
    backbone = small_backbone()
    backbone.tune(LORA)
    assert {name.split(".lora_")[0] for name in backbone.tuned_names} == linear
    assert len(backbone.tuned_names) == 2 * len(linear)


@pytest.mark.parametrize(("family", "threads"), [("bert", 1), ("mpnet", 2), ("albert", 2)])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("length", [0, 3])
@every_tuning
def test_chunks_give_the_gradients_of_the_whole_batch(family, tuning, length, recompute, threads):
    if tuning == BIAS and family in WITHOUT_BIAS:
        pytest.skip("no biases")
    encoder = tuned(family, tuning, length=length, head="mlp")
    plain = gradients(encoder)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, again = (gradients(encoder, chunk_tokens=20, recompute=recompute) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert found.keys() == plain.keys()
    largest = max(float(gradient.norm()) for gradient in plain.values())
    for name, gradient in found.items():
        assert (gradient - plain[name]).norm() <= 1e-12 * largest, name
        assert torch.equal(gradient, again[name]), name  # summed in the same order


def test_recomputed_chunks_draw_the_same_dropout_masks():
    encoder = tuned("mpnet", FULL, length=3).train()

    def step(recompute):
        torch.manual_seed(1)
        return gradients(encoder, chunk_tokens=20, recompute=recompute)

    kept, again = step(False), step(True)
    assert all(torch.equal(gradient, again[name]) for name, gradient in kept.items())


@every_tuning
def test_an_adapter_keeps_the_trained_weights_the_base_encoder_and_the_hash(tuning, tmp_path):
    folder = save_small_encoder(tmp_path / "encoder")
    backbone = FrozenBackbone.load(folder)
    plain = PromCSE(PromptEncoder(FrozenBackbone.load(folder), length=0, pooling="avg").eval())
    backbone.tune(tuning)
    encoder = PromptEncoder(backbone, length=0, pooling="avg").eval()
    move(encoder)
    trained = PromCSE(encoder)
    trained.save_pretrained(tmp_path / "adapter")
    loaded = PromCSE.load(tmp_path / "adapter", device="cpu")
    assert (loaded.encode(SENTENCES) == trained.encode(SENTENCES)).all()
    assert abs(loaded.encode(SENTENCES) - plain.encode(SENTENCES)).max() > 1e-3
    assert f"tuning='{tuning.weights}'" in repr(loaded)
    about = json.loads((tmp_path / "adapter/adapter.json").read_text())
    assert about["encoder"]["name"] == str(folder)
    assert {key: about["tuning"][key] for key in ("weights", "rank", "alpha")} == {
        "weights": tuning.weights,
        "rank": tuning.rank,
        "alpha": tuning.alpha,
    }
    assert (tmp_path / "adapter/encoder").is_dir() == (tuning == FULL)
    # the comparison is with the encoder before training
    base = frozen_target(loaded).members[0].load()
    assert base.adapter_hash() == plain.adapter_hash() == frozen_target(plain).members[0].load().adapter_hash()
    assert (base.encode(SENTENCES) == plain.encode(SENTENCES)).all()
    # the type that the model is loaded in is not part of the hash
    hashes = {PromCSE.load(tmp_path / "adapter", device="cpu", dtype=dtype).adapter_hash() for dtype in DTYPES}
    assert hashes == {trained.adapter_hash()} != {plain.adapter_hash()}
    loaded.save_pretrained(tmp_path / "copy")
    assert PromCSE.load(tmp_path / "copy", device="cpu").adapter_hash() == trained.adapter_hash()


DTYPES = ("float32", "bfloat16", "int8")


def test_rounded_weights_are_not_saved(tmp_path):
    backbone = FrozenBackbone.load(save_small_encoder(tmp_path / "encoder"))
    backbone.tune(BIAS)
    save_adapter(PromptEncoder(backbone, length=0), tmp_path / "adapter")
    for dtype in DTYPES[1:]:
        rounded = PromCSE.load(tmp_path / "adapter", device="cpu", dtype=dtype)
        with pytest.raises(EncoderError, match=f"was read as .*{dtype}; saving would store the rounded weights"):
            rounded.save_pretrained(tmp_path / "copy")


def test_a_fully_trained_adapter_loads_without_the_base_encoder_and_its_damage_is_found(tmp_path, monkeypatch):
    folder = save_small_encoder(tmp_path / "encoder")
    backbone = FrozenBackbone.load(folder)
    backbone.tune(FULL)
    encoder = PromptEncoder(backbone, length=0).eval()
    move(encoder)
    save_adapter(encoder, tmp_path / "adapter")
    shutil.move(folder, tmp_path / "moved")
    loaded = PromCSE.load(tmp_path / "adapter", device="cpu")
    with pytest.raises(EncoderError, match=r"cannot read the encoder|does not exist|neither"):
        loaded.encoder.backbone.base()
    monkeypatch.chdir(tmp_path)
    elsewhere = PromCSE.load("adapter", encoder="moved", device="cpu")
    elsewhere.save_pretrained("copy")
    monkeypatch.chdir("/")  # the adapter has the absolute path
    for model in (elsewhere, PromCSE.load(tmp_path / "copy", device="cpu")):
        assert model.encoder.backbone.base().identity.sha256 == backbone.identity.sha256
    # the untrained encoder has the right names and shapes, and other values
    shutil.copy(tmp_path / "moved/model.safetensors", tmp_path / "adapter/encoder/model.safetensors")
    with pytest.raises(AdapterError, match="its checksum is wrong"):
        PromCSE.load(tmp_path / "adapter", device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "some"}, "tuning.weights is 'some'; allowed: bias, lora, full"),
        ({"rank": None}, "tuning.rank is None; allowed with lora"),
        ({"rank": 1025}, "tuning.rank is 1025; allowed with lora"),
        ({"rank": 4}, "has tuning.rank 4, and adapter.safetensors LoRA matrices of other ranks"),
        ({"weights": "bias"}, "tuning.rank is 3; allowed with bias: null"),
        ({"extra": 1}, "tuning must have the keys"),
    ],
)
def test_a_description_with_other_values_is_refused(change, message, tmp_path):
    backbone = FrozenBackbone.load(save_small_encoder(tmp_path / "encoder"))
    backbone.tune(LORA)
    save_adapter(PromptEncoder(backbone, length=0), tmp_path / "adapter")
    path = tmp_path / "adapter/adapter.json"
    about = json.loads(path.read_text())
    about["tuning"] |= change
    path.write_text(json.dumps(about))
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path / "adapter")


@every_tuning
def test_trained_weights_of_an_encoder_without_a_name_are_refused_with_a_command_that_works(tuning, tmp_path):
    nameless = FrozenBackbone.load(save_small_encoder(tmp_path / "encoder"))
    nameless.identity = dataclasses.replace(nameless.identity, name=BUNDLED)
    save_adapter(PromptEncoder(nameless, length=2), tmp_path / "bundled")
    loaded = load_adapter(tmp_path / "bundled").backbone
    shutil.rmtree(tmp_path / "encoder")
    loaded.save(tmp_path / "FOLDER")
    loaded.tune(tuning)
    with pytest.raises(AdapterError, match=r"this encoder has none.* Try: backbone.save\(Path\('FOLDER'\)\)"):
        save_adapter(PromptEncoder(loaded, length=0), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    named = FrozenBackbone.load(tmp_path / "FOLDER")
    named.tune(tuning)
    encoder = PromptEncoder(named, length=0, pooling="avg").eval()
    move(encoder)
    save_adapter(encoder, tmp_path / "adapter")
    found = PromCSE.load(tmp_path / "adapter", device="cpu").encode(SENTENCES)
    assert (found == PromCSE(encoder).encode(SENTENCES)).all()


def test_the_hash_of_weights_in_int8_is_that_of_their_values_before(tmp_path):
    folder, hashes = save_small_encoder(tmp_path / "encoder"), []
    for seed in (1, 2):
        backbone = FrozenBackbone.load(folder)
        backbone.tune(BIAS)
        torch.manual_seed(seed)
        for weight in backbone.tuned_weights.values():
            torch.nn.init.normal_(weight)
        model = PromCSE(PromptEncoder(backbone, length=0).eval())
        hashes.append(model.adapter_hash())
        backbone.quantize()
        assert model.adapter_hash() == hashes[-1]
    assert hashes[0] != hashes[1]
    with pytest.raises(EncoderError, match="weights in int8 cannot be trained"):
        backbone.tune(BIAS)


@pytest.mark.parametrize("convert", [lambda model: model.quantize(), lambda model: model.bfloat16()])
def test_weights_that_changed_after_they_were_loaded_have_another_hash(convert, tmp_path):
    backbone = FrozenBackbone.load(save_small_encoder(tmp_path / "encoder"))
    backbone.tune(BIAS)
    save_adapter(PromptEncoder(backbone, length=0), tmp_path / "adapter")
    model = PromCSE.load(tmp_path / "adapter", device="cpu")
    stored = model.adapter_hash()
    for weight in model.encoder.backbone.tuned_weights.values():
        weight.add_(1)
    convert(model.encoder.backbone)
    assert model.adapter_hash() != stored


def test_lora_needs_no_backward_pass_to_select_its_weights(monkeypatch):
    backbone = small_backbone()
    monkeypatch.setattr(FrozenBackbone, "_weights_in_use", lambda _: pytest.fail("called"))
    backbone.tune(LORA)


def test_a_checkpoint_without_a_trained_weight_is_refused():
    encoder = tuned("bert", BIAS)
    state = encoder.state_dict()
    assert set(state) == {
        "prompt.embedding.weight",
        *(f"backbone.model.{name}" for name in encoder.backbone.tuned_names),
    }
    encoder.load_state_dict(state)
    del state[f"backbone.model.{encoder.backbone.tuned_names[0]}"]
    with pytest.raises(RuntimeError, match="Missing key"):
        encoder.load_state_dict(state)


@pytest.mark.parametrize("tuning", [BIAS, FULL], ids=["bias", "full"])
def test_the_fused_layers_are_used_without_gradients_in_eval_mode(tuning):
    encoder = tuned("bert", tuning)
    model, fused = encoder.backbone.model, encoder.backbone.family.fused
    assert not can_fuse(model, fused)
    with torch.no_grad():
        assert can_fuse(model, fused)
        assert not can_fuse(model.train(), fused)
    model.eval()
    encoder.backbone.freeze()
    assert can_fuse(model, fused)


@pytest.mark.parametrize("family", ["bert", "roberta", "albert"])
def test_with_cls_pooling_only_the_first_token_of_the_last_layer_is_computed_and_gradients_are_the_same(family):
    encoder = tuned(family, FULL, pooling="cls")
    assert encoder.backbone.family.first_token or family == "albert"
    found = gradients(encoder)
    whole = copy.deepcopy(encoder)
    forward = whole.backbone.forward
    whole.backbone.forward = lambda *inputs, **options: forward(*inputs, **{**options, "first_token": False})
    expected = gradients(whole)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


def test_merged_lora_computes_the_same_with_plain_modules():
    encoder = tuned("mpnet", LORA)
    tokens = small_tokens(LENGTHS, encoder.backbone.pad_id)
    expected, _ = encoder(tokens)
    merge_lora(encoder.backbone.model)
    assert {type(module) for module in encoder.backbone.model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    assert not any("lora" in name for name, _ in encoder.backbone.model.named_parameters())
    found, _ = encoder(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights_and_gradients():
    encoder = tuned("bert", FULL, head="mlp").float()
    exact = gradients(encoder)
    encoder.autocast = torch.bfloat16
    types = []
    layer = encoder.backbone.model.encoder.layer[0].output.dense
    handle = layer.register_forward_hook(lambda _module, _inputs, output: types.append(output.dtype))
    for recompute in (False, True):
        found = gradients(encoder, chunk_tokens=20, recompute=recompute)
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        cosine = torch.cosine_similarity(
            torch.cat([gradient.flatten() for gradient in found.values()]),
            torch.cat([exact[name].flatten() for name in found]),
            dim=0,
        )
        assert 0.99 < cosine < 1
    handle.remove()
    assert set(types) == {torch.bfloat16}


def test_lora_is_float32_beside_weights_in_bfloat16(tmp_path):
    backbone = FrozenBackbone.load(save_small_encoder(tmp_path / "encoder"), dtype=torch.bfloat16)
    backbone.tune(LORA)
    assert backbone.dtype == torch.bfloat16
    assert {weight.dtype for weight in backbone.tuned_weights.values()} == {torch.float32}
    encoder = PromptEncoder(backbone, length=0, pooling="avg").eval()
    assert {gradient.dtype for gradient in gradients(encoder, chunk_tokens=20).values()} == {torch.float32}
    save_adapter(encoder, tmp_path / "adapter")


def test_a_missing_peft_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs the package peft. Try: pip install 'promcse_pl\[peft\]'"):
        small_backbone().tune(LORA)


def test_a_prompt_beside_trained_weights_reaches_the_output():
    assert prompt_encoder(length=2).backbone.tuning == Tuning()
    assert "prompt.embedding.weight" in gradients(tuned("bert", LORA, length=3))
