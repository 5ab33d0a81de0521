"""Embeddings of sentence-transformers folders against sentence-transformers itself, and folders that are refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the extra: pip install -e '.[st]'", exc_type=ImportError)

from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from support.encoders import save_small_encoder, small_backbone, small_tokenizer

from promcse_pl.data.tokenizer import tokenizer_fingerprint
from promcse_pl.embedder import PromCSE
from promcse_pl.evaluation.targets import find_targets
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.dense import ACTIVATIONS
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.pipeline import TextSettings, read_pipeline
from promcse_pl.utils.errors import ConfigError, EncoderError

TEXTS = ["w5 w6 w7", "w8", "", "W9 W10 w11 w12", "  w5   w6 ", " ".join(f"w{i}" for i in range(5, 60)), "w5 W6 w7 ΟΔΟΣ"]
PROMPTS = {"query": "w20 w21: ", "document": "W30 ", "none": ""}
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
ENGLISH = [
    "A woman is reading a book.",
    "two dogs",
    "THE MARKET CLOSED LOWER ON FRIDAY",
    "",
    "The committee discussed the proposal in detail. " * 60,
]


def write_folder(folder: Path, *modules: torch.nn.Module, family: str = "bert", **options: object) -> Path:
    """Let sentence-transformers write a folder: a small encoder, and the modules after it."""
    source = save_small_encoder(folder.parent / f"{folder.name}-encoder", family)
    first = Transformer(str(source), processor_kwargs={"model_max_length": 30})
    torch.manual_seed(0)
    SentenceTransformer(modules=[first, *modules], device="cpu", **options).save_pretrained(
        str(folder), create_model_card=False
    )
    return folder


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not None}))


def old_format(folder: Path, *poolings: str, limit: int | None = 20, lower_case: bool = False) -> Path:
    """Rewrite the settings of a folder as sentence-transformers 2 did."""
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"
    (folder / "modules.json").write_text(json.dumps(modules))
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    old = {"word_embedding_dimension": 16} | {f"pooling_mode_{name}": name in poolings for name in names}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(old))
    settings = {"max_seq_length": limit, "do_lower_case": lower_case}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return folder


def frozen(folder: str | Path, pooling: str | None = None) -> PromCSE:
    return find_targets([str(folder)], pooling=pooling, device="cpu")[0].members[0].load()


def assert_equal_embeddings(folder: str | Path, texts: list[str] = TEXTS, **options: str) -> None:
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, normalize_embeddings=True, **options)
    np.testing.assert_allclose(frozen(folder).encode(texts, **options), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "modes",
    [
        *Pooling.POOLING_MODES,
        ("cls", "mean"),
        ("mean", "cls"),
        ("max", "mean_sqrt_len_tokens", "lasttoken"),
        Pooling.POOLING_MODES,
    ],
    ids=str,
)
def test_every_pooling_gives_the_embeddings_of_sentence_transformers(tmp_path, modes):
    folder = write_folder(tmp_path / "folder", Pooling(16, modes))
    assert_equal_embeddings(folder)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(frozen(folder).encode(TEXTS, normalize_embeddings=False), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("poolings", "expected"),
    [
        (("mean_tokens",), "avg"),
        ((), "avg"),
        (("max_tokens", "cls_token"), "cls+max"),
        (("lasttoken", "weightedmean_tokens", "mean_tokens"), "avg+weightedmean+lasttoken"),
    ],
)
def test_folders_of_older_versions_give_the_embeddings_of_sentence_transformers(tmp_path, poolings, expected):
    folder = old_format(write_folder(tmp_path / "folder", Pooling(16), Normalize()), *poolings)
    pipeline = read_pipeline(folder)
    assert (pipeline.pooling, pipeline.text.max_length, pipeline.dense) == (expected, 20, ())
    assert_equal_embeddings(folder)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense_layers_are_applied_after_the_pooling(tmp_path, activation):
    dense = Dense(16, 12, activation_function=ACTIVATIONS[activation]())
    folder = write_folder(tmp_path / "folder", Pooling(16), dense)
    assert_equal_embeddings(folder)
    model = frozen(folder)
    assert (model.width, model.encoder.backbone.dense[0].spec.activation) == (12, activation)


def test_dense_layers_follow_each_other_and_a_normalised_input(tmp_path):
    modules = [
        Pooling(16, ("cls", "mean")),
        Normalize(),
        Dense(32, 24),
        Dense(24, 8, bias=False, activation_function=torch.nn.Identity()),
        Normalize(),
        Normalize(),
        Dense(8, 10),
        Normalize(),
    ]
    folder = write_folder(tmp_path / "folder", *modules)
    assert [spec.normalize for spec in read_pipeline(folder).dense] == [True, False, True]
    assert_equal_embeddings(folder)
    with pytest.raises(ConfigError, match=r"pooling avg gives 16 features, .* take 32. Try: model.pooling=cls\+avg"):
        frozen(folder, pooling="avg")


def test_prompts_and_the_default_prompt_are_those_of_sentence_transformers(tmp_path):
    folder = write_folder(tmp_path / "folder", Pooling(16), prompts=PROMPTS, default_prompt_name="query")
    assert read_pipeline(folder).text.prompts == PROMPTS
    assert_equal_embeddings(folder)
    for options in (*({"prompt_name": name} for name in PROMPTS), {"prompt": "w40: "}, {"prompt": ""}):
        assert_equal_embeddings(folder, **options)
    model = frozen(folder)
    default, document = (model.encode("w5 w6", prompt_name=name) for name in (None, "document"))
    assert np.abs(default - document).max() > 1e-3
    with pytest.raises(
        ConfigError, match=r"there is no prompt 'qury' \(known: document, none, query\). Try: prompt_name='query'"
    ):
        model.encode("w5", prompt_name="qury")
    with pytest.raises(ConfigError, match="mutually exclusive"):
        model.encode("w5", prompt_name="query", prompt="w5 ")


def test_prompts_of_queries_and_documents_reach_the_index(tmp_path):
    folder = write_folder(tmp_path / "folder", Pooling(16), prompts=PROMPTS)
    model = frozen(folder)
    model.build_index(["w5 w6", "w7"], prompt_name="document")
    model.add(["w8 w9"], prompt_name="document")
    found = dict(model.search("w5", top_k=3, prompt="w20 w21: "))
    expected = (
        model.encode("w5", prompt_name="query") @ model.encode(["w5 w6", "w7", "w8 w9"], prompt_name="document").T
    )
    assert list(map(found.get, ["w5 w6", "w7", "w8 w9"])) == pytest.approx(expected.tolist(), abs=2e-6)


def test_lower_case_is_that_of_sentence_transformers(tmp_path):
    folder = write_folder(tmp_path / "folder", Pooling(16), prompts={"document": "W30 "})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 96, "content": "<Added>", "special": False})
    tokenizer["model"]["vocab"]["<Added>"] = tokenizer["model"]["vocab"].pop("w96")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    cased = frozen(folder).encode(TEXTS)
    old_format(folder, "mean_tokens", lower_case=True)
    assert np.abs(frozen(folder).encode(TEXTS) - cased).max() > 1e-3
    texts = [*TEXTS, "w5 [MASK] W6", "w5 [SEP] W6[MASK]w7 [mask]", "W5 <Added> w6", "[PAD]"]
    assert_equal_embeddings(folder, texts)
    assert_equal_embeddings(folder, texts, prompt_name="document")
    model = frozen(folder)
    assert tokenizer_fingerprint(model.tokenizer) == model.encoder.backbone.identity.tokenizer


def test_characters_are_converted_to_lower_case_as_the_tokenizers_library_does():
    from tokenizers.normalizers import Lowercase

    texts = ["ΟΔΟΣ", "İstanbul", "STRASSE ẞ", "ǅ", "Ａ", "AbC"]
    prepared = TextSettings(lower_case=True).prepare(texts, tokenizer=small_tokenizer())
    assert prepared == [Lowercase().normalize_str(text) for text in texts]
    assert TextSettings().prepare(texts, "q: ", tokenizer=small_tokenizer()) == [f"q: {text}" for text in texts]


def test_the_maximum_length_is_that_of_sentence_transformers(tmp_path):
    folder = write_folder(tmp_path / "folder", Pooling(16))
    assert (read_pipeline(folder).text.max_length, frozen(folder).max_tokens) == (30, 30)
    edit(folder / "sentence_bert_config.json", max_seq_length=9)
    assert frozen(folder).max_tokens == 9
    assert_equal_embeddings(folder)
    edit(folder / "sentence_bert_config.json", max_seq_length=None)
    edit(folder / "tokenizer_config.json", model_max_length=10**30)
    assert (read_pipeline(folder).text.max_length, frozen(folder).max_tokens) == (None, 40)
    assert_equal_embeddings(folder)


@pytest.mark.parametrize("options", ["processor_kwargs", "tokenizer_args"])
def test_the_maximum_length_of_the_tokenizer_options_wins(tmp_path, options):
    folder = write_folder(tmp_path / "folder", Pooling(16))
    edit(folder / "sentence_bert_config.json", max_seq_length=20, **{options: {"model_max_length": 8}})
    assert frozen(folder).max_tokens == 8
    assert_equal_embeddings(folder)


@pytest.mark.parametrize("family", ["nomic_bert", "modernbert", "qwen3"])
def test_rotary_positions_are_not_limited_to_those_of_the_config(tmp_path, family):
    folder = write_folder(tmp_path / "folder", Pooling(16), family=family)
    text = " ".join(f"w{i}" for i in range(5, 75))
    edit(folder / "sentence_bert_config.json", max_seq_length=60)
    assert frozen(folder).max_tokens == 60
    assert_equal_embeddings(folder, [text, "w5 w6"])
    edit(folder / "sentence_bert_config.json", max_seq_length=None)
    edit(folder / "tokenizer_config.json", model_max_length=60)
    assert frozen(folder).max_tokens == 40
    assert_equal_embeddings(folder, [text, "w5 w6"])
    text_settings = TextSettings(max_length=60)
    prompted = PromptEncoder(FrozenBackbone.load(folder), length=4, pooling="avg", text=text_settings)
    assert (prompted.longest_input, PromCSE(prompted).max_tokens) == (60, 60)
    assert np.isfinite(PromCSE(prompted).encode(text)).all()


@pytest.mark.parametrize(
    ("family", "changes"), [("bert", {}), ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}})]
)
def test_a_maximum_length_beyond_a_matrix_of_positions_or_a_dynamic_rotation_is_limited(family, changes):
    encoder = PromptEncoder(
        small_backbone(family, **changes), length=4, pooling="avg", text=TextSettings(max_length=60)
    )
    assert encoder.longest_input == 36


def test_a_folder_without_modules_is_pooled_by_the_mean(tmp_path):
    folder = save_small_encoder(tmp_path / "folder")
    edit(folder / "config_sentence_transformers.json", prompts={"query": "w5 "}, default_prompt_name="query")
    assert read_pipeline(folder).pooling is None
    model = frozen(folder)
    assert (model.encoder.pooling, model.encoder.text) == ("avg", TextSettings())


def test_an_explicit_pooling_wins_and_the_rest_of_the_pipeline_stays(tmp_path):
    folder = write_folder(tmp_path / "folder", Pooling(16), Dense(16, 12), prompts=PROMPTS)
    target = find_targets([str(folder)], pooling="cls", device="cpu")[0]
    model = target.members[0].load()
    assert (target.kind, model.width, model.encoder.text.prompts) == ("frozen encoder, pooling cls", 12, PROMPTS)


def test_minilm_gives_the_embeddings_of_sentence_transformers():
    folder = FrozenBackbone.load(MINILM)._source
    pipeline = read_pipeline(folder)
    assert (pipeline.pooling, pipeline.text, pipeline.dense) == ("avg", TextSettings(max_length=256), ())
    assert_equal_embeddings(folder, ENGLISH)
    assert_equal_embeddings(folder, ENGLISH, prompt="query: ")


@pytest.mark.skipif("PROMCSE_MPNET" not in os.environ, reason="PROMCSE_MPNET is not a folder of all-mpnet-base-v2")
def test_mpnet_gives_the_embeddings_of_sentence_transformers():
    folder = Path(os.environ["PROMCSE_MPNET"])
    assert read_pipeline(folder).text == TextSettings(max_length=384)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(ENGLISH)
    model = frozen(folder)
    fused = model.encode(ENGLISH)
    model.encoder.backbone.use_fused_layers = False
    np.testing.assert_allclose(model.encode(ENGLISH), theirs, rtol=0, atol=1e-6)
    np.testing.assert_allclose(fused[:-1], theirs[:-1], rtol=0, atol=1e-6)
    # 384 tokens in float32 are 1.2e-6 from the result in float64 in sentence-transformers too
    np.testing.assert_allclose(fused, theirs, rtol=0, atol=3e-6)
    model.encoder.double()
    model.encoder.backbone.use_fused_layers = True
    double = SentenceTransformer(str(folder), device="cpu").double().encode(ENGLISH[-1:])
    np.testing.assert_allclose(model.encode(ENGLISH[-1:]), double, rtol=0, atol=1e-7)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with every supported module; tests change copies of it."""
    modules = [Pooling(16), Normalize(), Dense(16, 12), Normalize()]
    return write_folder(tmp_path_factory.mktemp("whole") / "folder", *modules, prompts=PROMPTS)


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "folder")


