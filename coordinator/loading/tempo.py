"""Times the tokens of each deployment, as its last stage samples them.

Tokens of one sequence are kept apart from those of several, because they share passes. So two
deployments are compared only where they had as much to do.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping

from coordinator.loading.models import Models
from coordinator.roster.members import Member, Roster
from wire.messages import Message, TokenSampled

FEWEST = 64
"""A median of fewer tokens is not believed. The first ones after a load may read from a disk."""

MOST = 128
"""The last tokens that count."""

Load = tuple[int, int]
"""A deployment's epoch, and the number of sequences in flight."""


class Tempo:
    """The last measured times of tokens, by deployment and by sequences in flight."""

    def __init__(
        self, roster: Roster, models: Models, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._models = models
        self._clock = clock
        self._taken: dict[Load, deque[tuple[float, float]]] = {}
        """When a token came, and the seconds that it took."""
        roster.subscribe(self._on_event, lambda *_: None)

    def token_s(self, epoch: int, since_s: float = -math.inf) -> Mapping[int, float]:
        """Return the median seconds of a token, by the number of sequences in flight.

        since_s: earlier tokens do not count. Things may have been different.
        """
        found = {}
        for (of, sequences), taken in self._taken.items():
            taken_s = [seconds for came_s, seconds in taken if came_s >= since_s]
            if of == epoch and len(taken_s) >= FEWEST:
                found[sequences] = statistics.median(taken_s)
        return found

    def _on_event(self, member: Member, message: Message) -> None:
        if not isinstance(message, TokenSampled):
            return
        deployment = self._models.of_epoch(message.epoch)
        if deployment is None or member is not deployment.leads[-1] or message.after_us <= 0:
            return
        load = deployment.epoch, deployment.slots.used
        if load not in self._taken:  # Others may have ended.
            self._taken = {
                known: one
                for known, one in self._taken.items()
                if self._models.of_epoch(known[0]) is not None
            }
        taken = self._taken.setdefault(load, deque(maxlen=MOST))
        if message.drafted:  # The pass checked guesses. Its other tokens came right before.
            for _ in range(min(message.accepted, len(taken))):
                taken.pop()
        else:
            taken.append((self._clock(), message.after_us / 1e6))


def in_common(before_s: Mapping[int, float], after_s: Mapping[int, float]) -> tuple[float, float]:
    """Return two medians with the same number of sequences, the fewest. Raises LookupError."""
    sequences = sorted(before_s.keys() & after_s.keys())
    return before_s[sequences[0]], after_s[sequences[0]]
