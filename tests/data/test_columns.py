"""The role of each column in every format; the commands that error messages suggest work."""

import csv
import io
import json
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from support.folders import ROOT

from promcse_pl.config import DataConfig
from promcse_pl.corpus.rows import RowSettings, read_blocks
from promcse_pl.data.readers import read_rows, read_scored_pairs
from promcse_pl.data.sources import check_training_file, load_sources
from promcse_pl.runs.compose import config_of
from promcse_pl.runs.inputs import check_inputs
from promcse_pl.utils.errors import DataError

FORMATS = [".csv", ".tsv", ".jsonl", ".parquet"]


def write(path: Path, header: str, rows: list[list[str]]) -> Path:
    """Write a table in the format of the suffix; the header is separated by commas."""
    names = header.split(",")
    if path.suffix == ".parquet":
        pq.write_table(pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    elif path.suffix == ".tsv":
        path.write_text("".join("\t".join(row) + "\n" for row in [names, *rows]))
    else:
        sink = io.StringIO(newline="")
        csv.writer(sink).writerows([names, *rows])
        path.write_text(sink.getvalue())
    return path


def columns_read(path: Path, header: str, width: int) -> tuple[str, ...]:
    """The names of the columns that are read: every cell says which column it is of."""
    write(path, header, [[f"of {name}" for name in header.split(",")]] * 2)
    first, second = read_rows(path, width=width)
    assert first == second
    return tuple(text.removeprefix("of ") for text in first)


# --- known names


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("header", "read"),
    [
        ("negative,anchor,positive", "anchor,positive,negative"),
        ("id,query,answer,wrong,note", "query,answer,wrong"),
        ("sent0,sent1,hard_neg", "sent0,sent1,hard_neg"),
        ("hard_neg,sent1,sent0", "sent0,sent1,hard_neg"),
        ("sent2,sent0,sent1", "sent0,sent1,sent2"),
        ("idx,sentence3,sentence2,sentence1", "sentence1,sentence2,sentence3"),
        ("contradiction,entailment,premise", "premise,entailment,contradiction"),
        ("Negative, Positive ,ANCHOR,id", "ANCHOR, Positive ,Negative"),
        ("hard-negative,positive,question", "question,positive,hard-negative"),
        ("id,query,positive,negative_1", "query,positive,negative_1"),
        ("id,text,positive,negative", "text,positive,negative"),
        ("score,query,positive,negative", "query,positive,negative"),
        ("first,second,third", "first,second,third"),
    ],
)
def test_triplets_are_found_by_known_names_in_any_order_and_else_in_the_order_of_three_columns(
    tmp_path, suffix, header, read
):
    assert ",".join(columns_read(tmp_path / f"my{suffix}", header, 3)) == read


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("header", "width", "read"),
    [
        ("answer,query", 2, "query,answer"),
        ("sent1,sent2", 2, "sent1,sent2"),
        ("question2,question1,id", 2, "question1,question2"),
        ("text_b,text_a,id", 2, "text_a,text_b"),
        ("text,query", 2, "query,text"),
        ("title,body", 2, "title,body"),
        ("q,a", 2, "q,a"),
        ("b,a", 2, "a,b"),
        ("anchor,positive,negative", 2, "anchor,positive"),
        ("id,text,label", 1, "text"),
        ("question,answer,sentence", 1, "sentence"),
        ("id,question", 1, "question"),
        ("whatever", 1, "whatever"),
    ],
)
def test_pairs_and_sentences_follow_the_same_rules(tmp_path, suffix, header, width, read):
    assert ",".join(columns_read(tmp_path / f"my{suffix}", header, width)) == read


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "header",
    [
        "a,b,score",
        "score,a,b",
        "x,y,z",
        "id,sentence2,label,sentence1",
        "pair_ID,sentence_A,sentence_B,relatedness_score,entailment_judgment",
        "split,genre,similarity,text1,text2",
        "query,document,score,rank",
    ],
)
def test_scored_pairs_find_their_two_texts_and_the_score(tmp_path, suffix, header):
    names = header.split(",")
    score = next((name for name in names if name.startswith(("score", "label", "similarity", "relatedness"))), "z")
    path = write(tmp_path / f"dev{suffix}", header, [["0.5" if name == score else name for name in names]])
    ((first, second, value),) = read_scored_pairs(path)
    texts = [name for name in names if name not in (score, "id", "pair_ID", "split", "genre", "rank")]
    assert {first, second} == set(texts[:2])
    assert value == 0.5


