"""What a plan predicts of many rows on their way: a prompt in chunks, several sequences at once.

``Plan.prefill_s_per_token`` adds up what one token costs everywhere. A prompt of several chunks
takes less, because a stage computes one chunk while the next stage computes the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from coordinator.plan import Plan, Stage
from wire import limits
from wire.profile import LinkProfile


def prefill_s(
    stages: Sequence[Stage],
    links: Iterable[LinkProfile],
    prompt_tokens: int,
    hop_bytes: int,
    chunk_tokens: int = limits.PREFILL_CHUNK_TOKENS,
) -> float:
    """Seconds from the start of a prompt until its last row has left the last stage.

    ``hop_bytes`` is what one row weighs on a link. A stage begins a chunk when it has done the one
    before and the chunk has arrived; a link begins it when the stage has done it and the one before
    has been sent. Raises KeyError where neighbours have no link.
    """
    known = {(link.source, link.target): link for link in links}
    hops = [known[source.device, target.device] for source, target in pairwise(stages)]
    computed_s = [0.0] * len(stages)
    sent_s = [0.0] * len(hops)
    for begin in range(0, prompt_tokens, chunk_tokens):
        rows = min(chunk_tokens, prompt_tokens - begin)
        arrived_s = 0.0
        for index, stage in enumerate(stages):
            begun_s = max(computed_s[index], arrived_s)
            computed_s[index] = begun_s + rows * stage.prefill_s_per_token
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
