"""A model moves to a better plan by itself, and back if that measures worse."""

from __future__ import annotations

import asyncio
import itertools
import math
import shutil
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import pytest

from coordinator.errors import AgentLost
from coordinator.loading import remeasuring
from coordinator.loading.deployment import Deployment, Planned
from coordinator.loading.operations import Compared
from coordinator.loading.rebalance import PAUSE_S, REFUSED_S, STEADY_S, Choice
from coordinator.loading.rebalancing import LOOK_S, Rebalancer
from coordinator.loading.remeasuring import PATIENCE_S, POLL_S
from coordinator.loading.stale import FIRST_S, LONGEST_S, Stale
from coordinator.loading.state import Lost
from coordinator.loading.tempo import FEWEST, Tempo
from coordinator.roster.members import Member
from planning.plan import Plan
from tests.coordinator import test_teams
from tests.coordinator.test_teams import (
    BLOCKS,
    MODEL,
    SPEC,
    Parts,
    PlansGiven,
    Shoal,
    block_timings,
    plan_of,
    planned,
)
from tests.coordinator.test_two_models import FIRST, load
from wire.messages import (
    FiguresChanged,
    MeasureLink,
    MeasureModel,
    Message,
    TokenSampled,
)

ALONE: tuple[Parts, ...] = ((("d",), BLOCKS),)
BETTER: tuple[Parts, ...] = ((("c",), BLOCKS),)
SPLIT: tuple[Parts, ...] = ((("c",), 2), (("d",), BLOCKS))
TEAM: tuple[Parts, ...] = ((("d", "c"), BLOCKS),)
NAMES = ("c", "d")


class Compares(PlansGiven):
    """Operations that find another plan better by a share that the test says."""

    gain = 0.0
    other: Plan
    beside: Mapping[str, Plan] = MappingProxyType({})
    """The better plans of models that were planned together with the first one."""
    looked = 0
    without: Collection[Member] = ()
    stuck: asyncio.Event | None = None
    """Is set when a preparation begins, which then does not end."""
    planning: asyncio.Event | None = None
    """Is set when planning begins, which then does not end."""

    async def prepare(self, planned: Planned, before: Deployment) -> None:
        if self.stuck is not None:
            self.stuck.set()
            await asyncio.Event().wait()
        await super().prepare(planned, before)

    async def compare(
        self,
        deployment: Deployment,
        slow: Mapping[Member, float] = MappingProxyType({}),
        *,
        measures: bool = True,
        without: Collection[Member] = (),
    ) -> Compared:
        self.looked += 1
        self.without = without
        if self.planning is not None:
            self.planning.set()
            await asyncio.Event().wait()
        joined = [member.name for member in self._roster.members]
        group = self.answering_with(deployment)
        others = [self.other, *(self.beside[one.name] for one in group[1:])]
        key = tuple(other.layout for other in others)
        stays = all(
            one.plan.layout == other.layout for one, other in zip(group, others, strict=True)
        )
        choice = Choice(key, 1.0, 1.0 if stays else 1.0 - self.gain, None, None, 2.0)
        wanted, *beside = [
            replace(planned(other, joined), request=one.request)
            for one, other in zip(group, others, strict=True)
        ]
        present = [one.plan for one in group[1:]]
        pairs = tuple(zip(group[1:], beside, present, strict=True))
        return Compared(wanted, deployment.plan, choice, {}, pairs)


