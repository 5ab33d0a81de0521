"""A sweep on the terminal: the ranked table, the failures, and the commands to go on with."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from promcse_pl.run_folder import CONFIG, read_status
from promcse_pl.sweeps.collect import Run, Sweep
from promcse_pl.sweeps.ranking import Row, dev_sets, different_dev_sets, format_score, find_best, varied_settings
from promcse_pl.utils.errors import DataError
from promcse_pl.utils.paths import hide_home, run_command
from promcse_pl.utils.streams import visible
from promcse_pl.utils.terminal import output_console, plain

CHEATING = (
    "test scores are shown: choosing settings by them is cheating, since a score that was chosen by is no longer a test. "
    "Choose by dev."
)
MOST_COLUMNS = 6
"""Settings that get a column each on a terminal; of more, each row names those in which it differs from most runs."""
UNFINISHED = ("not started", "killed", "stopped", "failed", "damaged")


def print_report(sweep: Sweep, rows: Sequence[Row], *, by_seed: bool, tests: bool) -> None:
    """Print the table, what to know about it, the failures and the commands; warnings go to standard error."""
    console = output_console()
    console.print(ranked_table(sweep, rows, by_seed=by_seed, tests=tests))
    for line in notes(sweep, rows, tests=tests):
        (sys.stderr if line.startswith("warning") else sys.stdout).write(f"{visible(hide_home(line))}\n")
    for run, messages in failures(sweep.runs):
        for message in messages:
            first, *more = hide_home(f"{run.name} {run.state}: {message}").split("\n")
            sys.stdout.write(
                "".join(["\n", *(f"{visible(line)}\n" for line in (first, *(f"  {line}" for line in more)))])
            )
    for what, command in commands(sweep):
        sys.stdout.write(f"\n{visible(hide_home(what))}:\n  {visible(hide_home(command))}\n")


def ranked_table(sweep: Sweep, rows: Sequence[Row], *, by_seed: bool, tests: bool) -> Table:
    """Return one line for each row: its rank, the settings that vary, dev score, time and status, test scores if asked."""
    names = [name for name in varied_settings(sweep.runs) if not (by_seed and name == "seed")]
    tasks = tested_tasks(sweep.runs) if tests else []
    usual = None
    if len(names) > MOST_COLUMNS:
        counts = {
            name: Counter(shown(run.settings[name]) for run in sweep.runs if name in run.settings) for name in names
        }
        usual = {name: count.most_common(1)[0][0] for name, count in counts.items()}
    several = any(len(row.runs) > 1 for row in rows)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("run", overflow="fold")
    for name in ["unlike most runs"] if usual else names:
        table.add_column(plain(name).replace(".", ".\n"), justify="left" if usual else "right", overflow="fold")
    for title in ("dev", *(["n"] if several else []), *map(plain, tasks), "time"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("status")
    for row in rows:
        first = row.runs[0]
        table.add_row(
            "" if row.rank is None else str(row.rank),
            plain(",".join(run.name for run in row.runs)),
            *(plain(text) for text in _settings(first, names, usual)),
            _dev(row),
            *([str(row.n)] if several else []),
            *(format_score(*row.test(task)) for task in tasks),
            duration(row.seconds),
            row.states,
        )
    return table


def notes(sweep: Sweep, rows: Sequence[Row], *, tests: bool) -> list[str]:
    """Return what a reader of the table must know: how it is ordered, and what is odd about the folder."""
    lines = [f"warning: {warning}" for warning in sweep.warnings]
    sets = dev_sets(sweep.runs)
    if why := different_dev_sets(sweep.runs):
        lines.append(f"warning: {why}")
    elif not any(run.finished for run in sweep.runs):
        lines.append("no run is finished, so nothing is ranked")
    elif not any(row.rank for row in rows):
        lines.append("no finished run has a dev score, so nothing is ranked (data.dev names a development set)")
    else:
        lines.append(f"ranked by {sets[0] if sets else 'dev'}, Spearman x 100")
    precisions = sorted({run.precision for run in sweep.runs if run.precision})
    if len(precisions) > 1 and "trainer.precision" not in varied_settings(sweep.runs):
        lines.append(
            f"warning: the runs were trained in different precisions ({', '.join(precisions)}), which changes scores slightly. "
            "Try: trainer.precision=float32 or bfloat16 for all jobs"
        )
    best = find_best(sweep.runs)
    if best and len(best.row.runs) > 1 and rows[0].runs != best.row.runs:  # a line for each run
        lines.append("the best settings have the highest mean over seeds; they may differ from those of the first row")
    if any(len(row.runs) > 1 for row in rows):
        lines.append(
            "runs that differ by the seed alone are together: mean ± standard deviation of n finished runs (--runs: each)"
        )
    if any(not run.finished and run.dev is not None for run in sweep.runs):
        lines.append("(in brackets: the best so far of a run that is not finished; not ranked)")
    if tests and tested_tasks(sweep.runs):
        lines.append(f"warning: {CHEATING}")
    return lines


def failures(runs: Sequence[Run]) -> list[tuple[Run, list[str]]]:
    """Return the runs that something is wrong with, and what."""
    killed = "its process ended without a word: killed, or the machine went down"
    told = [
        (run, [*filter(None, [run.error]), *([killed] if run.state == "killed" else []), *run.problems]) for run in runs
    ]
    return [(run, messages) for run, messages in told if messages]


def _has_finished(run: Run) -> bool:
    """Return whether a run finished by its status, even if its results are damaged: a resume would not run it again."""
    try:
        status = read_status(run.folder)
    except DataError:
        return False
    return status is not None and status.state == "finished"


def commands(sweep: Sweep) -> list[tuple[str, str]]:
    """Return the next commands, each with a description: repeat the best run, run what is not finished."""
    found = []
    if best := find_best(sweep.runs):
        run = best.run
        place = [part for part in Path(hide_home(str(run.folder.resolve()))).parts if part not in ("/", "~")]
        again = "-".join(("outputs/again", *place[-3 if sweep.planned else -2 :]))
        arguments = ["promcse", "train", str(run.folder / CONFIG), "--out", again]
        seed = f", seed {run.settings['seed']}" if len(best.row.runs) > 1 and "seed" in run.settings else ""
        found.append((f"repeat the best run ({run.name}{seed})", shlex.join(arguments)))
    unfinished = [run for run in sweep.runs if run.state in UNFINISHED and not _has_finished(run)]
    if unfinished and sweep.planned:
        resume = run_command("-m", f"sweep.resume={sweep.folder}")
        found.append((f"run what is not finished ({_runs(len(unfinished))})", resume))
    else:
        begun = [run for run in unfinished if run.state in ("killed", "stopped", "failed")]
        found += [(f"go on with {run.name}", run_command(f"resume={run.folder}")) for run in begun]
    return found


def tested_tasks(runs: Sequence[Run]) -> list[str]:
    """Return the tasks that any run was tested on."""
    return [*dict.fromkeys(task for run in runs for task in run.tests)]


def shown(value: object) -> str:
    """Return a setting's value as one types it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def duration(seconds: float | None) -> str:
    """Return a time to read: `41 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _settings(run: Run, names: Sequence[str], usual: Mapping[str, str] | None) -> list[str]:
    """Return the cells of a run's settings: one each, or all that are unusual in one."""
    values = {name: shown(run.settings[name]) for name in names if name in run.settings}
    if usual is None:
        return [values.get(name, "") for name in names]
    return [", ".join(f"{name}={value}" for name, value in values.items() if value != usual[name])]


def _dev(row: Row) -> str:
    if row.dev is not None:
        return format_score(row.dev, row.std)
    so_far = [run.dev for run in row.runs if run.dev is not None]
    return f"({max(so_far):.2f})" if so_far else ""


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"
