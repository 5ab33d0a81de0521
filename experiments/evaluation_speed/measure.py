"""How long the seven STS tasks take: the suite against a loop over each dataset in batches of 64 in file order.

python experiments/evaluation_speed/measure.py --data DATA [--rounds 3]

Every round runs the loop, the suite on an empty vector cache, and the suite again; results.json and README.md are written here.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from promcse_pl.data.batch import Tokens
from promcse_pl.data.pairs import TASKS, ScoredPairs, load_task
from promcse_pl.embedder import PromCSE
from promcse_pl.evaluation.embeddings import EmbeddingCache
from promcse_pl.evaluation.sts import score_task
from promcse_pl.evaluation.suite import evaluate
from promcse_pl.evaluation.targets import Member, Target, find_targets
from promcse_pl.evaluation.tasks import load_tasks
from promcse_pl.version import __version__

HERE = Path(__file__).resolve().parent
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
BATCH = 64
WAYS = ("loop", "suite, first time", "suite, again")


def loop(model: PromCSE, data: Path) -> dict[str, float]:
    """Encode and score as SentEval does: subset by subset, both sides of a batch one after the other, nothing remembered."""
    scores = {}
    for task in TASKS:
        subsets = load_task(data / "senteval", task)
        vectors = {}
        for subset in subsets:
            vectors |= encode(model, subset)
        scores[task] = 100 * score_task(subsets, vectors).all.spearman
    return scores


def encode(model: PromCSE, subset: ScoredPairs) -> dict:
    vectors = {}
    for start in range(0, len(subset), BATCH):
        for side in (subset.first, subset.second):
            texts = side[start : start + BATCH]
            tokens = model.tokenizer(
                list(texts), truncation=True, max_length=model.max_tokens, padding=True, return_tensors="pt"
            )
            with torch.inference_mode():
                found, _ = model.encoder(Tokens(tokens["input_ids"], tokens["attention_mask"]))
            vectors |= dict(zip(texts, torch.nn.functional.normalize(found, dim=1).numpy(), strict=True))
    return vectors


def suite(model: PromCSE, data: Path, cache: Path) -> dict[str, float]:
    target = Target("model", "frozen encoder", (Member(lambda: model),))
    tree = evaluate([target], load_tasks(["sts", "sick"], data), EmbeddingCache(cache))
    return {task: tree["targets"]["model"]["scores"][task]["value"] for task in TASKS}


def draw(results: dict) -> str:
    lines = [
        "# The speed of the evaluation",
        "",
        f"The seven STS tasks with {results['encoder']}, {results['device']}, {results['threads']} threads; the median of "
        f"{results['rounds']} interleaved rounds. The suite's times include 1000 resamples of every task and subset.",
        "",
        "| | seconds | share of the loop |",
        "|---|---:|---:|",
    ]
    medians = {way: statistics.median(results["seconds"][way]) for way in WAYS}
    lines += [f"| {way} | {medians[way]:.1f} | {medians[way] / medians['loop']:.3f} |" for way in WAYS]
    lines += [
        "",
        f"Largest difference of a score (Spearman x 100) between loop and suite: {results['largest_difference']:.4f}. "
        f"promcse_pl {results['versions']['promcse_pl']}, torch {results['versions']['torch']}.",
        "",
        "Drawn by `measure.py` from `results.json`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = find_targets([ENCODER], device="cpu")[0].members[0].load()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    scores = {}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for way in WAYS:
                started = time.perf_counter()
                scores[way] = loop(model, options.data) if way == "loop" else suite(model, options.data, Path(cache))
                seconds[way].append(round(time.perf_counter() - started, 2))
                print(way, seconds[way][-1], flush=True)
    results = {
        "encoder": ENCODER,
        "device": "CPU",
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "seconds": seconds,
        "largest_difference": max(abs(scores["loop"][task] - scores[way][task]) for way in WAYS for task in TASKS),
        "versions": {"promcse_pl": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (HERE / "README.md").write_text(draw(results))


if __name__ == "__main__":
    main()
