"""Compare the logistic regression of `promcse evaluate` with SentEval's torch classifier, which the papers use.

    python experiments/transfer_classifiers/study.py --data DATA [--tasks TREC,MRPC,CR,MR,SUBJ]

Scores the frozen MiniLM with both on the same folds. The network follows SentEval's description: a linear layer on unnormalised
embeddings, Adam, batches of 64, up to 200 epochs with early stopping on held-out rows, weight decay by cross-validation. Writes
results.json and generates README.md from it.
"""

# N rows, D width, K classes, G networks trained in parallel, S steps

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold
from torch import Tensor
from torch.nn import functional as F

from promcse_pl.embedder import PromCSE
from promcse_pl.evaluation.targets import find_targets
from promcse_pl.evaluation.transfer import TransferData, load_transfer, score_transfer

HERE = Path(__file__).resolve().parent
ENCODER, SEED, FOLDS = "sentence-transformers/all-MiniLM-L6-v2", 1111, 10
DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)
BATCH, EPOCHS_A_LOOK, MOST_EPOCHS, PATIENCE = 64, 4, 200, 5
Rows = NDArray[np.int64]


def train(
    features_ND: Tensor, labels_N: Tensor, train: Sequence[Rows], held_out: Sequence[Rows], decay_G: Sequence[float]
) -> tuple[list[float], Tensor]:
    """Train a network for each of the sets of rows; return the best held-out accuracies and the weights (G, D + 1, K)."""
    chance = torch.Generator().manual_seed(SEED)
    networks, width, classes = len(train), features_ND.shape[1], int(labels_N.max()) + 1
    start = (2 * torch.rand(width + 1, classes, generator=chance) - 1) / width**0.5  # torch.nn.Linear's
    weights = start.expand(networks, -1, -1).clone().requires_grad_()
    decays = torch.tensor(decay_G).view(-1, 1, 1)
    optimizer = torch.optim.Adam([weights], lr=1e-3)
    best, kept = torch.full((networks,), -1.0), weights.detach().clone()
    misses, running = torch.zeros(networks), torch.ones(networks, dtype=torch.bool)

    def logits(rows: Tensor) -> Tensor:
        return torch.baddbmm(weights[:, -1:], features_ND[rows], weights[:, :-1])

    for _ in range(MOST_EPOCHS // EPOCHS_A_LOOK):
        for _ in range(EPOCHS_A_LOOK):
            orders = [torch.from_numpy(rows)[torch.randperm(len(rows), generator=chance)] for rows in train]
            order_GN = torch.nn.utils.rnn.pad_sequence(orders, batch_first=True, padding_value=-1)
            for rows_GB in order_GN.split(BATCH, dim=1):
                wanted_GB = torch.where(rows_GB >= 0, labels_N[rows_GB], -100)
                each_GB = F.cross_entropy(
                    logits(rows_GB).transpose(1, 2), wanted_GB, reduction="none", ignore_index=-100
                )
                loss = (each_GB.sum(1) / (rows_GB >= 0).sum(1).clamp(min=1)).sum() + (decays * weights**2).sum() / 2
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            held_GN = torch.nn.utils.rnn.pad_sequence(
                [torch.from_numpy(rows) for rows in held_out], batch_first=True, padding_value=-1
            )
            right_GN = (logits(held_GN).argmax(-1) == labels_N[held_GN]) & (held_GN >= 0)
            accuracy = right_GN.sum(1) / (held_GN >= 0).sum(1)
        better = running & (accuracy > best)
        best, kept = torch.where(better, accuracy, best), torch.where(better.view(-1, 1, 1), weights.detach(), kept)
        running &= better | (misses < PATIENCE)
        misses += (~better).float()
        if not running.any():
            break
    return best.tolist(), kept


def choose_and_train(features_ND: Tensor, labels_N: Tensor, rows: Rows) -> Tensor:
    """Choose the weight decay by ten folds of the rows, then train on 95 % of them; return the weights (D + 1, K)."""
    folds = [(rows[a], rows[b]) for a, b in _folds(labels_N[rows])]
    trains, held = zip(*(fold for fold in folds for _ in DECAYS), strict=True)
    accuracies, _ = train(features_ND, labels_N, trains, held, DECAYS * FOLDS)
    means = np.array(accuracies).reshape(FOLDS, len(DECAYS)).mean(0)
    order = np.random.RandomState(SEED).permutation(rows)
    cut = len(rows) // 20
    _, weights = train(
        features_ND, labels_N, [order[cut:]], [order[:cut]], [DECAYS[int(np.round(100 * means, 2).argmax())]]
    )
    return weights[0]


def _folds(labels_N: Tensor) -> list[tuple[Rows, Rows]]:
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
    return list(splitter.split(labels_N, labels_N))


def network(data: TransferData, vectors: dict[str, NDArray[np.float32]]) -> dict[str, float]:
    """Return the network's accuracy x 100, and F1 x 100 for MRPC."""

    def features(split: str) -> tuple[Tensor, Tensor]:
        rows = data.splits[split]
        sides = [
            torch.from_numpy(np.stack([vectors[row.texts[side]] for row in rows])) for side in range(len(rows[0].texts))
        ]
        both = sides if len(sides) == 1 else [(sides[0] - sides[1]).abs(), sides[0] * sides[1]]
        return torch.cat(both, 1), torch.tensor([row.label for row in rows])

    def predict(features_ND: Tensor, weights: Tensor) -> Tensor:
        return (features_ND @ weights[:-1] + weights[-1]).argmax(1)

    if "all" in data.splits:
        features_ND, labels_N = features("all")
        scores = []
        for rows, test in _folds(labels_N):
            weights = choose_and_train(features_ND, labels_N, rows)
            scores.append(float((predict(features_ND[test], weights) == labels_N[test]).float().mean()))
        return {"accuracy": 100 * statistics.mean(scores)}
    features_ND, labels_N = features("train")
    test_ND, wanted_N = features("test")
    found_N = predict(test_ND, choose_and_train(features_ND, labels_N, np.arange(len(labels_N))))
    scored = {"accuracy": 100 * float((found_N == wanted_N).float().mean())}
    return scored | ({"f1": 100 * float(f1_score(wanted_N, found_N))} if data.name == "MRPC" else {})


def measure(model: PromCSE, data: TransferData) -> dict[str, object]:
    sentences = data.sentences()
    vectors = dict(zip(sentences, model.encode(sentences, normalize=False), strict=True))
    started = time.perf_counter()
    small = network(data, vectors)
    middle = time.perf_counter()
    ours = score_transfer(data, vectors)
    regression = {"accuracy": 100 * ours.accuracy} | ({} if ours.f1 is None else {"f1": 100 * ours.f1})
    seconds = {"network": middle - started, "regression": time.perf_counter() - middle}
    return {"network": small, "regression": regression, "seconds": seconds, "rows": data.rows, "sha256": data.sha256}


def page(study: dict) -> str:
    lines = [
        "# Classifiers for the transfer tasks",
        "",
        f"Accuracy x 100 on embeddings of the frozen `{study['encoder']}` (mean pooling), with the same folds, seed "
        f"{study['seed']}. *Network* is SentEval's torch classifier, *regression* the logistic regression of `promcse evaluate`.",
        "",
        "| task | network | regression | difference | network, s | regression, s |",
        "|---|---|---|---|---|---|",
    ]
    moved = []
    for task, found in study["tasks"].items():
        for measure_, value in found["regression"].items():
            name = task if measure_ == "accuracy" else f"{task} F1"
            moved.append(value - found["network"][measure_])
            seconds = [f"{found['seconds'][which]:.0f}" for which in ("network", "regression")]
            cells = [name, f"{found['network'][measure_]:.2f}", f"{value:.2f}", f"{moved[-1]:+.2f}", *seconds]
            lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {number}" for name, number in study["versions"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"The difference lies between {min(moved):+.2f} and {max(moved):+.2f}. {versions}. Generated by `study.py` from "
            "`results.json`, which contains the sha256 of the data files.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default="TREC,MRPC,CR,MR,SUBJ")
    options = parser.parse_args()
    model = find_targets([ENCODER], device="cpu")[0].members[0].load()
    tasks = {}
    for task in options.tasks.split(","):
        tasks[task] = measure(model, load_transfer(options.data / "senteval", task))
        print(task, tasks[task], flush=True)
    versions = {name: version(name) for name in ("promcse_pl", "torch", "scikit-learn", "numpy")}
    study = {"encoder": ENCODER, "seed": SEED, "versions": versions, "tasks": tasks}
    (HERE / "results.json").write_text(json.dumps(study, indent=2) + "\n")
    (HERE / "README.md").write_text(page(study))


if __name__ == "__main__":
    main()
