"""A small Hugging Face Hub on loopback, in memory, with what `huggingface_hub` asks for models.

Repositories, commits with a parent, downloads; all files are regular ones, none is in LFS.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_" + "a" * 34
Files = dict[str, bytes]


@dataclass
class Repo:
    """A repository: its commits (id, files), oldest first, all on one branch."""

    private: bool = False
    commits: list[tuple[str, Files]] = field(default_factory=lambda: [(secrets.token_hex(20), {})])

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    def commit(self, files: Files) -> str:
        self.commits.append((secrets.token_hex(20), files))
        return self.head


class Hub(ThreadingHTTPServer):
    """The server, started; `endpoint` is what HF_ENDPOINT should be."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        # Each spoils one request: its method, a part of its path, and the status of the answer; with None the
        # connection ends half way through the request's body, or through the answer's where the request has none.
        self.faults: list[tuple[str, str, int | None]] = []
        self.before_commit: Callable[[], object] | None = None  # called once
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def files(self, repo: str) -> Files:
        """What a reader sees."""
        return dict(self.repos[repo].commits[-1][1])

    def put(self, repo: str, files: dict[str, bytes | None]) -> None:
        """Commit files past the protocol, as somebody else's client would (None deletes)."""
        place = self.repos.setdefault(repo, Repo())
        place.commit({path: data for path, data in {**self.files(repo), **files}.items() if data is not None})


def oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refused(Exception):
    """An answer that is an error: its status, and the code that the client reads."""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def serve(self) -> None:
        path, length = unquote(urlparse(self.path).path), int(self.headers.get("Content-Length") or 0)
        self.server.requests.append((self.command, path))
        fault = next((each for each in self.server.faults if each[0] == self.command and each[1] in path), None)
        if fault is not None:
            self.server.faults.remove(fault)
        self.is_cut = fault is not None and fault[2] is None
        self.body = self.rfile.read(length // 2 if self.is_cut else length)
        if self.is_cut and self.body:
            return self.hang_up()
        try:
            if fault is not None and fault[2]:
                raise Refused(fault[2], "")
            for methods, pattern, answer in ROUTES:
                if self.command in methods and (match := re.fullmatch(pattern, path)):
                    return answer(self, *match.groups())
            raise Refused(404, "EntryNotFound")
        except Refused as refused:
            status, code = refused.args
            self.send(status, {"error": code}, **{"X-Error-Code": code})

    do_GET = do_HEAD = do_POST = serve

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def send(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.is_cut else data)
        if self.is_cut:
            self.hang_up()

    def check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401, "RepoNotFound")

    def at(self, name: str, revision: str = "main") -> tuple[str, Files]:
        """A commit of a repository that this client may read."""
        repo = self.server.repos.get(name)
        if repo is None:
            raise Refused(404, "RepoNotFound")
        if repo.private:
            self.check_token()
        return next(commit for commit in reversed(repo.commits) if revision in ("main", commit[0]))

    def create(self) -> None:
        self.check_token()
        asked = json.loads(self.body)
        name, private = f"{asked['organization']}/{asked['name']}", asked.get("visibility") == "private"
        self.server.repos.setdefault(name, Repo(private or bool(asked.get("private"))))
        self.send(200, {"url": f"{self.server.endpoint}/{name}"})

    def info(self, name: str, revision: str = "main") -> None:
        head, files = self.at(name, revision)
        self.send(200, {"id": name, "sha": head, "siblings": [{"rfilename": path} for path in sorted(files)]})

    def tree(self, name: str, revision: str) -> None:
        files = sorted(self.at(name, revision)[1].items())
        self.send(200, [{"type": "file", "path": path, "oid": oid(data), "size": len(data)} for path, data in files])

    def preupload(self, name: str) -> None:
        self.check_token()
        head, files = self.at(name)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        known = {path: oid(data) for path, data in files.items()}
        regular = {"uploadMode": "regular", "shouldIgnore": False}
        answers = [{"path": path, "oid": known.get(path), **regular} for path in paths]
        self.send(200, {"files": answers, "commitOid": head})

    def commit(self, name: str) -> None:
        self.check_token()
        before, self.server.before_commit = self.server.before_commit, None
        if before is not None:
            before()
        head, files = self.at(name)
        header, *lines = [json.loads(line) for line in self.body.splitlines() if line]
        if header["value"].get("parentCommit") not in (None, head):
            raise Refused(412, "")
        files = dict(files)
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            else:
                del files[line["value"]["path"]]
        made = self.server.repos[name].commit(files)
        self.send(200, {"commitOid": made, "commitUrl": f"{self.server.endpoint}/{name}/commit/{made}"})

    def resolve(self, name: str, revision: str, path: str) -> None:
        head, files = self.at(name, revision)
        if path not in files:
            raise Refused(404, "EntryNotFound")
        self.send(200, files[path], ETag=f'"{oid(files[path])}"', **{"X-Repo-Commit": head})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", lambda self: self.send(200, {"errors": [], "warnings": []})),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/([^/]+)", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    ("POST", f"/api/models/{NAME}/preupload/main", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/main", Handler.commit),
    ("GET HEAD", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
)
