import dataclasses
import json
import os
import shlex
import subprocess
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import processes

from promcse_pl.corpus import encode, folder
from promcse_pl.corpus.encode import CorpusOptions, encode_corpus
from promcse_pl.corpus.folder import complete_shards, finished_shards
from promcse_pl.corpus.rows import BLOCK_ROWS
from promcse_pl.embedder import BLOCK_SENTENCES, PromCSE
from promcse_pl.utils.errors import AdapterError, ConfigError, DataError

TEXTS = [f"w{i % 90} w{i * 7 % 90}" + " w5" * (i % 4) for i in range(23)]
OPTIONS = CorpusOptions(rows_per_shard=5)


@pytest.fixture
def corpus(tmp_path, small_blocks) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    table = pa.table({"id": [f"k{i}" for i in range(23)], "nested": [{"x": [i]} for i in range(23)], "text": TEXTS})
    pq.write_table(table, folder / "b.parquet", row_group_size=7)
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:5]))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(folder: Path, name: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob(f"{name}-*.parquet"))])


def test_blocks_of_rows_are_whole_blocks_of_sentences():
    assert BLOCK_ROWS % BLOCK_SENTENCES == 0


def test_shards_hold_all_columns_and_the_embeddings_of_encode(model, corpus, tmp_path):
    result = encode_corpus(model, [corpus], tmp_path / "out", options=OPTIONS)
    assert dataclasses.astuple(result) == (5 + 5 + 1, 51, 0, 0)
    table = read(tmp_path / "out", "b.parquet")
    assert table.schema.names == ["id", "nested", "text", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 16)
    assert table.drop_columns("embedding") == pq.read_table(corpus / "b.parquet")
    for name in ("a.txt", "b.parquet", "c.jsonl"):
        table = read(tmp_path / "out", name)
        embeddings = np.stack(table.column("embedding").to_numpy())
        np.testing.assert_allclose(embeddings, model.encode(table.column("text").to_pylist()), atol=1e-6)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["settings"]["adapter"] == model.adapter_hash()
    assert (manifest["inputs"], manifest["rows"], len(manifest["shards"])) == (
        ["a.txt", "b.parquet", "c.jsonl"],
        51,
        11,
    )
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_npy_shards_hold_the_same_embeddings_and_parquet_the_other_columns(dtype, model, corpus, tmp_path):
    for shard_format in ("parquet", "npy"):
        options = dataclasses.replace(OPTIONS, shard_format=shard_format, output_dtype=dtype)
        encode_corpus(model, [corpus / "b.parquet"], tmp_path / shard_format, options=options)
    table = read(tmp_path / "parquet", "b.parquet")
    parts = [np.load(path) for path in sorted((tmp_path / "npy").glob("*.npy"))]
    assert [part.shape for part in parts] == [(5, 16)] * 4 + [(3, 16)]
    assert parts[0].dtype == dtype
    np.testing.assert_array_equal(np.concatenate(parts), np.stack(table.column("embedding").to_numpy()))
    assert read(tmp_path / "npy", "b.parquet") == table.drop_columns("embedding")
    np.testing.assert_allclose(np.concatenate(parts), model.encode(TEXTS), atol=1e-3 if dtype == "float16" else 1e-6)


def test_a_second_call_skips_finished_shards_and_writes_missing_and_truncated_ones(model, corpus, tmp_path):
    out = tmp_path / "out"
    encode_corpus(model, [corpus], out, options=OPTIONS)
    before = contents(out)
    assert dataclasses.astuple(encode_corpus(model, [corpus], out, options=OPTIONS)) == (0, 0, 0, 11)
    (out / "a.txt-00001.parquet").unlink()
    (out / "b.parquet-00003.json").unlink()
    (out / "c.jsonl-00000.parquet").write_bytes(b"PAR1")
    assert dataclasses.astuple(encode_corpus(model, [corpus], out, options=OPTIONS)) == (3, 15, 0, 8)
    assert contents(out) == before


