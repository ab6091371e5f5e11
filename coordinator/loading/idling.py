"""Unloads models that nobody has used for the time that their load names (``--keep``).

Such a model falls asleep: its request stays, and the next request that names it loads it again
(coordinator.loading.models).
"""

from __future__ import annotations

import asyncio
import time

from coordinator.loading.deployment import Deployment, unload
from coordinator.loading.models import Models
from coordinator.loading.state import Serving, Slept
from coordinator.loading.turns import Turns

LOOK_S = 1.0
"""The pause between two looks. No model is kept for less."""


class Idling:
    """Lets models fall asleep."""

    def __init__(self, models: Models, turns: Turns) -> None:
        self._models = models
        self._turns = turns
        self._tasks: set[asyncio.Task[None]] = set()

    async def watch(self) -> None:
        """Look for ever for models that nobody uses."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look(time.monotonic())

    def look(self, now_s: float) -> None:
        """Let the models fall asleep that nobody has used for long enough."""
        if self._turns.is_taken:  # A load or a move of the model may be under way.
            return
        for name, state in self._models.present():
            if isinstance(state, Serving) and _is_idle(state.deployment, now_s):
                self._models.apply(name, Slept(state.deployment.request))

    def unload(self, deployment: Deployment) -> None:
        """Unload the stages of a model that has fallen asleep, as soon as it is their turn."""
        task = asyncio.create_task(self._unload(deployment))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _unload(self, deployment: Deployment) -> None:
        async with self._turns.unasked("a model that nobody uses is unloaded"):
            await unload(deployment.devices, deployment.epoch)


def _is_idle(deployment: Deployment, now_s: float) -> bool:
    keep_s, slots = deployment.request.keep_s, deployment.slots
    return keep_s is not None and slots.is_idle and now_s - slots.used_s >= keep_s
