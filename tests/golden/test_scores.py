"""Every number of the official STS evaluation, from the official checkpoint and the public test files."""

import pytest
from conftest import DATA, GOLDEN
from golden.official import read_json

from promcse_pl.adapter.official import import_official
from promcse_pl.embedder import PromCSE
from promcse_pl.evaluation.sts import SICK_FILES, STSB_FILES, YEARS, load_sick, load_stsb, load_task, score_groups

pytestmark = [pytest.mark.golden, pytest.mark.realdata]
FOLDERS = sorted(path.parent for path in GOLDEN.glob("eval_sts_*/expected.json"))
TOLERANCE = 1e-6
"""In correlation: 1e-4 of a point on the scale of 0 to 100."""
WORST: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def _print_worst(request):
    yield
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    for kind, error in sorted(WORST.items()):
        reporter.write_line(f"\nofficial parity, {len(FOLDERS)} STS evaluations, {kind}: worst error {error:.1e} in correlation")


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda path: path.name)
def evaluation(request):
    """Our scores by the official task names, and the official numbers."""
    expected = read_json(request.param / "expected.json")
    imported = import_official(request.param, pooling=expected["pooler_type"])
    assert imported.encoder.prompt.length == expected["pre_seq_len"]
    senteval = DATA / "senteval"
    groups = {year: load_task(senteval, year) for year in YEARS}
    groups["STSBenchmark"] = [load_stsb(senteval, split) for split in STSB_FILES]
    groups["SICKRelatedness"] = [load_sick(senteval, split) for split in SICK_FILES]
    return request.param, score_groups(PromCSE(imported.encoder).encode, groups), expected["results"]


def check(kind, ours, official):
    WORST[kind] = max(WORST.get(kind, 0.0), abs(ours - official))
    assert ours == pytest.approx(official, abs=TOLERANCE, rel=0), kind


def test_every_correlation_equals_the_official_one(evaluation):
    _, scores, official = evaluation
    assert set(scores) == set(official)
    for task, result in scores.items():
        subsets = {name.split()[-1]: subset for name, subset in result.subsets.items()}
        assert {*subsets, "all"} == set(official[task])
        for measure in ("spearman", "pearson"):
            for name, subset in subsets.items():
                assert subset.pairs == official[task][name]["nsamples"]
                check(f"{measure} of a subset", getattr(subset, measure), official[task][name][measure][0])
            whole = official[task]["all"][measure]
            assert set(whole) == {"all", "mean", "wmean"}
            check(f"{measure}, all subsets together", getattr(result.all, measure), whole["all"])
            check(f"{measure}, mean", result.mean(measure), whole["mean"])
            check(f"{measure}, weighted mean", result.mean(measure, weighted=True), whole["wmean"])


def test_the_printed_table_is_the_official_one(evaluation):
    folder, scores, _ = evaluation
    printed = (folder / "evaluation_stdout.txt").read_text().splitlines()
    shown = [result.all if task in YEARS else result.subsets[f"{name} test"] for task, result, name in
             ((task, result, {"STSBenchmark": "STS-B", "SICKRelatedness": "SICK-R"}.get(task)) for task, result in scores.items())]  # fmt: skip
    cells = [f"{100 * part.spearman:.2f}" for part in shown]
    average = sum(map(float, cells)) / len(cells)  # of the rounded cells
    row = next(line for line in printed if line.startswith("|") and "STS12" not in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == [*cells, f"{average:.2f}"]
