"""Training rows and dev set of a run, from its settings."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from promcse_pl.config import DataConfig
from promcse_pl.data.arrow import train_split
from promcse_pl.data.columns import ROW_KINDS, ColumnRequest, is_number
from promcse_pl.data.demo import demo_pairs, demo_triplets
from promcse_pl.data.pairs import SUITE_TASKS, ScoredPairs, load_pairs, load_stsb
from promcse_pl.data.readers import BadRow, stream_rows
from promcse_pl.data.retrieval import QRELS, DevSet, is_retrieval, load_retrieval
from promcse_pl.data.test_sets import contaminated_tasks, refuse_test_set
from promcse_pl.data.tokens import RowSource, file_source, memory_source
from promcse_pl.utils.errors import ConfigError, DataError
from promcse_pl.utils.paths import expand, is_folder, is_there

HOLDOUT_SHARE, HOLDOUT_MOST = 0.1, 500
"""Share of the anchors that `data.dev=holdout` holds out, and the most of them."""
FIRST_ROWS = 100
"""Number of rows of the training file that are checked before a run starts."""


def cache_dir(configured: str | None) -> Path:
    """Return the folder of the token cache and of the embedding cache."""
    if configured is not None:
        return expand(configured)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "promcse_pl"


def data_dir(config: DataConfig) -> Path | None:
    """Return the folder of data sets, if one is set.

    Raises:
        ConfigError: It does not exist.
    """
    if config.dir is None:
        return None
    folder = expand(config.dir)
    if not is_folder(folder):
        raise ConfigError(
            f"the folder data.dir={config.dir} does not exist (current folder: {Path.cwd()}). Try: data.dir=FOLDER"
        )
    return folder


def senteval_dir(config: DataConfig) -> Path:
    """Return SentEval's data folder.

    Raises:
        ConfigError: data.dir is not set, or has no senteval/ in it.
    """
    base = data_dir(config)
    if base is None:
        raise ConfigError(
            "the STS tasks are read from data.dir/senteval, but data.dir is not set. Try: data.dir=FOLDER"
        )
    folder = base / "senteval"
    if not is_folder(folder):
        raise ConfigError(
            f"data.dir={config.dir} has no senteval/ folder in it (SentEval's data: STS/, SICK/). "
            "Try: data.dir=FOLDER, or data.dev=null 'evaluation.tasks=[]' to train without it"
        )
    return folder


def find_file(name: str, config: DataConfig, key: str) -> Path:
    """Return the path of a data file; a relative one is searched in data.dir, then in the current folder.

    Raises:
        DataError: It does not exist.
    """
    path, base = expand(name), data_dir(config)
    candidates = [path] if path.is_absolute() or base is None else [base / path, path]
    for candidate in candidates:
        # of a missing split of a retrieval set, the error of load_retrieval lists the splits
        if is_there(candidate) or (candidate.parent.name == QRELS and is_folder(candidate.parent)):
            return candidate
    if path.is_absolute():
        raise DataError(f"{key}={name} does not exist. Check the path")
    searched = " and ".join(str(candidate.absolute()) for candidate in candidates)
    hint = "" if base else f", or data.dir=FOLDER with {name} in it"
    raise DataError(f"{key}={name} does not exist; searched {searched}. Try: {key}=FILE{hint}")


def load_sources(config: DataConfig, seed: int) -> tuple[RowSource, DevSet | None]:
    """Return the training rows and the dev set of the settings.

    Args:
        config: The data settings.
        seed: Seed of the rows that `data.dev=holdout` holds out.

    Raises:
        ConfigError, DataError: A file or folder is missing, or a row is broken.
    """
    source = _train_source(config)
    if config.dev != "holdout":
        return source, dev_set(config)
    return _hold_out(source, seed)


def find_contaminated_tasks(config: DataConfig, suites: Sequence[str]) -> dict[str, float]:
    """Return the tasks of suites whose test pairs are in the training file, with their share; see `contaminated_tasks`.

    Files without scores can be large and are not compared.
    """
    if config.kind != "scored_pairs" or not set(suites) & set(SUITE_TASKS):
        return {}
    rows = _train_source(config).rows([])
    return contaminated_tasks(((first, second) for first, second, _ in rows), suites, senteval_dir(config))


def check_training_file(config: DataConfig, seed: int) -> None:
    """Read the first rows of the training file, to report its errors before any computation.

    Raises:
        ConfigError, DataError: The file is missing, its columns are ambiguous, a row is bad, or there are too few rows.
    """
    if config.train == "demo":
        return
    path = train_split(find_file(config.train, config, "data.train"))
    kind = ROW_KINDS[config.kind]
    rows = stream_rows(ColumnRequest(path, kind, config.columns, config.header), config.on_bad_row)
    first = list(islice(rows, FIRST_ROWS))
    if len(first) < 2:
        raise DataError(f"{path} has {len(first)} row; a batch needs at least 2")
    for role, title, texts in zip(kind.roles, kind.titles, zip(*first, strict=True), strict=True):
        # ids or labels under an unknown column name
        if config.columns is None and role != "score" and all(map(is_number, texts)):
            raise DataError(
                f"{path}: each {title} of the first {len(first)} rows is a number, such as {texts[0][:40]!r}, not a text. "
                f"Name the columns to read: data.columns=[{','.join(['NAME'] * len(kind.titles))}] (also if numbers are meant)"
            )
    if len(first) < FIRST_ROWS and config.dev == "holdout":
        _hold_out(_train_source(config), seed)


def _train_source(config: DataConfig) -> RowSource:
    if config.train == "demo":
        source = memory_source("demo", demo_triplets())
    else:
        source = file_source(
            train_split(find_file(config.train, config, "data.train")),
            kind=ROW_KINDS[config.kind],
            columns=config.columns,
            header=config.header,
            on_bad_row=config.on_bad_row,
        )
    return source if config.max_rows is None else _first_rows(source, config.max_rows)


def _first_rows(source: RowSource, most: int) -> RowSource:
    fingerprint = hashlib.sha256(f"{source.fingerprint} first {most}".encode()).hexdigest()
    return dataclasses.replace(source, fingerprint=fingerprint, rows=lambda bad: islice(source.rows(bad), most))


def dev_set(config: DataConfig) -> DevSet | None:
    """Return the dev set that `data.dev` names, unless it is `holdout`; None if it is null.

    Raises:
        ConfigError: The file is a published test set.
        DataError: It is missing or broken.
    """
    if config.dev is None:
        return None
    if config.dev == "demo":
        return ScoredPairs.of("demo dev", demo_pairs("dev"))
    if config.dev == "stsb":
        return load_stsb(senteval_dir(config), "dev")
    path = find_file(config.dev, config, "data.dev")
    if is_retrieval(path):
        return load_retrieval(path, "dev")
    dev = load_pairs(path)
    folder = data_dir(config)
    refuse_test_set(path, dev, None if folder is None else folder / "senteval")
    return dev


def _hold_out(source: RowSource, seed: int) -> tuple[RowSource, ScoredPairs]:
    """Hold out a tenth of the anchors with all their rows as dev pairs: positives score 1, hard negatives 0."""
    bad_rows: list[BadRow] = []
    rows = list(source.rows(bad_rows))
    anchors = list(dict.fromkeys(row[0] for row in rows))
    order = np.random.default_rng(seed).permutation(len(anchors))
    most = min(HOLDOUT_MOST, max(1, int(len(anchors) * HOLDOUT_SHARE)))
    held_out = {anchors[index] for index in order[:most]}
    train = [row for row in rows if row[0] not in held_out]
    if len(train) < 2:
        raise DataError(
            f"{source.name} has too few different anchors ({len(anchors)}) to hold some out. "
            "Try: data.dev=FILE, or data.dev=null"
        )
    pairs = [
        (anchor, text, score)
        for anchor, positive, negative in rows
        if anchor in held_out
        for text, score in ((positive, 1.0), (negative, 0.0))
    ]

    def remaining(bad: list[BadRow]) -> Iterator[tuple[str, ...]]:
        bad.extend(bad_rows)
        return iter(train)

    kept = dataclasses.replace(
        memory_source(source.name, train),
        rows=remaining,
        notes=source.notes,
        sha256=source.sha256,
        bad_rows=tuple(bad_rows),
    )
    return kept, ScoredPairs.of(f"{most} anchors kept back", pairs)
