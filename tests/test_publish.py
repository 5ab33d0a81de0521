"""Publishing adapters on a local stand-in of the Hugging Face Hub, and loading them from it."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from support.encoders import save_small_adapter, save_small_encoder
from support.hub_server import TOKEN, Hub, serving, use_endpoint

from promcse_pl.adapter import load_adapter, save_adapter
from promcse_pl.adapter_folder import BUNDLED
from promcse_pl.cli.main import main
from promcse_pl.embedder import PromCSE
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.tuning import Tuning
from promcse_pl.publish import push_adapter
from promcse_pl.utils.errors import AdapterError, ConfigError

TEXTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12"]
OWN = {"adapter.json", "adapter.safetensors", "README.md"}
AS_CREATED = {".gitattributes"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving() as hub:
        use_endpoint(monkeypatch, hub.url, tmp_path / "cache")
        yield hub


@pytest.fixture
def adapter(tmp_path) -> Path:
    return save_small_adapter(tmp_path / "small")


def some_model(folder: Path, tuning: Tuning | None = None, name: str | None = None, pooling: str = "avg") -> PromCSE:
    backbone = FrozenBackbone.load(str(folder if folder.is_dir() else save_small_encoder(folder)))
    if name is not None:
        backbone.identity = dataclasses.replace(backbone.identity, name=name)
    backbone.tune(tuning or Tuning())
    torch.manual_seed(5)
    model = PromCSE(PromptEncoder(backbone, length=3, pooling=pooling).eval())
    for weight in model.encoder.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def pushed(hub: Hub, name: str = "someone/small", branch: str = "main") -> dict[str, bytes]:
    """The files of the last commit, without those that the hub makes."""
    return {path: content for path, content in hub.commits(name, branch)[-1][1].items() if path not in AS_CREATED}


def test_push_uploads_the_files_of_the_adapter_and_nothing_else_in_one_commit(hub, adapter, capsys):
    for name in ("secrets.env", ".git/config", "encoder/notes.json", "adapter.json.bak"):
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_text("secret")
    assert main(["push", str(adapter), "someone/small", "--message", "First version"]) == 0
    ((message, _),) = hub.commits("someone/small")
    assert message == "First version"
    files = pushed(hub)
    assert set(files) == OWN
    for name in ("adapter.json", "adapter.safetensors"):
        assert files[name] == (adapter / name).read_bytes()
    assert 'PromCSE.from_pretrained("someone/small"' in files["README.md"].decode()
    assert not hub.repositories["someone/small"].private
    (url,) = re.findall(r"^http\S+$", capsys.readouterr().out, re.MULTILINE)
    assert url.startswith(f"{hub.url}/someone/small/commit/")


def test_a_pushed_adapter_loads_with_bit_equal_embeddings_and_only_its_files_are_downloaded(hub, tmp_path):
    model = some_model(tmp_path / "encoder")
    assert model.push_to_hub("someone/small", private=True, revision="v2", commit_message="From Python", token=TOKEN)
    assert hub.repositories["someone/small"].private
    assert [message for message, _ in hub.commits("someone/small", "v2")] == ["From Python"]
    assert hub.commits("someone/small") == []
    for name in (
        "notes.md",
        "pytorch_model.bin",
        "onnx/model.onnx",
        "adapter_old.bin",
        "encoder/model.safetensors.bak",
    ):
        hub.repositories["someone/small"].branches["v2"][-1][1][name] = b"large"
    loaded = PromCSE.from_pretrained("someone/small", revision="v2", device="cpu")
    assert np.array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
    assert set(hub.downloads) == OWN
    with pytest.raises(AdapterError, match="cannot download someone/small"):
        PromCSE.from_pretrained("someone/small", revision="v3")


@pytest.mark.parametrize("bundled", ["full", "no name"])
def test_an_encoder_in_the_adapter_is_pushed_downloaded_and_removed_when_it_is_outdated(hub, tmp_path, bundled):
    encoder = save_small_encoder(tmp_path / "encoder")
    whole = some_model(encoder, Tuning("full")) if bundled == "full" else some_model(encoder, name=BUNDLED)
    whole.push_to_hub("someone/small")
    files = pushed(hub)
    assert set(files) > OWN | {"encoder/config.json", "encoder/tokenizer.json", "encoder/model.safetensors"}
    loaded = PromCSE.from_pretrained("someone/small", device="cpu")
    assert np.array_equal(loaded.encode(TEXTS), whole.encode(TEXTS))
    assert set(hub.downloads) == set(files)
    some_model(encoder).push_to_hub("someone/small")
    assert set(pushed(hub)) == OWN


def test_a_card_that_someone_edited_on_the_hub_or_in_the_folder_is_not_replaced(hub, adapter):
    push_adapter(adapter, "someone/small")
    generated = pushed(hub)["README.md"]
    hub.repositories["someone/small"].branches["main"][-1][1]["README.md"] = generated + b"Edited on the hub.\n"
    (adapter / "adapter.json").write_text((adapter / "adapter.json").read_text() + "\n")
    push_adapter(adapter, "someone/small")
    assert pushed(hub)["README.md"].endswith(b"Edited on the hub.\n")
    (adapter / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    push_adapter(adapter, "someone/small")
    assert pushed(hub)["README.md"] == b"---\nlicense: mit\n---\nmine\n"


def test_a_generated_card_on_the_hub_is_updated(hub, adapter, tmp_path):
    push_adapter(adapter, "someone/small")
    before = pushed(hub)["README.md"]
    some_model(tmp_path / "small/encoder", Tuning("bias")).push_to_hub("someone/small")
    assert pushed(hub)["README.md"] != before


def test_the_licence_of_an_encoder_on_the_hub_is_read_from_its_card(hub, tmp_path):
    files = {path.name: path.read_bytes() for path in save_small_encoder(tmp_path / "encoder").iterdir()}
    card = b"---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n"
    model = some_model(tmp_path / "encoder", name="someone/encoder")
    some_model(tmp_path / "other").push_to_hub("someone/encoder")  # creates the repository
    hub.repositories["someone/encoder"].branches["main"].append(("files", {**files, "README.md": card}))
    model.push_to_hub("someone/small")
    text = pushed(hub)["README.md"].decode()
    assert "base_model: someone/encoder\nbase_model_relation: adapter\n" in text
    assert "language:\n- en\n- de\n" in text
    assert "license: apache-2.0\n" in text
    assert "Licence of the encoder: apache-2.0" in text
    loaded = PromCSE.from_pretrained("someone/small", device="cpu")
    assert np.array_equal(loaded.encode(TEXTS), model.encode(TEXTS))


def test_the_examples_of_a_card_on_a_branch_load_the_branch(hub, tmp_path):
    model = some_model(tmp_path / "encoder", Tuning("full"))
    model.push_to_hub("someone/small", revision="v2")
    text = pushed(hub, branch="v2")["README.md"].decode()
    examples = re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL)
    assert [language for language, _ in examples] == ["python", "python"]  # the commands load the default branch
    assert all('PromCSE.from_pretrained("someone/small", revision="v2")' in code for _, code in examples)
    scope: dict[str, object] = {}
    exec(examples[0][1], scope)
    np.testing.assert_array_equal(scope["embeddings"], model.encode(["A woman is reading.", "Someone reads."]))


def test_an_adapter_that_is_saved_during_a_push_is_pushed_as_it_was_at_its_start(hub, adapter, monkeypatch):
    before = {name: (adapter / name).read_bytes() for name in ("adapter.json", "adapter.safetensors")}
    create_repo = huggingface_hub.HfApi.create_repo

    def save_then_create(*args: object, **options: object) -> object:
        save_adapter(load_adapter(adapter), adapter, training={"rows": 77})
        return create_repo(*args, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", save_then_create)
    push_adapter(adapter, "someone/small")
    assert {name: pushed(hub)[name] for name in before} == before
    assert (adapter / "adapter.json").read_bytes() != before["adapter.json"]
    assert "| training rows | 77 |" not in pushed(hub)["README.md"].decode()


def test_a_commit_of_someone_else_during_a_push_is_an_error(hub, adapter, monkeypatch):
    create_commit = huggingface_hub.HfApi.create_commit

    def after_another(*args: object, **options: object) -> object:
        hub.repositories["someone/small"].branches["main"].append(("other", {"README.md": b"Edited"}))
        return create_commit(*args, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", after_another)
    with pytest.raises(
        AdapterError, match=r"answered 412\. .* another commit at the same time\. Try: the same command"
    ):
        push_adapter(adapter, "someone/small")
    assert pushed(hub) == {"README.md": b"Edited"}


def test_a_model_card_that_is_a_folder_is_an_error_before_the_repository_is_created(hub, adapter):
    (adapter / "README.md").unlink()
    (adapter / "README.md").mkdir()
    with pytest.raises(AdapterError, match=r"cannot copy .*README.md: Is a directory\. Try: "):
        push_adapter(adapter, "someone/small")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("to", "expected"), [("official", "its tokenizer is WordLevel, transformers 4.2.1 needs WordPiece"), ("peft", "")]
)
def test_an_adapter_on_the_hub_can_be_exported(hub, tmp_path, capsys, to, expected):
    some_model(tmp_path / "encoder", pooling="cls").push_to_hub("someone/small")
    assert main(["export", "someone/small", "--to", to, "-o", str(tmp_path / "out")]) == (2 if expected else 0)
    assert expected in capsys.readouterr().err  # the adapter was loaded


def test_a_private_push_to_a_public_repository_is_refused(hub, adapter, capsys, monkeypatch):
    push_adapter(adapter, "someone/small")
    assert main(["push", str(adapter), "someone/small", "--private"]) == 2
    error = capsys.readouterr().err
    assert "someone/small exists and is public, so the adapter was not uploaded" in error
    command = re.search(r"make it private first: (hf .*)$", error, re.MULTILINE)[1]
    from huggingface_hub.cli.hf import main as hf

    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as done:
        hf()
    assert not done.value.code
    assert main(["push", str(adapter), "someone/small", "--private"]) == 0


@pytest.mark.parametrize(
    ("environment", "repository", "expected"),
    [
        (
            {"HF_TOKEN": None},
            "someone/small",
            r"the hub answered 401\. The access token is missing .* Try: hf auth login",
        ),
        ({"HF_TOKEN": "hf_wrong"}, "someone/small", r"the hub answered 401\. The access token .* Try: hf auth login"),
        (
            {},
            "another/small",
            r"cannot push to another/small: the hub answered 403\. .* Try: an OWNER that `hf auth whoami`",
        ),
        ({}, "someone/a b", r"'someone/a b' is not the name of a repository: .* Try: OWNER/NAME"),
    ],
)
def test_a_refused_push_says_what_to_type(hub, adapter, capsys, monkeypatch, environment, repository, expected):
    for name, value in environment.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    assert main(["push", str(adapter), repository]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert re.search(expected, printed.err), printed.err
    assert TOKEN not in printed.err
    assert repository not in hub.repositories or not hub.commits(repository)


def test_a_repository_of_someone_else_that_exists_is_refused_too(hub, adapter):
    push_adapter(adapter, "someone/small")
    hub.repositories["another/small"] = hub.repositories.pop("someone/small")
    with pytest.raises(AdapterError, match="the hub answered 403"):
        push_adapter(adapter, "another/small")
    assert len(hub.commits("another/small")) == 1


def test_without_network_a_push_says_so(adapter, tmp_path, monkeypatch):
    use_endpoint(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    with pytest.raises(AdapterError, match=r"small: ConnectError: .* Try: the same command with a connection"):
        push_adapter(adapter, "someone/small")


def test_a_push_while_the_hub_is_switched_off_names_the_variable(hub, adapter, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match=r"someone/small: HF_HUB_OFFLINE is set\. Try: unset HF_HUB_OFFLINE$"):
        push_adapter(adapter, "someone/small")
    assert hub.requests == []


def test_a_damaged_adapter_is_not_pushed(hub, adapter):
    content = bytearray((adapter / "adapter.safetensors").read_bytes())
    content[-1] ^= 1
    (adapter / "adapter.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match="damaged or was modified"):
        push_adapter(adapter, "someone/small")
    with pytest.raises(AdapterError, match="is not an adapter"):
        push_adapter(adapter.parent / "encoder", "someone/small")
    assert hub.requests == []


def test_an_adapter_that_would_be_shadowed_is_not_pushed(hub, adapter):
    push_adapter(adapter, "someone/small")
    files = hub.repositories["someone/small"].branches["main"][-1][1]
    files["adapter/adapter.json"] = files["adapter.json"]
    with pytest.raises(AdapterError, match="contains an adapter in its folder adapter/"):
        push_adapter(adapter, "someone/small")


@pytest.mark.parametrize("example", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_examples_of_a_pushed_card_work_as_typed(hub, tmp_path, monkeypatch, example):
    model = some_model(tmp_path / "encoder", Tuning("full"))  # with its own encoder: nothing to replace in the examples
    model.push_to_hub("someone/small")
    text = pushed(hub)["README.md"].decode()
    monkeypatch.chdir(tmp_path)
    expected = model.encode(["A woman is reading.", "Someone reads."])
    examples = re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL)
    assert [language for language, _ in examples] == ["python", "bash", "python"]
    language, code = examples[example]
    if language == "python":
        scope: dict[str, object] = {}
        exec(code, scope)
        found = scope["embeddings"]
    else:
        prepare, command = code.splitlines()
        subprocess.run(prepare, shell=True, check=True)
        assert main(shlex.split(command)[1:]) == 0
        found = np.load("embeddings.npy")
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_a_private_adapter_without_login_says_what_to_type(hub, tmp_path, monkeypatch):
    some_model(tmp_path / "encoder").push_to_hub("someone/small", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AdapterError, match=r"If the repository is private, try: hf auth login$"):
        PromCSE.from_pretrained("someone/small")


def test_a_name_without_owner_is_that_of_the_account(hub, adapter):
    push_adapter(adapter, "small")
    assert set(pushed(hub)) == OWN


def test_an_invalid_name_is_a_config_error(adapter):
    with pytest.raises(ConfigError, match="is not the name of a repository"):
        push_adapter(adapter, "a/b/c")


def test_an_adapter_of_format_1_is_pushed_with_a_card(hub):
    folder = Path(__file__).parent / "adapter_formats/format1/adapter"
    push_adapter(folder, "someone/small")
    assert pushed(hub)["adapter.json"] == (folder / "adapter.json").read_bytes()
    assert json.loads(pushed(hub)["adapter.json"])["format"] == 1
    assert not (folder / "README.md").exists()
