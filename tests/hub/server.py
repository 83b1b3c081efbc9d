"""A small Hugging Face Hub on loopback: repositories, commits, LFS, downloads, and every way in which they fail.

It answers the requests that `huggingface_hub` makes for models: create a repository, ask how files are to be uploaded,
LFS batch and upload, commit (with its parent), list a tree, resolve a file with its ETag (LFS files through a
redirect, with ranges). All is kept in memory. `fail` and `cut` make one of the next requests go wrong.
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
from urllib.parse import parse_qs, unquote, urlparse

LFS_FROM = 10_000  # bytes; and every safetensors file
TOKEN = "hf_" + "a" * 34


@dataclass
class Blob:
    """The content of one file; `lfs` has its SHA-256 if it is a large one."""

    content: bytes
    lfs: str | None = None
    claimed: int | None = None  # a size that is not true

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.lfs or self.oid

    @property
    def size(self) -> int:
        return len(self.content) if self.claimed is None else self.claimed


@dataclass
class Commit:
    oid: str
    parent: str | None
    summary: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A repository: its commits, oldest first, all on one branch."""

    private: bool = False
    commits: list[Commit] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit("initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")})

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def commit(self, summary: str, files: dict[str, Blob]) -> Commit:
        parent = self.commits[-1].oid if self.commits else None
        state = repr((parent, summary, sorted((path, blob.etag) for path, blob in files.items())))
        self.commits.append(Commit(hashlib.sha1(state.encode()).hexdigest(), parent, summary, files))
        return self.head

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.head
        return next((commit for commit in self.commits if commit.oid == revision), None)


@dataclass
class Fault:
    """A request that goes wrong: its method, a pattern of its path, what happens, how many more times."""

    method: str
    path: str
    status: int = 503
    after: int | None = None  # bytes after which the connection is cut
    times: int = 1


class Hub:
    """The server. `with Hub() as hub:` starts it; `hub.endpoint` is what HF_ENDPOINT should be."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.before_commit: Callable[[str], None] | None = None
        self.lock = threading.RLock()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.elsewhere = f"http://localhost:{self.server.server_port}"  # large files come from another host

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, path: str, status: int = 503, times: int = 1) -> None:
        """The next `times` such requests are answered with `status`."""
        self.faults.append(Fault(method, path, status, None, times))

    def cut(self, method: str, path: str, after: int, times: int = 1) -> None:
        """The connection of the next `times` such requests ends after so many bytes of the body."""
        self.faults.append(Fault(method, path, 0, after, times))

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    if not fault.times:
                        self.faults.remove(fault)
                    return fault
        return None

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a reader sees."""
        commit = self.repos[repo].at(revision)
        assert commit is not None
        return {path: blob.content for path, blob in commit.files.items()}

    def put(self, repo: str, files: dict[str, bytes | Blob], summary: str = "by hand") -> str:
        """Commit files past the protocol, as somebody else's client would; the new revision."""
        with self.lock:
            place = self.repos.setdefault(repo, Repo())
            new = {path: self._blob(path, content) for path, content in files.items()}
            return place.commit(summary, {**place.head.files, **new}).oid

    def _blob(self, path: str, content: bytes | Blob) -> Blob:
        if isinstance(content, Blob):
            return content
        if not is_large(path, len(content)):
            return Blob(content)
        digest = hashlib.sha256(content).hexdigest()
        self.large[digest] = content
        return Blob(content, digest)


