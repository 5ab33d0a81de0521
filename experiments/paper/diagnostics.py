"""Diagnostics of trained adapters: random initialisation, test-time poolings, and ensembles of adapters."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scoring import adapter_member, frozen_member, score
from study import DEV, FROZEN, PRESETS, PROMCSE_EH, RESULTS, TRAINED, Results, Row, read_results, study_folder
from training import Workspace, add_record, check_origin, describe_origin, run_settings, train

from promcse_pl import PromCSE
from promcse_pl.evaluation.targets import Member
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.utils.files import write_text

ROW = Row(PROMCSE_EH, PRESETS[PROMCSE_EH])
POOLINGS = ("avg", "max", "cls", "avg_first_last", "avg_top2", "weightedmean", "avg+max", "cls+avg")


class Ensemble(PromCSE):
    """Ensemble of models: embeddings are concatenated, so that a cosine is the mean of the models' cosines."""

    def __init__(self, models: list[PromCSE]) -> None:
        super().__init__(models[0].encoder)
        self._models = models

    @property
    def width(self) -> int:
        """Sum of the dimensions."""
        return sum(model.width for model in self._models)

    def adapter_hash(self) -> str:
        """Return the hashes of all models."""
        return "+".join(model.adapter_hash() for model in self._models)

    def encode(self, sentences: list[str], **options: object) -> NDArray[np.float32]:  # type: ignore[override]
        """Return the unit embeddings (N, D) of the concatenation."""
        parts = [model.encode(sentences, **options) for model in self._models]  # type: ignore[call-overload]
        return np.hstack(parts) / np.float32(len(parts) ** 0.5)


def load_variant(folder: Path, *, pooling: str | None = None, seed: int | None = None) -> PromCSE:
    """Return the adapter of a run with another pooling, or with a randomly initialised prompt.

    Args:
        folder: Run folder.
        pooling: Pooling; None: that of the adapter. Concatenated poolings need an adapter without a head.
        seed: Seed of a new prompt; None: the trained prompt is kept.
    """
    trained = PromCSE.load(folder).encoder
    if seed is not None:
        torch.manual_seed(seed)
    encoder = PromptEncoder(
        trained.backbone,
        length=trained.prompt.length,
        pooling=pooling or trained.pooling,
        head=trained.head_mode,
        position_offset=trained.position_offset,
        text=trained.text,
    )
    if seed is None:
        encoder.load_state_dict(trained.state_dict())
    return PromCSE(encoder.eval())


def run_diagnostics(workspace: Workspace, seeds: tuple[int, ...], report: Callable[[str], None]) -> None:
    """Score the variants of the adapters of table 1 on STS-B dev; merge them into results.json.

    Args:
        workspace: Model, data and run folders.
        seeds: Seeds of the adapters, which are trained if they do not exist.
        report: Called with each progress line.
    """
    origin = describe_origin(workspace, (ROW,), (DEV,))
    check_origin("diagnostics", workspace.name, origin)
    folders = {seed: workspace.run_folder(ROW, seed) for seed in seeds}
    runs = [train(workspace, ROW, seed) for seed in seeds]
    for name, members in _variants(folders).items():
        report(f"diagnostics: {name}")
        scores = {str(seed): _score(workspace, name, seed, member) for seed, member in members.items()}
        _write(workspace, origin, runs, "variants", {name: scores})
    for name, member in _single(workspace, folders).items():
        report(f"diagnostics: {name}")
        _write(workspace, origin, runs, "single", {name: _score(workspace, name, "all", member)})


def _score(workspace: Workspace, name: str, seed: int | str, member: Member) -> float:
    """Return the score of a model on STS-B dev."""
    folder = workspace.folder / "diagnostics" / name.replace(" ", "_") / str(seed) / "scores"
    return score(member, (DEV,), workspace.data, folder)[DEV]


def _write(workspace: Workspace, origin: Results, runs: list[Results], part: str, models: Results) -> None:
    """Merge the scores of models into results.json; earlier scores of adapters with other settings are dropped."""
    results = read_results("diagnostics")
    tree = results.get(workspace.name)
    if tree is None or any(run_settings(run) != run_settings(runs[0]) for run in tree["runs"]):
        tree = {"runs": [], "variants": {}, "single": {}}
    for run in runs:
        tree["runs"] = add_record(tree["runs"], run)
    for name, scores in models.items():
        tree[part][name] = tree[part].get(name, {}) | scores if part == "variants" else scores
    results[workspace.name] = tree | origin
    write_text(study_folder("diagnostics") / RESULTS, json.dumps(results, indent=2) + "\n")


def _variants(folders: dict[int, Path]) -> dict[str, dict[int, Member]]:
    """Return the variants of the adapter of each seed, by name."""

    def load(pooling: str | None = None, *, is_random: bool = False) -> dict[int, Member]:
        return {
            seed: Member(partial(load_variant, folder, pooling=pooling, seed=seed if is_random else None), seed)
            for seed, folder in folders.items()
        }

    trained = {seed: adapter_member(folder) for seed, folder in folders.items()}
    poolings = {f"trained, pooling {pooling}": load(pooling) for pooling in POOLINGS}
    return {"random prompt, not trained": load(is_random=True), TRAINED: trained, **poolings}


def _single(workspace: Workspace, folders: dict[int, Path]) -> dict[str, Member]:
    """Return the models without a seed, by name: the frozen encoder, and the ensemble of all adapters."""
    models = {FROZEN: frozen_member(workspace.model, workspace.encoder)}
    if len(folders) > 1:
        name = f"mean of the cosines of seeds {', '.join(map(str, folders))}"
        models[name] = Member(lambda: Ensemble([PromCSE.load(folder) for folder in folders.values()]))
    return models
