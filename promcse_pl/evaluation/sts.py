"""Semantic textual similarity by the protocol of SentEval, as the papers of the field print it.

Sentences are split at white space and joined with one space, not lower-cased and not cut below the encoder's limit. A task's
score is "all": Spearman over the pairs of all its subsets together. The average is the mean of the tasks' scores.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from promcse_pl.data.arrow import content_sha256
from promcse_pl.data.readers import read_scored_pairs
from promcse_pl.errors import DataError
from promcse_pl.evaluation.correlation import pearson, spearman
from promcse_pl.paths import require_regular_file

Encode = Callable[[Sequence[str]], NDArray[np.float32]]
"""Unit vectors (N, D) of N sentences."""
VectorOf = Mapping[str, NDArray[np.float32]]
"""The unit vector (D,) of each sentence."""

YEARS: dict[str, tuple[str, ...]] = {
    "STS12": ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "STS13": ("FNWN", "headlines", "OnWN"),  # without SMT, which is not free
    "STS14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}
TASKS = (*YEARS, "STS-B", "SICK-R")
STSB_FILES = {"train": "sts-train.csv", "dev": "sts-dev.csv", "test": "sts-test.csv"}
SICK_FILES = {"train": "SICK_train.txt", "dev": "SICK_trial.txt", "test": "SICK_test_annotated.txt"}


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """Sentence pairs with human scores.

    Attributes:
        name: Of the subset or file.
        first, second: The two sentences of each pair.
        gold: Their scores, higher is more alike.
        sha256: Of the file's bytes, so that a result can name its data; of the pairs when there is no file.
    """

    name: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    gold: tuple[float, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.gold)

    @classmethod
    def of(cls, name: str, rows: Iterable[tuple[str, str, float]], sha256: str | None = None) -> ScoredPairs:
        """Build from rows of two texts and a score."""
        kept = list(rows)
        first, second, gold = zip(*kept, strict=True) if kept else ((), (), ())
        digest = sha256 or hashlib.sha256(repr(kept).encode("utf-8", "surrogatepass")).hexdigest()
        return cls(name, first, second, gold, digest)


@dataclass(frozen=True, slots=True)
class PairScores:
    """Correlations of one set of pairs, in [-1, 1]."""

    pairs: int
    spearman: float
    pearson: float


@dataclass(frozen=True, slots=True)
class TaskScores:
    """A task's correlations, in [-1, 1].

    Attributes:
        all: Over the pairs of all subsets together: what the papers print.
        subsets: Of each subset.
    """

    all: PairScores
    subsets: dict[str, PairScores]

    def mean(self, measure: str = "spearman", *, weighted: bool = False) -> float:
        """Return the mean over the subsets, weighted by their pairs if asked."""
        weights = [subset.pairs if weighted else 1 for subset in self.subsets.values()]
        return float(np.average([getattr(subset, measure) for subset in self.subsets.values()], weights=weights))


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
    senteval = Path(senteval)
    return _load_table(senteval / "STS" / "STSBenchmark" / STSB_FILES[split], f"STS-B {split}", (5, 6), 4, header=False)


def load_sick(senteval: str | Path, split: str) -> ScoredPairs:
    """Read SICK relatedness: `train`, `dev` or `test`; sentences in columns 2 and 3, score 1-5 in 4."""
    senteval = Path(senteval)
    return _load_table(senteval / "SICK" / SICK_FILES[split], f"SICK-R {split}", (1, 2), 3, header=True)


def _lines(path: Path) -> tuple[list[str], str]:
    try:
        require_regular_file(path)
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. SentEval's data folder is data.dir/senteval") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {content[error.start]:#04x})") from error
    return text.removesuffix("\n").split("\n"), hashlib.sha256(content).hexdigest()


def _clean(sentence: str) -> str:
    return " ".join(sentence.split())


def _score(text: str, path: Path, line: int) -> float:
    try:
        score = float(text)
    except ValueError:
        raise DataError(f"{path}:{line}: the score {text!r} is not a number") from None
    if not math.isfinite(score):
        raise DataError(f"{path}:{line}: the score {text!r} is not a finite number")
    return score


def _load_year_subset(folder: Path, subset: str) -> ScoredPairs:
    texts_path, gold_path = folder / f"STS.input.{subset}.txt", folder / f"STS.gs.{subset}.txt"
    (texts, texts_sha), (golds, gold_sha) = _lines(texts_path), _lines(gold_path)
    if len(texts) != len(golds):
        raise DataError(f"{texts_path} has {len(texts)} lines, {gold_path} has {len(golds)}: they must agree")
    rows = []
    for line, (text, gold) in enumerate(zip(texts, golds, strict=True), start=1):
        if not gold.strip():
            continue  # not every pair was rated
        fields = text.split("\t")
        if len(fields) < 2:
            raise DataError(f"{texts_path}:{line}: expected two sentences with a tab between them")
        rows.append((_clean(fields[0]), _clean(fields[1]), _score(gold, gold_path, line)))
    return ScoredPairs.of(subset, rows, hashlib.sha256((texts_sha + gold_sha).encode()).hexdigest())


def _load_table(path: Path, name: str, texts: tuple[int, int], score: int, *, header: bool) -> ScoredPairs:
    lines, sha256 = _lines(path)
    rows = []
    for line, text in enumerate(lines[1:] if header else lines, start=2 if header else 1):
        fields = text.split("\t")
        if len(fields) <= max(*texts, score):
            raise DataError(f"{path}:{line}: expected {max(*texts, score) + 1} columns, got {len(fields)}")
        rows.append((_clean(fields[texts[0]]), _clean(fields[texts[1]]), _score(fields[score], path, line)))
    return ScoredPairs.of(name, rows, sha256)


def encode_distinct(encode: Encode, groups: Iterable[ScoredPairs]) -> dict[str, NDArray[np.float32]]:
    """Encode every distinct sentence of all groups once, in one call."""
    distinct = sorted({sentence for group in groups for sentence in (*group.first, *group.second)})
    return dict(zip(distinct, encode(distinct), strict=True))


def cosines(pairs: ScoredPairs, vectors: VectorOf) -> NDArray[np.float64]:
    """Return the cosine of each pair; exactly 1 for twice the same sentence, so that rounding does not rank such pairs."""
    first = np.stack([vectors[sentence] for sentence in pairs.first]).astype(np.float64)
    second = np.stack([vectors[sentence] for sentence in pairs.second]).astype(np.float64)
    products: NDArray[np.float64] = np.einsum("nd,nd->n", first, second)
    lengths: NDArray[np.float64] = np.sqrt(np.einsum("nd,nd->n", first, first) * np.einsum("nd,nd->n", second, second))
    return products / lengths


def score_pairs(encode: Encode, pairs: ScoredPairs) -> PairScores:
    """Encode one set of pairs and correlate its cosines with the gold scores."""
    return _correlate(cosines(pairs, encode_distinct(encode, [pairs])), pairs.gold)


def _correlate(predicted: NDArray[np.float64], gold: Sequence[float]) -> PairScores:
    return PairScores(len(gold), spearman(predicted, gold), pearson(predicted, gold))


def evaluate_sts(encode: Encode, senteval: str | Path, tasks: Sequence[str] = TASKS) -> dict[str, TaskScores]:
    """Score an encoder on STS tasks.

    Args:
        encode: Gives unit vectors.
        senteval: SentEval's data folder.
        tasks: Of `TASKS`.

    Returns:
        The scores by task, in the order of `tasks`.
    """
    return score_groups(encode, {task: load_task(senteval, task) for task in tasks})


def score_groups(encode: Encode, groups: Mapping[str, Sequence[ScoredPairs]]) -> dict[str, TaskScores]:
    """Score an encoder on tasks of one or more subsets; every distinct sentence of all tasks is encoded once."""
    vectors = encode_distinct(encode, [subset for subsets in groups.values() for subset in subsets])
    return {task: score_task(subsets, vectors) for task, subsets in groups.items()}


def score_task(subsets: Sequence[ScoredPairs], vectors: VectorOf) -> TaskScores:
    """Score a task whose sentences have been encoded."""
    predicted = [cosines(subset, vectors) for subset in subsets]
    gold = [score for subset in subsets for score in subset.gold]
    return TaskScores(
        _correlate(np.concatenate(predicted), gold),
        {subset.name: _correlate(cosine, subset.gold) for subset, cosine in zip(subsets, predicted, strict=True)},
    )
