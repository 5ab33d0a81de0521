"""`promcse export`: adapters to the formats of other software."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from promcse_pl.cli.inputs import add_adapter, load_model
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.paths import expand
from promcse_pl.utils.streams import visible


def add_parser(commands: Any) -> None:  # noqa: ANN401  (argparse's type is private)
    """Add the command's parser."""
    parser = commands.add_parser("export", help="an adapter to the format of other software")
    add_adapter(parser)
    parser.add_argument(
        "--to",
        choices=("official", "sentence-transformers", "peft", "onnx", "openvino"),
        required=True,
        help="official: the PromCSE code, transformers 4.2.1; sentence-transformers: 6 or newer; peft: prefix tuning; onnx, "
        "openvino: one graph with its tokenizer, for servers and runtimes without this package",
    )
    parser.add_argument("--int8", action="store_true", help="with --to onnx: also write a graph in 8-bit integers")
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        type=expand,
        help="with --int8: report its STS-B dev score (FOLDER has senteval/ in it)",
    )
    parser.add_argument("-o", "--out", metavar="FOLDER", type=expand, required=True, help="the new folder")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the adapter in the other format and print how to load it there."""
    from promcse_pl.adapter import load_adapter, locate_adapter

    out = options.out
    _check_options(options)
    if options.to == "official":
        from promcse_pl.interop.official import export_official

        sys.stdout.write(export_official(load_adapter(locate_adapter(options.adapter), encoder=options.encoder), out))
    elif options.to == "peft":
        from promcse_pl.interop.peft import export_peft

        export_peft(load_adapter(locate_adapter(options.adapter), encoder=options.encoder), out)
        sys.stdout.write(f"{out}: PeftModel.from_pretrained(encoder, {str(out)!r}); PEFT does not pool: add it\n")
    elif options.to in ("onnx", "openvino"):
        _export_graph(options)
    else:
        from promcse_pl.interop.sentence_transformers import export_sentence_transformers

        loaded_by = export_sentence_transformers(load_model(options, device="cpu"), out)
        sys.stdout.write(f"{out}: {loaded_by}\n")


def _check_options(options: argparse.Namespace) -> None:
    """Raise a ConfigError for an option without effect."""
    if options.int8 and options.to != "onnx":
        raise ConfigError(f"--int8 has no effect with --to {options.to}. Try: --to onnx --int8")
    if options.data and not options.int8:
        raise ConfigError("--data has no effect without --int8. Try: --to onnx --int8 --data FOLDER")


def _export_graph(options: argparse.Namespace) -> None:
    from promcse_pl.data.pairs import load_stsb

    # before the export, so that a missing file is reported at once
    pairs = load_stsb(options.data / "senteval", "dev") if options.data else None
    model = load_model(options, device="cpu")
    from promcse_pl.interop.graph import GRAPH, OPENVINO, QUANTIZED, GraphEncoder
    from promcse_pl.interop.onnx import export_onnx, export_openvino

    if options.to == "openvino":
        report, written = export_openvino(model, options.out), OPENVINO
    else:
        report, written = export_onnx(model, options.out, int8=options.int8), GRAPH
    lines = [f"{options.out / written}: largest difference from PyTorch {report.difference:.1e}"]
    if report.int8_cosine:
        lowest, mean = report.int8_cosine
        lines.append(
            f"{options.out / QUANTIZED}: cosine to float32 on the demo sentences at least {lowest:.4f}, on average {mean:.4f}"
        )
    if pairs:
        from promcse_pl.evaluation.sts import spearman

        prompt, scores = model.encoder.text.prompt_text(), {}
        for file in (GRAPH, QUANTIZED):
            encoder = GraphEncoder.load(options.out, file)
            first, second = (encoder.encode([prompt + text for text in side]) for side in (pairs.first, pairs.second))
            scores[file] = 100 * spearman((first * second).sum(1), pairs.gold)
        change = scores[QUANTIZED] - scores[GRAPH]
        lines.append(f"STS-B dev: float32 {scores[GRAPH]:.2f}, int8 {scores[QUANTIZED]:.2f} ({change:+.2f})")
    sys.stdout.write("".join(f"{visible(line)}\n" for line in (*lines, *report.notes)))
