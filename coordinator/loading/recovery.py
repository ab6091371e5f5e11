"""The parts of loading again: a request without lost devices, repeated attempts, a file on disk.

coordinator.loading.keeper uses them after a loss and after a restart. A failed attempt is repeated
when devices join, since the others may have too little memory. For a while it is also repeated
without a visible reason, because a link that was cut may be back.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from coordinator.disk import Disk, fault, put_aside, write
from coordinator.errors import CoordinatorError
from coordinator.loading.record import RecordFile
from coordinator.roster.members import Roster
from model.bounded import read_json
from model.errors import ModelError
from planning.errors import RequestInvalid
from planning.plan import PlanError
from planning.request import LoadRequest, model_name

log = logging.getLogger(__name__)

AMORTIZED_TOKENS = 1000
"""Answers wait for the load. So a plan that loads one second longer must save that second within
this number of tokens."""

TIME_LIMIT_S = 5.0
"""The solver's time limit. Answers wait for it."""

RETRY_S = 5.0
"""Pause before an attempt with the same devices."""

Placed = TypeVar("Placed")


def remaining(request: LoadRequest, devices: Collection[str]) -> LoadRequest:
    """The part of an identified ``request`` that the devices with these ids can carry out.

    Wishes about other devices are dropped, and so is a given plan that needs them. Loading time
    counts, and the solver's time is short.
    """
    given = request.plan
    if given is not None and not set(given.used) <= set(devices):
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
        teams=tuple(team for team in request.teams if set(team) <= set(devices)),
        plan=given,
        check_quality=False,
        replaces=False,
    )


class LoadedFile:
    """The file from which a restarted coordinator knows the loaded requests and their devices.

    It has device ids, because names may change. A file of an older version has one request, and
    perhaps names with their ids beside them.
    """

    def __init__(self, directory: Path, disk: Disk | None = None) -> None:
        """``disk`` writes the files. Without one, each change returns when it is written."""
        self._path = directory / "loaded.json"
        self._write_text = write if disk is None else disk.replace
        self.record = RecordFile(directory, disk)
        """The file beside it that says where the stages of the models are."""
        self._kept: dict[str, Any] | None = None
        """The entries of the file, by model, in the order of the loads. None: not read yet."""

    def keep(
        self, request: LoadRequest, names: Sequence[str], ids: Mapping[str, str] | None = None
    ) -> None:
        """Write a request, the names of its devices, and the ids of those names."""
        name = model_name(request.model)
        entry = {"request": request.to_dict(), "devices": list(names), "ids": dict(ids or {})}
        others = {other: kept for other, kept in self._entries().items() if other != name}
        self._write({**others, name: entry})

    def forget(self, name: str) -> None:
        """Remove a model and its record."""
        self.record.forget(name)
        kept = self._entries()
        if name in kept:
            self._write({other: entry for other, entry in kept.items() if other != name})

    def read(self) -> list[tuple[LoadRequest, tuple[str, ...]]]:
        """Return each request with its devices, in the order of the loads.

        Devices are ids, or names if the file is of an older version.
        """
        found = []
        for name, entry in self._entries().items():
            try:
                found.append(_read_entry(entry))
            except (
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                RequestInvalid,
                PlanError,
            ) as error:
                # It stays in the file: another version may know what this one does not.
                log.warning(
                    "%s: %s cannot be used (%s): run `shoal load`", self._path, name, fault(error)
                )
        return found

    def _entries(self) -> dict[str, Any]:
        """Return the entries of the file. They may be anything."""
        if self._kept is None:
            self._kept = {}
            try:
                kept = read_json(self._path)
                if isinstance(kept, dict) and "request" in kept:  # A file of an older version.
                    kept = {"models": {model_name(Path(kept["request"]["model"])): kept}}
                models = kept["models"]
                if not isinstance(models, dict):
                    raise ValueError("its models are of another form")
                self._kept = models
            except FileNotFoundError:
                pass
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                log.warning(
                    "%s cannot be used (%s): %s, and no model is loaded: run `shoal load`",
                    self._path,
                    fault(error),
                    put_aside(self._path),
                )
        return self._kept

    def _write(self, kept: dict[str, Any]) -> None:
        self._kept = kept
        text = json.dumps({"models": kept}) if kept else None
        self._write_text(self._path, text, self._not_written)

    def _not_written(self, error: OSError) -> None:
        log.warning("%s: %s: a restart will load what it has now", self._path, error.strerror)


def _read_entry(entry: Mapping[str, Any]) -> tuple[LoadRequest, tuple[str, ...]]:
    """Return the request of an entry and its devices. Raises errors of malformed JSON."""
    ids = {str(name): str(device) for name, device in entry.get("ids", {}).items()}
    request = LoadRequest.from_dict(entry["request"]).identified(ids.get)
    return request, tuple(ids.get(name, name) for name in map(str, entry["devices"]))


async def awaited(
    roster: Roster, devices: Collection[str], wait_s: float
) -> AsyncIterator[tuple[str, ...]]:
    """Yield the names of the devices that have not joined, each time that changes.

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
    """Call ``place`` until it works. After ``wait_s`` seconds, ``give_up`` gets the last error.

    explain: turns an attempt's error into one for users.
    changed: the caller's own event, which is set when devices or links come or go.
    After ``wait_s`` an attempt follows only such a change.
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
            if str(failure) not in told:  # Attempts often fail for the same reason.
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
