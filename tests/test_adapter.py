"""Adapter folders: exact, small, replaced atomically, without code, and rejected with one error if invalid."""

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.encoders import add_pipeline, save_small_encoder, small_tokens
from support.limits import memory_limit

from promcse_pl.adapter import FORMAT, adapter_hash, describe, load_adapter, save_adapter
from promcse_pl.adapter_folder import BUNDLED, DESCRIPTION, WEIGHTS
from promcse_pl.config.pooling import POOLINGS
from promcse_pl.model_card import CARD
from promcse_pl.models.backbone import SUPPORTED, FrozenBackbone
from promcse_pl.models.encoder import HEADS, PromptEncoder
from promcse_pl.models.pipeline import TextSettings
from promcse_pl.utils.errors import AdapterError, EncoderError
from promcse_pl.utils.files import COMMIT

TEXT = TextSettings(max_length=9, lower_case=True, prompts={"query": "Q: ", "none": ""}, default_prompt="query")
KINDS: dict[str, dict] = {
    "deep": {},
    "projected": {"projection_size": 7},
    "shared": {"kind": "shared"},
    "input": {"kind": "input"},
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> FrozenBackbone:
    return FrozenBackbone.load(str(save_small_encoder(tmp_path_factory.mktemp("encoders") / "small")))


def some_encoder(backbone, seed=0, **options) -> PromptEncoder:
    torch.manual_seed(seed)
    encoder = PromptEncoder(backbone, **{"length": 4, "pooling": "avg", "head": "mlp", **options})
    with torch.no_grad():
        encoder.prompt.embedding.weight.mul_(20)
    return encoder.eval()


def vectors_of(encoder):
    with torch.no_grad():
        return encoder(small_tokens([9, 4, 12]), chunk_tokens=30)[0]


@pytest.fixture
def folder(backbone, tmp_path) -> Path:
    save_adapter(some_encoder(backbone), tmp_path / "adapter")
    return tmp_path / "adapter"


def change_description(folder: Path, dotted: str, value: object) -> None:
    """Set a field; `...` removes it."""
    about = json.loads((folder / DESCRIPTION).read_text())
    *outer, last = dotted.split(".")
    inner = about
    for name in outer:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    (folder / DESCRIPTION).write_text(json.dumps(about))


def change_weights(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Set tensors by their name, dots written as __; None removes one."""
    state = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        if tensor is None:
            del state[name.replace("__", ".")]
        else:
            state[name.replace("__", ".")] = tensor
    save_file(state, folder / WEIGHTS)


def refusal(folder: Path, **options) -> str:
    """The message of the AdapterError that loading gives; it names the folder."""
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder, **options)
    assert str(folder) in str(caught.value)
    return str(caught.value)


# --- saved and loaded


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    ("pooling", "head"),
    [
        pytest.param(pooling, head, marks=[] if pooling == "avg" or head == "none" else pytest.mark.exhaustive)
        for pooling in [*POOLINGS, "cls+max+weightedmean"]
        for head in HEADS
    ],
)
def test_a_loaded_adapter_gives_the_same_vectors_bit_by_bit(backbone, tmp_path, pooling, head, kind):
    encoder = some_encoder(backbone, pooling=pooling, head=head, **kind)
    save_adapter(encoder, tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter")
    assert torch.equal(vectors_of(loaded), vectors_of(encoder))
    assert describe(loaded) == describe(encoder)
    assert not loaded.training


@pytest.mark.parametrize("family", SUPPORTED)
def test_an_adapter_of_every_family_comes_back_exactly(family, tmp_path):
    backbone = FrozenBackbone.load(str(save_small_encoder(tmp_path / "encoder", family)))
    encoder = some_encoder(backbone)
    save_adapter(encoder, tmp_path / "adapter")
    assert torch.equal(vectors_of(load_adapter(tmp_path / "adapter")), vectors_of(encoder))


@pytest.mark.parametrize(
    "options",
    [
        {"length": 0},
        {"length": 1, "position_offset": 0},
        {"position_offset": 7},
        {"dropout": 0.35},
        {"text": TEXT},
        {"length": 0, "head": "low_rank", "head_rank": 3},
        {"kind": "input", "position_offset": 2},
    ],
    ids=str,
)
def test_every_setting_comes_back(backbone, tmp_path, options):
    encoder = some_encoder(backbone, **options)
    save_adapter(encoder, tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter")
    assert describe(loaded) == describe(encoder)
    assert loaded.text == encoder.text
    assert torch.equal(vectors_of(loaded), vectors_of(encoder))


def test_the_kind_of_a_prompt_and_its_head_are_part_of_the_description_and_of_the_hash(backbone):
    encoders = [some_encoder(backbone, **kind, head=head) for kind in KINDS.values() for head in ("mlp", "low_rank")]
    assert [describe(encoder)["prompt"]["kind"] for encoder in encoders[::2]] == list(KINDS)
    assert [describe(encoder)["head_rank"] for encoder in encoders[:2]] == [None, 8]
    assert len({adapter_hash(encoder) for encoder in encoders}) == len(encoders)


@pytest.mark.parametrize("projection_size", [None, 7])
def test_an_adapter_of_format_3_is_read_with_the_same_hash(backbone, folder, projection_size):
    encoder = some_encoder(backbone, projection_size=projection_size)
    save_adapter(encoder, folder)
    for key, value in {"format": 3, "prompt.kind": ..., "head_rank": ..., "tuning": ..., "checksum": ...}.items():
        change_description(folder, key, value)
    loaded = load_adapter(folder)
    assert (describe(loaded), adapter_hash(loaded)) == (describe(encoder), adapter_hash(encoder))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prompt.kind", "input_only", "prompt.kind is 'input_only'; allowed: deep, projected, shared, input"),
        ("prompt.kind", "projected", "prompt.projection_size is None with prompt.kind projected"),
        ("prompt.projection_size", 5, "prompt.projection_size is 5 with prompt.kind deep"),
        ("prompt.kind", "shared", r"prompt.embedding.weight has shape \(4, 96\), the encoder needs \(4, 32\)"),
        ("head_rank", 5, "head_rank is 5 with head mlp"),
        ("head_rank", 0, "head_rank is 0; allowed: 1 to"),
        ("head", "low_rank", "head_rank is None with head low_rank"),
    ],
)
def test_kinds_and_ranks_that_do_not_fit_are_refused(folder, key, value, message):
    change_description(folder, key, value)
    with pytest.raises(AdapterError, match=message):
        load_adapter(folder)


def test_an_adapter_of_format_4_needs_a_checksum(folder):
    change_description(folder, "checksum", ...)
    with pytest.raises(AdapterError, match=r"must have the keys .*'checksum'"):
        load_adapter(folder)


def as_format_2(folder: Path) -> None:
    removed = ("encoder.pipeline", "prompt.keys", "prompt.kind", "head_rank", "tuning", "text", "checksum")
    for key, value in {"format": 2, **dict.fromkeys(removed, ...)}.items():
        change_description(folder, key, value)


def test_settings_of_texts_are_part_of_the_adapter_hash_unless_they_are_the_defaults(folder, backbone):
    hashes = {
        adapter_hash(some_encoder(backbone, text=text)) for text in (TEXT, dataclasses.replace(TEXT, max_length=8))
    }
    assert len(hashes) == 2
    as_format_2(folder)
    assert adapter_hash(load_adapter(folder)) == adapter_hash(some_encoder(backbone)) not in hashes


@pytest.fixture
def with_dense(backbone, tmp_path) -> Path:
    """A copy of the encoder in a sentence-transformers folder."""
    return add_pipeline(shutil.copytree(backbone.identity.name, tmp_path / "dense"))


def test_an_adapter_keeps_the_pipeline_of_its_encoder(with_dense, tmp_path):
    encoder = some_encoder(FrozenBackbone.load(with_dense))
    assert (encoder.width, encoder.text.default_prompt) == (8, "query")
    save_adapter(encoder, tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter")
    assert torch.equal(vectors_of(loaded), vectors_of(encoder))
    assert (adapter_hash(loaded), loaded.text) == (adapter_hash(encoder), encoder.text)


def test_an_encoder_with_other_dense_layers_is_refused(with_dense, backbone, folder, tmp_path):
    save_adapter(some_encoder(FrozenBackbone.load(with_dense)), tmp_path / "other")
    for adapter, encoder in ((tmp_path / "other", backbone.identity.name), (folder, with_dense)):
        assert "the dense layers after its pooling differ" in refusal(adapter, encoder=str(encoder))
    edit_json(with_dense / "2_Dense" / "config.json", activation_function="torch.nn.Identity")
    assert "the dense layers after its pooling differ" in refusal(tmp_path / "other")


def test_an_adapter_of_format_2_is_loaded_without_the_pipeline_of_its_encoder(with_dense, backbone, folder):
    as_format_2(folder)
    loaded = load_adapter(folder, encoder=with_dense)
    assert loaded.text == TextSettings()
    assert torch.equal(vectors_of(loaded), vectors_of(some_encoder(backbone)))
    (with_dense / "modules.json").write_text("damaged")
    assert torch.equal(vectors_of(load_adapter(folder, encoder=with_dense)), vectors_of(loaded))
    save_adapter(loaded, folder.with_name("saved again"))
    assert torch.equal(vectors_of(load_adapter(folder.with_name("saved again"))), vectors_of(loaded))


@pytest.mark.parametrize(("family", "keys"), [("bert", None), ("modernbert", "after_rotation")])
def test_the_convention_of_the_prompt_keys_is_stored(tmp_path, family, keys):
    encoder = some_encoder(FrozenBackbone.load(str(save_small_encoder(tmp_path / "encoder", family))))
    assert describe(encoder)["prompt"]["keys"] == keys


def test_the_folder_of_a_run_leads_to_its_adapter(backbone, tmp_path):
    encoder = some_encoder(backbone)
    save_adapter(encoder, tmp_path / "run" / "adapter")
    assert torch.equal(vectors_of(load_adapter(tmp_path / "run")), vectors_of(encoder))


def test_the_encoder_folder_is_found_again_from_another_place(folder, backbone, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_adapter(Path("../adapter")).backbone.identity == backbone.identity


def test_an_encoder_that_moved_is_found_where_the_user_says(backbone, tmp_path):
    shutil.copytree(backbone.identity.name, tmp_path / "old")
    encoder = some_encoder(FrozenBackbone.load(str(tmp_path / "old")))
    save_adapter(encoder, tmp_path / "adapter")
    (tmp_path / "old").rename(tmp_path / "new")
    loaded = load_adapter(tmp_path / "adapter", encoder=str(tmp_path / "new"))
    assert torch.equal(vectors_of(loaded), vectors_of(encoder))


def test_a_half_precision_backbone_is_asked_for_at_loading_and_leaves_the_prompt_exact(backbone, folder):
    loaded = load_adapter(folder, dtype=torch.bfloat16)
    assert loaded.backbone.dtype == torch.bfloat16
    assert torch.equal(loaded.prompt.embedding.weight, some_encoder(backbone).prompt.embedding.weight)


def test_a_minilm_adapter_stays_under_2_megabytes(tmp_path):
    backbone = FrozenBackbone.load("sentence-transformers/all-MiniLM-L6-v2")
    save_adapter(PromptEncoder(backbone, length=10, pooling="avg", head="mlp"), tmp_path / "adapter")
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    assert 4 * (10 * 6 * 2 * 384 + 384 * 385) < size < 2_000_000
    assert load_adapter(tmp_path / "adapter").backbone.identity == backbone.identity


# --- what is written


def test_an_adapter_is_two_files_of_plain_data_a_model_card_and_nothing_beside_them(folder, tmp_path):
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["adapter", DESCRIPTION, WEIGHTS, CARD])
    content = (folder / WEIGHTS).read_bytes()
    header_size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_size])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F32"}
    assert len(content) == 8 + header_size + 4 * (4 * 3 * 2 * 16 + 16 * 17)  # numbers, and no byte more
    about = json.loads((folder / DESCRIPTION).read_text())
    assert (about["format"], about["prompt"]["length"]) == (FORMAT, 4)


def test_the_summary_of_the_run_is_kept(backbone, tmp_path):
    save_adapter(some_encoder(backbone), tmp_path / "adapter", training={"steps": 7, "dev": 81.2})
    load_adapter(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / DESCRIPTION).read_text())["training"] == {"steps": 7, "dev": 81.2}


def test_a_new_adapter_replaces_the_old_one_and_nothing_else_in_the_folder(backbone, folder):
    others = {"README.md": "a model card", ".git/HEAD": "ref: refs/heads/main", "encoder/notes.txt": "mine"}
    for name, text in others.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    newer = some_encoder(backbone, seed=1, length=6, head="none")
    save_adapter(newer, folder)
    assert torch.equal(vectors_of(load_adapter(folder)), vectors_of(newer))
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert sorted(found) == sorted([DESCRIPTION, WEIGHTS, *others])
    assert {name: found[name].read_text() for name in others} == others


def test_an_adapter_json_of_another_program_is_not_an_adapter(backbone, tmp_path):
    for number, text in enumerate(('{"name": "usb", "format": 1}', "{", "[]", "")):
        target = tmp_path / str(number)
        target.mkdir()
        (target / DESCRIPTION).write_text(text)
        (target / "firmware.bin").write_text("mine")
        with pytest.raises(AdapterError, match="already exists and is not overwritten"):
            save_adapter(some_encoder(backbone), target)
        assert {path.name: path.read_text() for path in target.iterdir()} == {DESCRIPTION: text, "firmware.bin": "mine"}


def test_a_bundled_encoder_is_replaced_and_removed_but_a_foreign_folder_of_its_name_is_not(tmp_path):
    source = save_small_encoder(tmp_path / "encoder")
    plain, bundled = FrozenBackbone.load(str(source)), FrozenBackbone.load(str(source))
    bundled.identity = dataclasses.replace(bundled.identity, name=BUNDLED)
    folder = tmp_path / "adapter"
    save_adapter(some_encoder(bundled), folder)
    save_adapter(some_encoder(bundled, seed=1), folder)
    assert torch.equal(vectors_of(load_adapter(folder)), vectors_of(some_encoder(bundled, seed=1)))
    save_adapter(some_encoder(plain), folder)
    assert sorted(path.name for path in folder.iterdir()) == [CARD, DESCRIPTION, WEIGHTS]
    (folder / "encoder").mkdir()
    (folder / "encoder/notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match=r"encoder already exists and is not part of the adapter"):
        save_adapter(some_encoder(bundled), folder)
    assert (folder / "encoder/notes.txt").read_text() == "mine"


def test_an_adapter_whose_save_was_killed_after_the_commit_loads_as_the_new_one(backbone, folder):
    """The state between the commit and the last rename, for every set of files that may have been moved by then."""
    newer = some_encoder(backbone, seed=1, length=6)
    save_adapter(newer, folder.parent / "newer")
    for moved in ([], [DESCRIPTION], [WEIGHTS], [DESCRIPTION, WEIGHTS]):
        target = folder.parent / "-".join(["cut", *moved])
        shutil.copytree(folder, target)
        shutil.copytree(folder.parent / "newer", target / COMMIT)
        for name in moved:
            (target / COMMIT / name).replace(target / name)
        assert torch.equal(vectors_of(load_adapter(target)), vectors_of(newer))
        save_adapter(some_encoder(backbone, seed=2), target)
        assert torch.equal(vectors_of(load_adapter(target)), vectors_of(some_encoder(backbone, seed=2)))
        assert sorted(path.name for path in target.iterdir()) == [CARD, DESCRIPTION, WEIGHTS]


def test_a_save_that_fails_half_way_leaves_the_old_adapter_and_no_other_trace(backbone, folder, tmp_path):
    with pytest.raises(TypeError):
        save_adapter(some_encoder(backbone, seed=1), folder, training={"not plain": object()})
    assert torch.equal(vectors_of(load_adapter(folder)), vectors_of(some_encoder(backbone)))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_full_disk_is_one_clear_error_and_leaves_the_old_adapter(backbone, folder, tmp_path):
    resource = pytest.importorskip("resource")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(AdapterError, match=rf"cannot write to {folder}: .*[Ff]ile too large"):
            save_adapter(some_encoder(backbone, seed=1), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.equal(vectors_of(load_adapter(folder)), vectors_of(some_encoder(backbone)))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_that_cannot_be_written_is_an_adapter_error(backbone, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match=r"cannot write to .*file/adapter"):
        save_adapter(some_encoder(backbone), tmp_path / "file" / "adapter")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_unrelated_file_or_folder_is_not_replaced(backbone, tmp_path, kind):
    target = tmp_path / "thesis"
    kept = target if kind == "file" else target / "chapter"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("years of work")
    with pytest.raises(AdapterError, match="already exists and is not overwritten"):
        save_adapter(some_encoder(backbone), target)
    assert kept.read_text() == "years of work"


# --- refused


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "x/" * 3000], ids=["NUL", "long name", "long path"])
def test_a_name_that_no_folder_can_have_is_refused(name):
    with pytest.raises(AdapterError, match=r"adapter.json cannot be read"):
        load_adapter(name)


def test_a_folder_that_is_not_an_adapter_is_refused(tmp_path):
    assert f"is not an adapter: it has no {DESCRIPTION}" in refusal(tmp_path)
    assert "is not an adapter" in refusal(tmp_path / "absent")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"format": "1"}', '{"format": true}', '{"format": 0}', "\xff"]
)
def test_a_description_that_is_none_is_refused(folder, text):
    (folder / DESCRIPTION).write_text(text, encoding="latin-1")
    assert "cannot be read" in refusal(folder) or "is not an adapter's description" in refusal(folder)


def test_a_newer_format_asks_for_an_upgrade(folder):
    change_description(folder, "format", FORMAT + 1)
    change_description(folder, "promcse_pl", "9.0")
    change_description(folder, "new", {})
    message = refusal(folder)
    assert f"has format {FORMAT + 1} (written by promcse_pl 9.0)" in message
    assert "pip install --upgrade promcse_pl" in message


@pytest.mark.parametrize("key", ["more", "prompt.more", "encoder.more"])
def test_an_unknown_key_is_refused(folder, key):
    change_description(folder, key, 1)
    message = refusal(folder)
    assert "must have the keys" in message
    assert "'more'" in message.split(", got ")[1]


@pytest.mark.parametrize("key", ["pooling", "prompt", "prompt.length", "encoder.sha256", "position_offset", "training"])
def test_a_missing_key_is_refused(folder, key):
    change_description(folder, key, ...)
    message = refusal(folder)
    assert "must have the keys" in message
    assert repr(key.split(".")[-1]) not in message.split(", got ")[1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt.length", "4"),
        ("prompt.length", 4.0),
        ("prompt.length", True),
        ("prompt.length", None),
        ("prompt.projection_size", "7"),
        ("prompt.dropout", None),
        ("encoder.name", 5),
        ("encoder.revision", 5),
        ("pooling", None),
        ("head", ["mlp"]),
        ("position_offset", 1.5),
        ("training", []),
        ("prompt.keys", 1),
        ("text.max_length", True),
        ("text.lower_case", 1),
        ("text.prompts", []),
        ("text.prompts", {"query": 3}),
        ("text.default_prompt", 1),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(folder, key, value):
    change_description(folder, key, value)
    if key == "text.prompts" and value:
        key, value = "text.prompts.query", 3
    assert f"{key} has the wrong type: {value!r}" in refusal(folder)


@pytest.mark.parametrize("key", ["prompt", "encoder"])
def test_a_value_in_the_place_of_a_group_is_refused(folder, key):
    change_description(folder, key, 3)
    assert f"{key} must have the keys" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("prompt.length", -1, "0 to 4096"),
        ("prompt.length", 10**9, "0 to 4096"),
        ("prompt.projection_size", -3, "1 to 1048576"),
        ("prompt.dropout", 1.5, "0 to 1"),
        ("prompt.dropout", -0.1, "0 to 1"),
        ("prompt.dropout", float("nan"), "0 to 1"),
        ("position_offset", -1, "0 to 1048576"),
        ("pooling", "mean", ", ".join(POOLINGS)),
        ("head", "linear", ", ".join(HEADS)),
        ("dtype", "float16", "float32"),
        ("prompt.keys", "before_rotation", "None, after_rotation"),
        ("text.max_length", 2, "null, or 3 or more"),
        ("text.default_prompt", "query", "null, or one of []"),
    ],
)
def test_a_value_out_of_range_is_refused(folder, key, value, allowed):
    change_description(folder, key, value)
    message = refusal(folder)
    assert f"{key} is {value}" in message.replace("'", "")
    assert f"allowed: {allowed}" in message


@pytest.mark.parametrize("offset", [38, 39, 600])
def test_an_offset_that_leaves_no_room_for_a_sentence_is_refused(folder, offset):
    change_description(folder, "position_offset", offset)
    assert f"position_offset {offset} leaves no room for a sentence" in refusal(folder)


def test_another_encoder_is_refused(folder, tmp_path, backbone):
    other = save_small_encoder(tmp_path / "other", initializer_range=0.1)
    message = refusal(folder, encoder=str(other))
    assert f"was trained on {backbone.identity.name} with weights {backbone.identity.sha256[:12]}" in message
    assert "PromCSE.load(..., encoder=FOLDER)" in message


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_act", "relu", "hidden_act is relu, the adapter was trained with gelu"),
        ("layer_norm_eps", 0.1, "layer_norm_eps is 0.1, the adapter was trained with 1e-12"),
        ("num_attention_heads", 4, "num_attention_heads is 4, the adapter was trained with 2"),
        ("num_hidden_layers", 2, "num_hidden_layers is 2, the adapter was trained with 3"),
        ("model_type", "roberta", "model_type is roberta, the adapter was trained with bert"),
    ],
)
def test_a_copy_of_the_encoder_with_another_config_is_rejected_with_the_field(
    folder, backbone, tmp_path, key, value, said
):
    copy = shutil.copytree(backbone.identity.name, tmp_path / "copy")
    edit_json(copy / "config.json", **{key: value})
    message = refusal(folder, encoder=str(copy))
    assert said in message
    assert f"PromCSE.load({str(folder)!r}, encoder=FOLDER)" in message


def test_a_copy_of_the_encoder_with_another_tokenizer_is_refused(folder, backbone, tmp_path):
    copy = shutil.copytree(backbone.identity.name, tmp_path / "copy")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has the same weights but would produce different embeddings: its tokenizer differs" in refusal(
        folder, encoder=str(copy)
    )


@pytest.mark.parametrize(
    "change", [{"hidden_dropout_prob": 0.5}, {"id2label": {"0": "x"}}, {"a_field_of_the_future": 1}]
)
def test_a_config_field_that_changes_no_embedding_does_not_refuse_a_copy(folder, backbone, tmp_path, change):
    copy = shutil.copytree(backbone.identity.name, tmp_path / "copy")
    edit_json(copy / "config.json", **change)
    assert torch.equal(vectors_of(load_adapter(folder, encoder=str(copy))), vectors_of(load_adapter(folder)))


def test_an_adapter_of_format_1_identifies_its_encoder_by_weights_and_family(folder, backbone, tmp_path):
    as_format_2(folder)
    for key, value in {"format": 1, "encoder.config": ..., "encoder.tokenizer": ...}.items():
        change_description(folder, key, value)
    assert torch.equal(vectors_of(load_adapter(folder)), vectors_of(some_encoder(backbone)))
    copy = shutil.copytree(backbone.identity.name, tmp_path / "copy")
    edit_json(copy / "config.json", model_type="roberta")
    assert "model_type is roberta, the adapter was trained with bert" in refusal(folder, encoder=str(copy))


@pytest.fixture
def little_memory():
    with memory_limit():
        yield


def test_a_projection_of_a_million_takes_neither_time_nor_memory(folder, little_memory):
    change_description(folder, "prompt.kind", "projected")
    change_description(folder, "prompt.projection_size", 2**20)
    before = time.perf_counter()
    assert "must hold the tensors" in refusal(folder)
    assert time.perf_counter() - before < 2, "most of it reads the encoder"


@pytest.fixture
def carrying(backbone, tmp_path) -> Path:
    """An adapter with its encoder inside."""
    own = FrozenBackbone.load(backbone.identity.name)
    own.identity = dataclasses.replace(own.identity, name=BUNDLED)
    save_adapter(some_encoder(own), tmp_path / "carrying")
    return tmp_path / "carrying"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 10**10),
        ("intermediate_size", 10**10),
        ("max_position_embeddings", 10**10),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 900),
        ("num_labels", 10**9),
        ("hidden_size", 2 * 10**6),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ("per_layer_config", {"0": {"intermediate_size": 10**9}}),
    ],
)
def test_an_oversized_config_of_a_bundled_encoder_is_rejected_before_memory_is_allocated(
    carrying, little_memory, key, value
):
    edit_json(carrying / "encoder/config.json", **{key: value})
    with pytest.raises(EncoderError, match=r"cannot read the (encoder|weights of)"):
        load_adapter(carrying)


@pytest.mark.parametrize(
    "name", [DESCRIPTION, WEIGHTS, "encoder/config.json", "encoder/model.safetensors", "encoder/tokenizer.json"]
)
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_fifo_or_device_instead_of_a_file_is_rejected_without_blocking(carrying, little_memory, name, kind):
    (carrying / name).unlink()
    os.mkfifo(carrying / name) if kind == "fifo" else (carrying / name).symlink_to("/dev/zero")
    with pytest.raises((AdapterError, EncoderError), match=r"it is a (FIFO|device), not a regular file"):
        load_adapter(carrying)


def test_a_description_of_a_terabyte_is_refused_without_being_read(folder, little_memory):
    os.truncate(folder / DESCRIPTION, 2**40)
    assert "it has 1,099,511,627,776 bytes, the maximum is 16,777,216" in refusal(folder)


def test_paths_may_be_text(backbone, tmp_path):
    save_adapter(some_encoder(backbone), str(tmp_path / "adapter"))
    assert torch.equal(vectors_of(load_adapter(str(tmp_path / "adapter"))), vectors_of(some_encoder(backbone)))


def test_an_encoder_whose_weights_changed_since_is_refused(tmp_path):
    source = save_small_encoder(tmp_path / "encoder")
    save_adapter(some_encoder(FrozenBackbone.load(str(source))), tmp_path / "adapter")
    save_small_encoder(source, initializer_range=0.1)
    assert "was trained on" in refusal(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("key", "value"), [("prompt.length", 5), ("prompt.length", 0), ("prompt.kind", "shared"), ("head", "none")]
)
def test_a_description_that_does_not_fit_the_tensors_is_refused(folder, key, value):
    change_description(folder, key, value)
    message = refusal(folder)
    assert (
        "prompt.embedding.weight has shape (4, 96), the encoder needs" in message or "must hold the tensors" in message
    )


def test_missing_weights_are_refused(folder):
    (folder / WEIGHTS).unlink()
    assert f"{WEIGHTS} is missing: the adapter is incomplete" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_weights_that_are_cut_short_are_refused(folder, kept):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:kept])
    assert "is damaged or truncated" in refusal(folder)


def test_a_missing_tensor_is_refused(folder):
    change_weights(folder, head__dense__bias=None)
    assert "must hold the tensors ['head.dense.bias', " in refusal(folder)


def test_an_unknown_tensor_is_refused(folder):
    change_weights(folder, backbone__more=torch.zeros(1))
    assert "got ['backbone.more', " in refusal(folder)


def test_a_tensor_of_another_shape_is_refused(folder):
    change_weights(folder, head__dense__bias=torch.zeros(1))
    assert "head.dense.bias has shape (1,), the encoder needs (16,)" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32], ids=str)
def test_a_tensor_of_another_type_is_refused(folder, dtype):
    change_weights(folder, head__dense__bias=torch.zeros(16, dtype=dtype))
    assert f"head.dense.bias is {dtype}, expected torch.float32" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_that_is_not_finite_is_refused(folder, value):
    weight = load_file(folder / WEIGHTS)["prompt.embedding.weight"]
    weight[2, 5] = value
    change_weights(folder, prompt__embedding__weight=weight)
    assert "prompt.embedding.weight holds values that are not finite" in refusal(folder)
