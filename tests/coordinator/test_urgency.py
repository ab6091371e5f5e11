"""Real-time requests go before others, and bulk ones make way for them."""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.loading.deployment import Deployment
from coordinator.loading.slots import Slots
from coordinator.serving.requests import InFlight, Requests
from coordinator.serving.urgency import HEADER, Urgency, urgency_of
from planning.errors import RequestInvalid
from tests.coordinator.test_teams import BLOCKS, MODEL, Parts, Run, Shoal, plan_of, planned, run
from wire.messages import ReleaseSequence, Sampling, StartSequence, TokenSampled

__all__ = ["run"]

ALONE: tuple[Parts, ...] = ((("a",), BLOCKS),)


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        ({}, {}, Urgency.NORMAL),
        ({HEADER: "realtime"}, {"service_tier": "flex"}, Urgency.REALTIME),
        ({HEADER: "bulk"}, {}, Urgency.BULK),
        ({}, {"service_tier": "flex"}, Urgency.BULK),
        ({}, {"service_tier": "priority"}, Urgency.REALTIME),
        ({}, {"service_tier": "auto"}, Urgency.NORMAL),
        ({}, {"service_tier": None}, Urgency.NORMAL),
        ({}, {"service_tier": ["flex"]}, Urgency.NORMAL),
    ],
)
def test_the_class_of_a_request(
    headers: dict[str, str], body: dict[str, object], expected: Urgency
) -> None:
    assert urgency_of(headers, body) == expected


@pytest.mark.parametrize(
    ("most", "asked", "expected"),
    [
        (None, "realtime", Urgency.REALTIME),
        (Urgency.NORMAL, None, Urgency.NORMAL),
        (Urgency.NORMAL, "realtime", Urgency.NORMAL),
        (Urgency.NORMAL, "bulk", Urgency.BULK),
        (Urgency.BULK, None, Urgency.BULK),
        (Urgency.BULK, "normal", Urgency.BULK),
        (Urgency.REALTIME, None, Urgency.REALTIME),
        (Urgency.REALTIME, "normal", Urgency.NORMAL),
    ],
)
def test_a_key_has_a_class_that_its_requests_may_only_lower(
    most: Urgency | None, asked: str | None, expected: Urgency
) -> None:
    assert urgency_of({HEADER: asked} if asked else {}, {}, most) == expected


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(RequestInvalid, match="expected one of realtime, normal, bulk"):
        urgency_of({HEADER: "now"}, {})


def test_the_line_for_slots_goes_by_rank_and_then_by_arrival() -> None:
    served: list[str] = []

    async def use(slots: Slots, name: str, rank: int) -> None:
        async with slots.one(rank=rank):
            served.append(name)

    async def main() -> None:
        slots = Slots(1)
        async with slots.one():
            wishes = (("c", 2), ("a", 1), ("d", 2), ("b", 1), ("first", 0), ("gone", 0))
            tasks = [asyncio.ensure_future(use(slots, *wish)) for wish in wishes]
            await asyncio.sleep(0)  # Each of them runs until it waits.
            assert slots.waiting == len(tasks)
            tasks.pop().cancel()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert served == ["first", "a", "b", "c", "d"]


class Asked:
    """One request for an answer in its class, and the tokens that have come."""

    def __init__(self, shoal: Shoal, deployment: Deployment, urgency: Urgency) -> None:
        self.tokens: list[int] = []
        self.came = asyncio.Event()
        """Set by the first token."""
        self.task = asyncio.ensure_future(self._ask(shoal, deployment, urgency))

    async def _ask(self, shoal: Shoal, deployment: Deployment, urgency: Urgency) -> None:
        with Requests().serve(InFlight("", urgency=urgency)):
            pieces = shoal.gateway.generate(deployment, (1, 2), Sampling(3, ()))
            async for piece in pieces:
                self.tokens += piece.tokens
                self.came.set()


async def load(
    shoal: Shoal, model: Path, slots: int = 2, keep_s: float | None = None
) -> Deployment:
    shoal.operations.plans = [plan_of(ALONE)]
    request = replace(planned(plan_of(ALONE)).request, model=model, slots=slots, keep_s=keep_s)
    return await shoal.operations.load(request, shoal.steps.append)


async def started(shoal: Shoal, count: int) -> StartSequence:
    """Wait until so many sequences were started, and return the last one."""
    await shoal.until(lambda: len(shoal.of(StartSequence)) == count)
    return shoal.of(StartSequence)[-1][1]


