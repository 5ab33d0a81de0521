"""Batches: token ids and attention masks of sentences, and the rows of a training step."""

# N = views x B sentences, B rows, T tokens

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(slots=True)
class Tokens:
    """A batch of tokenised sentences.

    Attributes:
        ids_NT: Token ids, int64.
        mask_NT: 1 for real tokens, 0 for padding at the end.
        types_NT: Token types, or None for zeros.
        mlm_ids_NT: Masked token ids, see `mask_tokens`; None without the MLM task.
        mlm_labels_NT: Labels of the MLM task, always on the CPU.
        lengths_N: Number of real tokens of each sentence, always on the CPU, so that a training step does not synchronise with
            the GPU. None: unknown, and sentences may be left-padded.
    """

    ids_NT: Tensor
    mask_NT: Tensor
    types_NT: Tensor | None = None
    mlm_ids_NT: Tensor | None = None
    mlm_labels_NT: Tensor | None = None
    lengths_N: Tensor | None = None

    @classmethod
    def padded(cls, ids_NT: NDArray[np.int64], lengths_N: NDArray[np.int64]) -> Tokens:
        """Build from ids that are padded on the right, and the number of real tokens of each sentence."""
        lengths = torch.from_numpy(lengths_N)
        mask_NT = (torch.arange(ids_NT.shape[1]) < lengths.unsqueeze(1)).long()
        return cls(torch.from_numpy(ids_NT), mask_NT, lengths_N=lengths)

    def lengths(self) -> Tensor:
        """Return the number of real tokens of each sentence, (N,), on the CPU."""
        return self.mask_NT.sum(1).cpu() if self.lengths_N is None else self.lengths_N

    def select(self, rows: Tensor | slice, length: int) -> Tokens:
        """Return some sentences, truncated to a length.

        Args:
            rows: Row numbers on the CPU, or a slice.
            length: Number of columns that are kept; `lengths_N` is not truncated.
        """

        def part_of(part: Tensor) -> Tensor:
            return part[rows if isinstance(rows, slice) else upload(rows, part.device), :length]

        selected = self._each(part_of, part_of)
        selected.lengths_N = None if self.lengths_N is None else self.lengths_N[rows]
        return selected

    def to(self, device: torch.device | str) -> Tokens:
        """Return the batch on a device, without `mlm_labels_NT` and `lengths_N`, which stay on the CPU."""
        return self._each(lambda part: upload(part, torch.device(device)), lambda labels: labels)

    def pin_memory(self) -> Tokens:
        """Return the batch in page-locked memory."""
        return self._each(Tensor.pin_memory, Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor], for_labels: Callable[[Tensor], Tensor]) -> Tokens:
        types, mlm_ids = (None if part is None else function(part) for part in (self.types_NT, self.mlm_ids_NT))
        labels = None if self.mlm_labels_NT is None else for_labels(self.mlm_labels_NT)
        return Tokens(function(self.ids_NT), function(self.mask_NT), types, mlm_ids, labels, self.lengths_N)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device; the copy to a GPU is asynchronous."""
    return tensor.to(device, non_blocking=device.type == "cuda")


@dataclass(slots=True)
class TrainBatch:
    """Rows of a training step.

    Attributes:
        tokens: Their sentences, view-major: all anchors, then all positives, then all hard negatives.
        views: 2 or 3.
        rows_B: Row numbers in the training data.
        scores_B: Score of each row, float32; None for rows without scores.
    """

    tokens: Tokens
    views: int
    rows_B: Tensor
    scores_B: Tensor | None = None

    def for_rank(self, rank: int, world_size: int) -> TrainBatch:
        """Return the rows of one rank.

        The ranks get consecutive parts that differ by at most one row; with fewer rows than ranks the last ones get none.
        """
        rows = torch.tensor_split(torch.arange(len(self.rows_B)), world_size)[rank]
        sentences = torch.cat([rows + view * len(self.rows_B) for view in range(self.views)])
        lengths = self.tokens.lengths()[sentences]
        longest = int(lengths.max()) if len(lengths) else self.tokens.mask_NT.shape[1]
        scores = None if self.scores_B is None else self.scores_B[rows]
        return TrainBatch(self.tokens.select(sentences, longest), self.views, self.rows_B[rows], scores)

    def pin_memory(self) -> TrainBatch:
        """Return the batch in page-locked memory; called by the DataLoader."""
        return TrainBatch(self.tokens.pin_memory(), self.views, self.rows_B, self.scores_B)
