"""`promcse encode`: the embeddings of a file, or of a corpus of any size."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promcse_pl.cli.inputs import add_adapter, add_prompt_options, load_model, prompt_text, read_sentences
from promcse_pl.utils.errors import ConfigError, DataError
from promcse_pl.utils.imports import without_gc
from promcse_pl.utils.paths import SUFFIXES, expand, file_suffix

if TYPE_CHECKING:
    from promcse_pl.corpus.encode import CorpusEngine, CorpusOptions, CorpusProgress

_CORPUS_OPTIONS = {
    "text": "text_column",
    "output_dtype": "output_dtype",
    "format": "shard_format",
    "rows_per_shard": "rows_per_shard",
    "on_bad_row": "on_bad_row",
    "shard": "task",
}
"""Options that apply only to --out FOLDER -> attributes of `CorpusOptions`."""
_RAY_OPTIONS = ("address", "workers")
"""Options that apply only to --engine ray."""


def add_parser(commands: Any) -> None:  # noqa: ANN401  (argparse's type is private)
    """Add the command's parser."""
    parser = commands.add_parser("encode", help="embeddings of the texts in files")
    add_adapter(parser)
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="one sentence a line (csv, jsonl, parquet, .gz... too); - reads standard input; with --out FOLDER also several "
        "files, folders and patterns in quotes",
    )
    parser.add_argument(
        "--out",
        metavar="FILE|FOLDER",
        type=Path,
        required=True,
        help="where to write the unit-length embeddings: FILE.npy (sentences, width) float32; - prints one JSON list a line; "
        "FOLDER: shards with all columns; run the command again to resume",
    )
    add_prompt_options(parser, "the sentences")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, or auto: a GPU if there is one")
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "bfloat16", "float16", "int8"),
        help="dtype of the encoder's computation (default float32)",
    )
    corpus = parser.add_argument_group("options of --out FOLDER (docs/corpus.md)")
    corpus.add_argument("--text", metavar="COLUMN", help="text column (default: recognised by its name)")
    corpus.add_argument(
        "--output-dtype", choices=("float32", "float16"), help="dtype of the stored embeddings (default float32)"
    )
    corpus.add_argument(
        "--format",
        choices=("parquet", "npy"),
        help="parquet: columns and embeddings in one file (default); npy: embeddings alone, other columns in parquet",
    )
    corpus.add_argument(
        "--rows-per-shard", metavar="N", type=int, help="input rows of an output shard (default 100000)"
    )
    corpus.add_argument(
        "--on-bad-row", choices=("stop", "skip"), help="what to do with a row without a text (default stop)"
    )
    corpus.add_argument("--shard", metavar="I/N", help="encode part I of N, from 0: one per GPU or job of an array")
    corpus.add_argument(
        "--engine", choices=("local", "ray"), help="local: this process (default); ray: workers of a Ray cluster"
    )
    corpus.add_argument(
        "--address", metavar="ADDRESS", help="Ray cluster: auto or HOST:PORT (default: a new one on this machine)"
    )
    corpus.add_argument(
        "--workers",
        metavar="N",
        type=int,
        help="worker processes of --engine ray (default: one per GPU or, without GPUs, one per node)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Encode the sentences and write their embeddings."""
    options.out = out = expand(options.out)
    if out != Path("-") and out.suffix != ".npy":
        if file_suffix(out) in SUFFIXES:
            raise DataError(f"--out must end in .npy, be - for standard output, or be a folder, got {out}")
        _encode_corpus(options)
        return
    names = (*_CORPUS_OPTIONS, "engine", *_RAY_OPTIONS)
    given = next((name for name in names if getattr(options, name) is not None), None)
    if given is not None:
        raise ConfigError(f"--{given.replace('_', '-')} has no effect with --out {out}. Try: --out FOLDER")
    if any(char in options.files[0] for char in "*?[") and not Path(options.files[0]).exists():
        raise DataError(f"--out {out} takes one file, and {options.files[0]} is a pattern. Try: --out FOLDER")
    if len(options.files) > 1:
        raise DataError(f"--out {out} takes one file, got {len(options.files)}. Try: --out FOLDER")
    _encode_file(options, options.files[0], out)


def _encode_file(options: argparse.Namespace, file: str, out: Path) -> None:
    import numpy as np
    from rich.console import Console

    from promcse_pl.utils.files import atomic_file, refuse_unwritable
    from promcse_pl.utils.terminal import progress_bar

    if not out.absolute().parent.is_dir():
        raise DataError(f"the folder of --out {out} does not exist")
    if out.is_dir():
        raise DataError(f"cannot write {out}: it is a folder. Try: --out {shlex.quote(f'{out}/embeddings.npy')}")
    if out != Path("-"):
        refuse_unwritable(out.parent)
    sentences = read_sentences(file)
    model = load_model(options, options.device, options.precision)
    prompt = prompt_text(model, options)
    with progress_bar(Console(stderr=True), "encoding", len(sentences)) as progress:
        embeddings_ND = model.encode(sentences, prompt=prompt, progress=progress)
    if out == Path("-"):
        for embedding_D in embeddings_ND:  # str of a float32: the shortest decimals that read back as the same value
            sys.stdout.write(f"[{', '.join(map(str, embedding_D))}]\n")
        return
    with atomic_file(out) as temporary:
        np.save(temporary, embeddings_ND)
    sys.stdout.write(f"{out}: {embeddings_ND.shape[0]} x {embeddings_ND.shape[1]} float32, unit length\n")


def _encode_corpus(options: argparse.Namespace) -> None:
    import dataclasses

    from promcse_pl.corpus.encode import encode_corpus
    from promcse_pl.corpus.folder import check_out
    from promcse_pl.corpus.inputs import find_inputs
    from promcse_pl.utils.ray_cluster import ray_cluster
    from promcse_pl.utils.signals import StopSignals

    chosen = _corpus_options(options)
    find_inputs(options.files, out=options.out)  # errors before the model is loaded
    check_out(options.out)
    engine = _engine(options)
    # the workers of an engine have their own copies of the model
    model = load_model(options, options.device if engine is None else "cpu", options.precision)
    chosen = dataclasses.replace(chosen, prompt=prompt_text(model, options))
    cluster = nullcontext() if engine is None else ray_cluster(options.address, "--address ")
    with cluster, StopSignals(), _corpus_progress() as report:
        done = encode_corpus(model, options.files, options.out, options=chosen, report=report, engine=engine)
    shards = "1 shard" if done.shards == 1 else f"{done.shards} shards"
    skipped = f"; {done.skipped} finished before" if done.skipped else ""
    bad = f"; {done.bad_rows} bad rows skipped" if done.bad_rows else ""
    sys.stdout.write(
        f"{options.out}: {'new: ' if done.skipped else ''}{done.rows} x {model.width} {chosen.output_dtype}, unit length, "
        f"in {shards}{skipped}{bad}\n"
    )


def _engine(options: argparse.Namespace) -> CorpusEngine | None:
    """Return the engine of `encode_corpus`; None without `--engine ray`."""
    if options.engine != "ray":
        given = next((name for name in _RAY_OPTIONS if getattr(options, name) is not None), None)
        if given is not None:
            raise ConfigError(f"--{given} has no effect without --engine ray. Try: --engine ray")
        return None
    if options.shard is not None:
        raise ConfigError("--shard has no effect with --engine ray, which distributes all shards. Try: without --shard")
    with without_gc():
        from promcse_pl.interop.ray import RayCorpusEngine

    return RayCorpusEngine(options.adapter, options.encoder, options.precision, options.device, options.workers)


def _corpus_options(options: argparse.Namespace) -> CorpusOptions:
    from promcse_pl.corpus.encode import CorpusOptions

    given = {key: getattr(options, name) for name, key in _CORPUS_OPTIONS.items() if getattr(options, name) is not None}
    if "task" in given:
        match = re.fullmatch(r"(\d+)/(\d+)", given["task"])
        if match is None or int(match[1]) >= int(match[2]):
            raise ConfigError(f"--shard must be I/N with 0 <= I < N, such as 0/8, got {given['task']}")
        given["task"] = (int(match[1]), int(match[2]))
    if given.get("rows_per_shard", 1) < 1:
        raise ConfigError(f"--rows-per-shard must be at least 1, got {given['rows_per_shard']}")
    return CorpusOptions(**given)


@contextmanager
def _corpus_progress() -> Iterator[Callable[[CorpusProgress], None]]:
    """Report progress on standard error: a bar on a terminal, else a line for every finished shard."""
    from rich.console import Console

    from promcse_pl.utils.terminal import stages

    console = Console(stderr=True)
    with stages(console) as bar:

        def report(progress: CorpusProgress) -> None:
            text = _progress_text(progress)
            bar(f"encoding: {text}", round(100 * progress.done), 100)
            if progress.shard is not None and not console.is_terminal:
                sys.stderr.write(f"{progress.shard}: {text}\n")

        yield report


def _progress_text(progress: CorpusProgress) -> str:
    left = ""
    if progress.seconds_left is not None:
        minutes = round(progress.seconds_left / 60)
        left = f", {minutes // 60} h {minutes % 60:02d} min left"
    return f"{progress.rows:,} texts so far, {progress.rows_per_second:,.0f} texts/s{left}"