def refusal(folder: Path) -> str:
    with pytest.raises(EncoderError) as error:
        FrozenBackbone.load(folder)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 800
    return message


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            {"type": "sentence_transformers.models.CNN", "path": "3_CNN"},
            "the module 'sentence_transformers.models.CNN'",
        ),
        ({"type": "sentence_transformers.base.modules.router.Router", "path": "3"}, "router.Router"),
        ({"type": "custom_st.Transformer", "path": "3"}, "custom_st.Transformer"),
        ({"type": "os.system", "path": "3"}, "'os.system', which is not supported"),
        (
            {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
            "supported: Transformer, Pooling, then",
        ),
        ({"type": "sentence_transformers.models.Dense", "path": "../2_Dense"}, "'../2_Dense' leaves the folder"),
        ({"type": "sentence_transformers.models.Dense", "path": "/2_Dense"}, "leaves the folder"),
        ({"type": "sentence_transformers.models.Dense", "path": "2\0"}, "leaves the folder"),
        ({"type": "sentence_transformers.models.Dense", "path": "9_Dense"}, "9_Dense/config.json is missing"),
        ({"type": 3, "path": "9_Dense"}, "every module needs a type and a path"),
        ({"type": "sentence_transformers.models.Dense"}, "every module needs a type and a path"),
        ("Dense", "every module needs a type and a path"),
    ],
    ids=str,
)
def test_a_module_that_is_not_supported_is_refused(folder, entry, expected):
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, entry]))
    assert expected in refusal(folder)


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ("[]", "has the modules none"),
        ("{}", "must contain a list"),
        ("[" * 10**5, "nested too deeply"),
        ("no", "cannot be read"),
        ('[{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]', "has the modules Pooling"),
        (
            '[{"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"},'
            ' {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]',
            "has its encoder in the folder 0_Transformer",
        ),
    ],
    ids=lambda value: value[:20],
)
def test_a_list_of_modules_that_is_not_supported_is_refused(folder, modules, expected):
    (folder / "modules.json").write_text(modules)
    assert expected in refusal(folder)


