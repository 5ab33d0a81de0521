import hashlib
import io
import json
import os
import shutil
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support.encoders import save_small_encoder, small_tokenizer
from support.limits import memory_limit

from promcse_pl.adapter import save_adapter
from promcse_pl.embedder import PromCSE
from promcse_pl.index import FORMAT, SentenceIndex
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.utils.errors import AdapterError, ConfigError, DataError

CORPUS = ["w5 w6", "w7", "w8 w9 w10", "w5 w6", "w11 w12 w13 w14", "w40", "w41 w42", "w90 w91 w92"]


def save_small_adapter(folder: Path, **settings: object) -> Path:
    if not (folder / "encoder").exists():
        save_small_encoder(folder / "encoder")
    encoder = PromptEncoder(FrozenBackbone.load(str(folder / "encoder")), length=3, **{"pooling": "avg", **settings})
    save_adapter(encoder, folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return save_small_adapter(tmp_path_factory.mktemp("small"))


@pytest.fixture
def model(adapter) -> PromCSE:
    return PromCSE.load(adapter, device="cpu")


def random_units(rows: int, width: int = 8, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(vectors: np.ndarray, kind: str = "exact") -> SentenceIndex:
    index = SentenceIndex(kind)
    index.add(vectors, [f"s{row}" for row in range(len(vectors))])
    return index


def brute_force(query, vectors, top_k, threshold) -> list[tuple[str, float]]:
    """Every pair in a loop; the sort is stable, so equal scores stay in the order of the rows."""
    scores = [sum(float(a) * float(b) for a, b in zip(query, vector, strict=True)) for vector in vectors]
    hits = [(f"s{row}", score) for row, score in enumerate(scores) if score >= threshold]
    return sorted(hits, key=lambda hit: -hit[1])[:top_k]


# Entries -1, 0, 1 of unit vectors in powers of 2: all dot products are exact multiples of 1/4, with many ties
AXES = np.vstack(
    [
        np.eye(4),
        -np.eye(4),
        [[a, b, c, d] for a in (0.5, -0.5) for b in (0.5, -0.5) for c in (0.5, -0.5) for d in (0.5, -0.5)],
    ]
)
rows_of_axes = st.lists(st.integers(0, len(AXES) - 1), min_size=1, max_size=40)


@given(rows_of_axes, rows_of_axes, st.integers(1, 45), st.sampled_from([-1, -0.5, -0.3, 0, 0.25, 0.5, 0.6, 1]))
@settings(deadline=None)
def test_exact_search_equals_a_brute_force_loop_also_among_ties(rows, queries, top_k, threshold):
    vectors, queries = AXES[rows].astype(np.float32), AXES[queries].astype(np.float32)
    found = filled(vectors).search(queries, top_k=top_k, threshold=threshold)
    assert found == [brute_force(query, vectors, top_k, threshold) for query in queries]


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 30), st.just(5)), elements=st.floats(-1, 1, width=32)),
    st.integers(1, 35),
    st.floats(-1, 1),
    st.sampled_from(["exact", "flat"]),
)
@settings(deadline=None)
def test_search_equals_a_brute_force_loop_on_any_vectors(vectors, top_k, threshold, kind):
    if kind == "flat":
        pytest.importorskip("faiss")
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-3)
    (found,) = filled(vectors, kind).search(vectors[:1], top_k=top_k, threshold=threshold)
    wanted = brute_force(vectors[0], vectors, len(vectors), threshold)
    near = sum(abs(score - threshold) < 2e-6 for _, score in brute_force(vectors[0], vectors, len(vectors), -1))
    assert abs(len(found) - min(top_k, len(wanted))) <= near  # a score on the threshold itself may fall either way
    for (_, score), (_, wanted_score) in zip(found, wanted, strict=False):
        assert score == pytest.approx(wanted_score, abs=2e-6)
    for sentence, score in found:
        assert score == pytest.approx(float(vectors[int(sentence[1:])] @ vectors[0]), abs=2e-6)
        assert score >= threshold
    assert len({sentence for sentence, _ in found}) == len(found)


def test_blocks_of_rows_and_queries_change_nothing(monkeypatch):
    vectors = AXES[np.random.default_rng(0).integers(0, len(AXES), 200)].astype(np.float32)
    whole = filled(vectors).search(vectors[:9], top_k=17, threshold=0)
    monkeypatch.setattr("promcse_pl.index.BLOCK_ROWS", 7)
    monkeypatch.setattr("promcse_pl.index.BLOCK_QUERIES", 2)
    assert filled(vectors).search(vectors[:9], top_k=17, threshold=0) == whole
    assert [len(hits) for hits in whole] == [17] * 9


