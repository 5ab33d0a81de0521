"""The W&B Report of a sweep: summary, best adapter, heat map, training curves and jobs. Requires the extra `dashboard`.

Like everything that is sent to W&B, it contains no error messages, and only the last part of every path; the path of the best
adapter is relative to the folder in which the command was started.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

from promcse_pl.config import TrackingConfig
from promcse_pl.evaluation.statistics import mean_over_seeds
from promcse_pl.run_folder import DEV_METRICS, is_number, read_results
from promcse_pl.sweeps.collect import Run, Sweep, read_sweep
from promcse_pl.sweeps.html import levels_of, sweep_facts, sweep_name, table_rows
from promcse_pl.sweeps.ranking import (
    SEED,
    Best,
    Row,
    different_dev_sets,
    find_best,
    format_score,
    rank,
    varied_settings,
)
from promcse_pl.sweeps.report import setting_text
from promcse_pl.sweeps.wandb_summary import submitted_config, sync_command
from promcse_pl.tracking.dashboard import CURVES, line_plot, save_and_print, save_view, score_colors
from promcse_pl.tracking.wandb import hide_folders, short
from promcse_pl.utils.errors import ConfigError, PromcseError
from promcse_pl.utils.paths import expand
from promcse_pl.utils.streams import visible

COMMAND = "promcse dashboard --sweep"
MAX_ROWS, MAX_LEVELS, MAX_TITLE = 200, 12, 128
"""Maximum number of rows of a table, of values of a setting that are listed, and of characters of a title (W&B's limit)."""
SHADES = "░▒▓█"
"""Marks of a heat map from the lowest to the highest quarter of the scores: Markdown has no cell colours."""


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a W&B view; its parts are shown in this order.

    Attributes:
        name: Title.
        paragraphs: Plain text.
        columns, rows: Table; without columns there is none.
        code: Code blocks: language (None: shell) and text.
        panels: Panels of wandb_workspaces.
    """

    name: str
    paragraphs: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    code: Sequence[tuple[str | None, str]] = ()
    panels: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class TrackedSweep:
    """A sweep with W&B runs.

    Attributes:
        sweep: Its runs.
        tracking: Settings of its first W&B run.
    """

    sweep: Sweep
    tracking: TrackingConfig

    @property
    def run_ids(self) -> list[str]:
        """Ids of its W&B runs."""
        return [run.wandb_id for run in self.sweep.runs if run.wandb_id]


def read_tracked_sweep(folder: str | Path) -> TrackedSweep:
    """Read a sweep whose runs were logged to W&B.

    Raises:
        DataError: The folder contains no run.
        ConfigError: No run was logged to W&B.
    """
    sweep = read_sweep(folder, COMMAND)
    configs = [config for run in sweep.runs if run.wandb_id and (config := submitted_config(run))]
    if not configs:
        raise ConfigError(
            f"no run of {folder} was logged to W&B, and finished runs cannot be added later. "
            f"Try: repeat the sweep with tracking=wandb, or promcse report {shlex.quote(str(folder))}"
        )
    return TrackedSweep(sweep, configs[0].tracking)


def save_report(folder: Path, project: str | None, entity: str | None) -> str:
    """Save the report of a sweep on the W&B server; return its URL.

    Args:
        folder: Folder of the sweep.
        project: W&B project; None: that of the sweep's runs.
        entity: W&B user or team; None: that of the sweep's runs, else the account's default.

    Raises:
        PromcseError: The sweep has no W&B runs, some of its runs are not uploaded, or the report cannot be saved.
    """
    tracked = read_tracked_sweep(folder)
    offline = [run for run in tracked.sweep.runs if _is_offline(run.folder)]
    if offline:
        raise ConfigError(
            f"{len(offline)} of {len(tracked.run_ids)} W&B runs of {folder} are offline. "
            f"Try: wandb login && {sync_command(folder, tracked.sweep.runs)}"
        )
    project = project or tracked.tracking.project
    return save_view(
        "promcse_pl.sweeps.wandb_report:main", str(folder.absolute()), project, entity or tracked.tracking.entity
    )


def main(arguments: Sequence[str]) -> int:
    """Save the report of a folder, project and entity (a JSON list as the only argument) and print its URL."""
    folder, project, entity = json.loads(arguments[0])
    tracked = read_tracked_sweep(folder)
    return save_and_print(entity, lambda entity: build_report(tracked, project, entity, is_online=True))


def build_report(tracked: TrackedSweep, project: str, entity: str, *, is_online: bool) -> Any:  # noqa: ANN401  (a Report)
    """Return the report as an object of wandb_workspaces; nothing is sent.

    Args:
        tracked: The sweep.
        project: W&B project.
        entity: W&B user or team; empty: unknown.
        is_online: Whether the run sets name the project, whose id wandb-workspaces then requests from the server.
    """
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    source = {"project": project, "entity": entity} if is_online else {}
    blocks: list[Any] = []
    for section in report_sections(tracked, project, entity):
        blocks += [wr.H2(section.name), *(wr.P(text) for text in section.paragraphs)]
        if section.columns:
            blocks.append(wr.MarkdownBlock(_markdown_table(section.columns, section.rows)))
        blocks += [wr.CodeBlock(code=text, language=language) for language, text in section.code]
        if section.panels:
            runs = wr.Runset(name="jobs", filters=[expr.Metric("ID").isin(tracked.run_ids)], **source)
            blocks.append(wr.PanelGrid(runsets=[runs], panels=list(section.panels)))
    return wr.Report(
        project=project,
        entity=entity,
        title=report_title(tracked.sweep),
        description=f"{_jobs(tracked.sweep.runs)}, written by promcse dashboard",
        blocks=blocks,
    )


def report_title(sweep: Sweep) -> str:
    """Return the title: the sweep's folder and its varied settings. It is part of the address of the report."""
    title = f"Sweep {sweep_name(sweep)}: {', '.join(varied_settings(sweep.runs))}"
    return short(re.sub(r"[^\w .,:-]", "-", title), MAX_TITLE)


def report_sections(tracked: TrackedSweep, project: str, entity: str) -> list[Section]:
    """Return the content of the report."""
    sweep = tracked.sweep
    grouped, single = (rank(sweep.runs, by_seed=by_seed) for by_seed in (True, False))
    names, best = varied_settings(sweep.runs), find_best(sweep.runs)
    logged = {key for run in sweep.runs for entry in run.history for key in entry}
    curves = CURVES["Training"] | CURVES["Development"]
    sections = [Section("Summary", _summary(sweep, grouped, best))]
    if best:
        sections += [_best_adapter(sweep, best, project, entity), _effects(sweep, grouped, best)]
    if panels := [line_plot(title, metric) for title, metric in curves.items() if metric in logged]:
        sections.append(Section("Training curves", panels=panels))
    if len(grouped) < len(single):
        shown = [name for name in names if name != SEED]
        sections.append(_table("Settings", ["Mean ± standard deviation over the seeds."], grouped, sweep.runs, shown))
    sections.append(_table("Jobs", [], single, sweep.runs, names))
    return [section for section in sections if section.paragraphs or section.columns or section.panels]


def _text(value: object, key: str = "") -> str:
    """Return the value of a setting, or a name or fact, as text without folders."""
    return visible(hide_folders(setting_text(value), key))


def _summary(sweep: Sweep, grouped: Sequence[Row], best: Best | None) -> list[str]:
    runs = sweep.runs
    keys = {"data": "data.train", "encoder": "model.path", "dev_name": "data.dev"}
    public = [
        dataclasses.replace(run, **{name: hide_folders(getattr(run, name), key) for name, key in keys.items()})
        for run in runs
    ]
    facts = sweep_facts(dataclasses.replace(sweep, runs=public), tests=False)
    setup = "; ".join(f"{name}: {text}" for name, text in facts if name != "versions")
    states = ", ".join(f"{count} {state}" for state, count in Counter(run.state for run in runs).items())
    scored = sum(row.rank is not None for row in grouped)
    return [
        f"Varied: {'; '.join(_levels_text(runs, name) for name in varied_settings(runs)) or 'nothing'}.",
        *([f"Setup: {visible(setup)}."] if setup else []),
        f"{_jobs(runs)}: {states}.",
        *([_best_text(best, runs)] if best else []),
        *(
            [f"Best of {scored} settings on the dev set: the score is optimistic; a test set gives an unbiased one."]
            if scored > 1
            else []
        ),
        f"Not compared: {_not_compared(runs, grouped)}.",
    ]


def _jobs(runs: Sequence[Run]) -> str:
    return "1 job" if len(runs) == 1 else f"{len(runs)} jobs"


def _levels_text(runs: Sequence[Run], name: str) -> str:
    levels = [_text(level, name) for level in levels_of(runs, name)]
    shown = ", ".join(levels) if len(levels) <= MAX_LEVELS else f"{len(levels)} values, {levels[0]} to {levels[-1]}"
    return f"{_text(name)} ({shown})"


def _best_text(best: Best, runs: Sequence[Run]) -> str:
    """Return the best settings, their score with the number of seeds, and a confidence interval."""
    row, run = best.row, best.run
    settings = ", ".join(
        f"{name}={run.settings[name]}" for name in varied_settings(runs) if name != SEED and name in run.settings
    )
    scores = [member.dev for member in row.seeds if member.dev is not None]
    metric = DEV_METRICS[run.metric]
    if row.n > 1:
        _, _, low, high = mean_over_seeds(scores)
        seeds = (
            f"mean ± standard deviation of {row.n} seeds, 95 % confidence interval over seeds [{low:.2f}, {high:.2f}]"
        )
        last = f"; best seed {run.dev:.2f}, job {run.name}"
    else:
        seeds, last = "1 seed", f"; job {run.name}"
        if interval := _dev_interval(run):
            seeds += f", 95 % confidence interval over the dev set [{interval[0]:.2f}, {interval[1]:.2f}]"
    named = f"Best by dev: {_text(settings)}: " if settings else "Best by dev: "
    return f"{named}{format_score(row.dev, row.std)} ({metric} x 100, {seeds}){last}."


def _dev_interval(run: Run) -> tuple[float, float] | None:
    """Return the confidence interval of a run's final dev score; None if results.json has none."""
    try:
        score = read_results(run.folder)["evaluation"]["targets"]["adapter"]["scores"]["dev"]
        low, high = score["low"], score["high"]
    except (PromcseError, LookupError, TypeError):
        return None
    return (low, high) if is_number(low) and is_number(high) else None


def _not_compared(runs: Sequence[Run], grouped: Sequence[Row]) -> str:
    """Return what the ranking leaves out."""
    if different_dev_sets(runs):
        return "all jobs, since they were evaluated on different dev sets"
    left_out = [f"{run.name} ({run.state})" for run in runs if not run.finished or run.dev is None]
    more = f" and {len(left_out) - MAX_LEVELS} more" if len(left_out) > MAX_LEVELS else ""
    jobs = "job" if len(left_out) == 1 else "jobs"
    parts = [f"{jobs} {', '.join(left_out[:MAX_LEVELS])}{more}"] if left_out else []
    if all(row.n < 2 for row in grouped):
        parts.append("seeds (only one per combination of settings)")
    return "; ".join(
        [*parts, "test scores", "the significance of differences (promcse evaluate A B tests two adapters)"]
    )


def _best_adapter(sweep: Sweep, best: Best, project: str, entity: str) -> Section:
    """Return where the best adapter is and how to load it."""
    source, origin = _relative_path(sweep, best.run)
    code: list[tuple[str | None, str]] = []
    text = f"On the machine of the sweep: {source}/adapter, relative to {origin}."
    if best.run.wandb_id and not any(best.run.folder.glob("wandb/offline-run-*")):  # offline runs have no artifacts
        path = "/".join(part for part in (entity, project, f"adapter-{best.run.wandb_id}:latest") if part)
        source = "best-adapter"
        text = f"W&B artifact {path}. {text}"
        code.append((None, f"wandb artifact get {path} --root {source}"))
    code.append(("python", f'from promcse_pl import PromCSE\n\nmodel = PromCSE.from_pretrained("{source}")'))
    return Section("Best adapter", [text], code=code)


def _relative_path(sweep: Sweep, run: Run) -> tuple[str, str]:
    """Return the path of a run as ./PATH, which is never a hub id, and a description of the folder that it is relative to.

    It is relative to the current folder if the sweep is below it, as it is in a project folder, else to the folder that contains
    the sweep. The names of other folders, such as the home folder, are not part of it.
    """
    folder, current = Path(os.path.abspath(sweep.folder)), Path.cwd()  # noqa: PTH100  (keeps links)
    base, origin = folder.parent, f"the folder that contains {folder.name}"
    if current in folder.parents and current not in expand("~").parents:
        base, origin = current, "the folder in which promcse dashboard was started"
    path = (folder / run.folder.relative_to(sweep.folder)).relative_to(base)
    return visible(f"./{path}"), visible(origin)


def _effects(sweep: Sweep, grouped: Sequence[Row], best: Best) -> Section:
    """Return the heat map of two settings, and panels of all numeric settings against the dev score."""
    import wandb_workspaces.reports.v2 as wr

    names = [name for name in varied_settings(sweep.runs) if name != SEED]
    numeric = [
        name
        for name in names
        if "." in name and all(is_number(run.settings[name]) for run in sweep.runs if name in run.settings)
    ]
    metric = f"dev/{best.run.metric}"
    dev = wr.SummaryMetric(metric)
    title = f"dev {DEV_METRICS[best.run.metric]} x 100"
    heat = heat_map(sweep.runs, grouped, names)
    panels: list[Any] = []
    if heat and {heat.row_setting, heat.column_setting} <= {*numeric}:
        panels.append(
            wr.ScatterPlot(
                title=f"{heat.row_setting} x {heat.column_setting}, colour: {title}",
                x=wr.Config(heat.row_setting),
                y=wr.Config(heat.column_setting),
                z=dev,
                gradient=score_colors(),
            )
        )
    if numeric:
        columns = [wr.ParallelCoordinatesPlotColumn(metric=key) for key in (*map(wr.Config, numeric), dev)]
        panels += [
            wr.ParallelCoordinatesPlot(title=f"settings to {title}", columns=columns, gradient=score_colors()),
            wr.ParameterImportancePlot(with_respect_to=metric),
        ]
    if heat is None:
        return Section("Effect of the settings", panels=panels)
    return Section("Effect of the settings", [heat.caption], heat.columns, heat.rows, panels=panels)


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Dev scores over two settings, as a table.

    Attributes:
        row_setting, column_setting: Settings of the rows and of the columns.
        caption: What the cells contain.
        columns, rows: The table; the first cell of each row is the value of `row_setting`.
    """

    row_setting: str
    column_setting: str
    caption: str
    columns: list[str]
    rows: list[list[str]]


def heat_map(runs: Sequence[Run], grouped: Sequence[Row], names: Sequence[str]) -> HeatMap | None:
    """Return the heat map of the two settings with the most scored combinations at the best values of all other settings.

    Args:
        runs: Runs of the sweep.
        grouped: Ranked rows, one per combination of settings (mean over seeds).
        names: Varied settings without the seed.

    Returns:
        The heat map; None if no two settings form a grid of which at least half of the cells have a score.
    """
    ranked = [
        ({name: setting_text(row.runs[0].settings.get(name)) for name in names}, row.dev)
        for row in grouped
        if row.rank is not None
    ]
    found: list[tuple[str, str, dict[tuple[str, str], float]]] = []
    for row_setting, column_setting in combinations(names, 2):
        others = [name for name in names if name not in (row_setting, column_setting)]
        cells = {
            (values[row_setting], values[column_setting]): dev
            for values, dev in ranked
            if dev is not None and all(values[name] == ranked[0][0][name] for name in others)
        }
        sides = [{key[axis] for key in cells} for axis in (0, 1)]
        if min(map(len, sides)) > 1 and 2 * len(cells) >= len(sides[0]) * len(sides[1]):
            found.append((row_setting, column_setting, cells))
    if not found:
        return None
    row_setting, column_setting, cells = max(found, key=lambda entry: len(entry[2]))
    row_levels, column_levels = (
        [level for level in levels_of(runs, name) if any(key[axis] == level for key in cells)]
        for axis, name in enumerate((row_setting, column_setting))
    )
    low, high = min(cells.values()), max(cells.values())
    marks = {key: SHADES[min(3, int(4 * (dev - low) / ((high - low) or 1)))] for key, dev in cells.items()}
    table = {
        key: f"{marks[key]} {cells[key]:.2f}" if key in cells else "" for key in product(row_levels, column_levels)
    }
    fixed = ", ".join(
        f"{_text(name)}={_text(ranked[0][0][name], name)}"
        for name in names
        if name not in (row_setting, column_setting)
    )
    return HeatMap(
        row_setting,
        column_setting,
        f"Dev score of {_text(row_setting)} (rows) and {_text(column_setting)} (columns)"
        + (f" at {fixed}, the best values of the other settings" if fixed else "")
        + f"; means over seeds. {SHADES[0]} to {SHADES[-1]}: quarters of the range from {low:.2f} to {high:.2f}.",
        [f"{_text(row_setting)} / {_text(column_setting)}", *(_text(level, column_setting) for level in column_levels)],
        [[_text(level, row_setting), *(table[level, other] for other in column_levels)] for level in row_levels],
    )


def _table(name: str, paragraphs: list[str], rows: Sequence[Row], runs: Sequence[Run], names: Sequence[str]) -> Section:
    """Return a table of ranked rows."""
    columns = ["#", "dev", "n", "run", *names, "time", "status"]
    cells = [
        ["" if text is None else _text(str(text), key) for key, (text, _) in zip(columns, row["cells"], strict=True)]
        for row in table_rows(rows, runs, names, [])
    ]
    if len(cells) > MAX_ROWS:
        paragraphs = [*paragraphs, f"The first {MAX_ROWS} of {len(cells)} rows; promcse report shows all."]
    return Section(name, paragraphs, [*map(_text, columns)], cells[:MAX_ROWS])


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the cells may contain any text."""
    escaped = [[re.sub(r"([\\`*_{}\[\]<>|#~$&!])", r"\\\1", cell) for cell in row] for row in (columns, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return "\n".join([lines[0], "|" + " --- |" * len(columns), *lines[1:]])


def _is_offline(folder: Path) -> bool:
    """Return whether a run has W&B files that were not uploaded; `wandb sync` leaves a marker beside those that were."""
    return any(not any(path.glob("*.wandb.synced")) for path in folder.glob("wandb/offline-run-*"))
