"""`promcse dashboard`: the saved view of a W&B project."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_parser(commands: Any) -> None:  # noqa: ANN401  (argparse's type is private)
    """Add the command's parser."""
    parser = commands.add_parser("dashboard", help="create the saved view of a W&B project and print its URL")
    parser.add_argument("--project", default="promcse", help="W&B project (default promcse)")
    parser.add_argument("--entity", help="W&B user or team (default: that of the account)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Save the view and print its URL."""
    from promcse_pl.tracking.dashboard import save_dashboard

    sys.stdout.write(f"{save_dashboard(options.project, options.entity)}\n")
