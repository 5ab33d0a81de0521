"""The Ray Data actor and `promcse encode --engine ray`. All tests share one local cluster with two CPUs."""

import contextlib
import dataclasses
import importlib
import json
import os
import socket
import sys
import threading
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
        patch.setenv("RAY_worker_niceness", "0")  # by default, workers wait until other tests leave a core free
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
            if " ".join(child.cmdline()).startswith("ray::CorpusWorker.encode"):
                found.append(child)
    return found


@pytest.mark.slow
def test_the_actor_of_ray_data_equals_encode_keeps_all_other_columns_and_uses_its_cpus(cluster, adapter, model):
    class Actor(engine.RayEncoder):
        def __call__(self, batch: pa.Table) -> pa.Table:
            threads = f"{torch.get_num_threads()} {os.environ['RAYON_NUM_THREADS']}"
            return super().__call__(batch).append_column("threads", pa.array([threads] * len(batch)))

    ids = [None, *(2**60 + i for i in range(1, len(TEXTS)))]
    table = pa.table({"id": ids, "body": TEXTS, "tags": [[text] for text in TEXTS]})
    data = importlib.import_module("ray.data")
    data.DataContext.get_current().enable_progress_bars = False
    encoded = (
        data.from_arrow([table.slice(0, 30), table.slice(30)])
        .map_batches(
            Actor,
            fn_constructor_kwargs={"adapter": adapter, "text_column": "body", "prompt": "w7 "},
            compute=data.ActorPoolStrategy(size=1),
            batch_size=16,
            batch_format="pyarrow",
            num_cpus=2,
        )
        .to_arrow_refs()
    )
    encoded = pa.concat_tables(ray.get(encoded)).sort_by("id")
    assert encoded.select(table.column_names) == table.sort_by("id")
    assert encoded.column("threads").unique().to_pylist() == ["2 2"]
    assert encoded.schema.field("embedding").type == pa.list_(pa.float32(), 16)
    embeddings_ND = np.stack(encoded.column("embedding").to_numpy())
    texts = encoded.column("body").to_pylist()
    np.testing.assert_allclose(embeddings_ND, model.encode(texts, prompt="w7 "), atol=1e-6)


