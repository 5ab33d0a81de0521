"""Pages of the studies and of all claims, drawn from results.json; estimates of the full replication, from conf/."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import scipy
from estimate import estimate
from study import (
    COMMON_LIMITS,
    DEV,
    FROZEN,
    PROMCSE_EH,
    SEEDS,
    SIMCSE_EH,
    STUDIES,
    TRAINED,
    UNSUP_PROMCSE,
    UNSUP_SIMCSE,
    Claim,
    Results,
    Row,
    Study,
    best_rate,
    learning_rates,
    read_results,
    study_folder,
    summary_page,
)
from training import Workspace

from promcse_pl.evaluation.statistics import LEVEL, Difference, mean_over_seeds, seed_difference
from promcse_pl.runs.compose import compose_config
from promcse_pl.utils.files import write_text

REPLICATED = ("bert-base", "roberta-base", "roberta-large")
"""Models whose full replication is estimated on the summary page."""
REFERENCE = "bert-base"
"""Encoder of the paper whose scores are shown for models that the paper does not evaluate."""
THREE_DECIMALS = {"alignment", "uniformity"}
"""Tasks with three decimals."""
VERDICTS = {
    "higher": ("confirmed", "contradicted", "not significant"),
    "lower": ("contradicted", "confirmed", "not significant"),
}
"""Verdicts for an interval above 0, below 0, and one that includes 0."""
MARGIN = 0.2
"""Equivalence margin in points, for claims of no difference."""
VERDICT_RULE = (
    "A claim of a difference is confirmed or contradicted if the 95 % confidence interval of the difference over seeds excludes "
    f"0. A claim of no difference is confirmed if two one-sided t-tests show that the difference is smaller than {MARGIN:g} "
    "points (the larger p is shown). All seeds use the same training sample and test pairs, whose choice the intervals do not "
    "cover."
)
LEARNING_RATES = (
    "On a sample, a row uses the learning rate with the best dev score of its method (study `learning_rate`), once all rates of "
    "the method were run for the same model and rows; rows without EH use the rate that was selected with EH. Other rows, and "
    "all rows on the whole data, use the learning rate of the model's recipe."
)
NOT_RUN, FEW_SEEDS = "not run", "fewer than 2 common seeds"


@dataclass(frozen=True, slots=True)
class Judgement:
    """Result for a claim.

    Attributes:
        claim: The claim.
        task: Task whose scores were compared: that of the claim or its proxy.
        difference: Difference over the common seeds; None for fewer than two.
        p: Two-sided p-value of the difference, or of the tests of equivalence; None without an interval.
        verdict: Whether the difference agrees with the claim.
    """

    claim: Claim
    task: str
    difference: Difference | None
    p: float | None
    verdict: str


def by_seed(model: Results, row: str, task: str) -> dict[int, float]:
    """Return the scores of a row's runs on a task by seed."""
    runs = model["rows"].get(row, {"runs": []})["runs"]
    scores = {run["seed"]: run["dev_spearman"] if task == DEV else run["scores"].get(task) for run in runs}
    return {seed: value for seed, value in scores.items() if value is not None}


def values(model: Results, row: str, task: str) -> list[float]:
    """Return the scores of a row's runs on a task, in the order of the seeds."""
    return [*by_seed(model, row, task).values()]


def format_score(value: float | None, task: str, sign: str = "") -> str:
    """Return a score as text; empty for None."""
    return "" if value is None else format(value, f"{sign}.{3 if task in THREE_DECIMALS else 2}f")


def format_scores(scores: Sequence[float], task: str) -> str:
    """Return mean ± standard deviation and confidence interval of a row's scores."""
    if len(scores) < 2:
        return format_score(scores[0], task) if scores else NOT_RUN
    mean, std, low, high = (format_score(value, task) for value in mean_over_seeds(scores))
    return f"{mean} ± {std} [{low}, {high}]"


