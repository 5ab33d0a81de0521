"""The LightningDataModule: batches of the tokenised rows, in an order that is a pure function of (seed, epoch)."""

# B rows, N = views x B sentences, T tokens

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from promcse_pl.config import DataConfig
from promcse_pl.data.batch import Tokens, TrainBatch, upload
from promcse_pl.data.masking import mask_tokens
from promcse_pl.data.retrieval import DevSet
from promcse_pl.data.sources import cache_dir, load_sources
from promcse_pl.data.tokens import Prepare, TokenRows, load_tokens, prepare_rows
from promcse_pl.utils.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class BatchPosition:
    """Epoch, batch index and row numbers of a batch: the only inputs, with the seed, of its random draws."""

    epoch: int
    index: int
    rows_B: NDArray[np.int64]


def epoch_order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of the rows in an epoch, a permutation."""
    order: NDArray[np.int64] = np.random.default_rng([seed, epoch]).permutation(rows)
    return order


class EpochBatches(Sampler[BatchPosition]):
    """Batches of an epoch in `epoch_order`; the last one may be smaller. Lightning calls `set_epoch`.

    Args:
        rows, batch_size: Of the training data.
        seed: Seed of the order.
        start_step: Completed steps of a resumed run: its current epoch continues after them.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, start_step: int = 0) -> None:
        self.rows, self.batch_size, self.seed, self.epoch = rows, batch_size, seed, 0
        self.start_epoch, self.start_index = divmod(start_step, len(self))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[BatchPosition]:
        order = epoch_order(self.rows, self.seed, self.epoch)
        for index in range(self.start_index if self.epoch == self.start_epoch else 0, len(self)):
            yield BatchPosition(self.epoch, index, order[index * self.batch_size : (index + 1) * self.batch_size])


@dataclass(frozen=True, slots=True)
class Masking:
    """Properties of the tokenizer that the MLM task needs."""

    mask_id: int
    vocabulary: int
    special_ids: tuple[int, ...]


class TrainBatches(Dataset[TrainBatch]):
    """A rank's part of each batch; a single sentence becomes two equal views.

    Tokens are masked for the whole batch, so that the masks do not depend on the world size.
    """

    def __init__(
        self, rows: TokenRows, seed: int, masking: Masking | None, *, rank: int = 0, world_size: int = 1
    ) -> None:
        self.rows, self.seed, self.masking, self.rank, self.world_size = rows, seed, masking, rank, world_size

    def __getitem__(self, position: BatchPosition) -> TrainBatch:
        tokens = Tokens.padded(*self.rows.fetch(position.rows_B))
        if self.rows.width == 1:
            tokens = tokens.select(torch.arange(len(tokens.ids_NT)).repeat(2), tokens.ids_NT.shape[1])
        if self.masking is not None:
            special_NT = torch.isin(tokens.ids_NT, torch.tensor(self.masking.special_ids)) | (tokens.mask_NT == 0)
            seed = np.random.SeedSequence([self.seed, position.epoch, position.index]).generate_state(1, np.uint64)[0]
            tokens.mlm_ids_NT, tokens.mlm_labels_NT = mask_tokens(
                tokens.ids_NT,
                special_NT,
                mask_id=self.masking.mask_id,
                vocabulary=self.masking.vocabulary,
                generator=torch.Generator().manual_seed(int(seed)),
            )
        scores = None if self.rows.scores_R is None else torch.from_numpy(self.rows.scores_R[position.rows_B])
        batch = TrainBatch(tokens, max(2, self.rows.width), torch.from_numpy(position.rows_B), scores)
        return batch if self.world_size == 1 else batch.for_rank(self.rank, self.world_size)