def test_read_and_unread_columns_are_reported(tmp_path):
    path = write(tmp_path / "my.csv", "id,answer,query,wrong,note", [["1", "b", "a", "c", "x"]])
    notes: list[str] = []
    assert list(read_rows(path, width=3, notes=notes)) == [("a", "b", "c")]
    assert notes == [f"{path}: anchor=query, positive=answer, negative=wrong; not read: id, note"]
    path = write(tmp_path / "my.csv", "x,y", [["a", "b"]])
    assert list(read_rows(path, width=2, notes=notes)) == [("a", "b")]
    assert notes[1:] == [f"{path}: anchor=x, positive=y (by position)"]


# --- what no rule decides


AMBIGUOUS = [
    ("id,x,y,z", 3, r"has 4 columns \(id, x, y, z\), and their names do not identify the columns that triplets"),
    ("query,question,answer", 2, "2 columns match the anchor: query, question "),
    ("query,positive,negative_1,negative_2", 3, "2 columns match the negative: negative_1, negative_2 "),
    ("id,query,answer", 3, "column id would be read as the anchor"),
    ("anchor,negative", 2, "column negative would be read as the positive"),
    ("x,label", 2, "column label would be read as the positive"),
    ("query,answer", 3, r"has 2 columns \(query, answer\); triplets need 3: anchor, positive, negative"),
    ("x", 2, r"has 1 column \(x\); pairs need 2: anchor, positive"),
    ("premise,hypothesis,label", 2, "has a column label .* every row would be a positive pair"),
    ("sentence1,sentence2,score", 2, "has a column score .* every row would be a positive pair"),
    (
        "question1,question2,is_duplicate",
        2,
        "has a column is_duplicate .* every row would be a positive pair",
    ),
    ("gold_label,sentence1,sentence2", 2, "has a column gold_label .* every row would be a positive pair"),
    (
        "pairID,sentenceA,sentenceB,goldLabel",
        2,
        "has a column goldLabel .* every row would be a positive pair",
    ),
    ("query,document,relevance", 2, "has a column relevance .* every row would be a positive pair"),
    ("question1,question2,is_duplicate", 3, r"has a column is_duplicate .* data=pairs .*\[question1,question2\]"),
    ("q1,q2,is_dup", 3, r"has a column is_dup .* data=pairs .*\[q1,q2\]"),
    ("id,title,body", 3, "column id would be read as the anchor"),
    ("docid,title,text", 3, "column docid would be read as the anchor"),
    ("class,title,description", 3, r"has a column class .* data=pairs .*\[title,description\]"),
    ("sent0,sent1,hard_neg", 1, "3 columns match the sentence: sent0, sent1, hard_neg "),
    ("x,y", 1, "their names do not identify the columns that sentences need: sentence"),
    ("q,a", 1, "their names do not identify the columns that sentences need: sentence"),
]


@pytest.mark.parametrize(
    ("suffix", "header", "width", "message"),
    [
        pytest.param(suffix, *case, marks=[] if (number + shift) % len(FORMATS) == 0 else pytest.mark.exhaustive)
        for number, case in enumerate(AMBIGUOUS)
        for shift, suffix in enumerate(FORMATS)
    ],
)
def test_ambiguous_columns_are_rejected_with_a_command_that_works(
    tmp_path, monkeypatch, suffix, header, width, message
):
    monkeypatch.chdir(tmp_path)
    path = write(Path(f"my{suffix}"), header, [[f"of {name} {row}" for name in header.split(",")] for row in range(3)])
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(path, width=width))
    config = typed(str(caught.value))
    check_inputs(config)
    source, _ = load_sources(config.data, config.seed)
    assert len(list(source.rows([]))) == 3 - (config.data.kind == "triplets")  # one is held out


def typed(message: str):
    """The config of the first command in a message, as a shell and Hydra read it."""
    first, _, _ = message[message.index("python run.py") :].partition(". If ")
    python, run, *overrides = shlex.split(first)
    assert (python, run) == ("python", "run.py")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return config_of(compose("config", overrides=overrides))


def test_a_column_of_numbers_with_an_unknown_name_is_not_trained_on_unless_it_is_named(tmp_path):
    path = write(tmp_path / "my.csv", "text_a,text_b,target", [["a b", "c d", "1"], ["e f", "g h", "0"]])
    tree = {"kind": "triplets", "train": str(path)}
    with pytest.raises(DataError, match="each negative of the first 2 rows is a number, such as '1', not a text"):
        check_training_file(DataConfig(**tree), 0)
    check_training_file(DataConfig(**tree, columns=["text_a", "text_b", "target"]), 0)


