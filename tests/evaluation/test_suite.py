"""The suite on small files and encoders: scores, averages, comparisons, the content of the results, the output."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats
from support.encoders import save_small_encoder

from promcse_pl import PromCSE
from promcse_pl.data.pairs import TASKS, YEARS, ScoredPairs
from promcse_pl.evaluation.embeddings import EmbeddingCache
from promcse_pl.evaluation.geometry import effective_rank, mean_cosine, uniformity
from promcse_pl.evaluation.plots import draw
from promcse_pl.evaluation.report import headline, render, tables
from promcse_pl.evaluation.statistics import bootstrap_spearman, interval, mean_over_seeds
from promcse_pl.evaluation.sts import score_pairs, score_task
from promcse_pl.evaluation.suite import evaluate
from promcse_pl.evaluation.targets import Member, Target
from promcse_pl.evaluation.tasks import load_tasks, pair_task, transfer_task
from promcse_pl.evaluation.transfer_data import Row, TransferData
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.utils.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_small_encoder(tmp_path_factory.mktemp("encoders") / "tiny-bert")


@pytest.fixture(scope="module")
def models(bert):
    found = []
    for seed in range(4):
        torch.manual_seed(seed)
        encoder = PromptEncoder(FrozenBackbone.load(str(bert)), length=2, pooling="avg")
        torch.nn.init.normal_(encoder.prompt.embedding.weight, std=1.0)
        found.append(PromCSE(encoder.eval()))
    return found


def target(name, *models):
    return Target(name, "adapter", tuple(Member(lambda m=model: m, seed) for seed, model in enumerate(models)))


def pairs_of(name, seed, rows=30):
    chance = np.random.default_rng(seed)
    sentence = lambda: " ".join(f"w{word}" for word in chance.integers(5, 97, chance.integers(2, 7)))  # noqa: E731
    return ScoredPairs.of(name, [(sentence(), sentence(), float(chance.integers(0, 51) / 10)) for _ in range(rows)])


@pytest.fixture(scope="module")
def tasks():
    """The seven tasks by name, STS15 and STS16 with subsets."""
    found = []
    for seed, task in enumerate(TASKS):
        names = YEARS[task][:2] if task in ("STS15", "STS16") else (task,)
        found.append(pair_task(task, "sts", [pairs_of(name, 10 * seed + n) for n, name in enumerate(names)]))
    return found


@pytest.fixture(scope="module")
def tree(models, tasks, tmp_path_factory):
    return evaluate(
        [target("one", models[0]), target("two", models[1])], tasks, EmbeddingCache(tmp_path_factory.mktemp("c"))
    )


# --- scores ----------------------------------------------------------------------------------------------------------


def test_every_score_is_that_of_the_task_alone_with_the_interval_of_its_bootstrap(tree, models, tasks, tmp_path):
    task = tasks[TASKS.index("STS-B")]
    pairs = pairs_of("STS-B", 10 * TASKS.index("STS-B"))
    score = tree["targets"]["one"]["scores"]["STS-B"]
    alone = score_pairs(models[0].encode, pairs)
    assert (score["value"], score["pearson"]) == pytest.approx((100 * alone.spearman, 100 * alone.pearson), abs=1e-3)
    vectors = EmbeddingCache(tmp_path).embeddings(models[0], task.sentences)
    cosines = [float(vectors[a] @ vectors[b]) for a, b in zip(pairs.first, pairs.second, strict=True)]
    low, high = interval(bootstrap_spearman(cosines, pairs.gold, seed=[0, *b"STS-B"]))
    assert (score["low"], score["high"]) == pytest.approx((100 * low, 100 * high), abs=1e-6)


def test_a_task_of_subsets_has_their_scores_mean_and_weighted_mean(tree):
    score = tree["targets"]["one"]["scores"]["STS15"]
    assert list(score["subsets"]) == list(YEARS["STS15"][:2])
    for measure in ("spearman", "pearson"):
        single = [subset[measure] for subset in score["subsets"].values()]
        assert score[f"{measure}_mean"] == pytest.approx(np.mean(single))
        assert score[f"{measure}_weighted_mean"] == pytest.approx(np.mean(single))  # both have 30 pairs
    for subset in score["subsets"].values():
        assert subset["low"] < subset["spearman"] < subset["high"]


def test_the_average_stands_behind_the_seven_tasks_and_is_that_of_the_printed_cells(tree):
    for name, row in headline(tree).items():
        assert list(row) == [*TASKS, "Avg"]
        assert row["Avg"] == pytest.approx(sum(row[task] for task in TASKS) / 7, abs=0.0051)
        scores = tree["targets"][name]["scores"]
        assert scores["Avg"]["high"] - scores["Avg"]["low"] < min(
            s["high"] - s["low"] for t, s in scores.items() if t != "Avg"
        )


def test_six_of_the_seven_tasks_have_no_average(models, tasks, tmp_path):
    tree = evaluate([target("one", models[0])], tasks[:6], EmbeddingCache(tmp_path))
    assert "Avg" not in tree["targets"]["one"]["scores"]


# --- comparisons -----------------------------------------------------------------------------------------------------


def test_each_further_target_is_compared_with_the_first_on_the_same_resamples(models, tasks, tmp_path):
    cache = EmbeddingCache(tmp_path)
    tree = evaluate([target(name, models[n]) for n, name in enumerate("abc")], tasks[:2], cache)
    rows = [(row["first"], row["second"], row["task"]) for row in tree["comparisons"]]
    assert rows == [("a", second, task) for second in "bc" for task in TASKS[:2]]
    for row in tree["comparisons"]:
        scores = [tree["targets"][name]["scores"][row["task"]]["value"] for name in (row["first"], row["second"])]
        assert row["difference"] == pytest.approx(scores[1] - scores[0])
        assert row["low"] < row["difference"] < row["high"]
        assert row["verdict"].startswith(
            f"{row['difference']:+.2f} [{row['low']:.2f}, {row['high']:.2f}] over 1000 resamples"
        )


def test_a_model_against_itself_has_no_difference_at_all(models, tasks, tmp_path):
    tree = evaluate([target("a", models[0]), target("b", models[0])], tasks[:1], EmbeddingCache(tmp_path))
    (row,) = tree["comparisons"]
    assert (row["difference"], row["low"], row["high"], row["p"]) == (0, 0, 0, 1)


def test_a_folder_of_seeds_has_mean_spread_and_the_scores_of_each_seed(models, tasks, tmp_path):
    tree = evaluate([target("fixed", models[0]), target("seeds", *models[1:])], tasks[:1], EmbeddingCache(tmp_path))
    score = tree["targets"]["seeds"]["scores"]["STS12"]
    values = [seed["value"] for seed in score["seeds"]]
    assert (score["value"], score["std_over_seeds"], score["low"], score["high"]) == pytest.approx(
        mean_over_seeds(values)
    )
    assert [member["seed"] for member in tree["targets"]["seeds"]["members"]] == [0, 1, 2]
    assert len({member["sha256"] for member in tree["targets"]["seeds"]["members"]}) == 3
    fixed = tree["targets"]["fixed"]["scores"]["STS12"]["value"]
    (row,) = tree["comparisons"]
    assert row["p"] == pytest.approx(stats.ttest_1samp(values, fixed).pvalue)
    assert "over 3 seeds" in row["verdict"]


def test_the_table_of_subsets_shows_means_over_seeds(models, tasks, tmp_path):
    task = tasks[TASKS.index("STS15")]
    tree = evaluate([target("seeds", *models[1:])], [task], EmbeddingCache(tmp_path))
    seeds = tree["targets"]["seeds"]["scores"]["STS15"]["seeds"]
    means = [np.mean([seed[f"{metric}_mean"] for seed in seeds]) for metric in ("spearman", "pearson")]
    assert f"| STS15 mean | {means[0]:.2f} / {means[1]:.2f} |" in render(tree, "markdown")


# --- honesty ---------------------------------------------------------------------------------------------------------


def test_rows_hashes_protocol_bootstrap_and_versions_stand_in_the_results(tree):
    about = tree["tasks"]["STS15"]
    assert (about["rows"], about["published_rows"], about["unit"]) == (60, 3000, "Spearman x 100")
    assert [(file["name"], file["rows"], len(file["sha256"])) for file in about["files"]] == [
        (name, 30, 64) for name in YEARS["STS15"][:2]
    ]
    assert "1000 resamples, seed 0" in about["protocol"]
    assert tree["bootstrap"] == {"resamples": 1000, "seed": 0, "level": 0.95}
    assert {"promcse_pl", "torch", "transformers", "numpy", "scipy", "scikit-learn", "python"} == set(tree["versions"])
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree


def test_a_file_with_other_counts_than_the_published_ones_is_reported(tree):
    assert "STS-B has 30 rows, 1379 were published: its score is not comparable" in tree["warnings"]
    assert len(tree["warnings"]) == 7


def test_a_reversed_score_scale_of_a_file_of_the_user_is_a_warning(models, tmp_path):
    pairs = pairs_of("mine.csv", 1)
    scores = score_task([pairs], EmbeddingCache(tmp_path).embeddings(models[0], [*pairs.first, *pairs.second]))
    sign = -1 if scores.all.spearman > 0 else 1
    rows = [(a, b, sign * gold) for a, b, gold in zip(pairs.first, pairs.second, pairs.gold, strict=True)]
    reversed_pairs = ScoredPairs.of("mine.csv", rows)
    tree = evaluate(
        [target("a", models[0])], [pair_task("mine.csv", "own", [reversed_pairs])], EmbeddingCache(tmp_path)
    )
    (warning,) = tree["warnings"]
    assert warning.startswith(f"a on mine.csv: Spearman {tree['targets']['a']['scores']['mine.csv']['value']:.2f}, but")
    assert warning.endswith("Check the columns of mine.csv, and that higher scores mean more similar")


def test_a_collapsed_model_gives_an_error_and_no_score(bert, tasks, tmp_path):
    encoder = PromptEncoder(FrozenBackbone.load(str(bert)), length=0, head="mlp").eval()
    torch.nn.init.zeros_(encoder.head.dense.weight)
    torch.nn.init.ones_(encoder.head.dense.bias)
    with pytest.raises(DataError, match="same embedding: the model has collapsed"):
        evaluate([target("collapsed", PromCSE(encoder))], tasks[:1], EmbeddingCache(tmp_path))


def test_every_distinct_sentence_of_all_tasks_is_encoded_once_in_one_call(models, tasks, tmp_path, monkeypatch):
    calls, encode = [], models[0].encode
    monkeypatch.setattr(models[0], "encode", lambda texts, **options: calls.append(texts) or encode(texts, **options))
    evaluate(
        [target("a", models[0])], [*tasks, pair_task("again", "own", [pairs_of("x", 0)])], EmbeddingCache(tmp_path)
    )
    (asked,) = calls
    assert sorted(asked) == sorted({text for task in tasks for text in task.sentences})


# --- other suites ----------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """STS-B's test split and CxC-STS, small."""
    pairs = pairs_of("STS-B", 7, rows=60)
    rows = list(zip(pairs.gold, pairs.first, pairs.second, strict=True))
    (tmp_path / "senteval/STS/STSBenchmark").mkdir(parents=True)
    (tmp_path / "cxc").mkdir()
    (tmp_path / "senteval/STS/STSBenchmark/sts-test.csv").write_text(
        "".join(f"g\tf\ty\t1\t{gold}\t{a}\t{b}\n" for gold, a, b in rows)
    )
    (tmp_path / "cxc/cxc-sts-test.csv").write_text(
        "caption1,caption2,agg_score,sampling_method,sent1,sent2\n"
        + "".join(f"{n},{n + 1},{gold},x,{a},{b}\n" for n, (gold, a, b) in enumerate(rows))
    )
    images = [{"split": "test", "cxc_scores": [[str(n), str(n + 1)], [str(n + 1), str(n + 2)]]} for n in range(58)]
    (tmp_path / "cxc/dataset_coco_with_cxc.json").write_text(json.dumps({"images": images}))
    return tmp_path


