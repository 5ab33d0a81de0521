"""An adapter as a model of the MTEB benchmark (mteb 2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder

from promcse_pl.embedder import PromCSE
from promcse_pl.models.vectors import Vectors


class MtebModel(AbsEncoder):  # type: ignore[misc]
    """Model for `mteb.evaluate`: embeddings are those of `PromCSE.encode`, similarities are cosines.

    Its revision is the adapter's content hash, so that mteb, which keeps results by name and revision, never shows those of
    another adapter. The task's instructions, prompt types and mteb's batch size have no effect.

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

    def encode(self, inputs: Iterable[Mapping[str, Sequence[str]]], **_: object) -> Vectors:
        """Return the vectors of all texts of all batches, (N, D) float32.

        Args:
            inputs: Batches with the texts under `text`.
        """
        return self.model.encode([text for batch in inputs for text in batch["text"]])
