"""Answers to identical requests, kept in memory. Off unless the coordinator is told a size.

Only greedy answers are kept, since others are drawn anew each time. An answer belongs to the
deployment that gave it: after a load or a recovery, nothing of the earlier one is found. Prompts
are not kept, only a hash of them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import replace

from coordinator.serving.pieces import Piece
from wire.messages import Sampling

Key = bytes

PIECE_BYTES = 400
"""About the memory of a piece: its object, a token, a short text, and its place in a list."""

LARGEST_SHARE = 8
"""An answer that needs more than this part of the size is not kept."""


class KeptAnswers:
    """At most ``limit_bytes`` of answers. Those used longest ago make room."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._answers: OrderedDict[Key, tuple[Piece, ...]] = OrderedDict()

    def key(
        self,
        epoch: int,
        prompt: Sequence[int],
        sampling: Sampling,
        stop: Sequence[str],
        markers: Collection[str],
    ) -> Key | None:
        """Return what identical requests have in common. None if this one's answer is not kept."""
        if (
            self._limit_bytes == 0
            or sampling.temperature != 0
            or sampling.top_logprobs >= 0
            or sampling.prompt_logprobs
        ):
            return None
        asked = epoch, tuple(prompt), replace(sampling, seed=0), tuple(stop), sorted(markers)
        return hashlib.sha256(repr(asked).encode()).digest()

    def find(self, key: Key) -> tuple[Piece, ...] | None:
        """Return a whole answer, or None."""
        found = self._answers.get(key)
        if found is not None:
            self._answers.move_to_end(key)
        return found

    async def record(
        self, key: Key, pieces: AsyncGenerator[Piece, None]
    ) -> AsyncGenerator[Piece, None]:
        """Pass an answer on, and keep it once it is whole. Pauses in it are left out."""
        answer: list[Piece] = []
        async with aclosing(pieces):
            async for piece in pieces:
                if piece.withdraws:
                    answer.clear()
                elif not piece.notice:
                    answer.append(piece)
                if piece.finish:  # Nobody need ask for more.
                    self._keep(key, tuple(answer))
                yield piece

    def _keep(self, key: Key, answer: tuple[Piece, ...]) -> None:
        size_bytes = _size_bytes(answer)
        if key in self._answers or size_bytes > self._limit_bytes // LARGEST_SHARE:
            return
        self._answers[key] = answer
        self._bytes += size_bytes
        while self._bytes > self._limit_bytes:
            self._bytes -= _size_bytes(self._answers.popitem(last=False)[1])


def _size_bytes(answer: tuple[Piece, ...]) -> int:
    return sum(PIECE_BYTES + 4 * len(piece.text) for piece in answer)
