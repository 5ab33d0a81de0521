"""Any bytes in a data file: the right rows, or one DataError that names the file."""

import csv
import gzip
import io
import json
import resource
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.fuzzing import FULL, examples, only_our_errors

from promcse_pl.data.readers import BadRow, read_rows, read_scored_pairs

NAMES = ["a.csv", "a.tsv", "a.txt", "a.jsonl", "a.parquet"]
PIECES = [
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\r\n", b"\r", b"\n", b'"', b'""', b",", b"\t", b"a,b,c\n", b"a\tb\tc\n"),
    *(
        b"\x85",
        b"\xe2\x80\xa8",
        b"\xed\xa0\x80",
        b"\xc3\x28",
        b"\\ud800",
        b"null",
        b"NaN",
        b"1e999",
        b"PAR1",
        b"x" * 140_000,
    ),
    *(b"[1]", b'{"a": "x", "b": ', b'["a", "b"]\n', b'{"a": 1}\n', b"[" * 2000, b'["\\ud800", "x", 1]\n', b"9" * 5000),
]
TEXT = st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass"))
CONTENT = st.lists(st.sampled_from(PIECES) | st.binary(max_size=20) | TEXT, max_size=12).map(b"".join)
COLUMNS = st.none() | st.lists(st.integers(-2, 4) | st.sampled_from(["a", "b", "", "ß", "\ud800"]), max_size=4)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def check(path: Path, content: bytes, width: int, **options) -> None:
    """Read a file in every way; whatever comes out must be usable."""
    path.write_bytes(content)
    bad: list[BadRow] = []
    with only_our_errors("readers") as errors:
        for row in read_rows(path, width=width, bad_rows=bad, **options):
            assert len(row) == width
            assert all(text.strip() and text.encode() for text in row)
    assert not errors or str(path) in errors[0]
    lines = [row.line for row in bad]
    assert lines == sorted(set(lines))
    assert all(line >= 1 for line in lines)
    assert all(len(str(row)) < 2000 for row in bad)


@examples(1500)
@given(
    name=st.sampled_from(NAMES),
    content=CONTENT,
    width=st.integers(1, 3),
    columns=COLUMNS,
    header=st.none() | st.booleans(),
    on_bad_row=st.sampled_from(["stop", "skip"]),
)
def test_any_bytes_in_any_format(scratch, name, content, width, columns, header, on_bad_row):
    check(scratch / name, content, width, columns=columns, header=header, on_bad_row=on_bad_row)


@examples(800)
@given(
    name=st.sampled_from(["a.csv", "a.tsv", "a.jsonl"]),
    scores=st.lists(
        st.sampled_from(["1", "nan", "1e999", "9" * 5000, "", "٣", "1_0", "0x1", "null", " 2 ", "[1]", "true"]),
        max_size=4,
    ),
    header=st.booleans(),
)
@example(name="a.jsonl", scores=["9" * 5000], header=False)  # more digits than Python makes an int of
@example(name="a.jsonl", scores=["1" + "0" * 400], header=False)  # an int that no float holds
def test_any_scores(scratch, name, scores, header):
    separator = "\t" if name == "a.tsv" else ","
    rows = [f"x{separator}y{separator}{score}\n" if name != "a.jsonl" else f'["x", "y", {score}]\n' for score in scores]
    if header and name != "a.jsonl":
        rows.insert(0, f"a{separator}b{separator}score\n")
    (scratch / name).write_text("".join(rows), encoding="utf-8")
    with only_our_errors("readers"):
        pairs = read_scored_pairs(scratch / name)
        assert all(abs(score) < float("inf") for _, _, score in pairs)


def whole_files() -> dict[str, bytes]:
    sink = io.BytesIO()
    columns = {"a": ["ein", "二", "x" * 300] * 3, "b": ["1", None, "3"] * 3, "n": [1, 2, 3] * 3}
    pq.write_table(pa.table(columns), sink, row_group_size=2)
    lines = [json.dumps({"a": f"text {i}", "b": "ü" * i}) + "\n" for i in range(1, 9)]
    jsonl = "".join(lines).encode()
    return {
        "a.parquet": sink.getvalue(),
        "a.jsonl": jsonl,
        "a.jsonl.gz": gzip.compress(jsonl, mtime=0),
        "a.csv.gz": gzip.compress(b'a,b\n"x\ny",z\n' * 30, mtime=0),
        "a.parquet.gz": gzip.compress(sink.getvalue(), mtime=0),
    }


