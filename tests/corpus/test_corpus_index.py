import json
import shlex
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from promcse_pl.cli.main import main
from promcse_pl.corpus import index as module
from promcse_pl.corpus.encode import CorpusOptions, encode_corpus
from promcse_pl.corpus.index import CorpusIndex, build_corpus_index, ivf_cells, ivf_probes
from promcse_pl.utils.errors import AdapterError, ConfigError, DataError

pytest.importorskip("faiss")
KINDS = ["flat", "hnsw", "ivfpq"]
TEXTS = [f"w{i % 90} w{i * 7 % 90} w{i * 31 % 90}" for i in range(600)]


def clustered(rows: int, width: int) -> np.ndarray:
    random = np.random.default_rng(0)
    centres = np.repeat(random.standard_normal((rows // 40, width)), 40, axis=0)
    vectors = centres + 0.7 * random.standard_normal(centres.shape)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def encoded(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoded")
    table = pa.table({"id": [f"k{i}" for i in range(600)], "text": TEXTS})
    pq.write_table(table.slice(0, 250), folder / "a.parquet")
    pq.write_table(table.slice(250), folder / "b.parquet")
    encode_corpus(model, [folder / "*.parquet"], folder / "out", options=CorpusOptions(rows_per_shard=90))
    for kind in KINDS:
        assert build_corpus_index(folder / "out", kind) == folder / "out" / kind
    return folder / "out"


def load(folder: Path, model) -> CorpusIndex:
    return CorpusIndex.load(folder, adapter=model.adapter_hash(), width=model.width)


@pytest.mark.parametrize("kind", KINDS)
def test_hits_have_text_and_columns_of_their_row(kind, encoded, model):
    index = load(encoded / kind, model)
    assert len(index) == 600
    queries = model.encode(TEXTS[::37])
    for hits in index.search(queries, top_k=4):
        assert len(hits) == 4
        for hit in hits:
            number = int(hit.columns["id"][1:])
            assert hit.text == TEXTS[number]
            assert list(hit.columns) == ["id"]


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_scores_are_the_highest_cosines(kind, encoded, model):
    vectors, queries = model.encode(TEXTS), model.encode(["w3 w4", "w80 w81 w82"])
    for query, hits in zip(queries, load(encoded / kind, model).search(queries, top_k=7), strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(vectors @ query)[::-1][:7], atol=2e-6)
    threshold = float(np.sort(vectors @ queries[0])[-4]) - 1e-5
    (hits,) = load(encoded / kind, model).search(queries[:1], top_k=600, threshold=threshold)
    assert [hit.score >= threshold for hit in hits] == [True] * len(hits)
    assert len(hits) == (vectors @ queries[0] >= threshold).sum()


@pytest.mark.parametrize("shard_format", ["parquet", "npy"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_kind_of_shard_can_be_indexed(shard_format, dtype, model, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS[:30]) + "\n")
    options = CorpusOptions(rows_per_shard=8, shard_format=shard_format, output_dtype=dtype)
    encode_corpus(model, [tmp_path / "a.txt"], tmp_path / "out", options=options)
    build_corpus_index(tmp_path / "out", "flat")
    (hits,) = load(tmp_path / "out/flat", model).search(model.encode(TEXTS[20:21]), top_k=1)
    assert (hits[0].text, hits[0].columns) == (TEXTS[20], {})
    assert hits[0].score == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("kind", "recall"), [("hnsw", 0.97), ("ivfpq", 0.7)])
def test_recall_against_exact_search_on_clustered_embeddings(kind, recall, tmp_path, monkeypatch):
    vectors = clustered(8000, 64)

    class Stored:
        rows, name = len(vectors), "x-00000"

    monkeypatch.setattr(module, "_vectors", lambda folder, shards: iter(np.array_split(vectors, 9)))
    index = module._new_index(kind, tmp_path, [Stored()], 64)
    for part in np.array_split(vectors, 9):
        index.add(part)
    queries = vectors[::80]
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    if kind == "hnsw":
        index.hnsw.efSearch = module.HNSW_SEARCH
    found = index.search(queries, 10)[1]
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), exact.tolist(), strict=True)])
    assert shared >= recall
    if kind == "ivfpq":
        assert (index.nlist, index.nprobe, index.pq.M) == (ivf_cells(8000), ivf_probes(ivf_cells(8000)), 16)
        assert index.nprobe < index.nlist


@pytest.mark.parametrize(
    ("rows", "cells", "probes"), [(1, 1, 1), (600, 15, 8), (10**6, 4000, 250), (10**8, 40000, 256)]
)
def test_the_rules_for_cells_and_probes(rows, cells, probes):
    assert (ivf_cells(rows), ivf_probes(cells)) == (cells, probes)


def test_an_incomplete_corpus_is_not_indexed(model, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS[:30]) + "\n")
    for number, missing in ((0, True), (1, False)):
        options = CorpusOptions(rows_per_shard=8, task=(number, 2))
        encode_corpus(model, [tmp_path / "a.txt"], tmp_path / "out", options=options)
        if missing:
            with pytest.raises(DataError, match=r"the input a\.txt has 2 finished shards, and others are missing"):
                build_corpus_index(tmp_path / "out", "flat")
    build_corpus_index(tmp_path / "out", "flat")
    with pytest.raises(DataError, match="is not an encoded corpus"):
        build_corpus_index(tmp_path, "flat")


