"""Evaluate targets on tasks: embeddings, scores with intervals, comparisons with verdicts, as a tree of plain values."""

# b resamples

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from promcse_pl.data.pairs import TASKS
from promcse_pl.evaluation.embeddings import EmbeddingCache
from promcse_pl.evaluation.statistics import (
    LEVEL,
    RESAMPLES,
    SEED,
    mean_over_seeds,
    paired_difference,
    seed_difference,
)
from promcse_pl.evaluation.sts import score_warning
from promcse_pl.evaluation.targets import Member, Target
from promcse_pl.evaluation.tasks import Score, Task
from promcse_pl.evaluation.transfer_data import TRANSFER_TASKS
from promcse_pl.version import __version__

Tree = dict[str, Any]
Report = Callable[[str, int, int], None]
"""Called with the current stage, its steps done so far and of all."""
PACKAGES = ("torch", "transformers", "numpy", "scipy", "scikit-learn")
"""Packages whose versions are recorded in the results, in addition to this package's."""
AVERAGES = {"Avg": ("sts", "Spearman x 100", TASKS), "Avg transfer": ("transfer", "accuracy x 100", TRANSFER_TASKS)}
"""Mean scores in the papers: their suite, unit and tasks."""
_Scored = list[tuple[Tree, dict[str, Score]]]
"""Of each member of a target: its description, and its scores by task."""


