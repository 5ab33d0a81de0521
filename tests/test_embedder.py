"""PromCSE.encode and similarity: order, shapes, equality with plain transformers, and what is refused."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import numpy as np
import pytest
import torch
from rich.console import Console
from support.encoders import save_small_encoder, small_tokenizer
from tokenizers import processors
from torch.nn import functional as F
from transformers import AutoModel

from promcse_pl import embedder as module
from promcse_pl.adapter import save_adapter
from promcse_pl.embedder import PromCSE
from promcse_pl.interop.peft import export_peft
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.device import pick_device
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.utils.errors import AdapterError, ConfigError, DataError, EncoderError, NonFiniteError

MIXED = ["w7", "w8 w9 w10 w11 w12 w13 w14 w15", "w8 w9", "w90 w91 w92 w93 w94", "w7 w8", ""] * 7
ENGLISH = [
    "A man is playing a guitar.",
    "It rains.",
    "Two dogs run through a field of tall yellow grass at dusk.",
    "Hello!",
]


def small_model(folder, family="bert", **options) -> PromCSE:
    backbone = FrozenBackbone.load(str(save_small_encoder(folder, family)))
    torch.manual_seed(0)
    encoder = PromptEncoder(backbone, **{"length": 4, "pooling": "avg", **options})
    with torch.no_grad():
        encoder.prompt.embedding.weight.normal_()
    return PromCSE(encoder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> PromCSE:
    return small_model(tmp_path_factory.mktemp("encoders") / "small")


@pytest.fixture(scope="module")
def minilm() -> FrozenBackbone:
    return FrozenBackbone.load("sentence-transformers/all-MiniLM-L6-v2")


# --- vectors


@pytest.mark.parametrize("length", [0, 10])
def test_minilm_without_a_prompt_equals_plain_mean_pooling_and_with_one_does_not(minilm, length):
    plain = AutoModel.from_pretrained(minilm._source, attn_implementation="eager").eval()
    batch = minilm.tokenizer(ENGLISH, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = plain(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    expected = F.normalize((states * mask).sum(1) / mask.sum(1), dim=1).numpy()
    torch.manual_seed(0)
    error = np.abs(PromCSE(PromptEncoder(minilm, length=length, pooling="avg")).encode(ENGLISH) - expected).max()
    assert (error < 1e-5) == (length == 0)


@pytest.mark.parametrize("chunk_tokens", [1, 20, 2048])
@pytest.mark.parametrize("block", [1, 5, 16384])
def test_vectors_come_in_the_order_of_the_sentences(model, monkeypatch, chunk_tokens, block):
    expected = np.stack([model.encode(sentence) for sentence in MIXED])
    monkeypatch.setitem(module.CHUNK_TOKENS, "cpu", chunk_tokens)
    monkeypatch.setattr(module, "BLOCK_SENTENCES", block)
    np.testing.assert_allclose(model.encode(MIXED), expected, rtol=0, atol=1e-6)


def test_equal_sentences_get_equal_vectors_and_others_do_not(model):
    vectors = model.encode(["w7 w8", "w30", "w7 w8"])
    np.testing.assert_allclose(vectors[0], vectors[2], rtol=0, atol=1e-6)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01


@pytest.mark.parametrize(
    ("sentences", "shape"), [("w7", (16,)), ([], (0, 16)), (["w7"], (1, 16)), (["w7", "w8"], (2, 16))]
)
def test_the_shape_follows_the_input(model, sentences, shape):
    vectors = model.encode(sentences)
    assert vectors.shape == shape
    assert vectors.dtype == np.float32
    assert model.width == 16


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda rows: np.array(rows, dtype=object)])
def test_any_sequence_of_text_is_taken(model, kind):
    assert np.array_equal(model.encode(kind(MIXED)), model.encode(MIXED))
    assert model.encode(np.str_("w7")).shape == (16,)


class Series:
    """What encode sees of a pandas Series: an index that does not start at 0, values in order, one axis."""

    ndim = 1

    def __init__(self, rows):
        self.rows = dict(enumerate(rows, start=5))

    def __getitem__(self, key):
        return self.rows[key]

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows.values())


@pytest.mark.parametrize(
    "kind", [iter, Series, lambda rows: (row for row in rows), lambda rows: dict.fromkeys(rows).keys()]
)
def test_any_iterable_of_texts_is_accepted(model, kind):
    rows = [*dict.fromkeys(MIXED)]
    expected = model.encode(rows)
    assert np.array_equal(model.encode(kind(rows)), expected)
    assert np.array_equal(model.similarity(kind(rows), kind(rows)), model.similarity(rows, rows))
    model.build_index(kind(rows))
    model.add(kind(rows[:2]))
    assert model.search(kind(rows), top_k=3) == model.search(rows, top_k=3)
    assert len(model.search("w7", top_k=99)) == len(rows) + 2


class DataFrame(Series):
    """Iterating over a table gives the names of its columns."""

    ndim = 2


@pytest.mark.parametrize(
    "value",
    [None, 3, 2.5, b"w7", {"w7": "w8"}, np.array("w7"), np.array([["w7", "w8"]]), DataFrame(["w7"]), [["w7"]]],
    ids=lambda value: type(value).__name__,
)
def test_other_arguments_raise_a_type_error_with_an_example(model, value):
    model.build_index(["w7"])
    for method in (
        model.encode,
        model.build_index,
        model.add,
        model.search,
        lambda texts: model.similarity("w7", texts),
    ):
        with pytest.raises(
            TypeError,
            match=r"needs a string or an iterable of strings, got .*Try: |sentence 0 must be a string, got list",
        ) as caught:
            method(value)
        assert isinstance(caught.value, DataError)
    assert model.search("w7") == [("w7", 1.0)]


def test_embeddings_have_length_1_by_default(model):
    unit, raw = model.encode(MIXED), model.encode(MIXED, normalize=False)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.abs(lengths - 1).max() > 0.1
    np.testing.assert_allclose(raw / lengths, unit, rtol=0, atol=1e-6)


def test_text_of_any_script_gets_its_own_finite_vector(minilm):
    model = PromCSE(PromptEncoder(minilm, length=2, pooling="avg"))
    sentences = ["naïve café", "東京タワー", "привет мир", "🎸🔥", "\t \n", "a\x00b", "e\u0301", ""]
    vectors = model.encode(sentences)
    assert vectors.shape == (8, 384)
    assert np.isfinite(vectors).all()
    assert np.abs(vectors[1] - vectors[2]).max() > 0.01


@pytest.mark.parametrize(("family", "longest"), [("bert", 36), ("roberta", 34)])
def test_a_sentence_that_is_too_long_is_cut_to_max_tokens(tmp_path, family, longest):
    model = small_model(tmp_path, family)
    assert model.max_tokens == longest
    words = [f"w{5 + i % 90}" for i in range(200)]
    fits = " ".join(words[: longest - 2])
    vectors = model.encode([" ".join(words), fits, " ".join(words[: longest - 3])])
    np.testing.assert_allclose(vectors[0], vectors[1], rtol=0, atol=1e-6)
    assert np.abs(vectors[1] - vectors[2]).max() > 1e-4


@pytest.mark.parametrize("pooling", ["avg", "cls"])
def test_a_tokenizer_that_pads_on_the_left_changes_nothing(model, pooling):
    encoder = PromptEncoder(model.encoder.backbone, length=4, pooling=pooling)
    model = PromCSE(encoder)
    expected = model.encode(MIXED)
    model.tokenizer.padding_side = "left"
    try:
        np.testing.assert_allclose(model.encode(MIXED), expected, rtol=0, atol=1e-6)
    finally:
        model.tokenizer.padding_side = "right"


def test_the_test_time_vector_is_used(model):
    torch.manual_seed(0)
    encoder = PromptEncoder(model.encoder.backbone, length=4, pooling="cls", head="mlp_train_only")
    plain = PromptEncoder(model.encoder.backbone, length=4, pooling="cls", head="none")
    plain.load_state_dict({"prompt.embedding.weight": encoder.prompt.embedding.weight})
    assert np.array_equal(PromCSE(encoder).encode(MIXED), PromCSE(plain).encode(MIXED))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_encoder_gives_float32_vectors_near_the_full_ones(model, tmp_path, dtype):
    save_adapter(model.encoder, tmp_path)
    vectors = PromCSE.load(tmp_path, device="cpu", dtype=dtype).encode(MIXED)
    assert vectors.dtype == np.float32
    assert (vectors * model.encode(MIXED)).sum(1).min() > 0.995
    assert not np.array_equal(vectors, model.encode(MIXED))


def test_an_int8_encoder_keeps_its_linear_layers_in_bytes_and_its_vectors_near(minilm, tmp_path):
    torch.manual_seed(0)
    exact = PromCSE(PromptEncoder(minilm, length=10, pooling="avg"))
    save_adapter(exact.encoder, tmp_path)
    model = PromCSE.load(tmp_path, device="cpu", dtype="int8")
    linear = [module for module in model.encoder.backbone.modules() if hasattr(module, "in_features")]
    assert len(linear) == 6 * 6
    assert {module.weight().dtype for module in linear} == {torch.qint8}
    cosines = (model.encode(ENGLISH) * exact.encode(ENGLISH)).sum(1)
    assert cosines.min() > 0.95
    assert cosines.max() < 0.99999


def test_int8_of_rounded_weights_is_refused(model, tmp_path):
    save_adapter(model.encoder, tmp_path)
    rounded = PromCSE.load(tmp_path, device="cpu", dtype="bfloat16")
    with pytest.raises(EncoderError, match=r"int8 needs float32 weights on a CPU, these are torch\.bfloat16 on cpu"):
        rounded.encoder.backbone.quantize()


def test_a_loaded_model_gives_the_vectors_of_the_saved_one(model, tmp_path):
    save_adapter(model.encoder, tmp_path / "adapter")
    for source in (tmp_path, str(tmp_path / "adapter")):
        assert np.array_equal(PromCSE.load(source, device="cpu").encode(MIXED), model.encode(MIXED))


# --- state


@pytest.mark.parametrize("training", [True, False])
def test_encode_uses_eval_mode_and_leaves_the_mode_as_it_was(model, training):
    model.encoder.train(training)
    try:
        vectors = model.encode(MIXED)
        assert {part.training for part in model.encoder.modules()} == {training}
    finally:
        model.encoder.eval()
    assert np.array_equal(vectors, model.encode(MIXED))


def test_the_mode_comes_back_after_an_error(model):
    encoder = PromptEncoder(model.encoder.backbone, length=4, pooling="avg").train()
    torch.nn.init.constant_(encoder.prompt.embedding.weight, float("nan"))
    with pytest.raises(NonFiniteError):
        PromCSE(encoder).encode(MIXED)
    assert encoder.training
    model.encoder.eval()  # the two share a backbone


def test_encode_draws_no_random_number_and_leaves_gradients_on(model):
    state = torch.get_rng_state()
    model.encode(MIXED)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_four_threads_get_the_results_of_one(tmp_path):
    model = small_model(tmp_path, head="mlp")
    model.encoder.train()  # a thread that runs in train mode would give other vectors
    jobs = [MIXED[i:] + MIXED[:i] for i in range(16)]
    expected = [model.encode(job) for job in jobs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(model.encode, jobs))
    finally:
        sys.setswitchinterval(interval)
    assert all(np.array_equal(a, b) for a, b in zip(results, expected, strict=True))
    assert model.encoder.training


def test_progress_counts_the_sentences_done(model, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_SENTENCES", 20)
    done = []
    model.encode(MIXED, progress=done.append)
    assert done == [20, 40, 42]


@pytest.mark.parametrize("batch_size", [1, 3, np.int64(7), 1000])
def test_batch_size_limits_the_sentences_in_a_batch_and_changes_no_embedding(model, monkeypatch, batch_size):
    expected, sizes = model.encode(MIXED), []
    encode_chunk = model.encoder.encode_chunk
    monkeypatch.setattr(
        model.encoder,
        "encode_chunk",
        lambda chunk, prompt: (sizes.append(len(chunk.ids_NT)), encode_chunk(chunk, prompt))[1],
    )
    np.testing.assert_allclose(model.encode(MIXED, batch_size=batch_size), expected, rtol=0, atol=1e-6)
    assert max(sizes) == min(batch_size, len(MIXED))
    assert sum(sizes) == len(MIXED)


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, "32", True])
def test_an_impossible_batch_size_is_refused(model, batch_size):
    with pytest.raises(ConfigError, match=r"batch_size must be an integer >= 1, or None, got "):
        model.encode(["w7"], batch_size=batch_size)


def test_encode_returns_a_tensor_if_asked(model):
    for sentences in ("w7", MIXED, []):
        tensor = model.encode(sentences, convert_to_tensor=True)
        assert isinstance(tensor, torch.Tensor)
        assert tensor.device == model.encoder.backbone.device
        assert np.array_equal(tensor.numpy(), model.encode(sentences))


def test_normalize_is_an_earlier_name_of_normalize_embeddings(model):
    raw = model.encode(MIXED, normalize_embeddings=False)
    assert np.array_equal(raw, model.encode(MIXED, normalize=False))
    assert not np.array_equal(raw, model.encode(MIXED))
    assert np.array_equal(
        model.encode("w7 w8", normalize_embeddings=False), model.encode(["w7 w8"], normalize=False)[0]
    )


def test_conflicting_values_of_normalize_and_normalize_embeddings_are_refused(model):
    for value in (True, False):
        assert np.array_equal(
            model.encode("w7", normalize=value, normalize_embeddings=value), model.encode("w7", normalize=value)
        )
        with pytest.raises(TypeError, match=f"normalize_embeddings={value} and normalize={not value}, its older name"):
            model.encode("w7", normalize=not value, normalize_embeddings=value)


def test_encode_without_conversion_to_numpy_returns_a_list_of_tensors(model):
    expected = model.encode(MIXED)
    assert np.array_equal(model.encode(MIXED, convert_to_numpy=True), expected)
    tensors = model.encode(MIXED, convert_to_numpy=False)
    assert isinstance(tensors, list)
    assert np.array_equal(torch.stack(tensors).numpy(), expected)
    assert model.encode([], convert_to_numpy=False) == []
    assert isinstance(model.encode("w7", convert_to_numpy=False), torch.Tensor)
    for convert_to_numpy in (True, False):  # convert_to_tensor takes precedence
        tensor = model.encode(MIXED, convert_to_numpy=convert_to_numpy, convert_to_tensor=True)
        assert np.array_equal(tensor.numpy(), expected)


def test_the_progress_bar_is_shown_on_a_terminal_only(model, monkeypatch, capsys):
    model.encode(MIXED, show_progress_bar=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "Console", lambda stderr: Console(stderr=stderr, force_terminal=True))
    model.encode(MIXED, show_progress_bar=True)
    assert f"{len(MIXED)}/{len(MIXED)}" in capsys.readouterr().err


# --- load, save, show


def test_save_pretrained_and_from_pretrained_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "adapter")  # an adapter is replaced
    for name in (tmp_path, str(tmp_path / "adapter")):
        assert np.array_equal(PromCSE.from_pretrained(name, device="cpu").encode(MIXED), model.encode(MIXED))


def test_a_folder_in_the_home_folder_is_written_and_read_there(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("~/adapter")
    export_peft(model.encoder, "~/peft")
    model.build_index(MIXED)
    model.save_index("~/index")
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"adapter", "peft", "index"}
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    for load in (PromCSE.load, PromCSE.from_pretrained):
        read = load("~/adapter", device="cpu")
        assert read.adapter_hash() == model.adapter_hash()
    read.load_index("~/index")
    assert read.search(MIXED[0], top_k=1)[0][0] == MIXED[0]


def test_save_pretrained_refuses_a_tokenizer_that_it_cannot_store(model, tmp_path):
    with pytest.raises(AdapterError, match=r"does not use the tokenizer of its encoder, and save_pretrained cannot"):
        PromCSE(model.encoder, small_tokenizer(pad_id=1)).save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("inner", ["", "adapter"])
def test_from_pretrained_reads_a_hub_id_from_the_cache_when_offline(model, tmp_path, monkeypatch, inner):
    commit = "0123456789" * 4
    repository = tmp_path / "cache/models--someone--some-adapter"
    model.save_pretrained(repository / "snapshots" / commit / inner)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for revision in (None, commit):
        loaded = PromCSE.from_pretrained("someone/some-adapter", revision=revision, device="cpu")
        assert np.array_equal(loaded.encode(MIXED), model.encode(MIXED))
    with pytest.raises(
        AdapterError, match=r"there is no folder someone/another .*cannot download someone/another from the hub"
    ):
        PromCSE.from_pretrained("someone/another")
    with pytest.raises(AdapterError, match="there is no such folder"):
        PromCSE.from_pretrained("./someone")


def test_repr_shows_what_decides_the_embeddings_and_where_they_are_computed(model):
    encoder = PromptEncoder(model.encoder.backbone, length=4, pooling="cls", head="mlp", position_offset=0)
    assert repr(PromCSE(encoder)) == (
        f"PromCSE(encoder={encoder.backbone.identity.name!r}, prompt_length=4, pooling='cls', head='mlp', dimension=16, "
        "position_offset=0, max_length=40, device='cpu')"
    )


# --- similarity


@pytest.mark.parametrize(
    ("a", "b", "shape"),
    [
        ("w7", "w8", ()),
        ("w7", ["w8", "w9"], (2,)),
        (["w7", "w8"], "w9", (2,)),
        (["w7"] * 3, ["w8"] * 2, (3, 2)),
        ([], ["w8"], (0, 1)),
    ],
)
def test_similarity_has_an_axis_for_each_list(model, a, b, shape):
    assert np.shape(model.similarity(a, b)) == shape


def test_similarity_is_the_cosine_of_the_raw_vectors(model):
    a, b = model.encode(MIXED[:3], normalize=False), model.encode(MIXED[3:5], normalize=False)
    cosines = model.similarity(MIXED[:3], MIXED[3:5])
    for i in range(3):
        for j in range(2):
            expected = a[i] @ b[j] / (np.linalg.norm(a[i]) * np.linalg.norm(b[j]))
            assert cosines[i, j] == pytest.approx(expected, abs=1e-6)
    assert model.similarity("w7 w8", "w7 w8") == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "kind",
    [
        np.asarray,
        np.float64,
        lambda array: np.array(array[..., ::-1])[..., ::-1],
        torch.from_numpy,
        lambda array: torch.from_numpy(array).requires_grad_(),
    ],
)
def test_similarity_takes_embeddings_of_any_length(model, kind):
    a, b = model.encode(MIXED[:3], normalize_embeddings=False), model.encode(MIXED[3:5])
    expected = model.similarity(MIXED[:3], MIXED[3:5])
    for left, right, cosines in (
        (kind(a), kind(b), expected),
        (kind(a[0]), kind(b), expected[0]),
        (kind(a), MIXED[3:5], expected),
        (kind(a[0]), kind(b[0]), expected[0, 0]),
    ):
        found = model.similarity(left, right)
        assert found.dtype == np.float32
        assert found.shape == cosines.shape
        np.testing.assert_allclose(found, cosines, rtol=0, atol=1e-6)
    assert model.similarity(kind(a[:0]), kind(b)).shape == (0, 2)


def test_similarity_refuses_arrays_that_are_no_embeddings_of_this_model(model):
    for shape in ((3, 5), (5,), (1, 3, 16), ()):
        with pytest.raises(DataError, match=r"similarity needs embeddings of shape \(N, 16\) or \(16,\), got "):
            model.similarity(np.ones(shape), "w7")
    for integers in (np.ones((2, 16), dtype=int), torch.ones(2, 16, dtype=torch.int64)):
        with pytest.raises(TypeError, match="needs a string or an iterable of strings"):
            model.similarity(integers, "w7")
    with pytest.raises(NonFiniteError, match="similarity got embeddings that are not finite"):
        model.similarity(np.full((2, 16), np.nan), "w7")


def test_cosines_stay_within_1(model):
    sentences = [f"w{number} w{number + 1}" for number in range(5, 90)]
    vectors = model.encode(sentences)
    assert (vectors @ vectors.T).max() > 1, "float32 rounds some beyond"
    cosines = model.similarity(sentences, sentences)
    assert cosines.max() == 1
    assert (np.abs(cosines) <= 1).all()
    assert cosines.dtype == np.float32
    single = [model.similarity(sentence, sentence) for sentence in sentences]
    assert max(single) == 1


# --- refused


@pytest.mark.parametrize("value", [None, 3, 2.5, b"bytes", ["w7"], float("nan")], ids=str)
@pytest.mark.parametrize("position", [0, 2])
def test_a_value_that_is_not_text_is_rejected_with_its_position(model, position, value):
    sentences = ["w7", "w8", "w9"]
    sentences[position] = value
    with pytest.raises(DataError, match=rf"sentence {position} must be a string, got {type(value).__name__} "):
        model.encode(sentences)


def test_a_lone_surrogate_is_rejected_with_its_position(model):
    with pytest.raises(DataError, match="sentence 1 holds a lone surrogate"):
        model.encode(["w7", "\ud83d"])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_prompt_is_an_error_and_not_an_embedding(model, value, normalize):
    encoder = PromptEncoder(model.encoder.backbone, length=4, pooling="avg")
    torch.nn.init.constant_(encoder.prompt.embedding.weight, value)
    with pytest.raises(NonFiniteError, match="the embedding of 'w7' is not finite"):
        PromCSE(encoder).encode(["w7", "w8"], normalize=normalize)


def test_an_unknown_type_or_device_is_refused(model, tmp_path):
    save_adapter(model.encoder, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="dtype must be float32, bfloat16, float16 or int8, got 'int4'"):
        PromCSE.load(tmp_path, dtype="int4")
    with pytest.raises(ConfigError, match="device must be auto, cpu, cuda or mps, got 'tpu9'"):
        pick_device("tpu9")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="there is no cuda device on this machine"):
        pick_device("cuda")


def test_auto_is_a_device_that_is_there():
    assert torch.zeros(1, device=pick_device("auto")).device.type == pick_device("auto").type


# --- the process around it


def test_loading_ignores_torchs_default_type_and_does_not_change_its_random_state(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    expected, state = model.encode(MIXED), torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        read = PromCSE.load(tmp_path / "adapter", device="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in read.encoder.parameters()} == {torch.float32}
    assert np.array_equal(read.encode(MIXED), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_encoding_restores_the_mode_of_every_module(model):
    model.encoder.train()
    model.encoder.backbone.eval()
    try:
        before = [module.training for module in model.encoder.modules()]
        model.encode("w5")
        assert [module.training for module in model.encoder.modules()] == before
    finally:
        model.encoder.eval()


def test_a_copy_of_a_model_gives_its_embeddings(model):
    model.build_index(MIXED)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(copied.encode(MIXED), model.encode(MIXED))
        assert copied.search(MIXED[0], top_k=1) == model.search(MIXED[0], top_k=1)


def test_a_text_without_tokens_is_an_error(model):
    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])  # no special tokens, as in some decoders
    with pytest.raises(DataError, match="a text has no tokens and cannot be encoded: ''"):
        PromCSE(model.encoder, tokenizer).encode(["w5", ""])


@pytest.mark.parametrize("name", ["cuda:1", "cuda:9"])
def test_a_gpu_that_this_machine_lacks_is_an_error(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=f"there is no {name} on this machine. Allowed: cuda:0"):
        pick_device(name)
    assert pick_device("cuda:0") == torch.device("cuda:0")
