"""`promcse index`: a FAISS index of an encoded corpus."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:  # noqa: ANN401  (argparse's type is private)
    """Add the command's parser."""
    parser = commands.add_parser("index", help="build a FAISS index of an encoded corpus")
    parser.add_argument("corpus", metavar="FOLDER", type=Path, help="output folder of promcse encode")
    parser.add_argument(
        "--kind",
        choices=("flat", "hnsw", "ivfpq"),
        required=True,
        help="flat: exact; hnsw: fast, all vectors in memory; ivfpq: compressed, about 15 times smaller. Written to FOLDER/KIND",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Build the index."""
    from rich.console import Console

    from promcse_pl.corpus.index import build_corpus_index
    from promcse_pl.utils.paths import expand
    from promcse_pl.utils.terminal import stages

    corpus = expand(options.corpus)
    with stages(Console(stderr=True)) as bar:
        out = build_corpus_index(corpus, options.kind, report=lambda done, total: bar("adding vectors", done, total))
    sys.stdout.write(f"{out}: to search it: promcse search ADAPTER {shlex.quote(str(out))} 'a query'\n")