def evaluate(
    targets: Sequence[Target], tasks: Sequence[Task], cache: EmbeddingCache, report: Report = lambda *_: None
) -> Tree:
    """Score every target on every task and compare each target with the first.

    Every distinct sentence of all tasks is encoded once for each model.

    Args:
        targets: Models to score, with different names.
        tasks: Tasks to score them on, with different names.
        cache: Cache of the embeddings.
        report: Called with the progress.

    Returns:
        `targets`: of each target by its name, kind, members (hash of all that affects the embeddings, seed), and scores by task;
        `tasks`: of each task its suite, unit, protocol, rows, rows as published, and files with their sha256;
        `comparisons`: of each target with the first, by task: difference, interval, p-value, resamples or seeds, verdict;
        `warnings`; `bootstrap`; `versions`.

    Raises:
        DataError, NonFiniteError: Embeddings or scores that are constant or not finite.
    """
    scored: dict[str, _Scored] = {}
    for target in targets:
        scored[target.name] = []
        for number, member in enumerate(target.members, start=1):
            label = f"{target.name} {number}/{len(target.members)}" if len(target.members) > 1 else target.name
            scored[target.name].append(_score(member, label, tasks, cache, report))
    first, *others = scored
    return {
        "targets": {
            target.name: {
                "kind": target.kind,
                "members": [about for about, _ in scored[target.name]],
                "scores": _summarised([scores for _, scores in scored[target.name]]),
            }
            for target in targets
        },
        "tasks": _about_tasks(tasks, scored[first][0][1]),
        "comparisons": [
            {"first": first, "second": name, "task": task, **_compared(task, scored[first], scored[name])}
            for name in others
            for task, score in scored[name][0][1].items()
            if score.resamples_b is not None  # geometry has no better or worse
        ],
        "warnings": _warnings(tasks, scored),
        "bootstrap": {"resamples": RESAMPLES, "seed": SEED, "level": LEVEL},
        "versions": {
            "promcse_pl": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
    }


def _score(
    member: Member, label: str, tasks: Sequence[Task], cache: EmbeddingCache, report: Report
) -> tuple[Tree, dict[str, Score]]:
    """Load a model, encode all sentences once and score every task."""
    model, results = member.load(), Path(cache.folder) / "mteb"
    for task in tasks:
        if task.load_data is not None:  # an unreachable data set is reported before anything is encoded
            report(f"{label}: data of {task.name}", 0, 1)
            task.load_data(model, results)
    sentences = {text for task in tasks for text in task.sentences}
    embeddings = cache.embeddings(model, sentences, lambda done: report(f"{label}: encoding", done, len(sentences)))
    scores = {}
    for task in tasks:
        stage = f"{label}: {task.name}"
        report(stage, 0, 1)
        if task.score_model is not None:
            scores[task.name] = task.score_model(model, results)
        else:
            assert task.score is not None
            scores[task.name] = task.score(embeddings, partial(report, stage))
    encoder = model.encoder
    about = {
        "sha256": model.adapter_hash(),
        "encoder": encoder.backbone.identity.name,
        "pooling": encoder.pooling,
        "precision": encoder.backbone.precision,
        "device": encoder.backbone.device.type,
        "seed": member.seed,
    }
    return about, _with_averages(scores)


def _with_averages(scores: dict[str, Score]) -> dict[str, Score]:
    """Insert each average that is complete after the last of its tasks."""
    items = list(scores.items())
    for name, (_, _, tasks) in AVERAGES.items():
        if set(tasks) <= set(scores):
            # the printed average is that of the printed cells
            value = float(np.mean([round(scores[task].value, 2) for task in tasks]))
            resamples_b = np.mean([scores[task].resamples_b for task in tasks], axis=0)  # type: ignore[arg-type]
            last = max(index for index, (task, _) in enumerate(items) if task in tasks)
            items.insert(last + 1, (name, Score.of(value, resamples_b, {})))
    return dict(items)


def _summarised(members: Sequence[dict[str, Score]]) -> Tree:
    """Return the scores of one model, or their mean over seeds with its spread and each seed's scores."""
    each = [
        {
            task: {"value": score.value, "low": score.low, "high": score.high, **score.details}
            for task, score in one.items()
        }
        for one in members
    ]
    if len(each) == 1:
        return each[0]
    summary = {}
    for task in each[0]:
        seeds = [scores[task] for scores in each]
        mean, std, low, high = mean_over_seeds([seed["value"] for seed in seeds])
        summary[task] = {"value": mean, "low": low, "high": high, "std_over_seeds": std, "seeds": seeds}
    return summary


def _about_tasks(tasks: Sequence[Task], scores: dict[str, Score]) -> Tree:
    about: Tree = {
        task.name: {
            "suite": task.suite,
            "unit": task.unit,
            "protocol": task.protocol,
            "rows": task.rows,
            "published_rows": task.expected_rows,
            "files": task.files,
        }
        for task in tasks
    }
    for name, (suite, unit, parts) in AVERAGES.items():
        if name in scores:
            protocol = (
                f"mean of {', '.join(parts)}, each rounded to two decimals; interval: of the means of their resamples"
            )
            about[name] = {"suite": suite, "unit": unit, "protocol": protocol}
    return about


def _warnings(tasks: Sequence[Task], scored: dict[str, _Scored]) -> list[str]:
    found = [
        f"{task.name} has {task.rows} rows, {task.expected_rows} were published: its score is not comparable"
        for task in tasks
        if task.expected_rows not in (None, task.rows)
    ]
    for task in tasks:
        if task.suite == "own":
            for name, members in scored.items():
                warning = score_warning(members[0][1][task.name].value / 100, task.name)
                found += [f"{name} on {task.name}: {warning}"] if warning else []
    return found


def _compared(task: str, first: _Scored, second: _Scored) -> Tree:
    """Compare two targets: over seeds if one has several, else over resamples of the data."""
    ones, others = ([scores[task] for _, scores in side] for side in (first, second))
    one_b, other_b = ones[0].resamples_b, others[0].resamples_b
    if len(ones) > 1 or len(others) > 1:
        difference = seed_difference([score.value for score in ones], [score.value for score in others])
    else:
        assert one_b is not None
        assert other_b is not None
        value = others[0].value - ones[0].value
        difference = paired_difference(value, other_b - one_b, f"{len(one_b)} resamples")
    return {
        "difference": difference.value,
        "low": difference.low,
        "high": difference.high,
        "p": difference.p,
        "over": difference.over,
        "verdict": difference.verdict,
    }
