"""Prints a sweep on the terminal: the ranked table, notes, failures and the commands to continue with."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from promcse_pl.run_folder import CONFIG, DEV_METRICS
from promcse_pl.sweeps.collect import Run, Sweep
from promcse_pl.sweeps.ranking import (
    SEED,
    Row,
    dev_sets,
    different_dev_sets,
    find_best,
    format_score,
    varied_settings,
)
from promcse_pl.utils.paths import hide_home, run_command
from promcse_pl.utils.streams import visible
from promcse_pl.utils.terminal import output_console, plain

TEST_WARNING = "test scores are shown; do not select settings by test scores, select them by the dev score"
MAX_COLUMNS = 6
"""Maximum number of settings with a column of their own; with more, a row names the settings that differ from most runs."""
RESUMABLE = ("killed", "stopped", "failed")
UNFINISHED = ("not started", "damaged", *RESUMABLE)


def print_report(sweep: Sweep, rows: Sequence[Row], *, by_seed: bool, tests: bool) -> None:
    """Print the table, notes, failures and commands; warnings go to standard error.

    Args:
        sweep: Sweep to print.
        rows: Its ranked runs.
        by_seed: Whether the rows group runs by seed.
        tests: Show test scores.
    """
    output_console().print(ranked_table(sweep, rows, by_seed=by_seed, tests=tests))
    for note in notes(sweep, rows, tests=tests):
        (sys.stderr if note.startswith("warning") else sys.stdout).write(f"{visible(hide_home(note))}\n")
    for run, messages in failures(sweep.runs):
        for message in messages:
            lines = map(visible, hide_home(f"{run.name} {run.state}: {message}").split("\n"))
            sys.stdout.write("\n" + "\n  ".join(lines) + "\n")
    for description, command in commands(sweep):
        sys.stdout.write(f"\n{visible(hide_home(description))}:\n  {visible(hide_home(command))}\n")


def ranked_table(sweep: Sweep, rows: Sequence[Row], *, by_seed: bool, tests: bool) -> Table:
    """Return a table of the rows: rank, varied settings, dev score, test scores if asked for, time and status."""
    names = [name for name in varied_settings(sweep.runs) if not (by_seed and name == SEED)]
    tasks = tested_tasks(sweep.runs) if tests else []
    most_frequent: dict[str, str] = {}
    if len(names) > MAX_COLUMNS:
        for name in names:
            counts = Counter(setting_text(run.settings[name]) for run in sweep.runs if name in run.settings)
            most_frequent[name] = counts.most_common(1)[0][0]
    has_groups = any(len(row.runs) > 1 for row in rows)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("run", overflow="fold")
    for name in ["unlike most runs"] if most_frequent else names:
        header = plain(name).replace(".", ".\n")
        table.add_column(header, justify="left" if most_frequent else "right", overflow="fold")
    for title in ("dev", *(["n"] if has_groups else []), *map(plain, tasks), "time"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("status")
    for row in rows:
        values = row.runs[0].settings
        settings = [setting_text(values[name]) if name in values else "" for name in names]
        if most_frequent:
            pairs = zip(names, settings, strict=True)
            settings = [", ".join(f"{name}={text}" for name, text in pairs if text not in ("", most_frequent[name]))]
        table.add_row(
            "" if row.rank is None else str(row.rank),
            plain(",".join(run.name for run in row.runs)),
            *map(plain, settings),
            dev_text(row),
            *([str(row.n)] if has_groups else []),
            *(format_score(*row.test(task)) for task in tasks),
            duration(row.seconds),
            row.states,
        )
    return table


def notes(sweep: Sweep, rows: Sequence[Row], *, tests: bool) -> list[str]:
    """Return notes on the ranking and on problems of the folder; warnings start with `warning: `."""
    lines = [f"warning: {warning}" for warning in sweep.warnings]
    sets = dev_sets(sweep.runs)
    if why := different_dev_sets(sweep.runs):
        lines.append(f"warning: {why}")
    elif not any(run.finished for run in sweep.runs):
        lines.append("no run is finished, so nothing is ranked")
    elif not any(row.rank for row in rows):
        lines.append("no finished run has a dev score, so nothing is ranked (data.dev names a dev set)")
    else:
        metric = next(run.metric for row in rows if row.rank for run in row.runs if run.finished)
        lines.append(f"ranked by {sets[0] if sets else 'dev'}, {DEV_METRICS[metric]} x 100")
    precisions = sorted({run.precision for run in sweep.runs if run.precision})
    if len(precisions) > 1 and "trainer.precision" not in varied_settings(sweep.runs):
        lines.append(
            f"warning: the runs were trained in different precisions ({', '.join(precisions)}), which changes scores slightly. "
            "Try: trainer.precision=float32 or bfloat16 for all jobs"
        )
    best = find_best(sweep.runs)
    if best and len(best.row.runs) > 1 and rows[0].runs != best.row.runs:  # every run has a row
        lines.append("the best settings have the highest mean over seeds; they may differ from those of the first row")
    if any(len(row.runs) > 1 for row in rows):
        lines.append(
            "runs that differ by the seed alone share a row: mean ± standard deviation over n seeds (--runs: a row per run)"
        )
    if any(not run.finished and run.dev is not None for run in sweep.runs):
        lines.append("scores in brackets are the best so far of unfinished runs; they are not ranked")
    if tests and tested_tasks(sweep.runs):
        lines.append(f"warning: {TEST_WARNING}")
    return lines


def failures(runs: Sequence[Run]) -> list[tuple[Run, list[str]]]:
    """Return the runs with problems and their messages."""
    found = []
    for run in runs:
        messages = [run.error] if run.error else []
        if run.state == "killed":
            messages.append("the process ended without an error message: it was killed, or the machine went down")
        if messages or run.problems:
            found.append((run, messages + run.problems))
    return found


def commands(sweep: Sweep) -> list[tuple[str, str]]:
    """Return (description, command) pairs: repeat the best run, and run the unfinished jobs or resume each run."""
    found = []
    if best := find_best(sweep.runs):
        run = best.run
        parts = [part for part in Path(hide_home(str(run.folder.resolve()))).parts if part not in ("/", "~")]
        out = "-".join(("outputs/repeat", *parts[-3 if sweep.planned else -2 :]))
        seed = f", seed {run.settings[SEED]}" if len(best.row.runs) > 1 and SEED in run.settings else ""
        arguments = ["promcse", "train", "--config", str(run.folder / CONFIG), "--out", out]
        found.append((f"repeat the best run ({run.name}{seed})", shlex.join(arguments)))
    # a run with damaged results but a readable status has finished: a sweep does not run it again
    unfinished = [
        run
        for run in sweep.runs
        if run.state in UNFINISHED and not (run.state == "damaged" and run.started is not None)
    ]
    if unfinished and sweep.planned:
        jobs = "1 unfinished job" if len(unfinished) == 1 else f"{len(unfinished)} unfinished jobs"
        found.append((f"run the {jobs}", run_command("-m", f"sweep.resume={sweep.folder}")))
    else:
        resumable = [run for run in unfinished if run.state in RESUMABLE]
        found += [(f"to resume {run.name}", run_command(f"resume={run.folder}")) for run in resumable]
    return found


def tested_tasks(runs: Sequence[Run]) -> list[str]:
    """Return the test tasks of all runs."""
    return [*dict.fromkeys(task for run in runs for task in run.tests)]


def setting_text(value: object) -> str:
    """Return the value of a setting as typed in an override."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def dev_text(row: Row) -> str:
    """Return a row's dev score; without a finished run the best score so far, in brackets."""
    if row.dev is not None:
        return format_score(row.dev, row.std)
    so_far = [run.dev for run in row.runs if run.dev is not None]
    return f"({max(so_far):.2f})" if so_far else ""


def duration(seconds: float | None) -> str:
    """Format a duration: `41 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
