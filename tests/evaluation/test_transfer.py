"""SentEval's transfer protocol on small files of its formats, and its counts on the real ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold
from support.folders import DATA

from promcse_pl.evaluation.transfer import GRID, GRID_TRAIN_TEST, TRANSFER_TASKS, load_transfer, score_transfer
from promcse_pl.evaluation.transfer_data import SPLIT_FILES, TREC_CLASSES, TWO_FILES
from promcse_pl.utils.errors import DataError, NonFiniteError

WIDTH = 12


def write(path: Path, lines: list[str], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))


@pytest.fixture
def senteval(tmp_path) -> Path:
    """All seven tasks, 30 rows of each class in each split; sentences of one to five words."""
    count = iter(range(10**6))

    def text() -> str:
        number = next(count)
        return " ".join([f"s{number}", *["word"] * (number * 7 % 5)])

    for files in TWO_FILES.values():
        for file in files:
            write(tmp_path / file, [f"{text()} " for _ in range(30)], "latin-1")
    for file in SPLIT_FILES["SST-2"].values():
        write(tmp_path / file, [f"{text()}\t{row % 2}" for row in range(60)])
    for file in SPLIT_FILES["TREC"].values():
        write(tmp_path / file, [f"{TREC_CLASSES[row % 6]}:sub {text()} ?" for row in range(180)], "latin-1")
    head = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    for file in SPLIT_FILES["MRPC"].values():
        rows = [f"{row % 2}\t{row}\t{row}\t{text()}\t{text()}" for row in range(60)]
        write(tmp_path / file, [head, *rows], "utf-8-sig")
    return tmp_path


def vectors_for(data, signal: float) -> dict[str, np.ndarray]:
    """Random embeddings plus `signal` times a direction of the class (MRPC: paraphrases close to each other)."""
    chance = np.random.default_rng(1)
    vectors = {}
    for rows in data.splits.values():
        for row in rows:
            for text in row.texts:
                vectors[text] = chance.normal(size=WIDTH).astype(np.float32)
                if len(row.texts) == 1:
                    vectors[text][row.label] += signal
            if len(row.texts) == 2 and row.label and signal:
                vectors[row.texts[1]] = vectors[row.texts[0]] + vectors[row.texts[1]] / signal
    return vectors


def matrix(rows, vectors) -> tuple[np.ndarray, np.ndarray]:
    stacked = np.stack([vectors[row.texts[0]] for row in rows]).astype(np.float64)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True), np.array([row.label for row in rows])


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("task", TRANSFER_TASKS)
def test_separable_classes_are_classified_correctly(senteval, task):
    data = load_transfer(senteval, task)
    score = score_transfer(data, vectors_for(data, 20))
    assert score.accuracy > 0.97
    assert (score.f1 is not None) == (task == "MRPC")
    assert score.rows == len(score.correct_N) == len(data.splits.get("test", data.splits.get("all")))
    assert score.accuracy == score.correct_N.mean()


@pytest.mark.parametrize(("task", "chance"), [("MR", 1 / 2), ("SST-2", 1 / 2), ("TREC", 1 / 6), ("MRPC", 1 / 2)])
def test_uninformative_embeddings_score_at_chance(senteval, task, chance):
    data = load_transfer(senteval, task)
    assert abs(score_transfer(data, vectors_for(data, 0)).accuracy - chance) < 0.2


def nested(features: np.ndarray, labels: np.ndarray, seed: int) -> tuple[list[float], np.ndarray]:
    """The same protocol as plain loops around a solver of another kind, run to convergence."""
    folds = [test for _, test in StratifiedKFold(10, shuffle=True, random_state=seed).split(features, labels)]

    def right(strength: float, out: list[np.ndarray], test: np.ndarray) -> np.ndarray:
        train = np.setdiff1d(np.arange(len(labels)), np.concatenate(out))
        classifier = LogisticRegression(C=strength, tol=1e-8, max_iter=10_000).fit(features[train], labels[train])
        return classifier.predict(features[test]) == labels[test]

    chosen, correct = [], np.empty(len(labels), dtype=bool)
    for fold in folds:
        others = [other for other in folds if other is not fold]
        counts = [sum(right(strength, [fold, other], other).sum() for other in others) for strength in GRID]
        chosen.append(GRID[int(np.argmax(counts))])
        correct[fold] = right(chosen[-1], [fold], fold)
    return chosen, correct


@pytest.mark.slow
@pytest.mark.parametrize("task", ["CR", pytest.param("MR", marks=pytest.mark.exhaustive)])
def test_cross_validation_is_that_of_plain_loops(senteval, task):
    data = load_transfer(senteval, task)
    vectors = vectors_for(data, 1)
    score = score_transfer(data, vectors, seed=5)
    chosen, correct = nested(*matrix(data.splits["all"], vectors), seed=5)
    assert list(score.regularisation) == chosen
    assert len(set(chosen)) > 1
    assert (score.correct_N == correct).all()


@pytest.mark.parametrize("count", [2, pytest.param(5, marks=pytest.mark.exhaustive)])
def test_a_test_fold_does_not_affect_its_penalty(senteval, count):
    data = load_transfer(senteval, "CR")
    vectors = vectors_for(data, 1)
    rows = data.splits["all"]
    before = score_transfer(data, vectors).regularisation
    labels = [row.label for row in rows]
    others_changed = False
    folds = [test for _, test in StratifiedKFold(10, shuffle=True, random_state=1111).split(labels, labels)]
    for number, test in enumerate(folds[:count]):
        # the fold's embeddings now indicate the wrong class: using them would select another penalty
        wrong = {
            rows[position].texts[0]: np.eye(WIDTH, dtype=np.float32)[1 - rows[position].label] for position in test
        }
        after = score_transfer(data, {**vectors, **wrong})
        assert after.regularisation[number] == before[number]
        assert not after.correct_N[test].all()
        others_changed |= after.regularisation != before
    assert others_changed


@pytest.mark.parametrize("task", ["SST-2", "TREC", "MRPC"])
def test_test_rows_do_not_affect_the_penalty(senteval, task):
    data = load_transfer(senteval, task)
    vectors = vectors_for(data, 1)
    before = score_transfer(data, vectors)
    texts = [text for row in data.splits["test"] for text in row.texts]
    mixed = dict(zip(texts, [vectors[text] for text in reversed(texts)], strict=True))
    after = score_transfer(data, {**vectors, **mixed})
    assert after.regularisation == before.regularisation
    assert (after.correct_N != before.correct_N).any()


def test_dev_rows_select_the_penalty_for_sst2(senteval):
    data = load_transfer(senteval, "SST-2")
    vectors = vectors_for(data, 1)
    (train, labels), (dev, dev_labels) = (matrix(data.splits[split], vectors) for split in ("train", "dev"))
    scores = [
        LogisticRegression(C=strength, tol=1e-8, max_iter=10_000).fit(train, labels).score(dev, dev_labels)
        for strength in GRID
    ]
    assert len(set(scores)) > 1
    score = score_transfer(data, vectors)
    assert score.regularisation == (GRID[int(np.argmax(scores))],)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ten_folds_of_the_training_rows_select_the_penalty_for_trec(senteval):
    data = load_transfer(senteval, "TREC")
    vectors = vectors_for(data, 1)
    train, labels = matrix(data.splits["train"], vectors)
    counts = np.zeros(len(GRID_TRAIN_TEST))
    for kept, held in StratifiedKFold(10, shuffle=True, random_state=1111).split(train, labels):
        for position, strength in enumerate(GRID_TRAIN_TEST):
            classifier = LogisticRegression(C=strength, tol=1e-8, max_iter=10_000).fit(train[kept], labels[kept])
            counts[position] += (classifier.predict(train[held]) == labels[held]).sum()
    assert len(set(counts)) > 1
    assert score_transfer(data, vectors).regularisation == (GRID_TRAIN_TEST[int(np.argmax(counts))],)


def test_f1_is_that_of_the_paraphrases(senteval):
    data = load_transfer(senteval, "MRPC")
    score = score_transfer(data, vectors_for(data, 2))
    labels = np.array([row.label for row in data.splits["test"]])
    predicted = np.where(score.correct_N, labels, 1 - labels)
    assert 0 < score.accuracy < 1
    assert score.f1 == pytest.approx(f1_score(labels, predicted))


@pytest.mark.parametrize("task", ["CR", "TREC"])
def test_several_threads_give_the_scores_of_one(senteval, task):
    data = load_transfer(senteval, task)
    vectors = vectors_for(data, signal=0.5)
    alone = score_transfer(data, vectors)
    torch.set_num_threads(3)
    try:
        assert score_transfer(data, vectors) == alone
    finally:
        torch.set_num_threads(1)


def test_the_length_of_the_vectors_does_not_matter_and_a_second_scoring_is_the_first(senteval):
    data = load_transfer(senteval, "SUBJ")
    vectors = vectors_for(data, 1)
    longer = {text: 64 * vector for text, vector in reversed(vectors.items())}
    first, second = score_transfer(data, vectors), score_transfer(load_transfer(senteval, "SUBJ"), longer)
    assert first == second
    assert (first.correct_N == second.correct_N).all()


@pytest.mark.parametrize("task", ["CR", "SST-2", "TREC"])
def test_progress_counts_up_to_the_number_of_all_regressions(senteval, task):
    data = load_transfer(senteval, task)
    seen = []
    score_transfer(data, vectors_for(data, 1), progress=lambda done, total: seen.append((done, total)))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(set(done))
    assert set(totals) == {done[-1]}


# --- files -----------------------------------------------------------------------------------------------------------


def test_rows_are_sorted_by_words_then_by_label_then_as_the_files_have_them(tmp_path):
    write(tmp_path / "CR/custrev.pos", ["one two", "good", "fine  fine"])
    write(tmp_path / "CR/custrev.neg", ["no way", "bad"])
    data = load_transfer(tmp_path, "CR")
    assert [(row.texts[0], row.label) for row in data.splits["all"]] == [
        ("bad", 0),
        ("good", 1),
        ("no way", 0),
        ("one two", 1),
        ("fine fine", 1),
    ]
    assert (data.rows, data.expected_rows) == (5, 3775)


def test_an_empty_line_is_a_row_as_in_the_published_counts(tmp_path):
    write(tmp_path / "MPQA/mpqa.pos", ["good", "", "good", ""])
    write(tmp_path / "MPQA/mpqa.neg", ["bad"])
    data = load_transfer(tmp_path, "MPQA")
    assert data.rows == 5
    assert data.sentences() == ["", "bad", "good"]


def test_latin_1_utf_8_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    write(tmp_path / "MR/rt-polarity.pos", ["señor\r"], "latin-1")
    write(tmp_path / "MR/rt-polarity.neg", ["plain"], "latin-1")
    assert load_transfer(tmp_path, "MR").sentences() == ["plain", "señor"]
    for name in ("train", "dev", "test"):
        write(tmp_path / f"SST/binary/sentiment-{name}", [f"café {name}\t1\r"])
    assert load_transfer(tmp_path, "SST-2").splits["dev"][0].texts == ("café dev",)
    write(tmp_path / "TREC/train_5500.label", ["LOC:city Where is A Coruña ?"], "latin-1")
    write(tmp_path / "TREC/TREC_10.label", ["NUM:dist How far : is it ?"])
    trec = load_transfer(tmp_path, "TREC")
    assert [(row.texts, TREC_CLASSES[row.label]) for row in trec.splits["train"] + trec.splits["test"]] == [
        (("Where is A Coruña ?",), "LOC"),
        (("How far : is it ?",), "NUM"),
    ]
    for name in ("train", "test"):
        lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r", f'1\t7\t8\tHe said " é\tShe  {name}\r']
        write(tmp_path / f"MRPC/msr_paraphrase_{name}.txt", lines, "utf-8-sig")
    mrpc = load_transfer(tmp_path, "MRPC")
    assert mrpc.splits["train"][0].texts == ('He said " é', "She train")
    assert mrpc.splits["train"][0].label == 1


@pytest.mark.parametrize("task", TRANSFER_TASKS)
def test_the_hash_covers_every_file(senteval, task):
    files = TWO_FILES[task] if task in TWO_FILES else SPLIT_FILES[task].values()
    hashes = {load_transfer(senteval, task).sha256}
    for file in files:
        path = senteval / file
        path.write_bytes(path.read_bytes().replace(b"word", b"term", 1))
        hashes.add(load_transfer(senteval, task).sha256)
    assert len(hashes) == 1 + len(files)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "file", "line", "message"),
    [
        ("SST-2", "SST/binary/sentiment-dev", b"a phrase\t2\n", r"sentiment-dev:61: the label '2' is neither 0 nor 1"),
        ("SST-2", "SST/binary/sentiment-dev", b"a phrase\n", r"sentiment-dev:61: expected .* got 1 columns"),
        ("SST-2", "SST/binary/sentiment-train", b"\xe9\t1\n", r"sentiment-train:61: not UTF-8 \(byte 0xe9\)"),
        (
            "TREC",
            "TREC/TREC_10.label",
            b"WHO:x Who ?\n",
            r"TREC_10.label:181: expected .* ABBR, .*; got 'WHO:x Who \?'",
        ),
        ("TREC", "TREC/TREC_10.label", b"HUM:ind\n", r"TREC_10.label:181: expected a question .* got 'HUM:ind'"),
        ("MRPC", "MRPC/msr_paraphrase_test.txt", b"1\t2\t3\ta b\n", r"test.txt:62: expected 5 columns, got 4"),
        (
            "MRPC",
            "MRPC/msr_paraphrase_test.txt",
            b"yes\t2\t3\ta\tb\n",
            r"test.txt:62: the label 'yes' is neither 0 nor 1",
        ),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(senteval, task, file, line, message):
    path = senteval / file
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(DataError, match=message):
        load_transfer(senteval, task)


def test_a_missing_header_file_or_task_is_named(senteval):
    write(senteval / "MRPC/msr_paraphrase_train.txt", ["1\t2\t3\ta\tb"])
    with pytest.raises(DataError, match=r"msr_paraphrase_train.txt:1: expected the header Quality"):
        load_transfer(senteval, "MRPC")
    (senteval / "CR/custrev.neg").unlink()
    with pytest.raises(DataError, match=r"cannot read .*custrev.neg: No such file.*data.dir/senteval"):
        load_transfer(senteval, "CR")
    with pytest.raises(DataError, match=r"unknown transfer task 'SST'. Tasks: MR, CR, SUBJ"):
        load_transfer(senteval, "SST")


def test_vectors_that_cannot_be_scored_are_refused(senteval):
    data = load_transfer(senteval, "CR")
    vectors = vectors_for(data, 1)
    name = data.sentences()[3]
    with pytest.raises(NonFiniteError, match=rf"the embedding of '{name}' is not finite"):
        score_transfer(data, {**vectors, name: np.full(WIDTH, np.nan, dtype=np.float32)})
    with pytest.raises(DataError, match=rf"the embedding of '{name}' is all zeros"):
        score_transfer(data, {**vectors, name: np.zeros(WIDTH, dtype=np.float32)})
    with pytest.raises(DataError, match="same embedding"):
        score_transfer(data, dict.fromkeys(vectors, np.ones(WIDTH, dtype=np.float32)))
    with pytest.raises(DataError, match=rf"there is no embedding of '{name}'"):
        score_transfer(data, {text: vector for text, vector in vectors.items() if text != name})


def test_too_few_rows_for_ten_folds_are_refused(senteval):
    write(senteval / "CR/custrev.neg", [f"bad {row}" for row in range(9)])
    data = load_transfer(senteval, "CR")
    with pytest.raises(DataError, match=r"CR all: 10 folds need .* got 9 of class 0, 30 of class 1"):
        score_transfer(data, vectors_for(data, 1))
    write(senteval / "SST/binary/sentiment-test", [])
    data = load_transfer(senteval, "SST-2")
    with pytest.raises(DataError, match=r"SST-2 test: .* got no rows"):
        score_transfer(data, vectors_for(data, 1))


# --- the real files --------------------------------------------------------------------------------------------------


@pytest.mark.realdata
def test_the_real_tasks_have_the_published_numbers_of_rows():
    tasks = {task: load_transfer(DATA / "senteval", task) for task in TRANSFER_TASKS}
    assert {task: {split: len(rows) for split, rows in data.splits.items()} for task, data in tasks.items()} == {
        "MR": {"all": 10662},
        "CR": {"all": 3775},
        "SUBJ": {"all": 10000},
        "MPQA": {"all": 10606},
        "SST-2": {"train": 67349, "dev": 872, "test": 1821},
        "TREC": {"train": 5452, "test": 500},
        "MRPC": {"train": 4076, "test": 1725},
    }
    assert all(data.rows == data.expected_rows for data in tasks.values())
