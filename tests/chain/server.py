"""A small Hugging Face Hub on loopback, in memory, with what `huggingface_hub` asks for models.

Repositories, commits with a parent, LFS uploads, downloads. `fail` and `cut` make one of the next requests go wrong.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
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
    commits: list[tuple[str, Files]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit({".gitattributes": b""})

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    def commit(self, files: Files) -> str:
        content = [str(len(self.commits)), *(f"{path} {oid(data)}" for path, data in sorted(files.items()))]
        self.commits.append((hashlib.sha1("\n".join(content).encode()).hexdigest(), files))
        return self.head


class Hub:
    """The server. `with Hub() as hub:` starts it; `hub.endpoint` is what HF_ENDPOINT should be."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[list[Any]] = []  # method, pattern, status or None, bytes before a cut, how many more times
        self.before_commit: Callable[[str], None] | None = None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.elsewhere = f"http://localhost:{self.server.server_port}"  # large files come from another host

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, path: str, status: int, times: int = 1) -> None:
        """The next `times` such requests are answered with `status`."""
        self.faults.append([method, path, status, 0, times])

    def cut(self, method: str, path: str, after: int, times: int = 1) -> None:
        """The connection of the next `times` such requests ends after so many bytes of the body."""
        self.faults.append([method, path, None, after, times])

    def files(self, repo: str) -> Files:
        """What a reader sees."""
        return dict(self.repos[repo].commits[-1][1])

    def put(self, repo: str, files: dict[str, bytes | None]) -> str:
        """Commit files past the protocol, as somebody else's client would (None deletes); the new commit."""
        place = self.repos.setdefault(repo, Repo())
        return place.commit(
            {path: data for path, data in {**place.commits[-1][1], **files}.items() if data is not None}
        )


def oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


class Refused(Exception):
    """An answer that is an error: its status, and the code that the client reads."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def serve(self) -> None:
        url = urlparse(self.path)
        path, length = unquote(url.path), int(self.headers.get("Content-Length") or 0)
        self.hub.requests.append((self.command, path))
        fault = next((f for f in self.hub.faults if f[0] == self.command and re.search(f[1], path)), None)
        if fault is not None:
            fault[4] -= 1
            if not fault[4]:
                self.hub.faults.remove(fault)
        self.cut_after = fault[3] if fault is not None and fault[2] is None else None
        if self.cut_after is not None and self.command != "GET":
            self.rfile.read(min(length, self.cut_after))
            return self.hang_up()
        self.body = self.rfile.read(length)
        try:
            if fault is not None and fault[2]:
                raise Refused(fault[2], "")
            for methods, pattern, answer in ROUTES:
                if self.command in methods and (match := re.fullmatch(pattern, path)):
                    return answer(self, *match.groups())
            raise Refused(404, "EntryNotFound")
        except Refused as refused:
            status, code = refused.args
            self.send(status, {"error": code}, {"X-Error-Code": code} if code else {})

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if self.cut_after is None else data[: self.cut_after])
            if self.cut_after is not None:
                self.wfile.flush()
                self.hang_up()

    def repo(self, name: str, write: bool = False) -> Repo:
        repo, known = self.hub.repos.get(name), self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if (write or (repo is not None and repo.private)) and not known:
            raise Refused(401, "RepoNotFound")
        if repo is None:
            raise Refused(404, "RepoNotFound")
        return repo

    def at(self, name: str, revision: str) -> tuple[str, Files]:
        repo = self.repo(name)
        for commit in reversed(repo.commits):
            if revision in ("main", commit[0]):
                return commit
        raise Refused(404, "RevisionNotFound")

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401, "")
        known = name in self.hub.repos
        if not known:
            self.hub.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        self.send(409 if known else 200, {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})

    def info(self, name: str, revision: str = "main") -> None:
        head, files = self.at(name, revision)
        self.send(200, {"id": name, "sha": head, "siblings": [{"rfilename": path} for path in sorted(files)]})

    def tree(self, name: str, revision: str) -> None:
        self.send(200, [entry(path, data) for path, data in sorted(self.at(name, revision)[1].items())])

    def preupload(self, name: str, revision: str) -> None:
        files, asked = self.repo(name, write=True).commits[-1][1], json.loads(self.body)["files"]
        found = [entry(file["path"], files.get(file["path"], b"")) for file in asked]
        answers = [
            {"path": each["path"], "uploadMode": "lfs" if is_large(each["path"]) else "regular", "shouldIgnore": False}
            | {"oid": each.get("lfs", each)["oid"] if each["path"] in files else None}
            for each in found
        ]
        self.send(200, {"files": answers, "commitOid": self.hub.repos[name].head})

    def batch(self, name: str) -> None:
        self.repo(name, write=True)
        objects = [{**each, "authenticated": True} for each in json.loads(self.body)["objects"]]
        for each in objects:
            if each["oid"] not in self.hub.uploads:
                each["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{each['oid']}", "header": {}}}
        self.send(200, {"transfer": "basic", "objects": objects})

    def upload(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise Refused(400, "")
        self.hub.uploads[digest] = self.body
        self.send(200)

    def commit(self, name: str, revision: str) -> None:
        if self.hub.before_commit is not None:
            self.hub.before_commit(name)
        repo = self.repo(name, write=True)
        header, *lines = [json.loads(line) for line in self.body.splitlines() if line]
        if header["value"].get("parentCommit") not in (None, repo.head):
            raise Refused(412, "")
        files = dict(repo.commits[-1][1])
        for line in lines:
            path = line["value"]["path"]
            if line["key"] == "file":
                files[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[path] = self.hub.uploads[line["value"]["oid"]]
            else:
                files = {key: data for key, data in files.items() if key != path and not key.startswith(path + "/")}
        made = repo.commit(files)
        url = f"{self.hub.endpoint}/{name}/commit/{made}"
        self.send(200, {"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""})

    def resolve(self, name: str, revision: str, path: str) -> None:
        head, files = self.at(name, revision)
        if path not in files:
            raise Refused(404, "EntryNotFound")
        data, headers = files[path], {"X-Repo-Commit": head}
        if is_large(path):
            digest = hashlib.sha256(data).hexdigest()
            self.hub.uploads[digest] = data
            headers |= {"ETag": f'"{digest}"', "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            return self.send(302, b"", {**headers, "Location": f"{self.hub.elsewhere}/cdn/{digest}"})
        self.send(200, data, {**headers, "ETag": f'"{oid(data)}"'})


def entry(path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "oid": oid(data), "size": len(data)}
    if is_large(path):
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return found


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", lambda self: self.send(200, {"errors": [], "warnings": []})),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/([^/]+)", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    ("POST", f"/api/models/{NAME}/preupload/([^/]+)", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/([^/]+)", Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/lfs/([0-9a-f]{64})", Handler.upload),
    ("GET HEAD", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("GET HEAD", "/cdn/([0-9a-f]{64})", lambda self, digest: self.send(200, self.hub.uploads[digest])),
)
