"""Which settings a sweep varies, which runs belong together, and their order."""

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
    """Runs of the same settings (or one run), and what they reach together.

    Attributes:
        runs: At least one, in the sweep's order.
        rank: From 1, by the mean dev score; None without one, and if the runs were not all scored on the same development set.
        dev: Mean over the finished runs, Spearman x 100; NaN if one of them is; None: no score.
        std: Sample standard deviation over them; None for fewer than two.
        n: How many finished runs with a score that is.
        seconds: Mean time of the finished runs, or of all if none is.
    """

    runs: list[Run]
    rank: int | None
    dev: float | None
    std: float | None
    n: int
    seconds: float | None

    @property
    def states(self) -> str:
        """How the runs ended: `finished`, or `2 finished, 1 failed`."""
        counts = Counter(run.state for run in self.runs)
        return ", ".join(state if len(self.runs) == 1 else f"{count} {state}" for state, count in counts.items())

    def test(self, task: str) -> tuple[float | None, float | None]:
        """Return mean and standard deviation of a task's final scores over the runs."""
        mean, std, _ = spread(run.tests.get(task) for run in self.runs)
        return mean, std


def varied_settings(runs: Sequence[Run]) -> list[str]:
    """Return the settings that differ between runs, in the order the runs name them; the seed is the last."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    described = [run for run in runs if run.settings]
    varied = [name for name in names if len({key(run.settings.get(name)) for run in described}) > 1]
    return sorted(varied, key=lambda name: name == SEED)


def rank(runs: Sequence[Run], *, by_seed: bool) -> list[Row]:
    """Return the runs grouped and ordered, the best first; those without a rank come last, in the sweep's order.

    Args:
        runs: Of a sweep.
        by_seed: Put runs together that differ by nothing but the seed; else every run is a row.
    """
    names = [name for name in varied_settings(runs) if name != SEED]
    groups: dict[Any, list[Run]] = {}
    for place, run in enumerate(runs):
        # a run whose settings cannot be read is like no other
        together = by_seed and run.settings
        groups.setdefault(tuple(key(run.settings.get(name)) for name in names) if together else place, []).append(run)
    rows = []
    for members in groups.values():
        dev, std, n = spread(run.dev for run in members if run.finished)
        times = [run.seconds for run in members if run.finished] or [run.seconds for run in members]
        rows.append(Row(members, None, dev, std, n, spread(times)[0]))
    if len(dev_sets(runs)) > 1:
        return rows
    rows.sort(key=lambda row: -row.dev if _has_score(row) else math.inf)  # type: ignore[operator]
    return [dataclasses.replace(row, rank=place) if _has_score(row) else row for place, row in enumerate(rows, start=1)]


def dev_sets(runs: Sequence[Run]) -> list[str]:
    """Return the development sets that runs were scored on; scores on different ones cannot be compared.

    Sets of one name and different content get a part of their sha256. Runs of different seeds may differ in it:
    `data.dev=holdout` keeps other rows back for another seed, the same ones for all settings.
    """
    names = {run.dev_name for run in runs if run.dev_name}
    contents: dict[str, set[str]] = {}
    for run in runs:
        if run.dev_name and run.dev_sha256:
            contents.setdefault(key(run.settings.get(SEED)), set()).add(f"{run.dev_name} {run.dev_sha256[:12]}")
    different = max(contents.values(), key=len, default=set())
    return sorted(names if len(names) > 1 or len(different) < 2 else different)


@dataclass(frozen=True, slots=True)
class Best:
    """Best settings and best run of a sweep.

    Attributes:
        row: Runs of the settings with the highest mean dev score over seeds.
        run: Run with the highest dev score among them.
    """

    row: Row
    run: Run


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


def different_dev_sets(runs: Sequence[Run]) -> str | None:
    """Return why the scores of runs are not comparable; None if all were scored on the same dev set."""
    sets = dev_sets(runs)
    if len(sets) < 2:
        return None
    return f"the runs are not ranked, since they were evaluated on different dev sets ({', '.join(sets)})"


def spread(values: Iterable[float | None]) -> tuple[float | None, float | None, int]:
    """Return mean, sample standard deviation and number of the values that are there."""
    there = [value for value in values if value is not None]
    if not all(map(math.isfinite, there)):
        return math.nan, None, len(there)
    std = statistics.stdev(there) if len(there) > 1 else None
    return (statistics.fmean(there) if there else None), std, len(there)


def format_score(mean: float | None, std: float | None) -> str:
    """Format a score, with its standard deviation if given."""
    if mean is None:
        return ""
    return f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")


def key(value: object) -> str:
    """Return a value as a text that is equal for equal values: settings may be lists."""
    return json.dumps(value, sort_keys=True, default=str)


def _has_score(row: Row) -> bool:
    return row.dev is not None and math.isfinite(row.dev)