@pytest.mark.parametrize("after", range(4))
def test_an_interrupted_call_continues_bit_for_bit(after, model, corpus, tmp_path, monkeypatch):
    encode_corpus(model, [corpus], tmp_path / "whole", options=OPTIONS)
    calls = 0
    real = PromCSE.encode

    def interrupted(self, *arguments, **options):
        nonlocal calls
        calls += 1
        if calls == 3 * after + 2:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    monkeypatch.setattr(PromCSE, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(model, [corpus], tmp_path / "out", options=OPTIONS)
    monkeypatch.undo()
    monkeypatch.setattr("promcse_pl.corpus.rows.BLOCK_ROWS", 4)
    encode_corpus(model, [corpus], tmp_path / "out", options=OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


KILL = """
import os, signal
from promcse_pl.corpus import rows
from promcse_pl.embedder import PromCSE
rows.BLOCK_ROWS = 4
real, calls = PromCSE.encode, []
def encode(self, *arguments, **options):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.{signal})
    return real(self, *arguments, **options)
PromCSE.encode = encode
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code"), [("SIGKILL", -9), ("SIGTERM", 143), pytest.param("SIGINT", 130, marks=pytest.mark.exhaustive)]
)
def test_a_killed_command_continues_bit_for_bit(name, code, model, adapter, corpus, tmp_path):
    encode_corpus(model, [corpus], tmp_path / "whole", options=OPTIONS)
    command = ("encode", adapter, corpus, "--out", tmp_path / "out", "--rows-per-shard", 5, "--device", "cpu")
    killed = processes.promcse(tmp_path / "log", *command, before=KILL.replace("{signal}", name))
    assert killed.code == code
    left = list((tmp_path / "out").glob(".promcse_pl-*"))
    assert bool(left) == (name == "SIGKILL")
    finished = {path.name for path in (tmp_path / "out").glob("*-0*.json")}
    assert 0 < len(finished) < 11
    for path in left:  # the files of a killed process are removed after a day
        os.utime(path, (0, 0))
    encode_corpus(model, [corpus], tmp_path / "out", options=OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_concurrent_tasks_write_disjoint_shards_that_equal_those_of_one(tasks, model, corpus, tmp_path):
    encode_corpus(model, [corpus], tmp_path / "whole", options=OPTIONS)
    results = {}

    def task(number: int) -> None:
        options = dataclasses.replace(OPTIONS, task=(number, tasks))
        results[number] = encode_corpus(model, [corpus], tmp_path / "out", options=options)

    threads = [threading.Thread(target=task, args=(number,)) for number in range(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(result.shards for result in results.values()) == 11
    assert min(result.shards for result in results.values()) > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_bad_row_loses_no_finished_shard(model, tmp_path, small_blocks):
    for name, write in (
        ("a.txt", lambda path, texts: path.write_text("".join(f"{text}\n" for text in texts))),
        ("b.parquet", lambda path, texts: pq.write_table(pa.table({"text": texts}), path)),
    ):
        path, out = tmp_path / name, tmp_path / f"out of {name}"
        write(path, [*TEXTS[:10], "", *TEXTS[:3]])
        with pytest.raises(DataError, match=f"{name}:11: "):
            encode_corpus(model, [path], out, options=OPTIONS)
        assert [shard.is_last for shard in finished_shards(out)] == [False, False]
        assert read(out, name).column("text").to_pylist() == TEXTS[:10]
    path, out = tmp_path / "c.txt", tmp_path / "out of c"
    path.write_text("".join(f"{text}\n" for text in [*TEXTS[:4], "", "w1"]))  # in the second block of a shard
    with pytest.raises(DataError, match=r"c\.txt:5: "):
        encode_corpus(model, [path], out, options=OPTIONS)
    assert finished_shards(out) == []


def test_an_input_that_failed_and_was_removed_is_dropped_from_the_manifest(model, corpus, tmp_path):
    out = tmp_path / "out"
    (corpus / "d.txt").write_text("\n")
    with pytest.raises(DataError, match=r"d\.txt"):
        encode_corpus(model, [corpus], out, options=OPTIONS)
    with pytest.raises(
        DataError, match=r"d\.txt has 0 finished shards.* To leave it out: promcse encode with the other"
    ):
        complete_shards(out)
    (corpus / "d.txt").unlink()
    encode_corpus(model, [corpus], out, options=OPTIONS)
    assert len(complete_shards(out)) == 11


def test_an_input_with_some_shards_is_left_out_by_the_command_of_the_error(model, corpus, tmp_path):
    out = tmp_path / "the out"
    (corpus / "d.txt").write_text("w1\n" * 5 + "\nw1\n")
    with pytest.raises(DataError, match=r"d\.txt:6"):
        encode_corpus(model, [corpus], out, options=OPTIONS)
    (corpus / "d.txt").unlink()
    encode_corpus(model, [corpus], out, options=OPTIONS)
    with pytest.raises(DataError, match=r"d\.txt has 1 finished shards") as error:
        complete_shards(out)
    subprocess.run(str(error.value).split("leave it out: ")[1].split(";")[0], shell=True, check=True)
    encode_corpus(model, [corpus], out, options=OPTIONS)
    assert len(complete_shards(out)) == 11


def test_a_folder_that_a_concurrent_task_has_just_created_is_accepted(model, corpus, tmp_path, monkeypatch):
    out, real = tmp_path / "out", folder.refuse_taken
    encode_corpus(model, [corpus / "c.jsonl"], tmp_path / "other", options=OPTIONS)

    def refuse_after_a_write(path: Path) -> None:
        (tmp_path / "other").rename(out)
        real(path)

    monkeypatch.setattr(folder, "refuse_taken", refuse_after_a_write)
    assert encode_corpus(model, [corpus], out, options=OPTIONS).skipped == 1


def test_shards_of_a_concurrent_command_with_other_settings_are_an_error_whose_command_works(model, corpus, tmp_path):
    out = tmp_path / "the out"
    encode_corpus(model, [corpus], tmp_path / "other", options=dataclasses.replace(OPTIONS, prompt="w9 ", task=(2, 3)))

    def add_other_shards(progress: encode.CorpusProgress) -> None:
        for path in (tmp_path / "other").glob("*-0*"):
            path.rename(out / path.name)

    message = "1 shards were written with other settings than those in manifest.json"
    with pytest.raises(DataError, match=message):
        encode_corpus(model, [corpus], out, options=dataclasses.replace(OPTIONS, task=(0, 3)), report=add_other_shards)
    for call in (complete_shards, lambda out: encode_corpus(model, [corpus], out, options=OPTIONS)):
        with pytest.raises(DataError, match=message) as error:
            call(out)
    subprocess.run(str(error.value).split("Try: ")[1].split(" and the")[0], shell=True, check=True)
    encode_corpus(model, [corpus], out, options=OPTIONS)
    assert len(complete_shards(out)) == 11


def test_an_input_that_changed_is_an_error_whose_command_works(model, corpus, tmp_path):
    out = tmp_path / "the out"
    encode_corpus(model, [corpus], out, options=OPTIONS)
    (corpus / "c.jsonl").write_text('{"text": "w7"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl has changed since its shards") as error:
        encode_corpus(model, [corpus], out, options=OPTIONS)
    command = str(error.value).split("again: ")[1].split(", then")[0]
    assert shlex.split(command)[0] == "rm"
    subprocess.run(command, shell=True, check=True)
    assert encode_corpus(model, [corpus], out, options=OPTIONS).rows == 1
    assert read(out, "c.jsonl").column("text").to_pylist() == ["w7"]
    assert len(complete_shards(out)) == 11


def test_the_command_for_a_changed_input_keeps_the_shards_of_inputs_whose_names_start_with_its_name(
    model, corpus, tmp_path
):
    out, other = tmp_path / "out", corpus / "c.jsonl-more.txt"
    other.write_text("w1\n")
    encode_corpus(model, [corpus], out, options=OPTIONS)
    (corpus / "c.jsonl").write_text('{"text": "w7"}\n')
    with pytest.raises(DataError, match="has changed") as error:
        encode_corpus(model, [corpus], out, options=OPTIONS)
    subprocess.run(str(error.value).split("again: ")[1].split(", then")[0], shell=True, check=True)
    assert {shard.input for shard in finished_shards(out)} == {"a.txt", "b.parquet", other.name}


def test_many_shards_with_other_settings_are_not_listed(model, corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    encode_corpus(model, [corpus], out, options=OPTIONS)
    manifest = out / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"width": 16', '"width": 17'))
    monkeypatch.setattr(folder, "_NAMED_SHARDS", 10)
    with pytest.raises(DataError, match=r"11 shards were written .* at the same time\. Try: another --out$"):
        complete_shards(out)


def test_the_shards_of_an_incomplete_input_are_named_by_one_pattern(model, corpus, tmp_path):
    out = tmp_path / "the out"
    encode_corpus(model, [corpus], out, options=OPTIONS)
    (out / "a.txt-00002.json").unlink()
    with pytest.raises(DataError, match=r"a\.txt has 4 finished shards") as error:
        complete_shards(out)
    command = str(error.value).split("leave it out: ")[1].split(";")[0]
    assert command == f"rm '{out}/a.txt'-{'[0-9]' * 5}.*"


def test_descriptions_under_another_name_are_no_shards(model, corpus, tmp_path):
    encode_corpus(model, [corpus], tmp_path / "out", options=OPTIONS)
    before = finished_shards(tmp_path / "out")
    description = (tmp_path / "out/a.txt-00000.json").read_text()
    for name in (".promcse_pl-1234567890123456.json", "a.txt-00000 (copy).json"):
        (tmp_path / "out" / name).write_text(description)
    assert finished_shards(tmp_path / "out") == before


def test_a_hidden_file_that_is_given_by_name_is_encoded_completely(model, tmp_path):
    (tmp_path / ".a.txt").write_text("w1\n")
    encode_corpus(model, [tmp_path / ".a.txt"], tmp_path / "out", options=OPTIONS)
    assert len(complete_shards(tmp_path / "out")) == 1


def test_another_name_of_the_encoder_keeps_the_finished_shards(model, corpus, tmp_path, monkeypatch):
    encode_corpus(model, [corpus / "a.txt"], tmp_path / "out", options=OPTIONS)
    real = encode.corpus_settings
    monkeypatch.setattr(
        encode, "corpus_settings", lambda *given: dataclasses.replace(real(*given), encoder="/moved/encoder")
    )
    assert encode_corpus(model, [corpus], tmp_path / "out", options=OPTIONS).skipped == 5
    assert len(complete_shards(tmp_path / "out")) == 11


def test_a_file_that_changes_while_it_is_read_is_an_error(model, corpus, tmp_path):
    def change(progress: encode.CorpusProgress) -> None:
        with (corpus / "c.jsonl").open("a") as stream:
            stream.write("\n")

    with pytest.raises(DataError, match=r"c\.jsonl was changed while it was read"):
        encode_corpus(model, [corpus / "c.jsonl"], tmp_path / "out", options=OPTIONS, report=change)
    assert not list((tmp_path / "out").glob("*-0*.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows_per_shard": 6}, "rows_per_shard=5, now it is 6. Try: --rows-per-shard 5, or another --out"),
        ({"output_dtype": "float16"}, "Try: --output-dtype float32"),
        ({"shard_format": "npy"}, "Try: --format parquet"),
        ({"prompt": "query: "}, "Try: --prompt ''"),
        ({"text_column": "text"}, "Try: leave --text out"),
        ({"on_bad_row": "skip"}, "Try: --on-bad-row stop"),
    ],
)
def test_other_options_are_an_error_with_the_option_to_type(changes, message, model, corpus, tmp_path):
    encode_corpus(model, [corpus / "c.jsonl"], tmp_path / "out", options=OPTIONS)
    with pytest.raises(ConfigError) as error:
        encode_corpus(model, [corpus], tmp_path / "out", options=dataclasses.replace(OPTIONS, **changes))
    assert message in str(error.value)


def test_another_adapter_is_an_error(model, corpus, tmp_path):
    encode_corpus(model, [corpus / "c.jsonl"], tmp_path / "out", options=OPTIONS)
    manifest = tmp_path / "out/manifest.json"
    manifest.write_text(manifest.read_text().replace(model.adapter_hash(), "0" * 64))
    with pytest.raises(AdapterError, match="were computed with another adapter"):
        encode_corpus(model, [corpus], tmp_path / "out", options=OPTIONS)


def test_a_foreign_folder_is_left_alone(model, corpus, tmp_path):
    for name in ("notes.txt", "manifest.json"):
        (tmp_path / name / "out").mkdir(parents=True)
        (tmp_path / name / "out" / name).write_text("{}")
        with pytest.raises(DataError, match="already exists and is not overwritten"):
            encode_corpus(model, [corpus], tmp_path / name / "out", options=OPTIONS)
        assert contents(tmp_path / name / "out") == {name: b"{}"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows_per_shard": 0}, "rows_per_shard must be an integer >= 1, got 0"),
        ({"output_dtype": "float64"}, "output_dtype must be one of float32, float16"),
        ({"task": (2, 2)}, "the task must be i/n with 0 <= i < n, got 2/2. Try: 0/2"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        CorpusOptions(**options)


def test_progress_reports_every_shard_and_ends_at_one(model, corpus, tmp_path):
    reports: list[encode.CorpusProgress] = []
    encode_corpus(model, [corpus], tmp_path / "out", options=OPTIONS, report=reports.append)
    assert len([report for report in reports if report.shard]) == 11
    assert (reports[-1].rows, reports[-1].done) == (51, pytest.approx(1))
    assert reports[-1].seconds_left == pytest.approx(0, abs=1e-6)
    assert [report.done for report in reports] == sorted(report.done for report in reports)
