"""Score encoders and adapters on suites; scores are cached in files with the hashes of model and data."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from study import DEV, OTHER, SHIFTED, SHIFTED_PARTS, Study

from promcse_pl import PromCSE
from promcse_pl.data.pairs import load_stsb
from promcse_pl.evaluation.embeddings import EmbeddingCache
from promcse_pl.evaluation.suite import evaluate
from promcse_pl.evaluation.targets import Member, Target, find_targets
from promcse_pl.evaluation.tasks import Task, load_tasks, pair_task
from promcse_pl.runs.compose import compose_config
from promcse_pl.utils.files import write_text

SUITES = {"sts": ["sts", "sick"], "transfer": ["transfer"], "geometry": ["geometry"], "cxc": ["cxc"]}


def frozen_member(model: str, encoder: Path | None) -> Member:
    """Return the frozen encoder of a choice of `model`, or the one in a folder."""
    path = encoder or compose_config([f"model={model}", "data=demo"], {}).model.path
    return find_targets([str(path)])[0].members[0]


def adapter_member(folder: Path) -> Member:
    """Return the adapter of a run."""
    return find_targets([str(folder)])[0].members[0]


@cache
def tasks_of(suite: str, data: Path) -> list[Task]:
    """Return the tasks of a suite in `SUITES`, or of `dev` (STS-B dev)."""
    if suite == DEV:
        return [pair_task(DEV, "dev", [load_stsb(data / "senteval", "dev")])]
    return load_tasks(SUITES[suite], data)


def files_of(suite: str, data: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the files of the tasks of a suite, with rows and sha256."""
    return {task.name: task.files for task in tasks_of(suite, data)}


def suites_of(study: Study, data: Path) -> tuple[str, ...]:
    """Return the suites of a study, with `cxc` if its files exist."""
    return (*study.suites, "cxc") if "CxC-STS" in study.tasks and (data / "cxc").is_dir() else study.suites


def score(member: Member, suites: tuple[str, ...], data: Path, folder: Path) -> dict[str, float]:
    """Return the scores of a model on suites, by task and `TASK SUBSET`.

    Args:
        member: The model.
        suites: Suites in `SUITES`, or `dev`.
        data: Folder with senteval/.
        folder: Folder of the cached scores, SUITE.json. A file is reused if its model and data have the same hashes.
    """
    if not suites:
        return {}
    model, scores = member.load(), {}
    for suite in suites:
        file = folder / f"{suite}.json"
        origin = {"adapter": model.adapter_hash(), "data": files_of(suite, data)}
        cached = json.loads(file.read_text()) if file.is_file() else {}
        if any(cached.get(key) != value for key, value in origin.items()):
            cached = {**origin, "scores": _evaluate(model, suite, data)}
            write_text(file, json.dumps(cached, indent=2) + "\n")
        scores |= cached["scores"]
        if suite == "sts":
            scores |= domain_scores(cached["scores"])
    return scores


def _evaluate(model: PromCSE, suite: str, data: Path) -> dict[str, float]:
    """Evaluate a model on a suite."""
    with TemporaryDirectory() as cache_folder:
        target = Target("model", "model", (Member(lambda: model),))
        tree = evaluate([target], tasks_of(suite, data), EmbeddingCache(cache_folder))
    scores = {}
    for task, result in tree["targets"]["model"]["scores"].items():
        scores[task] = result["value"]
        scores |= {f"{task} {name}": subset["spearman"] for name, subset in result.get("subsets", {}).items()}
    return scores


def domain_scores(scores: dict[str, float]) -> dict[str, float]:
    """Return the proxy of the domain shift: the mean over `SHIFTED_PARTS`, and over all other subsets."""
    parts = {name: value for name, value in scores.items() if " " in name or name in ("STS-B", "SICK-R")}
    shifted = [parts.pop(name) for name in SHIFTED_PARTS]
    return {SHIFTED: sum(shifted) / len(shifted), OTHER: sum(parts.values()) / len(parts)}
