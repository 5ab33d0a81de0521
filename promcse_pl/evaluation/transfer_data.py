"""SentEval's files of the transfer tasks, as rows of sentences and labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from promcse_pl.data.files import read_senteval, single_spaced
from promcse_pl.utils.errors import DataError

# the file of the ones first: SentEval's order, on which its folds depend
TWO_FILES = {
    "MR": ("MR/rt-polarity.pos", "MR/rt-polarity.neg"),
    "CR": ("CR/custrev.pos", "CR/custrev.neg"),
    "SUBJ": ("SUBJ/subj.objective", "SUBJ/subj.subjective"),
    "MPQA": ("MPQA/mpqa.pos", "MPQA/mpqa.neg"),
}
SPLIT_FILES = {
    "SST-2": {split: f"SST/binary/sentiment-{split}" for split in ("train", "dev", "test")},
    "TREC": {"train": "TREC/train_5500.label", "test": "TREC/TREC_10.label"},
    "MRPC": {split: f"MRPC/msr_paraphrase_{split}.txt" for split in ("train", "test")},
}
ENCODINGS = {"SST-2": "utf-8", "MRPC": "utf-8-sig"}
"""Encoding of a task's files if it is not Latin-1."""
TREC_CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
PUBLISHED_ROWS = {"MR": 10662, "CR": 3775, "SUBJ": 10000, "MPQA": 10606, "SST-2": 70042, "TREC": 5952, "MRPC": 5801}
TRANSFER_TASKS = tuple(PUBLISHED_ROWS)


@dataclass(frozen=True, slots=True)
class Row:
    """An example: one sentence, or two for MRPC, and the number of its class."""

    texts: tuple[str, ...]
    label: int


@dataclass(frozen=True, slots=True)
class TransferData:
    """A transfer task.

    Attributes:
        name: Of `TRANSFER_TASKS`.
        splits: `all` for the tasks that are cross-validated; else `train`, `test`, and `dev` for SST-2. Rows are sorted by their
            words, then by label.
        sha256: Of the bytes of all files.
    """

    name: str
    splits: dict[str, tuple[Row, ...]]
    sha256: str

    @property
    def rows(self) -> int:
        """Rows of all splits."""
        return sum(map(len, self.splits.values()))

    @property
    def expected_rows(self) -> int:
        """Rows of all splits of the published files."""
        return PUBLISHED_ROWS[self.name]

    def sentences(self) -> list[str]:
        """Return every distinct sentence, in the order of the splits."""
        return list(dict.fromkeys(text for rows in self.splits.values() for row in rows for text in row.texts))


def load_transfer(senteval: str | Path, task: str) -> TransferData:
    """Read a transfer task.

    Args:
        senteval: SentEval's data folder, with MR/, CR/, SUBJ/, MPQA/, SST/, TREC/ and MRPC/ in it.
        task: One of `TRANSFER_TASKS`.

    Raises:
        DataError: An unknown task, or a missing or broken file.
    """
    senteval = Path(senteval)
    if task not in TRANSFER_TASKS:
        raise DataError(f"unknown transfer task {task!r}. Tasks: {', '.join(TRANSFER_TASKS)}")
    digests: list[str] = []

    def lines(name: str) -> tuple[Path, list[str]]:
        read, sha256 = read_senteval(senteval / name, ENCODINGS.get(task, "latin-1"))
        digests.append(sha256)
        return senteval / name, read

    if task in TWO_FILES:
        positive, negative = TWO_FILES[task]
        rows = [Row((single_spaced(line),), 1) for line in lines(positive)[1]]
        splits = {"all": rows + [Row((single_spaced(line),), 0) for line in lines(negative)[1]]}
    else:
        parse = {"SST-2": _sst_rows, "TREC": _trec_rows, "MRPC": _mrpc_rows}[task]
        splits = {split: parse(*lines(name)) for split, name in SPLIT_FILES[task].items()}
    order = {split: tuple(sorted(rows, key=_length_and_label)) for split, rows in splits.items()}
    return TransferData(task, order, hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest())


def _length_and_label(row: Row) -> tuple[int, ...]:
    return (*(len(text.split()) for text in row.texts), row.label)


def _zero_or_one(label: str, path: Path, line: int) -> int:
    if label.strip() not in ("0", "1"):
        raise DataError(f"{path}:{line}: the label {label.strip()!r} is neither 0 nor 1")
    return int(label)


def _sst_rows(path: Path, lines: list[str]) -> list[Row]:
    rows = []
    for line, text in enumerate(lines, start=1):
        fields = text.split("\t")
        if len(fields) != 2:
            raise DataError(f"{path}:{line}: expected a sentence, a tab and a label, got {len(fields)} columns")
        rows.append(Row((single_spaced(fields[0]),), _zero_or_one(fields[1], path, line)))
    return rows


def _trec_rows(path: Path, lines: list[str]) -> list[Row]:
    rows = []
    for line, text in enumerate(lines, start=1):
        classes, _, question = text.partition(" ")
        label = classes.partition(":")[0]
        if label not in TREC_CLASSES or not question.strip():
            allowed = f"a question after CLASS:subclass and a space, CLASS one of {', '.join(TREC_CLASSES)}"
            raise DataError(f"{path}:{line}: expected {allowed}; got {text!r}")
        rows.append(Row((single_spaced(question),), TREC_CLASSES.index(label)))
    return rows


def _mrpc_rows(path: Path, lines: list[str]) -> list[Row]:
    if not lines or not lines[0].startswith("Quality\t"):
        raise DataError(f"{path}:1: expected the header Quality, #1 ID, #2 ID, #1 String, #2 String")
    rows = []
    for line, text in enumerate(lines[1:], start=2):
        fields = text.split("\t")
        if len(fields) != 5:
            raise DataError(f"{path}:{line}: expected 5 columns, got {len(fields)}")
        rows.append(Row((single_spaced(fields[3]), single_spaced(fields[4])), _zero_or_one(fields[0], path, line)))
    return rows
