"""The states of one model, its events, and the table of what each event does in each state.

Two rules hold for this file. It is pure: it reads no clock, starts no task and does no I/O. So the
table can be tested as a table. And every fact about a loaded model is in one of these states, and
nowhere else. coordinator.loading.models owns the states.

``advance`` takes a state and an event. It returns the next state and the actions that others carry
out. ``make state-diagram`` draws the table into docs/design.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from coordinator.errors import CoordinatorError, NotLoaded
from planning.request import LoadRequest, model_name

if TYPE_CHECKING:
    from coordinator.loading.deployment import Deployment, DeploymentKey, Planned

NO_MODEL = "no model is loaded: run `shoal load MODEL`"

# ---- states ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Nothing:
    """The model is not loaded."""

    word = "unloaded"
    error: CoordinatorError = field(default_factory=lambda: NotLoaded(NO_MODEL))
    """The error for a request that names the model."""


@dataclass(frozen=True, slots=True)
class Resuming:
    """The coordinator was restarted, and loads the model that was loaded before."""

    word = "resuming"
    request: LoadRequest
    devices: tuple[str, ...]
    """Names of the devices that it was loaded on."""
    missing: tuple[str, ...]
    """Names of the devices that have not joined yet."""
    since_s: float
    error: CoordinatorError | None = None
    """Why the last attempt failed."""


@dataclass(frozen=True, slots=True)
class Loading:
    """A user has asked for the model, which was not loaded before."""

    word = "loading"
    request: LoadRequest
    since_s: float
    step: str = ""
    """The phase of the load."""


@dataclass(frozen=True, slots=True)
class Past:
    """The deployments that the present one has replaced, without a load by a user between."""

    ended: Mapping[DeploymentKey, CoordinatorError] = field(
        default_factory=lambda: MappingProxyType({})
    )
    """The error that ended each deployment, by its key."""
    suspect: frozenset[int] = frozenset()
    """Epochs whose tokens may be wrong, because files were damaged."""


@dataclass(frozen=True, slots=True)
class Serving:
    """The model answers."""

    word = "ready"
    deployment: Deployment
    since_s: float
    past: Past = Past()


@dataclass(frozen=True, slots=True)
class Replacing:
    """A device or link was lost, and the model is placed anew. Answers wait."""

    word = "recovering"
    deployment: Deployment
    """The broken deployment."""
    cause: CoordinatorError
    """The error that broke it."""
    error: CoordinatorError
    """The cause. After a failed attempt it also has the reason of that failure."""
    since_s: float
    past: Past
    wanted: Planned | None = None
    """The plan to move to. None: it is planned anew, also after a failed attempt."""


@dataclass(frozen=True, slots=True)
class Broken:
    """Placing the model failed for so long that answers no longer wait.

    Attempts go on when devices join.
    """

    word = "broken"
    of: Replacing | Resuming
    error: CoordinatorError
    since_s: float


@dataclass(frozen=True, slots=True)
class Asleep:
    """Nobody used the model for the time that its load names. A request loads it again."""

    word = "asleep"
    request: LoadRequest
    since_s: float
    error: CoordinatorError | None = None
    """Why the last request could not load it."""


Present: TypeAlias = Resuming | Loading | Serving | Replacing | Broken | Asleep
State: TypeAlias = Nothing | Present
STATES: tuple[type[State], ...] = (
    Nothing,
    Resuming,
    Loading,
    Serving,
    Replacing,
    Broken,
    Asleep,
)

# ---- events ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ResumeBegan:
    """The coordinator found a loaded model on its disk."""

    request: LoadRequest
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Slept:
    """Nobody has used the model for the time that its load names."""

    request: LoadRequest


@dataclass(frozen=True, slots=True)
class WakeFailed:
    """A request found the model asleep, and it could not be loaded again."""

    error: CoordinatorError


@dataclass(frozen=True, slots=True)
class DevicesAwaited:
    """Some of the devices that a resumed model was on have not joined."""

    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoadBegan:
    """A user asked for the model."""

    request: LoadRequest


@dataclass(frozen=True, slots=True)
class StepBegan:
    """An operation for the model reached its next phase."""

    step: str


@dataclass(frozen=True, slots=True)
class Placed:
    """The model's stages are loaded and connected."""

    deployment: Deployment


