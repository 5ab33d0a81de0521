"""Writes report.html: one file that contains its data and plotly.js, and makes no requests."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from promcse_pl.run_folder import LOG, is_number
from promcse_pl.sweeps.collect import FROZEN, Run, Sweep
from promcse_pl.sweeps.ranking import Row, dev_sets, different_dev_sets, format_score, rank, varied_settings
from promcse_pl.sweeps.report import commands, dev_text, duration, failures, notes, setting_text, tested_tasks
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.files import write_text
from promcse_pl.utils.paths import hide_home
from promcse_pl.version import __version__

REPORT = "report.html"
MAX_POINTS, MAX_CURVE, MIN_CURVE = 150_000, 400, 20
"""Maximum number of points of all training curves together (about 2 MB), and limits for one curve."""
NOT_DRAWN = "dev/best_"  # the running maximum of the dev score
_MARK = 'aria-labelledby="runs-title"'
"""Text that every report contains."""


def write_html(sweep: Sweep, *, tests: bool) -> Path:
    """Write report.html into the sweep's folder; return its path.

    Args:
        sweep: Sweep to show.
        tests: Include test scores.

    Raises:
        ConfigError: The folder has a report.html that is not a sweep report.
        DataError: The file cannot be written.
    """
    path = sweep.folder / REPORT
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"{path} exists and is not a report of promcse report. Move it to another folder")
    from plotly.offline import get_plotlyjs

    content = page_content(sweep, tests=tests)
    write_text(path, render("page.html", content, script=_page_file("page.js"), plotly=get_plotlyjs()))
    return path


def render(template: str, content: Mapping[str, Any], **code: str) -> str:
    """Return a page of the folder `page` with its style sheet; the home folder is written as ~.

    Args:
        template: File name of the Jinja template.
        content: Variables that may contain any text.
        code: Scripts of this package or of libraries.
    """
    import jinja2

    # autoescape: names, values and messages of runs may contain markup
    pages = jinja2.Environment(autoescape=True, finalize=lambda value: "" if value is None else value)
    pages.policies["json.dumps_kwargs"] = {"sort_keys": False}  # keep the order of metrics
    text = pages.from_string(_page_file(template)).render(hide_home(content), style=_page_file("style.css"), **code)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # file names may hold lone surrogates


def _page_file(name: str) -> str:
    return (files("promcse_pl.sweeps") / "page" / name).read_text(encoding="utf-8")


def page_content(sweep: Sweep, *, tests: bool) -> dict[str, Any]:
    """Return the variables of page.html; `data` is the part for its script."""
    runs = sweep.runs
    grouped, single = (rank(runs, by_seed=by_seed) for by_seed in (True, False))
    names, tasks = varied_settings(runs), tested_tasks(runs) if tests else []
    curves = sum(len(_curves(run)) for run in runs)
    most = max(MIN_CURVE, min(MAX_CURVE, MAX_POINTS // max(1, curves)))
    levels, incomparable = [levels_of(runs, name) for name in names], different_dev_sets(runs)
    return {
        "title": f"Sweep {sweep_name(sweep)}" + (f": {', '.join(names)}" if names else ""),
        "version": __version__,
        "facts": sweep_facts(sweep, tests=tests),
        "notes": notes(sweep, grouped, tests=tests),
        "commands": commands(sweep),
        "incomparable": incomparable,
        "columns": ["#", "dev", "n", "run", *names, *tasks, "time", "status"],
        "filters": [*zip(names, levels, strict=True), ("status", [*dict.fromkeys(run.state for run in runs)])],
        "grouped": table_rows(grouped, runs, names, tasks) if len(grouped) < len(single) else [],
        "single": table_rows(single, runs, names, tasks),
        "failures": [
            {"name": run.name, "state": run.state, "messages": messages, "log": str(run.folder / LOG)}
            for run, messages in failures(runs)
        ],
        "data": {
            "settings": names,
            "levels": levels,
            "comparable": incomparable is None,
            "runs": [
                {
                    "name": run.name,
                    "state": run.state,
                    "dev": run.dev if run.dev is not None and math.isfinite(run.dev) else None,
                    "values": [setting_text(run.settings.get(name, "")) for name in names],
                    "curves": {name: decimate(*curve, most) for name, curve in _curves(run).items()},
                }
                for run in runs
            ],
        },
    }


def sweep_name(sweep: Sweep) -> str:
    """Return the folder's name, with the date in front if the folder is DATE/TIME."""
    folder = sweep.folder.resolve()
    is_dated = re.fullmatch(r"\d{4}-\d\d-\d\d", folder.parent.name)
    return f"{folder.parent.name}/{folder.name}" if is_dated else folder.name


