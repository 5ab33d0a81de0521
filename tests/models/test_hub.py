"""Hub encoders without network access, as on cluster nodes."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from support.encoders import save_small_encoder

from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.hub import locate
from promcse_pl.utils.errors import EncoderError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a hub that cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    return tmp_path / "cache"


def test_without_network_the_error_has_the_download_command_at_once_and_no_retries_are_shown(cache, capfd):
    started = time.perf_counter()
    with pytest.raises(EncoderError) as caught:
        locate("someone/some-encoder", None)
    assert time.perf_counter() - started < 5
    message = str(caught.value)
    assert "cannot be downloaded: no network (" in message
    assert str(cache) in message
    assert "use model.path=FOLDER in a run, --encoder FOLDER elsewhere" in message
    assert "HF_HOME=" in message
    assert capfd.readouterr().err == ""
    command = re.search(r"run: (hf download .*?)\. Then", message)[1]
    done = subprocess.run(
        [Path(sys.executable).with_name("hf"), *shlex.split(command)[1:], "--dry-run"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 2, f"the command is refused as typed: {done.stderr}"
    assert "Usage" not in done.stderr


def test_the_download_covers_the_pipeline_of_a_sentence_transformers_model(cache):
    with pytest.raises(EncoderError) as caught:
        locate("someone/some-encoder", None)
    words = shlex.split(re.search(r"run: (hf download .*?)\. Then", str(caught.value))[1])
    patterns = [words[i + 1] for i, word in enumerate(words) if word == "--include"]
    needed = [
        *("config.json", "tokenizer.json", "model.safetensors", "modules.json", "sentence_bert_config.json"),
        *("config_sentence_transformers.json", "1_Pooling/config.json", "2_Dense/config.json"),
        *("2_Dense/model.safetensors", "3_Dense/model.safetensors", "4_Normalize/config.json"),
    ]
    assert list(huggingface_hub.utils.filter_repo_objects(needed, allow_patterns=patterns)) == needed
    others = ["pytorch_model.bin", "2_Dense/pytorch_model.bin", "onnx/model.onnx"]
    assert not list(huggingface_hub.utils.filter_repo_objects(others, allow_patterns=patterns))


def test_without_network_a_cached_encoder_is_loaded_at_once(cache, tmp_path):
    repository = cache / "models--someone--some-encoder"
    save_small_encoder(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    started = time.perf_counter()
    assert locate("someone/some-encoder", None) == (repository / "snapshots" / COMMIT, COMMIT)
    assert time.perf_counter() - started < 5
    assert FrozenBackbone.load("someone/some-encoder").identity.revision == COMMIT
