"""DistilBERT: BERT's layers without token types and without dropout after attention."""

from __future__ import annotations

from typing import Any

from promcse_pl.models.cpu.layers import DenseNorm, FusedLayers, LayerParts
from promcse_pl.models.families.family import COMMON_FIELDS, Family


def _parts(layer: Any) -> LayerParts:  # noqa: ANN401
    attention, ffn = layer.attention, layer.ffn
    return LayerParts(
        query=attention.q_lin,
        key=attention.k_lin,
        value=attention.v_lin,
        heads=attention.n_heads,
        dropout=attention.dropout,
        out=DenseNorm(attention.out_lin, None, layer.sa_layer_norm),
        up=ffn.lin1,
        down=DenseNorm(ffn.lin2, ffn.dropout, layer.output_layer_norm),
    )


FAMILIES = {
    "distilbert": Family(
        fields=(*COMMON_FIELDS, "activation"),
        positions="from_zero",
        attention="DistilBertSelfAttention",
        embeddings="embeddings",
        fused=FusedLayers(
            "transformers.models.distilbert.modeling_distilbert.DistilBertModel",
            ("Transformer", "TransformerBlock", "DistilBertSelfAttention", "FFN"),
            "transformer.layer",
            _parts,
        ),
        mlm_head={
            "dense.weight": "vocab_transform.weight",
            "dense.bias": "vocab_transform.bias",
            "layer_norm.weight": "vocab_layer_norm.weight",
            "layer_norm.bias": "vocab_layer_norm.bias",
            "decoder.bias": "vocab_projector.bias",
        },
    ),
}
