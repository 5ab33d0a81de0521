"""The auxiliary masked-language-model task: which tokens are hidden, and the head that guesses them."""

# B sentences, T tokens, M masked tokens, D width, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from promcse_pl.model.prompt import INIT_STD

MASKED_SHARE, MASK_SHARE, RANDOM_SHARE = 0.15, 0.8, 0.1
"""15 % of the tokens are predicted; of these 80 % become [MASK], 10 % a random token, 10 % stay (Devlin et al. 2019)."""
IGNORED = -100
"""The label of a token that is not predicted."""


def mask_tokens(
    ids_BT: Tensor, special_BT: Tensor, *, mask_id: int, vocabulary: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Hide 15 % of the ordinary tokens.

    Args:
        ids_BT: Token numbers.
        special_BT: True for special tokens and padding, which are never hidden.
        mask_id: Number of the mask token.
        vocabulary: V; random tokens are drawn from [0, V).
        generator: The source of chance.

    Returns:
        The ids with hidden tokens replaced, and the labels: the true token where one is predicted, `IGNORED` elsewhere.
    """
    chosen_BT = (torch.rand(ids_BT.shape, generator=generator) < MASKED_SHARE) & ~special_BT
    fate_BT = torch.rand(ids_BT.shape, generator=generator)
    random_BT = torch.randint(vocabulary, ids_BT.shape, generator=generator)
    masked_BT = torch.where(chosen_BT & (fate_BT < MASK_SHARE), mask_id, ids_BT)
    masked_BT = torch.where(chosen_BT & (fate_BT >= 1 - RANDOM_SHARE), random_BT, masked_BT)
    return masked_BT, torch.where(chosen_BT, ids_BT, IGNORED)


class MlmHead(nn.Module):
    """Dense, GELU, LayerNorm, and a decoder over the vocabulary: the head of BERT and of RoBERTa.

    The decoder starts as a copy of the encoder's embedding matrix and is trained apart from it (as the official code does).

    Args:
        embeddings_VD: The encoder's word embeddings; V and D are read from it.
        layer_norm_eps: The encoder's.
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
