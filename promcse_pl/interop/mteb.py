"""An adapter as a model of the MTEB benchmark (mteb 2), and its score on an MTEB task."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import mteb
from mteb.abstasks import AbsTask
from mteb.cache import ResultCache
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import PromptType

from promcse_pl.embedder import PromCSE, model_hash
from promcse_pl.models.encoder_files import first_line
from promcse_pl.models.hub import why_unreachable
from promcse_pl.models.vectors import Vectors
from promcse_pl.utils.errors import ConfigError, DataError


class MtebModel(AbsEncoder):  # type: ignore[misc]
    """Model for `mteb.evaluate`: embeddings are those of `PromCSE.encode`, similarities are cosines.

    Its revision is a hash of everything that affects its embeddings (`model_hash`), so that mteb, which caches results by name
    and revision, never returns those of another adapter or precision. In retrieval tasks, queries are encoded with the model's
    prompt `query`, and documents with `document`, `passage` or `corpus`; without such a prompt, and in other tasks, with its
    default prompt. The task's instructions and mteb's batch size have no effect.

    Args:
        model: The model.

    Examples:
        >>> mteb.evaluate(MtebModel(PromCSE.load(RUN)), tasks=mteb.get_tasks(tasks=["STSBenchmark"]))  # doctest: +SKIP
    """

    def __init__(self, model: PromCSE) -> None:
        self.model = model
        encoder = model.encoder
        self.mteb_model_meta = ModelMeta(
            name=f"promcse_pl/{Path(encoder.backbone.identity.name).absolute().name}",
            revision=model_hash(model),
            loader=None,
            release_date=None,
            languages=None,
            n_parameters=sum(weight.numel() for weight in encoder.parameters()),
            n_embedding_parameters=encoder.backbone.word_embeddings.numel(),
            memory_usage_mb=None,
            max_tokens=model.max_tokens,
            embed_dim=model.width,
            license=None,
            open_weights=True,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name="cosine",
            use_instructions=False,
            training_datasets=None,
        )

    def encode(
        self, inputs: Iterable[Mapping[str, Sequence[str]]], *, prompt_type: PromptType | None = None, **_: object
    ) -> Vectors:
        """Return the embeddings of all texts of all batches, (N, D) float32.

        Args:
            inputs: Batches with the texts under `text`.
            prompt_type: `query` or `document` in retrieval tasks; the name of the prompt to use. None: the default prompt.
        """
        name = self.model.encoder.text.role_prompt(prompt_type.value) if prompt_type is not None else None
        texts = [text for batch in inputs for text in batch["text"]]
        return self.model.encode(texts, prompt_name=name)


def find_task(name: str) -> AbsTask:
    """Return an MTEB task by its name; its data are not loaded.

    Raises:
        ConfigError: There is no task of this name.
    """
    try:
        return mteb.get_task(name)
    except KeyError as error:
        names = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
        near = difflib.get_close_matches(name, names, n=1, cutoff=0)
        raise ConfigError(f"there is no MTEB task {name!r}. Try: mteb:{near[0] if near else 'STSBenchmark'}") from error


def main_score(model: PromCSE, task: AbsTask, folder: Path) -> float:
    """Return the main score of a model on an MTEB task, the mean over its subsets and splits.

    Args:
        model: The model.
        task: The task.
        folder: Cache of results, by `model_hash`.

    Raises:
        DataError: The data set cannot be loaded.
    """
    load_data(task, model, folder)
    found = mteb.evaluate(MtebModel(model), task, cache=ResultCache(folder), show_progress_bar=False)
    return float(found.task_results[0].get_score())


def load_data(task: AbsTask, model: PromCSE | None, folder: Path) -> None:
    """Load the data of a task, unless they are loaded or the result of the model is cached.

    Args:
        task: The task.
        model: The model; None: it is not trained yet.
        folder: Cache of results.

    Raises:
        DataError: The data set cannot be loaded.
    """
    if task.data_loaded:
        return
    if model is not None:
        name, meta = task.metadata.name, MtebModel(model).mteb_model_meta
        if ResultCache(folder).load_task_result(name, meta) is not None:
            return
    data = task.metadata.dataset
    name, revision = data["path"], data.get("revision")
    why = why_unreachable(name, revision, kind="dataset")
    if why is None or why.startswith("HF_HUB_OFFLINE"):
        try:
            task.load_data()
            return
        except Exception as error:  # depends on the task and on the version of datasets
            why = f"{type(error).__name__}: {first_line(error)[:200]}"
    chosen = ["--revision", revision] if revision else []
    command = shlex.join(["hf", "download", name, "--repo-type", "dataset", *chosen])
    raise DataError(
        f"mteb:{task.metadata.name} needs the data set {name} of the hub, which cannot be loaded ({why}). Try: {command} on a "
        "machine with network access; then copy its HF_HOME here and set HF_HOME and HF_HUB_OFFLINE=1"
    )