def test_a_sentence_reaches_the_threshold_1_with_itself():
    vectors = random_units(200, width=384)
    assert filled(vectors).search(vectors, threshold=1.0) == [[(f"s{row}", 1.0)] for row in range(200)]


def test_a_cosine_is_never_above_1():
    vectors = random_units(3) * np.float32(1.000001)  # as half precision may leave them
    assert filled(vectors).search(vectors, top_k=1) == [[(f"s{row}", 1.0)] for row in range(3)]


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_faiss_finds_the_hits_of_exact_search_in_the_probed_cells(kind):
    pytest.importorskip("faiss")
    centres = random_units(40, width=24, seed=1)
    vectors = np.repeat(centres, 60, axis=0) + 0.3 * random_units(2400, width=24, seed=2)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    queries, exact, index = vectors[::50], filled(vectors), filled(vectors, kind)
    wanted = exact.search(queries, top_k=10, threshold=0.5)
    found = index.search(queries, top_k=10, threshold=0.5)
    shared = [len(dict(a).keys() & dict(b)) / len(b) for a, b in zip(found, wanted, strict=True)]
    assert np.mean(shared) >= (1.0 if kind == "flat" else 0.95)
    assert all(len(hits) <= 10 and hits[-1][1] >= 0.5 for hits in found)
    if kind == "ivf":
        assert index._vectors.nlist == 48  # more than one cell, or the test would show nothing
        assert index._vectors.nprobe == 5


def test_an_ivf_index_of_few_sentences_works_without_a_warning(capfd):
    pytest.importorskip("faiss")
    vectors = random_units(5)
    index = filled(vectors, "ivf")
    index.add(vectors[:1], ["again"])
    assert index.search(vectors[:1], threshold=0.999) == [[("s0", 1.0), ("again", 1.0)]]
    assert capfd.readouterr() == ("", "")


def test_one_query_gives_a_list_and_many_give_lists_under_the_same_limits(model):
    model.build_index(CORPUS)
    vectors = model.encode(CORPUS)
    for top_k, threshold in ((1, -1), (3, 0.2), (100, -1), (5, 0.9)):
        many = model.search(CORPUS[:4], top_k=top_k, threshold=threshold)
        for query, hits in zip(CORPUS[:4], many, strict=True):
            single = model.search(query, top_k=top_k, threshold=threshold)
            assert [sentence for sentence, _ in single] == [sentence for sentence, _ in hits]
            np.testing.assert_allclose([score for _, score in single], [score for _, score in hits], atol=2e-6)
            cosines = vectors @ model.encode(query)
            wanted = np.sort(cosines[cosines >= threshold])[::-1][:top_k]
            np.testing.assert_allclose([score for _, score in hits], wanted, atol=2e-6)
    assert model.search([]) == []


def test_by_default_the_five_best_hits_come_back_however_low_their_cosines(model):
    model.build_index(CORPUS * 2)
    assert model.search("w5 w6")[:4] == [("w5 w6", 1.0)] * 4
    assert len(model.search("w5 w6")) == 5
    index = SentenceIndex()
    index.add(np.array([[-1.0, 0.0], [0.0, 1.0]], dtype=np.float32), ["west", "north"])
    assert index.search(np.array([[1.0, 0.0]], dtype=np.float32)) == [[("north", 0.0), ("west", -1.0)]]
    assert model.search("w5 w6", threshold=0.6) == [hit for hit in model.search("w5 w6") if hit[1] >= 0.6]


def test_add_keeps_earlier_sentences_and_the_callers_list(model):
    first, second = ["w5 w6", "w7"], ("w8", "w5 w6")
    model.build_index(first)
    model.add(second)
    model.add([])
    assert first == ["w5 w6", "w7"]
    assert [sentence for sentence, _ in model.search("w5 w6", top_k=9, threshold=-1)][:2] == ["w5 w6", "w5 w6"]
    assert sorted(s for s, _ in model.search("w7", top_k=9, threshold=-1)) == ["w5 w6", "w5 w6", "w7", "w8"]
    first.append("w9")
    assert len(model.search("w7", top_k=9, threshold=-1)) == 4