def test_a_json_file_of_a_hundred_megabytes_and_a_fifo_are_refused(folder):
    with (folder / "modules.json").open("wb") as file:
        file.truncate(10**8)
    assert "modules.json cannot be read" in refusal(folder)
    (folder / "modules.json").unlink()
    shutil.copyfile(folder / "1_Pooling" / "config.json", folder / "modules.json")
    assert "must contain a list" in refusal(folder)
    modules = [
        {"type": f"sentence_transformers.models.{name}", "path": path}
        for name, path in (("Transformer", ""), ("Pooling", "1_Pooling"))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").unlink()
    os.mkfifo(folder / "1_Pooling" / "config.json")
    assert "cannot be read" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt is false"),
        ("1_Pooling/config.json", {"include_prompt": "no"}, "include_prompt must be true or false, got 'no'"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "pooling_mode is 'median'; allowed: cls, max, mean"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "mean"]}, "pooling_mode is ['mean', 'mean']"),
        ("1_Pooling/config.json", {"pooling_mode": [3]}, "pooling_mode is [3]"),
        ("1_Pooling/config.json", {"pooling_mode": {}}, "pooling_mode is {}"),
        ("1_Pooling/config.json", {"pooling_mode_median": True}, "unknown setting 'pooling_mode_median'"),
        ("3_Dense/config.json", {"activation_function": "torch.nn.Softmax"}, "'torch.nn.Softmax'; supported: Identity"),
        ("3_Dense/config.json", {"activation_function": "os.Tanh"}, "'os.Tanh'; supported: Identity"),
        ("3_Dense/config.json", {"activation_function": 1}, "activation_function must be text"),
        ("3_Dense/config.json", {"use_residual": True}, "use_residual is set"),
        ("3_Dense/config.json", {"module_input_name": "token_embeddings"}, "'token_embeddings'; supported"),
        ("4_Normalize/config.json", {"module_output_name": "other"}, "module_output_name is 'other'"),
        ("3_Dense/config.json", {"in_features": "16"}, "in_features must be an integer"),
        ("3_Dense/config.json", {"in_features": True}, "in_features must be an integer"),
        ("3_Dense/config.json", {"out_features": 10**12}, "must be in [1, 1048576]"),
        ("3_Dense/config.json", {"out_features": 0}, "must be in [1, 1048576]"),
        ("3_Dense/config.json", {"out_features": 13}, "its config.json declares"),
        ("3_Dense/config.json", {"bias": False}, "its config.json declares"),
        ("sentence_bert_config.json", {"max_seq_length": "9"}, "max_seq_length must be an integer"),
        ("sentence_bert_config.json", {"max_seq_length": 2}, "must be at least 3, got 2"),
        ("sentence_bert_config.json", {"do_lower_case": 1}, "do_lower_case must be true or false"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "'transformer_task' is 'fill-mask'"),
        ("sentence_bert_config.json", {"module_output_name": "logits"}, "'module_output_name' is 'logits'"),
        ("sentence_bert_config.json", {"query_length": 8}, "'query_length' is 8"),
        ("sentence_bert_config.json", {"tokenizer_name_or_path": "x"}, "'tokenizer_name_or_path' is 'x'"),
        ("sentence_bert_config.json", {"tokenizer_args": {"use_fast": False}}, "'tokenizer_args' is {'use_fast'"),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"max_length": 4}}}, "'processing_kwargs'"),
        ("sentence_bert_config.json", {"modality_config": {"message": {}}}, "'modality_config' is {'message'"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type is 'SparseEncoder'"),
        ("config_sentence_transformers.json", {"truncate_dim": 8}, "truncate_dim is 8"),
        ("config_sentence_transformers.json", {"prompts": ["query"]}, "prompts must be an object or null"),
        ("config_sentence_transformers.json", {"prompts": {"query": 3}}, "the prompt 'query' must be text, got 3"),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "default_prompt_name is 'q'"),
        ("config_sentence_transformers.json", {"default_prompt_name": 3}, "default_prompt_name must be text or null"),
        (
            "tokenizer_config.json",
            {"model_max_length": "512"},
            "model_max_length must be an integer or a number or null",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_setting_that_is_not_supported_is_refused(folder, file, changes, expected):
    edit(folder / file, **changes)
    assert expected in refusal(folder)


def test_a_maximum_length_that_is_no_number_is_refused(folder):
    text = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(text.replace('"model_max_length": 30', '"model_max_length": NaN'))
    assert "must be at least 3, got nan" in refusal(folder)


def test_dense_layers_that_do_not_fit_each_other_are_refused(folder):
    shutil.copytree(folder / "3_Dense", folder / "5_Dense")
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, {**modules[3], "path": "5_Dense"}]))
    assert "5_Dense takes 16 features, but the Dense module before it gives 12" in refusal(folder)


