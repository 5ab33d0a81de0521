"""The identity of an encoder: complete for the config, equal for copies, and different for another tokenizer."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.encoders import FAMILIES, SMALL, save_small_encoder, small_encoder, small_tokenizer, small_tokens
from support.folders import GOLDEN
from tokenizers import normalizers
from transformers import AutoConfig, AutoTokenizer, ByT5Tokenizer

from promcse_pl.data.tokenizer import tokenizer_fingerprint
from promcse_pl.models.backbone import SUPPORTED, FrozenBackbone
from promcse_pl.models.encoder_files import auto_class
from promcse_pl.models.families import decoders
from promcse_pl.models.identity import EncoderId, differences, output_config
from promcse_pl.utils.errors import EncoderError

SEEN = {
    *("hidden_act", "hidden_activation", "activation", "feed_forward_proj"),
    *("layer_norm_eps", "norm_eps", "rms_norm_eps", "layer_norm_epsilon"),
    *("num_attention_heads", "n_heads", "num_heads", "num_hidden_layers", "n_layers", "num_layers"),
    *("is_decoder", "layer_types", "local_attention", "rope_parameters"),
}
"""Fields whose effect the comparison must see in every family that has them, but for UNSEEN."""
T5_UNSEEN = {"num_heads", "is_decoder", "feed_forward_proj"}
UNSEEN = {
    "mpnet": {"num_attention_heads"},
    "eurobert": {"num_attention_heads"},
    "t5": T5_UNSEEN,
    "mt5": T5_UNSEEN,
    "umt5": T5_UNSEEN,
    **{family: {"num_attention_heads"} for family in decoders.FAMILIES},
}
"""Fields that also decide the shape of weights, or that the encoder alone does not read."""
FEWER_LAYERS = {"num_hidden_layers": 2}
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def other_values(value: object) -> Iterator[object]:
    """Values that a config field may have instead."""
    match value:
        case bool():
            yield not value
        case int():
            yield from (value + 1, value - 1, value * 2, value // 2, 0)
        case float():
            yield from (value + 0.1, value * 100)
        case str():
            yield from ("relu", "silu", "tanh", "full_attention", "sliding_attention", "linear", "mean", "last", "")
        case list():
            yield value[::-1]
            for position, item in enumerate(value):
                yield from ([*value[:position], other, *value[position + 1 :]] for other in other_values(item))
        case dict():
            for key, item in value.items():
                yield from ({**value, key: other} for other in other_values(item))
        case None:
            yield from (True, 1, 0.5, "relu")


@contextmanager
def read_fields(config_class: type) -> Iterator[set[str]]:
    """The names of the fields of a config that are read meanwhile: the others cannot change what is computed."""
    names, read = config_class.attribute_map, set()

    def recorded(config: object, name: str) -> object:
        read.update((name, names.get(name, name)))
        return super(config_class, config).__getattribute__(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_class, "__getattribute__", recorded, raising=False)
        yield read


def embed(family: str, config: object, weights: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Hidden states of the encoder that a config describes, with given weights; None if it cannot be built from them."""
    try:
        model = auto_class(config).from_config(config)
        missing, _unexpected = model.load_state_dict(weights, strict=False)  # what is left over, transformers ignores
        if missing:
            return None
        backbone = FrozenBackbone(model.eval(), EncoderId("small", None, "")).eval()
        tokens = small_tokens([9, 4, 12], int(FAMILIES[family].get("pad_token_id", 0)))
        prompt = torch.randn(
            backbone.layers, 2, 1, backbone.kv_heads, 2, backbone.head_size, generator=torch.Generator().manual_seed(7)
        )
        with torch.no_grad():
            (states,) = backbone(tokens.ids_NT, tokens.mask_NT, prompt, position_offset=2)
    except Exception:
        return None
    return states * tokens.mask_NT.unsqueeze(2)


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_config_field_that_changes_the_output_changes_the_identity(family, monkeypatch):
    original = small_encoder(family, **FEWER_LAYERS)
    weights, options = original.state_dict(), {**SMALL, **FAMILIES[family], **FEWER_LAYERS}
    plain = AutoConfig.for_model(family, **options)
    monkeypatch.setattr(FrozenBackbone, "_check_prompt_reaches_every_layer", lambda _: None)  # it computes gradients
    config = AutoConfig.for_model(family, **options)
    with read_fields(type(plain)) as read:
        expected = embed(family, config, weights)
    fields = plain.to_dict()
    wanted = (SEEN & fields.keys()) - UNSEEN.get(family, set())
    deciding = set()
    for name, value in fields.items():
        rest = {key: given for key, given in options.items() if plain.attribute_map.get(key) != name}
        for other in other_values(value):
            try:
                config = AutoConfig.for_model(family, **{**rest, name: other})
                changed = {key for key, one in config.to_dict().items() if key not in fields or one != fields[key]}
            except Exception:
                continue
            is_part = output_config(config) != output_config(plain)
            if not changed & read or (is_part and name not in wanted):
                continue
            states = embed(family, config, weights)
            if states is None or (states.shape == expected.shape and torch.allclose(states, expected, atol=1e-5)):
                continue
            assert is_part, f"{name}={other}"
            deciding.add(name)
            break
    assert deciding >= wanted, "the comparison sees differences"


