"""`promcse`: what needs no Hydra. Imports late, so that --help is instant."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from promcse_pl.utils.errors import ConfigError, DataError, PromcseError, of_the_system, write_error
from promcse_pl.utils.imports import without_gc
from promcse_pl.utils.paths import expand, hide_home
from promcse_pl.utils.signals import Stopped
from promcse_pl.utils.streams import drop_output, open_streams, visible
from promcse_pl.version import __version__

if TYPE_CHECKING:
    from promcse_pl.embedder import PromCSE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, 2 for an error that the message explains, 143 or 130 when a signal stopped it."""
    open_streams()
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except PromcseError as error:
        write_error(error)
        return 2
    except Stopped as stopped:
        return stopped.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with `promcse ... | head`
        drop_output()
        return 0
    except OSError as error:
        write_error(of_the_system(error))
        if error.filename is None:
            drop_output()
        return 2
    return code


class _Parser(argparse.ArgumentParser):
    """Argument parser that reports errors in one line and suggests the closest command or option."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)|unrecognized arguments: (\S+)", message)
        typed = (wrong[1] or wrong[3] or "") if wrong else ""
        known = re.findall(r"[\w-]+", wrong[2]) if wrong and wrong[2] else [*self._options()]
        near = difflib.get_close_matches(typed.partition("=")[0], known, n=1) if typed else []
        meant = f" Did you mean {near[0]}?" if near else ""
        if not near:
            self.print_usage(sys.stderr)
        write_error(ConfigError(f"{message}.{meant} Try: {self.prog} --help"))
        sys.exit(2)

    def _options(self) -> Iterator[str]:
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._options()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="promcse", description="Sentence embeddings from a soft prompt on a frozen encoder.")
    parser.add_argument("--version", action="version", version=f"promcse {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run a saved config.yaml (a new run: python run.py), or go on with a run")
    train.add_argument(
        "config",
        metavar="CONFIG",
        nargs="*",
        help="config.yaml of a run; with --resume: KEY=VALUE of execution settings (memory, speed, saves, logs)",
    )
    train.add_argument("--out", type=expand, help="folder of the new run; with a config")
    train.add_argument("--resume", metavar="FOLDER", type=expand, help="resume the run in this folder")
    train.set_defaults(run=_train)

    encode = commands.add_parser("encode", help="sentences to vectors")
    encode.add_argument("adapter", type=Path, help="adapter folder or run folder")
    encode.add_argument(
        "sentences", metavar="FILE", help="one sentence a line (csv, jsonl, .gz... too); - reads a pipe"
    )
    encode.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        required=True,
        help="unit vectors, (sentences, width) float32, as .npy; - prints a JSON list a line",
    )
    encode.set_defaults(run=_encode)

    search = commands.add_parser("search", help="the sentences of a file that are nearest to a query")
    search.add_argument("adapter", type=Path, help="adapter folder or run folder")
    search.add_argument("corpus", metavar="FILE", help="as for encode")
    search.add_argument(
        "query", help="a sentence: prints score, tab, sentence; - reads queries, prints a JSON object each"
    )
    search.add_argument("--top-k", type=int, default=5, help="most hits of a query (default 5)")
    search.add_argument("--threshold", type=float, help="minimum cosine of a hit, in [-1, 1] (default: no minimum)")
    search.set_defaults(run=_search)

    similarity = commands.add_parser("similarity", help="cosine of two sentences, or of two files line by line")
    similarity.add_argument("adapter", type=Path, help="adapter folder or run folder")
    similarity.add_argument("first", help="a sentence, a file as for encode, or - for a pipe")
    similarity.add_argument("second", help="the same")
    similarity.set_defaults(run=_similarity)

    evaluate = commands.add_parser("evaluate", help="scores with intervals; several targets are compared")
    evaluate.add_argument(
        "targets",
        metavar="TARGET",
        nargs="+",
        help="adapter or run folder, encoder (folder or hub id), official checkpoint, or a folder of runs that differ by seed; "
        "the others are compared with the first",
    )
    evaluate.add_argument(
        "--tasks",
        metavar="NAMES",
        required=True,
        help="with commas: sts, sick, cxc, transfer, geometry, demo, or files (csv, tsv, jsonl) of two texts and a score",
    )
    evaluate.add_argument("--data", metavar="FOLDER", type=Path, help="data sets: senteval/, and cxc/ for cxc")
    evaluate.add_argument("--out", metavar="FOLDER", type=Path, help="gets results.json and what --format asks for")
    evaluate.add_argument("--format", choices=("markdown", "latex"), help="prints the tables so, instead of as text")
    evaluate.add_argument(
        "--plot",
        metavar="FILE",
        type=Path,
        nargs="?",
        const=Path("scores.pdf"),
        help="bars with intervals, .pdf, .png or .svg (default scores.pdf); with geometry also FILE-density: cosines by gold "
        "score",
    )
    evaluate.add_argument(
        "--pooling", help="of frozen encoders (default avg) and official checkpoints (default: seen or guessed)"
    )
    evaluate.add_argument("--device", default="auto", help="cpu, cuda, mps, or auto: a GPU if there is one")
    evaluate.set_defaults(run=_evaluate)

    official = commands.add_parser(
        "import", help="a checkpoint of the official PromCSE code, or a PEFT prefix, to an adapter"
    )
    official.add_argument("source", metavar="FOLDER_OR_HUB_ID", help="published folder or hub id")
    official.add_argument(
        "--pooling", help="cls, cls_before_pooler, avg, avg_top2, avg_first_last (default: seen or guessed)"
    )
    official.add_argument(
        "--encoder", metavar="NAME", help="refer to this encoder if it equals the checkpoint's bit for bit"
    )
    official.add_argument("-o", "--out", metavar="ADAPTER", type=Path, required=True, help="the new adapter's folder")
    official.set_defaults(run=_import)

    export = commands.add_parser("export", help="an adapter to the format of other software")
    export.add_argument("adapter", type=Path, help="adapter folder or run folder")
    export.add_argument(
        "--to",
        choices=("official", "sentence-transformers", "peft"),
        required=True,
        help="official: the PromCSE code, transformers 4.2.1; sentence-transformers: 6 or newer; peft: prefix tuning",
    )
    export.add_argument("-o", "--out", metavar="FOLDER", type=Path, required=True, help="the new folder")
    export.set_defaults(run=_export)

    report = commands.add_parser("report", help="a sweep's runs, ranked; writes FOLDER/report.html")
    report.add_argument(
        "folder", metavar="FOLDER", type=expand, help="multirun/DATE/TIME, or any folder with runs below it"
    )
    report.add_argument(
        "--runs", action="store_true", help="a line for each run, not for all seeds of the same settings"
    )
    report.add_argument("--test", action="store_true", help="also test scores: not for choosing")
    report.set_defaults(run=_report)

    dashboard = commands.add_parser("dashboard", help="write the saved view of a W&B project; prints its address")
    dashboard.add_argument("--project", default="promcse", help="W&B project (default promcse)")
    dashboard.add_argument("--entity", help="W&B user or team (default: the account's)")
    dashboard.set_defaults(run=_dashboard)
    return parser


def _report(options: argparse.Namespace) -> int:
    from promcse_pl.sweeps.collect import read_sweep
    from promcse_pl.sweeps.html import write_html
    from promcse_pl.sweeps.ranking import rank
    from promcse_pl.sweeps.report import print_report

    sweep = read_sweep(options.folder)
    print_report(sweep, rank(sweep.runs, by_seed=not options.runs), by_seed=not options.runs, tests=options.test)
    sys.stdout.write(f"\npage: {visible(hide_home(str(write_html(sweep, tests=options.test))))}\n")
    return 0


def _dashboard(options: argparse.Namespace) -> int:
    from promcse_pl.tracking.dashboard import save_dashboard

    sys.stdout.write(f"{save_dashboard(options.project, options.entity)}\n")
    return 0


def _train(options: argparse.Namespace) -> int:
    from promcse_pl.run_folder import read_config
    from promcse_pl.runs.lifecycle import resume_job, run_job

    if options.resume and not options.out and all("=" in text for text in options.config):
        resume_job(options.resume, overrides=options.config)
    elif len(options.config) == 1 and options.out and not options.resume:
        run_job(read_config(expand(options.config[0])), options.out)
    else:
        raise ConfigError("Try: promcse train CONFIG --out NEW_FOLDER, or promcse train --resume FOLDER [KEY=VALUE]")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    import json

    from rich.console import Console

    from promcse_pl.config import check_tasks

    tasks = options.tasks.split(",")
    check_tasks(tasks, f"promcse evaluate {options.targets[0]} --tasks {{}}")
    if options.plot:
        from promcse_pl.evaluation.plots import check_plot, draw

        check_plot(options.plot)
    if options.out:
        _check_results(options.out)

    from promcse_pl.data.sources import cache_dir
    from promcse_pl.evaluation.report import render, tables
    from promcse_pl.evaluation.tasks import load_tasks

    loaded = load_tasks(tasks, options.data)  # before torch: a missing file shows itself at once

    with without_gc():
        from promcse_pl.evaluation.embeddings import EmbeddingCache
        from promcse_pl.evaluation.suite import evaluate
        from promcse_pl.evaluation.targets import find_targets
    from promcse_pl.utils.files import write_text
    from promcse_pl.utils.terminal import output_console, stages

    targets = find_targets(options.targets, pooling=options.pooling, device=options.device)
    cache = EmbeddingCache(cache_dir(None) / "vectors")
    with stages(Console(stderr=True)) as report:
        tree = hide_home(evaluate(targets, loaded, cache, report))
    for warning in tree["warnings"]:
        sys.stderr.write(f"warning: {visible(warning)}\n")
    text = render(tree, options.format) if options.format else ""
    if options.out:
        write_text(options.out / "results.json", json.dumps(tree, indent=2) + "\n")
        if text:
            write_text(options.out / f"results.{'tex' if options.format == 'latex' else 'md'}", text)
    if text:
        sys.stdout.write(text)
    else:
        console = output_console()
        for table in tables(tree):
            console.print(table)
    for path in draw(tree, options.plot) if options.plot else ():
        sys.stderr.write(f"{visible(str(path))}\n")
    return 0


def _check_results(folder: Path) -> None:
    """Check that existing results in a folder come from an evaluation and may be overwritten.

    Raises:
        ConfigError: The folder has a results file that no evaluation wrote, for example that of a run.
    """
    from promcse_pl.run_folder import RESULTS
    from promcse_pl.utils.files import own_description

    if own_description(folder, RESULTS, {"targets", "tasks", "comparisons"}) is not None:
        return
    for path in (folder / RESULTS, folder / "results.md", folder / "results.tex"):
        if path.exists():
            raise ConfigError(f"{path} exists and was not written by promcse evaluate. Try: --out with another folder")


def _encode(options: argparse.Namespace) -> int:
    import numpy as np
    from rich.console import Console

    from promcse_pl.utils.files import atomic_file
    from promcse_pl.utils.terminal import progress_bar

    out: Path = options.out
    if out != Path("-") and out.suffix != ".npy":
        raise DataError(f"--out must end in .npy, or be - for standard output, got {out}")
    if not out.absolute().parent.is_dir():
        raise DataError(f"the folder of --out {out} does not exist")
    sentences = _sentences(options.sentences)
    model = _load(options.adapter)
    with progress_bar(Console(stderr=True), "encoding", len(sentences)) as progress:
        vectors_ND = model.encode(sentences, progress=progress)
    if out == Path("-"):
        for vector_D in vectors_ND:
            sys.stdout.write(
                f"[{', '.join(map(str, vector_D))}]\n"
            )  # of float32 the shortest decimals that give it back
        return 0
    with atomic_file(out) as temporary:
        np.save(temporary, vectors_ND)
    sys.stdout.write(f"{out}: {vectors_ND.shape[0]} x {vectors_ND.shape[1]} float32, unit length\n")
    return 0


def _search(options: argparse.Namespace) -> int:
    import json

    from rich.console import Console

    from promcse_pl.index import check_search
    from promcse_pl.utils.terminal import progress_bar

    check_search(options.top_k, options.threshold)  # before the corpus is encoded
    _require_single_stdin(options.corpus, options.query)
    corpus = _sentences(options.corpus)
    queries = _sentences("-") if options.query == "-" else [options.query]
    model = _load(options.adapter)
    with progress_bar(Console(stderr=True), "encoding", len(corpus)) as progress:
        model.build_index(corpus, progress=progress)
    found = model.search(queries, top_k=options.top_k, threshold=options.threshold)
    if options.query == "-":
        for query, hits in zip(queries, found, strict=True):
            named = [{"sentence": sentence, "score": score} for sentence, score in hits]
            sys.stdout.write(json.dumps({"query": query, "hits": named}, ensure_ascii=False) + "\n")
    else:
        shown = visible if sys.stdout.isatty() else str  # unchanged in a pipe
        sys.stdout.write("".join(f"{score:.4f}\t{shown(sentence)}\n" for sentence, score in found[0]))
        if not found[0]:
            sys.stderr.write(f"no sentence has a cosine >= {options.threshold}. Try: leave --threshold out\n")
    return 0


def _similarity(options: argparse.Namespace) -> int:
    given = (options.first, options.second)
    _require_single_stdin(*given)
    files = [_names_file(text) for text in given]
    if files[0] != files[1]:
        raise DataError(f"similarity takes two sentences or two files, got one file: {given[files.index(True)]}")
    first, second = (_sentences(text) if files[0] else [text] for text in given)
    if len(first) != len(second):
        raise DataError(
            f"the files must have as many lines as each other, got {len(first)} in {given[0]} and {len(second)} in {given[1]}"
        )
    vectors_ND = _load(options.adapter).encode([*first, *second])
    cosines_N = (vectors_ND[: len(first)] * vectors_ND[len(first) :]).sum(1)
    sys.stdout.write("".join(f"{cosine:.4f}\n" for cosine in cosines_N))
    return 0


def _load(adapter: Path, **options: Any) -> PromCSE:  # noqa: ANN401
    """Return an adapter with its encoder. Called late, so that a mistake in a file does not wait for torch."""
    from promcse_pl.run_folder import ADAPTER, read_status

    folder = expand(adapter)
    with suppress(DataError):  # a damaged status is no reason to refuse a whole adapter
        status = read_status(folder.parent if folder.name == ADAPTER else folder)
        if status is not None and status.state != "finished":
            sys.stderr.write("the run is not finished: this is its best adapter so far\n")
    with without_gc():
        from promcse_pl.embedder import PromCSE

    return PromCSE.load(adapter, **options)


def _names_file(text: str) -> bool:
    """Tell a file (or -) from a sentence; what looks like a file's name is one, so that a typo is not taken for a sentence."""
    from promcse_pl.data.arrow import is_saved_dataset
    from promcse_pl.utils.paths import SUFFIXES, file_suffix

    exists = os.path.isfile(text)  # noqa: PTH113  (Path.is_file raises for a long sentence)
    exists = exists or (os.path.isdir(text) and is_saved_dataset(Path(text)))  # noqa: PTH112  (the same)
    return text == "-" or exists or (" " not in text and file_suffix(Path(text)) in SUFFIXES)


