"""Inputs of the commands on sentences: a file or standard input, and an adapter with its encoder."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from promcse_pl.utils.errors import ConfigError, DataError
from promcse_pl.utils.imports import without_gc
from promcse_pl.utils.paths import SUFFIXES, expand, file_suffix

if TYPE_CHECKING:
    from promcse_pl.embedder import PromCSE

SENTENCES_HELP = "one sentence a line (csv, jsonl, .gz... too); - reads standard input"


def load_model(options: argparse.Namespace, device: str = "auto", dtype: str = "float32") -> PromCSE:
    """Return the adapter of `add_adapter` with its encoder. Call it after other inputs were read: it imports torch."""
    note_unfinished_run(options.adapter)
    with without_gc():
        from promcse_pl.adapter import locate_adapter
        from promcse_pl.embedder import PromCSE

    return PromCSE.load(locate_adapter(options.adapter), encoder=options.encoder, device=device, dtype=dtype)


def note_unfinished_run(adapter: Path) -> None:
    """Print a note if an adapter belongs to an unfinished run."""
    from promcse_pl.adapter_folder import find_adapter
    from promcse_pl.run_folder import ADAPTER, read_status

    folder = expand(adapter)
    with suppress(DataError):  # an intact adapter can be used even if the status is damaged
        status = read_status(folder.parent if folder.name == ADAPTER else folder)
        if status is not None and status.state != "finished" and find_adapter(folder):
            sys.stderr.write("the run is not finished: this is its best adapter so far\n")


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Add the argument for an adapter and the option --encoder."""
    parser.add_argument("adapter", type=Path, help="adapter folder, run folder or hub id OWNER/NAME")
    add_encoder_option(parser)


def add_encoder_option(parser: argparse.ArgumentParser) -> None:
    """Add the option --encoder."""
    parser.add_argument(
        "--encoder", metavar="FOLDER", help="folder or hub id of the frozen encoder (default: the name in adapter.json)"
    )


def add_prompt_options(parser: argparse.ArgumentParser, of: str, prefix: str = "") -> None:
    """Add the options --prompt-name and --prompt.

    Args:
        parser: The parser of a command.
        of: What gets the prompt, for the help.
        prefix: In front of both names: "document-" for --document-prompt-name and --document-prompt.
    """
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        f"--{prefix}prompt-name",
        metavar="NAME",
        help=f"prompt of {of}: a name in adapter.json, such as query (default: the adapter's default prompt, if it has one)",
    )
    group.add_argument(f"--{prefix}prompt", metavar="TEXT", help=f'text to put in front of {of}; "" for none')


def prompt_text(model: PromCSE, options: argparse.Namespace, prefix: str = "") -> str:
    """Return the text of the prompt that the options of `add_prompt_options` select.

    Raises:
        ConfigError: The adapter has no prompt of that name.
    """
    name, text = (getattr(options, f"{prefix}{option}".replace("-", "_")) for option in ("prompt-name", "prompt"))
    settings = model.encoder.text
    if name is not None and name not in settings.prompts:
        near = settings.nearest_prompt(name)
        advice = f"--{prefix}prompt-name {near}" if near else f"--{prefix}prompt '{name}: ' for the text itself"
        raise ConfigError(
            f"--{prefix}prompt-name {name}: the adapter has no such prompt (known: {', '.join(settings.prompts) or 'none'}). "
            f"Try: {advice}"
        )
    return settings.prompt_text(name, text)


def is_file_argument(text: str) -> bool:
    """Return whether an argument names a file (or -), not a sentence; a missing file is recognised by its suffix."""
    from promcse_pl.data.arrow import is_saved_dataset

    exists = os.path.isfile(text)  # noqa: PTH113  (Path.is_file raises for a long sentence)
    exists = exists or (os.path.isdir(text) and is_saved_dataset(Path(text)))  # noqa: PTH112  (the same)
    return text == "-" or exists or (" " not in text and file_suffix(Path(text)) in SUFFIXES)


def require_single_stdin(*arguments: str) -> None:
    """Check that at most one argument is -.

    Raises:
        DataError: Two are.
    """
    if arguments.count("-") > 1:
        raise DataError("standard input can be read only once, got two arguments -. Try: a file for one of them")


def read_sentences(file: str) -> list[str]:
    """Return the sentences of a file, or for - the lines of standard input.

    Raises:
        DataError: The file cannot be read, is empty, is not UTF-8 or has an empty line.
    """
    from promcse_pl.data.columns import BY_POSITION
    from promcse_pl.data.readers import read_rows

    if file != "-":
        notes: list[str] = []
        texts = [text for (text,) in read_rows(Path(file), width=1, notes=notes, configurable=False)]
        sys.stderr.write("".join(f"{note}\n" for note in notes if "; not read: " in note or note.endswith(BY_POSITION)))
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
