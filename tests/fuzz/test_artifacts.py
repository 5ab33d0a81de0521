"""Damaged and hostile adapters, checkpoints, token caches and imports: the saved content or one error; no code is run."""

import copy
import json
import pickle
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.encoders import save_small_encoder, small_tokenizer
from support.fuzzing import examples, only_our_errors

from promcse_pl.adapter import BUNDLED, describe, load_adapter, save_adapter
from promcse_pl.data.tokens import load_tokens, memory_source
from promcse_pl.embedder import PromCSE
from promcse_pl.interop.official import import_official
from promcse_pl.interop.peft import export_peft, import_peft
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.run_folder import Status, read_history, read_results, read_status, write_status
from promcse_pl.runs.inputs import record_inputs
from promcse_pl.sweeps.collect import read_sweep
from promcse_pl.sweeps.html import page_content
from promcse_pl.sweeps.ranking import rank
from promcse_pl.sweeps.report import print_report
from promcse_pl.training.checkpoint import RunCheckpoints, read_checkpoint
from promcse_pl.utils.errors import AdapterError, DataError


def any_checksum() -> AbstractContextManager[object]:
    """Accept the checksum of every adapter: someone who modifies an adapter can compute it again."""
    return patch("promcse_pl.adapter._checksum", lambda about, *_: about["checksum"])


