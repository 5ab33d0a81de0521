"""Exported graphs: embeddings equal to PyTorch's at every length and padding, exported files, errors."""

import json
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
from promcse_pl.interop import onnx
from promcse_pl.interop.onnx import (
    GRAPH,
    OPENVINO,
    QUANTIZED,
    TOLERANCE,
    GraphEncoder,
    export_onnx,
    export_openvino,
)
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.utils.errors import AdapterError, ConfigError

TEXTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13 w14", "w5 " * 60, "W20 w21 unknown"]
QUICK = {"bert"}
"""Families of the quick tests; an export takes several seconds."""


def small_model(folder: Path, family: str = "bert", *, pipeline: bool = False, **settings: object) -> PromCSE:
    encoder = save_small_encoder(folder / "encoder", family)
    if pipeline:
        add_pipeline(encoder)
    torch.manual_seed(3)
    model = PromptEncoder(FrozenBackbone.load(str(encoder)), length=4, **{"pooling": "avg", **settings})
    for weight in [*model.prompt.parameters(), *(model.head.parameters() if model.head else ())]:
        torch.nn.init.normal_(weight, std=0.5)
    return PromCSE(model.eval())


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[PromCSE, Path, onnx.ExportReport]:
    """A model with text settings and a dense layer, its exported folder, and the export report."""
    folder = tmp_path_factory.mktemp("onnx")
    model = small_model(folder, pipeline=True, pooling="cls")
    return model, folder / "out", export_onnx(model, folder / "out", int8=True)


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_the_graph_of_every_family_equals_pytorch_at_every_length_and_padding(family, tmp_path):
    encoder = prompt_encoder(family, dtype=torch.float32, head="mlp", pooling="cls" if family == "roberta" else "avg")
    onnx._write_graph(PromCSE(encoder, object()), tmp_path / "onnx" / "model.onnx")
    run = onnx._onnxruntime(tmp_path / "onnx" / "model.onnx", 1)
    limit = min(encoder.longest_input, 40)
    for lengths in ([1], [2], [1, 1], [3, 1], [limit], [limit, 5, 1], [9, 4, 12, 5], [8, 8, 8]):
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


def test_the_command_writes_the_graph_and_prints_the_difference(tmp_path, capsys):
    save_adapter(small_model(tmp_path).encoder, tmp_path / "adapter")
    senteval = tmp_path / "data/senteval/STS/STSBenchmark"
    senteval.mkdir(parents=True)
    rows = [f"x\tx\tx\t{i}\t{i % 5}\tw{5 + i} w6\tw{9 + i} w7" for i in range(9)]
    (senteval / "sts-dev.csv").write_text("\n".join(rows) + "\n")
    command = ["export", str(tmp_path / "adapter"), "--to", "onnx", "-o", str(tmp_path / "out"), "--int8"]
    assert main([*command, "--data", str(tmp_path / "data")]) == 0
    printed = capsys.readouterr().out
    assert "model.onnx: largest difference from PyTorch" in printed
    assert "on the demo sentences at least" in printed
    assert "STS-B dev: float32" in printed
    assert main(command) == 2
    assert "already exists" in capsys.readouterr().err


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
