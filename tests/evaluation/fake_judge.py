"""An OpenAI-compatible endpoint on this machine that scores answers by a rule."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "rule-1"


class FakeJudge(ThreadingHTTPServer):
    """Answers that equal an accepted one get 10 for correctness, others 2. Lengths decide the rest.

    replies: (status, body) pairs that are sent first, before any score. A body is sent as it is.
    is_asked: set by a request. go: requests wait until it is set, as it is at first.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: list[tuple[int, bytes]] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.is_asked = threading.Event()
        self.go = threading.Event()
        self.go.set()

    def handle_error(self, *_: object) -> None:
        """Let clients leave before they are answered."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


def rule(answer: str, accepted: list[str]) -> dict[str, int]:
    """The scores that the endpoint gives."""
    return {
        "relevance": 9 if answer else 0,
        "correctness": 10 if answer in accepted else 2,
        "clarity": min(len(answer), 10),
        "fluency": 7,
    }


@contextmanager
def fake_judge() -> Iterator[FakeJudge]:
    with FakeJudge() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeJudge

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._send(200, json.dumps({"object": "list", "data": [{"id": MODEL}]}).encode())

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers["authorization"])
        self.server.is_asked.set()
        self.server.go.wait(60)
        if self.server.replies:
            self._send(*self.server.replies.pop(0))
            return
        text = body["messages"][-1]["content"]
        parts = dict(re.findall(r"^=== ([\w ]+)\n(.*?)(?=\n===)", text, re.DOTALL | re.MULTILINE))
        answer = parts.get("answer to score", "").strip()
        scores = rule(answer, parts["accepted answers"].split("\n"))
        self._send(200, reply(f"My scores:\n```json\n{json.dumps(scores)}\n```"))

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Be quiet."""


def reply(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
