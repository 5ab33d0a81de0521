"""The tasks of each suite: their sentences, their data files, and a score with its interval from the vectors."""

# n pairs, b resamples, N sentences, D width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from promcse_pl.config import DATA_SUITES
from promcse_pl.data.demo import demo_pairs
from promcse_pl.data.pairs import TASKS, ScoredPairs, load_pairs, load_stsb, load_task
from promcse_pl.evaluation.cxc import RESAMPLES as CXC_RESAMPLES
from promcse_pl.evaluation.cxc import SEED as CXC_SEED
from promcse_pl.evaluation.cxc import CxcData, cxc_bootstrap, load_cxc
from promcse_pl.evaluation.geometry import POSITIVE, alignment, cosine_density, effective_rank, mean_cosine, uniformity
from promcse_pl.evaluation.statistics import RESAMPLES, SEED, Floats, bootstrap_spearman, interval, resample_counts
from promcse_pl.evaluation.sts import Embeddings, cosines, score_task
from promcse_pl.evaluation.transfer_data import TRANSFER_TASKS, TransferData, load_transfer
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.paths import expand, is_there

PUBLISHED_PAIRS = {
    "STS12": 3108,
    "STS13": 1500,
    "STS14": 3750,
    "STS15": 3000,
    "STS16": 1186,
    "STS-B": 1379,
    "SICK-R": 4927,
}
"""Scored test pairs of the tasks as they were published."""
Progress = Callable[[int, int], None]
"""Called with the steps done so far and of all."""


@dataclass(frozen=True, slots=True)
class Score:
    """A task's score of one model, in the task's unit.

    Attributes:
        value: What a table shows.
        low, high: Its interval; None where there is none.
        details: All else that was measured, plain values.
        resamples_b: The score of every resample, the same resamples for every model; None without a bootstrap.
    """

    value: float
    low: float | None = None
    high: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    resamples_b: Floats | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """Something that scores vectors.

    Attributes:
        name: In tables.
        suite: One of `promcse_pl.config.schema.SUITES`, `own` or `dev`.
        unit: Of the score.
        protocol: How it is measured, in a sentence or two.
        files: The data behind it: name, rows and sha256.
        expected_rows: Rows of all files as they were published; None if that is not known.
        sentences: All that must be encoded, repeated or not.
        score: From the vectors of the sentences to the score.
    """

    name: str
    suite: str
    unit: str
    protocol: str
    files: list[dict[str, Any]]
    expected_rows: int | None
    sentences: tuple[str, ...]
    score: Callable[[Embeddings, Progress], Score]

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file["rows"] for file in self.files)


def load_tasks(names: Sequence[str], data: str | Path | None) -> list[Task]:
    """Read the data of suites and files.

    Args:
        names: Suites of `promcse_pl.config.schema.SUITES`, or files of two texts and a score, in any format of `read_rows`.
        data: Folder with senteval/ (and cxc/ for `cxc`) in it; files are looked for in it first, then here.

    Returns:
        The tasks, in the order of the names.

    Raises:
        ConfigError: A suite that needs the folder without it.
        DataError: A file is missing or broken.
    """
    needed = [name for name in names if name in DATA_SUITES]
    if needed and data is None:
        raise ConfigError(
            f"the tasks {', '.join(needed)} are read from a data folder with senteval/ in it, but none is given. "
            "Try: --data FOLDER (of a run: data.dir=FOLDER)"
        )
    folder = Path() if data is None else Path(data)
    tasks = [task for name in dict.fromkeys(names) for task in _load(name, folder)]
    found = [task.name for task in tasks]
    for name in found:
        if found.count(name) > 1:
            raise ConfigError(f"two tasks are called {name}. Rename one of the files")
    return tasks


def _load(name: str, folder: Path) -> list[Task]:
    senteval = folder / "senteval"
    if name == "sts":
        return [pair_task(task, name, load_task(senteval, task)) for task in TASKS if task != "SICK-R"]
    if name == "sick":
        return [pair_task("SICK-R", name, load_task(senteval, "SICK-R"))]
    if name == "cxc":
        return [_cxc_task(load_cxc(folder / "cxc"))]
    if name == "demo":
        return [pair_task("demo test", name, [ScoredPairs.of("demo test", demo_pairs("test"))])]
    if name == "geometry":
        return _geometry_tasks(load_stsb(senteval, "test"))
    if name == "transfer":
        return [transfer_task(load_transfer(senteval, task)) for task in TRANSFER_TASKS]
    path = next((place for place in (folder / name, expand(name)) if is_there(place)), Path(name))
    return [pair_task(path.name, "own", [load_pairs(path)])]


def _file(pairs: ScoredPairs) -> dict[str, Any]:
    return {"name": pairs.name, "rows": len(pairs), "sha256": pairs.sha256}


def _both_sides(*subsets: ScoredPairs) -> tuple[str, ...]:
    return tuple(text for subset in subsets for text in (*subset.first, *subset.second))


def _seed(task: str) -> list[int]:
    """Return a stream of draws of its own for each task: an average over tasks needs independent ones."""
    return [SEED, *task.encode()]


def pair_task(name: str, suite: str, subsets: Sequence[ScoredPairs]) -> Task:
    """Return the task of pairs with human scores, in one subset or more."""
    return Task(
        name,
        suite,
        "Spearman x 100",
        'SentEval\'s "all": Spearman of cosines and human scores over the pairs of all subsets together; interval: percentile '
        f"bootstrap of the pairs, {RESAMPLES} resamples, seed {SEED}"
        + ("; the adapter was chosen by these pairs" if suite == "dev" else ""),
        [_file(subset) for subset in subsets],
        PUBLISHED_PAIRS.get(name),
        _both_sides(*subsets),
        partial(_score_pairs, name, subsets),
    )


