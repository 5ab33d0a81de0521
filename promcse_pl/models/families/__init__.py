"""Encoder families: how each passes the prompt to its attention layers. Similar families share a module.

These modules may import `promcse_pl.models.attention` and `promcse_pl.models.cpu`.
"""

from promcse_pl.models.families import albert, bert, deberta, decoders, distilbert, modernbert, mpnet, rotary, t5
from promcse_pl.models.families.family import Family as Family
from promcse_pl.utils.errors import EncoderError

FAMILIES: dict[str, Family] = {
    **bert.FAMILIES,
    **mpnet.FAMILIES,
    **distilbert.FAMILIES,
    **albert.FAMILIES,
    **deberta.FAMILIES,
    **modernbert.FAMILIES,
    **rotary.FAMILIES,
    **decoders.FAMILIES,
    **t5.FAMILIES,
}
"""`model_type` in config.json -> family."""
SUPPORTED = tuple(FAMILIES)
_REASONS = {
    "new": "it needs remote code (Alibaba-NLP/new-impl), which is never executed. Try: a copy with model_type gte, "
    "such as model.path=alibaba-nlp-community/gte-multilingual-base",
    "deberta": "its attention differs from that of DeBERTa-v2 and v3. Try: model.path=microsoft/deberta-v3-base",
    "gemma3": "it is a multimodal model. Try: an encoder with model_type gemma3_text, such as "
    "model.path=google/embeddinggemma-300m",
}
"""`model_type` -> why it is not supported."""


def unsupported(model_type: str, name: str) -> EncoderError:
    """Return the error for an encoder of a family that is not in `FAMILIES`.

    Args:
        model_type: As in config.json.
        name: The encoder in messages.
    """
    reason = _REASONS.get(model_type)
    return EncoderError(
        f"{name} has model_type {model_type!r}, which is not supported{': ' + reason if reason else ''}. "
        f"Supported: {', '.join(sorted(SUPPORTED))}. To add a family: docs/adding-an-encoder.md"
    )
