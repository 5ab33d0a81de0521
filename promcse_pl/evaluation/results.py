"""The final scores of a run: the adapter as it lies on disk, beside the frozen encoder, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from promcse_pl.config import Config
from promcse_pl.data.demo import demo_pairs
from promcse_pl.data.sources import senteval_dir
from promcse_pl.embedder import PromCSE
from promcse_pl.evaluation.sts import TASKS, ScoredPairs, load_task, score_groups
from promcse_pl.model.encoder import PromptEncoder

Scores = dict[str, dict[str, float]]


def evaluate_all(
    adapter: Path,
    config: Config,
    dev: ScoredPairs | None,
    *,
    device: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> tuple[Scores, dict[str, list[dict[str, Any]]]]:
    """Score an adapter, and the frozen encoder if asked, on the tasks of a config and on the development pairs.

    Args:
        adapter: Its folder; it is read afresh, so what is scored is what was saved.
        config: Which tasks, and where their data lie.
        dev: The pairs that the adapter was chosen by, shown last.
        device: Where to compute.
        progress: Called with the number of sentences encoded so far.

    Returns:
        Spearman x 100 by model (`frozen encoder`, `adapter`) and task, with the mean `Avg` of the seven STS tasks; and the data
        behind each task: name, pairs and sha256 of every file.
    """
    groups = _groups(config, dev)
    if not groups:
        return {}, {}
    model = PromCSE.load(adapter, device=device)
    models = {"adapter": model}
    if config.evaluation.frozen:
        plain = PromptEncoder(model.encoder.backbone, length=0, pooling=model.encoder.pooling, head="none")
        models = {"frozen encoder": PromCSE(plain.eval(), model.tokenizer), **models}
    scores: Scores = {}
    for name, target in models.items():
        found = score_groups(lambda texts, target=target: target.encode(texts, progress=progress), groups)  # type: ignore[misc]
        row = {task: round(100 * result.all.spearman, 2) for task, result in found.items()}
        if set(TASKS) <= set(row):
            last = list(row)[len(TASKS) :]
            row = {
                **{task: row[task] for task in TASKS},
                "Avg": round(sum(row[task] for task in TASKS) / len(TASKS), 2),
                **{task: row[task] for task in last},
            }
        scores[name] = row
    data = {
        task: [{"name": part.name, "pairs": len(part), "sha256": part.sha256} for part in parts]
        for task, parts in groups.items()
    }
    return scores, data


def _groups(config: Config, dev: ScoredPairs | None) -> dict[str, list[ScoredPairs]]:
    groups: dict[str, list[ScoredPairs]] = {}
    if "sts" in config.evaluation.tasks:
        senteval = senteval_dir(config.data)
        groups |= {task: load_task(senteval, task) for task in TASKS}
    if "demo" in config.evaluation.tasks:
        groups["demo test"] = [ScoredPairs.of("demo test", demo_pairs("test"))]
    if dev is not None:
        groups["dev"] = [dev]
    return groups