def format_difference(difference: Difference | None, task: str) -> str:
    """Return a difference with its interval."""
    if difference is None:
        return ""
    text = format_score(difference.value, task, "+")
    if difference.low is None or difference.high is None:
        return text
    return f"{text} [{format_score(difference.low, task)}, {format_score(difference.high, task)}]"


def format_p(p: float | None) -> str:
    """Return a p-value as text."""
    return "" if p is None else "< 0.001" if p < 0.0005 else f"{p:.3f}"


def common_scores(first: dict[int, float], second: dict[int, float]) -> tuple[list[float], list[float]]:
    """Return the scores of two rows for their common seeds, in the same order."""
    seeds = [seed for seed in first if seed in second]
    return [first[seed] for seed in seeds], [second[seed] for seed in seeds]


def judge(model: Results, claim: Claim) -> Judgement:
    """Judge a claim by the differences between its two rows, paired by seed."""
    rows = (claim.first, claim.second)
    is_scored = claim.proxy is None or all(by_seed(model, row, claim.task) for row in rows)
    task = claim.task if is_scored else str(claim.proxy)
    scores = [by_seed(model, row, task) for row in rows]
    first, second = common_scores(*scores)
    if len(first) < 2:
        return Judgement(claim, task, None, None, FEW_SEEDS if all(scores) else NOT_RUN)
    difference = seed_difference(first, second, is_paired=True)
    if difference.low is None or difference.high is None:
        return Judgement(claim, task, difference, None, "no interval, so no verdict")
    if claim.expected == "equal":
        p = p_of_equivalence(np.subtract(second, first))
        verdict = "confirmed" if p < 1 - LEVEL else "not significant"
    else:
        higher, lower, neither = VERDICTS[claim.expected]
        p, verdict = difference.p, higher if difference.low > 0 else lower if difference.high < 0 else neither
    return Judgement(claim, task, difference, p, verdict if is_scored else f"{verdict} (proxy)")


def p_of_equivalence(differences_n: np.ndarray) -> float:
    """Return the p-value of two one-sided t-tests that the mean is within `MARGIN` of 0 (TOST, Schuirmann 1987).

    Args:
        differences_n: (n,) differences, one for each seed.
    """
    tests = (
        scipy.stats.ttest_1samp(differences_n, bound, alternative=side)
        for bound, side in ((-MARGIN, "greater"), (MARGIN, "less"))
    )
    return max(float(test.pvalue) for test in tests)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values adjusted for multiple tests (Holm 1979), in the given order; None, where there was no test, stays None."""
    tests = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted, largest = list(p_values), 0.0
    for rank, (p, index) in enumerate(tests):
        largest = max(largest, min(1.0, (len(tests) - rank) * p))
        adjusted[index] = largest
    return adjusted


def paper_scores(study: Study, row: str, encoder: str) -> dict[str, float]:
    """Return the paper's scores of a row."""
    (scores,) = (each.paper or {} for each in study.rows if each.name == row)
    return scores.get(encoder, {})


def paper_difference(study: Study, claim: Claim, encoder: str) -> str:
    """Return the paper's difference for a claim, or the expected direction if the paper has no numbers."""
    first, second = (paper_scores(study, row, encoder).get(claim.task) for row in (claim.first, claim.second))
    if first is None or second is None:
        return {"higher": "higher", "lower": "lower", "equal": "no difference"}[claim.expected]
    return format_score(second - first, claim.task, "+")


def encoder_of(study: Study, key: str) -> str:
    """Return the encoder of the paper to compare the results of a workspace with."""
    model = key.rpartition("-")[0]
    known = {encoder for row in study.rows for encoder in row.paper or {}}
    return model if model in known else REFERENCE


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["", *(f"| {' | '.join(line)} |" for line in lines), ""]


def name_of(row: Row) -> str:
    """Return the name of a row on the page."""
    return f"{row.name} (removed)" if row.is_removed else row.name


