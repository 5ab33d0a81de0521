"""Published folders: inferred settings, embeddings equal to those of the official tool, and export of the same tensors."""

import copy
import functools
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.folders import GOLDEN
from support.official import read_json
from torch.nn import functional as F

from promcse_pl.adapter import load_adapter, save_adapter
from promcse_pl.data.batch import Tokens
from promcse_pl.embedder import PromCSE
from promcse_pl.index import SentenceIndex
from promcse_pl.interop.official import export_official, import_official

pytestmark = pytest.mark.golden
CHECKPOINTS = sorted(path.parents[1] for path in GOLDEN.glob("checkpoint_*/expected/expected.json"))
POOLINGS = {"cls": "mlp", "cls_before_pooler": "mlp_train_only"}
TOLERANCE, RAW_TOLERANCE = 2e-6, 4e-6
"""Absolute, in float32; raw vectors have entries up to 4, and the official ones are themselves up to 2.2e-6 from exact ones."""
OFFICIAL_MAX_LENGTH, OFFICIAL_THRESHOLD, OFFICIAL_TOP_K = 128, 0.6, 10
WORST: dict[str, float] = {}
WHAT = f"{len(CHECKPOINTS)} checkpoints"


@pytest.fixture(params=CHECKPOINTS, ids=lambda path: path.name)
def folder(request):
    return request.param


@pytest.fixture(params=POOLINGS)
def pooling(request):
    return request.param


import_once = functools.cache(import_official)


@pytest.fixture
def imported(folder, pooling):
    return import_once(folder, pooling=pooling)


@pytest.fixture
def model(imported):
    return PromCSE(imported.encoder)


@pytest.fixture
def expected(folder):
    return read_json(folder / "expected/expected.json"), load_file(folder / "expected/embeddings.safetensors")


def check(kind, ours, official, tolerance=TOLERANCE):
    error = float(np.abs(np.asarray(ours, dtype=np.float64) - np.asarray(official, dtype=np.float64)).max(initial=0.0))
    WORST[kind] = max(WORST.get(kind, 0.0), error)
    assert error <= tolerance, f"{kind}: {error:.2e}"