def test_weights_of_dense_layers_are_checked(folder):
    path = folder / "3_Dense" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"linear.extra": torch.zeros(1)}, path)
    assert "3_Dense/model.safetensors cannot be read: it has the tensors" in refusal(folder)
    save_file(tensors | {"linear.bias": torch.full((12,), torch.nan)}, path)
    assert "values that are not finite" in refusal(folder)
    path.write_bytes(path.read_bytes()[:-10])
    assert "3_Dense/model.safetensors cannot be read" in refusal(folder)
    path.write_bytes(b"\0" * 4)
    assert "3_Dense/model.safetensors cannot be read" in refusal(folder)
    path.unlink()
    torch.save(tensors, path.with_name("pytorch_model.bin"))
    assert (
        "pickled weights (pytorch_model.bin) are not read. Try: SentenceTransformer(OLD).save_pretrained(NEW)"
        in refusal(folder)
    )


def test_an_encoder_with_dense_layers_is_not_saved_without_them(folder, tmp_path):
    with pytest.raises(EncoderError, match="has dense layers after the pooling"):
        FrozenBackbone.load(folder).save(tmp_path / "copy")


def test_dense_layers_stay_in_float32_and_take_no_gradients(folder):
    backbone = FrozenBackbone.load(folder, dtype=torch.bfloat16)
    assert {part.dtype for part in backbone.dense.parameters()} == {torch.float32}
    encoder = PromptEncoder(backbone, length=2, pooling="avg")
    assert not any(part.requires_grad for part in backbone.parameters())
    assert not any("dense" in name for name in encoder.state_dict())
    assert encoder.width == 12