def overview_table(study: Study, model: Results, encoder: str) -> list[str]:
    """Return the table of the headline and the dev score with the settings of each row."""
    measured, frozen = list(dict.fromkeys([study.headline, DEV])), model["frozen"]
    paper = {row.name: paper_scores(study, row.name, encoder).get(study.headline) for row in study.rows}
    has_paper = any(score is not None for score in paper.values())
    lines = [[FROZEN, *[""] * has_paper, *(format_score(frozen.get(task), task) for task in measured), "", "", ""]]
    for row in study.rows:
        runs = model["rows"].get(row.name, {"runs": []})["runs"]
        if row.is_removed and not runs:
            continue
        rates = [line[9:] for run in runs for line in run["overrides"] if line.startswith("optim.lr=")]
        published = [format_score(paper[row.name], study.headline)] * has_paper
        scores = (format_scores(values(model, row.name, task), task) for task in measured)
        seeds = ", ".join(str(run["seed"]) for run in runs) or "none"
        best = ", ".join(f"{run['best_step']}" for run in runs) + (f" of {runs[0]['steps']}" if runs else "")
        lines.append([name_of(row), *published, *scores, rates[0] if rates else "recipe" if runs else "", best, seeds])
    header = ["row", *[f"paper ({encoder})"] * has_paper, *measured, "learning rate", "best step", "seeds"]
    return markdown_table(header, lines)


def count_of_seeds(study: Study) -> str:
    """Return the default number of seeds, with the reason for fewer than five."""
    if study.seeds == 1:
        return "1 seed"
    return f"{study.seeds} seeds, because all studies together had 12 hours of two cores"


def task_table(study: Study, model: Results, encoder: str) -> list[str]:
    """Return the table of the means of every row by task, below the paper's scores."""
    lines = [[FROZEN, *(format_score(model["frozen"].get(task), task) or "–" for task in study.tasks)]]
    for row in study.rows:
        if paper := paper_scores(study, row.name, encoder):
            lines.append([f"{row.name} (paper)", *(format_score(paper.get(task), task) for task in study.tasks)])
        by_task = ((task, values(model, row.name, task)) for task in study.tasks)
        lines.append(
            [row.name, *(format_score(float(np.mean(scores)), task) if scores else "–" for task, scores in by_task)]
        )
    return ["Means over the seeds:", *markdown_table(["", *study.tasks], lines)]


def score_tables(study: Study, model: Results, key: str) -> list[str]:
    """Return the tables of scores: dev score and settings, then each task with the paper's number."""
    encoder = encoder_of(study, key)
    return overview_table(study, model, encoder) + (task_table(study, model, encoder) if len(study.tasks) > 1 else [])


def claim_cells(study: Study, key: str, judgement: Judgement) -> list[str]:
    """Return the cells of a comparison: rows, task, paper, difference and p."""
    claim, difference = judgement.claim, judgement.difference
    task = judgement.task if judgement.task == claim.task else f"{judgement.task} (proxy of {claim.task})"
    ours = format_difference(difference, judgement.task) + (f", {difference.over}" if difference else "")
    paper = paper_difference(study, claim, encoder_of(study, key))
    return [f"{claim.second} against {claim.first}", task, paper, ours, format_p(judgement.p)]


def claim_table(study: Study, key: str, model: Results) -> list[str]:
    """Return the table of the claims of a study."""
    header = ["comparison", "task", "paper", "difference", "p", "the paper's claim"]
    judgements = [judge(model, claim) for claim in study.claims]
    return markdown_table(header, [[*claim_cells(study, key, judged), judged.verdict] for judged in judgements])