def _require_single_stdin(*files: str) -> None:
    if files.count("-") > 1:
        raise DataError("standard input can be read only once, got two arguments -. Try: a file for one of them")


def _sentences(file: str) -> list[str]:
    """Return the sentences of a file, or for - the lines of standard input."""
    from promcse_pl.data.readers import read_rows

    if file != "-":
        notes: list[str] = []
        texts = [text for (text,) in read_rows(Path(file), width=1, notes=notes, configurable=False)]
        sys.stderr.write("".join(f"{note}\n" for note in notes if "; not read: " in note))
        return texts
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8: {error}") from None
    lines = [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")]
    if lines == [""]:
        raise DataError("standard input is empty. Try: cat FILE | promcse ..., or a file instead of -")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise DataError(f"standard input:{number}: the line is empty")
    return lines


def _import(options: argparse.Namespace) -> int:
    from promcse_pl.adapter import save_adapter

    if (expand(options.source) / "adapter_config.json").is_file():
        from promcse_pl.interop.peft import import_peft

        pooling: Any = options.pooling or "avg"
        save_adapter(import_peft(Path(options.source), pooling=pooling, encoder=options.encoder), options.out)
        sys.stdout.write(f"a PEFT prefix; it does not say how vectors are pooled, taken: --pooling {pooling}\n")
    else:
        from promcse_pl.interop.official import import_official

        imported = import_official(options.source, pooling=options.pooling, encoder=options.encoder)
        save_adapter(imported.encoder, options.out)
        sys.stdout.write("".join(f"{visible(line)}\n" for line in imported.notes))
    sys.stdout.write(f"adapter: {options.out}\n")
    return 0


def _export(options: argparse.Namespace) -> int:
    from promcse_pl.adapter import load_adapter

    if options.to == "official":
        from promcse_pl.interop.official import export_official

        sys.stdout.write(export_official(load_adapter(options.adapter), options.out))
    elif options.to == "peft":
        from promcse_pl.interop.peft import export_peft

        export_peft(load_adapter(options.adapter), options.out)
        sys.stdout.write(
            f"{options.out}: PeftModel.from_pretrained(encoder, {str(options.out)!r}); the pooling is yours to do\n"
        )
    else:
        from promcse_pl.interop.sentence_transformers import export_sentence_transformers

        export_sentence_transformers(_load(options.adapter, device="cpu"), options.out)
        sys.stdout.write(f"{options.out}: SentenceTransformer({str(options.out)!r}, trust_remote_code=True)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