class PromcseDataModule(pl.LightningDataModule):
    """Training batches and dev set of a run.

    Args:
        config: The data settings; `prompts` holds texts, not names.
        tokenizer: Tokenizer of the frozen encoder.
        longest_input: Maximum number of tokens that fit the encoder after its prompt; max_length must not exceed it.
        seed: Seed of the order, the masks and the held-out rows.
        mlm: Whether batches include masked tokens.
        vocabulary: V, the rows of the encoder's embedding matrix; None: the tokenizer has no token without one.
        prepare: See `promcse_pl.data.tokens.prepare_rows`; None: texts are tokenised as they are.
        progress: Called with the number of sentences tokenised so far.
    """

    # eight parameters: everything that affects a batch, and the progress
    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,  # noqa: ANN401  (a transformers tokenizer)
        *,
        longest_input: int,
        seed: int,
        mlm: bool = False,
        vocabulary: int | None = None,
        prepare: Prepare | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        if config.max_length > longest_input:
            raise ConfigError(
                f"data.max_length={config.max_length} exceeds the {longest_input} tokens that fit the encoder after the prompt. "
                f"Try: data.max_length={longest_input}"
            )
        if mlm and tokenizer.mask_token_id is None:
            raise ConfigError("loss.mlm_weight > 0 needs a tokenizer with a mask token. Try: loss.mlm_weight=0")
        self.config, self.tokenizer, self.seed, self.progress = config, tokenizer, seed, progress
        self.prepare, self.vocabulary = prepare, vocabulary
        tokens = len(tokenizer) if vocabulary is None else min(vocabulary, len(tokenizer))
        self.masking = Masking(tokenizer.mask_token_id, tokens, tuple(tokenizer.all_special_ids)) if mlm else None
        self.start_step = 0
        """Completed steps of a resumed run."""
        self.rows: TokenRows | None = None
        self.example: tuple[Any, ...] = ()
        """The first training row, with text prompts."""
        self.notes: tuple[str, ...] = ()
        """How the training file is read: its columns and delimiter."""
        self.sha256 = ""
        """sha256 of the training file; see `RowSource`."""
        self.longest_input = longest_input
        self.dev: DevSet | None = None

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  (Lightning's signature)
        """Read the dev set, and tokenise the training rows or map them from the cache."""
        if self.rows is not None:
            return
        source, self.dev = load_sources(self.config, self.seed)
        if self.prepare is not None:
            source = prepare_rows(source, self.config.prompts or [""] * source.width, self.prepare)
        self.example, self.notes, self.sha256 = source.example, source.notes, source.sha256
        self.rows = load_tokens(
            source,
            self.tokenizer,
            max_length=self.config.max_length,
            cache_dir=cache_dir(self.config.cache_dir),
            vocabulary=self.vocabulary,
            progress=self.progress,
        )
        scores_R = self.rows.scores_R
        if scores_R is not None and scores_R.min() == scores_R.max():
            raise DataError(
                f"{source.name}: all scores ({len(scores_R)} rows) are {scores_R[0]:g}, but CoSENT needs pairs with different "
                "scores. Check that the score column is named score, or name the columns: data.columns=[TEXT,TEXT,SCORE]"
            )

    @property
    def token_rows(self) -> TokenRows:
        """The tokenised training rows; `setup` must have run."""
        assert self.rows is not None, "call setup first"
        return self.rows

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """Return the loader of this rank's parts of one epoch's batches."""
        rows = self.token_rows
        batches = EpochBatches(len(rows), self.config.batch_size, self.seed, self.start_step)
        trainer = self.trainer
        for_gpu = trainer is not None and trainer.strategy.root_device.type == "cuda"
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        return DataLoader(
            TrainBatches(rows, self.seed, self.masking, rank=rank, world_size=world_size),
            sampler=batches,
            batch_size=None,
            pin_memory=for_gpu,
            generator=torch.Generator(),  # a DataLoader draws a number at its start: not from the global generator
        )

    def transfer_batch_to_device(self, batch: TrainBatch, device: torch.device, dataloader_idx: int) -> TrainBatch:  # noqa: ARG002
        """Return the batch on a device."""
        scores = None if batch.scores_B is None else upload(batch.scores_B, device)
        return TrainBatch(batch.tokens.to(device), batch.views, batch.rows_B, scores)