@pytest.mark.parametrize("family", SUPPORTED)
def test_identity_survives_a_copy_that_transformers_writes(family, tmp_path):
    first = FrozenBackbone.load(str(save_small_encoder(tmp_path / "first", family)))
    auto_class(first.model.config).from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "copy")
    first.tokenizer.save_pretrained(tmp_path / "copy")
    copy = FrozenBackbone.load(str(tmp_path / "copy"))
    assert differences(first.identity, copy.identity, owner="here") == []
    assert copy.identity.sha256 == first.identity.sha256
    assert copy.identity.config == first.identity.config
    assert copy.identity.tokenizer == first.identity.tokenizer


def tokenizers() -> dict[str, str]:
    """Folders of tokenizers by name."""
    return {path.name: str(path) for path in sorted(GOLDEN.glob("checkpoint_*"))}


@pytest.mark.golden
@pytest.mark.parametrize("folder", tokenizers().values(), ids=tokenizers())
def test_official_tokenizers_have_the_fingerprint_of_their_copies(folder, tmp_path):
    check_copies(AutoTokenizer.from_pretrained(folder), tmp_path)


def test_minilms_tokenizer_has_the_fingerprint_of_its_copies(tmp_path):
    check_copies(FrozenBackbone.load(MINILM).tokenizer, tmp_path)


def test_a_tokenizer_without_a_fast_backend_has_the_fingerprint_of_its_copies(tmp_path):
    check_copies(ByT5Tokenizer(), tmp_path)


def check_copies(tokenizer, tmp_path: Path) -> None:
    expected = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert tokenizer_fingerprint(copy) == expected
    copy(["a b c", "a"], truncation=True, max_length=4, padding=True)  # leaves its settings behind
    copy.save_pretrained(tmp_path / "again")
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / "again")) == expected
    assert (
        tokenizer_fingerprint(AutoTokenizer.from_pretrained(shutil.move(tmp_path / "copy", tmp_path / "moved")))
        == expected
    )


def test_another_tokenizer_has_another_fingerprint():
    changed = small_tokenizer()
    changed.backend_tokenizer.normalizer = normalizers.Sequence([])
    assert len({tokenizer_fingerprint(each) for each in (small_tokenizer(), small_tokenizer(1), changed)}) == 3


def test_unknown_values_are_not_compared():
    known = EncoderId("a", None, "0", {"hidden_act": "gelu", "of_a_later_version": 1}, "f" * 64)
    assert differences(EncoderId("a", None, "0"), known, owner="here") == []
    assert differences(known, EncoderId("b", None, "0", {"hidden_act": "relu"}, None), owner="here") == [
        "hidden_act is relu, here gelu"
    ]
    assert differences(known, EncoderId("b", None, "0", {}, "e" * 64), owner="here") == ["its tokenizer differs"]


def test_an_encoder_without_a_tokenizer_is_read_and_has_no_fingerprint(tmp_path):
    small_encoder("bert").save_pretrained(tmp_path)
    assert FrozenBackbone.load(str(tmp_path)).identity.tokenizer is None


def test_more_positions_than_any_encoder_has_are_refused_before_they_are_allocated(tmp_path):
    folder = save_small_encoder(tmp_path / "encoder", "deberta-v2")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 3_000_000_000}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match="max_position_embeddings is 3000000000, the maximum is 16777216"):
        FrozenBackbone.load(str(folder))
