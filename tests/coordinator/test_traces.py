"""How the clocks of devices are brought together, and when a line is full."""

from __future__ import annotations

from typing import Any, cast

import pytest

from coordinator.errors import QueueFull
from coordinator.loading.models import Models
from coordinator.loading.slots import Slots
from coordinator.serving.admission import Admission
from coordinator.serving.requests import InFlight, Requests
from coordinator.serving.traces import StagePasses, causal, hop_seconds
from wire.messages import TracedPass


def stage(offset_s: float, *times_ms: tuple[float, float]) -> StagePasses:
    """Passes of one row each, by (arrived, computed) in milliseconds of the true time."""
    passes = tuple(
        TracedPass(
            1, position, 1, 1, *(round(1e6 * (time_ms / 1e3 + offset_s)) for time_ms in four)
        )
        for position, (arrived, computed) in enumerate(times_ms)
        for four in ((arrived, arrived, computed, computed),)
    )
    return StagePasses(cast("Any", None), offset_s, 1e-3, passes)


def test_known_clocks_are_left_as_they_are() -> None:
    stages = (stage(100.0, (0, 1), (10, 11)), stage(-7.0, (1.5, 2), (11.25, 12)))
    assert causal(stages) == stages
    assert hop_seconds(*stages) == pytest.approx([0.5e-3, 0.25e-3], abs=2e-6)


def test_no_row_arrives_before_it_left() -> None:
    first = stage(100.0, (0, 1), (10, 11))
    true = stage(-7.0, (1.5, 2), (11.25, 12))
    early = StagePasses(true.member, true.offset_s + 2e-3, true.error_s, true.passes)
    assert min(hop_seconds(first, early)) < 0
    moved = causal((first, early))
    assert min(hop_seconds(*moved)) == pytest.approx(0, abs=2e-6)


class Serving:
    """A deployment of two slots with so many requests in line."""

    def __init__(self, waiting: int) -> None:
        self.name = "llama" if waiting == 3 else "other"

        class Line(Slots):
            @property
            def waiting(self) -> int:
                return waiting

        self.slots = Line(2)


class Served:
    def __init__(self, *waiting: int) -> None:
        self.all_serving = [Serving(count) for count in waiting]


def test_a_full_line_estimates_when_to_come_back() -> None:
    requests = Requests()
    for seconds in (8.0, 12.0):
        with requests.serve(InFlight("a")) as request:
            request.starts(1, 1)
        assert request.ended_s is not None
        request.started_s = request.ended_s - seconds
    Admission(cast("Models", Served(2)), requests, 3).require_room()
    with pytest.raises(QueueFull) as refused:
        Admission(cast("Models", Served(3)), requests, 3).require_room()
    assert refused.value.retry_after_s == 5
    with pytest.raises(QueueFull) as refused:
        Admission(cast("Models", Served(3)), Requests(), 3).require_room()
    assert refused.value.retry_after_s == 1
    # The model is not known yet, and another one has room.
    Admission(cast("Models", Served(3, 2)), requests, 3).require_room()
    with pytest.raises(QueueFull):
        Admission(cast("Models", Served(3, 2)), requests, 3).require_room("llama")
