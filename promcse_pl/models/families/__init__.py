"""Encoder families: one small file each, which states how its encoders take a prompt.

They may import `promcse_pl.models.attention` and `promcse_pl.models.cpu`.
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
    "new": "its class is Python code of Alibaba-NLP/new-impl, and no code of an encoder is run. Try: a copy with model_type gte, "
    "such as model.path=alibaba-nlp-community/gte-multilingual-base",
    "deberta": "its attention differs from that of DeBERTa-v2 and v3. Try: model.path=microsoft/deberta-v3-base",
    "gemma3": "it reads images, too. Try: an encoder with model_type gemma3_text, such as "
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
        f"{name} is a {model_type} encoder, which is not supported{': ' + reason if reason else ''}. "
        f"Supported: {', '.join(sorted(SUPPORTED))}"
    )
