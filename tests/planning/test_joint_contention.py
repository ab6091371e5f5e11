"""Times of models that share devices: the formula against a simulation of the events."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from statistics import median

import pytest

from planning.joint.contention import Use, at_pace, settled

Route = list[tuple[int | None, float]]
"""The passes of one request in order: the device (None: a link) and the seconds."""


def simulated_s(routes: Sequence[Route], seed: int, rounds: int = 300) -> list[float]:
    """The mean time of each model's requests, one after the other, all models at once.

    A device runs one pass at a time, in the order in which they came. Passes vary by 4 %.
    """
    rng = random.Random(seed)
    at, ended = [0] * len(routes), [[] for _ in routes]  # type: list[int], list[list[float]]
    waiting: dict[int, list[int]] = {}
    busy: set[int] = set()
    events: list[tuple[float, int, int]] = []
    count = 0

    def run(now_s: float, model: int) -> None:
        nonlocal count
        count += 1
        seconds = routes[model][at[model]][1] * rng.uniform(0.96, 1.04)
        heapq.heappush(events, (now_s + seconds, count, model))

    def arrive(now_s: float, model: int) -> None:
        device = routes[model][at[model]][0]
        if device is not None and device in busy:
            waiting.setdefault(device, []).append(model)
            return
        if device is not None:
            busy.add(device)
        run(now_s, model)

    for model in range(len(routes)):
        arrive(rng.uniform(0, 1e-3), model)
    until_s = rounds * max(math.fsum(seconds for _, seconds in route) for route in routes)
    while events:
        now_s, _, model = heapq.heappop(events)
        if now_s > until_s:
            break
        device = routes[model][at[model]][0]
        at[model] = (at[model] + 1) % len(routes[model])
        if not at[model]:
            ended[model].append(now_s)
        if device is not None:
            if queue := waiting.get(device):
                run(now_s, queue.pop(0))
            else:
                busy.discard(device)
        arrive(now_s, model)
    return [(times[-1] - times[0]) / (len(times) - 1) for times in ended]


def use_of(route: Route) -> Use:
    busy_s: dict[str, float] = {}
    for device, seconds in route:
        if device is not None:
            busy_s[str(device)] = busy_s.get(str(device), 0.0) + seconds
    return Use(math.fsum(seconds for _, seconds in route), busy_s, leads=tuple(busy_s))


def random_routes(seed: int) -> list[Route]:
    """Two or three models on up to four devices, small ones and large ones."""
    rng = random.Random(seed)
    devices = range(rng.randint(1, 4))
    routes = []
    for _ in range(rng.choice([2, 2, 3])):
        scale = rng.choice([5e-3, 20e-3, 60e-3])
        some = rng.sample(devices, rng.randint(1, len(devices)))
        link_s = rng.uniform(0.2e-3, 1e-3) if len(some) > 1 else 0.1e-3
        route: Route = []
        for device in some:
            route += [(device, scale * rng.uniform(0.5, 1.5)), (None, link_s)]
        routes.append(route)
    return routes


def test_the_formula_agrees_with_a_simulation_of_the_events() -> None:
    errors, ignoring = [], []
    for seed in range(120):
        routes = random_routes(seed)
        uses = [use_of(route) for route in routes]
        measured = simulated_s(routes, seed)
        errors += [abs(a / b - 1) for a, b in zip(settled(uses), measured, strict=True)]
        ignoring += [abs(use.alone_s / b - 1) for use, b in zip(uses, measured, strict=True)]
    assert median(errors) < 0.02
    assert sorted(errors)[int(0.75 * len(errors))] < 0.2
    # Models that were thought to be alone are far off.
    assert median(ignoring) > 0.15


def test_models_on_one_device_both_take_the_sum() -> None:
    uses = [Use(0.010, {"pi": 0.010}, leads=("pi",)), Use(0.100, {"pi": 0.100}, leads=("pi",))]
    assert settled(uses) == pytest.approx((0.110, 0.110))


def test_a_pass_waits_for_half_of_the_others_pass() -> None:
    """Each meets two passes of 10 ms of the other in a request."""
    busy_s = {"a": 0.010, "b": 0.010}
    uses = [Use(0.040, busy_s, leads=("a", "b"))] * 2
    assert settled(uses) == pytest.approx((0.050, 0.050))


def test_a_team_waits_once() -> None:
    team = Use(0.040, {"a": 0.010, "b": 0.010}, leads=("a",))
    assert settled([team, team]) == pytest.approx((0.045, 0.045))


def test_throughput_waits_only_on_the_slowest_device() -> None:
    uses = [Use(0.040, {"a": 0.040, "b": 0.010}), Use(0.040, {"b": 0.040})]
    assert settled(uses) == pytest.approx((0.050, 0.050))


def test_a_quick_model_waits_as_often_as_the_slow_one_comes() -> None:
    """The slow one is on the quick one's device for a quarter of its time."""
    quick = Use(0.010, {"a": 0.010}, leads=("a",))
    slow = Use(0.200, {"a": 0.050, "b": 0.150}, leads=("a", "b"))
    together = settled([quick, slow])
    assert together[1] == pytest.approx(0.205)
    assert together[0] == pytest.approx(0.010 / (1 - 0.050 / 0.205))


def test_paces_give_themselves_again() -> None:
    for seed in range(40):
        uses = [use_of(route) for route in random_routes(seed)]
        paces = settled(uses)
        assert at_pace(uses, paces) == pytest.approx(paces, rel=1e-9)
        for use, pace_s in zip(uses, paces, strict=True):
            assert pace_s >= use.alone_s * (1 - 1e-12)


def test_loading_time_is_not_shared() -> None:
    uses = [Use(1.0, {"a": 1.0}, load_s=5.0), Use(1.0, {"a": 1.0})]
    assert settled(uses) == pytest.approx((2.0, 2.0))
    assert uses[0].value == 6.0
