"""report.html: one file with everything in it, plotly.js included; it asks no server for anything."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from promcse_pl.run_folder import LOG, is_number
from promcse_pl.sweeps.collect import Run, Sweep
from promcse_pl.sweeps.ranking import rank, varied_settings
from promcse_pl.sweeps.report import commands, failures, notes, tested_tasks
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.files import write_text
from promcse_pl.utils.paths import hide_home
from promcse_pl.version import __version__

REPORT = "report.html"
POINTS, MOST, LEAST = 150_000, 400, 20
"""Points of all training curves together (about 2 MB), and the most and fewest of one."""
NOT_DRAWN = "dev/best_spearman"  # the highest point of dev/spearman so far
_MARK, _HEAD = 'aria-labelledby="runs-title"', 100_000
"""Text that identifies a report, and the number of characters at the start of the file that are searched for it."""
SCRIPTS = ("data.js", "table.js", "charts.js", "page.js")


def write_html(sweep: Sweep, *, tests: bool) -> Path:
    """Write report.html into the sweep's folder; return its path.

    Args:
        sweep: What was read.
        tests: Whether the page holds the test scores.

    Raises:
        ConfigError: The folder has a report.html that is not a report of a sweep.
        DataError: It cannot be written.
    """
    path = sweep.folder / REPORT
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace")[:_HEAD]:
        raise ConfigError(f"{path} exists and is not a report of promcse report. Move it to another folder")
    from plotly.offline import get_plotlyjs

    page = files("promcse_pl.sweeps") / "page"
    parts = {
        "style": (page / "style.css").read_text(encoding="utf-8"),
        "data": _inert_json(hide_home(page_data(sweep, tests=tests))),
        "plotly": get_plotlyjs(),
        "script": "\n".join((page / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    template = (page / "page.html").read_text(encoding="utf-8")
    # one pass: what is put in is not searched for further places
    write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template))
    return path


def page_data(sweep: Sweep, *, tests: bool) -> dict[str, Any]:
    """Return what the page draws, as plain values."""
    rows, each = (rank(sweep.runs, by_seed=by_seed) for by_seed in (True, False))
    places = {id(run): place for place, run in enumerate(sweep.runs)}
    names = varied_settings(sweep.runs)
    curves = sum(len(_series(run)) for run in sweep.runs)
    points = max(LEAST, min(MOST, POINTS // max(1, curves)))
    return {
        "title": str(sweep.folder),
        "version": __version__,
        "settings": names,
        "tasks": tested_tasks(sweep.runs) if tests else [],
        "notes": notes(sweep, rows, tests=tests),
        "commands": commands(sweep),
        "runs": [_run(run, names, points, tests=tests) for run in sweep.runs],
        "rows": {
            name: [{"runs": [places[id(run)] for run in row.runs], "rank": row.rank} for row in ranked]
            for name, ranked in (("grouped", rows), ("each", each))
        },
        "failures": [
            {"name": run.name, "state": run.state, "messages": messages, "log": str(run.folder / LOG)}
            for run, messages in failures(sweep.runs)
        ],
    }


def _run(run: Run, names: Sequence[str], points: int, *, tests: bool) -> dict[str, Any]:
    return {
        "name": run.name,
        "values": [run.settings.get(name) for name in names],
        "state": run.state,
        "dev": run.dev,
        "not_finite": run.dev is not None and not math.isfinite(run.dev),
        "seconds": run.seconds,
        "tests": run.tests if tests else {},
        "curves": {name: decimate(*series, points) for name, series in _series(run).items()},
    }


def _series(run: Run) -> dict[str, tuple[list[float], list[float]]]:
    """Return steps and values of every loss part, gradient norm, learning rate and dev score of a run."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for entry in run.history:
        step = entry.get("step")
        for name, value in entry.items():
            drawn = name.startswith(("train/", "dev/")) and name != NOT_DRAWN
            if drawn and isinstance(step, int) and is_number(step) and is_number(value):
                steps, values = series.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return series


def decimate(steps: Sequence[float], values: Sequence[float], most: int) -> list[list[float | None]]:
    """Thin a curve out so that it looks the same: of every stretch its lowest and highest point stay, and both ends.

    Args:
        steps: Of the points.
        values: Of the points; one that is not finite becomes a gap.
        most: Points to keep, about.

    Returns:
        Steps and values, five digits each.
    """
    kept = range(len(values))
    if len(values) > most:
        stretch = math.ceil(2 * len(values) / most)
        ends = {0, len(values) - 1}
        for start in range(0, len(values), stretch):
            part = range(start, min(start + stretch, len(values)))
            ends |= {place for place in part if not math.isfinite(values[place])}
            finite = [place for place in part if math.isfinite(values[place])]
            ends |= {pick(finite, key=values.__getitem__) for pick in (min, max)} if finite else set()
        kept = sorted(ends)  # type: ignore[assignment]
    rounded = [float(f"{values[place]:.5g}") if math.isfinite(values[place]) else None for place in kept]
    return [[steps[place] for place in kept], rounded]


def _inert_json(data: object) -> str:
    """Return JSON that no browser takes for markup, whatever a setting or message holds; NaN and infinity become null."""
    text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False, default=str, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda sign: f"\\u{ord(sign[0]):04x}", text)


def _finite(data: Any) -> Any:  # noqa: ANN401
    if isinstance(data, dict):
        return {str(name): _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
