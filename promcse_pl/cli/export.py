"""`promcse export`: adapters to the formats of other software."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from promcse_pl.cli.inputs import add_adapter, load_model


def add_parser(commands: Any) -> None:  # noqa: ANN401  (argparse's type is private)
    """Add the command's parser."""
    parser = commands.add_parser("export", help="an adapter to the format of other software")
    add_adapter(parser)
    parser.add_argument(
        "--to",
        choices=("official", "sentence-transformers", "peft"),
        required=True,
        help="official: the PromCSE code, transformers 4.2.1; sentence-transformers: 6 or newer; peft: prefix tuning",
    )
    parser.add_argument("-o", "--out", metavar="FOLDER", type=Path, required=True, help="the new folder")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the adapter in the other format and print how to load it there."""
    from promcse_pl.adapter import load_adapter

    out = options.out
    if options.to == "official":
        from promcse_pl.interop.official import export_official

        sys.stdout.write(export_official(load_adapter(options.adapter, encoder=options.encoder), out))
    elif options.to == "peft":
        from promcse_pl.interop.peft import export_peft

        export_peft(load_adapter(options.adapter, encoder=options.encoder), out)
        sys.stdout.write(f"{out}: PeftModel.from_pretrained(encoder, {str(out)!r}); PEFT does not pool: add it\n")
    else:
        from promcse_pl.interop.sentence_transformers import export_sentence_transformers

        loaded_by = export_sentence_transformers(load_model(options, device="cpu"), out)
        sys.stdout.write(f"{out}: {loaded_by}\n")