@dataclass
class World:
    """A shoal, the loop over it, and a clock that only the test moves."""

    shoal: Shoal
    operations: Compares
    loop: Rebalancer
    now_s: float = 0.0
    index: int = 0
    """The newest token that a device has sampled, and the newest that the coordinator has read."""
    seen: int = 0

    def __post_init__(self) -> None:
        self.shoal.roster.subscribe(self._on_event, lambda *_: None)

    def _on_event(self, member: Member, message: Message) -> None:
        if isinstance(message, TokenSampled):
            self.seen = message.index
            self.shoal.news.set()

    async def look(self, seconds: float) -> None:
        """Let so much time pass, with a look each LOOK_S."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.now_s += LOOK_S
            await self.loop.look()
            await self.shoal.until(lambda: self.shoal.models.serving is not None)

    async def tokens(self, name: str, seconds: float, count: int = FEWEST, model: str = "") -> None:
        """Have the last stage sample tokens that take so long, by default of the newest model."""
        deployment = self.of(model) if model else self.served
        for _ in range(count):
            self.index += 1
            token = TokenSampled(deployment.epoch, 1, self.index, 5, "", int(seconds * 1e6))
            await self.shoal.said(name, token)
        await self.shoal.until(lambda: self.seen == self.index)

    @property
    def served(self) -> Deployment:
        assert self.shoal.models.serving is not None
        return self.shoal.models.serving

    def of(self, model: str) -> Deployment:
        (found,) = (one for one in self.shoal.models.all_serving if one.name == model)
        return found

    def find(self, better: Mapping[str, tuple[Parts, ...]]) -> None:
        """Have a better plan of models that were planned together."""
        plans = {name: plan_of(parts) for name, parts in better.items()}
        # The loop compares them by way of the first one by name.
        self.operations.other = plans.pop(min(plans))
        self.operations.beside, self.operations.gain = plans, 0.5

    def told(self, *kinds: str) -> list[str]:
        return [event.kind for event in self.shoal.story.after() if event.kind in kinds]


Test = Callable[[World], Awaitable[None]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Test], None]:
    monkeypatch.setattr(test_teams, "PlansGiven", Compares)

    async def main(test: Test) -> None:
        async with test_teams.running(tmp_path) as shoal:
            await shoal.join(*NAMES)
            for name in NAMES:
                shoal.member(name).timings[SPEC] = {32: block_timings(32)}
            operations = shoal.operations
            assert isinstance(operations, Compares)
            world: World

            def clock() -> float:
                return world.now_s

            loop = Rebalancer(
                shoal.roster, shoal.models, shoal.turns, operations, shoal.story, clock
            )
            world = World(shoal, operations, loop)
            await shoal.load(plan_of(ALONE))
            operations.other = plan_of(BETTER)
            await asyncio.wait_for(test(world), 60)

    return lambda test: asyncio.run(main(test))


def test_the_model_moves_once_to_a_plan_that_stays_better(run: Callable[[Test], None]) -> None:
    async def test(world: World) -> None:
        first = world.served
        await world.look(STEADY_S)
        assert world.served is first
        world.operations.gain = 0.5
        world.shoal.member("c").profile = replace(world.shoal.member("c").profile, call_s=1e-3)
        await world.look(STEADY_S)
        assert world.served is first
        await world.tokens("d", 0.1)
        await world.look(2 * LOOK_S)
        assert world.served.where == "c"
        world.operations.gain = 0.0
        await world.tokens("c", 0.05)
        await world.look(PAUSE_S)
        assert world.told("moving", "moved", "move kept") == ["moved", "move kept"]
        assert world.operations.looked <= 4  # It plans only when figures have changed.

    run(test)


@pytest.mark.parametrize(("parts", "where"), [(SPLIT, "c, d"), (TEAM, "d+c")])
def test_links_that_a_move_begins_to_use_are_measured_before(
    run: Callable[[Test], None], parts: tuple[Parts, ...], where: str
) -> None:
    """Nobody uses them, so their figures may be from before the cause of the move."""

    async def test(world: World) -> None:
        world.operations.gain = 0.5
        world.operations.other = plan_of(parts)
        ends = {"c": "d", "d": "c"}
        world.shoal.told.clear()
        async with world.served.slots.one((1, 2)):  # An answer runs.
            await world.look(STEADY_S)
            assert not world.shoal.of(MeasureLink)
            await world.look(LOOK_S)
            links = [(name, message.device) for name, message in world.shoal.of(MeasureLink)]
            assert sorted(links) == [(name, f"id-of-{other}") for name, other in ends.items()]
            assert world.served.where == "d"
            before = world.operations.looked
            await world.look(LOOK_S)
        # The plan was made again, from the new figures.
        assert world.operations.looked == before + 1
        assert world.served.where == where
        assert len(world.shoal.of(MeasureLink)) == 2

    run(test)


def test_links_are_measured_once_however_long_that_and_planning_take(
    run: Callable[[Test], None],
) -> None:
    """Otherwise slow links would be measured for ever, and the model would never move."""

    async def test(world: World) -> None:
        world.operations.gain = 0.5
        world.operations.other = plan_of(SPLIT)
        await world.look(STEADY_S)
        world.shoal.told.clear()
        await world.look(LOOK_S)
        assert len(world.shoal.of(MeasureLink)) == 2
        world.now_s += 2 * STEADY_S  # Measuring them has taken so long, or planning since.
        await world.look(LOOK_S)
        assert world.served.where == "c, d"
        assert len(world.shoal.of(MeasureLink)) == 2

    run(test)


def test_the_same_links_are_not_measured_for_each_of_several_plans(
    run: Callable[[Test], None],
) -> None:
    async def test(world: World) -> None:
        world.operations.gain = 0.5
        world.operations.other = plan_of(SPLIT)
        await world.look(STEADY_S)
        world.shoal.told.clear()
        await world.look(LOOK_S)
        world.operations.other = plan_of(((("c",), 3), (("d",), BLOCKS)))
        await world.look(LOOK_S)
        assert world.served.where == "c, d"
        assert len(world.shoal.of(MeasureLink)) == 2

    run(test)


def test_a_user_waits_for_one_link_of_a_better_plan_at_most(run: Callable[[Test], None]) -> None:
    async def test(world: World) -> None:
        world.operations.gain = 0.5
        world.operations.other = plan_of(SPLIT)
        await world.look(STEADY_S)
        world.shoal.told.clear()
        world.now_s += LOOK_S
        looking = asyncio.ensure_future(world.loop.look())
        await world.shoal.until(lambda: world.shoal.turns.is_taken)
        async with world.shoal.turns.asked(lambda step: None):
            assert len(world.shoal.of(MeasureLink)) <= 1
        await looking
        await world.look(LOOK_S)
        assert len(world.shoal.of(MeasureLink)) == 2
        await world.look(LOOK_S)
        assert world.served.where == "c, d"

    run(test)


def test_a_plan_for_a_device_that_has_left_does_not_end_a_look(
    run: Callable[[Test], None],
) -> None:
    async def test(world: World) -> None:
        world.operations.gain = 0.5
        world.operations.other = plan_of(SPLIT)
        await world.look(STEADY_S)
        world.loop._watched[world.served.name].plan_from_s = math.inf  # No plan is due.
        with world.shoal.roster.changed.watch() as changed:
            world.shoal.kill("c")
            while len(world.shoal.roster.members) == 2:
                changed.clear()
                await changed.wait()
        await world.look(LOOK_S)
        assert world.served.where == "d"

    run(test)


def test_a_plan_that_measures_worse_is_left_and_remembered(run: Callable[[Test], None]) -> None:
    async def test(world: World) -> None:
        world.operations.gain = 0.5
        await world.look(LOOK_S)
        moved_back_s = []
        for _ in range(100):
            where = world.served.where
            await world.tokens(where, 0.2 if where == "c" else 0.1, FEWEST)
            await world.look(6 * LOOK_S)
            if (where, world.served.where) == ("c", "d"):
                moved_back_s.append(world.now_s)
        # Each time it takes longer until the plan is tried again.
        assert world.served.where == "d"
        assert len(moved_back_s) == 2
        assert moved_back_s[1] - moved_back_s[0] >= REFUSED_S
        texts = [event.text for event in world.shoal.story.after() if event.kind == "moved"]
        assert texts[1] == "to d: the model moves back: 100 ms a token before, 200 ms after"

    run(test)


async def load_together(world: World, directory: Path, together: Mapping[str, float]) -> None:
    """Load a model on d, and a copy of it on c, as if they had been planned together."""
    other = Path(shutil.copytree(MODEL, directory / "models" / "other"))
    await load(world.shoal, MODEL, ALONE, together=together)
    await load(world.shoal, other, BETTER, together=together)


@pytest.mark.parametrize(
    ("weight", "after_s", "moves_back"),
    [(1.0, (0.06, 0.2), True), (9.0, (0.06, 0.2), False), (1.0, (0.06, 0.1), False)],
    ids=["worse together", "worse for the lighter one", "better"],
)
def test_models_that_were_planned_together_move_back_together(
    run: Callable[[Test], None],
    tmp_path: Path,
    weight: float,
    after_s: tuple[float, float],
    moves_back: bool,
) -> None:
    together = {FIRST: weight, "other": 1.0}

    async def test(world: World) -> None:
        await load_together(world, tmp_path, together)
        before = [world.of(name).epoch for name in together]
        world.find({FIRST: BETTER, "other": ALONE})
        await world.look(LOOK_S)
        for name, device in zip(together, "dc", strict=True):
            await world.tokens(device, 0.1, model=name)
        await world.look(STEADY_S + 2 * LOOK_S)
        assert [world.of(name).where for name in together] == ["c", "d"]
        moved = [world.of(name).epoch for name in together]
        assert not set(moved) & set(before)
        for name, device, seconds in zip(together, "cd", after_s, strict=True):
            await world.tokens(device, seconds, model=name)
        await world.look(2 * LOOK_S)
        where = [world.of(name).where for name in together]
        assert where == (["d", "c"] if moves_back else ["c", "d"])
        assert world.told("move kept") == ([] if moves_back else ["move kept"])
        await world.look(PAUSE_S)  # It was tried, and is left alone.
        assert [world.of(name).where for name in together] == where

    run(test)


def test_a_model_that_stays_counts_where_another_one_moves(
    run: Callable[[Test], None], tmp_path: Path
) -> None:
    together = {FIRST: 1.0, "other": 1.0}

    async def test(world: World) -> None:
        await load_together(world, tmp_path, together)
        world.find({FIRST: ALONE, "other": ALONE})
        await world.look(LOOK_S)
        for name, device in zip(together, "dc", strict=True):
            await world.tokens(device, 0.1, model=name)
        await world.look(STEADY_S + 2 * LOOK_S)
        assert [world.of(name).where for name in together] == ["d", "d"]
        await world.tokens("d", 0.08, model="other")
        await world.look(2 * LOOK_S)
        assert world.of("other").where == "d"  # The one that stayed has told nothing yet.
        await world.tokens("d", 0.2, model=FIRST)
        await world.look(2 * LOOK_S)
        assert [world.of(name).where for name in together] == ["d", "c"]

    run(test)


def test_tokens_from_before_the_cause_do_not_count(run: Callable[[Test], None]) -> None:
    async def test(world: World) -> None:
        await world.tokens("d", 0.01)  # Long ago, all was well.
        await world.look(LOOK_S)
        world.operations.gain = 0.5
        world.shoal.member("c").profile = replace(world.shoal.member("c").profile, call_s=1e-3)
        await world.look(STEADY_S + 2 * LOOK_S)
        assert world.served.where == "c"
        await world.tokens("c", 0.05)
        world.operations.gain = 0.0
        await world.look(PAUSE_S)
        assert world.served.where == "c"

    run(test)


def test_what_toggles_moves_the_model_twice_in_ten_minutes_at_most(
    run: Callable[[Test], None],
) -> None:
    async def test(world: World) -> None:
        moved_s, member = [], world.shoal.member("c")
        for step in range(int(1800 / LOOK_S)):
            is_worse = step * LOOK_S // 65 % 2 == 1
            member.profile = replace(member.profile, call_s=2e-3 if is_worse else 1e-3)
            where = world.served.where
            world.operations.gain = 0.5 if is_worse == (where == "d") else -0.5
            world.operations.other = plan_of(BETTER if where == "d" else ALONE)
            await world.look(LOOK_S)
            if world.served.where != where:
                moved_s.append(world.now_s)
        assert moved_s
        for first_s in moved_s:
            assert sum(first_s <= one < first_s + 600 for one in moved_s) <= 2

    run(test)


def test_a_recovery_counts_as_a_move(run: Callable[[Test], None]) -> None:
    async def test(world: World) -> None:
        first = world.served
        await world.look(LOOK_S)
        world.operations.plans.append(plan_of(BETTER))
        world.shoal.models.apply(first.name, Lost(AgentLost("d", "test")))
        await world.shoal.until(lambda: world.shoal.models.serving not in (None, first))
        world.operations.gain, world.operations.other = 0.5, plan_of(ALONE)
        await world.look(PAUSE_S)
        assert world.served.where == "c"
        await world.look(2 * LOOK_S)
        assert world.served.where == "d"

    run(test)


# ---- measuring ---------------------------------------------------------------------------------


def test_a_device_that_joined_is_measured_in_a_quiet_moment(run: Callable[[Test], None]) -> None:
    async def test(world: World) -> None:
        shoal = world.shoal
        await shoal.join("a")
        shoal.told.clear()
        async with world.served.slots.one((1, 2)):  # An answer runs. All are on one machine here.
            await world.look(PATIENCE_S / 2)
            assert not shoal.of(MeasureModel)
            assert not shoal.of(MeasureLink)
            # The plan does without it meanwhile.
            assert list(world.operations.without) == [shoal.member("a")]
            await world.look(PATIENCE_S)
            # Links do not wait for ever. One is measured at a time.
            assert shoal.of(MeasureModel) == []
            assert len(shoal.of(MeasureLink)) == 6
        await world.look(2 * LOOK_S)
        assert [name for name, _ in shoal.of(MeasureModel)] == ["a"]
        assert not world.operations.without
        await world.look(4 * LOOK_S)
        assert len(shoal.of(MeasureModel)) == 1

    run(test)


async def measuring(world: World) -> asyncio.Future[None]:
    """Begin a look that has a device measured. The device does not answer."""
    shoal = world.shoal
    await shoal.join("a")
    shoal.busy.add("a")
    shoal.told.clear()
    world.now_s += LOOK_S
    looking = asyncio.ensure_future(world.loop.look())
    await shoal.until(lambda: shoal.of(MeasureModel))
    return looking


def test_a_request_ends_a_measurement(run: Callable[[Test], None]) -> None:
    async def test(world: World) -> None:
        shoal, looking = world.shoal, await measuring(world)
        async with world.served.slots.one((1, 2)):
            await looking
        assert not shoal.member("a").is_asked

    run(test)


def test_no_request_ends_a_measurement_of_a_machine_without_a_stage(
    run: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # All devices are on one machine here.
    monkeypatch.setattr(remeasuring, "machines", lambda members: [[one] for one in members])

    async def test(world: World) -> None:
        shoal, looking = world.shoal, await measuring(world)
        async with world.served.slots.one((1, 2)):
            await asyncio.wait({looking}, timeout=10 * POLL_S)
            assert not looking.done()
            assert shoal.member("a").is_asked
        async with shoal.turns.asked(lambda step: None):  # A user's operation does end it.
            assert not shoal.member("a").is_asked
        await looking

    run(test)


def test_a_user_does_not_wait_for_a_move(run: Callable[[Test], None]) -> None:
    async def test(world: World) -> None:
        shoal, first = world.shoal, world.served
        world.operations.gain = 0.5
        await world.look(STEADY_S)
        stuck = world.operations.stuck = asyncio.Event()
        world.now_s += 2 * LOOK_S
        looking = asyncio.ensure_future(world.loop.look())
        await stuck.wait()
        async with shoal.turns.asked(lambda step: None):
            assert world.served is first
        await looking
        assert world.served is first

    run(test)


def test_planning_that_made_way_for_a_user_begins_again(run: Callable[[Test], None]) -> None:
    async def test(world: World) -> None:
        planning = world.operations.planning = asyncio.Event()
        world.now_s += LOOK_S
        looking = asyncio.ensure_future(world.loop.look())
        await planning.wait()
        async with world.shoal.turns.asked(lambda step: None):
            pass
        await looking
        world.operations.planning = None
        await world.look(2 * LOOK_S)
        assert world.operations.looked == 2
        await world.look(2 * LOOK_S)
        assert world.operations.looked == 2  # No figure has changed since.

    run(test)


def test_bad_figures_are_measured_again_ever_more_rarely(run: Callable[[Test], None]) -> None:
    async def test(world: World) -> None:
        stale, member = Stale(), world.shoal.member("c")
        stale.note(member, 1.0, 0.0)
        stale.note(member, 9.0, 1.0)  # It is known already.
        now_s, asked = 0.0, []
        for _ in range(8):
            assert stale.due(now_s + FIRST_S - 1) == []
            now_s = next(at for at in range(int(now_s), 100_000) if stale.due(at))
            asked.append(now_s)
            stale.measured(member, 3.0, now_s)
        pauses = [after - before for before, after in itertools.pairwise(asked)]
        assert pauses == [120, 240, 480, 960, LONGEST_S, LONGEST_S, LONGEST_S]
        stale.measured(member, 1.2, now_s)
        assert stale.due(1e9) == []
        stale.note((member, world.shoal.member("d")), 1.0, 0.0)
        world.shoal.kill("d")
        await world.shoal.until(lambda: len(world.shoal.roster.members) == 1)
        stale.keep(world.shoal.roster)
        assert stale.due(1e9) == []

    run(test)


# ---- tempo -------------------------------------------------------------------------------------


def test_tokens_are_timed_by_sequences_in_flight_and_without_guesses(
    run: Callable[[Test], None],
) -> None:
    async def test(world: World) -> None:
        tempo = Tempo(world.shoal.roster, world.shoal.models)
        epoch = world.served.epoch
        await world.tokens("d", 0.1, FEWEST - 1)
        await world.tokens("c", 0.5)  # It does not sample.
        assert tempo.token_s(epoch) == {}
        # A pass that checked three guesses: two were right, and its tokens share its time.
        for drafted, accepted in ((0, 0), (0, 0), (3, 2)):
            world.index += 1
            told = TokenSampled(epoch, 1, world.index, 5, "", 30_000, b"", drafted, accepted)
            await world.shoal.said("d", told)
        await world.tokens("d", 0.1, 1)
        assert tempo.token_s(epoch) == {0: pytest.approx(0.1)}
        async with world.served.slots.one((1,)), world.served.slots.one((2,)):
            await world.tokens("d", 0.3)
        assert tempo.token_s(epoch) == {0: pytest.approx(0.1), 2: pytest.approx(0.3)}
        await world.shoal.load(plan_of(ALONE))
        await world.tokens("d", 0.1, 1)
        assert tempo.token_s(epoch) == {}  # It has ended.

    run(test)


def test_a_model_that_was_unloaded_is_forgotten(run: Callable[[Test], None]) -> None:
    async def test(world: World) -> None:
        await world.look(LOOK_S)
        assert list(world.loop._watched) == [world.served.name]
        await world.operations.unload()
        await world.loop.look()
        assert not world.loop._watched

    run(test)


def test_memory_that_returns_makes_a_new_plan(run: Callable[[Test], None]) -> None:
    """The usual rule says whether the model moves to it, and how often."""

    async def test(world: World) -> None:
        await world.look(LOOK_S)
        world.operations.gain = 0.5
        looked, c = world.operations.looked, world.shoal.member("c")
        for memory_bytes in (2 << 30, 1 << 30, 2 << 30):
            profile = replace(c.profile, memory_bytes=memory_bytes)
            await world.shoal.said("c", FiguresChanged(profile, {}, ()))
            await c.lives()
            await world.look(LOOK_S)
            assert c.profile.memory_bytes == memory_bytes
            looked += 1
            assert world.operations.looked == looked
        await world.look(STEADY_S + LOOK_S)
        assert world.served.where == "c"
        assert world.told("moved") == ["moved"]

    run(test)
