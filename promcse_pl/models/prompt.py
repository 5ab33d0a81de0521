"""The trained prompt: keys and values prepended to those of the tokens in every layer, or vectors for the input layer."""

# B sentences, P prompt length, L layers, N key/value heads, H head size, D = N * H, E width of the input embeddings

from __future__ import annotations

from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from promcse_pl.config import PromptKind
from promcse_pl.models.cpu.dropout import dropout

KINDS: tuple[PromptKind, ...] = get_args(PromptKind)
INIT_STD = 0.02
"""Standard deviation of newly initialised weights, as in BERT and the official PromCSE code."""


class Prompt(nn.Module):
    """P trained vectors, with dropout.

    Subclasses implement `forward`, which returns the input of `FrozenBackbone.forward`: one tensor for all sentences.

    Args:
        length: P >= 0; 0 is the plain encoder.
        width: Entries of a slot in `embedding.weight`, (P, width).
        dropout: Probability in [0, 1) of dropping a prompt channel in training.
    """

    kind: PromptKind
    sentence_dim: ClassVar[int]
    """Dimension of the prompt that has size 1, or B after `drop`."""

    def __init__(self, length: int, *, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.length, self.dropout = length, dropout
        self.embedding = nn.Embedding(length, width, dtype=torch.float32)  # whatever torch's default type is
        nn.init.normal_(self.embedding.weight, std=INIT_STD)

    def drop(self, prompt: Tensor, sentences: int) -> Tensor:
        """Apply dropout in training, with an independent mask for every sentence and every entry of the prompt.

        Args:
            prompt: Output of `forward`.
            sentences: B, the number of sentences.

        Returns:
            The prompt of every sentence; the unchanged `prompt` without dropout or in eval mode.
        """
        if not self.training or self.dropout == 0.0:
            return prompt
        shape = list(prompt.shape)
        shape[self.sentence_dim] = sentences
        return dropout(prompt, self.dropout, torch.Size(shape))


class DeepPrompt(Prompt):
    """Trainable keys and values for every layer of an encoder (Jiang et al. 2022, eq. 1).

    The parameter names and shapes are the official ones: `embedding.weight` is (P, L * 2 * D), in the order K0, V0, K1, V1,
    ...; with re-parametrisation it is (P, D) and an MLP `trans` (Linear, Tanh, Linear) computes the keys and values from it.

    Args:
        length, dropout: See `Prompt`.
        layers, heads, head_size: L, N and H of the encoder.
        projection_size: Width of the MLP's hidden layer, or None for no re-parametrisation.
    """

    sentence_dim = 2

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
        width, flat = heads * head_size, layers * 2 * heads * head_size
        super().__init__(length, width=flat if projection_size is None else width, dropout=dropout)
        self.kind = "deep" if projection_size is None else "projected"
        self.layers, self.heads, self.head_size = layers, heads, head_size
        self.trans: nn.Sequential | None = None
        if projection_size is not None:
            layers_in_out = (
                nn.Linear(width, projection_size, dtype=torch.float32),
                nn.Linear(projection_size, flat, dtype=torch.float32),
            )
            for layer in layers_in_out:
                nn.init.normal_(layer.weight, std=INIT_STD)
                nn.init.zeros_(layer.bias)
            self.trans = nn.Sequential(layers_in_out[0], nn.Tanh(), layers_in_out[1])

    def flat(self) -> Tensor:
        """Return the keys and values in the layout of the official code and of PEFT, (P, L * 2 * D)."""
        weight = self.embedding.weight
        return weight if self.trans is None else self.trans(weight)

    def forward(self) -> Tensor:
        """Return the keys and values, (L, 2, 1, N, P, H), before dropout."""
        prompt = self.flat().view(self.length, self.layers, 2, self.heads, self.head_size).permute(1, 2, 3, 0, 4)
        return prompt.unsqueeze(2)


class SharedPrompt(DeepPrompt):
    """The same trainable keys and values in all layers (Jiang et al. 2022, table 3); `embedding.weight` is (P, 2 * D): K, V.

    Dropout masks are those of a deep prompt: every layer has its own.

    Args:
        length, layers, heads, head_size, dropout: See `DeepPrompt`.
    """

    def __init__(self, length: int, *, layers: int, heads: int, head_size: int, dropout: float = 0.0) -> None:
        super().__init__(length, layers=1, heads=heads, head_size=head_size, dropout=dropout)
        self.kind, self.layers = "shared", layers

    def flat(self) -> Tensor:
        """Return the keys and values, repeated for every layer, (P, L * 2 * D)."""
        return self.embedding.weight.repeat(1, self.layers)


class InputPrompt(Prompt):
    """Trainable vectors for the input layer only (Jiang et al. 2022, table 3).

    They attend like tokens in every layer. They have no positions: they are appended to the output of the embedding layer.
    `embedding.weight` is (P, E).
    """

    kind = "input"
    sentence_dim = 0

    def forward(self) -> Tensor:
        """Return the vectors, (1, P, E), before dropout."""
        return self.embedding.weight.unsqueeze(0)