def test_geometry_is_measured_on_distinct_sentences_and_positive_pairs_of_sts_b(data, models, tmp_path):
    tree = evaluate(
        [target("a", models[0]), target("b", models[1])], load_tasks(["geometry"], data), EmbeddingCache(tmp_path)
    )
    pairs = pairs_of("STS-B", 7, rows=60)
    scores = tree["targets"]["a"]["scores"]
    vectors = models[0].encode(sorted({*pairs.first, *pairs.second}))
    assert scores["uniformity"]["value"] == pytest.approx(uniformity(vectors), abs=1e-5)
    assert scores["mean cosine"]["value"] == pytest.approx(mean_cosine(vectors), abs=1e-5)
    assert scores["effective rank"]["value"] == pytest.approx(effective_rank(vectors), abs=1e-3)
    close = [position for position, gold in enumerate(pairs.gold) if gold >= 4]
    sides = [models[0].encode([side[position] for position in close]) for side in (pairs.first, pairs.second)]
    assert scores["alignment"]["value"] == pytest.approx(((sides[0] - sides[1]) ** 2).sum(1).mean(), abs=1e-5)
    assert scores["alignment"]["positive_pairs"] == len(close)
    assert tree["comparisons"] == []
    assert [path.name for path in draw(tree, tmp_path / "plot.pdf")] == ["plot-density.pdf"]
    assert "uniformity" in printed(tree)


