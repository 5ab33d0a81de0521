"""The head of the auxiliary masked-language-model (MLM) task."""

# B sentences, T tokens, M masked tokens, D width, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from promcse_pl.models.prompt import INIT_STD


class MlmHead(nn.Module):
    """Dense, GELU, LayerNorm, and a decoder over the vocabulary, as in BERT and RoBERTa.

    The decoder is initialised with the encoder's embedding matrix and trained separately (as in the official code).

    Args:
        embeddings_VD: Word embeddings of the encoder.
        layer_norm_eps: Epsilon of the encoder's LayerNorm.
    """

    def __init__(self, embeddings_VD: Tensor, *, layer_norm_eps: float) -> None:
        super().__init__()
        vocabulary, width = embeddings_VD.shape
        self.dense = nn.Linear(width, width)
        nn.init.normal_(self.dense.weight, std=INIT_STD)
        nn.init.zeros_(self.dense.bias)
        self.layer_norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.decoder = nn.Linear(width, vocabulary)
        with torch.no_grad():
            self.decoder.weight.copy_(embeddings_VD)
            self.decoder.bias.zero_()

    def forward(self, hidden_MD: Tensor) -> Tensor:
        """Return the scores (M, V) of every vocabulary token for M positions."""
        scores: Tensor = self.decoder(self.layer_norm(F.gelu(self.dense(hidden_MD))))
        return scores
