"""Every rule of the readers, on real files."""

import csv
import gzip
import io
import json
import os
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.folders import DATA

from promcse_pl.data.readers import BadRow, read_rows, read_scored_pairs
from promcse_pl.utils.errors import DataError

TRIPLETS = [("a man", "a person", "a dog"), ("NA", "None", "null"), ("x", " y ", "z")]
NAMES = ["sent0", "sent1", "hard_neg"]


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def read(path, width=1, **options):
    return list(read_rows(path, width=width, **options))


def skipped(path, width=1, **options):
    bad: list[BadRow] = []
    rows = read(path, width, on_bad_row="skip", bad_rows=bad, **options)
    return rows, [(row.line, row.reason) for row in bad]


def parquet_bytes(columns: dict) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, row_group_size=2)
    return sink.getvalue()


def written(suffix: str, rows: list[tuple[str, ...]]) -> bytes:
    if suffix == ".csv":
        sink = io.StringIO(newline="")
        csv.writer(sink).writerows([NAMES, *rows])
        return sink.getvalue().encode()
    if suffix == ".tsv":
        return "".join("\t".join(row) + "\n" for row in [NAMES, *rows]).encode()
    if suffix == ".parquet":
        return parquet_bytes({name: [row[i] for row in rows] for i, name in enumerate(NAMES)})
    return "".join(json.dumps(dict(zip(NAMES, row, strict=True))) + "\n" for row in rows).encode()


# --- formats


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".CSV"])
def test_every_format_gives_the_same_rows(write, suffix, packed):
    path = write("data" + suffix + packed, written(suffix.lower(), TRIPLETS))
    assert read(path, 3) == TRIPLETS
    assert read(path, 2, columns=["hard_neg", "sent0"]) == [(row[2], row[0]) for row in TRIPLETS]
    assert read(path, 2, columns=[2, 1]) == [(row[2], row[1]) for row in TRIPLETS]
    assert read(path, 1, columns=["sent0"]) == [row[:1] for row in TRIPLETS]


@pytest.mark.parametrize("name", ["data.txt", "data.txt.gz"])
def test_txt_is_one_sentence_a_line(write, name):
    assert read(write(name, 'one, two\n"three\r\nfour\tfive')) == [("one, two",), ('"three',), ("four\tfive",)]


def test_unicode_is_kept_exactly(write):
    texts = [
        " e\u0301 is not \u00e9 ",
        "👩‍👩‍👧 🇫🇷",
        "\u202bשלום עולם\u202c",
        "one\u2028line\u2029only\x85\x0b\x0c",
        "\u3000全角",
        "a\rb",
    ]
    assert read(write("data.txt", "\n".join(texts))) == [(text,) for text in texts]
    assert read(write("data.tsv", "\n".join(["text", *texts]))) == [(text,) for text in texts]
    assert read(write("data.jsonl", "\n".join(json.dumps([text], ensure_ascii=False) for text in texts))) == [
        (text,) for text in texts
    ]


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.jsonl", "data.txt", "data.csv.gz"])
def test_a_byte_order_mark_is_removed_once(write, name):
    lines = {"jsonl": '["a"]\n["\ufeffb"]\n', "txt": "a\n\ufeffb\n"}.get(name.split(".")[1], '"text"\na\n\ufeffb\n')
    lines = lines.replace('"text"', "text") if "tsv" in name else lines
    assert read(write(name, "\ufeff" + lines)) == [("a",), ("\ufeffb",)]


@pytest.mark.parametrize("name", ["data.csv", "data.tsv"])
def test_windows_line_ends_leave_no_trace(write, name):
    separator = "," if name == "data.csv" else "\t"
    path = write(name, f"x{separator}y\r\na b{separator}c\r\nd{separator}e\r\n\r\n")
    assert read(path, 2) == [("a b", "c"), ("d", "e")]


def test_a_csv_record_may_span_lines_and_the_next_bad_row_has_its_own_line(write):
    path = write("data.csv", 'a,b\n"one\n\ntwo","say ""hi"""\nx,\n')
    rows, bad = skipped(path, 2)
    assert rows == [("one\n\ntwo", 'say "hi"')]
    assert bad == [(5, "column b is empty")]


def test_tsv_has_no_quoting(write):
    assert read(write("data.tsv", 'a\tb\n"open\tit\'s 5" long\n'), 2) == [('"open', "it's 5\" long")]


