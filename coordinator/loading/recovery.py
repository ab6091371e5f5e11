"""What loading without being asked needs: what remains of a request, repeated attempts, the disk.

coordinator.loading.keeper uses it after a device was lost and after the coordinator was restarted.
A failed attempt is repeated when devices join, for instance because the others have too little
memory. It is also repeated for a while without a visible reason: a link that was cut may be back.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from coordinator.errors import CoordinatorError
from coordinator.roster.members import Roster
from model.durable import replace_text
from model.errors import ModelError
from planning.errors import RequestInvalid
from planning.plan import PlanError
from planning.request import LoadRequest

log = logging.getLogger(__name__)

AMORTIZED_TOKENS = 1000
"""A second of loading is worth as many seconds as these tokens save: answers wait for it."""

TIME_LIMIT_S = 5.0
"""For the solver, since answers wait for it too."""

RETRY_S = 5.0
"""Pause before the same devices are tried again."""

Placed = TypeVar("Placed")


def remaining(request: LoadRequest, devices: Collection[str]) -> LoadRequest:
    """An identified ``request`` as the devices with these ids can carry it out, and soon.

    Wishes about devices that are gone fall away, and so does a given plan that needs them.
    """
    given = request.plan
    if given is not None and not {device for device, _ in given.stages} <= set(devices):
        given = None
    objective = request.objective
    if objective.kind != "energy":
        tokens = objective.output_tokens if objective.kind == "request" else 1
        weight = max(objective.migration_weight, tokens / AMORTIZED_TOKENS)
        objective = replace(objective, migration_weight=weight)
    return replace(
        request,
        objective=objective,
        time_limit_s=min(request.time_limit_s, TIME_LIMIT_S),
        pins={block: device for block, device in request.pins.items() if device in devices},
        exclude=tuple(device for device in request.exclude if device in devices),
        plan=given,
        check_quality=False,
    )


class LoadedFile:
    """What is loaded, on disk, for a coordinator that is started again.

    The request is kept with the ids of its devices, so that it means the same ones when names have
    changed. A file of an older version has names, and beside them the ids that they meant.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "loaded.json"

    def keep(
        self, request: LoadRequest, names: Sequence[str], ids: Mapping[str, str] | None = None
    ) -> None:
        """Replace what is kept: a request, its devices by name, and the ids of those names."""
        kept = {
            "request": request.to_dict(),
            "devices": list(names),
            "ids": dict(ids or {}),
        }
        try:
            replace_text(self._path, json.dumps(kept))
        except OSError as error:
            log.warning("%s: %s: a restart will load nothing", self._path, error.strerror)

    def forget(self) -> None:
        """Keep nothing any more."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s: %s: a restart will load it", self._path, error.strerror)

    def read(self) -> tuple[LoadRequest, tuple[str, ...]] | None:
        """What was asked for, and the devices that it was on; None where nothing is kept.

        Devices are ids. They are names where the file is older than ids.
        """
        try:
            kept = json.loads(self._path.read_bytes())
            ids = {str(name): str(device) for name, device in kept.get("ids", {}).items()}
            request = LoadRequest.from_dict(kept["request"]).identified(ids.get)
            return request, tuple(ids.get(name, name) for name in map(str, kept["devices"]))
        except FileNotFoundError:
            return None
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RequestInvalid,
            PlanError,
        ) as error:
            log.warning("%s is of no use (%s): run `shoal load`", self._path, error)
            return None


async def awaited(
    roster: Roster, devices: Collection[str], wait_s: float
) -> AsyncIterator[tuple[str, ...]]:
    """Which of these devices (by name) have not joined, each time that changes.

    Ends when all have joined, or after ``wait_s`` seconds.
    """
    deadline_s = time.monotonic() + wait_s
    with roster.changed.watch() as changed:
        while missing := set(devices) - {member.name for member in roster.members}:
            changed.clear()
            yield tuple(name for name in devices if name in missing)
            try:
                await asyncio.wait_for(changed.wait(), deadline_s - time.monotonic())
            except asyncio.TimeoutError:
                return
    yield ()


async def recover(
    place: Callable[[], Awaitable[Placed]],
    explain: Callable[[Exception], CoordinatorError],
    changed: asyncio.Event,
    give_up: Callable[[CoordinatorError], None],
    wait_s: float,
) -> Placed:
    """Call ``place`` until it works. After ``wait_s`` seconds, ``give_up`` is told why not.

    ``explain`` makes of an attempt's error what users are told. ``changed`` is the caller's own
    event, which is set when devices or links come or go. Attempts go on after ``wait_s``, but only
    when that happens.
    """
    deadline_s = time.monotonic() + wait_s
    told: set[str] = set()
    has_given_up = False
    while True:
        changed.clear()
        try:
            return await place()
        except (CoordinatorError, RequestInvalid, ModelError, PlanError, OSError) as error:
            failure = explain(error)
            if str(failure) not in told:  # Each once: the next attempt is seconds away.
                told.add(str(failure))
                log.warning("%s", failure)
        while not changed.is_set():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 and not has_given_up:
                has_given_up = True
                give_up(failure)
            try:
                await asyncio.wait_for(changed.wait(), min(left_s, RETRY_S) if left_s > 0 else None)
            except asyncio.TimeoutError:
                break
