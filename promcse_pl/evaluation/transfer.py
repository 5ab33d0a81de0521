"""Transfer tasks: accuracy of a linear classifier on frozen sentence embeddings.

Files, order of the rows, test folds, classifier (logistic regression with an L2 penalty) and grid are those of SentEval when it
runs without torch (Conneau & Kiela 2018). Embeddings are scaled to length 1, so that the grid means the same for every encoder.
"""

# N training rows, M test rows, D width, F features, C values of the grid, K folds

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits

from promcse_pl.evaluation.embeddings import check_embeddings
from promcse_pl.evaluation.sts import Embeddings
from promcse_pl.evaluation.transfer_data import TRANSFER_TASKS, Row, TransferData, load_transfer
from promcse_pl.utils.errors import DataError

__all__ = ["TRANSFER_TASKS", "TransferData", "TransferScore", "load_transfer", "score_transfer"]

Progress = Callable[[int, int], None]
Result = TypeVar("Result")
Features = NDArray[np.float32]
Labels = NDArray[np.int64]

FOLDS = 10
GRID = tuple(2.0**power for power in range(-2, 4))
"""Inverse strengths of the penalty, the strongest penalty first."""
GRID_TRAIN_TEST = tuple(2.0**power for power in range(-1, 6))
"""The same for TREC and MRPC."""


@dataclass(frozen=True, slots=True)
class TransferScore:
    """The result of a task.

    Attributes:
        accuracy: Share of the test rows classified correctly, in [0, 1].
        f1: Of the paraphrases, in [0, 1], for MRPC; else None.
        regularisation: The chosen inverse strengths of the penalty: one for each test fold, or one.
        correct_N: Whether each test row is classified correctly, in the order of `TransferData`: for intervals and paired
            comparisons.
    """

    accuracy: float
    f1: float | None
    regularisation: tuple[float, ...]
    correct_N: NDArray[np.bool_] = field(compare=False, repr=False)

    @property
    def rows(self) -> int:
        """Number of test rows."""
        return len(self.correct_N)


def score_transfer(
    data: TransferData, embeddings: Embeddings, *, seed: int = 1111, progress: Progress = lambda *_: None
) -> TransferScore:
    """Train and test the classifier of a task.

    MR, CR, SUBJ and MPQA: 10 stratified folds; the penalty for a test fold is chosen by cross-validation over the nine others.
    TREC and MRPC: it is chosen by 10 folds of the training rows; SST-2: by the dev rows. MRPC's features are |u - v| and u * v.

    Args:
        data: Of `load_transfer`.
        embeddings: One of each sentence of `data`, unnormalised or not.
        seed: Seed of the folds; SentEval's is 1111.
        progress: Called with the number of regressions fitted so far and of all.

    Raises:
        DataError: A sentence without embedding, an embedding of zeros, embeddings that are all the same, a split without rows, or
            fewer than 10 training rows of a class.
        NonFiniteError: An embedding is NaN or infinite.
    """
    _check(data, embeddings)
    features = {split: _features(rows, embeddings) for split, rows in data.splits.items()}
    labels = {split: np.array([row.label for row in rows], dtype=np.int64) for split, rows in data.splits.items()}
    if "all" in data.splits:
        return _cross_validated(features["all"], labels["all"], seed, progress)
    return _tested(features, labels, seed, progress, with_f1=data.name == "MRPC")


def _check(data: TransferData, embeddings: Embeddings) -> None:
    for split, rows in data.splits.items():
        counts = Counter(row.label for row in rows)
        if not rows or (split in ("all", "train") and (len(counts) < 2 or min(counts.values()) < FOLDS)):
            raise DataError(
                f"{data.name} {split}: {FOLDS} folds need two classes or more and {FOLDS} rows of each, got "
                f"{', '.join(f'{count} of class {label}' for label, count in sorted(counts.items())) or 'no rows'}"
            )
    sentences = data.sentences()
    missing = next((sentence for sentence in sentences if sentence not in embeddings), None)
    if missing is not None:
        raise DataError(f"there is no embedding of {missing[:80]!r}; every sentence of data.sentences() needs one")
    check_embeddings({sentence: embeddings[sentence] for sentence in sentences})


def _features(rows: Sequence[Row], embeddings: Embeddings) -> Features:
    sides = []
    for sentences in zip(*(row.texts for row in rows), strict=True):
        embeddings_ND = np.stack([embeddings[sentence] for sentence in sentences]).astype(np.float32, copy=False)
        lengths_N = np.linalg.norm(embeddings_ND, axis=1)
        if not lengths_N.all():
            raise DataError(f"the embedding of {sentences[int(np.argmin(lengths_N))][:80]!r} is all zeros")
        sides.append(embeddings_ND / lengths_N[:, None])
    return sides[0] if len(sides) == 1 else np.concatenate([np.abs(sides[0] - sides[1]), sides[0] * sides[1]], axis=1)


