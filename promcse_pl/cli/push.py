"""`promcse push`: upload an adapter to the Hugging Face Hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from promcse_pl.cli.inputs import note_unfinished_run
from promcse_pl.utils.imports import without_gc
from promcse_pl.utils.streams import visible


def add_parser(commands: Any) -> None:  # noqa: ANN401  (argparse's type is private)
    """Add the command's parser."""
    parser = commands.add_parser(
        "push",
        help="upload an adapter with its model card to the Hugging Face Hub",
        epilog="Example: promcse push outputs/DATE/RUN someone/my-adapter --private",
    )
    parser.add_argument("adapter", type=Path, help="adapter folder or run folder")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="repository; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, created if absent (default: the default branch)")
    parser.add_argument("--message", metavar="TEXT", help="commit message")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Upload the adapter and print the URL of the commit."""
    note_unfinished_run(options.adapter)
    with without_gc():
        from promcse_pl.publish import push_adapter

    url = push_adapter(
        options.adapter,
        options.repo_id,
        private=options.private or None,
        revision=options.revision,
        commit_message=options.message,
    )
    sys.stdout.write(f"{visible(url)}\n")
