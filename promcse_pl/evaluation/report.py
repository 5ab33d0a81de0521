"""Tables of the results of an evaluation: for the terminal, Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import reduce
from operator import getitem
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from promcse_pl.evaluation.retrieval import METRICS
from promcse_pl.utils.terminal import plain

Tree = dict[str, Any]
FORMATS = ("markdown", "latex")
RETRIEVAL_TITLE = "MRR and Recall x 100"


def headline(tree: Tree) -> dict[str, dict[str, float]]:
    """Return each target's scores by task, rounded to two decimals; empty for an empty tree."""
    return {
        name: {task: round(score["value"], 2) for task, score in target["scores"].items()}
        for name, target in tree.get("targets", {}).items()
    }


def condensed(tree: Tree) -> Tree:
    """Return the scores with their intervals, as an adapter stores them; empty for an empty tree."""
    if not tree:
        return {}
    differences = {row["task"]: row["verdict"].replace(f" over {row['over']}", "") for row in tree["comparisons"]}
    return {
        **{key: tree["bootstrap"][key] for key in ("level", "resamples")},
        "tasks": {
            task: {
                "unit": about["unit"],
                "rows": about.get("rows"),
                "scores": {
                    name: [target["scores"][task][key] for key in ("value", "low", "high")]
                    for name, target in tree["targets"].items()
                },
                "difference": differences.get(task),
            }
            for task, about in tree["tasks"].items()
        },
    }


def tables(tree: Tree) -> list[Table]:
    """Return the scores of all targets, and the differences to the first, as tables of 80 columns; none for an empty tree."""
    if not tree:
        return []
    names = [*tree["targets"]]
    scores = _table(f"Score and {100 * tree['bootstrap']['level']:.0f} % interval", ["", *names])
    for _, tasks in _groups(tree):
        for task in tasks:
            scores.add_row(plain(task), *(_cell(tree, name, task) for name in names))
        scores.add_section()
    found = [scores, *(_differences(tree, name) for name in names[1:])]
    if rows := _retrieval_details(tree):
        details = _table(RETRIEVAL_TITLE, ["", *names])
        for row in rows:
            details.add_row(plain(row[0]), *row[1:])
        found.insert(1, details)
    return found


def _differences(tree: Tree, name: str) -> Table:
    rows = [row for row in tree["comparisons"] if row["second"] == name]
    over = f" over {rows[0]['over']}" if rows else ""
    table = _table(f"{name} against {next(iter(tree['targets']))}{over}", ["", "difference", "p", ""])
    for row in rows:
        figures, _, word = row["verdict"].partition(f" over {row['over']}: ")
        table.add_row(plain(row["task"]), figures, "" if row["p"] is None else f"{row['p']:.3f}", word)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title_justify="left", box=SIMPLE_HEAD, pad_edge=False, title=plain(title), min_width=len(title))
    for number, column in enumerate(columns):
        table.add_column(plain(column), justify="right" if number else "left", no_wrap=not number, overflow="fold")
    return table


def _groups(tree: Tree) -> list[tuple[str, list[str]]]:
    """Return the tasks by what they measure, in the order of the first target's scores."""
    titles = {"transfer": "Transfer, accuracy x 100", "geometry": "Geometry of STS-B", "mteb": "MTEB, main score x 100"}
    groups: dict[str, list[str]] = {}
    for task in next(iter(tree["targets"].values()))["scores"]:
        title = titles.get(tree["tasks"][task]["suite"], tree["tasks"][task]["unit"])
        groups.setdefault(title, []).append(task)
    return list(groups.items())


def _cell(tree: Tree, name: str, task: str) -> str:
    score = tree["targets"][name]["scores"][task]
    digits = 3 if tree["tasks"][task]["suite"] == "geometry" else 2
    spread = f" ± {score['std_over_seeds']:.{digits}f}" if "std_over_seeds" in score else ""
    edges = "" if score["low"] is None else f" [{score['low']:.{digits}f}, {score['high']:.{digits}f}]"
    return f"{score['value']:.{digits}f}{spread}{edges}"


