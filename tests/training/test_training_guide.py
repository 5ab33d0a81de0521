"""Embeddings of the training sentences by the frozen encoder: values, cache, and their use in a run."""

import numpy as np
import torch
from support.encoders import prompt_encoder, small_tokenizer
from support.runs import run_small
from torch.nn import functional as F

from promcse_pl.config import DataConfig
from promcse_pl.data.batch import Tokens
from promcse_pl.data.module import PromcseDataModule
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.training import guide
from promcse_pl.training.guide import load_guide

ROWS = ["w5 w6,w7,w8", "w9,w10 w11 w12,w13", "w14,w15,w16 w17"]


def data_of(folder):
    path = folder / "rows.csv"
    path.write_text("\n".join(["a,b,c", *ROWS]) + "\n")
    config = DataConfig(kind="triplets", train=str(path), batch_size=2, cache_dir=str(folder / "cache"))
    data = PromcseDataModule(config, small_tokenizer(), longest_input=32, seed=0)
    data.setup()
    return data


def test_the_guide_is_the_frozen_encoder_without_prompt_and_head(tmp_path):
    data, encoder = data_of(tmp_path), prompt_encoder(dtype=torch.float32, head="mlp")
    guide_WBD = load_guide(encoder, data, 16, lambda _: None).views(torch.tensor([2, 0]))
    tokens = Tokens.padded(*data.token_rows.fetch(np.array([2, 0])))
    plain = PromptEncoder(encoder.backbone, length=0, pooling="avg").eval()
    expected = F.normalize(plain(tokens)[0].detach(), dim=1).view(3, 2, -1)
    torch.testing.assert_close(guide_WBD, expected, rtol=0, atol=1e-3)  # float16
    assert load_guide(encoder, data, None, lambda _: None).views(torch.tensor([], dtype=torch.long)).shape[1] == 0


def test_the_guide_is_read_from_the_cache_unless_it_is_damaged_or_another_one(tmp_path, caplog):
    data, encoder = data_of(tmp_path), prompt_encoder(dtype=torch.float32)
    done = []
    first = load_guide(encoder, data, None, done.append).views(torch.arange(3))
    assert done == [9]
    load_guide(encoder, data, 8, done.append)  # the chunk size does not matter
    encoder.prompt.embedding.weight.data += 1  # nor does the prompt
    assert torch.equal(load_guide(encoder, data, None, done.append).views(torch.arange(3)), first)
    assert done == [9]
    (path,) = (tmp_path / "cache" / "guide").iterdir()
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    assert torch.equal(load_guide(encoder, data, None, done.append).views(torch.arange(3)), first)
    assert "is damaged; the training sentences are encoded again" in caplog.text
    encoder.pooling = "cls"
    load_guide(encoder, data, None, done.append)
    assert done == [9, 9, 9]


def test_with_several_ranks_the_log_names_the_time_limit_and_the_way_around_it(tmp_path, caplog, monkeypatch):
    data, encoder = data_of(tmp_path), prompt_encoder(dtype=torch.float32)
    monkeypatch.setattr(guide, "world_size", lambda: 2)
    with caplog.at_level("INFO", "promcse_pl"):
        load_guide(encoder, data, None, lambda _: None)
        assert "the other ranks wait for at most 60 minutes" in caplog.text
        assert "trainer.devices=1 trainer.num_nodes=1 trainer.max_steps=1" in caplog.text
        caplog.clear()
        load_guide(encoder, data, None, lambda _: None)
    assert not caplog.records  # read from the cache


def test_a_run_with_a_guide_trains_another_prompt_and_repeats_with_the_cache(tmp_path):
    trained, setting = {}, {"mask_false_negatives": True}
    for name, loss in {"plain": {}, "first": setting, "cached": setting}.items():
        run_small(tmp_path, name, loss=loss)
        trained[name] = (tmp_path / name / "adapter/adapter.safetensors").read_bytes()
    assert trained["first"] != trained["plain"]
    assert trained["first"] == trained["cached"]
