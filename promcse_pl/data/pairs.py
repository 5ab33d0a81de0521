"""Sentence pairs with scores: SentEval's STS and SICK files, and files of users."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from promcse_pl.data.arrow import content_sha256
from promcse_pl.data.columns import is_number
from promcse_pl.data.files import read_senteval, single_spaced
from promcse_pl.data.readers import read_scored_pairs
from promcse_pl.utils.errors import DataError

YEARS: dict[str, tuple[str, ...]] = {
    "STS12": ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "STS13": ("FNWN", "headlines", "OnWN"),  # without SMT, which is not free
    "STS14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}
SUITE_TASKS = {"sts": (*YEARS, "STS-B"), "sick": ("SICK-R",)}
"""Suite -> its tasks."""
TASKS = tuple(task for tasks in SUITE_TASKS.values() for task in tasks)
STSB_FILES = {"train": "sts-train.csv", "dev": "sts-dev.csv", "test": "sts-test.csv"}
SICK_FILES = {"train": "SICK_train.txt", "dev": "SICK_trial.txt", "test": "SICK_test_annotated.txt"}


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """Sentence pairs with human scores.

    Attributes:
        name: Of the subset or file.
        first, second: The two sentences of each pair.
        gold: Their scores, higher means more similar.
        sha256: Of the file's bytes, recorded with results; of the pairs if there is no file.
    """

    metric: ClassVar[str] = "spearman"
    """Name of the metric if this is a dev set; see `promcse_pl.run_folder.DEV_METRICS`."""
    name: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    gold: tuple[float, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.gold)

    @property
    def size(self) -> str:
        """The size for messages, such as "1,500 pairs"."""
        return f"{len(self):,} pairs"

    @classmethod
    def of(cls, name: str, rows: Iterable[tuple[str, str, float]], sha256: str | None = None) -> ScoredPairs:
        """Build from rows of two texts and a score."""
        kept = list(rows)
        first, second, gold = zip(*kept, strict=True) if kept else ((), (), ())
        digest = sha256 or hashlib.sha256(repr(kept).encode("utf-8", "surrogatepass")).hexdigest()
        return cls(name, first, second, gold, digest)


def load_task(senteval: str | Path, task: str) -> list[ScoredPairs]:
    """Read the test pairs of a task, by subset.

    Args:
        senteval: SentEval's data folder, with STS/ and SICK/ in it.
        task: One of `TASKS`.

    Raises:
        DataError: A missing or broken file.
    """
    senteval = Path(senteval)
    if task == "STS-B":
        return [load_stsb(senteval, "test")]
    if task == "SICK-R":
        return [load_sick(senteval, "test")]
    folder = senteval / "STS" / f"{task}-en-test"
    return [_load_year_subset(folder, subset) for subset in YEARS[task]]


def load_pairs(path: str | Path) -> ScoredPairs:
    """Read a file of two texts and a score; see `read_scored_pairs`.

    Raises:
        DataError: The file or a row is invalid, or its scores are constant, so that no correlation is defined.
    """
    path = Path(path)
    rows = read_scored_pairs(path)
    if len({score for _, _, score in rows}) < 2:
        raise DataError(
            f"{path}: all scores ({len(rows)} rows) are {rows[0][2]:g}, so no correlation is defined. Check that the column of "
            "the scores is named score"
        )
    return ScoredPairs.of(path.name, rows, content_sha256(path))


def load_stsb(senteval: str | Path, split: str) -> ScoredPairs:
    """Read STS-B: `train`, `dev` or `test`; tab-separated, score in column 5, sentences in 6 and 7."""
    return _load_table(
        Path(senteval) / "STS" / "STSBenchmark" / STSB_FILES[split], f"STS-B {split}", (5, 6), 4, header=False
    )


def load_sick(senteval: str | Path, split: str) -> ScoredPairs:
    """Read SICK relatedness: `train`, `dev` or `test`; sentences in columns 2 and 3, score 1-5 in 4."""
    return _load_table(Path(senteval) / "SICK" / SICK_FILES[split], f"SICK-R {split}", (1, 2), 3, header=True)


def _score(text: str, path: Path, line: int) -> float:
    if not is_number(text):
        raise DataError(f"{path}:{line}: the score {text!r} is not a finite number")
    return float(text)


def _load_year_subset(folder: Path, subset: str) -> ScoredPairs:
    texts_path, gold_path = folder / f"STS.input.{subset}.txt", folder / f"STS.gs.{subset}.txt"
    (texts, texts_sha), (golds, gold_sha) = read_senteval(texts_path), read_senteval(gold_path)
    if len(texts) != len(golds):
        raise DataError(f"{texts_path} has {len(texts)} lines, {gold_path} has {len(golds)}: they must agree")
    rows = []
    for line, (text, gold) in enumerate(zip(texts, golds, strict=True), start=1):
        if not gold.strip():
            continue  # not every pair was rated
        fields = text.split("\t")
        if len(fields) < 2:
            raise DataError(f"{texts_path}:{line}: expected two sentences with a tab between them")
        rows.append((single_spaced(fields[0]), single_spaced(fields[1]), _score(gold, gold_path, line)))
    return ScoredPairs.of(subset, rows, hashlib.sha256((texts_sha + gold_sha).encode()).hexdigest())


def _load_table(path: Path, name: str, texts: tuple[int, int], score: int, *, header: bool) -> ScoredPairs:
    lines, sha256 = read_senteval(path)
    rows = []
    for line, text in enumerate(lines[header:], start=1 + header):
        fields = text.split("\t")
        if len(fields) <= max(*texts, score):
            raise DataError(f"{path}:{line}: expected {max(*texts, score) + 1} columns, got {len(fields)}")
        first, second = (single_spaced(fields[column]) for column in texts)
        rows.append((first, second, _score(fields[score], path, line)))
    if not rows:
        raise DataError(f"{path} has no pairs")
    return ScoredPairs.of(name, rows, sha256)
