"""Repeats, in quiet moments, measurements that were made while the machine was busy.

A moment is quiet if the agent has no request and no stage, and other programs have left the
processor alone for a while. Measuring then takes seconds and ends when a request comes. It becomes
rarer if the machine does not stay quiet. The same thread notices new figures that ``shoal
calibrate`` has stored beside the agent.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import psutil

from agent.config import AgentConfig
from agent.links import Measuring
from agent.relay_cost import measure_relay
from agent.sum_cost import measure_sum
from backends.base import Backend, BackendError
from backends.registry import backend_class
from calibration.device import (
    START_PATIENCE_S,
    figure_keys,
    kept_profile,
    known_or_measured,
    profile_in_child,
)
from calibration.disturbance import LoadMeter
from calibration.layers import kept_timings, measure_model
from calibration.store import CalibrationStore, is_doubtful
from model.errors import ModelError
from model.spec import ModelSpec
from wire.conditions import Conditions
from wire.errors import WireError
from wire.identity import own_identity
from wire.messages import FiguresChanged, Message
from wire.profile import BlockTiming, DeviceProfile
from wire.sizes import format_size

log = logging.getLogger(__name__)

_Figure = tuple[float, Conditions | None]
"""A measured figure in seconds, with the conditions that it was measured in."""

LOOK_S = 5.0
"""The interval at which the thread checks for a quiet moment."""

QUIET_S = 20.0
"""The machine must have been quiet for this long."""

PATIENCE_S = 5.0
"""The time for repeats of the device's own figures. It is long, because nobody waits."""

MOMENT_S = 5.0
"""No new figure is begun after this time."""

PAUSE_S = 30.0
LONGEST_PAUSE_S = 3600.0
"""The longest pause between two moments. It doubles each time that figures stay doubtful."""


class Cancelled(Exception):
    """Other work has come, or nobody waits for this any more."""


class Figures:
    """This device's figures, and those that the coordinator has been told.

    One thread at a time uses it: the one that holds ``Measuring``.
    """

    def __init__(self, config: AgentConfig, profile: DeviceProfile) -> None:
        """``profile`` has just been measured, or in part read from the same store."""
        self._config = config
        self.store = CalibrationStore(config.calibration_path)
        keys = figure_keys(
            backend=profile.backend,
            version=profile.backend_version,
            threads=profile.threads,
            exact=config.exact,
        )
        self._identity = None if config.insecure else own_identity(config.identity_path)
        relay, team_sum = (
            known_or_measured(
                self.store, keys[figure], partial(measure, self._identity, START_PATIENCE_S)
            )
            for figure, measure in (("relay", measure_relay), ("sum", measure_sum))
        )
        profile = _with_own_costs(profile, relay, team_sum)
        self.profile = kept_profile(profile, self.store, exact=config.exact)
        self._told: dict[str, tuple[BlockTiming, ...]] = {}
        self._told_profile = self.profile
        self._turn = 0
        self._seen_s = self.store.changed_s()

    def measure_device(self, check: Callable[[], None]) -> DeviceProfile:
        """Return the profile with those new figures that are better. ``check`` may raise to end it.

        Limits of memory and storage stay as they are. Raises BackendError.
        """
        config = self._config
        new = profile_in_child(
            backend=config.backend,
            cache_dir=config.cache_dir,
            check=check,
            memory_limit_bytes=config.memory_bytes,
            storage_limit_bytes=config.storage_bytes,
            threads=config.threads,
            watts=config.watts,
            exact=config.exact,
            patience_s=PATIENCE_S,
        )
        taken = replace(
            self.profile,
            memory_read_bytes_per_s=new.memory_read_bytes_per_s,
            disk_write_bytes_per_s=new.disk_write_bytes_per_s,
            call_s=new.call_s or self.profile.call_s,
            conditions=new.conditions,
        )
        taken = _with_own_costs(
            taken,
            measure_relay(self._identity, PATIENCE_S),
            measure_sum(self._identity, PATIENCE_S),
        )
        self.profile = kept_profile(taken, self.store, exact=config.exact)
        return self.profile

    def improve(self, check: Callable[[], None]) -> bool:
        """Measure some of the doubtful figures again. False if none is. Raises BackendError."""
        jobs: list[Callable[[Callable[[], None]], object]] = []
        if any(is_doubtful(conditions) for _, conditions in self.profile.conditions):
            jobs.append(self.measure_device)
        for model, bits in self.store.specs():
            if any(is_doubtful(timing.conditions) for timing in self._kept(model, bits)):
                jobs.append(partial(self._measure_moment, model, bits))
        if not jobs:
            return False
        # A figure that stays doubtful must not keep the others from their turn.
        self._turn += 1
        jobs[self._turn % len(jobs)](check)
        return True

    def told_profile(self) -> DeviceProfile:
        """Return the profile, and count it as told to the coordinator."""
        self._told_profile = self.profile
        return self.profile

    def take_limit(self, memory_bytes: int | None) -> bool:
        """Take the bytes that stages may take now. Returns whether they have changed."""
        if memory_bytes in (None, self.profile.memory_bytes):
            return False
        log.info("stages may take %s of memory now", format_size(memory_bytes or 0))
        self.profile = replace(self.profile, memory_bytes=memory_bytes or 0)
        return True

    def told(self, spec: ModelSpec, timings: tuple[BlockTiming, ...]) -> None:
        """Remember the timings that the coordinator has been told of a model."""
        self._told[repr(spec)] = timings

    def news(self, *, whole: bool = False) -> list[FiguresChanged]:
        """Return the figures that the store has learnt since the last call, from any process.

        ``whole`` looks even if the file has not changed.
        """
        changed_s = self.store.changed_s()
        if changed_s == self._seen_s and not whole:
            return []
        self._seen_s = changed_s
        kept = kept_profile(self.profile, self.store, exact=self._config.exact, measured=False)
        self.profile = kept
        found: list[FiguresChanged] = []
        for model, bits in self.store.specs():
            told, timings = self._told.get(repr(model)), self._kept(model, bits)
            if told is not None and set(timings) - set(told):
                found.append(FiguresChanged(self.profile, model.to_dict(), timings))
                self._told[repr(model)] = timings
        if not found and kept != self._told_profile:
            found.append(FiguresChanged(kept, {}, ()))
        self._told_profile = kept
        return found

    def _backend(self) -> Backend:
        return backend_class(self._config.backend)()

    def _kept(self, spec: ModelSpec, bits: tuple[int, ...]) -> tuple[BlockTiming, ...]:
        config = self._config
        return kept_timings(
            spec,
            bits,
            self._backend(),
            threads=config.threads,
            store=self.store,
            exact=config.exact,
        )

    def _measure_moment(
        self, spec: ModelSpec, bits: tuple[int, ...], check: Callable[[], None]
    ) -> None:
        """Measure as many doubtful times as a moment allows, at least one."""
        until_s = time.monotonic() + MOMENT_S
        reached = 0

        def progress(done: int, total: int) -> None:
            nonlocal reached
            check()
            if done > reached and time.monotonic() > until_s:
                raise _Enough
            reached = done

        try:
            measure_model(
                spec,
                bits,
                self._backend(),
                threads=self._config.threads,
                store=self.store.again(is_doubtful),
                progress=progress,
                directory=self._config.cache_dir,
                exact=self._config.exact,
                shares=any(timing.shares_s for timing in self._kept(spec, bits)),
            )
        except _Enough:
            log.info("the remaining times are measured in another quiet moment")