def _folds(labels_N: Labels, seed: int) -> list[NDArray[np.int64]]:
    """Return the rows of each test fold."""
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    return [test for _, test in splitter.split(labels_N, labels_N)]


def _predictions(train_NF: Features, labels_N: Labels, test_MF: Features, grid: Sequence[float]) -> NDArray[np.int64]:
    """Return the classes (C, M) that a regression on the training rows gives the test rows, by value of the grid.

    Newton's method converges within this tolerance to the optimum's predictions; L-BFGS's default stops where 1 in 150 differs.
    Each value of the grid starts from the one before.
    """
    classifier = LogisticRegression(solver="newton-cg", tol=1e-6, max_iter=1000, warm_start=True)
    predicted = []
    for strength in grid:
        classifier.C = strength
        predicted.append(classifier.fit(train_NF, labels_N).predict(test_MF))
    return np.stack(predicted)


def _parallel(work: Callable[[int], Result], items: int) -> Iterator[Result]:
    """Yield `work` of 0, 1, ..., in this order.

    It has as many threads as torch, each with one BLAS thread: more do not help small products.
    """
    with threadpool_limits(1, user_api="blas"):
        pool = ThreadPoolExecutor(torch.get_num_threads())
        try:
            yield from pool.map(work, range(items))
        finally:
            pool.shutdown(cancel_futures=True)


def _cross_validated(features_NF: Features, labels_N: Labels, seed: int, progress: Progress) -> TransferScore:
    """Score every fold with the penalty that the nine others choose.

    The regression without folds i and j, tested on j, helps to choose for i, and tested on i, for j: 45 trainings instead of the
    90 of nested folds.
    """
    folds = _folds(labels_N, seed)
    pairs = list(combinations(range(FOLDS), 2))
    total = len(pairs) * len(GRID) + FOLDS

    def correct_without(held_out: Sequence[int], grid: Sequence[float]) -> list[NDArray[np.bool_]]:
        """Train without some folds; return for each of them whether its rows are classified correctly (C, M)."""
        tests = np.concatenate([folds[fold] for fold in held_out])
        train = np.setdiff1d(np.arange(len(labels_N)), tests)
        predicted_CM = _predictions(features_NF[train], labels_N[train], features_NF[tests], grid)
        borders = np.cumsum([len(folds[fold]) for fold in held_out])[:-1]
        return np.split(predicted_CM == labels_N[tests], borders, axis=1)

    counts_KC = np.zeros((FOLDS, len(GRID)), dtype=np.int64)
    for done, (correct_i, correct_j) in enumerate(_parallel(lambda n: correct_without(pairs[n], GRID), len(pairs))):
        i, j = pairs[done]
        counts_KC[i] += correct_j.sum(axis=1)
        counts_KC[j] += correct_i.sum(axis=1)
        progress((done + 1) * len(GRID), total)
    chosen = tuple(GRID[best] for best in counts_KC.argmax(axis=1))
    correct_N = np.empty(len(labels_N), dtype=np.bool_)
    for fold, (correct_1M,) in enumerate(_parallel(lambda fold: correct_without([fold], [chosen[fold]]), FOLDS)):
        correct_N[folds[fold]] = correct_1M[0]
        progress(total - FOLDS + fold + 1, total)
    return TransferScore(float(correct_N.mean()), None, chosen, correct_N)


def _tested(
    features: Mapping[str, Features], labels: Mapping[str, Labels], seed: int, progress: Progress, *, with_f1: bool
) -> TransferScore:
    """Score the test rows with the penalty that the dev rows choose, or 10 folds of the training rows."""
    train_NF, labels_N = features["train"], labels["train"]
    every = np.arange(len(labels_N))
    if "dev" in features:
        grid, choices = GRID, [(every, features["dev"], labels["dev"])]
    else:
        grid = GRID_TRAIN_TEST
        choices = [(np.delete(every, fold), train_NF[fold], labels_N[fold]) for fold in _folds(labels_N, seed)]
    total = len(choices) * len(grid) + 1

    def correct_counts(choice: int) -> NDArray[np.int64]:
        train, held_MF, held_M = choices[choice]
        predicted_CM = _predictions(train_NF[train], labels_N[train], held_MF, grid)
        return np.asarray((predicted_CM == held_M).sum(axis=1))

    counts_C = np.zeros(len(grid), dtype=np.int64)
    for done, more_C in enumerate(_parallel(correct_counts, len(choices)), start=1):
        counts_C += more_C
        progress(done * len(grid), total)
    chosen = grid[int(counts_C.argmax())]
    (predicted_1M,) = _parallel(lambda _: _predictions(train_NF, labels_N, features["test"], [chosen]), 1)
    progress(total, total)
    correct_N = predicted_1M[0] == labels["test"]
    f1 = float(f1_score(labels["test"], predicted_1M[0])) if with_f1 else None
    return TransferScore(float(correct_N.mean()), f1, (chosen,), correct_N)