def test_the_cosine_density_of_each_gold_range_is_a_density(data, models, tmp_path):
    tree = evaluate([target("a", models[0])], load_tasks(["geometry"], data), EmbeddingCache(tmp_path))
    curves = tree["targets"]["a"]["scores"]["alignment"]["cosine_density"]
    assert list(curves) == ["cosine", "0-1", "1-2", "2-3", "3-4", "4-5"]
    for low in range(5):
        assert 0 < np.trapezoid(curves[f"{low}-{low + 1}"], curves["cosine"]) <= 1.001


def test_cxc_has_mean_and_spread_of_its_bootstrap_and_reports_progress(data, models, tmp_path):
    seen = []
    (task,) = load_tasks(["cxc"], data)
    report = lambda *step: seen.append(step)  # noqa: E731
    tree = evaluate([target("a", models[0]), target("b", models[1])], [task], EmbeddingCache(tmp_path), report)
    score = tree["targets"]["a"]["scores"]["CxC-STS"]
    assert score["low"] < score["value"] < score["high"]
    assert score["std"] > 0
    assert ("a: CxC-STS", 1000, 1000) in seen
    assert [row["task"] for row in tree["comparisons"]] == ["CxC-STS"]
    assert [file["rows"] for file in tree["tasks"]["CxC-STS"]["files"]] == [60, 58]


