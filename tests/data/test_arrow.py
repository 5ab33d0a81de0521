"""Folders that the datasets library saved, and parquet files of odd schemas."""

import json
import os
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.encoders import save_small_encoder

from promcse_pl.config import DataConfig
from promcse_pl.data.arrow import content_sha256, train_split
from promcse_pl.data.readers import read_rows, read_scored_pairs
from promcse_pl.data.sources import check_training_file, dev_set, load_sources
from promcse_pl.evaluation.tasks import load_tasks
from promcse_pl.utils.errors import DataError

ROWS = [(f"answer {row}", f"query {row}", row) for row in range(2500)]


def save(folder: Path, columns: dict, shards: int = 1) -> Path:
    """Write what `Dataset.save_to_disk` does."""
    folder.mkdir(parents=True)
    table = pa.table(columns)
    names = [f"data-{shard:05}-of-{shards:05}.arrow" for shard in range(shards)]
    size = -(-len(table) // shards)
    for shard, name in enumerate(names):
        part = table.slice(shard * size, size)
        with pa.ipc.new_stream(folder / name, part.schema) as stream:
            stream.write_table(part, max_chunksize=1000)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def save_pairs(folder: Path, shards: int = 1) -> Path:
    answers, queries, ids = zip(*ROWS, strict=True)
    return save(folder, {"answer": answers, "query": queries, "id": ids}, shards)


def save_dict(folder: Path, *splits: str) -> Path:
    for split in splits:
        save_pairs(folder / split)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


def test_a_saved_dataset_is_read_like_other_files(tmp_path):
    notes: list[str] = []
    folder = save_pairs(tmp_path / "saved", shards=2)
    assert list(read_rows(folder, width=2, notes=notes)) == [(query, answer) for answer, query, _ in ROWS]
    assert notes == [f"{folder}: anchor=query, positive=answer; not read: id"]
    assert next(read_rows(folder, width=2, columns=["answer", 1])) == ("answer 0", "query 0")
    with pytest.raises(DataError, match=r"no column 'x' \(columns: answer, query, id\)"):
        list(read_rows(folder, width=1, columns=["x"]))
    with pytest.raises(DataError, match="column id must hold strings, got int64"):
        list(read_rows(folder, width=1, columns=["id"]))


def test_what_the_datasets_library_writes_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    answers, queries, ids = zip(*ROWS, strict=True)
    dataset = datasets.Dataset.from_dict({"answer": answers, "query": queries, "id": ids})
    dataset.save_to_disk(tmp_path / "one", num_shards=3)
    assert list(read_rows(tmp_path / "one", width=2)) == [(query, answer) for answer, query, _ in ROWS]
    datasets.DatasetDict({"train": dataset.shuffle(seed=1), "validation": dataset.select([3, 1])}).save_to_disk(
        tmp_path / "both"
    )
    assert list(read_rows(tmp_path / "both/validation", width=2)) == [
        ("query 3", "answer 3"),
        ("query 1", "answer 1"),
    ]
    shuffled = list(read_rows(train_split(tmp_path / "both"), width=2))
    assert sorted(shuffled) == sorted((query, answer) for answer, query, _ in ROWS)
    assert shuffled[0] != ("query 0", "answer 0")


def test_training_uses_the_train_split_of_a_dict_and_other_readers_require_a_split(tmp_path):
    folder = save_dict(tmp_path / "both", "train", "validation")
    config = DataConfig(kind="pairs", train=str(folder))
    check_training_file(config, 0)
    source, _ = load_sources(config, 0)
    assert source.name == str(folder / "train")
    assert source.example == ("query 0", "answer 0")
    with pytest.raises(DataError) as caught:
        list(read_rows(folder, width=2))
    assert str(caught.value) == (
        f"{folder} is a DatasetDict with the splits train, validation, one split is needed. Try: {folder}/train"
    )
    check_training_file(DataConfig(kind="pairs", train=f"{folder}/validation"), 0)
    other = save_dict(tmp_path / "other", "validation", "test")
    with pytest.raises(
        DataError, match=f"with the splits validation, test, one split is needed. Try: {other}/validation"
    ):
        check_training_file(DataConfig(kind="pairs", train=str(other)), 0)


def test_a_saved_dataset_of_scored_pairs_is_a_dev_set_and_a_task(tmp_path):
    columns = {"label": [0.5, 1.0], "sentence2": ["b", "d"], "sentence1": ["a", "c"], "idx": [0, 1]}
    folder = save(tmp_path / "dev", columns)
    assert read_scored_pairs(folder) == [("a", "b", 0.5), ("c", "d", 1.0)]
    dev = dev_set(DataConfig(kind="pairs", train="demo", dev=str(folder)))
    assert (dev.name, len(dev)) == ("dev", 2)
    (task,) = load_tasks([str(folder)], None)
    assert (task.name, task.rows, task.files[0]["sha256"]) == ("dev", 2, dev.sha256)


def test_the_hash_of_a_saved_dataset_covers_its_rows(tmp_path):
    one, two, three = (
        save(tmp_path / name, {"text": [text, "x"]}, shards)
        for name, text, shards in (("1", "a", 1), ("2", "b", 1), ("3", "a", 2))
    )
    assert len({content_sha256(folder) for folder in (one, two, three)}) == 3
    assert content_sha256(one) == content_sha256(one)


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "", ".", "..", "a\\b", "a\0b", 5, None])
def test_file_names_in_metadata_are_never_paths(tmp_path, name):
    folder = save_pairs(tmp_path / "saved")
    save_pairs(tmp_path / "other").joinpath("data-00000-of-00001.arrow").rename(tmp_path / "secret.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match=r"state\.json refers to .*; only names of files in its folder"):
        list(read_rows(folder, width=2))
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict/dataset_dict.json").write_text(json.dumps({"splits": ["train", name]}))
    with pytest.raises(DataError, match=r"dataset_dict\.json refers to "):
        train_split(tmp_path / "dict")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "5", "{}", '{"_data_files": []}', '{"_data_files": 5}', "[" * 200_000]
)
@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_damaged_metadata_is_one_error(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=name):
        list(read_rows(tmp_path, width=2))