def test_columns_that_are_not_wanted_are_fine_but_rows_have_as_many_fields_as_the_header(write):
    path = write("data.csv", "a,b,c\n1,2,3\n4,5,6,7\n")
    assert skipped(path, 2) == (
        [("1", "2")],
        [(3, "4 fields, the header has 3 (a text with ',' without quotes?)")],
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), width=st.integers(1, 3))
def test_what_csv_writer_writes_is_read_back_exactly(tmp_path, data, width):
    text = st.text(min_size=1).filter(lambda text: text.strip())
    rows = data.draw(st.lists(st.tuples(*[text] * width), min_size=1, max_size=8))
    path = tmp_path / "property.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([NAMES[:width], *rows])
    assert read(path, width) == rows


def test_reading_streams(write):
    path = write("data.csv.gz", "text\n" + "good\n" * 50_000 + '"never closed\n')
    rows = read_rows(path, width=1)
    assert next(rows) == ("good",)  # the broken end is not reached
    rows.close()


# --- bad rows

BAD = {
    "empty csv cell": ("d.csv", "sent0,sent1\na,b\na,\n", 2, 3, "column sent1 is empty"),
    "blank csv cell": ("d.csv", "sent0,sent1\na, \u3000\t\n", 2, 2, "column sent1 is empty"),
    "short csv row": ("d.csv", "a,b\nx,y\nx\n", 2, 3, "1 field, the header has 2"),
    "short tsv row": ("d.tsv", "a\tb\nx\n", 2, 2, "1 field, the header has 2"),
    "blank csv line": ("d.csv", "a,b\nx,y\n\nx,y\n", 2, 3, "the line is empty"),
    "blank tsv line": ("d.tsv", "a\tb\nx\ty\n\r\nx\ty\n", 2, 3, "the line is empty"),
    "blank txt line": ("d.txt", "x\n\ny\n", 1, 2, "the line is empty"),
    "white txt line": ("d.txt", "x\n  \n", 1, 2, "column 0 is empty"),
    "blank jsonl line": ("d.jsonl", '["x"]\n\n["x"]', 1, 2, "the line is empty"),
    "text after a quote": ("d.csv", 'a,b\n"x"y,z\n', 2, 2, "broken quoting: ',' expected after '\"'"),
    "broken spanning record": ("d.csv", 'a,b\nx,y\n"x\ny" z,w\n', 2, 3, "expected after '\"' (lines 3 to 4)"),
    "open quote": ("d.csv", 'a,b\nx,y\n"x,y\nx,y\n', 2, 3, "a quote that opens in line 3 never closes (lines 3 to 4)"),
    "bare return": ("d.csv", "a,b\nx\ry,z\n", 2, 2, "a carriage return outside quotes"),
    "broken csv byte": ("d.csv", b"a,b\nx,caf\xe9\n", 2, 2, "byte 0xe9 at position 6 of line 2 is not UTF-8"),
    "broken byte in a record": ("d.csv", b'a,b\n"x\n\xff",y\n', 2, 2, "byte 0xff at position 1 of line 3 is not UTF-8"),
    "broken txt byte": ("d.txt", b"ok\n\xc3\n", 1, 2, "byte 0xc3 at position 1 of line 2 is not UTF-8"),
    "broken jsonl byte": ("d.jsonl", b'["\xff"]', 1, 1, "byte 0xff at position 3 of line 1 is not UTF-8"),
    "utf-16": ("d.txt", "hello".encode("utf-16"), 1, 1, "byte 0xff at position 1 of line 1 is not UTF-8"),
    "json null": ("d.jsonl", '{"a": null}', 1, 1, "column a is empty"),
    "json without key": ("d.jsonl", '{"a": "x"}\n{"b": "x"}', 1, 2, "column a is missing, got b"),
    "json number": ("d.jsonl", '{"a": 5}', 1, 1, "column a must hold a string, got int 5"),
    "json long list": ("d.jsonl", json.dumps([["x" * 99]]), 1, 1, "column 0 must hold a string, got list ['xxxx"),
    "json short list": ("d.jsonl", '["a", "b"]\n["a"]', 2, 2, "1 field, the first row has 2"),
    "json scalar": ("d.jsonl", '"a"', 1, 1, "an object or a list with columns is needed, got str 'a'"),
    "no json": ("d.jsonl", '["a"]\n{"a": ', 1, 2, "not JSON: Expecting value: line 1 column 7"),
    "deep json": ("d.jsonl", "[" * 200_000, 1, 1, "not JSON: "),
    "mixed json": ("d.jsonl", '["a"]\n{"a": "x"}', 1, 2, "the file mixes objects and lists"),
    "a lone surrogate": ("d.jsonl", '["ab\\ud83d"]', 1, 1, "column 0 holds a lone surrogate at character 3"),
    "parquet null": ("d.parquet", parquet_bytes({"a": ["x", "y", None]}), 1, 3, "column a is empty"),
    "parquet blank": ("d.parquet.gz", parquet_bytes({"a": ["x", " "]}), 1, 2, "column a is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_stops_with_its_line_and_reason_or_is_skipped(write, case):
    name, content, width, line, reason = BAD[case]
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        read(path, width)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert reason in str(caught.value)
    assert str(caught.value).endswith(". Fix the row (training rows can be skipped: data.on_bad_row=skip)")

    bad: list[BadRow] = []
    rows = []
    with suppress(DataError):  # where the bad row is the only one
        rows = read(path, width, on_bad_row="skip", bad_rows=bad)
    assert len(bad) == 1
    assert str(bad[0]).startswith(f"{path}:{line}: ")
    assert reason in bad[0].reason
    assert not any("\ufffd" in text for row in rows for text in row)


def test_an_unclosed_quote_over_the_field_limit_is_reported_with_its_first_line(write):
    path = write("data.csv", 'a,b\nx,y\n"x,y\n' + "some words,more words\n" * 10_000)
    with pytest.raises(DataError, match=r":3: a field is over 131072 characters: a quote that opens in line 3 prob"):
        read(path, 2)


def test_skipping_goes_on_behind_every_kind_of_bad_row(write):
    path = write("data.csv", b'a,b\n1,\n"x"y,z\nok,1\n\xff,z\n\nshort\nok,2\n\n\n')
    rows, bad = skipped(path, 2)
    assert rows == [("ok", "1"), ("ok", "2")]
    assert [line for line, _ in bad] == [2, 3, 5, 6, 7]


def test_a_row_without_the_wanted_column_is_bad_even_if_another_column_is_further_left(write):
    assert skipped(write("d.csv", "a,b,c\n1,2,3\n1,2\n"), 2, columns=["c", "a"]) == (
        [("3", "1")],
        [(3, "2 fields, the header has 3")],
    )


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.txt", "d.jsonl"])
def test_blank_lines_at_the_end_are_dropped(write, name):
    lines = '["a"]\n["b"]\n' if name == "d.jsonl" else "a\nb\n"
    options = {"header": False} if name in ("d.csv", "d.tsv") else {}
    assert read(write(name, lines + "\n\r\n"), **options) == [("a",), ("b",)]


# --- columns and headers


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_an_unknown_column_lists_those_of_the_file(write, suffix):
    path = write("data" + suffix, written(suffix, TRIPLETS))
    with pytest.raises(DataError, match=r"no column 'anchor' \(columns: sent0, sent1, hard_neg\)\. 2 are needed"):
        read(path, 2, columns=["anchor", "sent1"])
    with pytest.raises(DataError, match=r"no column 3.*for example data.columns=\[sent0,sent1\]"):
        read(path, 2, columns=[0, 3])


def test_a_name_that_two_columns_have_is_refused(write):
    with pytest.raises(DataError, match="several columns 'a'"):
        read(write("d.csv", "a,a\n1,2\n"), 1, columns=["a"])


def test_names_need_a_header(write):
    for name, content, options in [("d.csv", "x,y\n", {"header": False}), ("d.jsonl", '["x", "y"]', {})]:
        with pytest.raises(DataError, match=r"no column 'a' \(columns: no names, .*data.columns=\[0,1\]"):
            read(write(name, content), 2, columns=["a", "b"], **options)
    with pytest.raises(DataError, match="no column -1"):
        read(write("d.csv", "x,y\n"), 2, columns=[0, -1], header=False)


def test_as_many_columns_as_texts_are_needed(write):
    with pytest.raises(DataError, match=r"3 columns are needed, got data.columns=\['a', 'b'\]"):
        read(write("d.csv", "a,b,c\n1,2,3\n"), 3, columns=["a", "b"])


def test_a_first_row_that_looks_like_data_asks_for_data_header(write):
    path, columns = write("d.csv", "a man is cooking,x\nb,y\n"), [0]
    with pytest.raises(DataError, match=r"looks like data.*a man is cooking.*data.header=false if it is data, "):
        read(path, 1)
    with pytest.raises(DataError, match=r"looks like data.*a man is cooking.*data.header=false if it is data, "):
        read(path, 1, columns=columns)
    assert read(path, 1, columns=columns, header=False) == [("a man is cooking",), ("b",)]
    assert read(path, 1, columns=columns, header=True) == [("b",)]
    assert read(path, 1, columns=[1]) == [("y",)]  # the used cell is a name
    assert read(path, 1, columns=["a man is cooking"]) == [("b",)]


@pytest.mark.parametrize("cell", ["今天天气很好。", "今天我们去公园玩", "ช่วยด้วย!", "Hello.", "Really?", "それは本当…"])
def test_a_sentence_in_the_first_row_is_no_column_name(write, cell):
    with pytest.raises(DataError, match="looks like data"):
        read(write("d.csv", f"{cell}\nb\n"))


@pytest.mark.parametrize("cell", ["文本", "句子内容", "ข้อความ", "テキスト", "caption"])
def test_a_word_in_the_first_row_is_a_column_name(write, cell):
    assert read(write("d.csv", f"{cell}\nb\n")) == [("b",)]


def test_a_header_that_cannot_be_read_is_no_row_to_skip(write):
    for content in [b"\xff,b\nx,y\n", b'"a"a,b\nx,y\n', b"\na,b\nx,y\n"]:
        with pytest.raises(DataError, match=r"d.csv:1: .*must start with column names"):
            skipped(write("d.csv", content), 2)


@pytest.mark.parametrize(("name", "content"), [("d.txt", "x"), ("d.jsonl", '["x"]'), ("d.parquet", b"PAR1")])
def test_a_header_setting_without_effect_is_refused(write, name, content):
    with pytest.raises(DataError, match=r"data\.header has no effect on"):
        read(write(name, content), header=False)


def test_txt_takes_neither_pairs_nor_columns(write):
    path = write("d.txt", "x\n")
    with pytest.raises(DataError, match="one sentence per line, got 2 texts per row"):
        read(path, 2)
    with pytest.raises(DataError, match=r"data.columns=\[0\]"):
        read(path, columns=[0])


def test_parquet_texts_must_be_strings(write):
    path = write(
        "d.parquet", parquet_bytes({"a": [1, 2], "b": [b"x", b"y"], "c": pa.array(["x", "y"]).dictionary_encode()})
    )
    with pytest.raises(DataError, match="column a must hold strings, got int64"):
        read(path, columns=["a"])
    with pytest.raises(DataError, match="column b must hold strings, got binary"):
        read(path, columns=["b"])
    assert read(path, columns=["c"]) == [("x",), ("y",)]


# --- scores


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", "s1,s2,score\na,b,4.5\nc,d, 0 \n"),
        ("d.tsv.gz", "s1\ts2\tscore\na\tb\t4.5\nc\td\t0\n"),
        ("d.jsonl", '["a", "b", 4.5]\n["c", "d", 0]'),
        ("d.parquet", parquet_bytes({"s1": ["a", "c"], "s2": ["b", "d"], "score": [4.5, 0.0]})),
        ("d.parquet", parquet_bytes({"s1": ["a", "c"], "s2": ["b", "d"], "score": ["4.5", "0"]})),
    ],
)
def test_scored_pairs_of_every_format(write, name, content):
    assert read_scored_pairs(write(name, content)) == [("a", "b", 4.5), ("c", "d", 0.0)]


