"""Pages of the studies, and the summary of all claims, drawn from results.json alone."""

from collections.abc import Sequence
from pathlib import Path

from study import COMMON_LIMITS, DEV, STUDIES, Claim, Expected, Study, Tree, path_of, read_results

from promcse_pl.evaluation.statistics import Difference, mean_over_seeds, seed_difference
from promcse_pl.utils.files import write_text

REFERENCE = "bert-base"
"""Encoder of the paper whose scores are shown for models that the paper does not evaluate."""
SMALL = {"alignment", "uniformity"}
"""Tasks with three decimals."""
WORDS: dict[Expected, tuple[str, str, str]] = {
    "higher": ("**confirmed**", "**contradicted**", "not significant"),
    "lower": ("**contradicted**", "**confirmed**", "not significant"),
    "equal": ("differs (higher)", "differs (lower)", "no significant difference"),
}
"""Verdicts for an interval above 0, below 0, and one that includes 0."""


def by_seed(model: Tree, row: str, task: str) -> dict[int, float]:
    """Return the scores of a row's runs on a task by seed."""
    runs = model["rows"].get(row, {"runs": []})["runs"]
    found = {run["seed"]: run["dev_spearman"] if task == DEV else run["scores"].get(task) for run in runs}
    return {seed: value for seed, value in found.items() if value is not None}


def values(model: Tree, row: str, task: str) -> list[float]:
    """Return the scores of a row's runs on a task, in the order of the seeds."""
    return [*by_seed(model, row, task).values()]


def number(value: float, task: str, sign: str = "") -> str:
    """Return a score as text."""
    return format(value, f"{sign}.{3 if task in SMALL else 2}f")


def cell(scores: Sequence[float], task: str) -> str:
    """Return mean ± standard deviation and confidence interval of a row's scores."""
    if len(scores) < 2:
        return number(scores[0], task) if scores else "not run"
    mean, std, low, high = mean_over_seeds(scores)
    return f"{number(mean, task)} ± {number(std, task)} [{number(low, task)}, {number(high, task)}]"


def compare(model: Tree, claim: Claim) -> Difference | None:
    """Return the difference between the two rows of a claim over their common seeds; None for fewer than two."""
    first, second = (by_seed(model, row, claim.task) for row in (claim.first, claim.second))
    seeds = [seed for seed in first if seed in second]
    if len(seeds) < 2:
        return None
    return seed_difference([first[seed] for seed in seeds], [second[seed] for seed in seeds], is_paired=True)


def verdict(difference: Difference | None, expected: Expected) -> str:
    """Return whether the difference has the sign that the paper reports."""
    if difference is None:
        return "not run"
    if difference.low is None or difference.high is None:
        return "no interval, so no verdict"
    higher, lower, neither = WORDS[expected]
    return higher if difference.low > 0 else lower if difference.high < 0 else neither


def shown(difference: Difference | None, task: str) -> str:
    """Return a difference with its interval."""
    if difference is None:
        return "not run"
    text = number(difference.value, task, "+")
    if difference.low is None or difference.high is None:
        return text
    return f"{text} [{number(difference.low, task)}, {number(difference.high, task)}]"


def paper_scores(study: Study, row: str, encoder: str) -> dict[str, float]:
    """Return the paper's scores of a row."""
    (found,) = (one for one in study.rows if one.name == row)
    return (found.paper or {}).get(encoder, {})


def paper_difference(study: Study, claim: Claim, encoder: str) -> str:
    """Return the paper's difference for a claim, or the expected direction if the paper has no numbers."""
    task = claim.paper_task or claim.task
    first, second = (paper_scores(study, row, encoder).get(task) for row in (claim.first, claim.second))
    if first is None or second is None:
        return {"higher": "higher", "lower": "lower", "equal": "no difference"}[claim.expected]
    named = f" ({claim.paper_task})" if claim.paper_task else ""
    return f"{number(second - first, task, '+')}{named}"


def encoder_of(study: Study, model: str) -> str:
    """Return the encoder of the paper to compare a model with."""
    known = {encoder for row in study.rows for encoder in row.paper or {}}
    return model if model in known else REFERENCE


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["", *(f"| {' | '.join(line)} |" for line in lines), ""]