@pytest.mark.parametrize(
    "header", ["query-id,corpus-id,score", "article,highlights,id", "user_id,review,rating", "id,title,body"]
)
def test_ids_are_neither_texts_nor_scores_of_a_dev_file(tmp_path, header):
    path = write(tmp_path / "dev.csv", header, [["1", "2", "0.5"], ["3", "4", "1"]])
    with pytest.raises(DataError, match=r"would be read as the "):
        read_scored_pairs(path)


@pytest.mark.parametrize("name", ["my file.csv", "it's.csv", "a,b=c.csv", "ä $x.csv", 'say "x".csv', "back\\slash.csv"])
def test_the_command_is_quoted_for_shell_and_hydra(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(Path(name), "id,query text,ä,null", [["1", "q", "a", "n"]] * 3)
    with pytest.raises(DataError, match="their names do not identify") as caught:
        list(read_rows(Path(name), width=2))
    config = typed(str(caught.value))
    assert config.data.train == name
    assert config.data.columns == [1, 2]
    check_training_file(config.data, 0)


def test_without_header_the_command_repeats_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.csv").write_text("1,b,c\n2,d,e\n")
    with pytest.raises(DataError, match="has 3 columns") as caught:
        list(read_rows(Path("my.csv"), width=2, header=False))
    config = typed(str(caught.value))
    assert (config.data.header, config.data.columns) == (False, [0, 1])
    check_training_file(config.data, 0)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "x,y",
            r"has 2 columns \(x, y\); scored pairs need 3: sentence1, sentence2, score\. Add the missing columns",
        ),
        ("id,x,y,z", r"do not identify the columns .* Rename the columns to read to sentence1, sentence2, score"),
        (
            "sentence1,sentence2,label,score",
            r"2 columns match the score: label, score .* Rename or remove all but one of them",
        ),
    ],
)
def test_scored_pairs_say_which_names_to_give(tmp_path, header, message):
    path = write(tmp_path / "dev.csv", header, [["x", "y", "1", "1"][: len(header.split(","))]])
    with pytest.raises(DataError, match=message) as caught:
        read_scored_pairs(path)
    assert "data.columns" not in str(caught.value)
    write(
        path,
        header.replace("id,x,y,z", "id,sentence1,sentence2,score").replace("label", "other"),
        [["0", "x", "y", "1"]],
    )
    if len(header.split(",")) == 4:
        path.write_text(
            path.read_text().replace("0,x,y,1", "x,y,1,1") if "other" in path.read_text() else path.read_text()
        )
        assert read_scored_pairs(path) == [("x", "y", 1.0)]


def test_a_scored_file_without_header_and_with_another_column_asks_for_a_header(tmp_path):
    (tmp_path / "dev.csv").write_text("7,a man,a dog,0.5\n")
    with pytest.raises(DataError, match=r"looks like data.*Add a first line with column names \(sentence1, sen"):
        read_scored_pairs(tmp_path / "dev.csv")


