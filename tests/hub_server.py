"""A server on this machine that plays the Hugging Face hub: revisions, tokens, ranges, and mishaps as asked for."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """The files of each commit, and the commit of each branch or tag."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    gated: bool = False  # for everybody without the hub's token
    announced: dict[str, str] = field(default_factory=dict)  # {file: a SHA-256 that it does not have}

    def push(self, files: dict[str, bytes], reference: str = "main") -> str:
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit], self.references[reference] = files, commit
        return commit


class Hub:
    """The hub; `breaks` transfers of weights stop half-way."""

    token = "hf_of_this_test"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.breaks = 0
        self.sent: list[tuple[str, int, int]] = []  # (file, first byte, bytes) of each answer with a body
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def push(self, name: str, folder: Path, reference: str = "main") -> str:
        """Push the files of a folder; returns the commit."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        return self.repositories.setdefault(name, Repository()).push(files, reference)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        if len(parts) < 4:
            return _refuse(request, 404, "")  # the library reports what it is used for
        owner, name, kind, *rest = parts[2:] if is_api else parts
        repository = self.repositories.get(f"{owner}/{name}")
        if repository is None:
            return _refuse(request, 401, "RepoNotFound")
        if repository.gated and request.headers.get("Authorization") != f"Bearer {self.token}":
            return _refuse(request, 401, "GatedRepo")
        # A revision may have slashes, encoded in the URL.
        found = next((i for i in range(1, len(rest) + 1) if "/".join(rest[:i]) in _revisions(repository)), None)
        if found is None:
            return _refuse(request, 404, "RevisionNotFound")
        commit = _revisions(repository)["/".join(rest[:found])]
        files = repository.commits[commit]
        if is_api:
            return _send(request, json.dumps(_listing(kind, commit, files)).encode(), {})
        file = "/".join(rest[found:])
        if file not in files:
            return _refuse(request, 404, "EntryNotFound", {"X-Repo-Commit": commit})
        return self.send_file(request, file, files[file], commit, repository)

    def send_file(
        self, request: BaseHTTPRequestHandler, name: str, content: bytes, commit: str, repository: Repository
    ) -> None:
        sha256 = repository.announced.get(name, hashlib.sha256(content).hexdigest())
        etag = sha256 if name.endswith(".safetensors") else hashlib.sha1(content).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        cut = len(body)
        if self.breaks and name.endswith(".safetensors") and request.command == "GET":
            self.breaks, cut = self.breaks - 1, len(body) // 2
        if request.command == "GET":
            self.sent.append((name, start, cut))
        _send(request, body, headers, 206 if start else 200, cut)


def _revisions(repository: Repository) -> dict[str, str]:
    return repository.references | {commit: commit for commit in repository.commits}


def _listing(kind: str, commit: str, files: dict[str, bytes]) -> object:
    if kind == "tree":
        return [{"type": "file", "path": name, "size": len(content), "oid": "0"} for name, content in files.items()]
    return {"id": "a/b", "sha": commit, "siblings": [{"rfilename": name} for name in files]}


def _refuse(request: BaseHTTPRequestHandler, status: int, why: str, headers: dict[str, str] | None = None) -> None:
    _send(request, b"", {"X-Error-Code": why, "X-Error-Message": why, **(headers or {})}, status)


def _send(
    request: BaseHTTPRequestHandler, body: bytes, headers: dict[str, str], status: int = 200, cut: int | None = None
) -> None:
    request.send_response(status)
    for key, value in {**headers, "Content-Length": str(len(body))}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body[:cut])
        if cut is not None and cut < len(body):
            request.close_connection = True
