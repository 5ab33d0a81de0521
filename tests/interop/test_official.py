"""Official checkpoints: inferred settings, messages, rejected files, and bundled encoders."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.encoders import add_pipeline, save_small_encoder, small_backbone, small_encoder
from support.limits import memory_limit

from promcse_pl.adapter import load_adapter, save_adapter
from promcse_pl.cli.main import main
from promcse_pl.embedder import PromCSE
from promcse_pl.interop.official import export_official, import_official
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.pipeline import TextSettings
from promcse_pl.models.tuning import Tuning
from promcse_pl.utils.errors import AdapterError, EncoderError

P, D, LAYERS = 4, 16, 3
SENTENCES = ["w5 w6 w7", "w8", "w90 w91 w5 w6 w7 w8"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, 97))]


def save_encoder(folder: Path, words: list[str] = WORDS, **changes: object) -> Path:
    small_encoder("bert", **changes).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


def save_official(
    folder: Path, *, projection: int | None = None, mlp: bool = True, change=None, **config: object
) -> Path:
    """Write a folder as the authors publish them; `change` may spoil the tensors."""
    save_encoder(folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(4)
    state = {f"bert.{k}": v for k, v in small_encoder("bert").state_dict().items() if not k.startswith("pooler.")}
    state["bert.embeddings.position_ids"] = torch.arange(40).unsqueeze(0)
    state["prefix_encoder.embedding.weight"] = torch.randn(P, D if projection else 2 * LAYERS * D)
    if projection:
        for name, inner, outer in (("0", D, projection), ("2", projection, 2 * LAYERS * D)):
            state[f"prefix_encoder.trans.{name}.weight"] = torch.randn(outer, inner) / 4
            state[f"prefix_encoder.trans.{name}.bias"] = torch.randn(outer)
    if mlp:
        state |= {"mlp.dense.weight": torch.randn(D, D), "mlp.dense.bias": torch.randn(D)}
    if change is not None:
        change(state)
    torch.save(state, folder / "pytorch_model.bin")
    edit_config(folder, architectures=["BertForCL"], **config)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def checkpoint(tmp_path):
    return save_official(tmp_path / "sup-promcse")


# --- what is found out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("projection", "said"), [(None, "no projection"), (7, "projection of size 7")])
def test_length_and_projection_come_from_the_tensors(projection, said, tmp_path):
    imported = import_official(save_official(tmp_path / "x", projection=projection))
    prompt = imported.encoder.prompt
    assert (prompt.length, imported.encoder.position_offset, prompt.dropout) == (P, P, 0.1)
    assert (None if prompt.trans is None else prompt.trans[0].out_features) == projection
    assert imported.notes[0] == f"prompt length 4, {said}: read from the tensors"


@pytest.mark.parametrize(
    ("name", "pooling", "head", "other"),
    [
        ("my-unsup-bert", "cls_before_pooler", "mlp_train_only", "cls"),
        ("my-sup-bert", "cls", "mlp", "cls_before_pooler"),
    ],
)
def test_the_pooling_is_guessed_from_the_name_and_said(name, pooling, head, other, tmp_path):
    imported = import_official(save_official(tmp_path / name))
    assert (imported.encoder.pooling, imported.encoder.head_mode) == ("cls", head)
    assert imported.notes[1].startswith(f"pooling {pooling}: ")
    assert f"inferred from the name {name}" in imported.notes[1]
    assert f"promcse import {tmp_path / name} --pooling {other} -o ADAPTER" in imported.notes[1]


def test_without_an_mlp_nothing_is_guessed(tmp_path):
    imported = import_official(save_official(tmp_path / "sup", mlp=False))
    assert (imported.encoder.pooling, imported.encoder.head_mode) == ("cls_before_pooler", "none")
    assert imported.notes[1] == "pooling cls_before_pooler: there is no MLP"


def test_an_average_is_possible_and_drops_the_mlp(checkpoint):
    imported = import_official(checkpoint, pooling="avg_top2")
    assert (imported.encoder.pooling, imported.encoder.head_mode) == ("avg_top2", "none")
    assert imported.notes[1] == "pooling avg_top2: the MLP is dropped"


def test_dropped_mlm_head_and_pooler_are_reported_with_the_effect_on_an_export(tmp_path):
    def more(state):
        state |= {"lm_head.bias": torch.zeros(97), "bert.pooler.dense.bias": torch.zeros(D)}

    imported = import_official(save_official(tmp_path / "x", change=more))
    assert imported.notes[-2:] == (
        "the MLM head (lm_head) is dropped: embeddings do not use it. An export of this adapter has no MLM head, so the "
        "official code would initialise a new one for --do_mlm",
        "the pooler of the pre-trained encoder (pooler) is dropped: neither this package nor the official code uses it",
    )
    export_official(imported.encoder, tmp_path / "back")
    before, after = (
        torch.load(path / "pytorch_model.bin", weights_only=True) for path in (tmp_path / "x", tmp_path / "back")
    )
    assert set(before) - set(after) == {"lm_head.bias", "bert.pooler.dense.bias"}


def test_a_safetensors_checkpoint_gives_the_same_vectors(checkpoint):
    before = PromCSE(import_official(checkpoint).encoder).encode(SENTENCES)
    save_file(torch.load(checkpoint / "pytorch_model.bin", weights_only=True), checkpoint / "model.safetensors")
    (checkpoint / "pytorch_model.bin").unlink()
    assert np.array_equal(PromCSE(import_official(checkpoint).encoder).encode(SENTENCES), before)


# --- the encoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["argument", "config.json"])
def test_an_equal_encoder_is_referred_to_by_name(by, checkpoint, tmp_path):
    name = str(save_encoder(tmp_path / "plain"))
    if by == "config.json":
        edit_config(checkpoint, _name_or_path=name)
    imported = import_official(checkpoint, encoder=name if by == "argument" else None)
    assert (
        imported.notes[2]
        == f"encoder {name}: equal to the checkpoint's bit for bit, so the adapter refers to it by name"
    )
    save_adapter(imported.encoder, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "adapter.json",
        "adapter.safetensors",
    }
    again = PromCSE.load(tmp_path / "adapter", device="cpu")
    assert np.array_equal(again.encode(SENTENCES), PromCSE(import_official(checkpoint).encoder).encode(SENTENCES))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"initializer_range": 0.1}, " of 53 tensors differ"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05, here 1e-12"),
        ({"words": [*WORDS[:5], *reversed(WORDS[5:])]}, "its tokenizer differs"),
    ],
)
def test_another_encoder_is_not_referred_to(changes, why, checkpoint, tmp_path):
    name = str(save_encoder(tmp_path / "plain", **changes))
    imported = import_official(checkpoint, encoder=name)
    assert imported.notes[2].startswith(f"encoder kept inside the adapter: {name} is another one: ")
    assert imported.notes[2].endswith(why)
    assert imported.encoder.backbone.identity.name == "./encoder"


def test_an_unreadable_encoder_is_an_error_only_if_it_was_asked_for(checkpoint):
    edit_config(checkpoint, _name_or_path="/home/authors/bert")
    note = import_official(checkpoint).notes[2]
    assert note.startswith(
        "encoder kept inside the adapter: config.json names /home/authors/bert, which cannot be read here"
    )
    with pytest.raises(EncoderError, match="/home/others/bert does not exist"):
        import_official(checkpoint, encoder="/home/others/bert")


@pytest.fixture
def carrying(checkpoint, tmp_path):
    """An adapter with its encoder inside, and its vectors."""
    imported = import_official(checkpoint)
    save_adapter(imported.encoder, tmp_path / "adapter")
    shutil.rmtree(checkpoint)
    return tmp_path / "adapter", PromCSE(imported.encoder).encode(SENTENCES)


def test_an_adapter_with_its_encoder_can_be_moved_and_saved_again(carrying, tmp_path, monkeypatch):
    folder, vectors = carrying
    folder = folder.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    loaded = load_adapter(Path("moved"))
    assert np.array_equal(PromCSE(loaded).encode(SENTENCES), vectors)
    save_adapter(loaded, tmp_path / "again")
    for name in ("adapter.safetensors", "encoder/model.safetensors", "encoder/config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    again, before = (json.loads((path / "adapter.json").read_text()) for path in (tmp_path / "again", folder))
    del again["checksum"], before["checksum"]  # of the tokenizer's files too, which transformers writes anew
    assert again == before


def test_a_changed_or_missing_inner_encoder_is_refused(carrying):
    folder, _ = carrying
    weights = load_file(folder / "encoder/model.safetensors")
    weights["embeddings.word_embeddings.weight"][7, 7] += 1
    save_file(weights, folder / "encoder/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"was trained on ./encoder with weights"):
        load_adapter(folder)
    shutil.rmtree(folder / "encoder")
    with pytest.raises(EncoderError, match="adapter/encoder does not exist"):
        load_adapter(folder)


def test_an_encoder_read_in_half_precision_is_not_saved(carrying, tmp_path):
    with pytest.raises(EncoderError, match=r"read as bfloat16; saving would store the rounded weights"):
        save_adapter(load_adapter(carrying[0], dtype=torch.bfloat16), tmp_path / "rounded")
    assert not (tmp_path / "rounded").exists()


def test_the_users_own_dot_encoder_is_not_the_adapters(tmp_path, monkeypatch):
    from promcse_pl.models.backbone import FrozenBackbone

    save_encoder(tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    save_adapter(PromptEncoder(FrozenBackbone.load("./encoder"), length=2), Path("adapter"))
    monkeypatch.chdir("/")
    assert load_adapter(tmp_path / "adapter").backbone.identity.name == str(tmp_path / "encoder")


# --- what is refused -------------------------------------------------------------------------------------------------


def drop(*names):
    return lambda state: [state.pop(name) for name in names]


def put(name, value):
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("prefix_encoder.embedding.weight"), "has no prompt .* looks like a SimCSE model.* run.py model.path="),
        (
            drop("prefix_encoder.embedding.weight", "mlp.dense.weight", "mlp.dense.bias"),
            "has no prompt .* looks like a plain encoder",
        ),
        (
            put("prefix_encoder.embedding.weight", torch.zeros(P, 99)),
            r"has shape \(4, 99\), the config.json .* \(4, 96\)",
        ),
        (put("prefix_encoder.embedding.weight", torch.tensor(1.0)), "prompt.embedding.weight is a single number"),
        (put("mlp.dense.weight", torch.zeros(D, 3)), r"head.dense.weight has shape \(16, 3\)"),
        (put("mlp.dense.bias", torch.full((D,), torch.nan)), "head.dense.bias holds values that are not finite"),
        (drop("mlp.dense.bias"), r"lacks head.dense.bias \(1 such tensors\)"),
        (drop("bert.encoder.layer.2.output.dense.bias"), "lacks encoder.layer.2.output.dense.bias"),
        (put("bert.encoder.layer.3.output.dense.bias", torch.zeros(D)), "holds the unknown encoder.layer.3"),
        (put("roberta.embeddings.word_embeddings.weight", torch.zeros(3)), "roberta.* which no BertForCL has"),
        (put("epoch", 3), "is not a state dict"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    with pytest.raises(AdapterError, match=message):
        import_official(save_official(tmp_path / "x", change=change))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"num_hidden_layers": 4}, AdapterError, "lacks encoder.layer.3"),
        ({"hidden_size": 17}, AdapterError, "config.json describes no encoder: .*17"),
        (
            {"model_type": "distilbert"},
            EncoderError,
            "has model_type 'distilbert'; the official code knows bert and roberta",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config, error, message, tmp_path):
    with pytest.raises(error, match=message):
        import_official(save_official(tmp_path / "x", **config))


def bomb(*shape):
    """A tensor of one stored value that claims many: to look at each of them would take terabytes."""
    return torch.zeros(1).expand(*shape)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("prefix_encoder.embedding.weight", bomb(10**6, 10**6)), "declares more values than the file contains"),
        (put("bert.pooler.dense.weight", bomb(10**6, 10**6)), "declares more values than the file contains"),
        (put("mlp.dense.bias", torch.zeros(D).to_sparse()), "sparse"),
        (put("prefix_encoder.trans.0.weight", torch.zeros(10**7, 1)), "lacks prompt.trans.0.bias|has shape"),
    ],
)
def test_a_tensor_that_declares_terabytes_is_rejected_before_memory_is_allocated(change, message, zipped, tmp_path):
    save_official(tmp_path / "x", change=change)
    path = tmp_path / "x/pytorch_model.bin"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=zipped)
    with memory_limit(), pytest.raises(AdapterError, match=message):
        import_official(tmp_path / "x")


def test_a_compressed_checkpoint_is_refused(checkpoint):
    path = checkpoint / "pytorch_model.bin"
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(checkpoint / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in whole.infolist():
            content = whole.read(entry)
            packed.writestr(entry.filename, content + bytes(10**7) if "/data/0" in entry.filename else content)
    (checkpoint / "packed").rename(path)
    with pytest.raises(AdapterError, match=r"it is compressed, unlike files written by torch\.save"):
        import_official(checkpoint)


@pytest.mark.parametrize("config", [{"num_hidden_layers": 900}, {"vocab_size": 10**10}, {"intermediate_size": 10**10}])
def test_an_oversized_config_is_rejected_before_memory_is_allocated(config, tmp_path):
    with memory_limit(), pytest.raises(AdapterError, match=r"describes no encoder|has shape"):
        import_official(save_official(tmp_path / "x", **config))


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin", "vocab.txt", "model.safetensors"])
def test_a_fifo_instead_of_a_file_is_rejected_without_blocking(name, checkpoint):
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    with (
        memory_limit(),
        pytest.raises((AdapterError, EncoderError), match="it is a FIFO, not a regular file"),
    ):
        import_official(str(checkpoint))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_file_cut_short_is_called_so(share, zipped, checkpoint):
    path = checkpoint / "pytorch_model.bin"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(AdapterError, match=r"pytorch_model.bin is (damaged or truncated|refused)"):
        import_official(checkpoint)


class Payload:
    """Creates a file when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_code_in_a_pickle_is_not_run(form, checkpoint, tmp_path):
    state = {"prefix_encoder.embedding.weight": Payload(tmp_path / "attacked")}
    if form == "bare pickle":
        (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, checkpoint / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(
        AdapterError, match=r"is refused: it holds more than tensors.* Nothing in it was run.*(mkdir|operand)"
    ):
        import_official(checkpoint)
    assert not (tmp_path / "attacked").exists()
    if form == "zip":  # the payload does work where pickles are trusted
        torch.load(checkpoint / "pytorch_model.bin", weights_only=False)
        assert (tmp_path / "attacked").exists()


def test_what_is_not_a_checkpoint_is_named(carrying, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "nothing", "nothing is neither a folder .* nor a hub id"),
        ("just-a-name", "just-a-name is neither a folder"),
        (tmp_path / "empty", "is not a checkpoint of the official code: it has no config.json"),
        (carrying[0], "is already an adapter of this package"),
        (tmp_path, "is already an adapter of this package"),  # as a run's folder is
        (save_encoder(tmp_path / "plain"), "has no prompt .* plain encoder"),
    ):
        with pytest.raises(AdapterError, match=message):
            import_official(source)
    (tmp_path / "plain/model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"plain has neither model.safetensors nor pytorch_model.bin"):
        import_official(tmp_path / "plain")
    (tmp_path / "plain/config.json").write_text("[]")
    with pytest.raises(AdapterError, match=r"config.json must contain an object, got list"):
        import_official(tmp_path / "plain")


def test_a_checkpoint_without_a_tokenizer_is_refused(checkpoint):
    (checkpoint / "vocab.txt").unlink()
    with pytest.raises(EncoderError, match="tokenizer"):
        import_official(checkpoint)


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ("cls", "--pooling cls needs the MLP"),
        ("mean", "--pooling must be one of cls, cls_before_pooler, avg.*, got 'mean'"),
    ],
)
def test_an_impossible_pooling_is_refused(pooling, message, tmp_path):
    with pytest.raises(AdapterError, match=message):
        import_official(save_official(tmp_path / "x", mlp=False), pooling=pooling)


