"""Encoder families: one small file each, which states how its encoders take a prompt.

They may import `promcse_pl.models.attention` and `promcse_pl.models.cpu`.
"""

from promcse_pl.models.families import albert, bert, distilbert, modernbert, mpnet, rotary, t5
from promcse_pl.models.families.family import Family

FAMILIES: dict[str, Family] = {
    **bert.FAMILIES,
    **mpnet.FAMILIES,
    **distilbert.FAMILIES,
    **albert.FAMILIES,
    **modernbert.FAMILIES,
    **rotary.FAMILIES,
    **t5.FAMILIES,
}
"""`model_type` in config.json -> family."""
SUPPORTED = tuple(FAMILIES)