@dataclass(frozen=True, slots=True)
class Adopted:
    """The model's stages were still loaded, and the coordinator has taken them over.

    It was restarted, or the connection to a device had ended and the device is back.
    """

    deployment: Deployment


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A load that a user asked for ended early."""

    error: CoordinatorError


@dataclass(frozen=True, slots=True)
class Lost:
    """A device or link of the deployment was lost."""

    error: CoordinatorError


@dataclass(frozen=True, slots=True)
class MoveBegan:
    """The model leaves its deployment, which works, for a better plan."""

    error: CoordinatorError
    """The reason in the words of an error, for the answers that pause."""
    wanted: Planned


@dataclass(frozen=True, slots=True)
class MovedOver:
    """The stages of a better plan are loaded beside those of the deployment, and take over."""

    deployment: Deployment
    error: CoordinatorError
    """The reason in the words of an error, for the answers that go over."""


@dataclass(frozen=True, slots=True)
class StageFoundDamaged:
    """A stage of the deployment ran from a damaged file."""

    error: CoordinatorError


@dataclass(frozen=True, slots=True)
class FilesMended:
    """An attempt to place the model anew found and mended damaged files."""


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """An attempt of the coordinator to place the model failed."""

    why: str


@dataclass(frozen=True, slots=True)
class WaitEnded:
    """Answers have waited for the longest allowed time."""

    error: CoordinatorError


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A user unloads the model, or loads another one in its place."""

    error: CoordinatorError


@dataclass(frozen=True, slots=True)
class Stopped:
    """The coordinator stops. The file on disk stays."""

    error: CoordinatorError


Event: TypeAlias = (
    ResumeBegan
    | DevicesAwaited
    | LoadBegan
    | StepBegan
    | Placed
    | Adopted
    | LoadFailed
    | Lost
    | MoveBegan
    | MovedOver
    | StageFoundDamaged
    | FilesMended
    | AttemptFailed
    | WaitEnded
    | Slept
    | WakeFailed
    | Unloaded
    | Stopped
)
EVENTS: tuple[type[Event], ...] = (
    ResumeBegan,
    DevicesAwaited,
    LoadBegan,
    StepBegan,
    Placed,
    Adopted,
    LoadFailed,
    Lost,
    MoveBegan,
    MovedOver,
    StageFoundDamaged,
    FilesMended,
    AttemptFailed,
    WaitEnded,
    Slept,
    WakeFailed,
    Unloaded,
    Stopped,
)

# ---- actions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EndAnswers:
    """End the answers of this deployment with the error."""

    deployment: Deployment
    error: CoordinatorError


@dataclass(frozen=True, slots=True)
class Place:
    """Try to place the model until that works."""

    state: Resuming | Replacing


