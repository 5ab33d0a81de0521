"""Our adapters as models of MTEB, offline, on a task made in memory."""

from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

pytest.importorskip("mteb", reason="needs the extra: pip install -e '.[mteb]'")

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from support.encoders import save_small_encoder
from support.runs import small_config

from promcse_pl import PromCSE
from promcse_pl.adapter import adapter_hash, load_adapter, save_adapter
from promcse_pl.cli.main import main
from promcse_pl.embedder import model_hash
from promcse_pl.evaluation.embeddings import EmbeddingCache
from promcse_pl.evaluation.report import render
from promcse_pl.evaluation.suite import evaluate
from promcse_pl.evaluation.targets import Member, Target
from promcse_pl.evaluation.tasks import load_tasks
from promcse_pl.interop import mteb as wrapper
from promcse_pl.interop.mteb import MtebModel
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.pipeline import TextSettings
from promcse_pl.runs.inputs import check_inputs
from promcse_pl.utils.errors import ConfigError, DataError

FIRST = [f"w{i} w{i + 1} w{i + 2}" for i in range(5, 85, 4)]
SECOND = [f"w{i} w{90 - i // 2} w{i * 7 % 80 + 5}" for i in range(5, 85, 4)]
SCORES = [float(i * 13 % 20) for i in range(20)]


def about(name: str, kind: str, score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        type=kind,
        main_score=score,
        description="made in memory",
        dataset={"path": "memory", "revision": "1"},
        eval_langs=["eng-Latn"],
        eval_splits=["test"],
    )


class SmallSTS(AbsTaskSTS):
    metadata = about("SmallSTS", "STS", "cosine_spearman")
    min_score, max_score = 0, 20

    def load_data(self, **_):
        rows = {"sentence1": FIRST, "sentence2": SECOND, "score": SCORES}
        self.dataset, self.data_loaded = DatasetDict(test=Dataset.from_dict(rows)), True


class SmallRetrieval(AbsTaskRetrieval):
    metadata = about("SmallRetrieval", "Retrieval", "ndcg_at_10")

    def load_data(self, **_):
        ids = [str(i) for i in range(len(FIRST))]
        split = {
            "corpus": Dataset.from_dict({"id": ids, "title": [""] * len(ids), "text": FIRST}),
            "queries": Dataset.from_dict({"id": ids, "text": SECOND}),
            "relevant_docs": {i: {i: 1} for i in ids},
            "top_ranked": None,
        }
        self.dataset, self.data_loaded = {"default": {"test": split}}, True


def small_prompt_encoder(folder: Path, seed: int = 3, **settings: object) -> PromptEncoder:
    if not folder.exists():
        save_small_encoder(folder)
    torch.manual_seed(seed)
    encoder = PromptEncoder(
        FrozenBackbone.load(str(folder)), **{"length": 4, "pooling": "avg", "head": "mlp", **settings}
    )
    torch.nn.init.normal_(encoder.prompt.embedding.weight, std=0.5)
    return encoder.eval()


def test_mteb_gives_the_spearman_of_our_cosines_and_keeps_adapters_apart(tmp_path):
    cache = ResultCache(tmp_path / "results")
    for seed in (3, 4):
        model = PromCSE(small_prompt_encoder(tmp_path / "encoder", seed))
        result = mteb.evaluate(MtebModel(model), SmallSTS(), cache=cache, show_progress_bar=False)
        cosines = (model.encode(FIRST) * model.encode(SECOND)).sum(1)
        scores = result.task_results[0].scores["test"][0]
        assert scores["main_score"] == pytest.approx(spearmanr(cosines, SCORES).statistic, abs=1e-6)
        assert (result.model_name, result.model_revision) == ("promcse_pl/encoder", model_hash(model))
    assert len(list((tmp_path / "results").rglob("SmallSTS.json"))) == 2


def test_mteb_runs_a_retrieval_task(tmp_path):
    model = PromCSE(small_prompt_encoder(tmp_path / "encoder"))
    result = mteb.evaluate(MtebModel(model), SmallRetrieval(), cache=None, show_progress_bar=False)
    ranks = model.similarity(SECOND, FIRST).argsort(1)[:, ::-1]
    expected = sum(float(i in ranks[i, :10]) for i in range(len(FIRST))) / len(FIRST)
    assert result.task_results[0].scores["test"][0]["recall_at_10"] == pytest.approx(expected)