def test_the_actor_of_ray_data_takes_numpy_and_names_wrong_columns(adapter, model, monkeypatch):
    monkeypatch.setattr(engine, "_load_in_actor", lambda *_: model)
    encoder, table = engine.RayEncoder(adapter), pa.table({"id": [1, 2], "text": TEXTS[:2]})
    encoded = encoder({"id": np.array([1, 2]), "text": np.array(TEXTS[:2], dtype=object)})
    assert list(encoded) == ["id", "text", "embedding"]
    np.testing.assert_array_equal(encoded["embedding"], model.encode(TEXTS[:2]))
    for batch, error, message in (
        (encoder(table), DataError, 'Try: dataset.rename_columns({"embedding": "old_embedding"})'),
        (table.rename_columns(["id", "texts"]), ConfigError, "(columns: id, texts). Try: text_column='texts'"),
        (table.to_pandas(), ConfigError, "Try: batch_format='numpy'"),
    ):
        with pytest.raises(error) as raised:
            encoder(batch)
        assert message in str(raised.value)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_command_writes_the_files_of_one_process(cluster, adapter, model, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(corpus)
    encode_corpus(model, ["a.jsonl"], tmp_path / "one", options=dataclasses.replace(OPTIONS, prompt=""))
    command = ["encode", str(adapter), "a.jsonl", "--rows-per-shard", "5", "--engine", "ray"]
    capsys.readouterr()
    assert main([*command, "--out", "../two", "--workers", "2"]) == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    printed = capsys.readouterr()
    assert printed.out == "../two: 60 x 16 float32, unit length, in 12 shards\n"
    assert sorted(line.split(": ")[0] for line in printed.err.splitlines()) == [f"a.jsonl-{i:05d}" for i in range(12)]
    assert ": 60 texts so far, " in printed.err
    assert "0 h 00 min left" in printed.err


@pytest.mark.slow
def test_the_command_writes_the_missing_files_of_one_process_even_if_a_worker_is_killed(
    cluster, adapter, model, corpus, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(corpus)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        encode_corpus(model, ["a.jsonl", "b.jsonl", "c.jsonl"], folder, options=dataclasses.replace(OPTIONS, prompt=""))
    for path in [path for path in two.glob("*.parquet") if not path.name.startswith("a.jsonl-0000")]:
        path.unlink()
    assert len(finished_shards(two)) == 10
    killed, ended = [], threading.Event()

    def kill_one_that_has_written_a_shard() -> None:
        while not killed and not ended.wait(0.02):
            if len(finished_shards(two)) > 10:
                for worker in busy_workers()[:1]:
                    with contextlib.suppress(psutil.Error):  # it has just ended
                        worker.kill()
                        killed.append(worker.pid)

    threading.Thread(target=kill_one_that_has_written_a_shard, daemon=True).start()
    capsys.readouterr()
    command = ["encode", str(adapter), "a.jsonl", "b.jsonl", "c.jsonl", "--rows-per-shard", "5", "--engine", "ray"]
    try:
        assert main([*command, "--out", "../two", "--workers", "2"]) == 0
    finally:
        ended.set()
    assert killed
    assert contents(two) == contents(one)
    assert "in 26 shards; 10 finished before\n" in capsys.readouterr().out  # Ray also prints that a worker died


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_replaced_adapter_is_loaded_again(cluster, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(corpus)
    adapter = save_small_adapter(tmp_path)
    model = PromCSE.load(adapter, device="cpu")
    command = ["encode", str(adapter), "a.jsonl", "--rows-per-shard", "5", "--engine", "ray", "--workers", "1"]
    assert main([*command, "--out", "../two"]) == 0
    capsys.readouterr()
    with torch.no_grad():
        next(iter(model.encoder.prompt.parameters())).add_(0.1)
    model.save_pretrained(adapter)
    with (corpus / "a.jsonl").open("a") as stream:
        stream.write('{"id": "a60", "text": ""}\n')
    with pytest.raises(DataError) as error:
        encode_corpus(model, [corpus / "a.jsonl"], tmp_path / "three", options=OPTIONS)
    assert main([*command, "--out", "../four"]) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if "error" in line] == [f"error: {error.value}"]
    names = [f"a.jsonl-{i:05d}.parquet" for i in range(12)]
    assert all((tmp_path / "four" / name).read_bytes() == (tmp_path / "three" / name).read_bytes() for name in names)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_interrupted_command_is_resumed(cluster, adapter, model, corpus, tmp_path):
    encode_corpus(model, [corpus], tmp_path / "one", options=OPTIONS)
    two, on_one = tmp_path / "two", engine.RayCorpusEngine(adapter, workers=1)

    def interrupt(progress: CorpusProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_corpus(model, [corpus], two, options=OPTIONS, report=interrupt, engine=on_one)
    assert not list(two.glob(".promcse_pl-*"))
    assert len(finished_shards(two)) < 36
    encode_corpus(model, [corpus], two, options=OPTIONS, engine=on_one)
    assert contents(two) == contents(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_worker_that_dies_too_often_is_one_line(cluster, adapter, model, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "RETRIES", 0)

    def kill(progress: CorpusProgress) -> None:
        for worker in busy_workers():
            worker.kill()

    (corpus / "a.jsonl").write_text('{"text": "w1"}\n' * 3000)
    options, on_ray = dataclasses.replace(OPTIONS, rows_per_shard=1), engine.RayCorpusEngine(adapter, workers=1)
    with pytest.raises(PromcseError, match="Try: the same command again") as error:
        encode_corpus(model, [corpus / "a.jsonl"], tmp_path / "out", options=options, report=kill, engine=on_ray)
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


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "RAY_ADDRESS"])
def test_auto_is_an_error_at_once_if_the_known_cluster_has_ended(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # the cluster of the other tests
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("127.0.0.1:1" if recorded else "127.0.0.1:2")
    if not recorded:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    origin, fix = (
        (f"{tmp_path}/ray/ray_current_cluster", "ray stop") if recorded else ("RAY_ADDRESS", "unset RAY_ADDRESS")
    )
    with pytest.raises(ConfigError) as error, ray_cluster("auto", "--address "):
        pass
    start = (
        f"--address auto: no Ray cluster answers at 127.0.0.1:1 (from {origin}). Try: {fix}, then ray start --head, "
    )
    assert str(error.value).startswith(start)


def test_a_port_of_another_program_is_an_error_within_seconds(monkeypatch):
    monkeypatch.setattr("promcse_pl.utils.ray_cluster._ANSWER_SECONDS", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        message = f"--address {address}: cannot connect .*no answer within 4 s; the default port of a cluster is 6379"
        with pytest.raises(ConfigError, match=message), ray_cluster(address, "--address "):
            pass


def test_a_mistyped_adapter_is_an_error_before_the_cluster_starts(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("promcse_pl.utils.ray_cluster.ray_cluster", None)
    command = ["encode", str(tmp_path / "run"), str(corpus), "--out", str(tmp_path / "out"), "--engine", "ray"]
    assert main(command) == 2
    assert "is not an adapter: there is no such folder" in capsys.readouterr().err


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
