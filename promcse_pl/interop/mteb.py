"""An adapter as a model of the MTEB benchmark (mteb 2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import PromptType

from promcse_pl.embedder import PromCSE
from promcse_pl.models.vectors import Vectors


class MtebModel(AbsEncoder):  # type: ignore[misc]
    """Model for `mteb.evaluate`: embeddings are those of `PromCSE.encode`, similarities are cosines.

    Its revision is the adapter's content hash, so that mteb, which keeps results by name and revision, never shows those of
    another adapter. In retrieval tasks, queries and documents are encoded with the prompts `query` and `document` of the
    model; without such a prompt, and in other tasks, with its default prompt. The task's instructions and mteb's batch size have
    no effect.

    Args:
        model: The model.

    Example:
        >>> mteb.evaluate(MtebModel(PromCSE.load(RUN)), tasks=mteb.get_tasks(tasks=["STSBenchmark"]))  # doctest: +SKIP
    """

    def __init__(self, model: PromCSE) -> None:
        self.model = model
        encoder = model.encoder
        self.mteb_model_meta = ModelMeta(
            name=f"promcse_pl/{Path(encoder.backbone.identity.name).absolute().name}",
            revision=model.adapter_hash(),
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
        name = prompt_type.value if prompt_type is not None else None
        texts = [text for batch in inputs for text in batch["text"]]
        return self.model.encode(texts, prompt_name=name if name in self.model.encoder.text.prompts else None)
