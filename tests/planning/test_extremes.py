"""The planner finds a plan with every figure that is accepted from agents."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from planning.build import DeviceInput, RequestInput, build_problem
from planning.planner import solve
from planning.problem import HopFormat, Objective, ObjectiveKind
from tests.planning.test_plan import PROFILE, SPEC, TIMINGS
from wire.hygiene import BLOCK_SECONDS, CALL_SECONDS, LINK_BYTES_PER_S, ROUND_TRIP_SECONDS
from wire.profile import LinkProfile

ROOMY = replace(PROFILE, memory_bytes=10**8)
LINKS = tuple(zip(ROUND_TRIP_SECONDS, LINK_BYTES_PER_S, strict=True))


@pytest.mark.parametrize("kind", ["latency", "throughput", "request"])
@pytest.mark.parametrize("link", LINKS, ids=["near", "far"])
def test_extreme_figures_are_planned_with(kind: ObjectiveKind, link: tuple[float, float]) -> None:
    links = (LinkProfile("a", "b", *link), LinkProfile("b", "a", *link))
    for decode_s, prefill_s, call_s in itertools.product(
        BLOCK_SECONDS, BLOCK_SECONDS, CALL_SECONDS
    ):
        extreme = tuple(
            replace(timing, decode_s=decode_s, prefill_s_per_token=prefill_s) for timing in TIMINGS
        )
        request = RequestInput(
            SPEC,
            bits=(4, 8),
            slots=2,
            context_tokens=32,
            chunk_tokens=16,
            hop_formats=(HopFormat.unmeasured(32),),
            objective=Objective(kind),
        )
        devices = [
            DeviceInput("a", replace(ROOMY, call_s=call_s), extreme),
            DeviceInput("b", ROOMY, TIMINGS),
        ]
        problem = build_problem(request, devices, links)
        assert solve(problem, time_limit_s=5).stages
