"""Load encoders from the Hugging Face Hub, or from its local cache if the hub is not reachable."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from promcse_pl.utils.errors import EncoderError
from promcse_pl.utils.paths import hide_home

FILES = ("*.json", "*.txt", "*.model")
"""File patterns of config and tokenizer; the patterns of the weights are added to them."""
SECONDS = 10
"""Timeout of the request that checks whether the hub is reachable, in seconds."""


def cached_without_network(name: str, revision: str | None, weights: Sequence[str]) -> Path | None:
    """Return the encoder's folder in the local cache if the hub cannot be reached.

    Args:
        name: Hub id.
        revision: Commit, tag or branch.
        weights: File patterns of the weights.

    Returns:
        Folder in the cache; None if the hub can be reached or rejects the name (the download then reports its error).

    Raises:
        EncoderError: The hub cannot be reached and the encoder is not cached; the message has the download command.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=SECONDS)
        return None
    except (HfHubHTTPError, HFValidationError):
        return None
    except OfflineModeIsEnabled:
        why = "HF_HUB_OFFLINE is set"
    except Exception as error:  # depends on the HTTP client of huggingface_hub
        why = f"no network ({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]})"
    patterns = [*FILES, *weights]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
    except Exception as error:
        chosen = [part for pattern in patterns for part in ("--include", pattern)]
        chosen += ["--revision", revision] if revision else []
        raise EncoderError(
            f"the encoder {name} cannot be downloaded: {why}. It is neither a local folder nor an installed weight wheel, nor in "
            f"the cache {hide_home(constants.HF_HUB_CACHE)}. On a machine with network access run: "
            f"{shlex.join(['hf', 'download', name, *chosen, '--local-dir', 'FOLDER'])}. Then copy FOLDER here and set "
            "model.path=FOLDER (or HF_HOME=FOLDER if another cache has it)"
        ) from error


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence the hub client's log lines about retries; the final error is raised."""
    import logging as levels

    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(levels.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
