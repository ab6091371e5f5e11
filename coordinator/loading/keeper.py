"""Loads models again by itself, after a restart and after a device or link was lost.

The keeper hears of losses from the roster and turns them into events of coordinator.loading.state.
It carries out the actions of the state table: place a model, stop placing it, keep it on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from functools import partial

from coordinator.errors import AgentDamaged, AgentLost, CoordinatorError, Moved, NotLoaded
from coordinator.loading import state as states
from coordinator.loading.companions import PlannedAgain, companions, is_changed
from coordinator.loading.deployment import Deployment, unload, unload_forgotten
from coordinator.loading.doubts import Doubts
from coordinator.loading.idling import Idling
from coordinator.loading.models import UNLOADED, Models
from coordinator.loading.operations import Operations
from coordinator.loading.recovery import LoadedFile, awaited, recover
from coordinator.loading.returns import RETURN_S, Returns
from coordinator.loading.state import (
    NO_MODEL,
    Adopted,
    AttemptFailed,
    Broken,
    DevicesAwaited,
    FilesMended,
    Lost,
    MoveBegan,
    Nothing,
    Place,
    Placed,
    Replacing,
    Rest,
    ResumeBegan,
    Resuming,
    Serving,
    Slept,
    StageFoundDamaged,
    Stopped,
    StopPlacing,
    WaitEnded,
    WakeFailed,
    error_of,
    name_of,
)
from coordinator.loading.turns import Turns
from coordinator.roster.measurements import try_links
from coordinator.roster.members import Member, Roster
from coordinator.watching import Signal
from model.errors import ModelError
from model.families import load_spec
from planning.errors import RequestInvalid
from planning.plan import InfeasiblePlan, PlanError
from planning.request import LoadRequest, model_name
from wire.messages import Message, PeerLost, StageDamaged
from wire.patience import within

log = logging.getLogger(__name__)

UNPLACED = (Resuming, Replacing, Broken)
"""The states of models that are to be placed."""

WATCH_S = 5.0
"""Pause between two checks whether a failed link is due again."""


class PlanNotFound(Exception):
    """No joint plan was found in time. The models are planned one after the other."""


class NoRoom(CoordinatorError):
    """A model waits for room beside those that it was planned with."""

    status = 503


class Keeper:
    """Places models again after a restart or a loss."""

    def __init__(
        self,
        roster: Roster,
        models: Models,
        turns: Turns,
        operations: Operations,
        kept: LoadedFile,
        wait_s: float,
    ) -> None:
        """Subscribe to losses and actions.

        wait_s: how long answers wait for a device that no other can replace.
        """
        self._roster = roster
        self._models = models
        self._turns = turns
        self._operations = operations
        self._kept = kept
        self._wait_s = wait_s
        self._placing: dict[str, asyncio.Task[None]] = {}
        """The task that places a model, by the model's name."""
        self._doubts = Doubts(roster, models)
        self._returns = Returns(roster)
        roster.subscribe(self._on_event, self._on_lost)
        models.carry_out(Place, self._place)
        models.carry_out(StopPlacing, self._stop_placing)
        models.carry_out(states.Keep, self._keep)
        models.carry_out(states.Record, self._note)
        models.carry_out(states.Forget, self._forget)
        self._idling = Idling(models, turns)
        models.carry_out(Rest, self._rest)
        self._records = operations.records
        self._records.update(kept.record.read())
        self._undecided: set[str] = set()
        """The models whose stages may still be taken over."""
        self._decided = Signal()
        self._epochs: dict[str, int] = {}
        """The epochs whose stages joining agents keep, by model."""
        for name, record in self._records.items():
            self._keep_stages(name, record.epoch)

    def resume(self) -> None:
        """Load the models that were loaded before the restart, once their devices join."""
        kept = self._kept.read()
        for name in self._records.keys() - {model_name(request.model) for request, _ in kept}:
            self._forget_stages(name)
        for request, devices in kept:
            names, name = tuple(map(self._roster.names.name, devices)), model_name(request.model)
            with contextlib.suppress(ModelError, OSError):  # Loading it will say what is wrong.
                self._models.note_kind(name, load_spec(request.model))
            if request.keep_s is not None and name not in self._records:
                self._models.apply(name, Slept(request))
            else:
                self._models.apply(name, ResumeBegan(request, names))

    def close(self) -> None:
        """End every model, because the coordinator stops."""
        for name, _ in self._models.present():
            self._models.apply(name, Stopped(NotLoaded("the coordinator was stopped")))

    async def watch_use(self) -> None:
        """Let models fall asleep for ever, once nobody has used them for their time."""
        await self._idling.watch()

    async def watch_links(self) -> None:
        """Try failed links again for ever, one at a time, while no operation or answer runs."""
        while True:
            await asyncio.sleep(WATCH_S)
            due = self._roster.links_to_retry()
            if due and not self._turns.is_taken and not self._is_answering():
                with contextlib.suppress(CoordinatorError):
                    async with self._turns.unasked("a link that had failed is tried again"):
                        await try_links(self._roster, due[:1], self._turns.report)

    def _is_answering(self) -> bool:
        return not all(one.slots.is_idle for one in self._models.all_serving)

    # ---- losses ---------------------------------------------------------------------------------

    def _on_lost(self, member: Member, error: AgentLost) -> None:
        for name, state in self._models.present():
            if isinstance(state, Serving) and member in state.deployment.devices:
                self._models.apply(name, Lost(error))

    def _on_event(self, member: Member, message: Message) -> None:
        if isinstance(message, (StageDamaged, PeerLost)) and message.epoch in member.kept:
            for name, record in list(self._records.items()):
                if record.epoch == message.epoch:  # It cannot be taken over. It is loaded again.
                    del self._records[name]
        if isinstance(message, StageDamaged):
            self._on_damage(member, message)
        elif isinstance(message, PeerLost):
            self._doubts.report(member, message)

    def _on_damage(self, member: Member, message: StageDamaged) -> None:
        """Place the model anew that ran from a damaged file. Its answers are suspect."""
        error = AgentDamaged(member.name, message.reason)
        deployment = self._models.of_epoch(message.epoch)
        if deployment is not None and member in deployment.devices:
            is_news = self._models.ended_by(deployment) is None
            self._models.apply(deployment.name, StageFoundDamaged(error))
            if is_news:
                return  # ``_replace`` logs the error.
        else:
            for name, _ in self._models.present():
                self._models.apply(name, FilesMended())
            self._operations.note_damage(message.epoch, error)
        log.warning("%s", error)

    # ---- actions --------------------------------------------------------------------------------

    def _keep(self, action: states.Keep) -> None:
        ids = {member.name: member.device for member in action.deployment.devices}
        self._kept.keep(action.deployment.request, list(ids), ids)

    def _note(self, action: states.Record) -> None:
        """Keep on disk where the stages are. Agents that join again from now on keep theirs."""
        self._kept.record.keep(action.deployment)
        self._keep_stages(action.deployment.name, action.deployment.epoch)

    def _forget(self, action: states.Forget) -> None:
        self._kept.forget(action.name)
        self._keep_stages(action.name, 0)

    def _rest(self, action: Rest) -> None:
        """Unload the stages of a model that nobody uses. The disk keeps its request."""
        name = action.deployment.name
        self._kept.record.forget(name)
        self._keep_stages(name, 0)
        self._idling.unload(action.deployment)

    def _keep_stages(self, name: str, epoch: int) -> None:
        """Let agents that join keep these stages of a model. 0: agents unload all of them."""
        self._epochs[name] = epoch
        self._roster.keeps = frozenset(self._epochs.values()) - {0}

    def _forget_stages(self, name: str) -> None:
        """Take no stages of a model over. Agents that join from now on unload them."""
        self._records.pop(name, None)
        self._keep_stages(name, 0)

    def _stop_placing(self, action: StopPlacing) -> None:
        self._forget_stages(action.name)
        task = self._placing.pop(action.name, None)
        if task is not None:
            task.cancel()

    def _place(self, action: Place) -> None:
        name = name_of(action.state)
        self._undecided.add(name)
        task = self._placing[name] = asyncio.create_task(self._place_anew(action.state))
        task.add_done_callback(partial(self._placed, name))

    async def _place_anew(self, state: Resuming | Replacing) -> None:
        try:
            if isinstance(state, Resuming):
                await self._resume(state)
            else:
                await self._replace(state)
        except Exception:  # The outermost call of its task: else answers would wait for ever.
            self._give_up(name_of(state), NotLoaded(NO_MODEL))
            raise

    def _placed(self, name: str, task: asyncio.Task[None]) -> None:
        """Forget a task that has ended. asyncio reports an error of one that nobody refers to."""
        if self._placing.get(name) is task:
            del self._placing[name]
            self._decide(name)

    def _decide(self, name: str) -> None:
        self._undecided.discard(name)
        self._decided.fire()

    async def _resume(self, state: Resuming) -> None:
        """Take over the stages that are still loaded, once all are there.

        If that cannot be, load the model again once its devices have joined. Late devices are left
        out.
        """
        name = name_of(state)
        if state.devices:
            log.warning("%s was loaded: waiting for %s", name, ", ".join(state.devices))
        else:
            log.warning("%s slept, and a request needs it", name)
        async for missing in awaited(self._roster, state.devices, self._wait_s):
            self._models.apply(name, DevicesAwaited(missing))
            # A cancellation is lost if a device joins at that moment (wait_for before Python 3.12).
            if not isinstance(self._models[name], Resuming) or await self._adopts(name):
                return
        self._forget_stages(name)
        await self._until_placed(name, 0)

    async def _adopts(self, name: str) -> bool:
        """Take over the stages of the model if all are still loaded. Returns whether they are."""
        record = self._records.get(name)
        if record is None or record.teams(self._roster.members) is None:
            return False
        async with self._turns.unasked("stages that are still loaded are taken over"):
            record, state = self._records.get(name), self._models[name]
            if record is None or not isinstance(state, Resuming):
                return False
            try:
                request = state.request.identified(self._roster.names.device)
                adopted = await self._operations.adopt(request, record)
            except (CoordinatorError, ModelError, RequestInvalid, OSError) as error:
                log.warning("the stages of %s are not taken over: %s", name, error)
                self._records.pop(name, None)
                return False
            del self._records[name]
            self._models.apply(name, Adopted(adopted))
        log.warning("%s is still loaded, on %s", name, adopted.where)
        return True

    async def _replace(self, state: Replacing) -> None:
        """Place a model that lost a device or link on the remaining devices."""
        # The roster has logged why a device is lost.
        cause = f"without {state.cause.name}" if isinstance(state.cause, AgentLost) else state.cause
        name = name_of(state)
        if isinstance(state.cause, AgentLost) and state.cause.may_return:
            whole = await self._returns.whole(state.deployment)
            if whole is not None and isinstance(self._models[name], Replacing):
                self._models.apply(name, Adopted(whole))
                log.warning("%s is back with its stage: %s goes on", state.cause.name, name)
                return
        log.warning("placing %s anew: %s", name, cause)
        await self._until_placed(name, self._wait_s)

    async def _until_placed(self, name: str, wait_s: float) -> None:
        """Try to place the model until that works. After ``wait_s``, answers no longer wait."""
        self._decide(name)
        with self._roster.changed.watch() as changed:
            placed = await recover(
                partial(self._attempt, name),
                partial(self._explain, name),
                changed,
                partial(self._give_up, name),
                wait_s,
            )
        log.warning("%s is loaded again, on %s", name, placed.where)

    def _explain(self, name: str, error: Exception) -> CoordinatorError:
        failed = self._models.apply(name, AttemptFailed(str(error)))
        return error_of(failed) or NotLoaded(str(error))

    def _give_up(self, name: str, error: CoordinatorError) -> None:
        state = self._models[name]
        if isinstance(state, Resuming) and state.request.keep_s is not None:
            self._models.apply(name, WakeFailed(error))
        else:
            self._models.apply(name, WaitEnded(error))

    async def _attempt(self, name: str) -> Deployment:
        """Place the model once. Raises the reason if that fails."""
        await self._companions_decided(name)
        async with self._turns.unasked("a lost device or link is being replaced"):
            state = self._models[name]
            if not isinstance(state, UNPLACED):
                # A cancellation is lost if a device joins then (wait_for before Python 3.12).
                raise asyncio.CancelledError
            found = set(companions(self._models, name, *UNPLACED)) - self._undecided
            group = {one: self._request_of(one) for one in (name, *sorted(found))}
            await self._leave(group)
            if len(group) > 1:
                with contextlib.suppress(PlanNotFound):
                    return await self._place_together(name, group)
            broken = states.deployment_of(state)
            wanted = state.wanted if isinstance(state, Replacing) else None
            if wanted is not None and broken is not None:
                placed = await self._operations.carry_out(wanted, broken)
            else:
                tokenizer = None if broken is None else broken.tokenizer
                try:
                    placed = await self._operations.place(group[name], tokenizer)
                except InfeasiblePlan as error:
                    return await self._place_by_moving(name, error)
            self._models.apply(name, Placed(placed))
            return placed

    # ---- models that were planned together ------------------------------------------------------

    async def _companions_decided(self, name: str) -> None:
        """Wait a moment until it is known which models are placed anew with this one."""
        deadline_s = time.monotonic() + 2 * RETURN_S
        with self._decided.watch() as decided:
            while self._undecided & set(companions(self._models, name, *UNPLACED)):
                decided.clear()
                try:
                    await within(decided.wait(), deadline_s - time.monotonic())
                except asyncio.TimeoutError:
                    return

    def _request_of(self, name: str) -> LoadRequest:
        state = self._models[name]
        if isinstance(state, Nothing):
            raise NotLoaded(UNLOADED)
        # Files of older versions have names in place of ids.
        return states.request_of(state).identified(self._roster.names.device)

    async def _leave(self, names: Iterable[str]) -> None:
        """Unload what is left of the stages of these models."""
        for name in names:
            broken = states.deployment_of(self._models[name])
            if broken is not None:
                self._keep_stages(name, 0)
                await unload(broken.devices, broken.epoch)
        await unload_forgotten(self._roster.members, self._roster.keeps)

    async def _place_together(self, name: str, group: Mapping[str, LoadRequest]) -> Deployment:
        """Place models anew by a joint plan. Raises why ``name`` was not placed."""
        states_now = [self._models[one] for one in group]
        wanted = [one.wanted for one in states_now if isinstance(one, Replacing) and one.wanted]
        if len(wanted) == len(group):
            again = PlannedAgain(dict(zip(group, wanted, strict=True)), {})
        else:
            try:
                again = await self._operations.plan_again(list(group.values()))
            except InfeasiblePlan:
                raise
            except PlanError as error:
                raise PlanNotFound from error
        return await self._deploy_together(name, group, again)

    async def _deploy_together(
        self, name: str, group: Mapping[str, LoadRequest], again: PlannedAgain
    ) -> Deployment:
        failures: dict[str, Exception] = {one: NoRoom(why) for one, why in again.waiting.items()}
        for one, planned in again.parts.items():
            broken = states.deployment_of(self._models[one])
            tokenizer = None if broken is None else broken.tokenizer
            try:
                placed = await self._operations.carry_out_for(group[one], planned, tokenizer)
            except (CoordinatorError, ModelError, PlanError, OSError) as error:
                failures[one] = error
                continue
            state = self._models.apply(one, Placed(placed))
            if states.deployment_of(state) is not placed:  # A user has unloaded it meanwhile.
                await unload(placed.devices, placed.epoch)
            elif one != name:
                log.warning("%s is loaded again, on %s", one, placed.where)
        for one, failure in failures.items():
            if one != name:
                log.warning("%s", self._explain(one, failure))
        if name in failures:
            raise failures[name]
        found = states.deployment_of(self._models[name])
        if found is None:
            raise asyncio.CancelledError
        return found

    async def _place_by_moving(self, name: str, error: InfeasiblePlan) -> Deployment:
        """Place a model that has no room, with models that were planned with it, which move.

        Raises ``error`` if there are none, or if they do not fit together.
        """
        answering = companions(self._models, name, Serving)
        if not answering:
            raise error
        why = f"{name} waits for room beside {' and '.join(answering)}: {error}"
        group = {one: self._request_of(one) for one in (name, *answering)}
        try:
            again = await self._operations.plan_again(list(group.values()))
        except PlanError:
            raise NoRoom(why) from error
        if again.waiting:
            raise NoRoom(why) from error
        reason = Moved(f"the model moves: {name} needs room")
        parts = {name: again.parts[name]}
        for one in answering:
            deployment, planned = states.deployment_of(self._models[one]), again.parts[one]
            if deployment is None or is_changed(deployment, planned):
                parts[one] = planned
                self._models.apply(one, MoveBegan(reason, planned))
        await self._leave([one for one in parts if one != name])
        return await self._deploy_together(name, group, PlannedAgain(parts, {}))
