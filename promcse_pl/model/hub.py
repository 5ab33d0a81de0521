"""The Hugging Face hub: an encoder by its id, from the local cache where there is no network."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from promcse_pl.errors import EncoderError
from promcse_pl.paths import hide_home

FILES = ("*.json", "*.txt", "*.model")
"""Patterns of an encoder's config and tokenizer; those of its weights come on top."""
SECONDS = 10
"""A hub that has not answered by then counts as not reachable."""


def cached_without_network(name: str, revision: str | None, weights: Sequence[str]) -> Path | None:
    """Ask once whether the hub can be reached; if not, return the folder of the encoder in the local cache.

    Args:
        name: Hub id.
        revision: Commit, tag or branch.
        weights: Patterns of the weight files that are wanted.

    Returns:
        None: The hub can be reached, or refuses the name: what it says comes from the download.

    Raises:
        EncoderError: The hub cannot be reached and the cache does not hold the encoder; the message says what to download.
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
    except Exception as error:  # of the HTTP client of the installed huggingface_hub
        why = f"no network ({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]})"
    patterns = [*FILES, *weights]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
    except Exception as error:
        chosen = [part for pattern in patterns for part in ("--include", pattern)]
        chosen += ["--revision", revision] if revision else []
        raise EncoderError(
            f"the encoder {name} is neither a local folder nor an installed weight wheel, and the hub did not give it: {why}, "
            f"and it is not in the cache {hide_home(constants.HF_HUB_CACHE)}. On a machine with network type: "
            f"{shlex.join(['hf', 'download', name, *chosen, '--local-dir', 'FOLDER'])}. Then copy FOLDER here and set "
            "model.path=FOLDER (where a cache holds it already: HF_HOME=FOLDER_OF_THE_CACHE)"
        ) from error


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep the hub client's lines about retries off the terminal: what comes of them is raised."""
    import logging as levels

    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(levels.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
