"""What becomes of a deployment that lost a device: the model is placed anew on those that are left.

Answers in flight wait for the outcome and go on (coordinator.gateway). An attempt that fails, for
instance because the rest has too little memory, is repeated when devices join, and for a while
without a reason that could be seen: a link that was cut may be back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from typing import TypeVar

from coordinator.errors import AgentLost, CoordinatorError
from coordinator.plan import PlanError
from coordinator.plan_request import PlanRequest
from model.errors import ModelError

log = logging.getLogger(__name__)

AMORTIZED_TOKENS = 1000
"""A second of loading is worth as many seconds as these tokens save: answers wait for it."""

TIME_LIMIT_S = 5.0
"""For the solver, since answers wait for it too."""

RETRY_S = 5.0
"""Pause before the same devices are tried again."""

Placed = TypeVar("Placed")


def remaining(request: PlanRequest, names: Collection[str]) -> PlanRequest:
    """``request`` as the devices ``names`` can carry it out, and soon.

    Wishes about devices that are gone fall away, and so does a plan that was given.
    """
    objective = request.objective
    if objective.kind != "energy":
        weight = max(objective.migration_weight, 1 / AMORTIZED_TOKENS)
        objective = replace(objective, migration_weight=weight)
    return replace(
        request,
        objective=objective,
        time_limit_s=min(request.time_limit_s, TIME_LIMIT_S),
        pins={block: name for block, name in request.pins.items() if name in names},
        exclude=tuple(name for name in request.exclude if name in names),
        given=None,
        check_quality=False,
    )


async def recover(
    lost: AgentLost,
    place: Callable[[], Awaitable[Placed]],
    failed: Callable[[AgentLost], None],
    joined: asyncio.Event,
    outcome: asyncio.Future[Placed],
    wait_s: float,
) -> Placed:
    """Call ``place`` until it works; sets ``outcome`` then, or after ``wait_s`` seconds to why not.

    ``failed`` is told of each attempt why the others cannot take the place of the ``lost`` device.

    ``joined`` is set by others whenever devices come or go. Goes on after ``wait_s``, but only
    when devices have come or gone.
    """
    deadline_s = time.monotonic() + wait_s
    while True:
        joined.clear()
        try:
            placed = await place()
        except (CoordinatorError, ModelError, PlanError, OSError) as error:
            failure = AgentLost(lost.name, lost.cause, str(error))
            log.warning("%s", failure)
            failed(failure)
        else:
            if not outcome.done():
                outcome.set_result(placed)
            return placed
        while not joined.is_set():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 and not outcome.done():
                outcome.set_exception(failure)
            try:
                await asyncio.wait_for(joined.wait(), min(left_s, RETRY_S) if left_s > 0 else None)
            except asyncio.TimeoutError:
                break
