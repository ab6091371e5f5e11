"""Owns the state of each model. All other code reads and follows it here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from coordinator.errors import CoordinatorError, NotLoaded, NotReady
from coordinator.loading import state as states
from coordinator.loading.deployment import Deployment
from coordinator.loading.state import (
    Action,
    Asleep,
    Broken,
    Event,
    Loading,
    Nothing,
    Present,
    Replacing,
    Resuming,
    Serving,
    State,
    advance,
    deployment_of,
    describe,
    error_of,
    name_of,
    past_of,
)
from coordinator.story import Story
from coordinator.watching import Signal
from model.spec import ModelSpec

UNLOADED = "the model was unloaded"

RETRY_LOADING_S = 5
"""Asking again for a model that is being loaded so often costs nothing."""

_ORDER = (Serving, Replacing, Resuming, Broken, Loading, Asleep)
"""A request without a model's name is about the first of these."""

_KINDS = {
    states.ResumeBegan: "resuming",
    states.LoadBegan: "load began",
    states.StepBegan: "step",
    states.Placed: "served",
    states.Adopted: "adopted",
    states.LoadFailed: "load failed",
    states.Lost: "lost",
    states.MoveBegan: "moving",
    states.MovedOver: "moved",
    states.StageFoundDamaged: "damaged",
    states.AttemptFailed: "not placed",
    states.WaitEnded: "broken",
    states.Slept: "asleep",
    states.WakeFailed: "not loaded",
    states.Unloaded: "unloaded",
}
"""The story's words for events. Other events are not told."""

ActionType = TypeVar("ActionType", bound=Action)


