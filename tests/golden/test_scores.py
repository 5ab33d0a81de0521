"""Every number of the official STS evaluation, from the official checkpoint and the public test files.

Spearman is decided by the order of the cosines, and float32 leaves the order of some open: pairs of twice the same sentence
have cosine 1, and the official code ranks them by rounding errors (here they tie). The tolerance is therefore 1e-6 plus what
tying or reordering cosines that are nearer than 1e-6 can do.
"""

import numpy as np
import pytest
from support.folders import DATA, GOLDEN
from support.official import read_json

from promcse_pl.data.pairs import SICK_FILES, STSB_FILES, YEARS, load_sick, load_stsb, load_task
from promcse_pl.embedder import PromCSE
from promcse_pl.evaluation.sts import cosines, encode_distinct, score_task, spearman
from promcse_pl.interop.official import import_official

pytestmark = [pytest.mark.golden, pytest.mark.realdata, pytest.mark.slow]
FOLDERS = sorted(path.parent for path in GOLDEN.glob("eval_sts_*/expected.json"))
TOLERANCE = 1e-6
"""In correlation: 1e-4 of a point on the scale of 0 to 100."""
OURS = {"STSBenchmark": "STS-B test", "SICKRelatedness": "SICK-R test"}
WORST: dict[str, float] = {}
WHAT = f"{len(FOLDERS)} STS evaluations"


def _folders():
    """Return all folders; those after the first are exhaustive."""
    return [
        pytest.param(path, id=path.name, marks=[pytest.mark.exhaustive] if number else [])
        for number, path in enumerate(FOLDERS)
    ]


@pytest.fixture(scope="module", params=_folders())
def evaluation(request):
    """The folder, the pairs by official task name, our embeddings and our scores."""
    expected = read_json(request.param / "expected.json")
    imported = import_official(request.param, pooling=expected["pooler_type"])
    assert imported.encoder.prompt.length == expected["pre_seq_len"]
    senteval = DATA / "senteval"
    groups = {year: load_task(senteval, year) for year in YEARS}
    groups["STSBenchmark"] = [load_stsb(senteval, split) for split in STSB_FILES]
    groups["SICKRelatedness"] = [load_sick(senteval, split) for split in SICK_FILES]
    vectors = encode_distinct(
        PromCSE(imported.encoder).encode, [subset for group in groups.values() for subset in group]
    )
    return request.param, groups, vectors, {task: score_task(subsets, vectors) for task, subsets in groups.items()}


def left_open(predicted, gold):
    """Return how much Spearman can change if cosines closer than 1e-6 tie or are reordered."""
    order = np.argsort(predicted)
    cluster = np.empty(len(order))
    cluster[order] = np.cumsum(np.diff(np.asarray(predicted)[order], prepend=0) > 1e-6)
    extremes = [spearman(cluster, gold)]
    for sign in (1, -1):
        position = np.empty(len(order))
        position[np.lexsort((sign * np.asarray(gold), cluster))] = np.arange(len(order))
        extremes.append(spearman(position, gold))
    return max(extremes) - min(extremes)


def check(kind, ours, official, slack=0.0):
    kind += "" if slack == 0 else " where cosines nearly tie"
    WORST[kind] = max(WORST.get(kind, 0.0), abs(ours - official))
    assert ours == pytest.approx(official, abs=TOLERANCE + slack, rel=0), kind


def test_every_correlation_equals_the_official_one(evaluation):
    folder, groups, vectors, scores = evaluation
    official = read_json(folder / "expected.json")["results"]
    assert set(scores) == set(official)
    for task, subsets in groups.items():
        result, expected = scores[task], official[task]
        assert {*(subset.name.split()[-1] for subset in subsets), "all"} == set(expected)
        predicted = [cosines(subset, vectors) for subset in subsets]
        slack = [left_open(cosine, subset.gold) for subset, cosine in zip(subsets, predicted, strict=True)]
        for subset, open_here in zip(subsets, slack, strict=True):
            ours, numbers = result.subsets[subset.name], expected[subset.name.split()[-1]]
            assert ours.pairs == numbers["nsamples"]
            check("Pearson", ours.pearson, numbers["pearson"][0])
            check("Spearman", ours.spearman, numbers["spearman"][0], open_here)
        for measure, name, every in (("pearson", "Pearson", 0.0), ("spearman", "Spearman", 1.0)):
            whole = expected["all"][measure]
            assert set(whole) == {"all", "mean", "wmean"}
            joint = left_open(np.concatenate(predicted), [score for subset in subsets for score in subset.gold])
            weighted = np.average(slack, weights=[len(subset) for subset in subsets])
            check(name, getattr(result.all, measure), whole["all"], every * joint)
            check(name, result.mean(measure), whole["mean"], every * np.mean(slack))
            check(name, result.mean(measure, weighted=True), whole["wmean"], every * weighted)


def test_the_printed_table_is_the_official_one_to_its_last_digit(evaluation):
    folder, _, _, scores = evaluation
    printed = (folder / "evaluation_stdout.txt").read_text().splitlines()
    row = next(line for line in printed if line.startswith("|") and "STS12" not in line)
    official = [float(cell) for cell in row.strip("|").split("|")]
    shown = [result.subsets[OURS[task]] if task in OURS else result.all for task, result in scores.items()]
    cells = [round(100 * part.spearman, 2) for part in shown]
    cells.append(round(sum(cells) / len(cells), 2))  # the average is that of the rounded cells
    assert cells == pytest.approx(official, abs=0.0101, rel=0)
    assert sum(a == b for a, b in zip(cells, official, strict=True)) >= len(cells) - 2