def test_a_transfer_task_has_accuracy_with_the_bootstrap_of_its_tested_rows(models, tmp_path):
    rows = tuple(Row((f"w{5 + position} w{20 + position % 2}",), position % 2) for position in range(60))
    task = transfer_task(TransferData("CR", {"all": rows}, "0" * 64))
    tree = evaluate([target("a", models[0]), target("b", models[1])], [task], EmbeddingCache(tmp_path))
    score = tree["targets"]["a"]["scores"]["CR"]
    assert score["low"] <= score["value"] <= score["high"]
    assert (score["tested_rows"], len(score["inverse_penalties"])) == (60, 10)
    assert tree["warnings"] == ["CR has 60 rows, 3775 were published: its score is not comparable"]
    assert "over 1000 resamples" in tree["comparisons"][0]["verdict"]


# --- own files and data folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_any_file_of_two_texts_and_a_score_is_a_task(suffix, tmp_path, models, monkeypatch):
    rows = [(f"w{n} w6", f"w{2 * n} w7", n / 2) for n in range(5, 20)]
    line = {"csv": "{},{},{}\n", "tsv": "{}\t{}\t{}\n", "jsonl": '{{"a": "{}", "b": "{}", "score": {}}}\n'}[suffix]
    (tmp_path / f"mine.{suffix}").write_text("".join(line.format(*row) for row in rows))
    monkeypatch.chdir(tmp_path)
    for name, data in (
        (str(tmp_path / f"mine.{suffix}"), None),
        (f"mine.{suffix}", None),
        (f"mine.{suffix}", tmp_path),
    ):
        (task,) = load_tasks([name], data)
        assert (task.name, task.suite, task.rows, task.expected_rows) == (f"mine.{suffix}", "own", 15, None)
    scored = score_pairs(models[0].encode, ScoredPairs.of("mine", rows))
    score = evaluate([target("a", models[0])], [task], EmbeddingCache(tmp_path / "c"))["targets"]["a"]["scores"][
        task.name
    ]
    assert score["value"] == pytest.approx(100 * scored.spearman, abs=1e-3)


