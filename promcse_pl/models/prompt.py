"""The deep prompt: P trained keys and values in front of those of the tokens, in every layer."""

# B sentences, P prompt length, L layers, N key/value heads, H head size, D = N * H

from __future__ import annotations

import torch
from torch import Tensor, nn

from promcse_pl.models.cpu.dropout import dropout

INIT_STD = 0.02
"""Standard deviation of newly initialised weights, as in BERT and the official PromCSE code."""


class DeepPrompt(nn.Module):
    """Trainable keys and values for every layer of an encoder (Jiang et al. 2022, eq. 1).

    The parameter names and shapes are the official ones: `embedding.weight` is (P, L * 2 * D), in the order K0, V0, K1, V1,
    ...; with re-parametrisation it is (P, D) and an MLP `trans` (Linear, Tanh, Linear) computes the keys and values from it.

    Args:
        length: P >= 0; 0 is the plain encoder.
        layers, heads, head_size: L, N and H of the encoder.
        projection_size: Width of the MLP's hidden layer, or None for no re-parametrisation.
        dropout: Probability in [0, 1) of dropping a prompt channel in training.
    """

    def __init__(
        self,
        length: int,
        *,
        layers: int,
        heads: int,
        head_size: int,
        projection_size: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.length, self.layers, self.heads, self.head_size = length, layers, heads, head_size
        self.dropout = dropout
        width = heads * head_size
        flat = layers * 2 * width
        self.embedding = nn.Embedding(length, flat if projection_size is None else width)
        nn.init.normal_(self.embedding.weight, std=INIT_STD)
        self.trans: nn.Sequential | None = None
        if projection_size is not None:
            layers_in_out = nn.Linear(width, projection_size), nn.Linear(projection_size, flat)
            for layer in layers_in_out:
                nn.init.normal_(layer.weight, std=INIT_STD)
                nn.init.zeros_(layer.bias)
            self.trans = nn.Sequential(layers_in_out[0], nn.Tanh(), layers_in_out[1])

    def forward(self) -> Tensor:
        """Return the keys and values shared by all sentences, (L, 2, 1, N, P, H), before dropout."""
        flat = self.embedding.weight if self.trans is None else self.trans(self.embedding.weight)
        prompt = flat.view(self.length, self.layers, 2, self.heads, self.head_size).permute(1, 2, 3, 0, 4)
        return prompt.unsqueeze(2)

    @torch.no_grad()
    def add_to_slots(self, kv_L2NH: Tensor) -> None:
        """Add a key and value of every layer to all slots of a prompt without re-parametrisation."""
        self.embedding.weight += kv_L2NH.reshape(1, -1).to(self.embedding.weight)

    def drop(self, prompt_kv: Tensor, sentences: int) -> Tensor:
        """Apply dropout in training, with an independent mask for every sentence, layer, K/V, head, slot and channel.

        Args:
            prompt_kv: Output of `forward`.
            sentences: B, the number of sentences.

        Returns:
            (L, 2, B, N, P, H); the unchanged (L, 2, 1, N, P, H) without dropout or in eval mode.
        """
        if not self.training or self.dropout == 0.0:
            return prompt_kv
        shape = torch.Size((*prompt_kv.shape[:2], sentences, *prompt_kv.shape[3:]))
        return dropout(prompt_kv, self.dropout, shape)
