"""Encoder families: one small file each, which states how its encoders take a prompt. May import models.attention and models.cpu."""

from promcse_pl.models.families import bert, deberta, decoders, modernbert, mpnet
from promcse_pl.models.families.family import Family

FAMILIES: dict[str, Family] = {
    **bert.FAMILIES,
    **modernbert.FAMILIES,
    **mpnet.FAMILIES,
    **deberta.FAMILIES,
    **decoders.FAMILIES,
}
"""`model_type` in config.json -> family."""
SUPPORTED = tuple(FAMILIES)
