"""BERT and the encoders with its layers: RoBERTa, XLM-RoBERTa, XLM-RoBERTa-XL, CamemBERT, data2vec-text, ERNIE and ELECTRA."""

from __future__ import annotations

import dataclasses
from typing import Any

from promcse_pl.models.cpu.layers import DenseNorm, FusedLayers, LayerParts
from promcse_pl.models.families.family import COMMON_FIELDS, Family
from promcse_pl.utils.errors import EncoderError

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
        f"transformers.models.{module}.{prefix}Model",
        tuple(prefix + part for part in parts),
        "encoder.layer",
        _parts,
    )


def _check(config: Any) -> None:  # noqa: ANN401
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions == "rotary" and getattr(config, "lora_adaptations", None):
        raise EncoderError(
            "this copy of jina-embeddings-v3 needs remote code, which is never executed. Try: "
            "model.path=jinaai/jina-embeddings-v3-hf, the same encoder for the class in transformers"
        )
    if positions != "absolute":
        raise EncoderError(
            f"config.json has position_embedding_type={positions}, which transformers' {config.model_type} does not compute. Use "
            "an encoder with absolute positions"
        )


BERT = Family(
    fields=_FIELDS,
    positions="from_zero",
    has_pooler=True,
    check=_check,
    embeddings="embeddings",
    first_token="encoder.layer.{}.attention.output",
    fused=_fused("bert.modeling_bert", "Bert"),
    mlm_head=_MLM_HEAD,
)
ROBERTA = dataclasses.replace(
    BERT, positions="after_padding_id", fused=_fused("roberta.modeling_roberta", "Roberta"), mlm_head=_ROBERTA_MLM_HEAD
)
FAMILIES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": dataclasses.replace(ROBERTA, fused=_fused("xlm_roberta.modeling_xlm_roberta", "XLMRoberta")),
    "xlm-roberta-xl": dataclasses.replace(ROBERTA, fused=None),  # LayerNorm before attention
    "camembert": dataclasses.replace(ROBERTA, fused=_fused("camembert.modeling_camembert", "Camembert")),
    "data2vec-text": dataclasses.replace(ROBERTA, fused=_fused("data2vec.modeling_data2vec_text", "Data2VecText")),
    "ernie": dataclasses.replace(BERT, fields=(*_FIELDS, "use_task_id"), fused=_fused("ernie.modeling_ernie", "Ernie")),
    "electra": dataclasses.replace(
        BERT, fields=(*_FIELDS, "embedding_size"), has_pooler=False, fused=None, mlm_head={}
    ),
}