def test_an_index_is_replaced_and_a_foreign_folder_is_not(model, tmp_path):
    (tmp_path / "a.txt").write_text("w1\nw2\n")
    encode_corpus(model, [tmp_path], tmp_path / "out")
    (tmp_path / "out/flat").mkdir()
    (tmp_path / "out/flat/notes.txt").write_text("mine")
    with pytest.raises(DataError, match="already exists and is not overwritten"):
        build_corpus_index(tmp_path / "out", "flat")
    (tmp_path / "out/flat/notes.txt").unlink()
    build_corpus_index(tmp_path / "out", "flat")
    build_corpus_index(tmp_path / "out", "flat")
    assert sorted(path.name for path in (tmp_path / "out/flat").iterdir()) == ["corpus-index.json", "vectors.faiss"]
    build_corpus_index(tmp_path / "out", "ivfpq")  # of two vectors


def test_a_wrong_adapter_a_truncated_index_and_a_changed_shard_are_errors(model, tmp_path):
    (tmp_path / "a.txt").write_text("w1\nw2\n")
    encode_corpus(model, [tmp_path], tmp_path / "out")
    with pytest.raises(DataError, match=r"is not an index of a corpus. Try: promcse index .* --kind ivfpq"):
        load(tmp_path / "out", model)
    folder = build_corpus_index(tmp_path / "out", "flat")
    with pytest.raises(DataError, match=f"Try: {folder}"):
        load(tmp_path / "out", model)
    with pytest.raises(AdapterError, match="were computed by another adapter"):
        CorpusIndex.load(folder, adapter="0" * 64, width=model.width)
    index = load(folder, model)
    sidecar = tmp_path / "out/a.txt-00000.json"
    content = sidecar.read_text()
    sidecar.write_text(content.replace(json.loads(content)["input_sha256"], "0" * 64))
    with pytest.raises(DataError, match=r"is missing, or newer than the index\. Try: promcse index"):
        index.search(model.encode(["w1"]))
    vectors = folder / "vectors.faiss"
    content = vectors.read_bytes()
    for damaged in (content[:-40], content[:-1] + bytes([content[-1] ^ 1])):
        vectors.write_bytes(damaged)
        with pytest.raises(DataError, match=r"is truncated or was modified. Try: promcse index .*/out --kind flat"):
            load(folder, model)
    vectors.unlink()
    with pytest.raises(DataError, match=r"vectors\.faiss"):
        load(folder, model)


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
@pytest.mark.parametrize("kind", ["flat", "ivfpq"])
def test_a_modified_shard_is_an_error_whose_command_works(kind, suffix, model, tmp_path):
    (tmp_path / "a.txt").write_text("w1\nw2\nw3\n")
    out, options = tmp_path / "the out", CorpusOptions(rows_per_shard=2, shard_format="npy")
    encode_corpus(model, [tmp_path / "a.txt"], out, options=options)
    path = out / f"a.txt-00001.{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    with pytest.raises(DataError, match=rf"a\.txt-00001\.{suffix} was modified or is damaged") as error:
        build_corpus_index(out, kind)
    subprocess.run(str(error.value).split("Try: ")[1].split(" and the")[0], shell=True, check=True)
    encode_corpus(model, [tmp_path / "a.txt"], out, options=options)
    assert path.read_bytes() == content
    build_corpus_index(out, kind)


def test_a_search_warns_of_shards_that_are_not_in_the_index(model, tmp_path, caplog):
    out = tmp_path / "the out"
    (tmp_path / "a.txt").write_text("w1\nw2\n")
    encode_corpus(model, [tmp_path / "a.txt"], out)
    folder = build_corpus_index(out, "flat")
    load(folder, model)
    assert not caplog.messages
    (tmp_path / "b.txt").write_text("w3\n")
    encode_corpus(model, [tmp_path / "*.txt"], out)
    load(folder, model)
    assert caplog.messages == [f"1 shards of {out} are not in the index. Try: promcse index '{out}' --kind flat"]
    command = caplog.messages[0].split("Try: promcse ")[1]
    assert main(shlex.split(command)) == 0
    caplog.clear()
    assert len(load(folder, model)) == 3
    assert not caplog.messages


def test_the_description_of_an_index_may_be_larger_than_other_json_files(encoded, model, monkeypatch):
    monkeypatch.setattr("promcse_pl.models.weights._JSON_BYTES", 100)
    assert len(load(encoded / "flat", model)) == 600


def test_ivfpq_of_one_row_is_an_error_whose_command_works(model, tmp_path):
    (tmp_path / "a.txt").write_text("w1\n")
    encode_corpus(model, [tmp_path / "a.txt"], tmp_path / "out")
    with pytest.raises(DataError, match=r"ivfpq needs at least 2 rows, .*/out has 1\. Try: promcse index") as error:
        build_corpus_index(tmp_path / "out", "ivfpq")
    assert main(shlex.split(str(error.value).split("Try: promcse ")[1])) == 0
    (hits,) = load(tmp_path / "out/flat", model).search(model.encode(["w1"]))
    assert hits[0].text == "w1"


def test_a_sample_has_the_chosen_rows_in_order_and_is_allocated_once(tmp_path, monkeypatch):
    vectors = clustered(4000, 64)

    class Stored:
        rows = len(vectors)

    monkeypatch.setattr(module, "_vectors", lambda folder, shards: iter(np.array_split(vectors, 40)))
    tracemalloc.start()
    sample = module._sample(tmp_path, [Stored()], 3000, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    rows = np.sort(np.random.default_rng(module.SEED).choice(4000, 3000, replace=False))
    np.testing.assert_array_equal(sample, vectors[rows])
    assert peak < 1.3 * sample.nbytes


def test_an_unknown_kind_and_a_missing_faiss_are_errors(encoded, monkeypatch):
    with pytest.raises(ConfigError, match="kind must be one of flat, hnsw, ivfpq, got 'ivf'"):
        build_corpus_index(encoded, "ivf")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install 'promcse_pl\[faiss\]'"):
        build_corpus_index(encoded, "flat")
