"""`promcse`: what needs no Hydra. Imports late, so that --help is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from promcse_pl.errors import DataError, PromcseError
from promcse_pl.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, or 2 for an error that the message explains."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except PromcseError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, as with `promcse ... | head`
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="promcse", description="Sentence embeddings from a soft prompt on a frozen encoder."
    )
    parser.add_argument("--version", action="version", version=f"promcse {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run a saved config.yaml (a new run: python run.py)")
    train.add_argument("config", type=Path, help="config.yaml of a run")
    train.add_argument("--out", type=Path, required=True, help="folder of the new run")
    train.set_defaults(run=_train)

    encode = commands.add_parser("encode", help="sentences to vectors")
    encode.add_argument("adapter", type=Path, help="adapter folder or run folder")
    encode.add_argument("sentences", type=Path, help="text file, one sentence a line (.gz too)")
    encode.add_argument("--out", type=Path, required=True, help="the vectors, (sentences, width) float32, as .npy")
    encode.set_defaults(run=_encode)

    similarity = commands.add_parser("similarity", help="cosine of two sentences")
    similarity.add_argument("adapter", type=Path, help="adapter folder or run folder")
    similarity.add_argument("first")
    similarity.add_argument("second")
    similarity.set_defaults(run=_similarity)
    return parser


def _train(options: argparse.Namespace) -> int:
    from promcse_pl.job import read_config, run_job

    run_job(read_config(options.config), options.out)
    return 0


def _encode(options: argparse.Namespace) -> int:
    import numpy as np
    from rich.console import Console

    from promcse_pl.data.readers import read_rows
    from promcse_pl.embedder import PromCSE
    from promcse_pl.terminal import progress_bar

    if options.out.suffix != ".npy":
        raise DataError(f"--out must end in .npy, got {options.out}")
    if not options.out.absolute().parent.is_dir():
        raise DataError(f"the folder of --out {options.out} does not exist")
    sentences = [text for (text,) in read_rows(options.sentences, width=1)]
    model = PromCSE.load(options.adapter)
    with progress_bar(Console(stderr=True), "encoding", len(sentences)) as progress:
        vectors = model.encode(sentences, progress=progress)
    temporary = options.out.with_name(f".{options.out.name}.tmp.npy")
    np.save(temporary, vectors)
    temporary.replace(options.out)
    sys.stdout.write(f"{options.out}: {vectors.shape[0]} x {vectors.shape[1]} float32, unit length\n")
    return 0


def _similarity(options: argparse.Namespace) -> int:
    from promcse_pl.embedder import PromCSE

    sys.stdout.write(f"{float(PromCSE.load(options.adapter).similarity(options.first, options.second)):.4f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
