"""The time of a prompt: one formula for the planner, for predictions and for the coordinator.

A prompt runs in chunks. A stage computes one chunk while the next stage computes the chunk before
it, and links send meanwhile. So n tokens in chunks of c rows take

    the time of one chunk through all stages and links
    + (n / c - 1) x the time of a chunk in the slowest stage or link

until the last row has left the last stage. A last chunk with fewer rows counts by its rows. The
first token comes when the head has computed the last row as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from wire import limits

CHUNK_TOKENS = (limits.PREFILL_CHUNK_TOKENS, 32, 16)
"""Rows that a chunk may have. With fewer than 16 a row takes longer."""


@dataclass(frozen=True, slots=True)
class Passage:
    """The times of a stage or a link, which chunks pass one after the other.

    A chunk keeps it busy for ``fixed_s`` and for ``row_s`` per row. The chunk arrives ``delay_s``
    after that, and the next chunk can pass meanwhile.
    """

    fixed_s: float
    row_s: float
    delay_s: float = 0.0

    def busy_s(self, rows: int) -> float:
        """Seconds for a chunk of so many rows."""
        return self.fixed_s + rows * self.row_s


NO_TIME = Passage(0.0, 0.0)


def block_passage(decode_s: float, prefill_s_per_token: float) -> Passage:
    """The passage of a block: linear between one row and a whole chunk."""
    whole = limits.PREFILL_CHUNK_TOKENS
    whole_s = whole * prefill_s_per_token
    fixed_s = min(max((whole * decode_s - whole_s) / (whole - 1), 0.0), whole_s)
    return Passage(fixed_s, (whole_s - fixed_s) / whole)


def chunk_choices(prompt_tokens: int) -> tuple[int, ...]:
    """Rows that a chunk of such a prompt may have, each number once, the largest first."""
    return tuple(dict.fromkeys(min(rows, prompt_tokens) for rows in CHUNK_TOKENS))


def turns(prompt_tokens: int, chunk_tokens: int) -> float:
    """The number of chunks after the first, as a fraction: a shorter one counts by its rows."""
    return max(prompt_tokens / chunk_tokens - 1, 0.0) if prompt_tokens else 0.0


def prompt_s(passages: Sequence[Passage], prompt_tokens: int, chunk_tokens: int) -> float:
    """Seconds of a prompt through all ``passages``, in chunks of so many rows."""
    if not prompt_tokens:
        return 0.0
    rows = min(chunk_tokens, prompt_tokens)
    busy_s = [passage.busy_s(rows) for passage in passages]
    delays_s = [passage.delay_s for passage in passages]
    return math.fsum([*busy_s, *delays_s]) + turns(prompt_tokens, rows) * max(busy_s)


def best_chunk_tokens(passages: Sequence[Passage], prompt_tokens: int) -> int:
    """Rows of a chunk with which the prompt takes least time; the most rows of equal ones.

    Small chunks fill a pipeline sooner, but each costs every stage one more call.
    """
    return min(CHUNK_TOKENS, key=lambda rows: (prompt_s(passages, prompt_tokens, rows), -rows))