def is_large(path: str, size: int) -> bool:
    """Whether the Hub would keep this file in LFS."""
    return path.endswith(".safetensors") or size >= LFS_FROM


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message or code


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        url = urlparse(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.fault(self.command, path)
        self.hub.requests.append((self.command, path))
        self.cut_after = None if fault is None or fault.after is None else fault.after
        if self.cut_after is not None and self.command in ("PUT", "POST"):
            self.rfile.read(min(length, self.cut_after))
            return self._hang_up()
        self.body = self.rfile.read(length) if length else b"".join(self._chunks())
        try:
            if fault is not None and fault.status:
                raise Refused(fault.status, message="made to fail by the test")
            for method, pattern, name in ROUTES:
                if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                    return getattr(self, name)(*match.groups())
            raise Refused(404, "EntryNotFound", f"no such route: {self.command} {path}")
        except Refused as refused:
            code = {"X-Error-Code": refused.code} if refused.code else {}
            self._send(refused.status, {"error": refused.message}, code)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _chunks(self) -> Any:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().strip(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def _send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut_after is not None and self.cut_after < len(data):
            self.wfile.write(data[: self.cut_after])
            self.wfile.flush()
            return self._hang_up()
        self.wfile.write(data)

    # ---- who asks, and for what -----------------------------------------------------------------------------------

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get(name)
        if (write or (repo is not None and repo.private)) and not self._known:
            raise Refused(401, "RepoNotFound", "Invalid username or password.")
        if repo is None:
            raise Refused(404, "RepoNotFound", "Repository not found")
        return repo

    def _commit(self, name: str, revision: str) -> Commit:
        commit = self._repo(name).at(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # ---- the requests ---------------------------------------------------------------------------------------------

    def create(self) -> None:
        if not self._known:
            raise Refused(401, message="Invalid username or password.")
        asked = json.loads(self.body)
        name = "/".join(filter(None, (asked.get("organization") or "user", asked["name"])))
        with self.hub.lock:
            if name in self.hub.repos:
                url = {"url": f"{self.hub.endpoint}/{name}", "error": "You already created this model repo"}
                return self._send(409, url)
            self.hub.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        self._send(200, {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})

    def who(self) -> None:
        if not self._known:
            raise Refused(401, message="Invalid username or password.")
        self._send(200, {"name": "user", "type": "user", "orgs": [], "auth": {}})

    def yaml(self) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def info(self, name: str, revision: str | None = None) -> None:
        commit = self._commit(name, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self._send(
            200,
            {
                "id": name, "modelId": name, "sha": commit.oid, "private": self.hub.repos[name].private,
                "siblings": siblings, "tags": [], "downloads": 0, "likes": 0,
            },
        )  # fmt: skip

    def tree(self, name: str, revision: str) -> None:
        commit = self._commit(name, revision)
        self._send(200, [_entry(path, blob) for path, blob in sorted(commit.files.items())])

    def paths(self, name: str, revision: str) -> None:
        commit = self._commit(name, revision)
        content = self.body.decode()
        wanted = json.loads(content)["paths"] if content.startswith("{") else parse_qs(content)["paths"]
        self._send(200, [_entry(path, commit.files[path]) for path in wanted if path in commit.files])

    def preupload(self, name: str, revision: str) -> None:
        files = self._repo(name, write=True).head.files
        answers = []
        for file in json.loads(self.body)["files"]:
            there = files.get(file["path"])
            mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
            oid = None if there is None else there.etag
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": answers, "commitOid": self.hub.repos[name].head.oid})

    def batch(self, name: str) -> None:
        self._repo(name, write=True)
        objects = []
        for each in json.loads(self.body)["objects"]:
            answer: dict[str, Any] = {"oid": each["oid"], "size": each["size"], "authenticated": True}
            if each["oid"] not in self.hub.large:
                places = {"upload": f"/lfs/{each['oid']}", "verify": "/lfs-verify"}
                answer["actions"] = {key: {"href": self.hub.endpoint + at, "header": {}} for key, at in places.items()}
            objects.append(answer)
        self._send(200, {"transfer": "basic", "objects": objects})

    def upload(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise Refused(400, message="the content is not what its hash says")
        self.hub.large[digest] = self.body
        self._send(200)

    def verify(self) -> None:
        asked = json.loads(self.body)
        there = self.hub.large.get(asked["oid"])
        if there is None or len(there) != asked["size"]:
            raise Refused(400, message="not uploaded")
        self._send(200, {})

    def commit(self, name: str, revision: str) -> None:
        if self.hub.before_commit is not None:
            self.hub.before_commit(name)
        with self.hub.lock:
            repo = self._repo(name, write=True)
            lines = [json.loads(line) for line in self.body.splitlines() if line]
            header = lines[0]["value"]
            if header.get("parentCommit") not in (None, repo.head.oid):
                raise Refused(412, message="A commit has happened since. Please refresh and try again.")
            files = dict(repo.head.files)
            for line in lines[1:]:
                self._apply(files, line["key"], line["value"])
            made = repo.commit(header["summary"], files)
        url = f"{self.hub.endpoint}/{name}/commit/{made.oid}"
        self._send(200, {"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.large:
                raise Refused(400, message=f"{path}: its content was not uploaded")
            files[path] = Blob(self.hub.large[value["oid"]], value["oid"])
        elif key == "deletedFile" and path not in files:
            raise Refused(404, "EntryNotFound", f"{path}: no such file")
        else:
            for there in [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]:
                del files[there]

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._commit(name, revision)
        blob = commit.files.get(path)
        if blob is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs is not None:
            headers |= {"X-Linked-Etag": f'"{blob.lfs}"', "X-Linked-Size": str(blob.size)}
            return self._send(302, b"", {**headers, "Location": f"{self.hub.elsewhere}/cdn/{blob.lfs}"})
        self._content(blob.content, headers)

    def cdn(self, digest: str) -> None:
        self._content(self.hub.large[digest], {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, content, headers)
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        place = f"bytes {start}-{end}/{len(content)}"
        self._send(206, content[start : end + 1], {**headers, "Content-Range": place})


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    found = {"type": "file", "path": path, "oid": blob.oid, "size": blob.size}
    if blob.lfs is not None:
        found["lfs"] = {"oid": blob.lfs, "size": blob.size, "pointerSize": 134}
    return found


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("POST", "/api/repos/create", "create"),
    ("GET", "/api/whoami-v2", "who"),
    ("POST", "/api/validate-yaml", "yaml"),
    ("GET", f"/api/models/{NAME}", "info"),
    ("GET", f"/api/models/{NAME}/revision/([^/]+)", "info"),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", "tree"),
    ("POST", f"/api/models/{NAME}/paths-info/([^/]+)", "paths"),
    ("POST", f"/api/models/{NAME}/preupload/([^/]+)", "preupload"),
    ("POST", f"/api/models/{NAME}/commit/([^/]+)", "commit"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs/([0-9a-f]{64})", "upload"),
    ("POST", "/lfs-verify", "verify"),
    ("GET HEAD", f"/{NAME}/resolve/([^/]+)/(.+)", "resolve"),
    ("GET HEAD", "/cdn/([0-9a-f]{64})", "cdn"),
)
