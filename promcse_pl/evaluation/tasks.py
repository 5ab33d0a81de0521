"""The tasks of each suite: sentences to encode, and a score with its interval from their embeddings."""

# n pairs, b resamples

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from promcse_pl.config import DATA_SUITES, MTEB, SENTEVAL_SUITES
from promcse_pl.data.demo import demo_pairs
from promcse_pl.data.pairs import SUITE_TASKS, TASKS, ScoredPairs, load_pairs, load_stsb, load_task
from promcse_pl.data.retrieval import DevSet, RetrievalSet, Text, is_retrieval, load_retrieval
from promcse_pl.evaluation import cxc
from promcse_pl.evaluation.geometry import POSITIVE, alignment, cosine_density, effective_rank, mean_cosine, uniformity
from promcse_pl.evaluation.retrieval import score_queries
from promcse_pl.evaluation.statistics import RESAMPLES, SEED, Floats, bootstrap_spearman, interval, resample_counts
from promcse_pl.evaluation.sts import Embeddings, cosines, score_task
from promcse_pl.evaluation.transfer_data import TRANSFER_TASKS, TransferData, load_transfer
from promcse_pl.utils.errors import ConfigError, DataError
from promcse_pl.utils.paths import expand, is_there

if TYPE_CHECKING:
    from promcse_pl.embedder import PromCSE

PUBLISHED_PAIRS = dict(zip(TASKS, (3108, 1500, 3750, 3000, 1186, 1379, 4927), strict=True))
"""Scored test pairs of the tasks as they were published."""
Progress = Callable[[int, int], None]
"""Called with the steps done so far and of all."""


