"""BERT and the encoders with its layers: RoBERTa, XLM-RoBERTa, CamemBERT, ERNIE, ELECTRA."""

from __future__ import annotations

import dataclasses
from typing import Any

from promcse_pl.models.cpu.layers import DenseNorm, FusedLayers, LayerParts
from promcse_pl.models.families.family import COMMON_FIELDS, Family

_FIELDS = (*COMMON_FIELDS, "hidden_act", "type_vocab_size", "layer_norm_eps", "is_decoder")
_MLM_HEAD = {
    "dense.weight": "cls.predictions.transform.dense.weight",
    "dense.bias": "cls.predictions.transform.dense.bias",
    "layer_norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "layer_norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "decoder.bias": "cls.predictions.bias",
}
_ROBERTA_MLM_HEAD = {name: f"lm_head.{name}" for name in _MLM_HEAD} | {"decoder.bias": "lm_head.bias"}


def _parts(layer: Any) -> LayerParts:  # noqa: ANN401
    attention = layer.attention.self
    return LayerParts(
        query=attention.query,
        key=attention.key,
        value=attention.value,
        heads=attention.num_attention_heads,
        dropout=attention.dropout,
        out=DenseNorm(layer.attention.output.dense, layer.attention.output.dropout, layer.attention.output.LayerNorm),
        up=layer.intermediate.dense,
        down=DenseNorm(layer.output.dense, layer.output.dropout, layer.output.LayerNorm),
    )


def _fused(module: str, prefix: str) -> FusedLayers:
    parts = ("Encoder", "Layer", "Attention", "SelfAttention", "SelfOutput", "Intermediate", "Output")
    return FusedLayers(
        f"transformers.models.{module}.modeling_{module}.{prefix}Model",
        tuple(prefix + part for part in parts),
        "encoder.layer",
        _parts,
    )


BERT = Family(
    fields=_FIELDS,
    positions="from_zero",
    has_pooler=True,
    first_token="encoder.layer.{}.attention.output",
    fused=_fused("bert", "Bert"),
    mlm_head=_MLM_HEAD,
)
ROBERTA = dataclasses.replace(
    BERT, positions="after_padding_id", fused=_fused("roberta", "Roberta"), mlm_head=_ROBERTA_MLM_HEAD
)
FAMILIES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": dataclasses.replace(ROBERTA, fused=_fused("xlm_roberta", "XLMRoberta")),
    "electra": dataclasses.replace(
        BERT, fields=(*_FIELDS, "embedding_size"), has_pooler=False, fused=None, mlm_head={}
    ),
}