@dataclass(frozen=True, slots=True)
class StopPlacing:
    """End the attempts to place the model."""

    name: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep on disk what a user loaded."""

    deployment: Deployment


@dataclass(frozen=True, slots=True)
class Record:
    """Keep on disk which stages belong together, for a restart of the coordinator."""

    deployment: Deployment


@dataclass(frozen=True, slots=True)
class Rest:
    """Unload the stages of a deployment that nobody uses."""

    deployment: Deployment


@dataclass(frozen=True, slots=True)
class Release:
    """Unload the stages of a deployment, because another one has taken over."""

    deployment: Deployment


@dataclass(frozen=True, slots=True)
class Forget:
    """Remove the loaded request of a model and the record of its stages from the disk."""

    name: str


Action: TypeAlias = EndAnswers | Place | StopPlacing | Keep | Record | Rest | Release | Forget
Next: TypeAlias = tuple[State, tuple[Action, ...]]
Rule: TypeAlias = Callable[[Any, Any, float], Next]
"""Maps (state, event, seconds of the monotonic clock) to the next state and actions."""

# ---- rules -------------------------------------------------------------------------------------


def _resume(state: Nothing, event: ResumeBegan, now_s: float) -> Next:
    resuming = Resuming(event.request, event.devices, event.devices, now_s)
    return resuming, (Place(resuming),)


def _await(state: Resuming, event: DevicesAwaited, now_s: float) -> Next:
    return replace(state, missing=event.missing), ()


def _load(state: Nothing, event: LoadBegan, now_s: float) -> Next:
    return Loading(event.request, now_s), ()


def _step(state: Loading, event: StepBegan, now_s: float) -> Next:
    return replace(state, step=event.step), ()


def _serve(state: Loading, event: Placed, now_s: float) -> Next:
    placed = event.deployment
    return Serving(placed, now_s), (Keep(placed), Record(placed))


def _serve_resumed(state: Resuming, event: Placed, now_s: float) -> Next:
    return Serving(event.deployment, now_s), (Record(event.deployment),)


def _adopt(state: Resuming, event: Adopted, now_s: float) -> Next:
    return Serving(event.deployment, now_s), ()


def _serve_replaced(state: Replacing, event: Placed, now_s: float) -> Next:
    return Serving(event.deployment, now_s, _with_ended(state)), (Record(event.deployment),)


def _adopt_returned(state: Replacing, event: Adopted, now_s: float) -> Next:
    return Serving(event.deployment, now_s, _with_ended(state)), ()


def _with_ended(state: Replacing) -> Past:
    ended = {**state.past.ended, state.deployment.key: state.cause}
    return replace(state.past, ended=MappingProxyType(ended))


def _serve_mended(state: Broken, event: Placed, now_s: float) -> Next:
    if isinstance(state.of, Replacing):
        return _serve_replaced(state.of, event, now_s)
    return _serve_resumed(state.of, event, now_s)


def _fail_load(state: Loading, event: LoadFailed, now_s: float) -> Next:
    return Nothing(event.error), ()


def _lose(state: Serving, event: Lost, now_s: float) -> Next:
    replacing = Replacing(state.deployment, event.error, event.error, now_s, state.past)
    return replacing, (EndAnswers(state.deployment, event.error), Place(replacing))


def _move(state: Serving, event: MoveBegan, now_s: float) -> Next:
    replacing = Replacing(
        state.deployment, event.error, event.error, now_s, state.past, event.wanted
    )
    return replacing, (EndAnswers(state.deployment, event.error), Place(replacing))


def _move_over(state: Serving, event: MovedOver, now_s: float) -> Next:
    before, after = state.deployment, event.deployment
    ended = {**state.past.ended, before.key: event.error}
    past = replace(state.past, ended=MappingProxyType(ended))
    actions = (EndAnswers(before, event.error), Record(after), Release(before))
    return Serving(after, now_s, past), actions


def _lose_damaged(state: Serving, event: StageFoundDamaged, now_s: float) -> Next:
    return _lose(replace(state, past=_suspect(state)), Lost(event.error), now_s)


def _suspect(state: Serving | Replacing) -> Past:
    return replace(state.past, suspect=state.past.suspect | {state.deployment.epoch})


def _doubt(state: Replacing, event: FilesMended | StageFoundDamaged, now_s: float) -> Next:
    return replace(state, past=_suspect(state)), ()


def _doubt_broken(state: Broken, event: FilesMended | StageFoundDamaged, now_s: float) -> Next:
    if isinstance(state.of, Resuming):  # It has given no answers since the restart.
        return state, ()
    return replace(state, of=replace(state.of, past=_suspect(state.of))), ()


def _explain(state: Replacing | Resuming, event: AttemptFailed, now_s: float) -> Next:
    error = _unplaced(state, event.why)
    if isinstance(state, Replacing):
        return replace(state, error=error, wanted=None), ()
    return replace(state, error=error), ()


def _explain_broken(state: Broken, event: AttemptFailed, now_s: float) -> Next:
    error = _unplaced(state.of, event.why)
    return replace(state, of=replace(state.of, error=error), error=error), ()


def _unplaced(state: Replacing | Resuming, why: str) -> CoordinatorError:
    if isinstance(state, Replacing):
        return state.cause.unplaced(why)
    return NotLoaded(f"{model_name(state.request.model)} cannot be loaded again yet: {why}")


def _give_up(state: Replacing | Resuming, event: WaitEnded, now_s: float) -> Next:
    return Broken(state, event.error, now_s), ()


def _sleep(state: Serving, event: Slept, now_s: float) -> Next:
    return Asleep(event.request, now_s), (Rest(state.deployment),)


def _sleep_on(state: Nothing, event: Slept, now_s: float) -> Next:
    return Asleep(event.request, now_s), ()


def _wake(state: Asleep, event: ResumeBegan, now_s: float) -> Next:
    resuming = Resuming(event.request, event.devices, event.devices, now_s)
    return resuming, (Place(resuming),)


def _fail_wake(state: Resuming, event: WakeFailed, now_s: float) -> Next:
    return Asleep(state.request, now_s, event.error), (StopPlacing(name_of(state)),)


def _end(state: State, event: Unloaded | Stopped) -> Next:
    """End a model in any state. The disk keeps it if the coordinator only stops."""
    actions: list[Action] = []
    if isinstance(state, Serving):
        actions.append(EndAnswers(state.deployment, event.error))
    if isinstance(state, (Resuming, Replacing, Broken)):
        actions.append(StopPlacing(name_of(state)))
    if isinstance(event, Unloaded):
        actions.append(Forget(name_of(state)))
    return Nothing(event.error), tuple(actions)


def _unload(state: State, event: Unloaded, now_s: float) -> Next:
    return _end(state, event)


def _stop(state: State, event: Stopped, now_s: float) -> Next:
    return _end(state, event)


# ---- the table ---------------------------------------------------------------------------------

TABLE: Mapping[type[State], Mapping[type[Event], tuple[type[State], Rule]]] = {
    Nothing: {
        ResumeBegan: (Resuming, _resume),
        LoadBegan: (Loading, _load),
        Slept: (Asleep, _sleep_on),
        Stopped: (Nothing, _stop),
    },
    Resuming: {
        DevicesAwaited: (Resuming, _await),
        Placed: (Serving, _serve_resumed),
        Adopted: (Serving, _adopt),
        AttemptFailed: (Resuming, _explain),
        WaitEnded: (Broken, _give_up),
        WakeFailed: (Asleep, _fail_wake),
        Unloaded: (Nothing, _unload),
        Stopped: (Nothing, _stop),
    },
    Loading: {
        StepBegan: (Loading, _step),
        Placed: (Serving, _serve),
        LoadFailed: (Nothing, _fail_load),
        Stopped: (Nothing, _stop),
    },
    Serving: {
        Lost: (Replacing, _lose),
        MoveBegan: (Replacing, _move),
        MovedOver: (Serving, _move_over),
        StageFoundDamaged: (Replacing, _lose_damaged),
        Slept: (Asleep, _sleep),
        Unloaded: (Nothing, _unload),
        Stopped: (Nothing, _stop),
    },
    Replacing: {
        Placed: (Serving, _serve_replaced),
        Adopted: (Serving, _adopt_returned),
        StageFoundDamaged: (Replacing, _doubt),
        FilesMended: (Replacing, _doubt),
        AttemptFailed: (Replacing, _explain),
        WaitEnded: (Broken, _give_up),
        Unloaded: (Nothing, _unload),
        Stopped: (Nothing, _stop),
    },
    Broken: {
        Placed: (Serving, _serve_mended),
        StageFoundDamaged: (Broken, _doubt_broken),
        FilesMended: (Broken, _doubt_broken),
        AttemptFailed: (Broken, _explain_broken),
        Unloaded: (Nothing, _unload),
        Stopped: (Nothing, _stop),
    },
    Asleep: {
        ResumeBegan: (Resuming, _wake),
        Unloaded: (Nothing, _unload),
        Stopped: (Nothing, _stop),
    },
}
"""The next state and the rule that makes it, by state and event.

