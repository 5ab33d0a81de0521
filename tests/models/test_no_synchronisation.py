"""A training step does not synchronise with the device: it also runs on the meta device, whose tensors have no values."""

import pytest
import torch
from support.encoders import every_family, small_backbone, small_tokens

from promcse_pl.config import LossConfig
from promcse_pl.data.masking import IGNORED
from promcse_pl.losses.hybrid import hybrid_loss, mlm_loss
from promcse_pl.models.encoder import PromptEncoder

LENGTHS = [9, 4, 12, 5, 5, 11, 3, 8, 10]


def train_on_meta(encoder: PromptEncoder, *, mlm: bool = False, **options: object) -> None:
    tokens = small_tokens(LENGTHS, encoder.backbone.pad_id)
    tokens.lengths_N = torch.tensor(LENGTHS)
    if mlm:
        is_last_NT = torch.arange(max(LENGTHS)) == tokens.lengths_N.unsqueeze(1) - 1
        tokens.mlm_ids_NT = tokens.ids_NT.masked_fill(is_last_NT, 4)
        tokens.mlm_labels_NT = tokens.ids_NT.masked_fill(~is_last_NT, IGNORED)
    vectors, hidden = encoder.to("meta").train()(tokens.to("meta"), train_head=True, chunk_tokens=20, **options)
    loss = hybrid_loss(*vectors.view(3, 3, -1), LossConfig(margin=0.2, hinge_weight=10.0)).total
    if mlm:
        assert hidden.shape == (len(LENGTHS), encoder.backbone.width)
        loss = loss + mlm_loss(hidden, torch.zeros(len(LENGTHS), dtype=torch.long, device="meta"))
    loss.backward()
    assert encoder.prompt.embedding.weight.grad.device.type == "meta"


@every_family
def test_a_training_step_of_every_family_reads_no_value(family):
    train_on_meta(PromptEncoder(small_backbone(family), length=4, pooling="avg"))


@pytest.mark.parametrize("pooling", ["cls", "avg_first_last", "max", "weightedmean", "lasttoken"])
def test_a_training_step_with_every_pooling_reads_no_value(pooling):
    train_on_meta(PromptEncoder(small_backbone(), length=4, pooling=pooling, head="mlp"))


def test_the_mlm_task_reads_no_value():
    train_on_meta(PromptEncoder(small_backbone(), length=4, pooling="cls"), mlm=True)


def test_the_check_fails_where_a_value_is_read():
    tokens = small_tokens(LENGTHS).to("meta")  # without lengths, which the encoder then computes on the device
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        PromptEncoder(small_backbone(), length=4).to("meta")(tokens)
