"""SentEval's protocol on small files of its layout, and its counts on the real ones."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from support.folders import DATA

from promcse_pl import PromCSE
from promcse_pl.data.pairs import TASKS, YEARS, ScoredPairs, load_sick, load_stsb, load_task
from promcse_pl.evaluation.sts import (
    LOWEST_PLAUSIBLE,
    TaskScores,
    encode_distinct,
    score_pairs,
    score_task,
    score_warning,
)
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.utils.errors import DataError


def angle_of(sentence: str) -> float:
    """A deterministic angle in [0, 1.5) computed from the letters of a sentence."""
    return 1.5 * int(hashlib.sha256(sentence.encode()).hexdigest()[:8], 16) / 16**8


class Encoder:
    """Unit vectors in the plane; keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, sentences: Sequence[str]) -> np.ndarray:
        self.calls.append(list(sentences))
        return np.array([[math.cos(angle_of(text)), math.sin(angle_of(text))] for text in sentences], dtype=np.float32)


def scores_of(encode, senteval: Path, tasks: Sequence[str] = TASKS) -> dict[str, TaskScores]:
    groups = {task: load_task(senteval, task) for task in tasks}
    embeddings = encode_distinct(encode, [subset for subsets in groups.values() for subset in subsets])
    return {task: score_task(subsets, embeddings) for task, subsets in groups.items()}


def cosine(first: str, second: str) -> float:
    return math.cos(angle_of(first) - angle_of(second))


def subset_rows(seed: int, rows: int) -> list[tuple[str, str, str]]:
    chance = np.random.default_rng(seed)
    texts = [f"sentence {position} of {seed}" for position in range(2 * rows)]
    return [
        (texts[2 * row], texts[2 * row + 1], f"{score:.1f}") for row, score in enumerate(chance.uniform(0, 5, rows))
    ]


@pytest.fixture
def senteval(tmp_path) -> Path:
    """All seven tasks; the subsets of a year differ in size."""
    seed = 0
    for year, subsets in YEARS.items():
        folder = tmp_path / f"STS/{year}-en-test"
        folder.mkdir(parents=True)
        for subset in subsets:
            seed += 1
            rows = subset_rows(seed, 4 + 3 * (seed % 4))
            (folder / f"STS.input.{subset}.txt").write_text("".join(f"{a}\t{b}\n" for a, b, _ in rows))
            (folder / f"STS.gs.{subset}.txt").write_text("".join(f"{gold}\n" for *_, gold in rows))
    benchmark, sick = tmp_path / "STS/STSBenchmark", tmp_path / "SICK"
    benchmark.mkdir()
    sick.mkdir()
    for number, split in enumerate(("train", "dev", "test")):
        rows = subset_rows(100 + number, 5)
        (benchmark / f"sts-{split}.csv").write_text("".join(f"g\tf\ty\t1\t{gold}\t{a}\t{b}\n" for a, b, gold in rows))
    for number, name in enumerate(("SICK_train", "SICK_trial", "SICK_test_annotated")):
        rows = subset_rows(200 + number, 6)
        head = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
        (sick / f"{name}.txt").write_text(head + "".join(f"1\t{a}\t{b}\t{gold}\tNEUTRAL\n" for a, b, gold in rows))
    return tmp_path


def year_file(senteval: Path, kind: str, subset: str = "images", year: str = "STS15") -> Path:
    return senteval / f"STS/{year}-en-test/STS.{kind}.{subset}.txt"


# --- scores ----------------------------------------------------------------------------------------------------------


def test_a_task_is_scored_over_all_pairs_together_by_subset_mean_and_weighted_mean(senteval):
    scores = scores_of(Encoder(), senteval)
    assert list(scores) == list(TASKS)
    seed = 0
    for year, subsets in YEARS.items():
        cosines, golds, single = [], [], []
        for subset in subsets:
            seed += 1
            rows = subset_rows(seed, 4 + 3 * (seed % 4))
            predicted, gold = [cosine(a, b) for a, b, _ in rows], [float(score) for *_, score in rows]
            single.append((len(rows), stats.spearmanr(predicted, gold).statistic))
            assert scores[year].subsets[subset].spearman == pytest.approx(single[-1][1], abs=1e-6)
            assert scores[year].subsets[subset].pearson == pytest.approx(
                stats.pearsonr(predicted, gold).statistic, abs=1e-5
            )
            cosines += predicted
            golds += gold
        together = stats.spearmanr(cosines, golds).statistic
        mean = sum(score for _, score in single) / len(single)
        weighted = sum(pairs * score for pairs, score in single) / sum(pairs for pairs, _ in single)
        assert scores[year].all.spearman == pytest.approx(together, abs=1e-6)
        assert scores[year].all.pairs == len(golds)
        assert scores[year].mean() == pytest.approx(mean, abs=1e-6)
        assert scores[year].mean(weighted=True) == pytest.approx(weighted, abs=1e-6)
        assert len({round(value, 4) for value in (together, mean, weighted)}) == 3, "the three must differ here"