A pair without an entry changes nothing. Examples are a second loss while the first one is replaced,
and the steps of a load beside a serving model.
"""


def advance(state: State, event: Event, now_s: float) -> Next:
    """Return the next state and the actions. ``now_s`` is of the monotonic clock."""
    row = TABLE[type(state)].get(type(event))
    return (state, ()) if row is None else row[1](state, event, now_s)


# ---- reading a state ---------------------------------------------------------------------------


def deployment_of(state: State) -> Deployment | None:
    """The deployment that serves or served last, or None if there is none."""
    if isinstance(state, Broken):
        return deployment_of(state.of)
    return state.deployment if isinstance(state, (Serving, Replacing)) else None


def past_of(state: State) -> Past:
    """The deployments that the present one has replaced."""
    if isinstance(state, Broken):
        return past_of(state.of)
    return state.past if isinstance(state, (Serving, Replacing)) else Past()


def request_of(state: Present) -> LoadRequest:
    """The request for the model."""
    if isinstance(state, Broken):
        return request_of(state.of)
    return state.deployment.request if isinstance(state, (Serving, Replacing)) else state.request


def directory_of(state: Present) -> Path:
    """The directory of the model."""
    return request_of(state).model


def name_of(state: State) -> str:
    """The name of the model, or empty for Nothing."""
    return "" if isinstance(state, Nothing) else model_name(directory_of(state))


def waiting_for(state: State) -> tuple[str, ...]:
    """Names of the devices that a resumed model waits for."""
    if isinstance(state, Broken):
        return waiting_for(state.of)
    return state.missing if isinstance(state, Resuming) else ()


def error_of(state: State) -> CoordinatorError | None:
    """The reason why the model does not answer, or None."""
    return None if isinstance(state, (Loading, Serving)) else state.error


def describe(state: State) -> str:
    """The state in words, such as "resuming: waiting for pi-1"."""
    missing = waiting_for(state)
    return state.word + (f": waiting for {', '.join(missing)}" if missing else "")
