"""Batches are a pure function of (seed, epoch, position): order, views, masks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.encoders import small_tokenizer

from promcse_pl.config import DataConfig
from promcse_pl.data.batch import TrainBatch
from promcse_pl.data.masking import IGNORED
from promcse_pl.data.module import EpochBatches, PromcseDataModule, epoch_order
from promcse_pl.utils.errors import ConfigError


def data_module(folder: Path, width: int = 3, rows: int = 11, *, seed: int = 0, mlm: bool = False) -> PromcseDataModule:
    path = folder / f"rows{width}.csv"
    cells = [[f"w{5 + row} w{6 + position}" + " w20" * (row % 4) for position in range(width)] for row in range(rows)]
    path.write_text("\n".join(",".join(row) for row in [[f"c{position}" for position in range(width)], *cells]) + "\n")
    kind = {1: "sentences", 2: "pairs", 3: "triplets"}[width]
    config = DataConfig(kind=kind, train=str(path), batch_size=4, max_length=12, cache_dir=str(folder / "cache"))
    module = PromcseDataModule(config, small_tokenizer(), longest_input=36, seed=seed, mlm=mlm)
    module.setup()
    return module


def epoch_of(module: PromcseDataModule, epoch: int) -> list[TrainBatch]:
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


@given(rows=st.integers(1, 60), batch_size=st.integers(2, 20), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 50))
def test_an_epoch_holds_every_row_once_and_keeps_the_ragged_last_batch(rows, batch_size, seed, epoch):
    batches = EpochBatches(rows, batch_size, seed)
    batches.set_epoch(epoch)
    positions = list(batches)
    assert len(positions) == len(batches)
    assert [position.index for position in positions] == list(range(len(positions)))
    assert [len(position.rows_B) for position in positions[:-1]] == [batch_size] * (len(positions) - 1)
    assert sorted(np.concatenate([position.rows_B for position in positions])) == list(range(rows))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    order = epoch_order(50, seed=1, epoch=2)
    np.random.seed(0)  # noqa: NPY002  (global state must not matter)
    torch.manual_seed(0)
    assert (epoch_order(50, seed=1, epoch=2) == order).all()
    assert (epoch_order(50, seed=2, epoch=2) != order).any()
    assert (epoch_order(50, seed=1, epoch=1) != order).any()
    assert (epoch_order(50, seed=2, epoch=1) != order).any()


def test_the_order_of_a_seed_stays_what_it_was():
    assert epoch_order(8, seed=42, epoch=0).tolist() == [3, 4, 2, 7, 6, 1, 5, 0]


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_batch_holds_the_views_of_its_rows_one_view_after_the_other(width, tmp_path):
    module = data_module(tmp_path, width)
    batches = epoch_of(module, 0)
    assert [len(batch.rows_B) for batch in batches] == [4, 4, 3]
    for batch in batches:
        rows = len(batch.rows_B)
        assert batch.views == max(2, width)
        assert batch.tokens.ids_NT.shape[0] == batch.views * rows
        views = batch.tokens.ids_NT.view(batch.views, rows, -1)
        for position, row in enumerate(batch.rows_B.tolist()):
            for view in range(batch.views):
                text = f"w{5 + row} w{6 + (view if width > 1 else 0)}" + " w20" * (row % 4)
                wanted = small_tokenizer()(text)["input_ids"]
                assert views[view, position, : len(wanted)].tolist() == wanted
                assert batch.tokens.mask_NT.view(batch.views, rows, -1)[view, position].sum() == len(wanted)


def test_the_masks_of_the_mlm_task_depend_on_seed_epoch_and_batch_alone(tmp_path):
    def masked(seed: int, epoch: int) -> list[torch.Tensor]:
        return [batch.tokens.mlm_ids_NT for batch in epoch_of(data_module(tmp_path, 1, 40, seed=seed, mlm=True), epoch)]

    first = masked(3, 1)
    torch.manual_seed(9)
    assert all(map(torch.equal, first, masked(3, 1)))
    later = data_module(tmp_path, 1, 40, seed=3, mlm=True)
    loader = later.train_dataloader()
    loader.sampler.set_epoch(1)
    position = list(loader.sampler)[5]
    assert torch.equal(loader.dataset[position].tokens.mlm_ids_NT, first[5])  # alone, without its predecessors

    def hidden(batches: list[TrainBatch]) -> list[list[int]]:
        return [(batch.tokens.mlm_labels_NT != IGNORED).flatten().nonzero().flatten().tolist() for batch in batches]

    one = hidden(epoch_of(later, 0))
    assert one != hidden(epoch_of(later, 1))
    assert one != hidden(epoch_of(data_module(tmp_path, 1, 40, seed=4, mlm=True), 0))
    assert len({tuple(positions) for positions in one}) > 1


def test_the_mlm_task_masks_no_special_token_and_no_padding_and_keeps_the_original_ids(tmp_path):
    specials = torch.tensor(small_tokenizer().all_special_ids)
    hidden_tokens = 0
    for batch in epoch_of(data_module(tmp_path, 1, 60, mlm=True), 0):
        tokens = batch.tokens
        hidden = tokens.mlm_labels_NT != IGNORED
        hidden_tokens += int(hidden.sum())
        assert not torch.isin(tokens.ids_NT[hidden], specials).any()
        assert (tokens.mask_NT[hidden] == 1).all()
        assert torch.equal(tokens.mlm_labels_NT[hidden], tokens.ids_NT[hidden])
        assert torch.equal(tokens.mlm_ids_NT[~hidden], tokens.ids_NT[~hidden])
    assert hidden_tokens > 20


def test_sentences_longer_than_the_encoder_takes_are_refused_with_the_length_that_fits():
    config = DataConfig(kind="triplets", train="demo", max_length=32)
    with pytest.raises(ConfigError, match=r"data\.max_length=32 exceeds the 20 tokens .* Try: data\.max_length=20"):
        PromcseDataModule(config, small_tokenizer(), longest_input=20, seed=0)


def test_masked_tokens_are_not_replaced_by_a_token_without_an_embedding():
    config = DataConfig(kind="triplets", train="demo", max_length=16)
    for vocabulary, expected in ((90, 90), (None, 97), (200, 97)):
        module = PromcseDataModule(config, small_tokenizer(), longest_input=20, seed=0, mlm=True, vocabulary=vocabulary)
        assert module.masking.vocabulary == expected


def test_the_mlm_task_needs_a_mask_token():
    tokenizer = small_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ConfigError, match=r"mask token\. Try: loss\.mlm_weight=0"):
        PromcseDataModule(DataConfig(kind="triplets", train="demo"), tokenizer, longest_input=40, seed=0, mlm=True)
