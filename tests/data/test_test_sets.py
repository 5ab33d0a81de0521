"""A test set is rejected as dev set, whatever its name; test pairs in the training file cause a warning."""

import random
import re

import pytest
from support.folders import DATA, ROOT

from promcse_pl.data.pairs import TASKS, YEARS, ScoredPairs, load_sick, load_stsb, load_task
from promcse_pl.data.test_sets import contaminated_tasks, refuse_test_set
from promcse_pl.utils.errors import ConfigError

PAIRS = ScoredPairs.of("x", [("a", "b", 1.0), ("c", "d", 2.0)])


@pytest.mark.parametrize(
    "name", ["sts-test.csv", "my_STS-test.tsv", "STS.input.images.txt", "SICK_test_annotated.txt", "cxc-sts-test.csv"]
)
def test_the_name_of_a_published_test_file_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match=r"is a test set \(by its name\).*data\.dev=stsb"):
        refuse_test_set(tmp_path / name, PAIRS, None)


def test_another_name_is_accepted_without_test_files_to_compare_with(tmp_path):
    refuse_test_set(tmp_path / "sts-dev.csv", PAIRS, None)
    refuse_test_set(tmp_path / "mine.csv", PAIRS, tmp_path / "no such folder")


@pytest.mark.realdata
@pytest.mark.parametrize("task", ["STS-B", "SICK-R", "STS14"])
def test_test_pairs_are_recognised_by_content_if_renamed_shuffled_swapped_truncated_or_upper_case(task, tmp_path):
    subsets = load_task(DATA / "senteval", task)
    rows = [row for part in subsets for row in zip(part.second, part.first, part.gold, strict=True)]
    random.Random(0).shuffle(rows)
    changed = [(first.upper(), f" {second} !", gold) for first, second, gold in rows[:200]]
    with pytest.raises(ConfigError, match=rf"100 % of its pairs are test pairs of {task}"):
        refuse_test_set(tmp_path / "mine.csv", ScoredPairs.of("mine", changed), DATA / "senteval")


@pytest.mark.realdata
def test_published_dev_and_training_sets_are_accepted(tmp_path):
    for load in (load_stsb, load_sick):
        for split in ("dev", "train"):
            refuse_test_set(tmp_path / "mine.csv", load(DATA / "senteval", split), DATA / "senteval")


def pairs_of(scored):
    return list(zip(scored.first, scored.second, strict=True))


@pytest.mark.realdata
def test_tasks_with_training_pairs_are_found():
    senteval = DATA / "senteval"
    stsb, sick = pairs_of(load_stsb(senteval, "train")), pairs_of(load_sick(senteval, "train"))
    changed = [(second.upper(), f" {first} !") for first, second in stsb]
    for pairs in (stsb, changed):
        shares = contaminated_tasks(pairs, ["transfer", "sts", "sick"], senteval)
        assert list(shares) == list(YEARS)  # neither STS-B (0.9 %) nor SICK-R (1.1 %)
        assert {task: round(100 * share) for task, share in shares.items()} == {
            "STS12": 34,
            "STS13": 40,
            "STS14": 50,
            "STS15": 37,
            "STS16": 17,
        }
    assert contaminated_tasks(stsb, ["sick"], senteval) == {}
    assert contaminated_tasks(sick, ["sts", "sick"], senteval) == {}
    assert contaminated_tasks(pairs_of(load_sick(senteval, "test")), ["sick"], senteval) == {"SICK-R": 1.0}
    assert contaminated_tasks([], ["sts"], senteval) == {}


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("split", "shared", "distinct", "page"),
    [
        ("train", 4735, 5686, "docs/evaluation.md"),
        ("dev", 1135, 1496, "docs/evaluation.md"),
        ("dev", 1135, 1496, "experiments/paper/README.md"),
    ],
)
def test_the_documented_share_of_stsb_in_the_test_sets_equals_that_of_a_plain_loop(split, shared, distinct, page):
    def key(first, second):
        return frozenset("".join(c for c in text.casefold() if c.isalnum() or c == "_") for text in (first, second))

    tests = {key(*pair) for task in TASKS for part in load_task(DATA / "senteval", task) for pair in pairs_of(part)}
    pairs = {key(*pair) for pair in pairs_of(load_stsb(DATA / "senteval", split))}
    assert (len(pairs & tests), len(pairs)) == (shared, distinct)
    words = " ".join((ROOT / page).read_text().split())
    assert re.search(rf"{100 * shared / distinct:.0f} % (of STS-B {split} )?are test pairs", words)
