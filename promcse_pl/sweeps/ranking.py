"""Groups the runs of a sweep by their settings, ranks them by dev score, and defines the best run."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from promcse_pl.sweeps.collect import Run

SEED = "seed"


@dataclass(frozen=True, slots=True)
class Row:
    """One run, or all runs that differ by the seed alone.

    Attributes:
        runs: Runs in the order of the sweep; at least one.
        rank: Rank by dev score, from 1; None without a score, and if the runs used different dev sets.
        dev: Mean dev score over seeds, x 100; NaN if one of the scores is NaN; None: no score.
        std: Sample standard deviation of these scores; None for fewer than two.
        n: Number of these scores.
        seconds: Mean duration of the finished runs, or of all runs if none is finished.
    """

    runs: list[Run]
    rank: int | None
    dev: float | None
    std: float | None
    n: int
    seconds: float | None

    @property
    def seeds(self) -> list[Run]:
        """One finished run for each seed: a search may repeat a run, which adds no information."""
        return one_per_seed(self.runs)

    @property
    def states(self) -> str:
        """States of the runs: `finished`, or `2 finished, 1 failed`."""
        counts = Counter(run.state for run in self.runs)
        return ", ".join(state if len(self.runs) == 1 else f"{count} {state}" for state, count in counts.items())

    @property
    def has_finite_score(self) -> bool:
        """Whether the row can be ranked."""
        return self.dev is not None and math.isfinite(self.dev)

    def test(self, task: str) -> tuple[float | None, float | None]:
        """Return mean and standard deviation of a task's final scores over the seeds."""
        mean, std, _ = _mean_std_n(run.tests.get(task) for run in self.seeds)
        return mean, std


@dataclass(frozen=True, slots=True)
class Best:
    """Best settings and best run of a sweep.

    Attributes:
        row: Runs of the settings with the highest mean dev score over seeds.
        run: Run with the highest dev score among them.
    """

    row: Row
    run: Run


def varied_settings(runs: Sequence[Run]) -> list[str]:
    """Return the settings that differ between runs, in the order of the runs' settings; the seed is last."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    readable = [run for run in runs if run.settings]
    varied = [name for name in names if len({_hashable(run.settings.get(name)) for run in readable}) > 1]
    return sorted(varied, key=lambda name: name == SEED)


def rank(runs: Sequence[Run], *, by_seed: bool) -> list[Row]:
    """Return the runs grouped and sorted by dev score; rows without a rank are last, in the order of the sweep.

    Args:
        runs: Runs of a sweep.
        by_seed: Group runs that differ by the seed alone; else every run is a row.
    """
    names = [name for name in varied_settings(runs) if name != SEED]
    groups: dict[Any, list[Run]] = {}
    for index, run in enumerate(runs):
        # a run with unreadable settings is a group of its own
        settings = tuple(_hashable(run.settings.get(name)) for name in names) if by_seed and run.settings else index
        groups.setdefault(settings, []).append(run)
    rows = []
    for members in groups.values():
        dev, std, n = _mean_std_n(run.dev for run in one_per_seed(members))
        times = [run.seconds for run in members if run.finished] or [run.seconds for run in members]
        rows.append(Row(members, None, dev, std, n, _mean_std_n(times)[0]))
    if len(dev_sets(runs)) > 1:
        return rows
    rows.sort(key=lambda row: -(row.dev or 0.0) if row.has_finite_score else math.inf)
    return [dataclasses.replace(row, rank=n) if row.has_finite_score else row for n, row in enumerate(rows, start=1)]


def one_per_seed(runs: Iterable[Run]) -> list[Run]:
    """Return the first finished run of each seed."""
    first: dict[str, Run] = {}
    for run in runs:
        if run.finished:
            first.setdefault(_hashable(run.settings.get(SEED)), run)
    return list(first.values())


def find_best(runs: Sequence[Run]) -> Best | None:
    """Return the settings with the highest mean dev score over seeds, on a single dev set.

    Terminal, `promcse report`, report.html and W&B all use this definition of "best".

    Returns:
        The best settings and run; None if no finished run has a score, or if the runs used different dev sets.
    """
    rows = rank(runs, by_seed=True)
    if not rows or rows[0].rank is None:
        return None
    scored = [run for run in rows[0].runs if run.finished and run.dev is not None]
    return Best(rows[0], max(scored, key=lambda run: run.dev or 0.0))


def dev_sets(runs: Sequence[Run]) -> list[str]:
    """Return the names of the dev sets of the runs. Scores on different dev sets are not comparable.

    If dev sets share a name but differ in content, the start of their sha256 is appended. They may differ between seeds:
    `data.dev=holdout` selects the rows by the seed.
    """
    names = {run.dev_name for run in runs if run.dev_name}
    contents: dict[str, set[str]] = {}
    for run in runs:
        if run.dev_name and run.dev_sha256:
            seed = _hashable(run.settings.get(SEED))
            contents.setdefault(seed, set()).add(f"{run.dev_name} {run.dev_sha256[:12]}")
    different = max(contents.values(), key=len, default=set())
    return sorted(names if len(names) > 1 or len(different) < 2 else different)


def different_dev_sets(runs: Sequence[Run]) -> str | None:
    """Return why the scores of runs are not comparable; None if all runs used the same dev set."""
    sets = dev_sets(runs)
    if len(sets) < 2:
        return None
    return f"the runs are not ranked, since they were evaluated on different dev sets ({', '.join(sets)})"


def format_score(mean: float | None, std: float | None) -> str:
    """Format a score, with its standard deviation if given; None is an empty string."""
    if mean is None:
        return ""
    return f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")


def _mean_std_n(values: Iterable[float | None]) -> tuple[float | None, float | None, int]:
    """Return mean, sample standard deviation and number of the values that are not None."""
    known = [value for value in values if value is not None]
    if not all(map(math.isfinite, known)):
        return math.nan, None, len(known)
    std = statistics.stdev(known) if len(known) > 1 else None
    return (statistics.fmean(known) if known else None), std, len(known)


def _hashable(setting: object) -> str:
    """Return a string that is equal for equal settings, which may be lists."""
    return json.dumps(setting, sort_keys=True, default=str)
