import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from promcse_pl.corpus import rows
from promcse_pl.corpus.rows import RowSettings, read_blocks
from promcse_pl.utils.errors import DataError

TEXTS = [f"w{i} w{i + 1}" for i in range(23)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_ROWS", 4)


def write(path: Path, row_group_size: int = 5) -> Path:
    plain = Path(path.name.removesuffix(".gz")).suffix
    if plain == ".parquet":
        table = pa.table({"id": range(23), "nested": [{"x": [i]} for i in range(23)], "text": TEXTS})
        pq.write_table(table, path, row_group_size=row_group_size)
        return path
    if plain == ".jsonl":
        lines = [json.dumps({"id": i, "text": text, "nested": {"x": [i]}}) for i, text in enumerate(TEXTS)]
    elif plain == ".txt":
        lines = TEXTS
    else:
        mark = "," if plain == ".csv" else "\t"
        lines = [f"id{mark}text", *(f"{i}{mark}{text}" for i, text in enumerate(TEXTS))]
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(
    path: Path, rows_per_shard: int = 10, wanted: object = lambda shard: True, **settings: str
) -> list[rows.Block]:
    chosen = RowSettings(**{"text_column": None, "on_bad_row": "stop", "rows_per_shard": rows_per_shard, **settings})
    return list(read_blocks(path, chosen, wanted))


@pytest.mark.parametrize("name", ["c.txt", "c.csv", "c.tsv", "c.jsonl", "c.parquet", "c.jsonl.gz", "c.csv.gz"])
def test_blocks_hold_all_rows_in_order_and_never_cross_shards(name, tmp_path):
    blocks = read(write(tmp_path / name))
    assert [text for block in blocks for text in block.texts] == TEXTS
    assert [(block.shard, len(block.texts)) for block in blocks] == [
        *((shard, size) for shard in (0, 1) for size in (4, 4, 2)),
        (2, 3),
    ]
    assert blocks[-1].done == 1


@pytest.mark.parametrize("name", ["c.txt", "c.jsonl", "c.parquet"])
@pytest.mark.parametrize("row_group_size", [3, 5, 23])
def test_skipping_shards_changes_neither_the_other_blocks_nor_the_types(name, row_group_size, tmp_path):
    path = write(tmp_path / name, row_group_size)
    whole = read(path, 6)
    for keep in ({0}, {1}, {3}, {0, 2}, set()):
        some = read(path, 6, lambda shard, keep=keep: shard in keep)
        wanted = [block.table for block in whole if block.shard in keep]
        assert [block.table for block in some if block.table is not None] == wanted
        assert max(block.shard for block in some) == 3  # so that the caller knows which shard is the last


def test_other_columns_are_kept_with_their_types(tmp_path):
    parquet = read(write(tmp_path / "c.parquet"))[0].table
    assert parquet.schema.names == ["id", "nested", "text"]
    assert parquet.column("nested").to_pylist()[1] == {"x": [1]}
    jsonl = read(write(tmp_path / "c.jsonl"))[0].table
    assert jsonl.slice(1, 1).to_pylist() == [{"text": TEXTS[1], "id": 1, "nested": '{"x": [1]}'}]
    csv = read(write(tmp_path / "c.csv"))[0].table
    assert csv.slice(1, 1).to_pylist() == [{"text": TEXTS[1], "id": "1"}]


def test_a_saved_dataset_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"id": list(range(23)), "text": TEXTS}).save_to_disk(tmp_path / "saved")
    blocks = read(tmp_path / "saved")
    assert [text for block in blocks for text in block.texts] == TEXTS


