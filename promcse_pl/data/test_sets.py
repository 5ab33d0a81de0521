"""Reject test sets as dev sets: a model selected on a test set has an optimistic test score."""

from __future__ import annotations

import re
from pathlib import Path

from promcse_pl.data.pairs import TASKS, ScoredPairs, load_task
from promcse_pl.utils.errors import ConfigError, DataError

TEST_FILES = re.compile(r"sts-test|STS\.(input|gs)\.|SICK_test_annotated|cxc-sts-test", re.IGNORECASE)
"""Names of the published test files."""
MOST_SHARED = {"STS-B": 0.1, "SICK-R": 0.1}
"""Share of a dev set's pairs that may also be test pairs of a task."""
MOST_SHARED_YEAR = 0.5
"""The same for a yearly task: STS-B was drawn from them, and 39 % of its dev pairs are test pairs of STS15."""


def refuse_test_set(path: Path, dev: ScoredPairs, senteval: Path | None) -> None:
    """Check that a dev file is no published test set, by its name and its pairs.

    Args:
        path: The file.
        dev: Its pairs.
        senteval: SentEval's data folder, to compare pairs with; None, or without a task's files: only the name is compared.

    Raises:
        ConfigError: It is a test set.
    """
    found = "by its name" if TEST_FILES.search(path.name) else _by_content(dev, senteval)
    if found:
        raise ConfigError(
            f"data.dev={path} is a test set ({found}): its scores would no longer measure generalisation. Try: data.dev=stsb "
            "(STS-B's dev set), data.dev=holdout, or another file"
        )


def _by_content(dev: ScoredPairs, senteval: Path | None) -> str | None:
    if senteval is None:
        return None
    wanted = _pairs(dev)
    for task in TASKS:
        try:
            tested = {pair for subset in load_task(senteval, task) for pair in _pairs(subset)}
        except DataError:
            continue  # the task cannot be evaluated without its files
        shared = len(wanted & tested) / len(wanted)
        if shared > MOST_SHARED.get(task, MOST_SHARED_YEAR):
            return f"{100 * shared:.0f} % of its pairs are test pairs of {task}"
    return None


def _pairs(pairs: ScoredPairs) -> set[frozenset[str]]:
    """Return the pairs without regard to order, case, punctuation and spaces."""
    return {
        frozenset(re.sub(r"\W+", "", text.casefold()) for text in pair)
        for pair in zip(pairs.first, pairs.second, strict=True)
    }
