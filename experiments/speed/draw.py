"""The page of the speed measurements, from their data."""

from __future__ import annotations

import statistics
from typing import Any

WHAT = {
    "ours": "all levers on: the default of `run.py`",
    "no threads": "chunks one after another, each operation on all cores",
    "no sorting": "chunks in file order, padded to the longest of the batch",
    "float32": "the frozen encoder in float32",
    "torch dropout": "masks drawn by torch",
    "recompute": "chunks run twice, in the memory of one",
    "plain path": "one padded batch, float32, torch's dropout: as the official code computes",
    "ST + PEFT": "sentence-transformers with PEFT's prefix tuning, wired by hand, float32",
}


def draw(results: dict[str, Any]) -> str:
    machine, work = results["machine"], results["work"]
    rate = machine["matrix_rate"]
    flop = 4 * work["weights"] * work["real_tokens"]
    median = {row: statistics.median(values) for row, values in results["training_seconds"].items()}
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# Speed",
        "",
        f"{machine['threads']} threads of {machine['processor']}; a large matrix product runs at "
        f"{rate['bfloat16'] / 1e9:.0f} GFLOP/s in bfloat16 and {rate['float32'] / 1e9:.0f} in float32, measured in the same run.",
        f"{versions}.",
        "Rows are interleaved; medians of one run on a shared machine: read the ratios. Not measured on a GPU.",
        "",
        "## Training",
        "",
        f"all-MiniLM-L6-v2, {work['triplets']} NLI triplets a step (on average {work['real_tokens']:,.0f} real tokens), at most "
        f"{work['max_length']} tokens, P = {work['prompt_length']}, dropout on, optimiser step included.",
        f"The limit is 4 x {work['weights'] / 1e6:.1f} M non-embedding weights x real tokens over the matrix rate, float32's for",
        "rows that compute in it and else bfloat16's.",
        "",
        "| row | triplets/s | ours is faster by | share of the limit | peak memory, GB (before the first step) | |",
        "|---|---|---|---|---|---|",
    ]
    for row, took in median.items():
        kind = "float32" if row in ("float32", "plain path", "ST + PEFT") else "bfloat16"
        memory = results["memory"][row]
        lines.append(
            f"| {row} | {work['triplets'] / took:.1f} | {took / median['ours']:.2f}x | {100 * flop / rate[kind] / took:.0f} % "
            f"| {memory['peak'] / 1e9:.2f} ({memory['before'] / 1e9:.2f}) | {WHAT[row]} |"
        )
    encoding = results["encoding"]
    peer = statistics.median(encoding["seconds"]["sentence-transformers"])
    lines += [
        "",
        "## Encoding",
        "",
        f"{work['sentences']:,} sentences, half from Wikipedia, half from NLI ({encoding['tokens']:,} tokens), with tokenising.",
        "",
        "| row | sentences/s | against sentence-transformers | share of the limit | least cosine to float32 |",
        "|---|---|---|---|---|",
    ]
    for row, values in encoding["seconds"].items():
        took = statistics.median(values)
        limit = 2 * work["weights"] * encoding["tokens"] / rate["bfloat16" if row.endswith("bfloat16") else "float32"]
        share = "" if row == "ours int8" else f"{100 * limit / took:.0f} %"
        cosine = encoding["least_cosine"].get(row)
        shown = "" if cosine is None else f"{cosine:.5f}"
        lines.append(f"| {row} | {work['sentences'] / took:.0f} | {peer / took:.2f}x | {share} | {shown} |")
    ours, by_file = results["sts_seconds"].values()
    lines += [
        "",
        f"All sentences of the seven STS tasks: {ours:.0f} s ours in float32, each once; {by_file:.0f} s by "
        f"sentence-transformers, file by file in batches of 64 ({by_file / ours:.1f}x).",
        "",
        f"A whole `run.py` of one step, token cache warm: {results['start_up_seconds']:.1f} s.",
        "",
        f"Drawn by `measure.py` from `results.json`; seed {work['seed']}.",
        "",
    ]
    return "\n".join(lines)