def test_queries_and_documents_of_a_retrieval_task_get_their_prompts(tmp_path):
    text = TextSettings(prompts={"query": "w5 w6 w7 ", "document": "w8 "}, default_prompt="query")
    model = PromCSE(small_prompt_encoder(tmp_path / "encoder", text=text))
    result = mteb.evaluate(MtebModel(model), SmallRetrieval(), cache=None, show_progress_bar=False)
    queries, documents = model.encode(SECOND), model.encode(FIRST, prompt_name="document")
    ranks = (queries @ documents.T).argsort(1)[:, ::-1]
    expected = sum(float(i in ranks[i, :3]) for i in range(len(FIRST))) / len(FIRST)
    assert result.task_results[0].scores["test"][0]["recall_at_3"] == pytest.approx(expected)
    encoded = MtebModel(model).encode([{"text": FIRST}], prompt_type=mteb.types.PromptType.document)
    assert (encoded == documents).all()
    assert abs(encoded - model.encode(FIRST)).max() > 1e-3


def test_the_model_keeps_mtebs_protocol_and_describes_itself(tmp_path):
    model = MtebModel(PromCSE(small_prompt_encoder(tmp_path / "encoder")))
    assert isinstance(model, mteb.EncoderProtocol)
    meta = model.mteb_model_meta
    assert (meta.embed_dim, meta.max_tokens, meta.similarity_fn_name) == (16, 36, "cosine")
    assert meta.n_embedding_parameters == 97 * 16


def test_the_hash_follows_what_decides_the_vectors_and_nothing_else(tmp_path):
    folder = tmp_path / "encoder"
    encoder = small_prompt_encoder(folder)
    save_adapter(encoder, tmp_path / "adapter", training={"best": 0.5})
    same = [load_adapter(tmp_path / "adapter"), small_prompt_encoder(folder, dropout=0.3)]
    same.append(load_adapter(tmp_path / "adapter", encoder=str(folder.rename(tmp_path / "moved"))))
    assert {adapter_hash(other) for other in same} == {adapter_hash(encoder)}
    changes = (
        {"pooling": "cls"},
        {"head": "mlp_train_only"},
        {"position_offset": 0},
        {"projection_size": 5},
        {"seed": 4},
    )
    changed = [small_prompt_encoder(tmp_path / "moved", **change) for change in changes]
    changed[-1].prompt.load_state_dict(encoder.prompt.state_dict())  # the last one differs in its head alone
    hashes = {adapter_hash(other) for other in [encoder, *changed]}
    assert len(hashes) == 1 + len(changes)


# --- as tasks of an evaluation ---------------------------------------------------------------------------------------


def test_an_mteb_task_is_scored_beside_others_and_its_result_is_cached_by_the_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr(mteb, "get_task", lambda name: {"SmallSTS": SmallSTS}[name]())
    monkeypatch.setattr(wrapper, "why_unreachable", lambda *_, **__: None)
    model = PromCSE(small_prompt_encoder(tmp_path / "encoder"))
    rows = "".join(f"{a},{b},{score}\n" for a, b, score in zip(FIRST, SECOND, SCORES, strict=True))
    (tmp_path / "own.csv").write_text(rows)
    target, cache = Target("a", "adapter", (Member(lambda: model),)), EmbeddingCache(tmp_path / "cache")
    names = ["mteb:SmallSTS", str(tmp_path / "own.csv")]
    tree = evaluate([target], load_tasks(names, None), cache)
    scores = tree["targets"]["a"]["scores"]
    assert scores["mteb:SmallSTS"]["value"] == pytest.approx(scores["own.csv"]["value"], abs=1e-4)
    assert (scores["mteb:SmallSTS"]["low"], scores["mteb:SmallSTS"]["high"]) == (None, None)
    assert f"| a | {scores['mteb:SmallSTS']['value']:.2f} |" in render(tree, "markdown")
    monkeypatch.setattr(SmallSTS, "load_data", lambda *_, **__: pytest.fail("the data are not needed again"))
    again = evaluate([target], load_tasks(names[:1], None), cache)
    cached = again["targets"]["a"]["scores"]["mteb:SmallSTS"]["value"]
    assert cached == pytest.approx(scores["mteb:SmallSTS"]["value"], abs=1e-3)  # mteb stores rounded scores


