"""The LightningDataModule: token rows in, batches out, in an order that is a pure function of (seed, epoch)."""

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
from promcse_pl.data.batch import Tokens, TrainBatch
from promcse_pl.data.masking import mask_tokens
from promcse_pl.data.pairs import ScoredPairs
from promcse_pl.data.sources import cache_dir, load_sources
from promcse_pl.data.tokens import TokenRows, load_tokens
from promcse_pl.utils.errors import ConfigError


@dataclass(frozen=True, slots=True)
class _Place:
    """Which rows make a batch, and where the batch stands: all that its chance may depend on."""

    epoch: int
    index: int
    rows_B: NDArray[np.int64]


def epoch_order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of the rows in an epoch: a permutation that (seed, epoch) alone decides."""
    order: NDArray[np.int64] = np.random.default_rng([seed, epoch]).permutation(rows)
    return order


class EpochBatches(Sampler[_Place]):
    """Batches of an epoch in `epoch_order`; the last one holds what is left. Lightning calls `set_epoch`.

    Args:
        rows, batch_size: Of the training data.
        seed: Decides the order.
        start_step: Steps that were done before: the epoch that they ended in begins where they left it.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, start_step: int = 0) -> None:
        self.rows, self.batch_size, self.seed, self.epoch = rows, batch_size, seed, 0
        self.start_epoch, self.start_index = divmod(start_step, len(self))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[_Place]:
        order = epoch_order(self.rows, self.seed, self.epoch)
        for index in range(self.start_index if self.epoch == self.start_epoch else 0, len(self)):
            yield _Place(self.epoch, index, order[index * self.batch_size : (index + 1) * self.batch_size])


@dataclass(frozen=True, slots=True)
class Masking:
    """What the MLM task needs to know of the tokenizer."""

    mask_id: int
    vocabulary: int
    special_ids: tuple[int, ...]


class TrainBatches(Dataset[TrainBatch]):
    """A rank's share of whole batches by their place; a single sentence becomes two equal views.

    What is hidden for the MLM task is drawn for the whole batch, so that it does not depend on the number of ranks.
    """

    def __init__(self, rows: TokenRows, seed: int, masking: Masking | None, *, rank: int = 0, ranks: int = 1) -> None:
        self.rows, self.seed, self.masking, self.rank, self.ranks = rows, seed, masking, rank, ranks

    def __getitem__(self, place: _Place) -> TrainBatch:
        ids, lengths = self.rows.fetch(place.rows_B)
        ids_NT = torch.from_numpy(ids)
        mask_NT = (torch.arange(ids_NT.shape[1]) < torch.from_numpy(lengths).unsqueeze(1)).long()
        if self.rows.width == 1:
            ids_NT, mask_NT = ids_NT.repeat(2, 1), mask_NT.repeat(2, 1)
        tokens = Tokens(ids_NT, mask_NT)
        if self.masking is not None:
            special_NT = torch.isin(ids_NT, torch.tensor(self.masking.special_ids)) | (mask_NT == 0)
            chance = np.random.SeedSequence([self.seed, place.epoch, place.index]).generate_state(1, np.uint64)[0]
            tokens.mlm_ids_NT, tokens.mlm_labels_NT = mask_tokens(
                ids_NT,
                special_NT,
                mask_id=self.masking.mask_id,
                vocabulary=self.masking.vocabulary,
                generator=torch.Generator().manual_seed(int(chance)),
            )
        batch = TrainBatch(tokens, max(2, self.rows.width), torch.from_numpy(place.rows_B))
        return batch if self.ranks == 1 else batch.share(self.rank, self.ranks)


class PromcseDataModule(pl.LightningDataModule):
    """Training batches and development pairs of a run.

    Args:
        config: The data settings.
        tokenizer: Of the frozen encoder.
        longest_input: Tokens that fit the encoder behind its prompt; max_length may not exceed it.
        seed: Decides order, masks and what is held out.
        mlm: Whether batches carry the MLM task.
        progress: Called with the number of sentences tokenised so far.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,  # noqa: ANN401  (a transformers tokenizer)
        *,
        longest_input: int,
        seed: int,
        mlm: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        if config.max_length > longest_input:
            raise ConfigError(
                f"data.max_length={config.max_length} exceeds the {longest_input} tokens that fit the encoder behind the prompt. "
                f"Try: data.max_length={longest_input}"
            )
        if mlm and tokenizer.mask_token_id is None:
            raise ConfigError("loss.mlm_weight > 0 needs a tokenizer with a mask token. Try: loss.mlm_weight=0")
        self.config, self.tokenizer, self.seed, self.progress = config, tokenizer, seed, progress
        self.masking = (
            Masking(tokenizer.mask_token_id, len(tokenizer), tuple(tokenizer.all_special_ids)) if mlm else None
        )
        self.start_step = 0
        """Steps done before this process took over; a resumed run sets it."""
        self.rows: TokenRows | None = None
        self.example: tuple[str, ...] = ()
        """The first training row."""
        self.notes: tuple[str, ...] = ()
        """How the training file is read: its columns and delimiter."""
        self.longest_input = longest_input
        self.dev: ScoredPairs | None = None

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  (Lightning's signature)
        """Read the development pairs and tokenise the training rows, or find them in the cache."""
        if self.rows is not None:
            return
        source, self.dev = load_sources(self.config, self.seed)
        self.example, self.notes = source.example, source.notes
        self.rows = load_tokens(
            source,
            self.tokenizer,
            max_length=self.config.max_length,
            cache_dir=cache_dir(self.config.cache_dir),
            progress=self.progress,
        )

    @property
    def token_rows(self) -> TokenRows:
        """The tokenised training rows; `setup` must have run."""
        assert self.rows is not None, "call setup first"
        return self.rows

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """Return the loader of this process's shares of one epoch's batches."""
        rows = self.token_rows
        batches = EpochBatches(len(rows), self.config.batch_size, self.seed, self.start_step)
        trainer = self.trainer
        for_gpu = trainer is not None and trainer.strategy.root_device.type == "cuda"
        rank, ranks = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        return DataLoader(
            TrainBatches(rows, self.seed, self.masking, rank=rank, ranks=ranks),
            sampler=batches,
            batch_size=None,
            pin_memory=for_gpu,
            generator=torch.Generator(),  # a loader draws a number at its start; not from the one that decides the run
        )

    def transfer_batch_to_device(self, batch: TrainBatch, device: torch.device, dataloader_idx: int) -> TrainBatch:  # noqa: ARG002
        """Move a batch."""
        return TrainBatch(batch.tokens.to(device, non_blocking=True), batch.views, batch.rows_B)