def sweep_facts(sweep: Sweep, *, tests: bool) -> list[tuple[str, str]]:
    """Return (name, text) pairs on the data, encoder and versions of the runs; unknown facts are left out."""
    runs = sweep.runs
    baseline = {
        task: _distinct(f"{run.frozen[task]:.2f}" for run in runs if task in run.frozen)
        for task in ("dev", *(tested_tasks(runs) if tests else []))
    }
    facts = {
        "training data": _distinct(run.data for run in runs),
        "encoder": _distinct(run.encoder for run in runs),
        "dev set": ", ".join(dev_sets(runs)),
        FROZEN: ", ".join(f"{task} {scores}" for task, scores in baseline.items() if scores),
        "started": _date(run.started for run in runs),
        "versions": _distinct(", ".join(f"{name} {number}" for name, number in run.versions.items()) for run in runs),
    }
    return [(name, text) for name, text in facts.items() if text]


def _distinct(texts: Iterable[str | None]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))


def _date(seconds: Iterable[float | None]) -> str:
    try:
        return f"{datetime.fromtimestamp(min(filter(None, seconds)), UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):  # unknown, or out of range
        return ""


def levels_of(runs: Sequence[Run], name: str) -> list[str]:
    """Return the distinct values of a setting: numbers by value, then other values by text."""
    values = {setting_text(run.settings[name]): run.settings[name] for run in runs if name in run.settings}
    return sorted(values, key=lambda text: (0, values[text], "") if is_number(values[text]) else (1, 0, text))


def table_rows(
    ranked: Sequence[Row], runs: Sequence[Run], names: Sequence[str], tasks: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the rows of the table; a cell is a text and the value to sort by."""
    indices = {id(run): index for index, run in enumerate(runs)}
    rows = []
    for row in ranked:
        label = ",".join(run.name for run in row.runs)
        # only the seeds differ
        settings = [_distinct(setting_text(run.settings.get(name, "")) for run in row.runs) for name in names]
        scores = [row.test(task) for task in tasks]
        cells: list[tuple[object, object]] = [
            (row.rank, row.rank),
            (dev_text(row), row.dev if row.has_finite_score else None),
            (row.n, row.n),
            (label, label),
            *((text, text) for text in settings),
            *((format_score(mean, std), mean) for mean, std in scores),
            (duration(row.seconds), row.seconds),
            (row.states, row.states),
        ]
        rows.append({"name": label, "rank": row.rank, "runs": [indices[id(run)] for run in row.runs], "cells": cells})
    return rows


def _curves(run: Run) -> dict[str, tuple[list[float], list[float]]]:
    """Return steps and values of each metric under train/ and dev/."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for entry in run.history:
        step = entry.get("step")
        for name, value in entry.items():
            is_drawn = name.startswith(("train/", "dev/")) and not name.startswith(NOT_DRAWN)
            if is_drawn and isinstance(step, int) and is_number(step) and is_number(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return curves


def decimate(steps: Sequence[float], values: Sequence[float], most: int) -> list[list[float | None]]:
    """Downsample a curve: keep both ends, and the minimum and maximum of equal intervals.

    Args:
        steps: Steps of the points.
        values: Values of the points; values that are not finite become gaps.
        most: Approximate number of points to keep.

    Returns:
        Steps and values, rounded to five digits.
    """
    stretch = math.ceil(2 * len(values) / most) if len(values) > most else 1
    kept = {0, len(values) - 1}
    for start in range(0, len(values), stretch):
        part = range(start, min(start + stretch, len(values)))
        finite = [index for index in part if math.isfinite(values[index])]
        kept |= set(part) - set(finite)
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    points = [
        (steps[index], float(f"{values[index]:.5g}") if math.isfinite(values[index]) else None)
        for index in sorted(kept)
    ]
    return [[step for step, _ in points], [value for _, value in points]]
