"""What a plan predicts of many rows on their way: a prompt in chunks, several sequences at once.

``Plan.prefill_s_per_token`` adds up what one token costs everywhere. A prompt of several chunks
takes less, because a stage computes one chunk while the next stage computes the one before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from planning.plan import Plan, Stage
from wire import limits
from wire.profile import LinkProfile

CHUNK_TOKENS = (limits.PREFILL_CHUNK_TOKENS, 32, 16)
"""Rows that a chunk may have; fewer no longer run at the speed of many."""

WORTHWHILE = 0.05
"""Share of a prompt's time; timings are no better than that."""


def prefill_s(
    stages: Sequence[Stage],
    links: Iterable[LinkProfile],
    prompt_tokens: int,
    hop_bytes: int,
    chunk_tokens: int | None = None,
) -> float:
    """Seconds from the start of a prompt until its last row has left the last stage.

    ``hop_bytes`` is what one row weighs on a link; ``chunk_tokens`` None: as many as a prompt's
    chunks have when it is run. A stage begins a chunk when it has done the one
    before and the chunk has arrived; a link begins it when the stage has done it and the one before
    has been sent. Raises KeyError where neighbours have no link.
    """
    if chunk_tokens is None:
        chunk_tokens = best_chunk_tokens(stages, prompt_tokens)
    known = {(link.source, link.target): link for link in links}
    hops = [known[source.device, target.device] for source, target in pairwise(stages)]
    computed_s = [0.0] * len(stages)
    sent_s = [0.0] * len(hops)
    for begin in range(0, prompt_tokens, chunk_tokens):
        rows = min(chunk_tokens, prompt_tokens - begin)
        arrived_s = 0.0
        for index, stage in enumerate(stages):
            begun_s = max(computed_s[index], arrived_s)
            computed_s[index] = begun_s + _chunk_s(stage, rows)
            if index < len(hops):
                link = hops[index]
                sent_s[index] = max(sent_s[index], computed_s[index])
                sent_s[index] += rows * hop_bytes / link.bytes_per_s
                arrived_s = sent_s[index] + link.rtt_s / 2
    return computed_s[-1]


def decode_tokens_per_s(plan: Plan, sequences: int) -> float:
    """Tokens per second of so many sequences at once, in all: as fast as each goes round the ring,
    or as the slowest stage lets one after the other through. Rows that a stage runs in one pass
    cost it less than this assumes."""
    return 1 / max(plan.bottleneck_s, plan.decode_s / sequences)


def best_chunk_tokens(stages: Sequence[Stage], prompt_tokens: int) -> int:
    """Rows of a prompt that should go through the stages at once; one of CHUNK_TOKENS.

    Small chunks fill a pipeline sooner, and cost a stage one more call each. Chosen is what takes
    the least time where links are fast; a smaller chunk must save WORTHWHILE of it.
    """

    def seconds(chunk_tokens: int) -> float:
        each = [_chunk_s(stage, min(chunk_tokens, prompt_tokens)) for stage in stages]
        return math.fsum(each) + (math.ceil(prompt_tokens / chunk_tokens) - 1) * max(each)

    best = CHUNK_TOKENS[0]
    for smaller in CHUNK_TOKENS[1:]:
        if seconds(smaller) < (1 - WORTHWHILE) * seconds(best):
            best = smaller
    return best


def _chunk_s(stage: Stage, rows: int) -> float:
    """A call of so many rows: as measured for one row and for a whole chunk, linear between."""
    whole = limits.PREFILL_CHUNK_TOKENS
    whole_s = whole * stage.prefill_s_per_token
    call_s = (whole * stage.compute_s - whole_s) / (whole - 1)
    call_s = min(max(call_s, 0.0), whole_s)
    return call_s + rows * (whole_s - call_s) / whole
