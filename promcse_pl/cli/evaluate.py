"""`promcse evaluate`: scores of adapters, runs and encoders, with confidence intervals and paired comparisons."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from promcse_pl.cli.inputs import add_encoder_option
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.imports import without_gc
from promcse_pl.utils.paths import expand, hide_home
from promcse_pl.utils.streams import visible


def add_parser(commands: Any) -> None:  # noqa: ANN401  (argparse's type is private)
    """Add the command's parser."""
    parser = commands.add_parser("evaluate", help="scores with confidence intervals; several targets are compared")
    parser.add_argument(
        "targets",
        metavar="TARGET",
        nargs="+",
        help="adapter or run folder, encoder (folder or hub id), official checkpoint, or a folder of runs that differ by seed; "
        "the others are compared with the first",
    )
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        required=True,
        help="comma-separated: sts, sick, cxc, transfer, geometry, retrieval, demo, files (csv, tsv, jsonl) of two texts and a "
        "score, folders in BEIR layout (or FOLDER/qrels/SPLIT.tsv), or mteb:NAME",
    )
    parser.add_argument(
        "--data", metavar="FOLDER", type=expand, help="data sets: senteval/, cxc/ for cxc, retrieval/ for retrieval"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", type=expand, help="folder for results.json and the tables in the --format chosen"
    )
    parser.add_argument(
        "--format", choices=("markdown", "latex"), help="print the tables in this format, not as plain text"
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=expand,
        nargs="?",
        const=Path("scores.pdf"),
        help="bar chart with intervals, .pdf, .png or .svg (default scores.pdf); with geometry also FILE-density: cosines by "
        "gold score",
    )
    parser.add_argument(
        "--pooling",
        help="cls, avg, max, lasttoken, cls+avg, ...: pooling of frozen encoders (default: from modules.json, else the default "
        "of the family) and of official checkpoints (default: read or inferred)",
    )
    add_encoder_option(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, or auto: a GPU if there is one")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Evaluate the targets on the tasks; print and save the tables."""
    import json

    from rich.console import Console

    from promcse_pl.config import check_tasks

    tasks = options.tasks.split(",")
    check_tasks(tasks, "the same command with --tasks {}")
    if options.plot:
        from promcse_pl.evaluation.plots import check_plot, draw

        check_plot(options.plot)
    if options.out:
        _check_results(options.out)

    from promcse_pl.data.sources import cache_dir
    from promcse_pl.evaluation.report import render, tables
    from promcse_pl.evaluation.tasks import load_tasks

    loaded = load_tasks(tasks, options.data)  # before torch is imported: a missing file is reported at once

    with without_gc():
        from promcse_pl.evaluation.embeddings import EmbeddingCache
        from promcse_pl.evaluation.suite import evaluate
        from promcse_pl.evaluation.targets import find_targets
    from promcse_pl.utils.files import write_text
    from promcse_pl.utils.terminal import output_console, stages

    targets = find_targets(options.targets, pooling=options.pooling, encoder=options.encoder, device=options.device)
    cache = EmbeddingCache(cache_dir(None) / "vectors")
    with stages(Console(stderr=True)) as report:
        tree = hide_home(evaluate(targets, loaded, cache, report))
    for warning in tree["warnings"]:
        sys.stderr.write(f"warning: {visible(warning)}\n")
    text = render(tree, options.format) if options.format else ""
    if text:
        sys.stdout.write(text)
    else:
        console = output_console()
        for table in tables(tree):
            console.print(table)
    if options.out:
        write_text(options.out / "results.json", json.dumps(tree, indent=2) + "\n")
        if text:
            write_text(options.out / f"results.{'tex' if options.format == 'latex' else 'md'}", text)
    for path in draw(tree, options.plot) if options.plot else ():
        sys.stderr.write(f"{visible(str(path))}\n")


def _check_results(folder: Path) -> None:
    """Check that results can be written to a folder, and that existing ones come from an evaluation.

    Raises:
        ConfigError: The folder has a results file that no evaluation wrote, for example that of a run.
        DataError: It cannot be written.
    """
    from promcse_pl.run_folder import RESULTS
    from promcse_pl.utils.files import own_description, refuse_unwritable

    refuse_unwritable(folder)
    if own_description(folder, RESULTS, {"targets", "tasks", "comparisons"}) is not None:
        return
    for path in (folder / RESULTS, folder / "results.md", folder / "results.tex"):
        if path.exists():
            raise ConfigError(f"{path} exists and was not written by promcse evaluate. Try: --out with another folder")
