"""Blocks that go to agents, from real files."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from coordinator.server import Coordinator
from wire.messages import BlockChunk, FetchBlock

CONTENT = bytes(range(200))
SHA256 = "a" * 64


class Store:
    """One file, which repairs write again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def path(self, sha256: str) -> Path:
        return self._path

    def can_make(self, sha256: str) -> bool:
        return True

    def repair(self, sha256: str) -> None:
        self._path.write_bytes(CONTENT)


class Sent:
    """Keeps what would cross the network."""

    def __init__(self) -> None:
        self.chunks: list[tuple[BlockChunk, bytes]] = []

    async def send(self, chunk: BlockChunk, payload: bytes) -> None:
        self.chunks.append((chunk, payload))


def test_a_file_cut_shorter_than_what_the_agent_has_is_made_again_and_sent_on(
    tmp_path: Path,
) -> None:
    path = tmp_path / SHA256
    path.write_bytes(CONTENT[:100])
    server, sent = SimpleNamespace(_store=Store(path)), Sent()
    sending = Coordinator._send(cast(Any, server), FetchBlock(SHA256, 150), cast(Any, sent))
    assert asyncio.run(sending)
    assert sent.chunks == [(BlockChunk(150, 200), CONTENT[150:])]
