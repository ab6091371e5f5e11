"""The cost of a team's sum on this device besides the link and the waiting, measured alone.

Two members in one thread add up rows of a usual size over a connection of this machine to itself.
Each sends before the other one receives, so nobody waits and no thread wakes up. A link's measured
round trip already has the wake-ups. Half of the time is one member's.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from statistics import median

import numpy as np

from agent.loopback import loopback_pair
from agent.mesh import Mesh
from agent.team_sum import TeamSum
from calibration.disturbance import Patience, spread_of, steady
from wire.activations import HopBits, payload_bytes
from wire.conditions import Conditions
from wire.identity import Identity

SUMS = 60
_RUNS = 5
_HIDDEN = 2048
_BITS: HopBits = 16
_READ_BYTES = 4 << 20
"""A stage reads its weights between two sums: so Python finds little of its own in the caches."""
_DEVICES = ("a", "b")


def measure_sum(identity: Identity | None, patience_s: float) -> tuple[float, Conditions]:
    """Return seconds of one member for a sum of one row, and the conditions.

    A disturbed measurement is repeated for ``patience_s`` at most.
    identity: the agent's, which encrypts. None if it does not.
    """
    with ExitStack() as stack:
        sums = []
        for index, connection in enumerate(stack.enter_context(loopback_pair(identity))):
            mesh = Mesh(1, _DEVICES, index, payload_bytes(1, _HIDDEN, 32))
            stack.callback(mesh.close)
            mesh.add(_DEVICES[1 - index], connection)
            sums.append(TeamSum(mesh, _HIDDEN, _BITS))
        return steady(lambda: _one_s(sums), Patience(limit_s=patience_s), lambda seconds: seconds)


def _one_s(sums: list[TeamSum]) -> tuple[float, float]:
    """Return the median over runs of the median of their sums, and the spread over runs."""
    rows, read = np.ones((1, _HIDDEN), np.float32), np.ones(_READ_BYTES, np.uint8)
    runs_s = []
    for _ in range(_RUNS):
        times_s = []
        for _ in range(SUMS):
            read.sum()
            started_s = time.perf_counter()
            sent = [member.send(rows) for member in sums]
            for member, payload in zip(sums, sent, strict=True):
                member.collect(payload, len(rows))
            times_s.append((time.perf_counter() - started_s) / len(sums))
        runs_s.append(median(times_s))
    return median(runs_s), spread_of(runs_s)
