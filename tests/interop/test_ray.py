"""The Ray Data actor and `promcse encode --engine ray`. All tests share one local cluster with two CPUs."""

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from support.encoders import save_small_adapter

from promcse_pl.cli.main import main
from promcse_pl.corpus.encode import CorpusOptions, CorpusProgress, encode_corpus
from promcse_pl.corpus.folder import finished_shards
from promcse_pl.embedder import PromCSE
from promcse_pl.utils.errors import ConfigError, DataError, PromcseError
from promcse_pl.utils.ray_cluster import cluster_nodes, ray_cluster

ray = pytest.importorskip("ray")
engine = importlib.import_module("promcse_pl.interop.ray")

TEXTS = [f"w{i % 90} w{i * 7 % 90}" + " w5" * (i % 4) for i in range(60)]
OPTIONS = CorpusOptions(rows_per_shard=5)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return save_small_adapter(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def model(adapter) -> PromCSE:
    return PromCSE.load(adapter, device="cpu")


@pytest.fixture(scope="module")
def cluster():
    """A cluster with two CPUs, started as the command starts it; Ray's token is not written to the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({"CPU": 2}))
        patch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with ray_cluster(None, "--address "):
            assert cluster_nodes(ray) == [(2, 0)]
            yield
    assert not [child for child in psutil.Process().children(recursive=True) if "raylet" in child.name()]


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a", "b", "c"):
        lines = [json.dumps({"id": f"{name}{i}", "text": text}) for i, text in enumerate(TEXTS)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def busy_workers() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just died
            if " ".join(child.cmdline()).startswith("ray::promcse encode"):
                found.append(child)
    return found


@pytest.mark.slow
def test_the_actor_of_ray_data_equals_encode_and_keeps_all_other_columns(cluster, adapter, model):
    ids = [2**60 + i for i in range(len(TEXTS))]
    table = pa.table({"id": ids, "body": TEXTS, "tags": [[text] for text in TEXTS]})
    data = importlib.import_module("ray.data")
    data.DataContext.get_current().enable_progress_bars = False
    encoded = (
        data.from_arrow([table.slice(0, 30), table.slice(30)])
        .map_batches(
            engine.RayEncoder,
            fn_constructor_kwargs={"adapter": adapter, "text_column": "body"},
            compute=data.ActorPoolStrategy(size=2),
            batch_size=16,
            num_cpus=1,
        )
        .take_all()
    )
    encoded.sort(key=lambda row: row["id"])
    assert [(row["id"], row["body"], list(row["tags"])) for row in encoded] == [
        (row["id"], row["body"], row["tags"]) for row in table.to_pylist()
    ]
    embeddings_ND = np.stack([row["embedding"] for row in encoded])
    assert embeddings_ND.dtype == np.float32
    np.testing.assert_allclose(embeddings_ND, model.encode(TEXTS), atol=1e-6)


@pytest.mark.slow
def test_an_actor_uses_its_cpus_keeps_missing_integers_of_tables_and_names_wrong_columns(cluster, adapter, model):
    class Actor(engine.RayEncoder):
        def threads(self) -> tuple[int, str]:
            return torch.get_num_threads(), os.environ["RAYON_NUM_THREADS"]

    actor = ray.remote(Actor).options(num_cpus=2).remote(adapter, prompt="w7 ")
    assert ray.get(actor.threads.remote()) == (2, "2")
    table = pa.table({"id": pa.array([2**60 + 1, None]), "text": TEXTS[:2]})
    encoded = ray.get(actor.__call__.remote(table))
    assert encoded.drop_columns("embedding") == table
    assert encoded.schema.field("embedding").type == pa.list_(pa.float32(), 16)
    embeddings_ND = np.stack(encoded.column("embedding").to_numpy())
    np.testing.assert_allclose(embeddings_ND, model.encode(TEXTS[:2], prompt="w7 "), atol=1e-6)
    for batch, error, message in (
        (encoded, DataError, 'Try: dataset.rename_columns({"embedding": "old_embedding"})'),
        (table.rename_columns(["id", "texts"]), ConfigError, "(columns: id, texts). Try: text_column='texts'"),
        (table.to_pandas(), ConfigError, "Try: batch_format='numpy'"),
    ):
        with pytest.raises(error) as raised:
            ray.get(actor.__call__.remote(batch))
        assert message in str(raised.value.cause)
    ray.kill(actor)  # the error holds a reference


@pytest.mark.slow
@pytest.mark.parametrize("files", [["a.jsonl"], ["a.jsonl", "b.jsonl", "c.jsonl"]])
def test_the_command_writes_the_files_of_one_process(
    files, cluster, adapter, model, corpus, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(corpus)
    encode_corpus(model, files, tmp_path / "one", options=dataclasses.replace(OPTIONS, prompt=""))
    command = ["encode", str(adapter), *files, "--out", "../two", "--rows-per-shard", "5"]
    assert main([*command, "--engine", "ray", "--workers", "2"]) == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    printed = capsys.readouterr()
    assert printed.out == f"../two: {60 * len(files)} x 16 float32, unit length, in {12 * len(files)} shards\n"
    assert sorted(line.split(": ")[0] for line in printed.err.splitlines()) == sorted(
        f"{name}-{number:05d}" for name in files for number in range(12)
    )
    assert f": {60 * len(files)} texts, " in printed.err
    assert "0 h 00 min left" in printed.err


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(cluster, adapter, model, corpus, tmp_path):
    encode_corpus(model, [corpus], tmp_path / "one", options=OPTIONS)
    killed: list[psutil.Process] = []

    def kill_once(progress: CorpusProgress) -> None:
        if not killed and progress.shard:
            killed.extend(busy_workers()[:1])
            os.kill(killed[0].pid, signal.SIGKILL)

    two = tmp_path / "two"
    done = encode_corpus(
        model, [corpus], two, options=OPTIONS, report=kill_once, engine=engine.RayCorpusEngine(adapter, workers=2)
    )
    assert killed
    assert contents(two) == contents(tmp_path / "one")
    assert (done.shards, done.rows, done.skipped) == (36, 180, 0)


@pytest.mark.slow
def test_an_interrupted_command_is_resumed(cluster, adapter, model, corpus, tmp_path):
    encode_corpus(model, [corpus], tmp_path / "one", options=OPTIONS)
    two, on_ray = tmp_path / "two", engine.RayCorpusEngine(adapter, workers=2)

    def interrupt(progress: CorpusProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_corpus(model, [corpus], two, options=OPTIONS, report=interrupt, engine=on_ray)
    assert not list(two.glob(".promcse_pl-*"))
    (two / "a.jsonl-00003.parquet").unlink(missing_ok=True)
    finished = len(finished_shards(two))
    assert finished < 36
    done = encode_corpus(model, [corpus], two, options=OPTIONS, engine=on_ray)
    assert (done.shards, done.skipped) == (36 - finished, finished)
    assert contents(two) == contents(tmp_path / "one")


@pytest.mark.slow
def test_a_bad_row_is_the_error_of_one_process(cluster, adapter, model, corpus, tmp_path, capsys):
    with (corpus / "b.jsonl").open("a") as stream:
        stream.write('{"id": "b60", "text": ""}\n')
    with pytest.raises(DataError) as error:
        encode_corpus(model, [corpus], tmp_path / "one", options=OPTIONS)
    two = ["encode", str(adapter), str(corpus), "--out", str(tmp_path / "two"), "--rows-per-shard", "5"]
    assert main([*two, "--engine", "ray", "--workers", "2"]) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if "error" in line] == [f"error: {error.value}"]
    assert main([*two, "--engine", "ray", "--workers", "2", "--on-bad-row", "skip"]) == 2
    assert "Try: --on-bad-row stop" in capsys.readouterr().err


@pytest.mark.slow
def test_a_worker_that_dies_too_often_is_one_line(cluster, adapter, model, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "RETRIES", 0)

    def kill(progress: CorpusProgress) -> None:
        for worker in busy_workers():
            worker.kill()

    (corpus / "a.jsonl").write_text('{"text": "w1"}\n' * 3000)
    options = dataclasses.replace(OPTIONS, rows_per_shard=1)
    with pytest.raises(PromcseError, match="Try: the same command again") as error:
        encode_corpus(
            model,
            [corpus / "a.jsonl"],
            tmp_path / "out",
            options=options,
            report=kill,
            engine=engine.RayCorpusEngine(adapter, workers=1),
        )
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--workers", "3"],
            "--workers 3: the Ray cluster has 2 CPUs and 0 GPUs, which is enough for 2 workers. Try: --workers 2",
        ),
        (["--workers", "0"], "workers must be an integer >= 1, got 0"),
        (["--device", "cuda"], "--device cuda: the Ray cluster has no GPU. Try: --device cpu"),
        (["--device", "mps"], "device must be auto, cpu or cuda with Ray, got 'mps'"),
    ],
)
def test_more_workers_than_the_cluster_has_are_an_error(arguments, message, cluster, adapter, corpus, tmp_path, capsys):
    assert (
        main(["encode", str(adapter), str(corpus), "--out", str(tmp_path / "out"), "--engine", "ray", *arguments]) == 2
    )
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nodes", "workers", "device", "expected"),
    [
        ([(8, 0)], None, "auto", (1, 8, 0)),
        ([(8, 0)], 3, "auto", (3, 2, 0)),
        ([(8, 0), (8, 0)], None, "auto", (2, 8, 0)),
        ([(8, 0), (8, 0)], 3, "auto", (3, 4, 0)),
        ([(0, 0), (64, 8)], None, "auto", (8, 8, 1)),
        ([(4, 0), (64, 8)], 2, "auto", (2, 32, 1)),
        ([(64, 8)], None, "cpu", (1, 64, 0)),
        ([(2, 8)], None, "cuda", (2, 1, 1)),
    ],
)
def test_workers_share_the_cpus_and_gpus_of_the_nodes(nodes, workers, device, expected):
    assert dataclasses.astuple(engine.worker_resources(nodes, workers, device)) == expected


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("node7", "--address node7: an address must be auto or HOST:PORT. Try: --address auto"),
        ("127.0.0.1:1", "--address 127.0.0.1:1: cannot connect to a Ray cluster"),
    ],
)
def test_an_address_without_a_cluster_is_an_error_at_once(address, message, adapter, corpus, tmp_path, capsys):
    command = ["encode", str(adapter), str(corpus), "--out", str(tmp_path / "out"), "--engine", "ray"]
    assert main([*command, "--address", address]) == 2
    assert message in capsys.readouterr().err


def test_an_engine_takes_no_task(adapter, model, corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"Try: task=\(0, 1\)"):
        encode_corpus(
            model,
            [corpus],
            tmp_path / "out",
            options=dataclasses.replace(OPTIONS, task=(0, 2)),
            engine=engine.RayCorpusEngine(adapter),
        )


def test_without_ray_the_error_has_the_pip_command(adapter, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "promcse_pl.interop.ray")
    assert main(["encode", str(adapter), str(corpus), "--out", str(tmp_path / "out"), "--engine", "ray"]) == 2
    assert capsys.readouterr().err == "error: this needs Ray. Try: pip install 'promcse_pl[ray]'\n"
    assert not (tmp_path / "out").exists()
