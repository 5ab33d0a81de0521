"""`promcse similarity`: cosine of two sentences, or of two files line by line."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from promcse_pl.cli.inputs import (
    add_adapter,
    add_prompt_options,
    is_file_argument,
    load_model,
    prompt_text,
    read_sentences,
    require_single_stdin,
)
from promcse_pl.utils.errors import DataError


def add_parser(commands: Any) -> None:  # noqa: ANN401  (argparse's type is private)
    """Add the command's parser."""
    parser = commands.add_parser("similarity", help="cosine of two sentences, or of two files line by line")
    add_adapter(parser)
    parser.add_argument("first", help="a sentence, a file as for encode, or - for standard input")
    parser.add_argument("second", help="the same")
    add_prompt_options(parser, "all sentences")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print one cosine a line."""
    given = (options.first, options.second)
    require_single_stdin(*given)
    is_file = [is_file_argument(text) for text in given]
    if is_file[0] != is_file[1]:
        raise DataError(f"similarity takes two sentences or two files, got one file: {given[is_file.index(True)]}")
    first, second = (read_sentences(text) if is_file[0] else [text] for text in given)
    if len(first) != len(second):
        raise DataError(
            f"the files must have the same number of lines, got {len(first)} in {given[0]} and {len(second)} in {given[1]}"
        )
    model = load_model(options)
    embeddings_ND = model.encode([*first, *second], prompt=prompt_text(model, options))
    cosines_N = (embeddings_ND[: len(first)] * embeddings_ND[len(first) :]).sum(1)
    sys.stdout.write("".join(f"{cosine:.4f}\n" for cosine in cosines_N))
