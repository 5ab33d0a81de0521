"""The embedding cache: correct or rebuilt, and it stores no sentences."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from support.encoders import save_small_encoder

from promcse_pl import PromCSE
from promcse_pl.embedder import model_hash
from promcse_pl.evaluation.embeddings import EmbeddingCache, check_embeddings
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.pipeline import TextSettings
from promcse_pl.utils.errors import DataError, NonFiniteError

SENTENCES = [f"w{5 + position % 60} w{7 + position // 3}" for position in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small_encoder(tmp_path_factory.mktemp("encoder") / "bert")


def small_model(folder, length=2, pooling="avg", dtype=torch.float32):
    torch.manual_seed(3)
    encoder = PromptEncoder(FrozenBackbone.load(str(folder), dtype=dtype), length=length, pooling=pooling)
    return PromCSE(encoder.eval())


@pytest.fixture
def model(folder):
    return small_model(folder)


def test_vectors_are_those_of_encode_and_each_distinct_sentence_is_encoded_once(model, tmp_path, monkeypatch):
    calls = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda texts, **options: calls.append(texts) or encode(texts, **options))
    found = EmbeddingCache(tmp_path).embeddings(model, [*SENTENCES, *SENTENCES[:9]])
    assert set(found) == set(SENTENCES)
    np.testing.assert_allclose(np.stack([found[text] for text in SENTENCES]), encode(SENTENCES), atol=1e-6)
    (asked,) = calls
    assert sorted(asked) == sorted(set(SENTENCES))
    assert [len(text) for text in asked] == sorted(map(len, asked), reverse=True)


def test_cached_embeddings_are_bit_identical_and_nothing_is_encoded_again(model, tmp_path):
    first = EmbeddingCache(tmp_path).embeddings(model, SENTENCES)
    again = EmbeddingCache(tmp_path)
    second = again.embeddings(model, SENTENCES[5:])
    assert again.encoded == 0
    assert all((second[text] == first[text]).all() for text in SENTENCES[5:])


def test_only_new_sentences_are_encoded_and_the_file_then_holds_both(model, tmp_path):
    EmbeddingCache(tmp_path).embeddings(model, SENTENCES[:10])
    cache = EmbeddingCache(tmp_path)
    cache.embeddings(model, SENTENCES[5:15])
    assert cache.encoded == 5
    cache.embeddings(model, SENTENCES[:15])
    assert cache.encoded == 5


def test_sentences_that_another_process_has_stored_meanwhile_are_kept(model, tmp_path, monkeypatch):
    encode = model.encode

    def slow_encode(texts, **options):
        monkeypatch.undo()
        EmbeddingCache(tmp_path).embeddings(model, SENTENCES[10:15])
        return encode(texts, **options)

    monkeypatch.setattr(model, "encode", slow_encode)
    EmbeddingCache(tmp_path).embeddings(model, SENTENCES[:10])
    cache = EmbeddingCache(tmp_path)
    cache.embeddings(model, SENTENCES[:15])
    assert cache.encoded == 0


def test_no_sentence_is_stored_and_nothing_is_left_beside_the_file(model, tmp_path):
    EmbeddingCache(tmp_path).embeddings(model, SENTENCES)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    assert not any(text.encode() in content for text in SENTENCES)


@pytest.mark.parametrize("damage", ["cut", "flip", "garbage"])
def test_a_damaged_file_is_reported_and_rebuilt(damage, model, tmp_path, caplog):
    first = EmbeddingCache(tmp_path).embeddings(model, SENTENCES)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-3] ^= 1  # one bit of one vector
    path.write_bytes({"cut": content[:-20], "flip": content, "garbage": b"hello"}[damage])
    with caplog.at_level(logging.WARNING):
        cache = EmbeddingCache(tmp_path)
        found = cache.embeddings(model, SENTENCES)
    assert "is damaged" in caplog.text
    assert cache.encoded == len(set(SENTENCES))
    assert all((found[text] == first[text]).all() for text in SENTENCES)
    cache.embeddings(model, SENTENCES)
    assert cache.encoded == len(set(SENTENCES))


def test_models_whose_vectors_differ_do_not_share_a_file(folder):
    other_case = small_model(folder)
    other_case.tokenizer.backend_tokenizer.normalizer = None
    in_bytes = small_model(folder)
    in_bytes.encoder.backbone.quantize()
    models = [
        small_model(folder),
        small_model(folder, length=3),
        small_model(folder, pooling="cls"),
        small_model(folder, dtype=torch.bfloat16),
        other_case,
        in_bytes,
    ]
    assert len({model_hash(model) for model in models}) == len(models)
    assert model_hash(models[0]) == model_hash(small_model(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_embeddings_of_an_encoder_with_another_config_or_tokenizer_are_not_reused(name, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((copy / name).read_text())
    content |= {"hidden_act": "relu"} if name == "config.json" else {"normalizer": None}
    (copy / name).write_text(json.dumps(content))
    sentences = [text.upper() for text in SENTENCES]
    first = EmbeddingCache(tmp_path / "cache").embeddings(small_model(folder), sentences)
    cache = EmbeddingCache(tmp_path / "cache")
    changed = small_model(copy)
    if name == "tokenizer.json":  # all words are unknown to it then, and all vectors of a length the same
        sentences = ["w5", "W5 w6", *sentences]
    second = cache.embeddings(changed, sentences)
    assert cache.encoded == len(set(sentences))
    assert max(np.abs(second[text] - first[text]).max() for text in first) > 1e-3
    again = EmbeddingCache(tmp_path / "cache")
    again.embeddings(small_model(folder), first)
    assert again.encoded == 0


@pytest.mark.parametrize(
    "text", [{"max_length": 5}, {"lower_case": True}, {"prompts": {"query": "w5 "}, "default_prompt": "query"}], ids=str
)
def test_embeddings_with_other_settings_of_texts_are_not_reused(text, folder, tmp_path):
    backbone = FrozenBackbone.load(str(folder))
    plain, other = (
        PromCSE(PromptEncoder(backbone, length=0, pooling="avg", text=TextSettings(**settings)))
        for settings in ({}, text)
    )
    EmbeddingCache(tmp_path).embeddings(plain, SENTENCES)
    cache = EmbeddingCache(tmp_path)
    found = cache.embeddings(other, SENTENCES)
    assert cache.encoded == len(set(SENTENCES))
    np.testing.assert_allclose(np.stack([found[text] for text in SENTENCES]), other.encode(SENTENCES), atol=1e-6)


def test_a_folder_that_cannot_be_written_costs_the_cache_and_not_the_scores(model, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    found = EmbeddingCache(tmp_path / "file" / "below").embeddings(model, SENTENCES)
    assert len(found) == len(set(SENTENCES))
    assert "the embeddings are not cached: cannot write" in caplog.text


def test_vectors_that_are_all_the_same_up_to_rounding_are_an_error():
    vector = np.full(4, 0.5, dtype=np.float32)
    with pytest.raises(DataError, match="all 2 sentences have the same embedding"):
        check_embeddings({"a": vector, "b": vector + np.float32(1e-7)})
    check_embeddings({"a": vector, "b": -vector})
    check_embeddings({"a": vector})


def test_a_vector_that_is_not_finite_is_an_error():
    vector = np.full(4, 0.5, dtype=np.float32)
    with pytest.raises(NonFiniteError, match="the embedding of 'b' is not finite"):
        check_embeddings({"a": vector, "b": vector * np.nan})
