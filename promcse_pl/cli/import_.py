"""`promcse import`: checkpoints of other software to adapters."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from promcse_pl.utils.paths import expand
from promcse_pl.utils.streams import visible


def add_parser(commands: Any) -> None:  # noqa: ANN401  (argparse's type is private)
    """Add the command's parser."""
    parser = commands.add_parser(
        "import", help="a checkpoint of the official PromCSE code, or a PEFT prefix, to an adapter"
    )
    parser.add_argument("source", metavar="FOLDER_OR_HUB_ID", help="folder or hub id of the checkpoint")
    parser.add_argument(
        "--pooling", help="a value of model.pooling, such as cls, avg or cls+avg (default: read or inferred)"
    )
    parser.add_argument(
        "--encoder", metavar="NAME", help="refer to this encoder if it equals that of the checkpoint bit for bit"
    )
    parser.add_argument("-o", "--out", metavar="ADAPTER", type=expand, required=True, help="folder of the new adapter")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Read the checkpoint and save it as an adapter."""
    from promcse_pl.adapter import save_adapter

    if (expand(options.source) / "adapter_config.json").is_file():
        from promcse_pl.interop.peft import import_peft

        pooling: Any = options.pooling or "avg"
        encoder = import_peft(Path(options.source), pooling=pooling, encoder=options.encoder)
        notes = [f"a PEFT prefix does not record how token embeddings are pooled; used: --pooling {pooling}"]
    else:
        from promcse_pl.interop.official import import_official

        imported = import_official(options.source, pooling=options.pooling, encoder=options.encoder)
        encoder, notes = imported.encoder, list(imported.notes)
    save_adapter(encoder, options.out)
    sys.stdout.write("".join(f"{visible(note)}\n" for note in notes))
    sys.stdout.write(f"adapter: {options.out}\n")
