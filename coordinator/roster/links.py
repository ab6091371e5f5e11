"""Keeps the figures of working links, and the reasons why other links fail.

A link has a direction. A plan does not use a link that failed. Such a link is tried again after a
pause that grows with each failure. Devices are named by their ids here, since names may change.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from wire.hygiene import clean_text
from wire.profile import LinkProfile

Pair = tuple[str, str]
"""(source, target), as device ids."""

RETRY_S = (10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0)
"""Pauses before a link is tried again, by the number of failures. The last one repeats."""

REMEMBERED_S = 600.0
"""A link that works again counts as never failed after this long."""

FRESH_S = 10.0
"""A failure of this age or less is believed, even when a user asks for the best plan."""

MAX_REASON = 400
"""The most characters of a reason. Reasons come from agents."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The newest failure of a link. Times are of a monotonic clock."""

    reason: str
    failed_s: float
    count: int
    """The number of failures in a row, this one included."""
    due_s: float
    """When the link is worth another try."""
    reasons: frozenset[str]
    """Every reason since the link worked."""


class Links:
    """Figures and failures of ordered pairs of devices."""

    def __init__(self) -> None:
        self._working: dict[Pair, LinkProfile] = {}
        self._failures: dict[Pair, Failure] = {}
        """Failures of links that work again are kept for a while: they may fail again soon."""

    def get(self, pair: Pair) -> LinkProfile | None:
        """The link as last measured, or None if it was never measured or has failed since."""
        return self._working.get(pair)

    def failure(self, pair: Pair) -> Failure | None:
        """The failure of a link, or None if it works or was never tried."""
        return None if pair in self._working else self._failures.get(pair)

    def set(self, pair: Pair, link: LinkProfile) -> bool:
        """Store figures. Returns True if the link had failed before."""
        failed = self.failure(pair) is not None
        self._working[pair] = link
        return failed

    def fail(self, pair: Pair, reason: str, *, used: bool, now_s: float | None = None) -> bool:
        """Note a failure. Returns True if its reason is news.

        used: the link failed in use, not in a measurement. Then the way back is measured again too.
        The first such failure is checked at once, since a connection can end although the link
        works.
        """
        now_s = time.monotonic() if now_s is None else now_s
        reason = clean_text(reason, MAX_REASON)
        before = self._failures.get(pair)
        count = 1
        if before is not None and (
            pair not in self._working or now_s - before.failed_s < REMEMBERED_S
        ):
            count += before.count
        pause_s = 0.0 if used and count == 1 else RETRY_S[min(count, len(RETRY_S)) - 1]
        worked = self._working.pop(pair, None) is not None
        known = frozenset() if worked or before is None else before.reasons
        self._failures[pair] = Failure(reason, now_s, count, now_s + pause_s, known | {reason})
        if used:
            self._working.pop(pair[::-1], None)
        return reason not in known

    def is_due(self, pair: Pair, *, asked: bool, now_s: float | None = None) -> bool:
        """Whether to measure the link now.

        asked: a user waits for the best plan.
        """
        now_s = time.monotonic() if now_s is None else now_s
        failure = self.failure(pair)
        if failure is None:
            return pair not in self._working
        return now_s >= failure.due_s or (asked and now_s - failure.failed_s >= FRESH_S)

    def forget(self, device: str) -> None:
        """Forget the links from and to a device."""
        for pair in {*self._working, *self._failures}:
            if device in pair:
                self._working.pop(pair, None)
                self._failures.pop(pair, None)