WHOLE = whole_files()


@examples(1500)
@given(data=st.data(), name=st.sampled_from(sorted(WHOLE)), skip=st.booleans())
def test_flipped_bits_and_cut_files(scratch, data, name, skip):
    content = bytearray(WHOLE[name])
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    check(scratch / name, bytes(content), data.draw(st.integers(1, 2)), on_bad_row="skip" if skip else "stop")


def arrow_stream() -> bytes:
    sink = io.BytesIO()
    texts = pa.array(["p", "q", "r"] * 30)
    table = pa.table({"answer": ["ein", "二", "x" * 300] * 30, "query": texts, "kind": texts.dictionary_encode()})
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=20)
    return sink.getvalue()


STREAM = arrow_stream()


@examples(1500)
@given(data=st.data(), columns=st.sampled_from([None, ["kind", "answer"]]), skip=st.booleans())
def test_flipped_bits_and_cut_files_of_a_saved_dataset(scratch, data, columns, skip):
    folder = scratch / "saved"
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    content = bytearray(STREAM)
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    (folder / "a.arrow").write_bytes(content)
    with only_our_errors("readers"):
        for row in read_rows(folder, width=2, columns=columns, on_bad_row="skip" if skip else "stop"):
            assert all(text.strip() and text.encode() for text in row)


@examples(400)
@given(
    names=st.lists(
        st.sampled_from(["anchor", "query", "positive", "sent1", "a", "id", "", "score", "text", "é "]), max_size=6
    ),
    width=st.integers(1, 3),
    delimiter=st.sampled_from([",", ";", "|", "\t"]),
    suffix=st.sampled_from([".csv", ".tsv"]),
)
def test_any_header(scratch, names, width, delimiter, suffix):
    rows = [[f"of {position}" for position in range(len(names))]] * 2
    path = scratch / f"header{suffix}"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([names, *rows])
    with only_our_errors("readers"):
        first, second = read_rows(path, width=width)
        assert first == second
        assert len(set(first)) == width, "no column is read twice"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt", "a.jsonl.gz"])
def test_millions_of_short_rows_stream_in_bounded_time_and_memory(scratch, name):
    rows = {"a.txt": 2_000_000, "a.csv": 500_000}.get(name, 200_000) if FULL else 200_000
    line = {"a.csv": b"w,z\n", "a.txt": b"w z\n"}.get(name, b'["w","z"]\n')
    content = (b"text,id\n" if name == "a.csv" else b"") + line * rows
    (scratch / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    del content
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    columns = [0] if "jsonl" in name else None
    assert sum(1 for _ in read_rows(scratch / name, width=1, columns=columns)) == rows
    assert time.process_time() - started < 20, "seconds of processor time"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, "KiB more at the peak"


@pytest.mark.parametrize("kind", ["csv quote that never closes", "one line", "deep json", "gzip bomb"])
def test_hostile_sizes_are_refused_or_read_without_a_hang(scratch, kind):
    name, content, options = {
        "csv quote that never closes": ("a.csv", b'a\n"' + b"x\n" * 500_000, {}),
        "one line": ("a.txt", b"x" * 20_000_000, {}),
        "deep json": ("a.jsonl", b"[" * 1_000_000 + b"]" * 1_000_000, {}),
        "gzip bomb": ("a.csv.gz", gzip.compress(b"a\n" + b"x," * 10_000_000, 9), {}),
    }[kind]
    started = time.process_time()
    check(scratch / name, content, 1, **options)
    assert time.process_time() - started < 20


def test_what_the_csv_module_writes_with_every_line_end_is_read_back(scratch):
    rows = [("a\r\nb", 'say "x"'), ("x\u2028", "1,2"), ("\ufeffx", "y")]
    for end in ("\r\n", "\n"):
        sink = io.StringIO(newline="")
        csv.writer(sink, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
        (scratch / "a.csv").write_bytes(b"\xef\xbb\xbf" + sink.getvalue().encode())
        assert list(read_rows(scratch / "a.csv", width=2)) == rows, end