@pytest.mark.parametrize("score", ["nan", "inf", "high", "3,5", "1e999"])
def test_a_score_that_is_no_finite_number_is_a_bad_row(write, score):
    path = write("d.tsv", f"s1\ts2\tscore\na\tb\t1\na\tb\t{score}\n")
    with pytest.raises(DataError, match=rf"d.tsv:3: column score must hold a finite number, got str '{score}'"):
        read_scored_pairs(path)


@pytest.mark.parametrize("score", ["true", "NaN", "[1]", "1" * 400])
def test_a_json_score_that_is_no_finite_number_is_a_bad_row(write, score):
    with pytest.raises(DataError, match="must hold a finite number"):
        read_scored_pairs(write("d.jsonl", f'["a", "b", {score}]'))


def test_a_missing_score_is_a_bad_row(write):
    with pytest.raises(DataError, match="column score is empty"):
        read_scored_pairs(write("d.csv", "s1,s2,score\na,b,\n"))


def test_the_first_pair_of_a_scored_file_without_header_is_kept(write):
    path = write("d.csv", "a man,a dog,0.5\nb,c,1\n")
    assert read_scored_pairs(path) == [("a man", "a dog", 0.5), ("b", "c", 1.0)]


def test_a_scored_file_with_a_header_is_read_without_it(write):
    assert read_scored_pairs(write("d.csv", "a,b,score\na man,a dog,0.5\n")) == [("a man", "a dog", 0.5)]


