"""`promcse report`: the runs of a sweep, ranked."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from promcse_pl.utils.paths import expand, hide_home
from promcse_pl.utils.streams import visible


def add_parser(commands: Any) -> None:  # noqa: ANN401  (argparse's type is private)
    """Add the command's parser."""
    parser = commands.add_parser("report", help="rank the runs of a sweep and write FOLDER/report.html")
    parser.add_argument(
        "folder", metavar="FOLDER", type=expand, help="multirun/DATE/TIME, or any folder that contains runs"
    )
    parser.add_argument(
        "--runs", action="store_true", help="one line per run, not one for all seeds of the same settings"
    )
    parser.add_argument("--test", action="store_true", help="show test scores too; do not choose a run by them")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the ranking and write the HTML page."""
    from promcse_pl.sweeps.collect import read_sweep
    from promcse_pl.sweeps.html import write_html
    from promcse_pl.sweeps.ranking import rank
    from promcse_pl.sweeps.report import print_report

    sweep, by_seed = read_sweep(options.folder), not options.runs
    print_report(sweep, rank(sweep.runs, by_seed=by_seed), by_seed=by_seed, tests=options.test)
    sys.stdout.write(f"\npage: {visible(hide_home(str(write_html(sweep, tests=options.test))))}\n")