def score_tables(study: Study, model: Tree, name: str) -> list[str]:
    """Return the tables of scores: dev score and settings, then each task with the paper's number."""
    encoder, rows = encoder_of(study, name), [row.name for row in study.rows]
    headline, measured = study.headline, list(dict.fromkeys([study.headline, DEV]))
    columns = ["row", f"paper ({encoder})", *measured, "learning rate", "seeds"]
    frozen = model["frozen"]
    lines = [
        ["frozen encoder", "", *(number(frozen[task], task) if task in frozen else "" for task in measured), "", ""]
    ]
    for row in rows:
        runs = model["rows"].get(row, {"runs": []})["runs"]
        rate = next((line[9:] for run in runs for line in run["overrides"] if line.startswith("optim.lr=")), "recipe")
        paper = paper_scores(study, row, encoder).get(headline)
        seeds = ", ".join(str(run["seed"]) for run in runs) or "none"
        lines.append(
            [row, "" if paper is None else number(paper, headline), *(cell(values(model, row, task), task) for task in measured),
             rate, seeds]
        )  # fmt: skip
    text = table(columns, lines)
    if len(study.tasks) > 1:
        detail = []
        for row in ["frozen encoder", *rows]:
            scores = [[model["frozen"][task]] if task in model["frozen"] else [] for task in study.tasks]
            if row != "frozen encoder":
                scores = [values(model, row, task) for task in study.tasks]
                paper = paper_scores(study, row, encoder)
                if paper:
                    detail.append(
                        [f"{row} (paper)", *("" if t not in paper else number(paper[t], t) for t in study.tasks)]
                    )
            means = (
                number(sum(one) / len(one), task) if one else "–" for one, task in zip(scores, study.tasks, strict=True)
            )
            detail.append([row, *means])
        text += ["Means over the seeds:", *table(["", *study.tasks], detail)]
    return text


def claim_rows(study: Study, name: str, model: Tree) -> list[list[str]]:
    """Return the comparisons of a study as rows: claim, task, paper, ours, p, verdict."""
    rows = []
    for claim in study.claims:
        difference = compare(model, claim)
        over = f", {difference.over}" if difference else ""
        p = (
            ""
            if difference is None or difference.p is None
            else "< 0.001"
            if difference.p < 0.0005
            else f"{difference.p:.3f}"
        )
        rows.append(
            [f"{claim.second} against {claim.first}", claim.task, paper_difference(study, claim, encoder_of(study, name)),
             shown(difference, claim.task) + over, p, verdict(difference, claim.expected)]
        )  # fmt: skip
    return rows


def provenance(model: Tree) -> list[str]:
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
        f"{len(runs)} runs, {hours:.1f} hours of training with {machine['threads']} threads of a {machine['device']}, "
        f"{machine['precision']}; {versions}.",
    ]


