"""Several targets on several tasks: scores with intervals, differences with verdicts, and what they rest on, as a plain tree."""

# b resamples

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from promcse_pl.data.pairs import TASKS
from promcse_pl.evaluation.embeddings import EmbeddingCache
from promcse_pl.evaluation.statistics import (
    LEVEL,
    RESAMPLES,
    SEED,
    interval,
    mean_over_seeds,
    paired_difference,
    seed_difference,
)
from promcse_pl.evaluation.targets import Target
from promcse_pl.evaluation.tasks import Score, Task
from promcse_pl.version import __version__

Tree = dict[str, Any]
Report = Callable[[str, int, int], None]
"""Called with what is being done, the steps done so far and of all."""
PACKAGES = ("torch", "transformers", "numpy", "scipy", "scikit-learn")
"""Whose versions stand in the results, beside our own."""
AVERAGES = {"Avg": TASKS, "Avg transfer": ("MR", "CR", "SUBJ", "MPQA", "SST-2", "TREC", "MRPC")}
"""Mean scores that the papers print, and the tasks they are of."""


def evaluate(
    targets: Sequence[Target], tasks: Sequence[Task], cache: EmbeddingCache, report: Report = lambda *_: None
) -> Tree:
    """Score every target on every task and compare each target with the first.

    Every distinct sentence of all tasks is encoded once for each model.

    Args:
        targets: What to score, with different names.
        tasks: On what, with different names.
        cache: Where vectors are kept.
        report: Told how far it is.

    Returns:
        `targets`: of each target by its name, kind, members (hash of what decides the vectors, seed), and scores by task;
        `tasks`: of each task its suite, unit, protocol, rows, rows as published, and files with their sha256;
        `comparisons`: of each target with the first, by task: difference, interval, p-value, what was drawn anew, verdict;
        `warnings`; `bootstrap`; `versions`.

    Raises:
        DataError, NonFiniteError: Vectors or scores that are constant or not finite.
    """
    found = {target.name: _score_target(target, tasks, cache, report) for target in targets}
    names = [*found]
    return {
        "targets": {
            target.name: {
                "kind": target.kind,
                "members": [about for about, _ in found[target.name]],
                "scores": _tree([scores for _, scores in found[target.name]]),
            }
            for target in targets
        },
        "tasks": {task.name: _about(task) for task in tasks} | _about_averages(found[names[0]][0][1]),
        "comparisons": [
            {"first": names[0], "second": name, "task": task, **_compared(task, found[names[0]], found[name])}
            for name in names[1:]
            for task, score in found[name][0][1].items()
            if score.resamples_b is not None  # of the geometry nobody says which way is better
        ],
        "warnings": [
            f"{task.name} has {task.rows} rows, {task.expected_rows} were published: its score is not comparable"
            for task in tasks
            if task.expected_rows not in (None, task.rows)
        ],
        "bootstrap": {"resamples": RESAMPLES, "seed": SEED, "level": LEVEL},
        "versions": {
            "promcse_pl": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
    }


_Scored = list[tuple[Tree, dict[str, Score]]]
"""Of each member of a target what it is, and its scores by task."""


def _score_target(target: Target, tasks: Sequence[Task], cache: EmbeddingCache, report: Report) -> _Scored:
    sentences = {text for task in tasks for text in task.sentences}
    found: _Scored = []
    for number, member in enumerate(target.members, start=1):
        label = f"{target.name} {number}/{len(target.members)}" if len(target.members) > 1 else target.name
        model = member.load()
        vectors = cache.embeddings(
            model,
            sentences,
            lambda done, label=label: report(f"{label}: encoding", done, len(sentences)),  # type: ignore[misc]
        )
        scores = {}
        for task in tasks:
            what = f"{label}: {task.name}"
            report(what, 0, 1)
            scores[task.name] = task.score(vectors, lambda done, total, what=what: report(what, done, total))  # type: ignore[misc]
        encoder = model.encoder
        about = {
            "sha256": model.adapter_hash(),
            "encoder": encoder.backbone.identity.name,
            "pooling": encoder.pooling,
            "precision": encoder.backbone.precision,
            "device": encoder.backbone.device.type,
            "seed": member.seed,
        }
        found.append((about, _with_averages(scores)))
    return found


def _with_averages(scores: dict[str, Score]) -> dict[str, Score]:
    """Put each average that is complete behind the last of its tasks."""
    ordered = dict(scores)
    for name, tasks in AVERAGES.items():
        if not set(tasks) <= set(scores):
            continue
        # the printed average is that of the printed cells
        value = float(np.mean([round(scores[task].value, 2) for task in tasks]))
        resamples_b = np.mean([scores[task].resamples_b for task in tasks], axis=0)  # type: ignore[arg-type]
        last = max(list(ordered).index(task) for task in tasks) + 1
        items = list(ordered.items())
        average = Score(value, *interval(resamples_b), {}, resamples_b)
        ordered = dict([*items[:last], (name, average), *items[last:]])
    return ordered


def _tree(members: Sequence[dict[str, Score]]) -> Tree:
    """Return the scores of one model, or their mean over seeds with its spread and each seed's scores."""
    if len(members) == 1:
        return {task: _plain(score) for task, score in members[0].items()}
    tree = {}
    for task in members[0]:
        mean, std, low, high = mean_over_seeds([scores[task].value for scores in members])
        each = [_plain(scores[task]) for scores in members]
        tree[task] = {"value": mean, "low": low, "high": high, "std_over_seeds": std, "seeds": each}
    return tree


def _plain(score: Score) -> Tree:
    return {"value": score.value, "low": score.low, "high": score.high, **score.details}


def _about(task: Task) -> Tree:
    return {
        "suite": task.suite,
        "unit": task.unit,
        "protocol": task.protocol,
        "rows": task.rows,
        "published_rows": task.expected_rows,
        "files": task.files,
    }


def _about_averages(scores: dict[str, Score]) -> Tree:
    return {
        name: {
            "suite": "transfer" if name == "Avg transfer" else "sts",
            "unit": "accuracy x 100" if name == "Avg transfer" else "Spearman x 100",
            "protocol": f"mean of {', '.join(tasks)}, each rounded to two decimals; interval: of the means of their resamples",
        }
        for name, tasks in AVERAGES.items()
        if name in scores
    }


def _compared(task: str, first: _Scored, second: _Scored) -> Tree:
    """Judge the difference of two targets: over seeds if one has several, else over resamples of the data."""
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
