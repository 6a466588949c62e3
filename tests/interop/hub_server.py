"""A hub in a thread: what huggingface_hub asks for when it reads a repository, and when it writes one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_letmein"


@dataclass
class Repository:
    """Files by branch; who may read them."""

    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    private: bool = False
    gated: bool = False

    def commit(self, branch: str) -> str:
        content = [
            (path, hashlib.sha1(data).hexdigest()) for path, data in sorted(self.branches[branch].items())
        ]
        return hashlib.sha1(json.dumps([branch, content]).encode()).hexdigest()

    def find(self, revision: str) -> str | None:
        """The branch that a branch's name or its commit means."""
        for branch in self.branches:
            if revision in (branch, self.commit(branch)):
                return branch
        return None


@dataclass
class Hub:
    """A running server."""

    endpoint: str
    repositories: dict[str, Repository]
    asked: list[tuple[str, str]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.read()

    def do_GET(self) -> None:
        self.read()

    def read(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*found.groups())
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self.info(found[1], found[2] or "main")
        else:
            self.answer(404, {"X-Error-Message": f"no such path {path}"})

    def repository(self, repo_id: str) -> Repository | None:
        """The repository, or None when the refusal has been answered."""
        repository = self.hub.repositories.get(repo_id)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not known):
            self.answer(
                401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}
            )
            return None
        if repository.gated and not known:
            self.answer(
                403, {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {repo_id} is restricted."}
            )
            return None
        return repository

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository = self.repository(repo_id)
        if repository is None:
            return
        branch = repository.find(revision)
        if branch is None:
            self.answer(
                404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}
            )
            return
        commit = {"X-Repo-Commit": repository.commit(branch)}
        data = repository.branches[branch].get(path)
        if data is None:
            self.answer(
                404, {**commit, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            )
            return
        etag = hashlib.sha1(data).hexdigest()
        self.answer(200, {**commit, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}, data)

    def info(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id)
        if repository is None:
            return
        branch = repository.find(revision)
        if branch is None:
            self.answer(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            return
        siblings = [{"rfilename": path} for path in repository.branches[branch]]
        self.reply(
            {
                "id": repo_id,
                "sha": repository.commit(branch),
                "private": repository.private,
                "siblings": siblings,
            }
        )

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(("POST", path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"X-Error-Message": "Invalid username or password."})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.hub.repositories.setdefault(repo_id, Repository(private=private))
            self.reply({"url": f"{self.hub.endpoint}/{repo_id}"})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/([^/]+)", path):
            files = json.loads(body)["files"]
            self.reply(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
                    ]
                }
            )
        elif found := re.fullmatch(r"/api/models/(.+)/commit/([^/]+)", path):
            self.write(found[1], found[2], body)
        else:
            self.answer(404, {"X-Error-Message": f"no such path {path}"})

    def write(self, repo_id: str, branch: str, body: bytes) -> None:
        repository = self.hub.repositories[repo_id]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                value = line["value"]
                repository.branches[branch][value["path"]] = base64.b64decode(value["content"])
        oid = repository.commit(branch)
        self.reply(
            {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid, "success": True}
        )

    def reply(self, content: object) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def answer(self, status: int, headers: dict[str, str], data: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Run a hub on a free port of this machine."""
    hub = Hub("", repositories)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