class _Enough(Exception):
    """The moment is over. The measured times are kept."""


class QuietMoments:
    """Improves ``figures`` while the agent is idle, and tells the coordinator."""

    def __init__(
        self,
        figures: Figures,
        measuring: Measuring,
        is_idle: Callable[[], bool],
        send: Callable[[Message], None],
        memory_limit: Callable[[], int | None] = lambda: None,
    ) -> None:
        """``is_idle`` is true while the agent has no request and no stage.

        memory_limit: returns the bytes that stages may take now, or None if that is not known.
        """
        self._memory_limit = memory_limit
        self._figures = figures
        self._measuring = measuring
        self._is_idle = is_idle
        self._send = send
        self._given_up = threading.Event()
        self._quiet_since_s: float | None = None
        self._next_s = 0.0
        self._pause_s = PAUSE_S

    def run(self, ended: threading.Event) -> None:
        """Check for a quiet moment each LOOK_S until ``ended``."""
        meter = LoadMeter()
        while not ended.wait(LOOK_S):
            busy = meter.conditions().was_busy
            meter.restart()
            try:
                self._look(ended, busy=busy)
            except WireError:
                return  # The reader of the connection sees the loss too, and decides.
            except (BackendError, ModelError, OSError) as error:
                log.info("not measured again: %s", error)
                self._wait_longer()
            except Exception:  # The outermost loop of a thread that nobody waits for.
                log.exception("measuring in a quiet moment failed")
                return

    def _look(self, ended: threading.Event, *, busy: bool) -> None:
        now_s = time.monotonic()
        if busy or not self._is_idle() or _on_battery():
            self._quiet_since_s = None
        elif self._quiet_since_s is None:
            self._quiet_since_s = now_s
        self._given_up.clear()
        if not self._measuring.try_begin(self._given_up.set):
            return
        try:
            has_changed = self._figures.take_limit(self._memory_limit())
            for change in self._figures.news(whole=has_changed):
                self._send(change)
            quiet = self._quiet_since_s is not None and now_s - self._quiet_since_s >= QUIET_S
            if quiet and now_s >= self._next_s:
                self._improve(ended)
        finally:
            self._measuring.end()

    def _improve(self, ended: threading.Event) -> None:
        def check() -> None:
            if ended.is_set() or self._given_up.is_set() or not self._is_idle():
                raise Cancelled("other work has come")

        tried = True
        try:
            tried = self._figures.improve(check)
        except Cancelled:
            self._quiet_since_s = None
            if ended.is_set():
                return  # The next connection begins with all that is known.
        changes = self._figures.news(whole=True)
        for change in changes:
            self._send(change)
        if tried and not changes:
            self._wait_longer()
        else:
            self._pause_s = PAUSE_S
            self._next_s = time.monotonic() + PAUSE_S

    def _wait_longer(self) -> None:
        self._next_s = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)


def _with_own_costs(profile: DeviceProfile, relay: _Figure, team_sum: _Figure) -> DeviceProfile:
    """The profile with what the agent itself takes for a token and for a team's sum."""
    added = tuple(
        (figure, conditions)
        for figure, (_, conditions) in (("relay", relay), ("sum", team_sum))
        if conditions is not None
    )
    conditions = (*profile.conditions, *added)
    return replace(profile, relay_s=relay[0], sum_s=team_sum[0], conditions=conditions)


def _on_battery() -> bool:
    battery = psutil.sensors_battery()
    return battery is not None and battery.power_plugged is False
