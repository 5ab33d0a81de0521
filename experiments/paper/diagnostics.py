"""Diagnostics of trained adapters: random initialisation, test-time poolings, and ensembles of adapters."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from study import PRESETS, PROMCSE_EH, RESULTS, Row, Tree, path_of, read_results
from training import Workspace, adapter_member, frozen_member, score, train, write_sample

from promcse_pl import PromCSE
from promcse_pl.evaluation.targets import Member
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.utils.files import write_text

ROW = Row(PROMCSE_EH, PRESETS[PROMCSE_EH])
POOLINGS = ("avg", "max", "cls", "avg_first_last", "avg_top2", "weightedmean", "avg+max", "cls+avg")
SUITES = ("dev", "sts")


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


def variant(folder: Path, *, pooling: str | None = None, seed: int | None = None) -> PromCSE:
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


def run_diagnostics(place: Workspace, seeds: tuple[int, ...], say: Callable[[str], None]) -> None:
    """Score the variants of the adapters of table 1 on STS-B dev and the seven STS tasks, and write results.json.

    Args:
        place: Model, data and run folders.
        seeds: Seeds of the adapters, which are trained if they do not exist.
        say: Called with each progress line.
    """
    sample = write_sample(place, "nli")
    folders = {seed: place.run_folder(ROW, seed) for seed in seeds}
    runs = [train(place, ROW, seed) for seed in seeds]
    tree: Tree = {"data": {"nli": sample}, "runs": runs, "variants": {}}
    results = read_results("diagnostics")
    for name, members in _variants(place, folders).items():
        tree["variants"][name] = {suite: [] for suite in SUITES}
        for seed, member in members.items():
            say(f"diagnostics: {name}, seed {seed}")
            base = place.folder / "diagnostics" / name.replace(" ", "_") / str(seed) / "scores"
            for suite in SUITES:
                scores = score(member, suite, place.data, base / f"{suite}.json")
                tree["variants"][name][suite].append(scores["dev" if suite == "dev" else "Avg"])
        results[place.model] = tree
        write_text(path_of("diagnostics") / RESULTS, json.dumps(results, indent=2) + "\n")


def _variants(place: Workspace, folders: dict[int, Path]) -> dict[str, dict[int, Member]]:
    """Return the models to score, by name and seed."""
    first, *_ = folders
    variants = {
        "frozen encoder": {first: frozen_member(place)},
        "random prompt, not trained": {
            seed: Member(lambda folder=folder, seed=seed: variant(folder, seed=seed), seed)  # type: ignore[misc]
            for seed, folder in folders.items()
        },
        "trained": {seed: adapter_member(folder) for seed, folder in folders.items()},
    }
    for pooling in POOLINGS:
        variants[f"trained, pooling {pooling}"] = {
            seed: Member(lambda folder=folder, pooling=pooling: variant(folder, pooling=pooling), seed)  # type: ignore[misc]
            for seed, folder in folders.items()
        }
    if len(folders) > 1:
        together = [*folders.values()]
        variants[f"mean of the cosines of {len(folders)} seeds"] = {
            first: Member(lambda: Ensemble([PromCSE.load(folder) for folder in together]))
        }
    return variants