def selection_table(model: Results) -> list[str]:
    """Return the table of the learning rates that are selected; a method needs all its rates."""
    lines = []
    for preset in dict.fromkeys(row.preset for row in STUDIES["learning_rate"].rows):
        scores = learning_rates(model, preset)
        if selected := best_rate(scores):
            rates = sorted(scores, key=float)
            edge = {rates[0]: ", the lowest", rates[-1]: ", the highest"}.get(selected, "")
            lines.append([f"`experiment={preset}`", f"{selected}{edge}", f"{len(rates)}", f"{scores[selected]:.4f}"])
    return markdown_table(["method", "selected rate", "rates", "dev"], lines)


def baseline_table(study: Study, model: Results) -> list[str]:
    """Return the table of the scores of all rows relative to the baseline, paired by seed, and of the trained parameters."""
    assert study.baseline is not None
    task = study.headline
    base, lines = by_seed(model, study.baseline, task), []
    for row in study.rows:
        runs = model["rows"].get(row.name, {"runs": []})["runs"]
        first, second = common_scores(base, by_seed(model, row.name, task))
        if row.name == study.baseline or not first:
            continue
        if len(first) == 1:
            text = f"{format_score(second[0] - first[0], task, '+')}, 1 seed"
        else:
            difference = seed_difference(first, second, is_paired=True)
            text = f"{format_difference(difference, task)}, {difference.over}"
        share = f"{runs[0]['trained_parameters']:,} ({100 * runs[0]['trained_share']:.2f} %)"
        lines.append([name_of(row), f"`{' '.join(row.overrides)}`", share, text])
    header = ["row", "overrides", "trained parameters", f"{task} against {study.baseline}"]
    return markdown_table(header, lines)


def provenance(model: Results) -> list[str]:
    """Return the lines on data, overrides, machine and versions of a model's runs."""
    runs = [run for row in model["rows"].values() for run in row["runs"]]
    if not runs:
        return []
    data = "; ".join(
        f"`{about['file']}`, "
        + (f"a sample of {about['rows']:,} rows with seed {about['sample_seed']}" if about["rows"] else "all rows")
        + f", sha256 `{about['sha256'][:16]}`"
        for about in model["data"].values()
    )
    example, machine = runs[0], runs[0]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in example["versions"].items())
    hours = sum(run["training_seconds"] for run in runs) / 3600
    return [
        f"Data: {data}.",
        "",
        f"First run: `python run.py {' '.join(example['overrides'])}`, with `data.dir` and the sample as `data.train`. "
        f"{len(runs)} runs (shared with other tables that have the same rows), {hours:.1f} hours (wall time, with pauses and "
        f"other load) with {machine['threads']} threads of a {machine['device']}, {machine['precision']}; {versions}.",
    ]