INDEXED = [f"w{i} w{i + 1}" for i in range(5, 20)]
ROWS = [(f"w{i} w{i + 1}", f"w{i + 2}") for i in range(5, 60)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Small valid artifacts of every kind."""
    base = tmp_path_factory.mktemp("artifacts")
    backbone = FrozenBackbone.load(str(save_small_encoder(base / "encoder", num_hidden_layers=1)))
    torch.manual_seed(0)
    encoder = PromptEncoder(backbone, length=2, pooling="avg", head="mlp").eval()
    save_adapter(encoder, base / "adapter", training={"steps": 3})
    for kind in ("shared", "input"):
        save_adapter(PromptEncoder(backbone, length=2, kind=kind, head="low_rank").eval(), base / kind)
    plain = PromptEncoder(backbone, length=2, pooling="avg", head="none").eval()
    export_peft(plain, base / "peft")
    official = base / "official"
    official.mkdir()
    state = {f"bert.{name}": tensor for name, tensor in backbone.model.state_dict().items()}
    state |= {"prefix_encoder.embedding.weight": encoder.prompt.embedding.weight.detach()}
    torch.save(state, official / "pytorch_model.bin")
    shutil.copy(base / "encoder/config.json", official)
    small_tokenizer().save_pretrained(official)
    checkpoint = {"global_step": 4, "state": {"x": torch.arange(6.0), "y": [1, 2.5, "z", None, (3,)]}, 7: torch.ones(2)}
    RunCheckpoints(base / "run").save_checkpoint(checkpoint, base / "run/checkpoints/step-4")
    model = PromCSE(encoder)
    model.build_index(INDEXED)
    model.save_index(base / "index")
    import_official(official)  # the whole ones are read
    import_peft(base / "peft", encoder=str(base / "encoder"))
    (base / "status").mkdir()
    write_status(base / "status", Status(state="finished", step=3, steps=10))
    results = {"scores": {"adapter": {"dev": 70.1, "STS-B": 60.5}}, "dev": "dev", "dev_spearman": 70.1, "seconds": 9.5}
    (base / "status/results.json").write_text(json.dumps(results))
    (base / "status/config.yaml").write_text("model: {path: encoder}\nseed: 3\n")
    checksums = {key: {"name": key, "sha256": "0" * 64} for key in ("data.train", "data.dev", "model.path")}
    inputs = {**checksums, "config": {"seed": 3}, "machine": {"torch": "2", "threads": 2}}
    (base / "status/inputs.json").write_text(json.dumps(inputs))
    (base / "status/metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    return base


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged")


def damaged(data: st.DataObject, whole: Path, scratch: Path) -> Path:
    """A copy with flipped bits, a cut, more bytes, a file that is missing, empty or a folder, or JSON changed or without end."""
    copied = scratch / "copy"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(whole, copied)
    path = data.draw(st.sampled_from(sorted(path for path in copied.rglob("*") if path.is_file())))
    content = bytearray(path.read_bytes())
    kind = data.draw(
        st.sampled_from(["flip", "flip", "flip", "head", "cut", "grow", "absent", "empty", "folder", "json", "deep"])
    )
    if kind == "json" and path.suffix == ".json":
        path.write_text(json.dumps(changed(data, json.loads(content))))
        return copied
    if kind == "deep":
        path.write_text(
            "[" * 9000
        )  # deeper, and hypothesis, which raises Python's limit, would overflow the stack itself
        return copied
    last = min(len(content), 200) if kind == "head" else len(content)
    if kind in ("flip", "head", "json"):
        for position in data.draw(st.lists(st.integers(0, last - 1), min_size=1, max_size=3)):
            content[position] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[data.draw(st.integers(0, last)) :]
    elif kind == "grow":
        content += data.draw(st.binary(min_size=1, max_size=9))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.write_bytes(b"" if kind == "empty" else bytes(content))
    return copied


ANY = (
    st.none()
    | st.booleans()
    | st.sampled_from([-1, 0, 1, 2**31, 10**30, 1.5, float("nan"), "", "x", "../x", "/etc", [], {}, [[]]])
)


def changed(data: st.DataObject, tree: object) -> object:
    """A JSON tree with one value changed, taken out, or one key more, anywhere."""
    tree = copy.deepcopy(tree)
    part = tree
    while isinstance(part, dict | list) and part:
        key = data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        if not isinstance(part[key], dict | list) or not part[key] or data.draw(st.booleans()):
            action = data.draw(st.sampled_from(["set", "remove", "add"]))
            if action == "set":
                part[key] = data.draw(ANY)
            elif action == "remove":
                del part[key]
            elif isinstance(part, dict):
                part["more"] = data.draw(ANY)
            break
        part = part[key]
    return tree


def same(one: PromptEncoder, other: PromptEncoder) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return describe(one) == describe(other) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@examples(900)
@given(data=st.data())
def test_a_damaged_adapter_is_noticed_or_is_the_same(base, scratch, data):
    kind = data.draw(st.sampled_from(["adapter", "shared", "input"]))
    folder = damaged(data, base / kind, scratch)
    whole = load_adapter(base / kind)
    with only_our_errors("adapters"):
        assert same(load_adapter(folder), whole)


@examples(300)
@given(data=st.data())
def test_a_damaged_adapter_with_a_matching_checksum_loads_or_is_refused(base, scratch, data):
    whole = base / data.draw(st.sampled_from(["adapter", "shared", "input"]))
    with any_checksum(), only_our_errors("adapters"):
        load_adapter(damaged(data, whole, scratch))


@examples(400)
@given(data=st.data())
def test_a_damaged_index_is_noticed_or_gives_the_same_hits(base, scratch, data):
    model = PromCSE(load_adapter(base / "adapter"))
    model.load_index(base / "index")
    expected = model.search(INDEXED)
    folder = damaged(data, base / "index", scratch)
    with only_our_errors("indexes"):
        model.load_index(folder)
        assert model.search(INDEXED) == expected


@examples(1000)
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused(base, scratch, data):
    whole = base / "run/checkpoints/step-4"
    folder, (wanted, state) = damaged(data, whole, scratch), read_checkpoint(whole)
    with only_our_errors("checkpoints"):
        found, read_state = read_checkpoint(folder)
        assert (found.step, found.history_bytes) == (wanted.step, wanted.history_bytes)
        assert torch.equal(read_state["state"]["x"], state["state"]["x"])
        assert read_state["state"]["y"] == state["state"]["y"]


@examples(500)
@given(data=st.data())
def test_a_damaged_status_history_or_result_is_refused_or_read(base, scratch, data):
    folder = damaged(data, base / "status", scratch)
    for read, path in ((read_status, folder), (read_results, folder), (read_history, folder / "metrics.jsonl")):
        with only_our_errors("run files"):
            read(path)
    with only_our_errors("inputs of a run"):
        record_inputs(folder, json.loads((base / "status/inputs.json").read_text()))
    with only_our_errors("reports"):
        sweep = read_sweep(folder)
        page_content(sweep, tests=True)
        print_report(sweep, rank(sweep.runs, by_seed=True), by_seed=True, tests=True)


@examples(800)
@given(data=st.data())
def test_a_damaged_token_cache_is_built_again(scratch, data):
    source, tokenizer = memory_source("rows", ROWS), small_tokenizer()
    whole = load_tokens(source, tokenizer, max_length=9, cache_dir=scratch / "cache")
    expected = whole.fetch(np.arange(len(ROWS)))[0]
    copied = damaged(data, scratch / "cache/tokens" / whole.fingerprint, scratch)
    shutil.rmtree(scratch / "other", ignore_errors=True)
    (scratch / "other/tokens").mkdir(parents=True)
    copied.rename(scratch / "other/tokens" / whole.fingerprint)
    with only_our_errors("token caches"):
        again = load_tokens(source, tokenizer, max_length=9, cache_dir=scratch / "other")
        np.testing.assert_array_equal(again.fetch(np.arange(len(ROWS)))[0], expected)
        assert (len(again), again.truncated, again.bad_rows) == (len(ROWS), whole.truncated, [])


@examples(300)
@given(data=st.data())
def test_a_damaged_official_checkpoint_is_read_or_refused(base, scratch, data):
    folder = damaged(data, base / "official", scratch)
    with only_our_errors("official"):
        import_official(folder)


@examples(400)
@given(data=st.data())
def test_a_damaged_peft_prefix_is_read_or_refused(base, scratch, data):
    folder = damaged(data, base / "peft", scratch)
    with only_our_errors("peft"):
        import_peft(folder, encoder=str(base / "encoder"))


# --- code and paths ---


class Trap:
    """Makes a file when it is unpickled without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize(
    "name",
    [
        "official/pytorch_model.bin",
        "official/model.safetensors",
        "peft/adapter_model.bin",
        "adapter/adapter.safetensors",
    ],
)
@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_code_in_weights_is_not_run(base, tmp_path, name, form):
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(Trap(marker)))
    assert marker.exists(), "the trap works where pickles are trusted"
    marker.unlink()
    kind = name.partition("/")[0]
    folder = shutil.copytree(base / kind, tmp_path / kind)
    for path in folder.glob("*model.*"):
        path.unlink()
    if form == "bare pickle":
        (tmp_path / name).write_bytes(pickle.dumps({"x": Trap(marker)}))
    else:
        torch.save({"x": Trap(marker)}, tmp_path / name, _use_new_zipfile_serialization=form == "zip")
    read = {"official": import_official, "peft": import_peft, "adapter": load_adapter}[kind]
    with pytest.raises(AdapterError):
        read(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_code_in_a_checkpoint_is_not_run(base, tmp_path, name):
    folder, marker = shutil.copytree(base / "run/checkpoints/step-4", tmp_path / "step-4"), tmp_path / "ran"
    (folder / name).write_bytes(pickle.dumps({"x": Trap(marker)}))
    with pytest.raises(DataError):
        read_checkpoint(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../../outside",
        "/outside",
        "~/../outside",
        "./encoder/../../outside",
        "a\0b",
        "x" * 5000,
        "~nobody-of-this-name/x",
    ],
)
def test_an_encoder_name_with_tricks_in_an_adapter_is_a_name_and_nothing_more(base, tmp_path, name):
    folder = shutil.copytree(base / "adapter", tmp_path / "in/adapter")
    about = json.loads((folder / "adapter.json").read_text())
    about["encoder"]["name"] = name
    (folder / "adapter.json").write_text(json.dumps(about))
    before = sorted(tmp_path.rglob("*"))
    with any_checksum(), only_our_errors("adapters") as errors:
        load_adapter(folder)
    assert errors
    assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_of_symlinks_is_read_and_a_save_replaces_the_link_and_not_what_it_leads_to(base, tmp_path):
    outside = shutil.copytree(base / "adapter", tmp_path / "outside")
    (tmp_path / "adapter").mkdir()
    for path in outside.iterdir():
        (tmp_path / "adapter" / path.name).symlink_to(path)
    encoder = load_adapter(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    with torch.no_grad():
        encoder.prompt.embedding.weight.add_(1)
    save_adapter(encoder, tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before
    assert not any(path.is_symlink() for path in (tmp_path / "adapter").iterdir())


@pytest.mark.parametrize(
    "change", [{"x": torch.zeros(1)}, {"prompt.embedding.weight": torch.full((2, 32), float("nan"))}]
)
def test_weights_that_were_changed_with_care_are_noticed(base, tmp_path, change):
    folder = shutil.copytree(base / "adapter", tmp_path / "adapter")
    save_file(load_file(folder / "adapter.safetensors") | change, folder / "adapter.safetensors")
    with pytest.raises(AdapterError):
        load_adapter(folder)


def test_a_flipped_bit_is_detected_in_an_adapter_and_its_bundled_encoder(tmp_path):
    torch.manual_seed(0)
    backbone = FrozenBackbone.load(str(save_small_encoder(tmp_path / "encoder", num_hidden_layers=1)))
    backbone.identity = backbone.identity.__class__(BUNDLED, None, "0" * 64)
    save_adapter(PromptEncoder(backbone, length=2, pooling="avg", head="none"), tmp_path / "adapter")
    load_adapter(tmp_path / "adapter")
    for path in (path for path in (tmp_path / "adapter").rglob("*") if path.is_file() and path.name != "README.md"):
        content = bytearray(path.read_bytes())
        content[-5 if path.suffix == ".safetensors" else content.index(b"0")] ^= 1
        kept = path.read_bytes()
        path.write_bytes(bytes(content))
        with only_our_errors("adapters") as errors:
            load_adapter(tmp_path / "adapter")
        assert errors, path.name
        path.write_bytes(kept)
