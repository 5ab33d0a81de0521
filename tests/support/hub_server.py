"""A minimal Hugging Face Hub that stores commits in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml

TOKEN = "hf_token-of-someone"


@dataclass
class Repository:
    """A model repository.

    Attributes:
        private: Whether it is private.
        branches: Name -> commits, oldest first; of each its message and all files.
    """

    private: bool
    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)

    def commit_of(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the id and the files of a branch or commit."""
        for commits in self.branches.values():
            for number in range(len(commits)):
                if revision == commit_id(commits[number], number):
                    return revision, commits[number][1]
        if commits := self.branches.get(revision):
            return commit_id(commits[-1], len(commits) - 1), commits[-1][1]
        return None


def commit_id(commit: tuple[str, dict[str, bytes]], number: int) -> str:
    message, files = commit
    content = "".join(f"{name} {git_id(data)}" for name, data in sorted(files.items()))
    return hashlib.sha1(f"{number} {message} {content}".encode()).hexdigest()


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """The API that `create_repo`, `create_commit` and `snapshot_download` use; the account is `someone`.

    Attributes:
        repositories: OWNER/NAME -> repository.
        requests: Method and path of every request.
        downloads: Files that were downloaded.
    """

    daemon_threads = True

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.downloads: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def commits(self, name: str, branch: str = "main") -> list[tuple[str, dict[str, bytes]]]:
        """Return the commits of a branch without the initial commit of the hub."""
        return self.repositories[name].branches[branch][1:]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Do not log requests."""

    def do_HEAD(self) -> None:
        self._serve(b"")

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_POST

    def _serve(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            block = json.loads(body)["content"].split("---\n")[1]
            is_valid = isinstance(yaml.safe_load(block), dict)
            return self._answer(
                {"errors": [], "warnings": []} if is_valid else {"errors": [{}]}, 200 if is_valid else 400
            )
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/?(.*))?", path)
        if match:
            return self._api(*match.groups(), body)
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        return self._file(*match.groups()) if match else self._refuse(404, "EntryNotFound")

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _may_read(self, repository: Repository) -> bool:
        return self._has_token() or not repository.private

    def _may_write(self, name: str) -> bool:
        """Return whether the account may write to a repository; if not, answer 401 or 403."""
        if not self._has_token():
            self._refuse(401, "Invalid username or password.")
        elif not name.startswith("someone/"):
            self._refuse(403, "You don't have the rights to create a model under this namespace")
        else:
            return True
        return False

    def _create(self, request: dict[str, Any]) -> None:
        name = f"{request['organization'] or 'someone'}/{request['name']}"
        if not self._may_write(name):
            return None
        exists = name in self.server.repositories
        if not exists:
            first = ("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.server.repositories[name] = Repository(request.get("visibility") == "private", {"main": [first]})
        return self._answer({"url": f"{self.server.url}/{name}"}, 409 if exists else 200)

    def _api(self, name: str, action: str | None, rest: str | None, body: bytes) -> None:
        repository = self.server.repositories.get(name)
        if repository is None or not self._may_read(repository):
            return self._refuse(404 if self._has_token() else 401, "RepoNotFound")
        writes = action in ("branch", "preupload", "commit", "settings")
        if writes and not self._may_write(name):
            return None
        if action == "settings":
            repository.private = json.loads(body)["visibility"] == "private"
            return self._answer({})
        if action == "branch":
            exists = rest in repository.branches
            repository.branches.setdefault(rest or "", list(repository.branches["main"]))
            return self._answer({}, 409 if exists else 200)
        found = repository.commit_of(rest or "main")
        if found is None:
            return self._refuse(404, "RevisionNotFound")
        commit, files = found
        if action == "preupload":
            asked = json.loads(body)["files"]
            known = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            oids = {path: git_id(content) for path, content in files.items()}
            return self._answer({"files": [{**entry, "oid": oids.get(entry["path"])} for entry in known]})
        if action == "commit":
            return self._commit(repository, name, rest or "main", files, body)
        if action == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
                for path, content in files.items()
            ]
            return self._answer(entries)
        siblings = [{"rfilename": path} for path in files]
        return self._answer({"id": name, "sha": commit, "private": repository.private, "siblings": siblings})

    def _commit(self, repository: Repository, name: str, branch: str, files: dict[str, bytes], body: bytes) -> None:
        new, message = dict(files), ""
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") != (repository.commit_of(branch) or ("", {}))[0]:
                    return self._refuse(412, "A commit has happened since.")
            elif line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del new[value["path"]]
        repository.branches[branch].append((message, new))
        commit, _ = repository.commit_of(branch) or ("", {})
        return self._answer({"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})

    def _file(self, name: str, revision: str, path: str) -> None:
        repository = self.server.repositories.get(name)
        found = repository.commit_of(revision) if repository and self._may_read(repository) else None
        if found is None or path not in found[1]:
            return self._refuse(404, "EntryNotFound" if found else "RepoNotFound")
        commit, files = found
        if self.command == "GET":
            self.server.downloads.append(path)
        return self._send(200, files[path], {"X-Repo-Commit": commit, "ETag": f'"{git_id(files[path])}"'})

    def _refuse(self, status: int, reason: str) -> None:
        self._send(status, json.dumps({"error": reason}).encode(), {"X-Error-Code": reason, "X-Error-Message": reason})

    def _answer(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def use_endpoint(patch: pytest.MonkeyPatch, url: str, cache: object) -> None:
    """Set HF_ENDPOINT, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE of this process, which huggingface_hub reads at import."""
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/token")
    patch.setenv("HF_TOKEN", TOKEN)


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub until the block ends."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
