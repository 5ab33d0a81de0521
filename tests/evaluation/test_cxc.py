"""CxC-STS on small files of its two formats."""

import csv
import json

import numpy as np
import pytest
from scipy import stats

from promcse_pl.evaluation.cxc import COLUMNS, IMAGES, PAIRS, cxc_bootstrap, load_cxc
from promcse_pl.utils.errors import DataError

TEST_IMAGES = 30


@pytest.fixture
def folder(tmp_path):
    """Thirty test images with one to four rated pairs each, and a train image that must not count."""
    chance = np.random.default_rng(0)
    images, rows = [], []
    for image in range(TEST_IMAGES):
        rated = []
        for pair in range(chance.integers(1, 5)):
            first, second = f"{image}:{pair}", f"{(image + 1) % TEST_IMAGES}:{pair}"
            rated.append([first, second, "further field"])
            score = f"{chance.uniform(0, 5):.2f}"
            rows.append([first, second, score, "c2c_cocotrain", f"a  cat {first} ,", f'a "dog" {second}\nhere'])
        images.append({"split": "test", "filename": "x.jpg", "cxc_scores": rated})
    images.insert(3, {"split": "train", "cxc_scores": []})
    (tmp_path / IMAGES).write_text(json.dumps({"images": images}))
    write_rows(tmp_path, rows)
    return tmp_path


def write_rows(folder, rows, header=COLUMNS):
    with (folder / PAIRS).open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def read_rows(folder):
    with (folder / PAIRS).open(newline="") as file:
        return list(csv.reader(file))[1:]


def predictions(data):
    return np.random.default_rng(1).normal(size=len(data.pairs))


def looped(folder, predicted, resamples=1000, seed=123):
    """The bootstrap as a plain loop: a row per drawn pair, every row of the csv that has its two captions."""
    rows = read_rows(folder)
    images = [i["cxc_scores"] for i in json.loads((folder / IMAGES).read_text())["images"] if i["split"] == "test"]
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(resamples):
        drawn = rng.choice(len(images), size=len(images) // 2)
        chosen = [images[image][rng.choice(len(images[image]), size=1)[0]][:2] for image in drawn]
        positions = [position for pair in chosen for position, row in enumerate(rows) if row[:2] == pair]
        values.append(stats.spearmanr([float(rows[p][2]) for p in positions], predicted[positions]).statistic)
    return np.array(values)


def test_every_resample_is_that_of_a_plain_loop_with_the_published_seed(folder):
    data = load_cxc(folder)
    predicted = predictions(data)
    assert cxc_bootstrap(predicted, data)[:300] == pytest.approx(looped(folder, predicted, 300), abs=1e-12)
    assert len(cxc_bootstrap(predicted, data)) == 1000


def test_a_pair_that_the_csv_rates_twice_counts_with_both_rows(folder):
    rows = read_rows(folder)
    write_rows(folder, [*rows, [*rows[2][:2], "0.33", *rows[2][3:]]])
    data = load_cxc(folder)
    predicted = predictions(data)
    assert cxc_bootstrap(predicted, data, resamples=50) == pytest.approx(looped(folder, predicted, 50), abs=1e-12)


def test_sentences_are_joined_by_single_spaces_and_files_are_named_by_their_hash(folder):
    data = load_cxc(folder)
    assert data.pairs.first[0] == "a cat 0:0 ,"
    assert data.pairs.second[0] == 'a "dog" 1:0 here'
    assert len(data.images) == TEST_IMAGES
    before = data.files
    write_rows(folder, [[*row[:2], "1.0", *row[3:]] for row in read_rows(folder)])
    after = load_cxc(folder).files
    assert (before[IMAGES] == after[IMAGES], before[PAIRS] == after[PAIRS]) == (True, False)


def test_progress_rises_to_the_number_of_resamples(folder):
    data = load_cxc(folder)
    seen = []
    cxc_bootstrap(predictions(data), data, resamples=100, progress=seen.append)
    assert seen == list(range(10, 101, 10))


def test_a_missing_file_is_named_with_where_it_comes_from_and_what_it_looks_like(folder):
    for name in (PAIRS, IMAGES):
        (folder / name).rename(folder / "away")
        with pytest.raises(DataError) as caught:
            load_cxc(folder)
        for text in (str(folder / name), "data.dir/cxc", "google-research-datasets", ",".join(COLUMNS), '"cxc_scores"'):
            assert text in str(caught.value)
        (folder / "away").rename(folder / name)


def test_a_broken_row_of_the_csv_is_named_by_its_line(folder):
    rows = read_rows(folder)
    write_rows(folder, [rows[0], [*rows[1][:2], "high", *rows[1][3:]]])
    with pytest.raises(
        DataError, match=rf"{PAIRS}:5: agg_score 'high' is not a finite number"
    ):  # a row has two lines here
        load_cxc(folder)
    write_rows(folder, [rows[0][:5]])
    with pytest.raises(DataError, match="expected 6 columns, got 5"):
        load_cxc(folder)
    write_rows(folder, rows, header=("a", "b"))
    with pytest.raises(DataError, match=r":1: the header must be caption1,.* got a,b"):
        load_cxc(folder)


def test_a_json_of_another_form_is_refused(folder):
    images = json.loads((folder / IMAGES).read_text())["images"]
    for broken, message in (
        ("[]", "has another form"),
        ("{", "has another form"),
        (json.dumps({"images": [*images, {"split": "test", "cxc_scores": []}]}), "test image 30 .* has no rated pair"),
        (
            json.dumps({"images": [*images, {"split": "test", "cxc_scores": [["x", "y"]]}]}),
            r"names the pair \('x', 'y'\)",
        ),
        (json.dumps({"images": images[:3]}), "3 test images"),
    ):
        (folder / IMAGES).write_text(broken)
        with pytest.raises(DataError, match=message):
            load_cxc(folder)