def test_two_files_of_one_name_and_a_suite_without_its_folder_are_refused(tmp_path):
    for subfolder in ("a", "b"):
        (tmp_path / subfolder).mkdir()
        (tmp_path / subfolder / "x.csv").write_text("a,b,1\nc,d,2\n")
    with pytest.raises(ConfigError, match=r"two tasks are called x\.csv"):
        load_tasks([str(tmp_path / "a/x.csv"), str(tmp_path / "b/x.csv")], None)
    with pytest.raises(ConfigError, match="the tasks sts, cxc are read from a data folder"):
        load_tasks(["sts", "demo", "cxc"], None)


# --- what is printed -------------------------------------------------------------------------------------------------


def printed(tree, width=80):
    console = Console(file=io.StringIO(), width=width)
    for table in tables(tree):
        console.print(table)
    return console.file.getvalue()


def test_the_tables_hold_every_score_interval_and_verdict_within_80_columns(tree):
    text = printed(tree)
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    for name in ("one", "two"):
        for score in tree["targets"][name]["scores"].values():
            assert f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]" in flat
    assert "two against one over 1000 resamples" in flat
    for row in tree["comparisons"]:
        word = row["verdict"].rpartition(": ")[2]
        assert f"{row['difference']:+.2f} [{row['low']:.2f}, {row['high']:.2f}] {row['p']:.3f} {word}" in flat


def test_markdown_and_latex_hold_every_score_and_verdict(tree):
    markdown, latex = render(tree, "markdown"), render(tree, "latex")
    for name in ("one", "two"):
        for score in tree["targets"][name]["scores"].values():
            assert f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]" in markdown
            assert rf"{score['value']:.2f} {{\scriptsize [{score['low']:.2f}, {score['high']:.2f}]}}" in latex
    for row in tree["comparisons"]:
        assert row["verdict"] in markdown
        assert row["verdict"] in latex
    assert "STS15 belief" not in markdown
    assert f"STS15 {YEARS['STS15'][0]}" in markdown
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2
    assert "STS15 weighted mean" in latex
    rows = [line for line in markdown.splitlines() if line.startswith("| ") and "Avg" in line]
    assert rows[0].count("|") == len(TASKS) + 3


def test_special_characters_of_a_name_do_not_break_latex_or_markdown(models, tasks, tmp_path):
    tree = evaluate([target("a_b & 50% #1|x", models[0])], tasks[:1], EmbeddingCache(tmp_path))
    assert r"a\_b \& 50\% \#1|x" in render(tree, "latex")
    assert r"| a_b & 50% #1\|x |" in render(tree, "markdown")


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_the_bars_are_drawn_from_the_results_alone(tree, suffix, tmp_path):
    (path,) = draw(json.loads(json.dumps(tree)), tmp_path / f"new/plot{suffix}")
    assert path.stat().st_size > 1000
    if suffix == ".svg":
        text = path.read_text()
        assert all(word in text for word in (*TASKS, "Avg", "one", "two", "Spearman", "x 100"))