def test_lists_of_jsonl_have_positions_alone(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text('["a", "b", "c"]\n["d", "e"]\n')
    with pytest.raises(DataError, match=r"has 3 columns \(no names, positions from 0 to 2\)"):
        list(read_rows(path, width=2))
    with pytest.raises(DataError, match=r"my\.jsonl:2: 2 fields, the first row has 3\. Fix"):
        list(read_rows(path, width=2, columns=[0, 1]))


@pytest.mark.parametrize(("name", "content"), [("my.txt", "a b\n"), ("my.jsonl", '["a", "b"]\n')])
def test_a_column_of_a_file_without_names_is_not_chosen_by_name(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=r"no column 'body' .* The columns have no names\. Leave --text out$"):
        list(read_blocks(tmp_path / name, RowSettings("body", "stop", 10), lambda shard: True))


def test_a_key_that_a_later_object_lacks_makes_a_bad_row(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text(
        '{"positive": "b", "anchor": "a"}\n{"anchor": "c", "pos": "d"}\n{"anchor": "e", "positive": "f", "x": 1}\n'
    )
    with pytest.raises(DataError, match=r"my\.jsonl:2: column positive is missing, got anchor, pos\. Fix"):
        list(read_rows(path, width=2))
    assert list(read_rows(path, width=2, on_bad_row="skip")) == [("a", "b"), ("e", "f")]


# --- delimiters and ragged rows


@pytest.mark.parametrize("delimiter", [";", "|"])
def test_the_delimiter_of_a_csv_file_is_detected_and_reported(tmp_path, delimiter):
    path = tmp_path / "my.csv"
    rows = [["negative", "anchor", "positive"], ["a, b", f"c {delimiter} d", "e"]]
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    notes: list[str] = []
    assert list(read_rows(path, width=3, notes=notes)) == [(f"c {delimiter} d", "e", "a, b")]
    assert notes[0] == f"{path}: columns are separated by {delimiter}"


def test_a_european_dev_file_is_read_and_its_decimal_comma_is_a_bad_row(tmp_path):
    (tmp_path / "dev.csv").write_text("score;sentence1;sentence2\n4.5;a;b\n")
    assert read_scored_pairs(tmp_path / "dev.csv") == [("a", "b", 4.5)]
    (tmp_path / "dev.csv").write_text("score;sentence1;sentence2\n4,5;a;b\n")
    with pytest.raises(DataError, match=r"dev\.csv:2: column score must hold a finite number, got str '4,5'"):
        read_scored_pairs(tmp_path / "dev.csv")


@pytest.mark.parametrize(
    ("name", "delimiter", "renamed"),
    [("my.csv", "\t", "my.tsv"), ("my.tsv", ",", "my.csv"), ("my.tsv", ";", "my.csv"), ("My.TSV", "|", "My.csv")],
)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_delimiter_of_another_format_is_named_and_the_new_name_works(tmp_path, name, delimiter, renamed, width):
    header = ["anchor", "positive", "negative"] if width > 1 else ["id", "text"]
    path = tmp_path / name
    path.write_text("".join(delimiter.join(row) + "\n" for row in (header, ["a", "b", "c"][: len(header)])))
    shown = "tabs" if delimiter == "\t" else repr(delimiter)
    with pytest.raises(DataError) as caught:
        list(read_rows(path, width=width))
    assert f"columns are separated by {shown}," in str(caught.value)
    assert str(caught.value).endswith(f". Rename it to {renamed}")
    assert list(read_rows(path.rename(tmp_path / renamed), width=width)) == [
        tuple("abc"[:width]) if width > 1 else ("b",)
    ]


def test_a_sentence_with_a_semicolon_is_no_delimiter(tmp_path):
    path = tmp_path / "my.csv"
    path.write_text("Hello; you\nstop;go\n")
    assert list(read_rows(path, width=1, header=False)) == [("Hello; you",), ("stop;go",)]
    with pytest.raises(DataError, match="the first row looks like data, not like column names: Hello; you"):
        list(read_rows(path, width=1))
    path.write_text("text\nstop;go\n")
    assert list(read_rows(path, width=1)) == [("stop;go",)]


def test_rows_with_unquoted_commas_are_bad_rows_each_with_its_line(tmp_path):
    path = tmp_path / "my.csv"
    path.write_text('anchor,positive,negative\na,b,c\nHello, you,b,c\n"Hello, you",b,c\na,b\n')
    with pytest.raises(DataError, match=r"my\.csv:3: 4 fields, the header has 3 \(a text with ',' without quotes\?\)"):
        list(read_rows(path, width=3))
    bad: list = []
    assert list(read_rows(path, width=3, on_bad_row="skip", bad_rows=bad)) == [
        ("a", "b", "c"),
        ("Hello, you", "b", "c"),
    ]
    assert [(row.line, row.reason[:8]) for row in bad] == [(3, "4 fields"), (5, "2 fields")]


# --- a run


def test_a_txt_file_of_pairs_says_how_to_train_on_sentences(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("a b\nc d\n")
    with pytest.raises(DataError, match=r"one sentence per line, got 3 texts per row") as caught:
        list(read_rows(Path("my.txt"), width=3))
    check_inputs(typed(str(caught.value)))


def test_a_cache_of_another_reading_is_not_reused(tmp_path):
    from promcse_pl.data.columns import TRAINING_ROWS
    from promcse_pl.data.tokens import file_source

    options = {"kind": TRAINING_ROWS[3], "columns": None, "header": None, "on_bad_row": "stop"}
    write(tmp_path / "one.csv", "negative,anchor,positive", [["n", "a", "p"]])
    write(tmp_path / "two.csv", "anchor,positive,negative", [["n", "a", "p"]])
    one, two = (file_source(tmp_path / name, **options) for name in ("one.csv", "two.csv"))
    assert one.fingerprint != two.fingerprint
    assert (one.example, two.example) == (("a", "p", "n"), ("n", "a", "p"))