def test_build_index_takes_the_place_of_an_earlier_one_but_only_when_it_succeeds(model):
    model.build_index(["w5"])
    with pytest.raises(DataError, match="sentence 1 must be a string, got int"):
        model.build_index(["w6", 7])
    assert model.search("w5") == [("w5", 1.0)]
    model.build_index(["w6"])
    assert [s for s, _ in model.search("w5", threshold=-1)] == ["w6"]


def test_wrong_use_is_an_error_with_the_call_to_type(model, tmp_path):
    for use in (lambda: model.search("w5"), lambda: model.add(["w5"]), lambda: model.save_index(tmp_path / "index")):
        with pytest.raises(DataError, match=r"no index yet. Try: model.build_index"):
            use()
    for sentences in ([], "w5"):
        with pytest.raises(DataError, match="an index needs a list of sentences"):
            model.build_index(sentences)
    with pytest.raises(ConfigError, match="kind must be one of exact, flat, ivf, got 'hnsw'"):
        model.build_index(["w5"], kind="hnsw")
    with pytest.raises(DataError, match="the index is empty"):
        SentenceIndex().search(random_units(1))
    model.build_index(CORPUS)
    with pytest.raises(DataError, match="add needs a list"):
        model.add("w5")
    for top_k in (0, -1, 2.5, None):
        with pytest.raises(ConfigError, match="top_k must be an integer >= 1"):
            model.search("w5", top_k=top_k)
    for threshold in (1.01, -1.01, float("nan")):
        with pytest.raises(ConfigError, match=r"threshold must lie in \[-1, 1\]"):
            model.search(["w5"], threshold=threshold)


def test_without_faiss_its_kinds_name_the_package_and_exact_search_works(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install 'promcse_pl\[faiss\]'"):
        model.build_index(CORPUS, kind="flat")
    model.build_index(CORPUS)
    assert model.search("w7")[0] == ("w7", 1.0)


@pytest.mark.parametrize("kind", ["exact", "flat", "ivf"])
def test_a_saved_index_gives_the_same_hits_and_can_grow(model, adapter, tmp_path, kind):
    if kind != "exact":
        pytest.importorskip("faiss")
    corpus = [*CORPUS, "zażółć\nw5\u2028", "🙂 w6"]
    model.build_index(corpus, kind=kind)
    model.save_index(tmp_path / "index")
    model.save_index(tmp_path / "index")  # replaces itself
    other = PromCSE.load(adapter, device="cpu")
    other.load_index(tmp_path / "index")
    assert other.search(corpus, top_k=20, threshold=-1) == model.search(corpus, top_k=20, threshold=-1)
    other.add(["w33"])
    assert other.search("w33")[0] == ("w33", 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]  # no temporary folder is left


def test_an_index_of_another_adapter_is_refused(model, adapter, tmp_path):
    model.build_index(CORPUS)
    model.save_index(tmp_path / "index")
    changes = {"prompt": {}, "pooling": {"pooling": "cls"}, "positions": {"position_offset": 0}}
    for name, change in changes.items():
        model.build_index(["w5"])
        other = PromCSE(PromptEncoder(model.encoder.backbone, length=3, **{"pooling": "avg", **change}))
        if name != "prompt":  # which is fresh, and so another, in the first case
            other.encoder.load_state_dict(model.encoder.state_dict())
        with pytest.raises(AdapterError, match="were computed by another adapter"):
            other.load_index(tmp_path / "index")


@pytest.mark.parametrize("name", ["index.json", "sentences.json", "vectors.npy"])
def test_missing_cut_or_changed_files_are_refused(model, tmp_path, name):
    model.build_index(CORPUS)
    model.save_index(tmp_path / "index")
    path = tmp_path / "index" / name
    data = path.read_bytes()
    broken = [data[: len(data) // 2], b""]
    if name != "index.json":
        broken += [data[:-1], data[:-1] + bytes([data[-1] ^ 1])]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"index"):
            model.load_index(tmp_path / "index")
    path.unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        model.load_index(tmp_path / "index")
    assert model.search("w7")[0] == ("w7", 1.0)  # the index in memory is as it was


def test_a_description_that_is_newer_or_odd_is_refused(model, tmp_path):
    model.build_index(CORPUS)
    model.save_index(tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    about = json.loads(path.read_text())
    for change, message in (
        ({"format": FORMAT + 1}, f"has format {FORMAT + 1}"),
        ({"kind": "hnsw"}, "kind must be one of"),
        ({"sha256": {}}, "is not an index, or is damaged"),
        ({"adapter": 3}, "another adapter"),
    ):
        path.write_text(json.dumps({**about, **change}))
        with pytest.raises((DataError, ConfigError, AdapterError), match=message):
            model.load_index(tmp_path / "index")
    for text in ("[]", "null", "{}"):
        path.write_text(text)
        with pytest.raises(DataError, match="is not an index"):
            model.load_index(tmp_path / "index")


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Change a file of an index and its checksum, as an attacker would."""
    (folder / name).write_bytes(content)
    about = json.loads((folder / "index.json").read_text())
    about["sha256"][name] = hashlib.sha256(content).hexdigest()
    (folder / "index.json").write_text(json.dumps(about))


def npy(array: np.ndarray, **header: object) -> bytes:
    """A .npy file, possibly with a wrong header."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape, **header}
    )
    return stream.getvalue() + array.tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(random_units(8, 16), shape=(8, 10**12)), "mmap length is greater than file size"),
        (npy(random_units(7, 16)), r"float32 of shape \(7, 16\), expected float32 of shape \(8, 16\)"),
        (npy(random_units(8, 15)), r"shape \(8, 15\), expected float32 of shape \(8, 16\)"),
        (npy(random_units(8, 16).astype(np.float64)), "contains float64"),
        (npy(np.full((8, 16), np.nan, dtype=np.float32)), "contains non-finite values"),
        (npy(np.zeros(128, dtype=np.float32)), r"shape \(128,\)"),
    ],
)
def test_vectors_that_do_not_fit_the_sentences_or_the_adapter_are_refused(model, tmp_path, content, message):
    model.build_index(CORPUS)
    model.save_index(tmp_path / "index")
    rewrite(tmp_path / "index", "vectors.npy", content)
    with pytest.raises(DataError, match=message):
        model.load_index(tmp_path / "index")