def draw_curves(study: Study, results: Results, folder: Path) -> list[str]:
    """Draw the curves of a figure for every model; return the lines of the page that show them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = []
    for key, model in results.items():
        figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
        for label, points in study.curves:
            known = [(x, values(model, row, study.headline)) for x, row in points]
            known = [(x, scores) for x, scores in known if scores]
            means = [sum(scores) / len(scores) for _, scores in known]
            spread = [mean_over_seeds(scores)[1] if len(scores) > 1 else 0 for _, scores in known]
            axis.errorbar([x for x, _ in known], means, yerr=spread, marker="o", capsize=3, label=label)
        if study.headline in model["frozen"]:
            axis.axhline(model["frozen"][study.headline], color="gray", linestyle=":", label="frozen encoder")
        axis.set(xlabel=study.axis, ylabel=f"{study.headline}, Spearman x 100\nmean ± sd over seeds", title=key)
        axis.legend()
        figure.savefig(folder / f"{key}.png", dpi=130)
        plt.close(figure)
        lines += ["", f"![{key}]({key}.png)"]
    return lines


def study_page(name: str, study: Study, results: Results) -> str:
    """Return the page of a study."""
    lines = [
        f"# {study.title}",
        "",
        f"The paper: {study.about}" if study.claims else study.about,
        "",
        f"Limits: {COMMON_LIMITS} {study.limits}".rstrip(),
        "",
        "Rows show mean ± standard deviation and 95 % interval over seeds (Student's t). Differences are paired by seed "
        f"(paired t-test). The default is {count_of_seeds(study)}. The best step of a run is selected on STS-B dev; if it is the "
        "last one, longer training might be better.",
    ]
    if study.claims:
        lines += ["", LEARNING_RATES, "", f"{VERDICT_RULE} The p-values of this page are not adjusted."]
    if study.curves and results:
        lines += draw_curves(study, results, study_folder(name))
    for key, model in results.items():
        lines += ["", f"## {key}", *score_tables(study, model, key)]
        lines += selection_table(model) if name == "learning_rate" else []
        lines += claim_table(study, key, model) if study.claims else []
        lines += baseline_table(study, model) if study.baseline else []
        lines += provenance(model)
    lines += ["", f"Generated by `python experiments/paper/run.py {name} --draw` from `results.json`.", ""]
    return "\n".join(lines)


def summary_rows() -> list[list[str]]:
    """Return all claims of all studies, with verdicts that say whether they hold after Holm's correction."""
    judged = [
        (name, key, judge(model, claim))
        for name, study in STUDIES.items()
        for key, model in (read_results(name) or {"–": {"rows": {}, "frozen": {}}}).items()
        for claim in study.claims
    ]
    rows = []
    for (name, key, judgement), p in zip(judged, holm([judgement.p for *_, judgement in judged]), strict=True):
        study = STUDIES[name]
        title = f"[{study.title}]({name}/README.md)" if (study_folder(name) / "README.md").is_file() else study.title
        what, task, paper, ours, raw = claim_cells(study, key, judgement)
        is_decided = judgement.verdict.startswith(("confirmed", "contradicted"))
        verdict = judgement.verdict
        if is_decided and p is not None:
            verdict = f"**{verdict}**" if p < 1 - LEVEL else f"{verdict}, not after adjustment"
        rows.append([title, key, f"{what}, {task}", paper, ours, raw, format_p(p), verdict])
    return rows


@cache
def replication_table() -> list[str]:
    """Return the table of steps, time and memory of a run on the paper's data, as `--dry-run` estimates them."""
    rows = [row for row in STUDIES["table1"].rows if row.name in (PROMCSE_EH, SIMCSE_EH, UNSUP_PROMCSE, UNSUP_SIMCSE)]
    lines = []
    for model in REPLICATED:
        workspace = Workspace(model, Path("DATA"), Path("RUNS"), 0)
        for row in rows:
            config = compose_config(workspace.overrides(row, SEEDS[0]), {})
            steps, hours, memory = estimate(model, config, 0)
            cells = [f"{steps:,} of {config.data.batch_size} rows", f"{hours:.1f} h", f"{memory:.0f} GB"]
            lines.append([f"`--model {model}`", row.name, *cells])
    return markdown_table(["model", "row", "steps", "training", "memory"], lines)