def test_the_benchmark_and_sick_are_scored_on_their_test_split(senteval):
    scores = scores_of(Encoder(), senteval, ["STS-B", "SICK-R"])
    for task, seed, rows in (("STS-B", 102, 5), ("SICK-R", 202, 6)):
        pairs = subset_rows(seed, rows)
        wanted = stats.spearmanr([cosine(a, b) for a, b, _ in pairs], [float(gold) for *_, gold in pairs]).statistic
        assert scores[task].all.spearman == pytest.approx(wanted, abs=1e-6)
        assert scores[task].all.pairs == rows


def test_every_distinct_sentence_of_all_tasks_is_encoded_exactly_once(senteval):
    year_file(senteval, "input").write_text("".join(f"same text\tsame text{'!' * (row % 3)}\n" for row in range(7)))
    year_file(senteval, "gs").write_text("".join(f"{row % 4}\n" for row in range(7)))
    encoder = Encoder()
    scores_of(encoder, senteval)
    (sentences,) = encoder.calls
    assert len(sentences) == len(set(sentences))
    groups = [pairs for task in TASKS for pairs in load_task(senteval, task)]
    assert set(sentences) == {text for pairs in groups for text in (*pairs.first, *pairs.second)}
    assert sum(2 * len(pairs) for pairs in groups) > len(sentences)


def test_one_set_of_pairs_is_scored_as_a_task_of_one_subset(senteval):
    pairs = load_stsb(senteval, "test")
    assert score_pairs(Encoder(), pairs) == scores_of(Encoder(), senteval, ["STS-B"])["STS-B"].all


@pytest.mark.parametrize("score", [-0.8, 0.0, LOWEST_PLAUSIBLE - 1e-6])
def test_a_score_near_zero_or_below_is_a_warning_about_columns_and_scale(score):
    warning = score_warning(score, "data.dev=my.csv")
    assert f"Spearman {100 * score:.2f}" in warning
    assert "Check the columns of data.dev=my.csv, and that higher scores mean more similar" in warning
    assert score_warning(LOWEST_PLAUSIBLE, "x") is None


# --- files -----------------------------------------------------------------------------------------------------------


def test_pairs_without_a_gold_score_are_dropped(senteval):
    before = load_task(senteval, "STS15")[-1]
    lines = year_file(senteval, "gs").read_text().splitlines()
    lines[1], lines[-1] = "", "  "
    year_file(senteval, "gs").write_text("\n".join(lines) + "\n")
    after = load_task(senteval, "STS15")[-1]
    kept = [position for position in range(len(before)) if position not in (1, len(before) - 1)]
    assert after.first == tuple(before.first[position] for position in kept)
    assert after.second == tuple(before.second[position] for position in kept)
    assert after.gold == tuple(before.gold[position] for position in kept)
    assert after.sha256 != before.sha256


def test_white_space_is_joined_to_single_spaces_and_case_and_marks_are_kept(senteval):
    year_file(senteval, "input").write_text("  A  Man\u00a0eats , \tB   two \n" * 2)
    year_file(senteval, "gs").write_text("1\n2\n")
    pairs = load_task(senteval, "STS15")[-1]
    assert (pairs.first[0], pairs.second[0]) == ("A Man eats ,", "B two")


def test_windows_line_ends_change_nothing(senteval):
    before = [load_task(senteval, task) for task in TASKS]
    for path in senteval.rglob("*.*"):
        if path.is_file():
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    after = [load_task(senteval, task) for task in TASKS]
    assert [[(p.first, p.second, p.gold) for p in task] for task in after] == [
        [(p.first, p.second, p.gold) for p in task] for task in before
    ]


def test_the_splits_of_the_benchmark_and_of_sick_are_their_own_files(senteval):
    for load, first_seed, rows in ((load_stsb, 100, 5), (load_sick, 200, 6)):
        for number, split in enumerate(("train", "dev", "test")):
            wanted = subset_rows(first_seed + number, rows)
            pairs = load(senteval, split)
            assert list(zip(pairs.first, pairs.second, map(str, pairs.gold), strict=True)) == wanted