@pytest.mark.parametrize("content", [b"{}", b'"w5"', b"[1]", b'["w5"]', b"[" * 100_000])
def test_sentences_that_do_not_fit_the_vectors_are_refused(model, tmp_path, content):
    model.build_index(CORPUS)
    model.save_index(tmp_path / "index")
    rewrite(tmp_path / "index", "sentences.json", content)
    with pytest.raises(DataError, match="index"):
        model.load_index(tmp_path / "index")


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_a_faiss_file_that_claims_more_than_it_holds_is_refused(model, tmp_path, kind):
    pytest.importorskip("faiss")
    model.build_index(CORPUS, kind=kind)
    model.save_index(tmp_path / "index")
    model.load_index(tmp_path / "index")
    whole = (tmp_path / "index/vectors.faiss").read_bytes()
    for content in (
        whole[:4] + struct.pack("<iq", 16, 10**12) + whole[16:],
        whole[:4] + struct.pack("<iq", 2**30, 8) + whole[16:],
        whole[:40],
        whole[:9],
    ):
        rewrite(tmp_path / "index", "vectors.faiss", content)
        with pytest.raises(DataError, match="is not an index, or is damaged"):
            model.load_index(tmp_path / "index")


@pytest.mark.parametrize("name", ["index.json", "sentences.json", "vectors.npy"])
def test_a_fifo_instead_of_a_file_is_rejected_without_blocking(model, tmp_path, name):
    model.build_index(CORPUS)
    model.save_index(str(tmp_path / "index"))
    (tmp_path / "index" / name).unlink()
    os.mkfifo(tmp_path / "index" / name)
    with memory_limit(), pytest.raises(DataError, match=r"it is a (FIFO|device), not a regular file"):
        model.load_index(str(tmp_path / "index"))


def test_an_index_of_an_earlier_format_asks_for_a_new_one_and_not_for_an_upgrade(model, tmp_path):
    model.build_index(CORPUS)
    model.save_index(tmp_path / "index")
    path = tmp_path / "index/index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": FORMAT - 1}))
    with pytest.raises(DataError, match=r"Try: build the index again with build_index and save_index") as caught:
        model.load_index(tmp_path / "index")
    assert "upgrade" not in str(caught.value)


