"""A minimal W&B server that stores what it receives and can stop answering."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """GraphQL, the file stream and file uploads of W&B, for one project.

    Attributes:
        runs: Id -> the run's fields as they were last sent, `history` (lines by position), `summary` and `complete`.
        uploads: Addresses that files were put to.
        views: Saved workspaces and reports: the variables of the request, `spec` as text.
        sweep: Content of the YAML file of a W&B sweep; an agent that asks for it gets its trials.
        trials: Trials that no agent has started yet: the id of the run, and its parameters.
        hangs: Set: nothing is answered any more.
    """

    daemon_threads = True

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.operations: list[tuple[str, dict[str, Any]]] = []
        self.uploads: list[str] = []
        self.views: list[dict[str, Any]] = []
        self.sweep = ""
        self.trials: list[tuple[str, dict[str, Any]]] = []
        self.hangs = threading.Event()
        self.closed = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the data of a GraphQL operation."""
        self.operations.append((operation, variables))
        if operation == "UpsertBucket":
            new = variables["name"] not in self.runs
            run = self.runs.setdefault(variables["name"], {"history": {}, "summary": {}, "complete": None})
            run.update({key: value for key, value in variables.items() if value is not None})
            bucket = {
                "id": "node",
                "name": variables["name"],
                "displayName": run.get("displayName"),
                "description": None,
                "config": "{}",
                "sweepName": None,
                "project": {"id": "p", "name": run["project"], "entity": {"id": "e", "name": "someone"}},
                "historyLineCount": len(run["history"]),
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if operation == "SweepWithRuns":
            return {"project": {"sweep": {"id": "s", "name": "s", "config": self.sweep, "runs": {"edges": []}}}}
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": "agent"}}}
        if operation == "Heartbeat":
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(self.commands(variables))}}
        if operation == "RunResumeStatus":
            run = self.runs.get(variables["name"])
            bucket = run and {
                "id": "node",
                "name": variables["name"],
                "summaryMetrics": json.dumps(run["summary"]),
                "displayName": run["displayName"],
                "logLineCount": 0,
                "historyLineCount": len(run["history"]),
                "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(run["history"][max(run["history"])])] if run["history"] else []),
                "eventsTail": "[]",
                "config": run.get("config", "{}"),
                "tags": run.get("tags", []),
                "notes": None,
                "wandbConfig": '{"t": 1}',
            }
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "someone"}, "bucket": bucket}}
        if operation in ("Viewer", "DefaultEntity", "GetDefaultEntity"):
            return {
                "viewer": {"id": "u", "entity": "someone", "username": "someone", "flags": "{}", "teams": {"edges": []}}
            }
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/put/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "node", "uploadHeaders": [], "files": files}}
        if operation == "ArtifactType":
            return {"project": {"artifact": None}}
        if operation == "ProjectInternalId":
            return {"project": {"id": "p", "internalId": "12"}}
        if operation == "GetProjects":
            return {
                "models": {"edges": [], "pageInfo": {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}}
            }
        if operation in ("UpsertView2", "upsertView"):
            self.views.append(variables)
            view = {key: variables[key] for key in ("name", "displayName", "description", "type", "spec")}
            project = {"id": "p", "name": variables["projectName"], "entityName": variables["entityName"]}
            return {"upsertView": {"view": {"id": "V1", "project": project, **view}, "inserted": True}}
        if operation == "CreateArtifact":
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        return {}

    def commands(self, heartbeat: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the next command of an agent: wait for its trial, run another trial, or exit."""
        if json.loads(heartbeat["runState"]):
            return []
        if not self.trials:
            return [{"type": "exit"}]
        run_id, parameters = self.trials.pop(0)
        arguments = {name: {"value": value} for name, value in parameters.items()}
        return [{"type": "run", "run_id": run_id, "program": "promcse", "args": arguments}]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Server

    def handle(self) -> None:
        """Answer until the other side has gone."""
        with suppress(ConnectionError):
            super().handle()

    def log_message(self, *_: Any) -> None:
        """Do not log requests."""

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.uploads.append(self.path)
        self._answer({})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        if self.server.hangs.is_set():
            self.server.closed.wait(120)
            return
        if self.path.endswith("/graphql"):
            body = json.loads(content)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
            self._answer({"data": self.server.answer(operation[1], body.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            self._stream(self.path.split("/")[-2], json.loads(content))
            self._answer({})
        else:
            self._answer({})

    def _stream(self, run_id: str, body: dict[str, Any]) -> None:
        run = self.server.runs[run_id]
        files = body.get("files", {})
        if history := files.get("wandb-history.jsonl"):
            for position, line in enumerate(history["content"], history["offset"]):
                run["history"][position] = json.loads(line)
        for line in files.get("wandb-summary.json", {}).get("content", []):
            run["summary"] |= json.loads(line)
        if body.get("complete"):
            run["complete"] = body["exitcode"]

    def _answer(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving() -> Iterator[Server]:
    """Run a server until the block ends."""
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.closed.set()
        server.shutdown()
        server.server_close()
