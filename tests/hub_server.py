"""A server that speaks the Hugging Face Hub's API, for tests: real sockets, and faults on demand.

It answers as huggingface.co does to what its client asks: the list of files with sizes and hashes,
``resolve`` with the metadata in headers, and large files by a redirect to another host.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE = 1 << 16


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repo:
    """A repository. Weights are in large file storage, as ``large`` says by the end of their names.

    tokens: those that may read it; None means that everybody may.
    gated: it is listed for everybody, but only ``tokens`` may fetch files.
    """

    files: dict[str, bytes]
    commit: str = COMMIT
    revisions: dict[str, str] = field(default_factory=dict)
    tokens: tuple[str, ...] | None = None
    gated: bool = False
    large: tuple[str, ...] = (".safetensors", ".gguf")

    def commit_of(self, revision: str) -> str | None:
        return {"main": self.commit, self.commit: self.commit, **self.revisions}.get(revision)


@dataclass
class Hub:
    """The state of a running server: repositories, faults, and the requests that came."""

    url: str
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    """Files whose content has one wrong bit on the way."""
    ignores_ranges: bool = False
    breaks: list[int] = field(default_factory=list)
    """After how many bytes the next answers with large files break off."""
    held_after: int | None = None
    """After how many bytes answers with large files wait for ``go_on``."""
    go_on: threading.Event = field(default_factory=threading.Event)
    is_held: threading.Event = field(default_factory=threading.Event)
    status: int | None = None
    """Answer everything with this status."""

    def fetched(self) -> list[str]:
        """The paths of files that were asked for with GET."""
        return [
            path for method, path, _ in self.requests if method == "GET" and "/api/" not in path
        ]


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub at an address of its own until the block ends."""
    hub = Hub("")

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.0: each answer ends its connection, so nothing outlives the server."""

    state: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.state.requests.append((self.command, path, headers))
        if self.state.status is not None:
            self._refuse(self.state.status, "", "the hub is unwell")
        elif path.startswith("/api/models/"):
            self._model(path.removeprefix("/api/models/"), "blobs" in parse_qs(url.query))
        elif path.startswith("/storage/"):
            self._stored(path.removeprefix("/storage/"))
        elif "/resolve/" in path:
            self._resolve(path)
        else:
            self._refuse(404, "RepoNotFound", "Repository not found")

    def log_message(self, *arguments: object) -> None:
        pass

    # ---- the API --------------------------------------------------------------------------------

    def _model(self, path: str, with_files: bool) -> None:
        name, _, revision = path.partition("/revision/")
        repo = self._repo(name)
        if repo is None:
            return
        commit = repo.commit_of(revision or "main")
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        siblings = [_described(repo, file, with_files) for file in repo.files]
        gated = "manual" if repo.gated else False
        answer = {"_id": "1", "id": name, "modelId": name, "sha": commit, "private": False}
        self._send(200, json.dumps({**answer, "gated": gated, "siblings": siblings}).encode())

    def _resolve(self, path: str) -> None:
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        repo = self._repo(name)
        if repo is None:
            return
        revision = next(
            (
                item
                for item in (*repo.revisions, repo.commit, "main")
                if rest.startswith(f"{item}/")
            ),
            None,
        )
        if revision is None:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
            return
        commit, file = repo.commit_of(revision), rest.removeprefix(f"{revision}/")
        if repo.gated and self._token() not in (repo.tokens or ()):
            status = 403 if self._token() else 401
            self._refuse(status, "GatedRepo", f"Access to model {name} is restricted")
            return
        if file not in repo.files:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": str(commit)})
            return
        content = repo.files[file]
        headers = {"X-Repo-Commit": str(commit), "Accept-Ranges": "bytes"}
        if file.endswith(repo.large):
            digest = sha256(content)
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            # Another host name, as the real hub's storage has: no token may follow.
            host = self.state.url.replace("127.0.0.1", "localhost")
            headers["Location"] = f"{host}/storage/{name}/{file}"
            self._send(302, b"", headers)
        else:
            self._content(file, content, headers | {"ETag": f'"{git_id(content)}"'})

    def _stored(self, path: str) -> None:
        if "authorization" in self.state.requests[-1][2]:
            self._refuse(400, "", "the storage must not get the hub's token")
            return
        owner, name, file = path.split("/", 2)
        content = self.state.repos[f"{owner}/{name}"].files[file]
        self._content(file, content, {"ETag": f'"{sha256(content)}"'})

    # ---- answers --------------------------------------------------------------------------------

    def _content(self, file: str, content: bytes, headers: Mapping[str, str]) -> None:
        hub, status, start = self.state, 200, 0
        wanted = self.headers.get("Range")
        if wanted is not None and not hub.ignores_ranges:
            status, start = 206, int(wanted.removeprefix("bytes=").partition("-")[0])
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            headers = {**headers, "Content-Range": span}
        if file in hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        body = content[start:]
        self._head(status, {**headers, "Content-Length": str(len(body))})
        if self.command == "HEAD":
            return
        limit = hub.breaks.pop(0) if hub.breaks and len(content) > PIECE else len(body)
        for place in range(0, min(limit, len(body)), PIECE):
            if hub.held_after is not None and place >= hub.held_after:
                hub.is_held.set()
                hub.go_on.wait()
            try:
                self.wfile.write(body[place : min(place + PIECE, limit)])
            except OSError:  # The client was killed.
                return

    def _repo(self, name: str) -> Repo | None:
        repo = self.state.repos.get(name)
        hidden = repo is not None and repo.tokens is not None and not repo.gated
        if repo is not None and (not hidden or self._token() in (repo.tokens or ())):
            return repo
        if self._token() is None:
            self._refuse(401, "RepoNotFound", "Invalid username or password.")
        else:
            self._refuse(404, "RepoNotFound", "Repository not found")
        return None

    def _token(self) -> str | None:
        text = self.headers.get("Authorization", "")
        return text.removeprefix("Bearer ") or None

    def _refuse(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        marks = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        self._send(status, json.dumps({"error": message}).encode(), {**marks, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self._head(status, {"Content-Length": str(len(body)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _described(repo: Repo, file: str, with_files: bool) -> dict[str, object]:
    if not with_files:
        return {"rfilename": file}
    content = repo.files[file]
    answer: dict[str, object] = {"rfilename": file, "size": len(content), "blobId": git_id(content)}
    if file.endswith(repo.large):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\n"
        answer["blobId"] = git_id(pointer.encode())
        size = {"sha256": sha256(content), "size": len(content), "pointerSize": len(pointer)}
        answer["lfs"] = size
    return answer