def draw_curves(study: Study, results: Tree, folder: Path) -> list[str]:
    """Draw the curves of a figure for every model; return the lines of the page that show them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = []
    for name, model in results.items():
        figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
        for label, points in study.curves:
            known = [(x, values(model, row, study.headline)) for x, row in points]
            known = [(x, scores) for x, scores in known if scores]
            means = [sum(scores) / len(scores) for _, scores in known]
            spread = [mean_over_seeds(scores)[1] if len(scores) > 1 else 0 for _, scores in known]
            axis.errorbar([x for x, _ in known], means, yerr=spread, marker="o", capsize=3, label=label)
        if study.headline in model["frozen"]:
            axis.axhline(model["frozen"][study.headline], color="gray", linestyle=":", label="frozen encoder")
        axis.set(xlabel=study.axis, ylabel=f"{study.headline}, Spearman x 100\nmean ± sd over seeds", title=name)
        axis.legend()
        figure.savefig(folder / f"{name}.png", dpi=130)
        plt.close(figure)
        lines += ["", f"![{name}]({name}.png)"]
    return lines


def page(name: str, study: Study, results: Tree) -> str:
    """Return the page of a study."""
    lines = [
        f"# {study.title}",
        "",
        f"The paper: {study.about}" if study.claims else study.about,
        "",
        f"Limits: {COMMON_LIMITS} {study.limits}".rstrip(),
        "",
        "Rows show mean ± standard deviation and 95 % interval over seeds (Student's t). Differences are paired by seed "
        f"(paired t-test). By default, this study trains {study.seeds} seeds. The best step of a run "
        "is selected on STS-B dev.",
    ]
    if study.curves and results:
        lines += draw_curves(study, results, path_of(name))
    for model_name, model in results.items():
        lines += ["", f"## {model_name}", *score_tables(study, model, model_name)]
        if study.claims:
            header = ["comparison", "task", "paper", "difference", "p", "the paper's claim"]
            lines += table(header, claim_rows(study, model_name, model))
        lines += provenance(model)
    lines += ["", f"Generated by `python experiments/paper/run.py {name} --draw` from `results.json`.", ""]
    return "\n".join(lines)


def summary() -> str:
    """Return the summary page: every claim of the paper with our result."""
    rows = []
    for name, study in STUDIES.items():
        title = f"[{study.title}]({name}/README.md)" if (path_of(name) / "README.md").is_file() else study.title
        for model_name, model in (read_results(name) or {"–": {"rows": {}, "frozen": {}}}).items():
            rows += [
                [title, model_name, f"{what}, {task}", paper, ours, word]
                for what, task, paper, ours, _, word in claim_rows(study, model_name, model)
            ]
    limits = [f"- {study.title.partition(':')[0]}: {study.limits}" for study in STUDIES.values() if study.limits]
    return "\n".join(
        [
            "# Reproduction of the paper's tables and figures",
            "",
            "Every table and figure is one command that trains several seeds; `python experiments/paper/run.py --help` "
            "lists them. Small encoders are trained on a sample. `--model bert-base` or `--model roberta-large` with the "
            "original data is the full replication; `--dry-run` prints its commands with estimates of time and memory.",
            "",
            "A table can also be run as a sweep: `python run.py -m experiment=table1/prompt,table1/prompt_eh seed=42,43,44 "
            "model=bert-base data.dir=DATA`.",
            "",
            "A claim is confirmed or contradicted if the 95 % confidence interval of the difference over seeds excludes 0. "
            "Without any true difference, one comparison in twenty does so by chance.",
            *table(["study", "model", "comparison", "paper", "difference", "verdict"], rows),
            "## What cannot be compared",
            "",
            f"- {COMMON_LIMITS}",
            *limits,
            "",
            "Further page: [diagnostics](diagnostics/README.md)."
            if (path_of("diagnostics") / "README.md").is_file()
            else "",
            "",
            "Generated by `python experiments/paper/run.py --draw` from the results of all studies.",
            "",
        ]
    )


def draw(names: Sequence[str]) -> None:
    """Write the page of every given study that has results, and the summary."""
    for name in names:
        results = read_results(name)
        if results:
            write_text(path_of(name) / "README.md", page(name, STUDIES[name], results))
    write_text(path_of("README.md"), summary())


def draw_diagnostics() -> None:
    """Write the page of the diagnostics if they were run."""
    lines = [
        "# Diagnostics",
        "",
        "Variants of the adapters of `experiment=table1/prompt_eh`: mean ± standard deviation and interval over seeds. They are "
        "compared on STS-B dev; the average of the seven STS tasks (last column) was not used for selection. The cosine of "
        "the concatenated embeddings of several adapters is the mean of their cosines, an upper bound for distillation into one "
        "adapter.",
    ]
    results = read_results("diagnostics")
    for name, model in results.items():
        trained = model["variants"].get("trained", {}).get(DEV, [])
        rows = []
        for variant, scores in model["variants"].items():
            both = trained and max(len(trained), len(scores[DEV])) > 1 and variant != "trained"
            difference = seed_difference(trained, scores[DEV]) if both else None
            against = shown(difference, DEV) if difference else ""
            rows.append([variant, cell(scores[DEV], DEV), against, cell(scores["sts"], "Avg")])
        header = ["variant", "STS-B dev", "dev, difference to the trained adapters", "seven STS tasks"]
        seeds = ", ".join(str(run["seed"]) for run in model["runs"])
        lines += ["", f"## {name}", *table(header, rows), f"Seeds {seeds}."]
    if results:
        lines += ["", "Generated by `python experiments/paper/run.py diagnostics --draw` from `results.json`.", ""]
        write_text(path_of("diagnostics") / "README.md", "\n".join(lines))