def summary() -> str:
    """Return the summary page: every claim of the paper with our result."""
    limits = [f"- {study.title.partition(':')[0]}: {study.limits}" for study in STUDIES.values() if study.limits]
    titles = {
        **{name: study.title for name, study in STUDIES.items() if not study.claims},
        "diagnostics": "Diagnostics",
    }
    further = [
        f"- [{title}]({name}/README.md)"
        for name, title in titles.items()
        if (study_folder(name) / "README.md").is_file()
    ]
    header = ["study", "model and rows", "comparison", "paper", "difference", "p", "p (Holm)", "verdict"]
    return "\n".join(
        [
            "# Reproduction of the paper's tables and figures",
            "",
            "Every table and figure is one command that trains several seeds; `python experiments/paper/run.py --help` "
            "lists them. Small encoders are trained on a sample; other models are the full replication, described at the end.",
            "",
            "A table can also be run as a sweep: `python run.py -m experiment=table1/prompt,table1/prompt_eh seed=42,43,44 "
            "model=bert-base data.dir=DATA`.",
            "",
            f"{VERDICT_RULE} Without any true difference, one comparison in twenty is significant by chance. p (Holm) is "
            "adjusted for the comparisons of this table that were run (Holm 1979). Verdicts that remain significant are bold; "
            "the others hold only if a single comparison is considered.",
            "",
            LEARNING_RATES,
            *markdown_table(header, summary_rows()),
            "## What cannot be compared",
            "",
            f"- {COMMON_LIMITS}",
            *limits,
            "",
            "## Full replication",
            "",
            "`python experiments/paper/run.py table1 --model bert-base --data DATA` trains on all data with the paper's recipe. "
            "DATA needs the original files: nli_for_simcse.csv as `nli/nli_train.csv`, and wiki1m_for_simcse.txt, compressed "
            "with gzip, as `wiki/wiki.txt.gz`. `--dry-run` prints the commands of all runs with these estimates, which are "
            "calculated, not measured: one run with one seed on a GPU with 60 TFLOP/s in bfloat16, without dev evaluations and "
            "activation checkpointing.",
            *replication_table(),
            *(["## Further pages", "", *further, ""] if further else []),
            "Generated by `python experiments/paper/run.py --draw` from the results of all studies.",
            "",
        ]
    )


def draw(names: Sequence[str]) -> None:
    """Write the page of every given study that has results, and the summary."""
    for name in names:
        results = read_results(name)
        if results:
            write_text(study_folder(name) / "README.md", study_page(name, STUDIES[name], results))
    write_text(summary_page(), summary())


def diagnostics_rows(model: Results) -> list[list[str]]:
    """Return the rows of the diagnostics: name, dev score, difference to the trained adapters.

    Variants are paired with the adapters by seed, the frozen encoder is a fixed number. An ensemble has no interval, because it
    consists of the same adapters.
    """
    trained = _dev_by_seed(model, TRAINED)
    rows = []
    for name, score in model["single"].items():
        against = ""
        if name == FROZEN and len(trained) > 1:
            against = format_difference(seed_difference([*trained.values()], [score]), DEV)
        elif trained:
            against = format_score(score - float(np.mean([*trained.values()])), DEV, "+")
        rows.append([name, format_score(score, DEV), against])
    for name, scores in model["variants"].items():
        first, second = common_scores(trained, _dev_by_seed(model, name))
        against = ""
        if name != TRAINED:
            is_enough = len(first) > 1
            against = format_difference(seed_difference(first, second, is_paired=True), DEV) if is_enough else FEW_SEEDS
        rows.append([name, format_scores([*scores.values()], DEV), against])
    return rows


def _dev_by_seed(model: Results, name: str) -> dict[int, float]:
    """Return the dev scores of a variant by seed."""
    return {int(seed): score for seed, score in model["variants"].get(name, {}).items()}


def draw_diagnostics() -> None:
    """Write the page of the diagnostics if they were run."""
    lines = [
        "# Diagnostics",
        "",
        "STS-B dev scores of variants of the adapters of `experiment=table1/prompt_eh`: mean ± standard deviation and interval "
        "over seeds. No test set is evaluated. Differences are paired by seed; the frozen encoder is a fixed number. The cosine "
        "of the concatenated embeddings of several adapters is the mean of their cosines, the teacher of a self-distillation; it "
        "consists of the adapters that it is compared with, so its difference has no interval.",
    ]
    results = read_results("diagnostics")
    for key, model in results.items():
        header = ["variant", "dev", "difference to the trained adapters"]
        seeds = ", ".join(str(run["seed"]) for run in model["runs"])
        lines += ["", f"## {key}", *markdown_table(header, diagnostics_rows(model)), f"Seeds {seeds}."]
    if results:
        lines += ["", "Generated by `python experiments/paper/run.py diagnostics --draw` from `results.json`.", ""]
        write_text(study_folder("diagnostics") / "README.md", "\n".join(lines))