class Models:
    """The state of every model, by name. ``changed`` fires after each event that changed one."""

    def __init__(self, story: Story) -> None:
        self._story = story
        self._states: dict[str, State] = {}
        """In the order in which the models were loaded, the last one at the end."""
        self._output_kinds: dict[str, str | None] = {}
        """The kinds of what models return that have slept, as of ``named``."""
        self._handlers: dict[type[Any], Callable[[Any], None]] = {}
        self._followers: dict[type[Any], list[Callable[[Any], None]]] = {}
        self.changed = Signal()
        self.progress: Callable[[], str] = lambda: ""
        """Says how far the running operation is, such as "fetch 40 %"."""

    def carry_out(self, kind: type[ActionType], handler: Callable[[ActionType], None]) -> None:
        """Let ``handler`` carry out actions of this kind. It must not wait."""
        self._handlers[kind] = handler

    def follow(self, kind: type[ActionType], handler: Callable[[ActionType], None]) -> None:
        """Call ``handler`` after actions of this kind were carried out. It must not wait."""
        self._followers.setdefault(kind, []).append(handler)

    def apply(self, name: str, event: Event) -> State:
        """Apply an event to the model ``name``, carry out the actions, return the next state."""
        before = self[name]
        after, actions = advance(before, event, time.monotonic())
        if isinstance(before, Nothing):
            self._states.pop(name, None)
        self._states[name] = after
        was = deployment_of(before)
        if isinstance(after, Asleep) and was is not None:
            self.note_kind(name, was.spec)
        elif isinstance(after, Nothing):
            self._output_kinds.pop(name, None)
        if _is_news(before, event, after):
            is_replacement = isinstance(event, states.Placed) and deployment_of(before) is not None
            kind = "replaced" if is_replacement else _KINDS[type(event)]
            self._story.tell(kind, name, _text(event))
        for action in actions:
            if type(action) in self._handlers:
                self._handlers[type(action)](action)
            for follower in self._followers.get(type(action), ()):
                follower(action)
        if after is not before:
            self.changed.fire()
        return after

    def __getitem__(self, name: str) -> State:
        return self._states.get(name) or Nothing()

    def present(self) -> tuple[tuple[str, Present], ...]:
        """The name and state of every model that is not Nothing.

        Models that answer come first, and of these the one that was loaded last.
        """
        found = [
            (name, state) for name, state in self._states.items() if not isinstance(state, Nothing)
        ]
        return tuple(sorted(reversed(found), key=lambda item: _ORDER.index(type(item[1]))))

    @property
    def current(self) -> State:
        """The state of the model that requests are for, or Nothing."""
        present = self.present()
        return present[0][1] if present else Nothing()

    @property
    def serving(self) -> Deployment | None:
        """The deployment that answers now."""
        state = self.current
        return state.deployment if isinstance(state, Serving) else None

    @property
    def all_serving(self) -> tuple[Deployment, ...]:
        """The deployments of all models that answer now."""
        return tuple(state.deployment for _, state in self.present() if isinstance(state, Serving))

    def is_busy_beside(self, deployment: Deployment) -> bool:
        """Whether another model answers or encodes now on a device of this deployment."""
        devices = set(deployment.devices)
        return any(
            other is not deployment
            and not other.slots.is_idle
            and not devices.isdisjoint(other.devices)
            for other in self.all_serving
        )

    def note_kind(self, name: str, spec: ModelSpec) -> None:
        """Note the kind of what a model returns. It may be asleep since before a restart."""
        self._output_kinds[name] = None if spec.output is None else spec.output.kind

    def named(self, name: object, *kinds: str | None) -> str:
        """The name of the model that a request means, or empty if none is here.

        name: as the request gives it. A request that gives none, or one that is not here, is about
        the first model of ``present`` of one of these kinds, or else about the first model.
        kinds: as of ``OutputSpec.kind``, or None for a model that generates. Without any, all are
        meant.
        """
        present = self.present()
        if any(known == name for known, _ in present):
            return str(name)
        meant = [
            known for known, state in present if not kinds or self._kind(known, state) in kinds
        ]
        return next(iter((*meant, *(known for known, _ in present))), "")

    def _kind(self, name: str, state: State) -> str | None:
        """The kind of what a model returns. One that is loaded for the first time has none."""
        deployment = deployment_of(state)
        if deployment is None:
            return self._output_kinds.get(name, "")
        return None if deployment.spec.output is None else deployment.spec.output.kind

    def of_epoch(self, epoch: int) -> Deployment | None:
        """The present deployment with this epoch, whether it serves or was broken."""
        for _, state in self.present():
            deployment = deployment_of(state)
            if deployment is not None and deployment.epoch == epoch:
                return deployment
        return None

    # ---- requests -------------------------------------------------------------------------------

    def require_soon(self, name: object = None) -> None:
        """Raise NotReady while a model is being loaded or resumed. That may take minutes.

        name: as of ``named``.
        """
        state = self[self.named(name)]
        # A request that wakes a model waits for it.
        if isinstance(state, (Loading, Resuming)) and states.request_of(state).keep_s is None:
            what = f"{name_of(state)} is {describe(state)}"
            progress = self.progress()
            raise NotReady(f"{what}{progress and f' ({progress})'}", RETRY_LOADING_S)

    async def deployment(self, name: object = None) -> Deployment:
        """Wait for the deployment that answers. Raises the reason if there will be none.

        name: as of ``named``. A model that sleeps is loaded again.
        """
        found = self.named(name)
        state = self[found]
        if isinstance(state, Asleep):
            self.apply(found, states.ResumeBegan(state.request, ()))
        deployment = await self._served(found, lambda state: True)
        # It must not fall asleep while a request is read, or if its answer is known.
        deployment.slots.used_s = time.monotonic()
        return deployment

    async def latest(self, deployment: Deployment) -> Deployment:
        """Wait for this deployment, or for the one that takes its place.

        Raises the error that broke it for good, or NotLoaded after a user unloaded the model.
        """
        return await self._served(deployment.name, lambda state: _continues(state, deployment))

    async def _served(self, name: str, is_meant: Callable[[State], bool]) -> Deployment:
        with self.changed.watch() as changed:
            while True:
                changed.clear()
                state = self[name]
                if isinstance(state, Nothing):
                    raise state.error.with_traceback(None)
                if not is_meant(state):
                    raise NotLoaded(UNLOADED)
                if isinstance(state, Serving):
                    return state.deployment
                if isinstance(state, Asleep):
                    raise (state.error or NotLoaded(UNLOADED)).with_traceback(None)
                if isinstance(state, Broken):
                    # It is raised many times. A traceback would grow with each.
                    raise state.error.with_traceback(None)
                await changed.wait()

    def require(self, deployment: Deployment) -> None:
        """Raise the reason if ``deployment`` does not answer."""
        error = self.ended_by(deployment)
        if error is not None:
            raise error.with_traceback(None)

    def ended_by(self, deployment: Deployment) -> CoordinatorError | None:
        """The error that ended ``deployment``, or None while it answers."""
        state = self[deployment.name]
        if not _continues(state, deployment):
            return state.error if isinstance(state, Nothing) else NotLoaded(UNLOADED)
        if deployment.key in past_of(state).ended:
            return past_of(state).ended[deployment.key]
        return state.error if isinstance(state, (Replacing, Broken)) else None

    def is_replaced(self, deployment: Deployment) -> bool:
        """Whether a device or link of it was lost, and another deployment takes its place."""
        return _continues(self[deployment.name], deployment) and bool(self.ended_by(deployment))

    def is_suspect(self, deployment: Deployment) -> bool:
        """Whether tokens from ``deployment`` may be wrong, because files were damaged."""
        return deployment.epoch in past_of(self[deployment.name]).suspect


def _continues(state: State, deployment: Deployment) -> bool:
    """Whether ``state`` has ``deployment`` or one that replaced it."""
    present = deployment_of(state)
    return (present is not None and present.key == deployment.key) or deployment.key in past_of(
        state
    ).ended


def _is_news(before: State, event: Event, after: State) -> bool:
    """Whether the story tells an event. Repeated attempts fail for the same reason."""
    if isinstance(event, states.AttemptFailed):
        return str(error_of(before)) != str(error_of(after))
    if isinstance(event, states.LoadFailed):  # The model that was loaded before may still serve.
        return True
    return type(event) in _KINDS and after is not before


def _text(event: Event) -> str:
    """The story's details of an event."""
    if isinstance(event, states.Placed):
        return f"on {event.deployment.where}"
    if isinstance(event, states.MovedOver):
        return f"to {event.deployment.where}: {event.error}"
    if isinstance(event, states.Adopted):
        return f"still loaded on {event.deployment.where}"
    if isinstance(event, states.ResumeBegan):
        return "on " + ", ".join(event.devices)
    if isinstance(event, states.StepBegan):
        return event.step
    if isinstance(event, states.AttemptFailed):
        return event.why
    error = getattr(event, "error", None)
    return "" if error is None else str(error)