def test_a_selection_of_rows_is_refused_and_not_read_as_all_rows(tmp_path):
    folder = save_pairs(tmp_path / "saved")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(DataError, match=r"was saved with an indices mapping .* Try: dataset\.flatten_indices\(\)"):
        list(read_rows(folder, width=2))


def test_shards_of_different_columns_are_refused(tmp_path):
    folder = save_pairs(tmp_path / "saved", shards=2)
    save(tmp_path / "other", {"query": ["x"], "answer": ["y"], "id": [1]}).joinpath(
        "data-00000-of-00001.arrow"
    ).replace(folder / "data-00001-of-00002.arrow")
    with pytest.raises(DataError, match=r"00001-of-00002\.arrow and .*00000-of-00002\.arrow have different columns"):
        list(read_rows(folder, width=2))


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "text", "fifo"])
def test_a_damaged_arrow_file_is_one_error(tmp_path, damage):
    folder = save_pairs(tmp_path / "saved")
    path = folder / "data-00000-of-00001.arrow"
    content = path.read_bytes()
    path.unlink()
    if damage == "fifo":
        os.mkfifo(path)
    elif damage != "missing":
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"no stream" * 99}[damage])
    with pytest.raises(DataError, match=r"00000-of-00001\.arrow (is|does|cannot)"):
        list(read_rows(folder, width=2))


def test_a_large_saved_dataset_streams(tmp_path):
    columns = {"text": [f"sentence {row} " + "x" * 400 for row in range(200_000)]}
    folder = save(tmp_path / "large", columns)
    del columns
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in read_rows(folder, width=1)) == 200_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000, "KiB more at the peak"


def test_a_folder_that_is_no_dataset_says_what_is_needed(tmp_path):
    with pytest.raises(DataError, match="is a folder, but not one written by save_to_disk of the datasets"):
        list(read_rows(tmp_path, width=1))


def test_parquet_columns_of_one_name_are_read_by_the_positions_that_the_message_advises(tmp_path):
    path = tmp_path / "my.parquet"
    pq.write_table(
        pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"]), pa.array(["z"])], names=["a", "a", "text"]), path
    )
    assert list(read_rows(path, width=1, columns=["text"])) == [("z",)]
    assert list(read_rows(path, width=2, columns=[1, 0])) == [("y", "x")]
    assert list(read_rows(path, width=2, columns=["text", 1])) == [("z", "y")]
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["query", "query"]), path)
    with pytest.raises(DataError, match=r"2 columns match the anchor: query, query .*data.columns=\[0,1\]"):
        list(read_rows(path, width=2))
    assert list(read_rows(path, width=2, columns=[0, 1])) == [("x", "y")]


def test_promcse_encode_reads_a_saved_dataset(tmp_path, capsys):
    from promcse_pl.adapter import save_adapter
    from promcse_pl.cli.main import main
    from promcse_pl.models.backbone import FrozenBackbone
    from promcse_pl.models.encoder import PromptEncoder

    backbone = FrozenBackbone.load(str(save_small_encoder(tmp_path / "encoder")))
    save_adapter(PromptEncoder(backbone, length=3, pooling="avg"), tmp_path / "adapter")
    folder = save(tmp_path / "saved", {"id": [1, 2], "sentence": ["w5", "w6"]})
    capsys.readouterr()
    assert main(["encode", str(tmp_path / "adapter"), str(folder), "--out", "-"]) == 0
    out, err = capsys.readouterr()
    assert (out.count("\n"), err) == (2, f"{folder}: sentence=sentence; not read: id\n")
    assert main(["similarity", str(tmp_path / "adapter"), str(folder), str(folder)]) == 0
    assert capsys.readouterr()[0] == "1.0000\n1.0000\n"
    twice = save(tmp_path / "twice", {"x": ["w5"], "y": ["w6"]})
    assert main(["encode", str(tmp_path / "adapter"), str(twice), "--out", "-"]) == 2
    assert "Rename the column to read to sentence" in capsys.readouterr()[1]