async def sample(shoal: Shoal, start: StartSequence, *tokens: int, ends: bool) -> None:
    for index, token in enumerate(tokens):
        is_last = ends and index == len(tokens) - 1
        finish = "length" if is_last else ""
        await shoal.said(
            "a",
            TokenSampled(start.epoch, start.sequence, index, token, finish),  # type: ignore[arg-type]  # A literal.
        )


@pytest.mark.parametrize("is_other", [False, True])
def test_a_bulk_answer_pauses_for_a_real_time_one_and_goes_on(
    run: Run, tmp_path: Path, is_other: bool
) -> None:
    """Also if the other one is of another model on the same device."""

    async def test(shoal: Shoal) -> None:
        deployment = urgent = await load(shoal, MODEL)
        if is_other:
            urgent = await load(shoal, Path(shutil.copytree(MODEL, tmp_path / "m" / "other")))
        bulk = Asked(shoal, deployment, Urgency.BULK)
        start = await started(shoal, 1)
        await sample(shoal, start, 5, ends=False)
        await bulk.came.wait()
        first = Asked(shoal, urgent, Urgency.REALTIME)
        quick = await started(shoal, 2)
        assert quick.epoch == urgent.epoch
        await shoal.until(lambda: shoal.of(ReleaseSequence))
        assert shoal.of(ReleaseSequence)[0][1].sequence == start.sequence
        # Another bulk request does not begin meanwhile, and a normal one does.
        late = Asked(shoal, deployment, Urgency.BULK)
        normal = Asked(shoal, deployment, Urgency.NORMAL)
        usual = await started(shoal, 3)
        await sample(shoal, usual, 7, 7, 7, ends=True)
        await normal.task
        assert len(shoal.of(StartSequence)) == 3
        await sample(shoal, quick, 8, 8, 8, ends=True)
        await first.task
        assert first.tokens == [8, 8, 8]
        # The bulk answer goes on behind the token that it had.
        await shoal.until(lambda: len(shoal.of(StartSequence)) == 5)
        starts = [said for _, said in shoal.of(StartSequence)[3:]]
        again = next(said for said in starts if said.prompt == (1, 2, 5))
        other = next(said for said in starts if said.prompt == (1, 2))
        await sample(shoal, again, 6, 7, ends=True)
        await sample(shoal, other, 1, 2, 3, ends=True)
        await asyncio.gather(bulk.task, late.task)
        assert (bulk.tokens, late.tokens) == ([5, 6, 7], [1, 2, 3])

    run(test)


def test_a_real_time_answer_elsewhere_pauses_nobody(run: Run, tmp_path: Path) -> None:
    async def test(shoal: Shoal) -> None:
        deployment = await load(shoal, MODEL)
        other = Path(shutil.copytree(MODEL, tmp_path / "m" / "other"))
        shoal.operations.plans = [plan_of(((("b",), BLOCKS),))]
        request = replace(planned(plan_of(ALONE)).request, model=other)
        elsewhere = await shoal.operations.load(request, shoal.steps.append)
        bulk = Asked(shoal, deployment, Urgency.BULK)
        start = await started(shoal, 1)
        quick = Asked(shoal, elsewhere, Urgency.REALTIME)
        await started(shoal, 2)
        await sample(shoal, start, 5, 6, 7, ends=True)
        await bulk.task
        assert bulk.tokens == [5, 6, 7]
        quick.task.cancel()

    run(test)


def test_a_model_whose_bulk_requests_wait_does_not_fall_asleep(run: Run, tmp_path: Path) -> None:
    async def test(shoal: Shoal) -> None:
        urgent = await load(shoal, Path(shutil.copytree(MODEL, tmp_path / "m" / "other")))
        deployment = await load(shoal, MODEL, keep_s=60.0)
        first = Asked(shoal, urgent, Urgency.REALTIME)
        quick = await started(shoal, 1)
        bulk = Asked(shoal, deployment, Urgency.BULK)
        await asyncio.sleep(0)  # It runs until it waits.
        shoal.keeper._idling.look(time.monotonic() + 120)
        await sample(shoal, quick, 8, 8, 8, ends=True)
        await first.task
        start = await started(shoal, 2)
        await sample(shoal, start, 5, 5, 5, ends=True)
        await bulk.task
        assert bulk.tokens == [5, 5, 5]

    run(test)