# --- export ----------------------------------------------------------------------------------------------------------


def test_an_export_is_a_checkpoint_again(checkpoint, tmp_path):
    encoder = import_official(checkpoint, pooling="cls_before_pooler").encoder
    usage = export_official(encoder, tmp_path / "sup-bert")
    assert f"--model_name_or_path {tmp_path / 'sup-bert'} --pooler_type cls_before_pooler --pre_seq_len 4\n" in usage
    again = import_official(tmp_path / "sup-bert", pooling="cls_before_pooler").encoder
    assert np.array_equal(PromCSE(again).encode(SENTENCES), PromCSE(encoder).encode(SENTENCES))


def test_a_shared_prompt_is_exported_as_a_deep_one(checkpoint, tmp_path):
    imported = import_official(checkpoint, pooling="cls_before_pooler").encoder
    encoder = PromptEncoder(imported.backbone, length=P, kind="shared").eval()
    torch.nn.init.normal_(encoder.prompt.embedding.weight)
    export_official(encoder, tmp_path / "unsup-bert")
    again = import_official(tmp_path / "unsup-bert").encoder
    assert again.prompt.kind == "deep"
    assert torch.equal(again.prompt(), encoder.prompt())
    assert np.array_equal(PromCSE(again).encode(SENTENCES), PromCSE(encoder).encode(SENTENCES))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("electra", {}, "its encoder is electra, allowed: bert, roberta"),
        ("bert", {"pooling": "avg"}, "it does not support the pooling avg, only cls and cls_before_pooler"),
        ("bert", {"pooling": "cls+avg"}, r"it does not support the pooling cls\+avg, only cls and cls_before_pooler"),
        ("bert", {"kind": "input"}, r"this adapter has prompt.kind=input \(export to sentence-transformers"),
        ("bert", {"head": "low_rank"}, "it has no head of the kind low_rank"),
        ("bert", {"position_offset": 0}, "it shifts positions by the prompt length 4, this adapter by 0"),
    ],
)
def test_what_the_official_code_cannot_do_is_not_exported(family, settings, message, tmp_path):
    with pytest.raises(AdapterError, match=message):
        export_official(PromptEncoder(small_backbone(family), length=P, **settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dense_layers_are_not_exported(tmp_path):
    backbone = FrozenBackbone.load(add_pipeline(save_small_encoder(tmp_path / "encoder")))
    with pytest.raises(AdapterError, match="its encoder has dense layers after the pooling"):
        export_official(PromptEncoder(backbone, length=P), tmp_path / "out")


def test_a_default_prompt_and_lower_case_are_not_exported(tmp_path):
    backbone = FrozenBackbone.load(save_small_encoder(tmp_path / "encoder"))
    for text in (TextSettings(lower_case=True), TextSettings(prompts={"query": "w5 "}, default_prompt="query")):
        with pytest.raises(AdapterError, match="a default prompt or are converted to lower case"):
            export_official(PromptEncoder(backbone, length=P, text=text), tmp_path / "out")


def test_nothing_is_overwritten(checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    encoder = import_official(checkpoint).encoder
    for write in (save_adapter, export_official):
        with pytest.raises(AdapterError, match="mine already exists and is not overwritten"):
            write(encoder, tmp_path / "mine")
    with pytest.raises(AdapterError, match="sup-promcse already exists"):
        export_official(encoder, checkpoint)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


# --- from a shell ----------------------------------------------------------------------------------------------------


def test_import_and_export_say_what_they_did(checkpoint, tmp_path, capsys):
    adapter, back = tmp_path / "adapter", tmp_path / "back"
    assert main(["import", str(checkpoint), "--pooling", "cls", "-o", str(adapter)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "prompt length 4, no projection: read from the tensors",
        "pooling cls: the MLP is kept",
        "encoder kept inside the adapter: config.json names no other; to refer to one: --encoder NAME",
        f"adapter: {adapter}",
    ]
    assert main(["export", str(adapter), "--to", "official", "-o", str(back)]) == 0
    assert f"--model_name_or_path {back} --pooler_type cls --pre_seq_len 4\n" in capsys.readouterr().out
    assert main(["similarity", str(adapter), *SENTENCES[:2]]) == 0


def test_errors_go_to_stderr_with_code_2(tmp_path, capsys):
    assert main(["import", str(tmp_path / "typo"), "-o", str(tmp_path / "adapter")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'typo'} is neither a folder")
    assert not (tmp_path / "adapter").exists()


def test_trained_weights_are_refused_with_the_export_that_keeps_them(tmp_path):
    backbone = small_backbone()
    backbone.tune(Tuning("bias"))
    with pytest.raises(AdapterError, match=r"tuning.weights=bias.*xport to sentence-transformers instead"):
        export_official(PromptEncoder(backbone, length=4), tmp_path / "out")
