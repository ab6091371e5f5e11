"""The table of a model's life: every event in every state, and its diagram."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from coordinator.errors import AgentDamaged, AgentLost, CoordinatorError, Moved, NotLoaded
from coordinator.loading import state as states
from coordinator.loading.deployment import Deployment, Planned
from coordinator.loading.diagram import with_diagram
from coordinator.loading.state import (
    EVENTS,
    STATES,
    TABLE,
    Adopted,
    Asleep,
    AttemptFailed,
    Broken,
    DevicesAwaited,
    EndAnswers,
    Event,
    FilesMended,
    Forget,
    Keep,
    LoadBegan,
    LoadFailed,
    Loading,
    Lost,
    MoveBegan,
    MovedOver,
    Nothing,
    Past,
    Place,
    Placed,
    Record,
    Release,
    Replacing,
    Rest,
    ResumeBegan,
    Resuming,
    Serving,
    Slept,
    StageFoundDamaged,
    State,
    StepBegan,
    Stopped,
    StopPlacing,
    Unloaded,
    WaitEnded,
    WakeFailed,
    advance,
    deployment_of,
    describe,
    error_of,
    name_of,
    past_of,
    request_of,
    waiting_for,
)
from planning.request import LoadRequest

NOW_S = 9.0
REQUEST = LoadRequest(Path("/models/llama"))
OLD, NEW = (
    cast(Deployment, SimpleNamespace(epoch=epoch, key=(epoch, 0), request=REQUEST, where=""))
    for epoch in (1, 2)
)
LOSS = AgentLost("pi-2", "silent")
DAMAGE = AgentDamaged("pi-1", "a file was damaged")
WHY = NotLoaded("it was unloaded")
MOVED = Moved()
WANTED = cast(Planned, SimpleNamespace())

RESUMING = Resuming(REQUEST, ("pi-1", "pi-2"), ("pi-2",), 1.0)
LOADING = Loading(REQUEST, 1.0, "plan")
SERVING = Serving(OLD, 1.0)
REPLACING = Replacing(OLD, LOSS, LOSS, 1.0, Past())
BROKEN = Broken(REPLACING, LOSS, 2.0)
ASLEEP = Asleep(REQUEST, 1.0)
STATE: dict[type[State], State] = {
    Nothing: Nothing(),
    Resuming: RESUMING,
    Loading: LOADING,
    Serving: SERVING,
    Replacing: REPLACING,
    Broken: BROKEN,
    Asleep: ASLEEP,
}
EVENT: dict[type[Event], Event] = {
    ResumeBegan: ResumeBegan(REQUEST, ("pi-1", "pi-2")),
    DevicesAwaited: DevicesAwaited(("pi-1",)),
    LoadBegan: LoadBegan(REQUEST),
    StepBegan: StepBegan("quantize"),
    Placed: Placed(NEW),
    Adopted: Adopted(NEW),
    LoadFailed: LoadFailed(WHY),
    Lost: Lost(LOSS),
    MoveBegan: MoveBegan(MOVED, WANTED),
    MovedOver: MovedOver(NEW, MOVED),
    StageFoundDamaged: StageFoundDamaged(DAMAGE),
    FilesMended: FilesMended(),
    AttemptFailed: AttemptFailed("memory is short"),
    WaitEnded: WaitEnded(LOSS),
    Slept: Slept(REQUEST),
    WakeFailed: WakeFailed(LOSS),
    Unloaded: Unloaded(WHY),
    Stopped: Stopped(WHY),
}
RESUMED = Resuming(REQUEST, ("pi-1", "pi-2"), ("pi-1", "pi-2"), NOW_S)
REPLACED = Past({(1, 0): LOSS})
SUSPECT = Past(suspect=frozenset({1}))
DAMAGED = Replacing(OLD, DAMAGE, DAMAGE, NOW_S, SUSPECT)
LOST = Replacing(OLD, LOSS, LOSS, NOW_S, Past())
MOVING = Replacing(OLD, MOVED, MOVED, NOW_S, Past(), WANTED)
GONE = Nothing(WHY)

EXPECTED: dict[tuple[type[State], type[Event]], tuple[State, tuple[object, ...]]] = {
    (Nothing, ResumeBegan): (RESUMED, (Place(RESUMED),)),
    (Nothing, LoadBegan): (Loading(REQUEST, NOW_S), ()),
    (Nothing, Slept): (Asleep(REQUEST, NOW_S), ()),
    (Nothing, Stopped): (GONE, ()),
    (Resuming, DevicesAwaited): (replace(RESUMING, missing=("pi-1",)), ()),
    (Resuming, Placed): (Serving(NEW, NOW_S), (Record(NEW),)),
    (Resuming, Adopted): (Serving(NEW, NOW_S), ()),
    (Resuming, WaitEnded): (Broken(RESUMING, LOSS, NOW_S), ()),
    (Resuming, WakeFailed): (Asleep(REQUEST, NOW_S, LOSS), (StopPlacing("llama"),)),
    (Resuming, Unloaded): (GONE, (StopPlacing("llama"), Forget("llama"))),
    (Resuming, Stopped): (GONE, (StopPlacing("llama"),)),
    (Loading, StepBegan): (Loading(REQUEST, 1.0, "quantize"), ()),
    (Loading, Placed): (Serving(NEW, NOW_S), (Keep(NEW), Record(NEW))),
    (Loading, LoadFailed): (GONE, ()),
    (Loading, Stopped): (GONE, ()),
    (Serving, Lost): (LOST, (EndAnswers(OLD, LOSS), Place(LOST))),
    (Serving, MoveBegan): (MOVING, (EndAnswers(OLD, MOVED), Place(MOVING))),
    (Serving, MovedOver): (
        Serving(NEW, NOW_S, Past({(1, 0): MOVED})),
        (EndAnswers(OLD, MOVED), Record(NEW), Release(OLD)),
    ),
    (Serving, StageFoundDamaged): (DAMAGED, (EndAnswers(OLD, DAMAGE), Place(DAMAGED))),
    (Serving, Slept): (Asleep(REQUEST, NOW_S), (Rest(OLD),)),
    (Serving, Unloaded): (GONE, (EndAnswers(OLD, WHY), Forget("llama"))),
    (Serving, Stopped): (GONE, (EndAnswers(OLD, WHY),)),
    (Replacing, Placed): (Serving(NEW, NOW_S, REPLACED), (Record(NEW),)),
    (Replacing, Adopted): (Serving(NEW, NOW_S, REPLACED), ()),
    (Replacing, StageFoundDamaged): (replace(REPLACING, past=SUSPECT), ()),
    (Replacing, FilesMended): (replace(REPLACING, past=SUSPECT), ()),
    (Replacing, WaitEnded): (Broken(REPLACING, LOSS, NOW_S), ()),
    (Replacing, Unloaded): (GONE, (StopPlacing("llama"), Forget("llama"))),
    (Replacing, Stopped): (GONE, (StopPlacing("llama"),)),
    (Broken, Placed): (Serving(NEW, NOW_S, REPLACED), (Record(NEW),)),
    (Broken, StageFoundDamaged): (replace(BROKEN, of=replace(REPLACING, past=SUSPECT)), ()),
    (Broken, FilesMended): (replace(BROKEN, of=replace(REPLACING, past=SUSPECT)), ()),
    (Broken, Unloaded): (GONE, (StopPlacing("llama"), Forget("llama"))),
    (Broken, Stopped): (GONE, (StopPlacing("llama"),)),
    (Asleep, ResumeBegan): (RESUMED, (Place(RESUMED),)),
    (Asleep, Unloaded): (GONE, (Forget("llama"),)),
    (Asleep, Stopped): (GONE, ()),
}
"""What each event does in each state; a pair that is not here changes nothing. Failed attempts make
an error of their own, and have a test of their own."""

EXPLAINED = (Resuming, Replacing, Broken)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_every_event_in_every_state(state: type[State], event: type[Event]) -> None:
    if event is AttemptFailed and state in EXPLAINED:
        return
    expected = EXPECTED.get((state, event), (STATE[state], ()))
    assert advance(STATE[state], EVENT[event], NOW_S) == expected


def test_the_table_has_what_happens_and_where_it_leads() -> None:
    happens = {(state, event) for state, rows in TABLE.items() for event in rows}
    assert happens == {*EXPECTED, *((state, AttemptFailed) for state in EXPLAINED)}
    for state, rows in TABLE.items():
        for event, (target, _) in rows.items():
            after, _ = advance(STATE[state], EVENT[event], NOW_S)
            assert type(after) is target


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (RESUMING, "llama cannot be loaded again yet: memory is short"),
        (REPLACING, "pi-2: device lost .*others cannot take its place: memory is short"),
        (BROKEN, "pi-2: device lost .*others cannot take its place: memory is short"),
        (Broken(RESUMING, WHY, 2.0), "llama cannot be loaded again yet: memory is short"),
    ],
)
def test_a_failed_attempt_says_what_is_missing(state: State, words: str) -> None:
    for _ in range(2):  # The second reason replaces the first.
        state, actions = advance(state, AttemptFailed("memory is short"), NOW_S)
        assert actions == ()
        with pytest.raises(CoordinatorError, match=words) as raised:
            raise cast(CoordinatorError, error_of(state))
        assert str(raised.value).count("memory is short") == 1


def test_a_move_that_failed_is_not_tried_again() -> None:
    after, _ = advance(MOVING, AttemptFailed("memory is short"), NOW_S)
    assert isinstance(after, Replacing)
    assert after.wanted is None
    assert "cannot be placed anew: memory is short" in str(after.error)


def test_a_resumed_model_that_was_broken_has_no_past() -> None:
    broken = Broken(RESUMING, WHY, 2.0)
    assert advance(broken, Placed(NEW), NOW_S) == (Serving(NEW, NOW_S), (Record(NEW),))
    assert advance(broken, FilesMended(), NOW_S) == (broken, ())


def test_what_was_replaced_is_remembered_over_several_losses() -> None:
    state: State = SERVING
    for event in (Lost(LOSS), FilesMended(), Placed(NEW), StageFoundDamaged(DAMAGE), Placed(OLD)):
        state, _ = advance(state, event, NOW_S)
    assert past_of(state) == Past({(1, 0): LOSS, (2, 0): DAMAGE}, frozenset({1, 2}))


def test_what_states_say() -> None:
    assert describe(RESUMING) == "resuming: waiting for pi-2"
    assert describe(Broken(RESUMING, WHY, 2.0)) == "broken: waiting for pi-2"
    assert describe(LOADING) == "loading"
    assert [waiting_for(state) for state in (RESUMING, LOADING, BROKEN)] == [("pi-2",), (), ()]
    assert [deployment_of(state) for state in (RESUMING, SERVING, BROKEN)] == [None, OLD, OLD]
    assert {name_of(state) for state in STATE.values()} == {"", "llama"}
    for state in STATE.values():
        assert isinstance(state, Nothing) or request_of(state) == REQUEST
    assert "no model is loaded" in str(error_of(Nothing()))
    assert error_of(SERVING) is None


def test_the_table_reads_no_clock_and_starts_no_task() -> None:
    assert states.__file__ is not None
    source = Path(states.__file__).read_text()
    for module in ("asyncio", "time", "os", "logging"):
        assert f"import {module}" not in source


def test_the_diagram_in_the_docs_is_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "design.md"
    assert with_diagram(page.read_text()) == page.read_text(), "run `make state-diagram`"