def test_an_index_that_another_tokenizer_or_config_made_is_refused(model, adapter, tmp_path):
    model.build_index(CORPUS)
    model.save_index(tmp_path / "index")
    model.load_index(tmp_path / "index")
    tokenizer = small_tokenizer()
    PromCSE(model.encoder, tokenizer).load_index(tmp_path / "index")  # an equal one
    tokenizer.backend_tokenizer.normalizer = None
    with pytest.raises(AdapterError, match=r"computed by another adapter .*, encoder or tokenizer"):
        PromCSE(model.encoder, tokenizer).load_index(tmp_path / "index")
    copy = shutil.copytree(adapter.parent / "encoder", tmp_path / "encoder")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    other = PromptEncoder(FrozenBackbone.load(str(copy)), length=3, pooling="avg")
    other.load_state_dict(model.encoder.state_dict())
    with pytest.raises(AdapterError, match=r"computed by another adapter .*, encoder or tokenizer"):
        PromCSE(other).load_index(tmp_path / "index")


def test_save_index_never_replaces_a_folder_of_something_else(model, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("keep me")
    model.build_index(CORPUS)
    with pytest.raises(AdapterError, match="already exists"):
        model.save_index(tmp_path / "letters")
    assert (tmp_path / "letters" / "dear.txt").read_text() == "keep me"


@pytest.mark.parametrize("text", ['{"pages": []}', '{"format": 1, "promcse_pl": "0.1"}', "[]", "{"])
def test_save_index_never_replaces_a_website_with_an_index_json(text, model, tmp_path):
    site = {"index.json": text, "index.html": "<html>", ".git/HEAD": "ref: refs/heads/main"}
    for name, content in site.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(content)
    model.build_index(CORPUS)
    with pytest.raises(AdapterError, match="already exists and is not overwritten"):
        model.save_index(tmp_path / "site")
    assert {name: (tmp_path / "site" / name).read_text() for name in site} == site


def test_saving_an_index_again_keeps_other_files_in_its_folder(model, tmp_path):
    others = {"README.md": "our corpus", ".git/HEAD": "ref: refs/heads/main", "vectors.faiss.bak": "mine"}
    model.build_index(CORPUS)
    model.save_index(tmp_path / "index")
    for name, content in others.items():
        (tmp_path / "index" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "index" / name).write_text(content)
    model.build_index([*CORPUS, "w9 w9"])
    model.save_index(tmp_path / "index")
    model.load_index(tmp_path / "index")
    assert len(model.search("w9 w9", top_k=99, threshold=-1)) == len(CORPUS) + 1
    assert {name: (tmp_path / "index" / name).read_text() for name in others} == others


@pytest.mark.parametrize("kind", ["exact", "flat"])
def test_threads_search_a_growing_index_and_see_whole_sentences(kind):
    if kind == "flat":
        pytest.importorskip("faiss")
    vectors = random_units(400)
    index = filled(vectors[:100], kind)
    wrong: list[object] = []

    def read() -> None:
        for _ in range(60):
            try:
                for row, hits in enumerate(index.search(vectors[:20], top_k=1)):
                    if hits != [(f"s{row}", 1.0)]:
                        wrong.append(hits)
            except Exception as error:
                wrong.append(error)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for row in range(100, 400):
        index.add(vectors[row : row + 1], [f"s{row}"])
    for reader in readers:
        reader.join()
    assert wrong == []
    assert index.search(vectors[399:], top_k=1) == [[("s399", 1.0)]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_vectors_are_float32_and_close(adapter, dtype):
    half, full = PromCSE.load(adapter, device="cpu", dtype=dtype), PromCSE.load(adapter, device="cpu")
    assert next(half.encoder.backbone.model.parameters()).dtype == getattr(__import__("torch"), dtype)
    ours, wanted = half.encode(CORPUS), full.encode(CORPUS)
    assert ours.dtype == np.float32
    assert not np.array_equal(ours, wanted)
    assert (ours * wanted).sum(1).min() >= 0.999
    half.build_index(CORPUS)
    found = half.search("w5 w6", top_k=2)
    assert [sentence for sentence, _ in found] == ["w5 w6"] * 2
    assert [score for _, score in found] == pytest.approx([1.0] * 2, abs=1e-5)  # a batch of one rounds its own way


def test_unknown_dtypes_and_absent_devices_are_named(adapter):
    with pytest.raises(ConfigError, match="dtype must be float32, bfloat16, float16 or int8, got 'int4'"):
        PromCSE.load(adapter, dtype="int4")
    with pytest.raises(ConfigError, match="device must be auto, cpu, cuda or mps, got 'toaster'"):
        PromCSE.load(adapter, device="toaster")