# --- files


def test_a_missing_file_names_the_current_folder_if_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"^no.csv does not exist; the current folder is {tmp_path}$"):
        read(Path("no.csv"))
    with pytest.raises(DataError, match=rf"^{tmp_path}/no.csv does not exist$"):
        read(tmp_path / "no.csv")


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["d.xlsx", "d", "d.gz", "d.csv.zip"])
def test_an_unknown_format_lists_the_known_ones(write, name):
    with pytest.raises(DataError, match=r"unknown format .*Allowed: .csv, .tsv, .txt, .jsonl, .ndjson, .parquet, each"):
        read(write(name, "x"))


@pytest.mark.parametrize("name", ["d.csv", "d.parquet", "d.txt"])
def test_an_empty_file_is_named(write, name):
    with pytest.raises(DataError, match=rf"{name} is empty \(0 bytes\)"):
        read(write(name, ""))


@pytest.mark.parametrize(
    ("name", "content"), [("d.csv", "a\n"), ("d.txt.gz", ""), ("d.tsv", "\n\n"), ("d.jsonl", "\n")]
)
def test_a_file_without_rows_is_named(write, name, content):
    with pytest.raises(DataError, match="has no usable row: it holds no rows"):
        read(write(name, content))


def test_a_file_of_bad_rows_only_counts_them(write):
    with pytest.raises(DataError, match=r"no usable row: 2 bad rows, the first is .*d.csv:2: column a is empty"):
        skipped(write("d.csv", "a,b\n,1\n,2\n"), 2)


