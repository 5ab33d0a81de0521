"""Publish adapters on the Hugging Face Hub; `PromCSE.from_pretrained` downloads them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from promcse_pl.adapter import adapter_files, read_checked
from promcse_pl.adapter_folder import BUNDLED_NAME, DESCRIPTION, find_adapter
from promcse_pl.model_card import CARD, encoder_metadata, is_generated, may_replace_card, model_card
from promcse_pl.models.encoder_files import first_line
from promcse_pl.utils.errors import AdapterError, ConfigError, PromcseError
from promcse_pl.utils.files import read_unchanged
from promcse_pl.utils.paths import expand, require_regular_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_INNER = f"adapter/{DESCRIPTION}"
"""`PromCSE.from_pretrained` loads this file of a repository instead of an adapter at the top level."""


def push_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload an adapter and its model card in one commit; the repository is created if it does not exist.

    Only the files of the adapter are uploaded; other files of the repository are kept. A model card that a person wrote or edited
    is not replaced by a generated one. A card edited in the folder replaces the card in the repository, even an edited one.

    Args:
        folder: Folder of an adapter or of a run.
        repo_id: OWNER/NAME.
        private: Whether a new repository is private; None: the default of the owner's account (usually public).
        revision: Branch; created if it does not exist. None: the default branch.
        commit_message: None: "Upload adapter".
        token: Access token; None: that of `hf auth login` or of HF_TOKEN.

    Returns:
        The URL of the commit.

    Raises:
        AdapterError: The folder is not an adapter or is damaged; or the hub cannot be reached or refuses the upload.
        ConfigError: `repo_id` is not a valid name.
    """
    path = expand(folder)
    found = find_adapter(path) or path
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    with TemporaryDirectory() as temporary, _clear_errors(repo_id):
        copy = Path(temporary, "adapter")
        about, parameters = read_unchanged(found, DESCRIPTION, lambda: _copy(found, copy))
        api = HfApi(token=token)
        repo = _open_repository(api, repo_id, private=private, revision=revision)
        before = api.model_info(repo, revision=revision)
        present = {file.rfilename for file in before.siblings or []}
        if _INNER in present:
            raise AdapterError(
                f"{repo} contains an adapter in its folder adapter/, which from_pretrained would load instead of the new one. "
                "Try: another repository"
            )
        files: dict[str, Path | bytes] = {
            str(path.relative_to(copy)): path for path in copy.rglob("*") if path.is_file()
        }
        outdated = [name for name in present if name.startswith(f"{BUNDLED_NAME}/") and name not in files]
        if CARD not in files and (CARD not in present or _has_generated_card(api, repo, before.sha)):
            card = encoder_metadata(about["encoder"]["name"], about["encoder"]["revision"], online=True)
            text = model_card(about, name=repo, parameters=parameters, encoder_card=card, revision=revision)
            files[CARD] = text.encode()
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(CommitOperationDelete(name) for name in outdated),
        ]
        message = commit_message or "Upload adapter"
        commit = api.create_commit(
            repo, operations, commit_message=message, revision=revision, parent_commit=before.sha
        )
        return str(commit.commit_url)


def _copy(folder: Path, copy: Path) -> tuple[dict[str, Any], int]:
    """Copy an adapter, and its model card if it was written or edited by a person; return the result of `read_checked`."""
    about, parameters = read_checked(folder)
    shutil.rmtree(copy, ignore_errors=True)  # of an earlier attempt
    files = adapter_files(folder, about)
    if not may_replace_card(folder):
        files[CARD] = folder / CARD
    for name, path in files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(require_regular_file(path), copy / name)
        except OSError as error:
            reason = error.strerror or error
            raise AdapterError(f"cannot copy {path}: {reason}. Try: make it a readable file") from error
    return about, parameters


def _open_repository(api: HfApi, repo_id: str, *, private: bool | None, revision: str | None) -> str:
    """Create a repository and its branch if absent, and return its full name."""
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo).private:
        raise AdapterError(
            f"{repo} exists and is public, so the adapter was not uploaded. Try: another name, or make it private first: "
            f"hf repos settings {repo} --private"
        )
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    return str(repo)


def _has_generated_card(api: HfApi, repo: str, revision: str | None) -> bool:
    """Return whether the model card in a repository was generated and not edited since."""
    return is_generated(Path(api.hf_hub_download(repo, CARD, revision=revision)).read_bytes().decode(errors="replace"))


@contextmanager
def _clear_errors(repo_id: str) -> Iterator[None]:
    """Convert errors of huggingface_hub to errors of this package with a command to try."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except PromcseError:
        raise
    except HFValidationError as error:
        raise ConfigError(
            f"{repo_id!r} is not the name of a repository: {first_line(error)}. Try: OWNER/NAME, as in someone/my-adapter"
        ) from error
    except OfflineModeIsEnabled as error:
        raise AdapterError(f"cannot push to {repo_id}: HF_HUB_OFFLINE is set. Try: unset HF_HUB_OFFLINE") from error
    except HfHubHTTPError as error:
        advice = {
            401: "The access token is missing or not valid. Try: hf auth login",
            403: "The account or its token may not write there. Try: an OWNER that `hf auth whoami` prints, or `hf auth login` "
            "with a token that has write access",
            412: "The repository received another commit at the same time. Try: the same command again",
        }
        status = error.response.status_code
        reason = advice.get(status, first_line(error))
        raise AdapterError(f"cannot push to {repo_id}: the hub answered {status}. {reason}") from error
    except Exception as error:  # connection errors depend on the HTTP client of huggingface_hub
        raise AdapterError(
            f"cannot push to {repo_id}: {type(error).__name__}: {first_line(error)}. Try: the same command with a connection to "
            "the hub; HF_ENDPOINT selects another one"
        ) from error