def render(tree: Tree, form: str) -> str:
    """Return the results as `markdown` or `latex`: a table for each kind of score, the verdicts, and the protocol."""
    latex = form == "latex"
    grid = _latex if latex else _markdown
    names = [*tree["targets"]]
    blocks = [
        grid([title, *tasks], [[name, *(_cell(tree, name, task) for task in tasks)] for name in names])
        for title, tasks in _groups(tree)
    ]
    blocks.append("\n".join(rf"\noindent {_escaped(line)}\\" if latex else f"- {line}" for line in _sentences(tree)))
    details = _details(tree)
    if details:
        blocks.append(grid(["Spearman / Pearson x 100", *names], details))
    if retrieval := _retrieval_details(tree):
        blocks.append(grid([RETRIEVAL_TITLE, *names], retrieval))
    return "\n\n".join(blocks) + "\n"


def _sentences(tree: Tree) -> list[str]:
    bootstrap = tree["bootstrap"]
    lines = [f"{row['task']}: {row['second']} against {row['first']} {row['verdict']}" for row in tree["comparisons"]]
    lines += [f"Warning: {warning}" for warning in tree["warnings"]]
    for name, target in tree["targets"].items():
        (first, *others) = target["members"]
        seeds = f"; mean ± standard deviation and interval over {len(others) + 1} seeds" if others else ""
        lines.append(f"{name}: {target['kind']}, sha256 {first['sha256'][:12]}, {first['precision']}{seeds}")
    lines.append(
        f"{100 * bootstrap['level']:.0f} % intervals; bootstrap of {bootstrap['resamples']} resamples, seed {bootstrap['seed']}; "
        f"promcse_pl {tree['versions']['promcse_pl']}, torch {tree['versions']['torch']}"
    )
    return lines


def _retrieval_details(tree: Tree) -> list[list[str]]:
    """Return a row for each further metric of each retrieval task, with means over seeds."""
    rows = []
    for task, score in next(iter(tree["targets"].values()))["scores"].items():
        scores = [target["scores"][task] for target in tree["targets"].values()]
        rows += [
            [f"{task} {title}", *(f"{_seed_mean(one, metric):.2f}" for one in scores)]
            for metric, title in METRICS.items()
            if metric in score.get("seeds", [score])[0]
        ]
    return rows


def _details(tree: Tree) -> list[list[str]]:
    """Return a row for each subset, mean and weighted mean, with means over seeds."""
    rows = []
    for task, score in next(iter(tree["targets"].values()))["scores"].items():
        subsets = score.get("seeds", [score])[0].get("subsets")
        if subsets is None:
            continue
        scores = [target["scores"][task] for target in tree["targets"].values()]
        metrics = ("spearman", "pearson")
        lines: dict[str, list[tuple[str, ...]]] = {
            subset: [("subsets", subset, metric) for metric in metrics] for subset in subsets
        }
        lines["mean"] = [(f"{metric}_mean",) for metric in metrics]
        lines["weighted mean"] = [(f"{metric}_weighted_mean",) for metric in metrics]
        for title, paths in lines.items():
            cells = (" / ".join(f"{_seed_mean(one, *path):.2f}" for path in paths) for one in scores)
            rows.append([f"{task} {title}", *cells])
    return rows


def _seed_mean(score: Tree, *path: str) -> float:
    """Return a number of a score by its keys; the mean over the seeds of a target of several."""
    seeds = score.get("seeds", [score])
    return float(sum(reduce(getitem, path, one) for one in seeds) / len(seeds))


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a tabular for booktabs; intervals are small."""
    small = re.compile(r" (\[.*\])")
    body = [" & ".join(small.sub(r" {\\scriptsize \1}", _escaped(cell)) for cell in row) + r" \\" for row in rows]
    head = " & ".join(map(_escaped, header)) + r" \\"
    start = f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"
    return "\n".join([start, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"])


def _escaped(text: str) -> str:
    text = re.sub(r"([%&#_{}$])", r"\\\1", text.replace("\\", "/"))
    return text.replace("±", r"$\pm$").replace("~", r"\textasciitilde{}").replace("^", r"\textasciicircum{}")
