"""Find test pairs in dev and training sets: a model selected or trained on them has an optimistic test score."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from promcse_pl.data.pairs import SUITE_TASKS, TASKS, ScoredPairs, load_task
from promcse_pl.utils.errors import ConfigError, DataError

TEST_FILES = re.compile(r"sts-test|STS\.(input|gs)\.|SICK_test_annotated|cxc-sts-test", re.IGNORECASE)
"""Names of the published test files."""
MOST_SHARED = {"STS-B": 0.1, "SICK-R": 0.1}
"""Share of a dev set's pairs that may also be test pairs of a task."""
MOST_SHARED_YEAR = 0.5
"""The same for a yearly task: STS-B was drawn from them, and 39 % of its dev pairs are test pairs of STS15."""
MOST_TRAINED = 0.05
"""Share of a task's test pairs that may also be training pairs: SICK train has 1.5 % of the test pairs of SICK-R."""


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
            "(STS-B's dev set), another file, or, for triplets, data.dev=holdout"
        )


def contaminated_tasks(pairs: Iterable[tuple[str, str]], suites: Iterable[str], senteval: Path) -> dict[str, float]:
    """Return the tasks of which more than `MOST_TRAINED` of the test pairs are training pairs, with this share.

    Args:
        pairs: The training pairs.
        suites: Suites whose tasks are compared; others than those in `SUITE_TASKS` are ignored.
        senteval: SentEval's data folder.

    Raises:
        DataError: A missing or broken file.
    """
    tests = {task: _test_pairs(senteval, task) for suite in suites for task in SUITE_TASKS.get(suite, ())}
    tested: set[frozenset[str]] = set().union(*tests.values())
    trained = tested.intersection(_normalised(*pair) for pair in pairs)
    shares = {task: len(test & trained) / len(test) for task, test in tests.items()}
    return {task: share for task, share in shares.items() if share > MOST_TRAINED}


def _by_content(dev: ScoredPairs, senteval: Path | None) -> str | None:
    if senteval is None:
        return None
    wanted = _pairs(dev)
    for task in TASKS:
        try:
            tested = _test_pairs(senteval, task)
        except DataError:
            continue  # the task cannot be evaluated without its files
        shared = len(wanted & tested) / len(wanted)
        if shared > MOST_SHARED.get(task, MOST_SHARED_YEAR):
            return f"{100 * shared:.0f} % of its pairs are test pairs of {task}"
    return None


def _test_pairs(senteval: Path, task: str) -> set[frozenset[str]]:
    return {pair for subset in load_task(senteval, task) for pair in _pairs(subset)}


def _pairs(pairs: ScoredPairs) -> set[frozenset[str]]:
    return {_normalised(*pair) for pair in zip(pairs.first, pairs.second, strict=True)}


def _normalised(first: str, second: str) -> frozenset[str]:
    """Return a pair without regard to order, case, punctuation and spaces."""
    return frozenset(re.sub(r"\W+", "", text.casefold()) for text in (first, second))
