"""`promcse dashboard`: the saved view of a W&B project, or the W&B Report of a sweep."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from promcse_pl.utils.paths import expand, hide_home
from promcse_pl.utils.streams import visible


def add_parser(commands: Any) -> None:  # noqa: ANN401  (argparse's type is private)
    """Add the command's parser."""
    parser = commands.add_parser(
        "dashboard",
        help="create the saved view of a W&B project, or the report of a sweep, and print its URL",
        epilog="Example: promcse dashboard --sweep multirun/DATE/TIME",
    )
    parser.add_argument("--project", help="W&B project (default promcse; with --sweep that of its runs)")
    parser.add_argument("--entity", help="W&B user or team (default: that of the runs, or of the account)")
    parser.add_argument(
        "--sweep", metavar="FOLDER", type=expand, help="write a W&B Report of this sweep, multirun/DATE/TIME"
    )
    parser.add_argument(
        "--preview",
        metavar="FILE",
        type=expand,
        help="write FILE.json (the JSON that would be sent) and FILE.html, and save nothing on the server; works offline",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Save the view or report, or write its preview, and print the URL or the files."""
    from promcse_pl.sweeps.wandb_preview import preview_dashboard, preview_report
    from promcse_pl.sweeps.wandb_report import save_report
    from promcse_pl.tracking.dashboard import DEFAULT_PROJECT, save_dashboard

    project, entity = options.project, options.entity
    lines: Sequence[object]
    if options.preview and options.sweep:
        lines = preview_report(options.preview, options.sweep, project, entity)
    elif options.preview:
        lines = preview_dashboard(options.preview, project, entity)
    elif options.sweep:
        lines = [save_report(options.sweep, project, entity)]
    else:
        lines = [save_dashboard(project or DEFAULT_PROJECT, entity)]
    sys.stdout.writelines(f"{visible(hide_home(str(line)))}\n" for line in lines)