def test_a_missing_file_is_named_with_where_it_should_come_from(senteval):
    year_file(senteval, "gs").unlink()
    with pytest.raises(DataError, match=r"cannot read .*STS\.gs\.images\.txt: .*data\.dir/senteval"):
        load_task(senteval, "STS15")


def test_unequal_numbers_of_lines_are_refused(senteval):
    path = year_file(senteval, "gs")
    lines = len(path.read_text().splitlines())
    path.write_text(path.read_text() + "3.0\n")
    with pytest.raises(DataError, match=rf"STS\.input\.images\.txt has {lines} lines, .*images\.txt has {lines + 1}"):
        load_task(senteval, "STS15")


@pytest.mark.parametrize(
    ("name", "line", "content", "message"),
    [
        ("STS/STS15-en-test/STS.gs.images.txt", 2, "high", "the score 'high' is not a finite number"),
        ("STS/STS15-en-test/STS.gs.images.txt", 2, "nan", "the score 'nan' is not a finite number"),
        (
            "STS/STS15-en-test/STS.input.images.txt",
            3,
            "only one sentence",
            "expected two sentences with a tab between them",
        ),
        ("STS/STSBenchmark/sts-test.csv", 4, "g\tf\ty\t1\t?\ta\tb", "the score '?' is not a finite number"),
        ("STS/STSBenchmark/sts-test.csv", 4, "g\tf\ty\t1\tinf\ta\tb", "the score 'inf' is not a finite number"),
        ("STS/STSBenchmark/sts-test.csv", 1, "g\tf", "expected 7 columns, got 2"),
        ("SICK/SICK_test_annotated.txt", 2, "1\ta\tb", "expected 4 columns, got 3"),
    ],
)
def test_a_broken_line_is_named_by_file_and_line(name, line, content, message, senteval):
    path = senteval / name
    lines = path.read_text().splitlines()
    lines[line - 1] = content
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError) as caught:
        scores_of(Encoder(), senteval)
    assert str(caught.value).startswith(f"{path}:{line}: {message}")


def test_a_line_that_is_not_utf8_is_reported_by_number(senteval):
    path = senteval / "STS/STSBenchmark/sts-test.csv"
    content = path.read_bytes().split(b"\n")
    content[2] += b"\xe9"
    path.write_bytes(b"\n".join(content))
    with pytest.raises(DataError, match=r"sts-test\.csv:3: not UTF-8 \(byte 0xe9\)"):
        load_stsb(senteval, "test")


def test_a_file_without_pairs_is_refused(senteval):
    (senteval / "STS/STSBenchmark/sts-dev.csv").write_text("")
    with pytest.raises(DataError, match=r"sts-dev\.csv has no pairs"):
        load_stsb(senteval, "dev")


def test_pairs_name_their_data_by_a_hash_that_follows_every_change():
    rows = [("a", "b", 1.0), ("c", "d", 2.0)]
    digest = ScoredPairs.of("x", rows).sha256
    assert len(digest) == 64
    assert ScoredPairs.of("y", rows).sha256 == digest
    assert ScoredPairs.of("x", [("a", "b", 1.0), ("c", "d", 3.0)]).sha256 != digest
    assert ScoredPairs.of("x", rows, "0" * 64).sha256 == "0" * 64


# --- the real files --------------------------------------------------------------------------------------------------


@pytest.mark.realdata
def test_the_real_tasks_have_the_published_numbers_of_pairs():
    counts = {task: sum(map(len, load_task(DATA / "senteval", task))) for task in TASKS}
    assert counts == {
        "STS12": 3108,
        "STS13": 1500,
        "STS14": 3750,
        "STS15": 3000,
        "STS16": 1186,
        "STS-B": 1379,
        "SICK-R": 4927,
    }
    assert len(load_stsb(DATA / "senteval", "dev")) == 1500
    assert len(load_stsb(DATA / "senteval", "train")) == 5749
    assert (len(load_sick(DATA / "senteval", "train")), len(load_sick(DATA / "senteval", "dev"))) == (4500, 500)


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.exhaustive
def test_frozen_minilm_has_its_known_score_on_the_dev_set():
    backbone = FrozenBackbone.load("sentence-transformers/all-MiniLM-L6-v2")
    encoder = PromptEncoder(backbone, length=0, pooling="avg", head="none").eval()
    score = score_pairs(PromCSE(encoder).encode, load_stsb(DATA / "senteval", "dev")).spearman
    assert 100 * score == pytest.approx(86.72, abs=0.05)
