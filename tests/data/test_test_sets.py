"""A test set is rejected as dev set, whatever its name."""

import random

import pytest
from support.folders import DATA

from promcse_pl.data.pairs import ScoredPairs, load_sick, load_stsb, load_task
from promcse_pl.data.test_sets import refuse_test_set
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