@dataclass(frozen=True, slots=True)
class Score:
    """A task's score of one model, in the task's unit.

    Attributes:
        value: The score in tables.
        low, high: Its interval; None where there is none.
        details: Further measurements, plain values.
        resamples_b: The score of every resample, the same resamples for every model; None without a bootstrap.
    """

    value: float
    low: float | None = None
    high: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    resamples_b: Floats | None = None

    @classmethod
    def of(cls, value: float, resamples_b: Floats, details: dict[str, Any]) -> Score:
        """Return a score with the percentile interval of its resamples."""
        return cls(value, *interval(resamples_b), details, resamples_b)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task: data, and a function that scores embeddings.

    Attributes:
        name: Name in tables.
        suite: One of `promcse_pl.config.schema.SUITES`, `mteb`, `own` or `dev`.
        unit: Unit of the score.
        protocol: How it is measured, in a sentence or two.
        files: The data: name, rows and sha256 of each file.
        expected_rows: Rows of all files as they were published; None if that is not known.
        sentences: All texts to encode, duplicates included.
        score: Maps the embeddings of the texts to the score.
        score_model: For tasks that encode their own texts: maps a model and a folder for cached results to the score.
        load_data: For the same tasks: loads data that the task itself does not contain, unless the result of the model is in the
            folder; raises DataError. None instead of a model: it is not trained yet.
    """

    name: str
    suite: str
    unit: str
    protocol: str
    files: list[dict[str, Any]]
    expected_rows: int | None
    sentences: tuple[Text, ...]
    score: Callable[[Embeddings, Progress], Score] | None = None
    score_model: Callable[[PromCSE, Path], Score] | None = None
    load_data: Callable[[PromCSE | None, Path], None] | None = None

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file["rows"] for file in self.files)


def load_tasks(names: Sequence[str], data: str | Path | None) -> list[Task]:
    """Read the data of suites and files.

    Args:
        names: Suites of `promcse_pl.config.schema.SUITES`, files of two texts and a score, in any format of `read_rows`, folders
            in BEIR layout (split `test`) or files FOLDER/qrels/SPLIT.tsv, or `mteb:NAME`.
        data: Folder with senteval/ (and cxc/ for `cxc`); files are searched there first, then in the current folder.

    Returns:
        The tasks, in the order of the names.

    Raises:
        ConfigError: A suite needs the folder, an MTEB task is unknown, or a package is not installed.
        DataError: A file is missing or broken.
    """
    needed = [name for name in names if name in DATA_SUITES]
    if needed and data is None:
        inside = "senteval" if set(needed) & set(SENTEVAL_SUITES) else "retrieval"
        raise ConfigError(
            f"the tasks {', '.join(needed)} are read from a data folder with {inside}/ in it, but none is given. "
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
    if name in SUITE_TASKS:
        return [pair_task(task, name, load_task(senteval, task)) for task in SUITE_TASKS[name]]
    if name == "cxc":
        return [_cxc_task(cxc.load_cxc(folder / "cxc"))]
    if name == "demo":
        return [pair_task("demo test", name, [ScoredPairs.of("demo test", demo_pairs("test"))])]
    if name == "geometry":
        return _geometry_tasks(load_stsb(senteval, "test"))
    if name == "transfer":
        return [transfer_task(load_transfer(senteval, task)) for task in TRANSFER_TASKS]
    if name == "retrieval":
        return _retrieval_tasks(folder / "retrieval")
    if name.startswith(MTEB):
        return [_mteb_task(name)]
    path = next((path for path in (folder / name, expand(name)) if is_there(path)), Path(name))
    if is_retrieval(path):
        return [retrieval_task(load_retrieval(path, "test"))]
    return [pair_task(path.name, "own", [load_pairs(path)])]


def _file(name: str, rows: int, sha256: str) -> dict[str, Any]:
    return {"name": name, "rows": rows, "sha256": sha256}


def _both_sides(*subsets: ScoredPairs) -> tuple[str, ...]:
    return tuple(text for subset in subsets for text in (*subset.first, *subset.second))


def _seed(task: str) -> list[int]:
    """Return a separate random stream for each task: an average over tasks needs independent resamples."""
    return [SEED, *task.encode()]


def pair_task(name: str, suite: str, subsets: Sequence[ScoredPairs]) -> Task:
    """Return the task of pairs with human scores, in one subset or more."""

    def resampled(parts: Sequence[ScoredPairs], embeddings: Embeddings) -> Floats:
        predicted_n = np.concatenate([cosines(part, embeddings) for part in parts])
        return 100 * bootstrap_spearman(predicted_n, [gold for part in parts for gold in part.gold], seed=_seed(name))

    def score(embeddings: Embeddings, progress: Progress) -> Score:  # noqa: ARG001
        scores = score_task(subsets, embeddings)
        details: dict[str, Any] = {"pearson": 100 * scores.all.pearson}
        if len(subsets) > 1:
            for measure in ("spearman", "pearson"):
                details[f"{measure}_mean"] = 100 * scores.mean(measure)
                details[f"{measure}_weighted_mean"] = 100 * scores.mean(measure, weighted=True)
            details["subsets"] = {}
            for subset in subsets:
                single = scores.subsets[subset.name]
                low, high = interval(resampled([subset], embeddings))
                details["subsets"][subset.name] = {
                    "spearman": 100 * single.spearman,
                    "low": low,
                    "high": high,
                    "pearson": 100 * single.pearson,
                }
        return Score.of(100 * scores.all.spearman, resampled(subsets, embeddings), details)

    return Task(
        name=name,
        suite=suite,
        unit="Spearman x 100",
        protocol='SentEval\'s "all": Spearman of cosines and human scores over the pairs of all subsets together; interval: '
        f"percentile bootstrap of the pairs, {RESAMPLES} resamples, seed {SEED}"
        + ("; the adapter was selected on these pairs" if suite == "dev" else ""),
        files=[_file(subset.name, len(subset), subset.sha256) for subset in subsets],
        expected_rows=PUBLISHED_PAIRS.get(name),
        sentences=_both_sides(*subsets),
        score=score,
    )


def _cxc_task(data: cxc.CxcData) -> Task:
    def score(embeddings: Embeddings, progress: Progress) -> Score:
        predicted_n = cosines(data.pairs, embeddings)
        values_b = 100 * cxc.cxc_bootstrap(predicted_n, data, progress=lambda done: progress(done, cxc.RESAMPLES))
        return Score.of(float(values_b.mean()), values_b, {"std": float(values_b.std())})

    return Task(
        name="CxC-STS",
        suite="cxc",
        unit="Spearman x 100",
        protocol=f"mean Spearman of {cxc.RESAMPLES} resamples, each half as many images as there are, with replacement, and a "
        f"rated pair of each; numpy's legacy generator, seed {cxc.SEED}; interval: their percentiles",
        files=[_file(name, rows, sha256) for name, (rows, sha256) in data.files.items()],
        expected_rows=None,
        sentences=_both_sides(data.pairs),
        score=score,
    )


def _retrieval_tasks(folder: Path) -> list[Task]:
    paths = sorted(path for path in folder.glob("*/") if is_retrieval(path))
    if not paths:
        raise DataError(f"{folder} has no folder in BEIR layout (corpus.jsonl, queries.jsonl, qrels/test.tsv)")
    return [retrieval_task(load_retrieval(path, "test")) for path in paths]


def retrieval_task(data: RetrievalSet, name: str | None = None, suite: str = "retrieval") -> Task:
    """Return the task of ranking the documents of a retrieval set for its queries."""
    name = data.name if name is None else name

    def score(embeddings: Embeddings, progress: Progress) -> Score:
        values = {metric: 100 * scores_q for metric, scores_q in score_queries(data, embeddings, progress).items()}
        main_q = values.pop(data.metric)
        blocks = resample_counts(len(data), resamples=RESAMPLES, seed=_seed(name))
        values_b: Floats = np.concatenate([counts_bq @ main_q / len(data) for counts_bq in blocks])
        details = {metric: float(scores_q.mean()) for metric, scores_q in values.items()}
        return Score.of(float(main_q.mean()), values_b, {**details, "documents": len(data.documents)})

    return Task(
        name=name,
        suite=suite,
        unit="nDCG@10 x 100",
        protocol=f"exact search by cosine among {len(data.documents)} documents, metrics of trec_eval, means over the queries "
        f"with a relevant document; interval: percentile bootstrap of the queries, {RESAMPLES} resamples, seed {SEED}"
        + ("; the adapter was selected on these queries" if suite == "dev" else ""),
        files=[_file(data.name, len(data), data.sha256)],
        expected_rows=None,
        sentences=data.texts,
        score=score,
    )


def dev_task(dev: DevSet) -> Task:
    """Return the task of a dev set."""
    return pair_task("dev", "dev", [dev]) if isinstance(dev, ScoredPairs) else retrieval_task(dev, "dev", "dev")


def _mteb_task(name: str) -> Task:
    try:
        from promcse_pl.interop import mteb
    except ImportError:
        raise ConfigError(f"{name} needs the package mteb. Try: pip install 'promcse_pl[mteb]'") from None
    task = mteb.find_task(name.removeprefix(MTEB))
    metadata, splits = task.metadata, ", ".join(task.metadata.eval_splits)

    def score_model(model: PromCSE, folder: Path) -> Score:
        return Score(100 * mteb.main_score(model, task, folder))

    return Task(
        name=name,
        suite="mteb",
        unit=f"{metadata.main_score} x 100",
        protocol=f"MTEB {metadata.type}, main score over the splits {splits} of {metadata.dataset['path']}, revision "
        f"{metadata.dataset['revision']}; no interval",
        files=[],
        expected_rows=None,
        sentences=(),
        score_model=score_model,
        load_data=partial(mteb.load_data, task),
    )


def transfer_task(data: TransferData) -> Task:
    """Return the task of classifying sentences by their frozen embeddings."""

    def score(embeddings: Embeddings, progress: Progress) -> Score:
        from promcse_pl.evaluation.transfer import score_transfer  # imported here, since scikit-learn takes a second

        found = score_transfer(data, embeddings, progress=progress)
        blocks = resample_counts(found.rows, resamples=RESAMPLES, seed=_seed(data.name))
        values_b: Floats = np.concatenate([100 * (counts_bn @ found.correct_N) / found.rows for counts_bn in blocks])
        details: dict[str, Any] = {"tested_rows": found.rows, "inverse_penalties": list(found.regularisation)}
        if found.f1 is not None:
            details["f1"] = 100 * found.f1
        return Score.of(100 * found.accuracy, values_b, details)

    return Task(
        name=data.name,
        suite="transfer",
        unit="accuracy x 100",
        protocol="logistic regression on frozen unit vectors, SentEval's splits or 10 folds, the penalty chosen on held-out "
        f"rows, seed 1111; interval: percentile bootstrap of the tested rows, {RESAMPLES} resamples, seed {SEED}",
        files=[_file(data.name, data.rows, data.sha256)],
        expected_rows=data.expected_rows,
        sentences=tuple(data.sentences()),
        score=score,
    )


def _geometry_tasks(pairs: ScoredPairs) -> list[Task]:
    sentences = _both_sides(pairs)
    positive = [index for index, gold in enumerate(pairs.gold) if gold >= POSITIVE]

    def align(embeddings: Embeddings, progress: Progress) -> Score:  # noqa: ARG001
        sides = (np.array([embeddings[side[index]] for index in positive]) for side in (pairs.first, pairs.second))
        density = cosine_density(cosines(pairs, embeddings), pairs.gold)
        return Score(alignment(*sides), details={"positive_pairs": len(positive), "cosine_density": density})

    def spread(measure: Callable[[Floats], float], embeddings: Embeddings, progress: Progress) -> Score:  # noqa: ARG001
        return Score(measure(np.stack([embeddings[text] for text in sorted(set(sentences))]).astype(np.float64)))

    every = "of distinct STS-B test sentences"
    measures: dict[str, tuple[str, Callable[[Embeddings, Progress], Score]]] = {
        "alignment": (f"E|x - x+|^2 over STS-B test pairs with gold {POSITIVE:g} or more (lower is closer)", align),
        "uniformity": (
            f"log E exp(-2|x - y|^2) over all pairs {every} (lower is more even)",
            partial(spread, uniformity),
        ),
        "mean cosine": (f"over all pairs {every} (0: isotropic)", partial(spread, mean_cosine)),
        "effective rank": (
            f"exp of the entropy of the scaled singular values {every}",
            partial(spread, effective_rank),
        ),
    }
    return [
        Task(
            name=name,
            suite="geometry",
            unit="see protocol",
            protocol=protocol,
            files=[_file(pairs.name, len(pairs), pairs.sha256)],
            expected_rows=PUBLISHED_PAIRS["STS-B"],
            sentences=sentences,
            score=score,
        )
        for name, (protocol, score) in measures.items()
    ]