def test_the_command_evaluates_an_mteb_task(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mteb, "get_task", lambda name: {"SmallSTS": SmallSTS}[name]())
    monkeypatch.setattr(wrapper, "why_unreachable", lambda *_, **__: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    encoder = small_prompt_encoder(tmp_path / "encoder")
    save_adapter(encoder, tmp_path / "adapter")
    command = ["evaluate", str(tmp_path / "adapter"), "--tasks", "mteb:SmallSTS", "--device", "cpu"]
    assert main([*command, "--format", "markdown"]) == 0
    model = PromCSE(encoder)
    expected = 100 * spearmanr((model.encode(FIRST) * model.encode(SECOND)).sum(1), SCORES).statistic
    assert f"| {expected:.2f} |" in capsys.readouterr().out


def test_rounded_weights_do_not_get_the_cached_result_of_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(wrapper, "why_unreachable", lambda *_, **__: None)
    revisions = set()
    for dtype in (torch.float32, torch.bfloat16):
        encoder = small_prompt_encoder(tmp_path / "encoder")
        encoder.backbone.to(dtype)
        model = PromCSE(encoder)
        wrapper.main_score(model, SmallSTS(), tmp_path / "cache")
        revisions.add(MtebModel(model).mteb_model_meta.revision)
    assert len(list((tmp_path / "cache").rglob("SmallSTS.json"))) == len(revisions) == 2


def test_data_that_cannot_be_loaded_are_reported_before_an_evaluation_encodes_and_before_a_run_trains(
    tmp_path, monkeypatch
):
    class Unreachable(SmallSTS):
        def load_data(self, **_):
            raise ConnectionError("could not reach the hub")

    monkeypatch.setattr(mteb, "get_task", lambda _: Unreachable())
    monkeypatch.setattr(wrapper, "why_unreachable", lambda *_, **__: None)
    model = PromCSE(small_prompt_encoder(tmp_path / "encoder"))
    target = Target("a", "adapter", (Member(lambda: model),))
    with monkeypatch.context() as patch:
        patch.setattr(
            PromCSE, "encode", lambda *_, **__: pytest.fail("sentences were encoded before the data were loaded")
        )
        with pytest.raises(DataError, match="mteb:SmallSTS needs the data set memory"):
            evaluate([target], load_tasks(["demo", "mteb:SmallSTS"], None), EmbeddingCache(tmp_path / "cache"))
    with pytest.raises(DataError, match="mteb:SmallSTS needs the data set memory"):
        check_inputs(small_config(tmp_path, evaluation={"tasks": ["mteb:SmallSTS"]}))


@pytest.mark.parametrize("why", ["no network (ConnectError: refused)", "HF_HUB_OFFLINE is set"])
def test_a_data_set_that_cannot_be_loaded_is_one_line_with_the_download_command(why, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("could not reach the hub\nmore lines")

    monkeypatch.setattr(wrapper, "why_unreachable", lambda *_, **__: why)
    monkeypatch.setattr(SmallSTS, "load_data", unreachable)
    model = PromCSE(small_prompt_encoder(tmp_path / "encoder"))
    with pytest.raises(DataError) as raised:
        wrapper.main_score(model, SmallSTS(), tmp_path / "cache")
    message = str(raised.value)
    assert "mteb:SmallSTS needs the data set memory of the hub, which cannot be loaded (" in message
    assert "Try: hf download memory --repo-type dataset --revision 1 on a machine" in message
    assert "\n" not in message


def test_an_unknown_mteb_task_names_the_nearest():
    with pytest.raises(ConfigError, match=r"there is no MTEB task 'STSBenchmrk'\. Try: mteb:STSBenchmark$"):
        load_tasks(["mteb:STSBenchmrk"], None)
