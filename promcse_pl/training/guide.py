"""The guide of the loss: embeddings of all training sentences by the frozen encoder, computed once and memory-mapped."""

# R rows, W texts per row, B rows of a batch, N sentences, D width

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from promcse_pl.data.batch import Tokens
from promcse_pl.data.module import PromcseDataModule
from promcse_pl.data.sources import cache_dir
from promcse_pl.data.tokens import TokenRows
from promcse_pl.embedder import PromCSE, model_hash
from promcse_pl.evaluation.targets import frozen_target
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.training.distributed import TIMEOUT
from promcse_pl.training.gather import world_size
from promcse_pl.utils.files import atomic_file

log = logging.getLogger("promcse_pl")

ROWS_AT_ONCE = 4096
"""Rows that are encoded between two writes; memory does not grow with the data."""
_DIGEST_BYTES = 32


class Guide:
    """Unit embeddings of the training sentences.

    Args:
        vectors_RWD: Embeddings by row number, float16: a million triplets of width 1,024 take 6 GB of disk.
    """

    def __init__(self, vectors_RWD: NDArray[np.float16]) -> None:
        self._vectors_RWD = vectors_RWD

    def views(self, rows_B: Tensor) -> Tensor:
        """Return the embeddings of rows, (W, B, D) float32 on the CPU."""
        vectors_WBD = torch.from_numpy(self._vectors_RWD[rows_B.cpu().numpy()]).float().transpose(0, 1)
        return F.normalize(vectors_WBD, dim=2)


def load_guide(
    encoder: PromptEncoder, data: PromcseDataModule, chunk_tokens: int | None, progress: Callable[[int], None]
) -> Guide:
    """Map the embeddings of the training sentences by the frozen encoder; compute them first unless the cache has them.

    Args:
        encoder: The frozen encoder, with its prompt, which is not used. Its pooling applies if the encoder has none of its own.
        data: The training data, set up.
        chunk_tokens: See `PromptEncoder.forward`.
        progress: Called with the number of sentences encoded so far.

    Raises:
        DataError: The cache cannot be written.
    """
    rows = data.token_rows
    frozen = frozen_target(PromCSE(encoder, data.tokenizer)).members[0].load()
    key = hashlib.sha256(f"{model_hash(frozen)} {rows.fingerprint}".encode()).hexdigest()
    path = cache_dir(data.config.cache_dir) / "guide" / f"{key}.bin"
    shape = (len(rows), rows.width, frozen.width)
    if not _is_whole(path, shape):
        if path.exists():
            log.warning("%s is damaged; the training sentences are encoded again", path)
        if world_size() > 1:
            log.info(
                "rank 0 encodes the training sentences with the frozen encoder; the other ranks wait for at most %d minutes. If "
                "it takes longer, first run the same command with trainer.devices=1 trainer.num_nodes=1 trainer.max_steps=1, "
                "which writes the cache",
                TIMEOUT.total_seconds() // 60,
            )
        _write(path, frozen.encoder, rows, chunk_tokens, progress)
    return Guide(np.memmap(path, np.float16, "r", shape=shape))


def _write(
    path: Path, encoder: PromptEncoder, rows: TokenRows, chunk_tokens: int | None, progress: Callable[[int], None]
) -> None:
    digest = hashlib.sha256()
    with atomic_file(path) as temporary, temporary.open("wb") as stream, torch.inference_mode():
        for start in range(0, len(rows), ROWS_AT_ONCE):
            numbers = np.arange(start, min(start + ROWS_AT_ONCE, len(rows)))
            tokens = Tokens.padded(*rows.fetch(numbers)).to(encoder.backbone.device)
            vectors_ND, _ = encoder(tokens, chunk_tokens=chunk_tokens)
            unit_WBD = F.normalize(vectors_ND, dim=1).view(rows.width, len(numbers), -1)
            content = unit_WBD.transpose(0, 1).half().contiguous().cpu().numpy().tobytes()
            digest.update(content)
            stream.write(content)
            progress((start + len(numbers)) * rows.width)
        stream.write(digest.digest())


def _is_whole(path: Path, shape: tuple[int, int, int]) -> bool:
    """Return whether a file has the size of the embeddings and ends with their checksum."""
    size = 2 * shape[0] * shape[1] * shape[2]
    if not path.is_file() or path.stat().st_size != size + _DIGEST_BYTES:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while left := size - stream.tell():
            digest.update(stream.read(min(left, 1 << 20)))
        return stream.read() == digest.digest()
