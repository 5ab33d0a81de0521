"""The page of the speed measurements, from their data."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

Data = dict[str, Any]

WHAT = {
    "ours": "all levers on: the default of `run.py`",
    "no threads": "chunks one after another, each operation on all cores",
    "no sorting": "chunks in file order, padded to the longest of the batch",
    "library layers": "the modules of transformers",
    "float32": "the frozen encoder in float32",
    "bfloat16": "the frozen encoder in bfloat16, which this processor computes slowly: its memory alone",
    "torch dropout": "masks drawn by torch",
    "recompute": "chunks run twice, in the memory of one",
    "plain path": "one padded batch, float32, torch's dropout, transformers' modules: as the official code computes",
    "ST + PEFT": "sentence-transformers with PEFT's prefix tuning, wired by hand, float32",
}


def draw(folder: Path) -> str:
    """Return the page from the results that lie in the folder; those of other machines and scripts are optional."""
    parts = {
        "results-bfloat16": _main,
        "results-float32": _main,
        "startup": _startup,
        "shapes-cpu": _shapes,
        "shapes-cuda": _shapes,
        "first-token": _first_token,
        "growth": _growth,
        "quality": _quality,
    }
    lines = ["# Speed", ""]
    for name, part in parts.items():
        path = folder / f"{name}.json"
        if path.is_file():
            results = json.loads(path.read_text())
            lines += [*part(results), "", *([results["note"], ""] if "note" in results else [])]
    if not (folder / "shapes-cuda.json").is_file():
        lines += ["Not measured on a GPU.", ""]
    return "\n".join([*lines, "Drawn by `measure.py` from the .json files of this folder.", ""])


def _machine(machine: Data) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['gpu'] or str(machine['threads']) + ' threads of ' + machine['processor']}; {versions}."


def _main(results: Data) -> list[str]:
    machine, work = results["machine"], results["work"]
    rate = machine["matrix_rate"]
    fast = max(rate, key=rate.__getitem__)
    rates = " and ".join(f"{value / 1e9:.0f} in {name}" for name, value in rate.items())
    flop = 4 * work["weights"] * work["real_tokens"]
    median = {row: statistics.median(values) for row, values in results["training_seconds"].items()}
    plain, peft = (median[row] * rate[fast] / flop for row in ("plain path", "ST + PEFT"))
    lines = [
        f"## With{'' if fast == 'bfloat16' else 'out'} fast bfloat16: `trainer.precision=auto` picks {fast}",
        "",
        f"{_machine(machine)} A large matrix product runs at {rates} (GFLOP/s), measured in the same run. Rows are "
        "interleaved; medians of one run on a shared machine: read the ratios.",
        "",
        "### Training",
        "",
        f"all-MiniLM-L6-v2, {work['triplets']} NLI triplets a step (on average {work['real_tokens']:,.0f} real tokens), at most "
        f"{work['max_length']} tokens, P = {work['prompt_length']}, dropout on, optimiser step included, seed "
        f"{work['seed']}. The limit is 4 x {work['weights'] / 1e6:.1f} M non-embedding weights x real tokens over the matrix "
        f"rate, float32's for rows that compute in it. A step at the limit would be {plain:.1f} times as fast as the plain path "
        f"and {peft:.1f} times as fast as ST + PEFT.",
        "",
        "| row | triplets/s | ours is faster by | share of the limit | peak memory, GB (before the first step) | |",
        "|---|---|---|---|---|---|",
    ]
    for row, memory in results["memory"].items():
        kind = "float32" if row in ("float32", "plain path", "ST + PEFT") else fast
        took = median.get(row)
        speed = took and (
            f"{work['triplets'] / took:.1f} | {took / median['ours']:.2f}x | {100 * flop / rate[kind] / took:.0f} %"
        )
        lines.append(
            f"| {row} | {speed or ' | | '} | {memory['peak'] / 1e9:.2f} ({memory['before'] / 1e9:.2f}) | {WHAT[row]} |"
        )
    encoding = results["encoding"]
    peer = statistics.median(encoding["seconds"]["sentence-transformers"])
    least = 2 * work["weights"] * encoding["tokens"] / rate[fast]
    lines += [
        "",
        "### Encoding",
        "",
        f"{work['sentences']:,} sentences, half from Wikipedia, half from NLI ({encoding['tokens']:,} tokens), with tokenising. "
        f"At the limit of {fast} they would take {peer / least:.1f} times less than sentence-transformers takes.",
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
    which = f"One pair in {work['sts_part']}" if "sts_part" in work else "All pairs"
    return [
        *lines,
        "",
        f"{which} of the seven STS tasks: {ours:.0f} s ours in float32, each text once; {by_file:.0f} s by "
        f"sentence-transformers, file by file in batches of 64 ({by_file / ours:.1f}x).",
    ]


def _startup(results: Data) -> list[str]:
    what = {
        "imports": "`python -c 'import torch, transformers.modeling_utils, pytorch_lightning'`, to its end",
        "run": "`python run.py`, from Enter to the first training step",
        "sweep": "`python run.py -m`, from Enter to the first training step of the first job",
        "later": "the same, of the next jobs, from the end of the one before",
    }
    rows = [(what[row], values) for row, values in results["seconds"].items()]
    return [
        "## Start-up",
        "",
        f"{_machine(results['machine'])} MiniLM on NLI, token cache warm; taken in turns.",
        "",
        "| | median, s | least | most | of |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} | {len(values)} |"
            for name, values in rows
        ),
    ]


def _shapes(results: Data) -> list[str]:
    lines = [
        "## Sizes",
        "",
        f"{_machine(results['machine'])} Random weights in bfloat16, sentences of 6 to 32 tokens, P = "
        f"{results['prompt_length']}, seed {results['seed']}; the fastest step. Recomputed chunks do half as "
        "much work more, which the limit does not count.",
        "",
        "| encoder | sentences a step | chunks | tokens/s | share of the limit | peak memory, GB (before the first step) |",
        "|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        share = 4 * case["weights"] * case["tokens"] / case["rate"] / case["seconds"]
        chunks = "recomputed" if case["recompute"] else "kept"
        lines.append(
            f"| {case['shape']} ({case['weights'] / 1e6:.0f} M) | {case['sentences']:,} | {chunks} "
            f"| {case['tokens'] / case['seconds']:,.0f} | {100 * share:.0f} % "
            f"| {case['peak'] / 1e9:.2f} ({case['before'] / 1e9:.2f}) |"
        )
    return lines


def _first_token(results: Data) -> list[str]:
    rows = []
    for case in results["cases"]:
        off, on = (statistics.median(case["seconds"][name]) for name in ("every token", "first token"))
        less = statistics.median(
            before / after
            for before, after in zip(case["seconds"]["every token"], case["seconds"]["first token"], strict=True)
        )
        rows.append(
            f"| {case['shape']} | {case['work']} | {case['sentences']} | {case['precision']} "
            f"| {off:.2f} | {on:.2f} | {less:.2f}x |"
        )
    return [
        "## First token",
        "",
        f"{_machine(results['machine'])} Pooling `cls` reads the first token alone, so the last layer leaves the "
        "others out behind its attention. Random weights, sentences of 6 to 32 tokens, "
        f"P = {results['prompt_length']}, seed {results['seed']}; medians, taken in turns.",
        "",
        "| encoder | work | sentences | type | every token, s | first token, s | faster by |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def _growth(results: Data) -> list[str]:
    return [
        "## Growth",
        "",
        f"{_machine(results['machine'])} A small encoder (2 layers of 64) over Wikipedia text; memory beside texts and vectors.",
        "",
        "| work | sentences | seconds | sentences/s | memory, MB |",
        "|---|---|---|---|---|",
        *(
            f"| {case['what']} | {case['sentences']:,} | {case['seconds']:.1f} | {case['sentences'] / case['seconds']:,.0f} "
            f"| {case['memory'] / 1e6:.0f} |"
            for case in results["cases"]
        ),
    ]


def _quality(results: Data) -> list[str]:
    tasks = list(next(iter(results["scores"].values())))
    return [
        "## Quality",
        "",
        f"{_machine(results['machine'])} STS-B development score (Spearman x 100) of whole MiniLM runs: "
        + ", ".join(
            f"{run['dev']:.2f} ({run['precision']}, seed {run['seed']}, {run['steps']} steps)"
            for run in results["runs"]
        )
        + ". Test scores of the first run's adapter, by the type of the encoder:",
        "",
        f"| | {' | '.join(tasks)} |",
        "|---" * (len(tasks) + 1) + "|",
        *(
            f"| {dtype} | {' | '.join(f'{scores[task]:.2f}' for task in tasks)} |"
            for dtype, scores in results["scores"].items()
        ),
        "",
        "Average against float32: "
        + "; ".join(f"{entry['second']} {entry['verdict']}" for entry in results["comparisons"])
        + ".",
    ]