def test_a_parquet_file_without_rows_is_named(write):
    with pytest.raises(DataError, match="it holds no rows"):
        read(write("d.parquet", parquet_bytes({"a": pa.array([], pa.string())})))


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "plain"])
@pytest.mark.parametrize("name", ["d.txt.gz", "d.parquet.gz"])
def test_a_corrupt_gzip_file_is_one_error(tmp_path, name, damage, on_bad_row):
    data = bytearray(gzip.compress("".join(f"sentence {i}\n" for i in range(20_000)).encode()))
    data[len(data) // 2] ^= 0xFF if damage == "flipped" else 0
    path = tmp_path / name
    path.write_bytes(b"plain text" if damage == "plain" else data[:-100] if damage == "cut" else data)
    with pytest.raises(DataError, match="is not a complete gzip file"):
        read(path, on_bad_row=on_bad_row)


def test_a_corrupt_parquet_file_is_one_error(tmp_path):
    data = parquet_bytes({"a": [f"text {i}" for i in range(9_000)]})
    broken = bytearray(data)
    broken[20:4000] = b"\xff" * 3980
    for content in [data[:-50], b"not parquet at all", bytes(broken)]:
        (tmp_path / "d.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"d.parquet is not a complete UTF-8 parquet file"):
            read(tmp_path / "d.parquet")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_one_error(write):
    path = write("d.csv", "a\nb\n")
    path.chmod(0)
    with pytest.raises(DataError, match="permission denied"):
        read(path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied"), "permission denied. Try: chmod u\\+r '.*/my d.csv'$"),
        (OSError(5, "I/O error"), "I/O error"),
    ],
)
def test_an_error_of_the_system_is_one_error(write, monkeypatch, error, message):
    def fail(*_):
        raise error

    path = write("my d.csv", "a\nb\n")
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(DataError, match=message):
        read(path)


@pytest.mark.realdata
def test_the_nli_file_is_read_whole():
    rows = read(DATA / "nli/nli_train.csv", 3)
    assert len(rows) == 29_316
    assert rows == read(DATA / "nli/nli_train.csv", 3, columns=NAMES)
    assert rows[0][2] == "Food bacteria do not exist"
