"""Reproduce the tables and figures of the paper, with several seeds, intervals and verdicts.

    python experiments/paper/run.py table1 --data DATA [--runs FOLDER] [--seeds N] [--model minilm]
    python experiments/paper/run.py table1 table3 --data DATA --model bert-base --dry-run
    python experiments/paper/run.py --draw

On a sample, run `learning_rate` first: the other studies of the model use the learning rates that it selects. The command can be
stopped and repeated: finished runs and scores are skipped, unfinished runs are resumed, every run is merged into results.json.
With --only, a long table is run in parts: `--only table1/full --only table1/prompt` selects the supervised rows of table 1.
`table5`, `table7` and `domain` score the adapters of `table1`. minilm and mpnet are trained on a sample (--rows), other models
on all data with the paper's recipe. To use the paper's data, save nli_for_simcse.csv as DATA/nli/nli_train.csv and
wiki1m_for_simcse.txt, compressed with gzip, as DATA/wiki/wiki.txt.gz. --draw generates the pages from results.json only.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from study import DEFAULT_SEEDS, MODELS, SEEDS, STUDIES, selected_rows

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_ROWS = 5120


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join([*STUDIES, "diagnostics", "all"]))
    parser.add_argument("--data", type=Path, help="folder with nli/, wiki/ and senteval/")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "outputs" / "paper", help="folder of the runs; finished runs are reused"
    )
    parser.add_argument("--model", default="minilm", choices=MODELS, help="choice of `model` (default minilm)")
    parser.add_argument("--encoder", type=Path, help="folder of the encoder, if it cannot be downloaded")
    parser.add_argument(
        "--seeds",
        type=int,
        choices=range(1, len(SEEDS) + 1),
        help="number of seeds (default: set by the study; learning_rate always uses 1)",
    )
    parser.add_argument("--rows", type=int, default=SAMPLE_ROWS, help="rows of the sample for minilm and mpnet")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="only rows whose name or preset contains it; repeatable",
    )
    parser.add_argument("--dry-run", action="store_true", help="compose every config and print commands and estimates")
    parser.add_argument(
        "--draw", action="store_true", help="generate the pages from the results, without running anything"
    )
    options = parser.parse_args(arguments)
    every = [*STUDIES, "diagnostics"]
    options.studies = every if options.studies in ([], ["all"]) else options.studies
    if unknown := [name for name in options.studies if name not in every]:
        parser.error(f"unknown study {unknown[0]}; allowed: {', '.join(every)}, all")
    if options.only:
        options.studies = [
            name for name in options.studies if name in STUDIES and selected_rows(STUDIES[name], options.only)
        ]
    if not options.studies:
        removed = [row.name for study in STUDIES.values() for row in study.rows if row.is_removed]
        if named := [name for name in removed if any(text in name for text in options.only)]:
            parser.error(f"{named[0]} was removed from the code; its page shows the earlier results")
        parser.error(
            f"no row of these studies contains {' or '.join(options.only)}. Try: --dry-run, which lists the rows"
        )
    if options.data is None and not options.draw:
        parser.error("--data is required without --draw")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run studies, print their commands (--dry-run) or draw their pages; return the exit code."""
    options = parse(arguments)
    from pages import draw, draw_diagnostics

    failed = [] if options.draw else _run(options)
    if not options.dry_run:
        draw([name for name in options.studies if name in STUDIES])
        draw_diagnostics()
    for line in failed:
        sys.stderr.write(f"failed: {line}\n")
    return 1 if failed else 0


def _run(options: argparse.Namespace) -> list[str]:
    """Run the studies or print their commands; return the failures."""
    from diagnostics import run_diagnostics
    from estimate import dry_run
    from training import MINIATURE, Workspace, run_study

    from promcse_pl.utils.errors import PromcseError

    def report(line: str) -> None:
        print(line, flush=True)

    rows = options.rows if options.model in MINIATURE else 0
    encoder = options.encoder.resolve() if options.encoder else None
    workspace = Workspace(options.model, options.data.resolve(), options.runs.resolve(), rows, encoder)
    failed, only = [], tuple(options.only)
    for name in options.studies:
        try:
            if name in STUDIES:
                study = STUDIES[name]
                seeds = SEEDS[: 1 if study.seeds == 1 else options.seeds or study.seeds]
                if options.dry_run:
                    failed += dry_run(name, study, workspace, seeds, only)
                else:
                    failed += run_study(name, study, workspace, seeds, report, only)
            elif options.dry_run:
                print("diagnostics: scores the runs of table 1, trains nothing else")
            else:
                run_diagnostics(workspace, SEEDS[: options.seeds or DEFAULT_SEEDS], report)
        except (PromcseError, subprocess.CalledProcessError) as error:
            failed.append(f"{name}: {error}")
            report(failed[-1])
    return failed


if __name__ == "__main__":
    sys.exit(main())
