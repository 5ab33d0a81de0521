"""Exported graphs: embeddings equal to PyTorch's at every length and padding, exported files, errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.encoders import FAMILIES, add_pipeline, prompt_encoder, save_small_encoder, small_tokens
from torch.nn import functional as F

pytest.importorskip("onnx", reason="needs the extra: pip install -e '.[onnx]'")
pytest.importorskip("onnxscript", reason="needs the extra: pip install -e '.[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the extra: pip install -e '.[onnx]'")

from tokenizers import Tokenizer

from promcse_pl import PromCSE
from promcse_pl.adapter import save_adapter
from promcse_pl.cli.main import main
from promcse_pl.data.pairs import load_stsb
from promcse_pl.evaluation.sts import spearman
from promcse_pl.interop import graph as graphs
from promcse_pl.interop import onnx
from promcse_pl.interop.graph import GRAPH, OPENVINO, QUANTIZED, GraphEncoder
from promcse_pl.interop.onnx import TOLERANCE, export_onnx, export_openvino
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.tuning import Tuning
from promcse_pl.utils.errors import AdapterError, ConfigError, TextTypeError

TEXTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13 w14", "w5 " * 60, "W20 w21 unknown"]
EXPORTED = FAMILIES if os.environ.get("PROMCSE_TESTS") == "all" else ["bert"]
"""Families whose graph is tested; an export takes 10 to 60 seconds, so the others need PROMCSE_TESTS=all."""


def small_model(
    folder: Path, family: str = "bert", *, pipeline: bool = False, tuning: Tuning | None = None, **settings: object
) -> PromCSE:
    """A model of one layer whose trained weights differ enough from their initial values to matter."""
    encoder = save_small_encoder(folder / "encoder", family, num_hidden_layers=1)
    if pipeline:
        add_pipeline(encoder)
    torch.manual_seed(3)
    backbone = FrozenBackbone.load(str(encoder))
    if tuning is not None:
        backbone.tune(tuning)
    model = PromptEncoder(backbone, **{"length": 4, "pooling": "avg", **settings})
    for weight in [*model.prompt.parameters(), *(model.head.parameters() if model.head else ())]:
        torch.nn.init.normal_(weight, std=0.5)
    for weight in backbone.tuned_weights.values():
        weight.data.add_(0.3 * torch.randn(weight.shape))
    return PromCSE(model.eval())


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[PromCSE, Path, onnx.ExportReport]:
    """A model with text settings and a dense layer, its exported folder, and the export report."""
    folder = tmp_path_factory.mktemp("onnx")
    model = small_model(folder, pipeline=True, pooling="cls")
    return model, folder / "out", export_onnx(model, folder / "out", int8=True)


@pytest.mark.parametrize("family", EXPORTED)
def test_the_graph_of_every_family_equals_pytorch_at_every_length_and_padding(family, tmp_path):
    layers = {"num_hidden_layers": 2} if family == "bert" else {}  # of the others, some layers differ from each other
    pooling = "cls" if family == "roberta" else "avg"
    encoder = prompt_encoder(family, dtype=torch.float32, head="mlp", pooling=pooling, changes=layers)
    onnx._write_graph(PromCSE(encoder, object()), tmp_path / "onnx" / "model.onnx")
    run = graphs._onnxruntime(tmp_path / "onnx" / "model.onnx", 1)
    limit = min(encoder.longest_input, 40)
    for lengths in ([1], [2], [1, 1], [limit, 5, 1], [9, 4, 12, 5], [8, 8, 8]):
        tokens = small_tokens(lengths, encoder.backbone.pad_id)
        with torch.no_grad():
            expected_ND = F.normalize(encoder(tokens)[0])
        found_ND = run(tokens.ids_NT.numpy(), tokens.mask_NT.numpy())
        np.testing.assert_allclose(found_ND, expected_ND.numpy(), atol=TOLERANCE, rtol=0, err_msg=str(lengths))
        shifts = [max(lengths) - length for length in lengths]
        left_ids, left_mask = (
            torch.stack([row.roll(shift) for row, shift in zip(part, shifts, strict=True)]).numpy()
            for part in (tokens.ids_NT, tokens.mask_NT)
        )
        np.testing.assert_allclose(run(left_ids, left_mask), expected_ND.numpy(), atol=TOLERANCE, rtol=0)


def test_an_export_gives_our_embeddings_from_its_own_tokenizer_and_has_the_files_that_others_read(exported):
    model, out, report = exported
    assert report.difference <= TOLERANCE
    assert "--default-prompt-name" in report.notes[0]
    files = {str(path.relative_to(out)) for path in (out).rglob("*") if path.is_file()}
    assert files == {
        GRAPH,
        QUANTIZED,
        "README.md",
        "config.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    graph = GraphEncoder.load(out)
    np.testing.assert_allclose(graph.encode(TEXTS), model.encode(TEXTS, prompt=""), atol=TOLERANCE, rtol=0)
    prompted = graph.encode(["w5 " + text for text in TEXTS])
    np.testing.assert_allclose(prompted, model.encode(TEXTS), atol=TOLERANCE, rtol=0)
    quantized = GraphEncoder.load(out, QUANTIZED).encode(TEXTS)
    assert (quantized * model.encode(TEXTS, prompt="")).sum(1).min() > 0.8
    settings = {name: json.loads((out / name).read_text()) for name in files if name.endswith(".json")}
    assert settings["tokenizer_config.json"]["model_max_length"] == 20  # read by fastembed and transformers.js
    assert settings["sentence_bert_config.json"]["max_seq_length"] == 20  # read by text-embeddings-inference
    assert settings["config_sentence_transformers.json"]["prompts"] == {"query": "w5 "}
    assert settings["config.json"]["architectures"] == ["BertModel"]
    assert settings["config.json"]["max_position_embeddings"] == 40
    assert len(Tokenizer.from_file(str(out / "tokenizer.json")).encode("w5 " * 60).ids) == 20


def test_the_command_prints_the_difference_and_the_scores_with_the_default_prompt(tmp_path, capsys):
    model = small_model(tmp_path, pipeline=True, pooling="cls")
    save_adapter(model.encoder, tmp_path / "adapter")
    senteval = tmp_path / "data/senteval/STS/STSBenchmark"
    senteval.mkdir(parents=True)
    rows = [f"x\tx\tx\t{i}\t{i * 7 % 5}\tw{5 + i} w6\tw{9 + i * 11 % 70} w7" for i in range(40)]
    (senteval / "sts-dev.csv").write_text("\n".join(rows) + "\n")
    command = ["export", str(tmp_path / "adapter"), "--to", "onnx", "-o", str(tmp_path / "out"), "--int8"]
    assert main([*command, "--data", str(tmp_path / "data")]) == 0
    printed = capsys.readouterr().out
    assert "model.onnx: largest difference from PyTorch" in printed
    assert "on the demo sentences at least" in printed
    pairs = load_stsb(tmp_path / "data/senteval", "dev")
    score, without_prompt = (
        100 * spearman((model.encode(pairs.first, **prompt) * model.encode(pairs.second, **prompt)).sum(1), pairs.gold)
        for prompt in ({}, {"prompt": ""})
    )
    assert abs(score - without_prompt) > 0.1
    assert f"STS-B dev: float32 {score:.2f}, int8" in printed
    assert main(command) == 2
    assert "already exists" in capsys.readouterr().err


def test_the_cosines_of_int8_are_those_of_texts_with_the_default_prompt(exported, tmp_path):
    _, out, report = exported
    texts = [f"w5 {text}" for text in sorted({text for pair in onnx.demo_pairs("dev") for text in pair[:2]})]
    cosines = (GraphEncoder.load(out).encode(texts) * GraphEncoder.load(out, QUANTIZED).encode(texts)).sum(1)
    assert report.int8_cosine == pytest.approx((cosines.min(), cosines.mean()), abs=1e-6)


def test_a_folder_without_the_graph_is_an_error_with_the_command_that_writes_one(tmp_path):
    with pytest.raises(
        ConfigError, match=r"missing has no onnx/model.onnx .*Try: promcse export RUN --to onnx -o FOLDER"
    ):
        GraphEncoder.load(tmp_path / "missing")


@pytest.mark.parametrize(
    "settings",
    [
        {"tuning": Tuning("lora", rank=3, alpha=6.0), "length": 0},
        pytest.param({"tuning": Tuning("bias"), "kind": "shared"}, marks=pytest.mark.exhaustive),
        {"kind": "input", "head": "low_rank", "head_rank": 2},
    ],
    ids=["lora", "bias, shared prompt", "input prompt, low-rank head"],
)
def test_tuned_weights_every_prompt_and_a_low_rank_head_are_exported(settings, tmp_path):
    model = small_model(tmp_path, **settings)
    assert export_onnx(model, tmp_path / "out").difference <= TOLERANCE
    found = GraphEncoder.load(tmp_path / "out").encode(TEXTS)
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=TOLERANCE, rtol=0)
    frozen = PromCSE(PromptEncoder(model.encoder.backbone.base(), length=0, pooling="avg").eval())
    assert abs(found - frozen.encode(TEXTS)).max() > 0.01
    if settings.get("tuning", Tuning()).weights == "lora":
        import onnx as onnx_files

        graph = onnx_files.load(tmp_path / "out" / GRAPH).graph
        assert not [value.name for value in graph.initializer if "lora" in value.name]
        assert any("lora" in name for name, _ in model.encoder.named_parameters())


def test_a_single_text_no_text_and_entries_that_are_not_texts_are_treated_as_by_promcse(exported):
    model, out, _ = exported
    graph = GraphEncoder.load(out)
    np.testing.assert_allclose(graph.encode("w5 w6"), model.encode("w5 w6", prompt=""), atol=TOLERANCE, rtol=0)
    assert graph.encode([]).shape == (0, model.width)
    assert graph.encode(text for text in TEXTS).shape == (len(TEXTS), model.width)
    for wrong in (["w5", 3], b"w5", None):
        with pytest.raises(TextTypeError):
            graph.encode(wrong)


def test_texts_are_padded_by_batch_and_not_to_the_longest_of_all(exported):
    model, out, _ = exported
    graph, run, shapes = GraphEncoder.load(out), GraphEncoder.load(out).run, []
    graph.run = lambda *inputs: shapes.append(inputs[0].shape) or run(*inputs)
    encoded = graph.encode(["w5", "w5 " * 60, "w6 w7", "w8"], batch_size=2)
    assert shapes == [(2, 20), (2, 3)]
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    GraphEncoder(graph.run, tokenizer)
    assert tokenizer.padding is not None, "the tokenizer of the caller is not changed"
    np.testing.assert_allclose(encoded[2], model.encode("w6 w7", prompt=""), atol=TOLERANCE, rtol=0)


def test_an_exported_folder_is_read_without_torch_transformers_and_onnx(exported):
    _, out, _ = exported
    code = (
        "import sys; from promcse_pl.interop.graph import GraphEncoder; "
        f"print(GraphEncoder.load({str(out)!r}).encode('w5 w6').shape, "
        "{'torch', 'transformers', 'onnx', 'onnxscript'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(8,) set()"


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--to", "openvino", "--int8"], "--int8 has no effect with --to openvino. Try: --to onnx --int8"),
        (["--to", "onnx", "--data", "x"], "Try: --to onnx --int8 --data FOLDER"),
    ],
)
def test_an_option_without_effect_is_refused(options, advice, tmp_path, capsys):
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "out"), *options]) == 2
    assert advice in capsys.readouterr().err


def test_a_missing_extra_is_named_with_its_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"Try: pip install 'promcse_pl\[onnx\]'"):
        export_onnx(small_model(tmp_path), tmp_path / "out")


def test_a_graph_that_differs_a_tokenizer_that_differs_and_a_family_that_fails_are_refused(
    tmp_path, monkeypatch, exported
):
    model, out, _ = exported

    def fails(*_inputs, **_options):
        raise RuntimeError("no such operator")

    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "export", fails)
        with pytest.raises(AdapterError, match=r"model_type bert .* no such operator"):
            export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    graph = GraphEncoder.load(out)
    run = graph.run
    graph.run = lambda ids_NT, mask_NT: 1.001 * run(ids_NT, mask_NT)
    with pytest.raises(AdapterError, match="differ from those of PyTorch by"):
        onnx._check(model, graph)
    graph.tokenizer.enable_truncation(3)
    with pytest.raises(AdapterError, match="other token ids"):
        onnx._check(model, graph)


def test_rounded_weights_are_refused(tmp_path):
    model = small_model(tmp_path)
    model.encoder.backbone.to(torch.bfloat16)
    with pytest.raises(AdapterError, match="bfloat16"):
        export_onnx(model, tmp_path / "out")


def test_openvino_gives_our_embeddings(tmp_path):
    pytest.importorskip("openvino", reason="needs the extra: pip install -e '.[openvino]'")
    model = small_model(tmp_path)
    assert export_openvino(model, tmp_path / "out").difference <= TOLERANCE
    assert (tmp_path / "out" / OPENVINO).with_suffix(".bin").is_file()
    found = GraphEncoder.load(tmp_path / "out", threads=1).encode(TEXTS)
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=TOLERANCE, rtol=0)


def test_fastembed_and_qdrant_use_the_exported_folder(exported):
    fastembed = pytest.importorskip("fastembed")
    from fastembed.common.model_description import ModelSource, PoolingType

    model, out, _ = exported
    fastembed.TextEmbedding.add_custom_model(
        model="my/adapter",
        pooling=PoolingType.DISABLED,
        normalization=False,
        sources=ModelSource(hf="my/adapter"),
        dim=model.width,
        model_file=GRAPH,
        output_name="sentence_embedding",
    )
    embedder = fastembed.TextEmbedding("my/adapter", specific_model_path=str(out))
    found = np.stack(list(embedder.embed(TEXTS)))
    np.testing.assert_allclose(found, model.encode(TEXTS, prompt=""), atol=TOLERANCE, rtol=0)
    client_module = pytest.importorskip("qdrant_client")
    client = client_module.QdrantClient(":memory:")
    models = client_module.models
    client.create_collection(
        "texts", vectors_config=models.VectorParams(size=model.width, distance=models.Distance.COSINE)
    )
    client.upload_collection("texts", vectors=found, payload=[{"text": text} for text in TEXTS])
    hits = client.query_points("texts", query=found[2].tolist(), limit=1).points
    assert hits[0].payload["text"] == TEXTS[2]