def test_missing_json_values_are_null_and_new_names_are_an_error(tmp_path):
    path = tmp_path / "c.jsonl"
    objects = [{"text": "w1", "a": 1}, {"text": "w2", "b": None}, {"text": "w3"}, {"text": "w4"}]
    path.write_text("".join(json.dumps(cells) + "\n" for cells in objects))
    (block,) = read(path)
    assert block.table.to_pylist()[1] == {"text": "w2", "a": None, "b": None}
    objects.append({"text": "w5", "c": 1})
    path.write_text("".join(json.dumps(cells) + "\n" for cells in objects))
    message = (
        r"c\.jsonl:{}: column c does not occur in the first {} rows .*Move a row that has it to the start of the file"
    )
    with pytest.raises(DataError, match=message.format(5, 4)):
        read(path)
    with pytest.raises(DataError, match=message.format(5, 2)):
        read(path, rows_per_shard=2)
    path.write_text("".join(json.dumps(cells) + "\n" for cells in (objects[-1], *objects[:-1])))
    assert read(path)[0].table.column("c").to_pylist() == [1, None, None, None]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 1, 1, 1, 9.99], "int64 as in the first rows, got float 9.99. Write all its numbers with a decimal point"),
        ([1, True], "int64 as in the first rows, got bool True. Convert all its values to strings"),
        ([1, 1, 1, 1, True], "int64 as in the first rows, got bool True. Convert all its values to strings"),
        ([1, 2**63], "int64 as in the first rows, got int 9223372036854775808"),
        ([1, 1, 1, 1, "x"], "int64 as in the first rows, got str 'x'"),
        ([0.5, True], "double as in the first rows, got bool True"),
        ([0.5, 0.5, 0.5, 0.5, True], "double as in the first rows, got bool True"),
        ([0.5, 2**53 + 1], "double as in the first rows, got int 9007199254740993"),
        ([True, 1], "bool as in the first rows, got int 1"),
        (["x", 1], "string as in the first rows, got int 1"),
        (["x", "\ud800"], "string as in the first rows, got str"),
        ([None, None, None, None, 1], "string as in the first rows, got int 1"),
    ],
)
def test_a_value_that_does_not_fit_its_column_is_an_error_with_its_line(values, message, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": "w", "a": value}) + "\n" for value in values))
    with pytest.raises(DataError) as error:
        read(path)
    assert f"{path}:{len(values)}: column a must hold {message}" in str(error.value)


def test_whole_numbers_in_a_column_of_floats_and_nulls_are_stored_exactly(tmp_path):
    values = [1, 0.5, None, 2, 3, 2**53, None, 0.25]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": "w", "a": value}) + "\n" for value in values))
    assert [value for block in read(path) for value in block.table.column("a").to_pylist()] == values


@pytest.mark.parametrize("name", ["c.txt", "c.parquet"])
def test_every_block_has_the_shard_of_the_next_row(name, tmp_path):
    blocks = read(write(tmp_path / name), wanted=lambda shard: shard != 1)
    assert [block.next_shard for block in blocks] == [*(block.shard for block in blocks[1:]), None]


@pytest.mark.parametrize(
    ("name", "content", "line", "reason"),
    [
        ("c.txt", "w1\n\nw3\n", 2, "the line is empty"),
        ("c.csv", "text,id\nw1,1\n ,2\nw3,3\n", 3, "column text is empty"),
        ("c.jsonl", '{"text": "w1"}\n{"text": 7}\n{"text": "w3"}\n', 2, "column text must hold a string, got int 7"),
        ("c.parquet", ["w1", None, "w3"], 2, "column text is empty"),
    ],
)
def test_a_bad_row_is_an_error_with_its_line_or_left_out(name, content, line, reason, tmp_path):
    path = tmp_path / name
    if isinstance(content, list):
        pq.write_table(pa.table({"text": content}), path)
    else:
        path.write_text(content)
    with pytest.raises(DataError) as error:
        read(path)
    assert f"{path}:{line}: {reason}" in str(error.value)
    assert "--on-bad-row skip" in str(error.value)
    (block,) = read(path, on_bad_row="skip")
    assert (block.texts, block.bad_rows) == (["w1", "w3"], 1)


def test_the_text_column_is_chosen_by_name(tmp_path):
    pq.write_table(pa.table({"title": ["w1"], "body": ["w2"], "n": [1]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="Try: --text title"):
        read(tmp_path / "c.parquet")
    (block,) = read(tmp_path / "c.parquet", text_column="body")
    assert block.texts == ["w2"]
    with pytest.raises(DataError, match=r"has no column 'bdy' \(columns: title, body, n\). Try: --text title"):
        read(tmp_path / "c.parquet", text_column="bdy")
    with pytest.raises(DataError, match="column n must hold strings, got int64"):
        read(tmp_path / "c.parquet", text_column="n")


def test_columns_that_the_output_cannot_have_and_empty_files_are_errors(tmp_path):
    pq.write_table(pa.table({"text": ["w1"], "embedding": [1]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="has a column embedding"):
        read(tmp_path / "c.parquet")
    (tmp_path / "c.csv").write_text("text,id,id\nw1,1,2\n")
    with pytest.raises(DataError, match="two columns with the same name"):
        read(tmp_path / "c.csv")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    (tmp_path / "c.csv").write_text("text,id\n")
    for name in ("c.parquet", "c.csv"):
        with pytest.raises(DataError, match="has no rows"):
            read(tmp_path / name)
