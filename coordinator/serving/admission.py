"""Bounds the line of requests that wait for a slot."""

from __future__ import annotations

from statistics import fmean

from coordinator.errors import QueueFull
from coordinator.loading.models import Models
from coordinator.serving.requests import Requests

RETRY_S = (1, 60)
"""The shortest and the longest time after which a refused client is told to ask again."""

LAST = 16
"""The ended requests from which the time of a slot is estimated."""


class Admission:
    """Refuses requests that the deployment cannot even let wait."""

    def __init__(self, models: Models, requests: Requests, most_waiting: int) -> None:
        self._models = models
        self._requests = requests
        self._most_waiting = most_waiting

    def require_room(self, name: str | None = None) -> None:
        """Raise QueueFull if the line for slots of a model is full.

        Without a name, raise it if the lines of all models are full.
        """
        found = [one for one in self._models.all_serving if name in (None, one.name)]
        if found and all(one.slots.waiting >= self._most_waiting for one in found):
            slots = found[0].slots
            raise QueueFull(slots.waiting, self._retry_after_s(slots.total))

    def _retry_after_s(self, slots: int) -> int:
        """Estimate when a place in the line is free: when the next slot is given to its head."""
        held_s = [
            request.ended_s - request.started_s
            for request in self._requests.ended[:LAST]
            if request.started_s is not None and request.ended_s is not None
        ]
        least_s, most_s = RETRY_S
        expected_s = fmean(held_s) / slots if held_s else least_s
        return round(min(max(expected_s, least_s), most_s))