def encode(model, sentences, *, max_length, batch_size=64):
    """Raw vectors of sentences cut at the official length, in batches padded to their longest."""
    vectors = []
    for start in range(0, len(sentences), batch_size):
        encoded = model.tokenizer(
            sentences[start : start + batch_size],
            truncation=True,
            max_length=max_length,
            padding=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            vectors.append(model.encoder(Tokens(encoded["input_ids"], encoded["attention_mask"]))[0])
    return torch.cat(vectors)


def test_prompt_length_projection_and_head_are_seen_in_the_tensors(imported, folder, pooling, expected):
    encoder = imported.encoder
    trans = torch.load(folder / "pytorch_model.bin", weights_only=True).get("prefix_encoder.trans.0.weight")
    assert encoder.prompt.length == encoder.position_offset == expected[0]["pre_seq_len"]
    assert (None if encoder.prompt.trans is None else encoder.prompt.trans[0].out_features) == (
        None if trans is None else len(trans)
    )
    assert (encoder.pooling, encoder.head_mode) == ("cls", POOLINGS[pooling])
    assert encoder.prompt.dropout == read_json(folder / "config.json")["hidden_dropout_prob"]
    assert f"prompt length {encoder.prompt.length}" in imported.notes[0]


@pytest.mark.parametrize("max_length", [32, 128])
def test_the_tokenizer_gives_the_official_tokens(model, expected, max_length):
    official = expected[0][f"tokenized_max_length_{max_length}"]
    ours = model.tokenizer(expected[0]["sentences"], truncation=True, max_length=max_length)["input_ids"]
    assert ours == [
        ids[: sum(mask)] for ids, mask in zip(official["input_ids"], official["attention_mask"], strict=True)
    ]


def test_vectors_equal_those_of_the_official_tool(model, pooling, expected):
    about, vectors = expected
    raw = encode(model, about["sentences"], max_length=OFFICIAL_MAX_LENGTH)
    check("raw vectors", raw, vectors[f"raw_{pooling}"], RAW_TOLERANCE)
    exact = PromCSE(copy.deepcopy(model.encoder).double(), model.tokenizer)
    exact_raw = encode(exact, about["sentences"], max_length=OFFICIAL_MAX_LENGTH)
    check("raw vectors, ours in float64", exact_raw, vectors[f"raw_{pooling}"], RAW_TOLERANCE)
    if f"unit_{pooling}" in vectors:  # the official tool cannot load a projected prompt
        check("unit vectors", F.normalize(raw, dim=1), vectors[f"unit_{pooling}"])
        short = encode(model, about["sentences"], max_length=24, batch_size=5)
        check("unit vectors", F.normalize(short, dim=1), vectors[f"unit_bs5_len24_{pooling}"])
    whole = [len(ids) < OFFICIAL_MAX_LENGTH for ids in model.tokenizer(about["sentences"])["input_ids"]]
    fitting = [sentence for sentence, fits in zip(about["sentences"], whole, strict=True) if fits]
    assert 0 < len(fitting) < len(whole)
    check("raw vectors", model.encode(fitting, normalize=False), vectors[f"raw_{pooling}"][whole], RAW_TOLERANCE)


def test_similarities_and_searches_equal_those_of_the_official_tool(model, pooling, expected):
    about, vectors = expected
    if f"similarity_list_list_{pooling}" not in vectors:
        assert "size mismatch" in about["tool_load"]
        pytest.skip("the official tool cannot load a projected prompt")
    sentences, queries = about["sentences"], about["queries"]
    index = F.normalize(encode(model, sentences, max_length=OFFICIAL_MAX_LENGTH), dim=1)

    def similarities(query, keys=index):
        return torch.from_numpy(model.encode(query)) @ keys.T

    check("similarities", similarities(queries), vectors[f"similarity_list_list_{pooling}"])
    check("similarities", similarities(queries[0]), vectors[f"similarity_str_list_{pooling}"])
    check("similarities", model.similarity(queries[0], sentences[1]), about[f"similarity_str_str_{pooling}"])

    def search(asked, threshold=OFFICIAL_THRESHOLD, top_k=OFFICIAL_TOP_K, added=()):
        found = SentenceIndex()
        found.add(index.numpy(), sentences)
        found.add(model.encode(list(added)), added)
        return found.search(model.encode(asked), top_k=top_k, threshold=threshold)

    wanted = {
        "str_default": search(queries[1:2]),
        "str_threshold-1_top3": search(queries[1:2], -1, 3),
        "str_threshold0.2_top12": search(queries[2:3], 0.2, 12),
        "list_default": search(queries),
        "after_add_to_index_str_default": search(queries[:1], added=queries[:1]),
    }
    for backend in ("brute", "faiss"):
        # brute force drops the threshold and the number of hits when it is given a list
        limited = search(queries) if backend == "brute" else search(queries, 0.3, 2)
        official = about[f"search_{pooling}_{backend}"]
        assert set(official) == {*wanted, "list_threshold0.3_top2"}
        for name, ours in (wanted | {"list_threshold0.3_top2": limited}).items():
            theirs = official[name] if name.startswith("list") else [official[name]]
            assert [[text for text, _ in hits] for hits in ours] == [[text for text, _ in hits] for hits in theirs], (
                name
            )
            scores = [[score for hits in side for _, score in hits] for side in (ours, theirs)]
            check("search scores", *scores)


def check_export(imported, folder, pooling, back):
    """An export holds the checkpoint's tensors and config; an MLM head and a pooler are the only tensors that it may lack."""
    instructions = export_official(imported.encoder, back)
    before, after = (torch.load(path / "pytorch_model.bin", weights_only=True) for path in (folder, back))
    dropped = {name for name in before if name.startswith("lm_head.") or ".pooler." in name}
    assert set(before) - dropped == set(after)
    assert all(
        torch.equal(before[name], tensor) and before[name].dtype == tensor.dtype for name, tensor in after.items()
    )
    for part, note in (("lm_head.", "the MLM head (lm_head) is dropped"), (".pooler.", "the pooler")):
        assert any(part in name for name in dropped) == any(line.startswith(note) for line in imported.notes)
    config = read_json(back / "config.json")
    assert config == {k: v for k, v in read_json(folder / "config.json").items() if k in config}
    assert f"--pooler_type {pooling} --pre_seq_len" in instructions
    assert (back / "README.md").read_text() == instructions
    assert {path.name for path in back.iterdir()} == {
        "README.md", *(path.name for path in folder.iterdir() if path.is_file())
    }  # fmt: skip


def test_export_gives_the_same_tensors_and_config_back(imported, folder, pooling, tmp_path):
    check_export(imported, folder, pooling, tmp_path / "back")


def test_a_checkpoint_with_an_mlm_head_and_a_pooler_gives_the_same_embeddings_and_says_what_is_dropped(
    imported, folder, pooling, expected, tmp_path
):
    more = tmp_path / folder.name
    shutil.copytree(folder, more)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    config = read_json(folder / "config.json")
    width, words, family = config["hidden_size"], config["vocab_size"], config["model_type"]
    shapes = {"bias": (words,), "decoder.weight": (words, width), "decoder.bias": (words,)}
    dense, norm = ("transform.dense", "transform.LayerNorm") if family == "bert" else ("dense", "layer_norm")
    shapes |= {f"{dense}.weight": (width, width), f"{dense}.bias": (width,)}
    shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    state |= {f"lm_head.{name}": torch.randn(shape) for name, shape in shapes.items()}
    state |= {
        f"{family}.pooler.dense.weight": torch.randn(width, width),
        f"{family}.pooler.dense.bias": torch.randn(width),
    }
    torch.save(state, more / "pytorch_model.bin")
    with_head = import_official(more, pooling=pooling)
    assert set(with_head.notes) - set(imported.notes), "what is dropped is said"
    check_export(with_head, more, pooling, tmp_path / "back")
    sentences = expected[0]["sentences"][:8]
    assert np.array_equal(PromCSE(with_head.encoder).encode(sentences), PromCSE(imported.encoder).encode(sentences))


def test_an_exported_folder_is_read_like_the_first(model, pooling, expected, tmp_path):
    export_official(model.encoder, tmp_path / "back")
    again = PromCSE(import_official(tmp_path / "back", pooling=pooling).encoder)
    assert np.array_equal(again.encode(expected[0]["sentences"]), model.encode(expected[0]["sentences"]))


def test_an_adapter_carries_the_encoder_and_gives_the_same_vectors(model, expected, tmp_path):
    sentences = expected[0]["sentences"]
    save_adapter(model.encoder, tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter")
    assert np.array_equal(PromCSE(loaded).encode(sentences), model.encode(sentences))
    save_adapter(loaded, tmp_path / "again")
    shutil.rmtree(tmp_path / "adapter")
    assert np.array_equal(PromCSE.load(tmp_path / "again", device="cpu").encode(sentences), model.encode(sentences))
