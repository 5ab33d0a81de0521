"""Every probe of the official code: inputs that it accepts work; inputs that crash it work or are rejected with a message."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from support.encoders import NO_DROPOUT, SMALL, small_backbone, small_tokenizer, small_tokens
from support.folders import GOLDEN
from support.official import read_json
from torch.nn import functional as F

from promcse_pl.config import Config, LossConfig, OptimConfig
from promcse_pl.data.batch import Tokens, TrainBatch
from promcse_pl.data.masking import IGNORED
from promcse_pl.data.readers import read_rows
from promcse_pl.embedder import PromCSE
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.mlm import MlmHead
from promcse_pl.models.texts import tokenize
from promcse_pl.training.module import PromcseModule
from promcse_pl.utils.errors import ConfigError, DataError

pytestmark = pytest.mark.golden
CRASHES = GOLDEN / "crashes.json"
PROBES = read_json(CRASHES) if CRASHES.is_file() else []
RUN = {"model": {"path": "x"}, "data": {"kind": "triplets", "train": "x.csv"}}


def encoder_of(probe, *, family=None, length=5, pooling="cls", head="mlp", **settings):
    family = family or ("roberta" if "roberta" in probe else "bert")
    torch.manual_seed(3)
    return PromptEncoder(small_backbone(family, **NO_DROPOUT), length=length, pooling=pooling, head=head, **settings)


def tokens_for(encoder, lengths):
    return small_tokens(lengths, encoder.backbone.pad_id)


def module_of(encoder, mlm_head=None, **loss):
    settings = LossConfig(**{"hinge_weight": 0.0, **loss})
    return PromcseModule(encoder, loss=settings, optim=OptimConfig(), total_steps=5, mlm_head=mlm_head)


def loss_of(encoder, views, tokens=None, mlm_head=None, **loss):
    """The loss of a batch, with a finite gradient for every trained parameter."""
    tokens = tokens_for(encoder, [9, 7, 4] * views) if tokens is None else tokens
    module = module_of(encoder.train(), mlm_head, **loss)
    parts = module.losses(TrainBatch(tokens, views, torch.arange(len(tokens.ids_NT) // views)))
    parts.total.backward()
    trained = [p for p in encoder.parameters() if p.requires_grad and p.numel()]
    without = [p for p in trained if p.grad is None]
    assert all(torch.isfinite(p.grad).all() for p in trained if p.grad is not None)
    assert not without or encoder.prompt.length == 0  # the projection of no slots
    assert torch.isfinite(parts.total)
    return parts


def refused(section, key, value, *words):
    with pytest.raises(ConfigError) as error:
        Config.from_dict({**RUN, section: {**RUN.get(section, {}), key: value}})
    assert all(word in str(error.value) for word in (f"{section}.{key}", *words)), error.value


def check_avg_pooler(probe):
    """They are the mean over the real tokens, padding and prompt left out."""
    pooling = re.search(r"avg\w*", probe).group()
    length = int(found.group(1)) if (found := re.search(r"p=(\d+)", probe)) else 5
    train = {"projection_size": 7} if "projection" in probe else {}
    encoder = encoder_of(probe, length=length, pooling=pooling, head="none", **train).eval()
    tokens = tokens_for(encoder, [1, 1] if "1-token" in probe else [9, 4])
    kept = {"avg": [-1], "avg_top2": [-2, -1], "avg_first_last": [0, -1]}[pooling]
    states = encoder.backbone(
        tokens.ids_NT, tokens.mask_NT, encoder.prompt(), position_offset=length, all_layers=True
    )  # fmt: skip
    rows = zip(torch.stack([states[layer] for layer in kept]).mean(0), tokens.mask_NT.bool(), strict=True)
    assert torch.allclose(encoder(tokens)[0], torch.stack([row[mask].mean(0) for row, mask in rows]), atol=1e-6)
    loss_of(encoder, 3 if "num_sent=3" in probe else 2)


def check_p0(probe):
    """Without a prompt the encoder is the plain one, and its head can still be trained."""
    pooling = re.search(r"(cls|avg)\w*", probe).group()
    size = 7 if "projection" in probe else None
    encoder = encoder_of(
        probe, length=0, pooling=pooling, head="mlp" if pooling == "cls" else "none", projection_size=size
    )
    tokens = tokens_for(encoder, [9, 7, 4] * 2)
    plain = PromptEncoder(encoder.backbone, length=0, pooling="cls", head="none").eval()(tokens)[0]
    (state,) = encoder.backbone(tokens.ids_NT, tokens.mask_NT, None, first_token=True)
    assert torch.equal(plain, state[:, 0])
    assert torch.allclose(plain, encoder.backbone(tokens.ids_NT, tokens.mask_NT, None)[-1][:, 0], rtol=0, atol=1e-6)
    if pooling == "cls":
        loss_of(encoder, 2, tokens)
    else:
        assert not any(p.numel() for p in encoder.parameters() if p.requires_grad)
        with pytest.raises(ConfigError, match="leaves nothing to train"):
            Config.from_dict(
                {**RUN, "prompt": {"length": 0}, "model": {"path": "x", "pooling": pooling, "head": "none"}}
            )


def check_eh(probe):
    """Without hard negatives there is no hinge; a hinge requires a margin."""
    if "pairs" in probe:
        with pytest.raises(
            ConfigError, match=r"loss\.hinge_weight=10 needs hard negatives, but data\.kind=pairs has none"
        ):
            Config.from_dict({**RUN, "data": {"kind": "pairs", "train": "x.csv"}, "loss": {"hinge_weight": 10.0}})
        with pytest.raises(ValueError, match="needs hard negatives"):
            loss_of(encoder_of(probe), 2, hinge_weight=10.0)
    else:
        refused("loss", "margin", None, "a number", "None")


def check_num_sent(probe, tmp_path):
    """A row has two or three texts (or one, seen twice); another number is named with its line, or is not one of the kinds."""
    (tmp_path / "rows.csv").write_text("a,b,c,d\n" + ("one\n" if "num_sent=1" in probe else "one,two,three,four\n"))
    if "num_sent=1" in probe:
        with pytest.raises(DataError, match=r"rows\.csv:2: "):
            list(read_rows(tmp_path / "rows.csv", width=2))
    else:  # the columns are chosen, never more than three
        assert list(read_rows(tmp_path / "rows.csv", width=3)) == [("one", "two", "three")]
        refused("data", "columns", ["a", "b", "c", "d"], "must name 3 columns")


def check_length(probe):
    """The longest input works; a longer sentence is cut to it."""
    encoder = encoder_of(probe, length=16)
    most = encoder.longest_input
    assert most == SMALL["max_position_embeddings"] - 16 - (2 if "roberta" in probe else 0)
    loss_of(encoder, 2, tokens_for(encoder, [most] * 4))
    model = PromCSE(encoder, small_tokenizer(encoder.backbone.pad_id))
    words = [f"w{5 + i % 90}" for i in range(most)]
    assert np.array_equal(model.encode(" ".join(words)), model.encode(" ".join(words[: most - 2])))


def check_mask(probe):
    """A batch cannot be made without a mask; `encode` makes it."""
    encoder = encoder_of(probe)
    with pytest.raises(TypeError, match="mask_NT"):
        Tokens(tokens_for(encoder, [3]).ids_NT)
    alone, beside = (
        PromCSE(encoder, small_tokenizer(encoder.backbone.pad_id)).encode(s) for s in (["w5"], ["w5", "w6 w7 w8"])
    )
    assert np.allclose(alone[0], beside[0], atol=1e-6)


def check_mlm(probe):
    """No masked token gives no MLM loss; masked tokens without a head, or a head without masked tokens, give the plain loss."""
    encoder = encoder_of(probe)
    tokens = tokens_for(encoder, [9, 7, 4] * 2)
    plain = loss_of(encoder, 2, tokens).total
    hidden = dataclasses.replace(
        tokens, mlm_ids_NT=tokens.ids_NT, mlm_labels_NT=torch.full_like(tokens.ids_NT, IGNORED)
    )
    if "do_mlm False" in probe:
        hidden.mlm_labels_NT[:, 1] = hidden.ids_NT[:, 1]
        assert torch.equal(loss_of(encoder, 2, hidden).total, plain)
        return
    head = MlmHead(encoder.backbone.word_embeddings, layer_norm_eps=encoder.backbone.layer_norm_eps)
    parts = loss_of(encoder, 2, tokens if "no mlm inputs" in probe else hidden, head, mlm_weight=0.1)
    assert torch.equal(parts.total, plain)
    assert parts.mlm is None if "no mlm inputs" in probe else parts.mlm == 0


def check_misc(probe):
    """Vectors come as a plain tensor; a setting without effect is refused; one triplet is a batch."""
    if "return_dict" in probe:
        vectors, hidden = (encoder := encoder_of(probe)).eval()(tokens_for(encoder, [3, 2]))
        assert vectors.shape == (2, encoder.backbone.width)
        assert hidden is None
    elif "hard_negative_weight" in probe:
        with pytest.raises(ConfigError, match=r"loss\.hard_negative_logit=1 has no effect with data\.kind=pairs"):
            Config.from_dict(
                {**RUN, "data": {"kind": "pairs", "train": "x"}, "loss": {"hinge_weight": 0, "hard_negative_logit": 1}}
            )
    else:
        encoder = encoder_of(probe)
        a, p, n = F.normalize(encoder(tokens := tokens_for(encoder, [5, 4, 3]), train_head=True)[0], dim=1).detach()
        expected = torch.log1p(torch.exp((a @ n - a @ p) / 0.05)) + 10 * (0.2 + a @ n - a @ p).clamp(min=0)
        total = loss_of(encoder, 3, tokens, hinge_weight=10.0).total.detach()
        assert float(total) == pytest.approx(float(expected), rel=1e-4)


def check_token_type(probe):
    """Sentences have no token types: zeros in BERT, none in RoBERTa."""
    encoder = encoder_of(probe, family="roberta" if probe.startswith("roberta") else "bert").eval()
    assert tokenize(small_tokenizer(encoder.backbone.pad_id), ["w5 w6"], 8).types_NT is None
    tokens = tokens_for(encoder, [5, 3])
    zeros = dataclasses.replace(tokens, types_NT=torch.zeros_like(tokens.ids_NT))
    assert torch.equal(encoder(zeros)[0], encoder(tokens)[0])


def check_positions(probe):
    """Positions are shifted by the prompt length, and the shift matters."""
    for family, first in (("bert", 0), ("roberta", 2)):
        encoder = encoder_of(probe, family=family).eval()
        tokens = tokens_for(encoder, [5, 3])
        assert encoder.backbone.positions(tokens.ids_NT, tokens.mask_NT, encoder.position_offset)[0, 0] == first + 5
        vectors, unshifted = encoder(tokens)[0], encoder_of(probe, family=family, position_offset=0).eval()(tokens)[0]
        assert (vectors - unshifted).abs().max() > 1e-3


def check_dropout(probe):
    """Every sentence has its own mask over the prompt, of the encoder's probability."""
    for family in ("bert", "roberta"):
        encoder = PromptEncoder(small_backbone(family, hidden_dropout_prob=0.5), length=64).train()
        prompt_kv = encoder.prompt()
        dropped = encoder.prompt.drop(prompt_kv, 4)
        assert encoder.prompt.dropout == 0.5
        assert (dropped == 0).float().mean() == pytest.approx(0.5, abs=0.02)
        assert torch.allclose(dropped[dropped != 0], 2 * prompt_kv.expand_as(dropped)[dropped != 0])
        assert not torch.equal(dropped[:, :, 0] == 0, dropped[:, :, 1] == 0)


def check_params(probe):
    """The word embeddings stay frozen: nothing resizes them."""
    encoder = encoder_of(probe)
    assert not any(p.requires_grad for p in encoder.backbone.parameters())
    assert {name.partition(".")[0] for name, p in encoder.named_parameters() if p.requires_grad} == {"prompt", "head"}


KINDS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: f"{probe['kind']}: {probe['probe']}")
def test_official_probe(probe, tmp_path):
    assert probe["kind"] in KINDS, f"crashes.json has a new kind of probe: {probe}"
    more = {"tmp_path": tmp_path} if probe["kind"] == "num_sent" else {}
    KINDS[probe["kind"]](probe["probe"], **more)
