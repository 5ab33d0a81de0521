"""`promcse encode`: sentences to embeddings."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from promcse_pl.cli.inputs import (
    SENTENCES_HELP,
    add_adapter,
    add_prompt_options,
    load_model,
    prompt_text,
    read_sentences,
)
from promcse_pl.utils.errors import DataError


def add_parser(commands: Any) -> None:  # noqa: ANN401  (argparse's type is private)
    """Add the command's parser."""
    parser = commands.add_parser("encode", help="embeddings of the sentences in a file")
    add_adapter(parser)
    parser.add_argument("sentences", metavar="FILE", help=SENTENCES_HELP)
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        required=True,
        help="file for the unit vectors: .npy, (sentences, width) float32; - prints one JSON list a line",
    )
    add_prompt_options(parser, "the sentences")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Encode the sentences and write their embeddings."""
    import numpy as np
    from rich.console import Console

    from promcse_pl.utils.files import atomic_file
    from promcse_pl.utils.terminal import progress_bar

    out: Path = options.out
    if out != Path("-") and out.suffix != ".npy":
        raise DataError(f"--out must end in .npy, or be - for standard output, got {out}")
    if not out.absolute().parent.is_dir():
        raise DataError(f"the folder of --out {out} does not exist")
    sentences = read_sentences(options.sentences)
    model = load_model(options)
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
