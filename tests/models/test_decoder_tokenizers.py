"""Tokenizers of decoders: padding without a padding token, padding on the left, and an end-of-sequence token at the end."""

from pathlib import Path

import pytest
import torch
from support.encoders import SMALL, small_encoder
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from promcse_pl import PromCSE
from promcse_pl.data.tokenizer import tokenizer_fingerprint
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.texts import tokenize
from promcse_pl.utils.errors import EncoderError

SENTENCES = ["w5 w6 w7 w8 w9", "w7", "w11 w12 w13"]


def decoder_tokenizer(**options: str) -> PreTrainedTokenizerFast:
    """Words w5, w6, ... by their number, and the end-of-sequence token 2 after them, as the post-processor says."""
    words = ["<unk>", "<s>", "</s>", "<a>", "<b>", *(f"w{i}" for i in range(5, SMALL["vocab_size"]))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **options)


def save_decoder(folder: Path, **options: str) -> Path:
    small_encoder("qwen3").save_pretrained(folder)
    decoder_tokenizer(**options).save_pretrained(folder)
    return folder


def test_a_tokenizer_without_a_padding_token_pads_with_the_end_of_sequence_token(tmp_path):
    backbone = FrozenBackbone.load(save_decoder(tmp_path, eos_token="</s>"))
    tokens = tokenize(backbone.tokenizer, SENTENCES, 10)
    assert tokens.ids_NT.tolist() == [[5, 6, 7, 8, 9, 2], [7, 2, 2, 2, 2, 2], [11, 12, 13, 2, 2, 2]]
    assert tokens.mask_NT.sum(1).tolist() == [6, 2, 4]


def test_the_fingerprint_of_such_a_tokenizer_is_that_of_its_copies(tmp_path):
    first = FrozenBackbone.load(save_decoder(tmp_path / "first", eos_token="</s>"))
    assert AutoTokenizer.from_pretrained(tmp_path / "first").pad_token is None
    first.save(tmp_path / "copy")
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").pad_token == "</s>"
    copy = FrozenBackbone.load(tmp_path / "copy")
    assert first.identity.tokenizer == copy.identity.tokenizer == tokenizer_fingerprint(copy.tokenizer)
    assert FrozenBackbone.load(tmp_path / "first").identity.tokenizer == first.identity.tokenizer


def test_a_tokenizer_without_any_token_for_padding_is_refused_and_the_advice_works(tmp_path):
    backbone = FrozenBackbone.load(save_decoder(tmp_path))
    with pytest.raises(EncoderError, match=r'neither a padding nor an end-of-sequence token. Add "pad_token": "TOKEN"'):
        _ = backbone.tokenizer
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{", '{"pad_token": "<unk>",', 1))
    assert FrozenBackbone.load(tmp_path).tokenizer.pad_token_id == 0


@pytest.mark.parametrize("longest", [3, 4, 6, 7])
def test_truncation_keeps_the_end_of_sequence_token(tmp_path, longest):
    backbone = FrozenBackbone.load(save_decoder(tmp_path, eos_token="</s>"))
    tokens = tokenize(backbone.tokenizer, SENTENCES, longest)
    lengths = tokens.mask_NT.sum(1)
    assert lengths.tolist() == [min(length, longest) for length in (6, 2, 4)]
    assert tokens.ids_NT[torch.arange(3), lengths - 1].tolist() == [2, 2, 2]


def test_a_tokenizer_that_pads_on_the_left_gives_the_embeddings_of_one_that_pads_on_the_right(tmp_path):
    found = []
    for side in ("left", "right"):
        options = {"eos_token": "</s>", "pad_token": "<a>", "padding_side": side}
        backbone = FrozenBackbone.load(save_decoder(tmp_path / side, **options))
        assert backbone.tokenizer.padding_side == side
        torch.manual_seed(3)
        found.append(PromCSE(PromptEncoder(backbone, length=3, pooling="avg")).encode(SENTENCES))
    assert (found[0] == found[1]).all()