def _score_pairs(name: str, subsets: Sequence[ScoredPairs], vectors: Embeddings, progress: Progress) -> Score:  # noqa: ARG001
    scores = score_task(subsets, vectors)
    details: dict[str, Any] = {"pearson": 100 * scores.all.pearson}
    if len(subsets) > 1:
        for measure in ("spearman", "pearson"):
            details[f"{measure}_mean"] = 100 * scores.mean(measure)
            details[f"{measure}_weighted_mean"] = 100 * scores.mean(measure, weighted=True)
        details["subsets"] = {}
        for subset in subsets:
            single = scores.subsets[subset.name]
            low, high = interval(_bootstrap_pairs(name, [subset], vectors))
            details["subsets"][subset.name] = {
                "spearman": 100 * single.spearman,
                "low": low,
                "high": high,
                "pearson": 100 * single.pearson,
            }
    resamples_b = _bootstrap_pairs(name, subsets, vectors)
    return Score(100 * scores.all.spearman, *interval(resamples_b), details, resamples_b)


def _bootstrap_pairs(name: str, subsets: Sequence[ScoredPairs], vectors: Embeddings) -> Floats:
    predicted_n = np.concatenate([cosines(subset, vectors) for subset in subsets])
    return 100 * bootstrap_spearman(predicted_n, [gold for subset in subsets for gold in subset.gold], seed=_seed(name))


def _cxc_task(data: CxcData) -> Task:
    def score(vectors: Embeddings, progress: Progress) -> Score:
        values_b = 100 * cxc_bootstrap(
            cosines(data.pairs, vectors), data, progress=lambda done: progress(done, CXC_RESAMPLES)
        )
        return Score(float(values_b.mean()), *interval(values_b), {"std": float(values_b.std())}, values_b)

    return Task(
        "CxC-STS",
        "cxc",
        "Spearman x 100",
        f"mean Spearman of {CXC_RESAMPLES} resamples, each half as many images as there are, with replacement, and a rated pair "
        f"of each; numpy's legacy generator, seed {CXC_SEED}; interval: their percentiles",
        [{"name": name, "rows": rows, "sha256": sha256} for name, (rows, sha256) in data.files.items()],
        None,
        _both_sides(data.pairs),
        score,
    )


def transfer_task(data: TransferData) -> Task:
    """Return the task of classifying sentences by their frozen vectors."""

    def score(vectors: Embeddings, progress: Progress) -> Score:
        from promcse_pl.evaluation.transfer import score_transfer  # late: scikit-learn takes a second

        found = score_transfer(data, vectors, progress=progress)
        blocks = resample_counts(found.rows, resamples=RESAMPLES, seed=_seed(data.name))
        values_b: Floats = np.concatenate([100 * (counts_bn @ found.correct_N) / found.rows for counts_bn in blocks])
        details: dict[str, Any] = {"tested_rows": found.rows, "inverse_penalties": list(found.regularisation)}
        if found.f1 is not None:
            details["f1"] = 100 * found.f1
        return Score(100 * found.accuracy, *interval(values_b), details, values_b)

    return Task(
        data.name,
        "transfer",
        "accuracy x 100",
        "logistic regression on frozen unit vectors, SentEval's splits or 10 folds, the penalty chosen on held-out rows, "
        f"seed 1111; interval: percentile bootstrap of the tested rows, {RESAMPLES} resamples, seed {SEED}",
        [{"name": data.name, "rows": data.rows, "sha256": data.sha256}],
        data.expected_rows,
        tuple(data.sentences()),
        score,
    )


def _geometry_tasks(pairs: ScoredPairs) -> list[Task]:
    sentences = _both_sides(pairs)
    positive = [place for place, gold in enumerate(pairs.gold) if gold >= POSITIVE]

    def align(vectors: Embeddings, progress: Progress) -> Score:  # noqa: ARG001
        sides = (np.array([vectors[side[place]] for place in positive]) for side in (pairs.first, pairs.second))
        density = cosine_density(cosines(pairs, vectors), pairs.gold)
        return Score(alignment(*sides), details={"positive_pairs": len(positive), "cosine_density": density})

    def spread(measure: Callable[[Floats], float], vectors: Embeddings, progress: Progress) -> Score:  # noqa: ARG001
        return Score(measure(np.stack([vectors[text] for text in sorted(set(sentences))]).astype(np.float64)))

    every = "of distinct STS-B test sentences"
    measures: list[tuple[str, str, Callable[[Embeddings, Progress], Score]]] = [
        ("alignment", f"E|x - x+|^2 over STS-B test pairs with gold {POSITIVE:g} or more (lower is closer)", align),
        (
            "uniformity",
            f"log E exp(-2|x - y|^2) over all pairs {every} (lower is more even)",
            partial(spread, uniformity),
        ),
        ("mean cosine", f"over all pairs {every} (0: isotropic)", partial(spread, mean_cosine)),
        (
            "effective rank",
            f"exp of the entropy of the scaled singular values {every}",
            partial(spread, effective_rank),
        ),
    ]
    return [
        Task(name, "geometry", "see protocol", protocol, [_file(pairs)], PUBLISHED_PAIRS["STS-B"], sentences, score)
        for name, protocol, score in measures
    ]
