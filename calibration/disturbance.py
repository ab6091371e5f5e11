"""Notices other programs on the processor during a measurement, and repeats the measurement.

Sources: proc(5) on /proc/stat and /proc/loadavg; the kernel's documentation of control groups on
cpu.stat.
"""

from __future__ import annotations

import os
import re
import resource
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from model.memory import cgroups, read_lines
from wire.conditions import Conditions

Figure = TypeVar("Figure")

SHORTEST_S = 0.25
"""A shorter time has too few of the kernel's ticks, so the moments before it count too."""

_RECENT_S = 2.0


@dataclass(frozen=True, slots=True)
class _Reading:
    """Seconds since boot, or counts, of this process and of the cores it may run on."""

    cores: int
    busy_s: float
    stolen_s: float
    own_s: float
    periods: int
    held_periods: int


_histories: dict[tuple[Path, bool], deque[tuple[float, _Reading]]] = {}
"""Recent readings of this process's meters."""


class LoadMeter:
    """Watches the processor from its creation on. ``conditions`` reports the other users."""

    def __init__(self, root: Path = Path("/"), *, kernel: bool = True) -> None:
        """``kernel`` False leaves out the kernel's work, which disks and networks cause."""
        self._root = root
        self._kernel = kernel
        self._history = _histories.setdefault((root, kernel), deque(maxlen=64))
        self.restart()

    def restart(self) -> None:
        """Forget all readings."""
        self._begun_s = time.perf_counter()
        self._first = _read(self._root, kernel=self._kernel)
        self._history.append((self._begun_s, self._first))

    def conditions(self, spread: float = 0.0) -> Conditions:
        """Return the processor's use since the beginning, with the measurement's ``spread``.

        Our child processes count as other programs until they have ended and been waited for.
        """
        last, now_s = _read(self._root, kernel=self._kernel), time.perf_counter()
        begun_s, first = self._begun_s, self._first
        if now_s - begun_s < SHORTEST_S:
            begun_s, first = next(
                (
                    (earlier_s, reading)
                    for earlier_s, reading in reversed(tuple(self._history))
                    if SHORTEST_S <= now_s - earlier_s <= _RECENT_S
                ),
                (begun_s, first),
            )
        elapsed_s = max(now_s - begun_s, 1e-9)
        # The kernel counts in ticks, so each core may be one off.
        error_s = first.cores / _ticks_per_s()
        others_s = last.busy_s - first.busy_s - (last.own_s - first.own_s) - error_s
        periods = last.periods - first.periods
        held = max(last.held_periods - first.held_periods, 0) / periods if periods > 0 else 0.0
        return Conditions(
            cores=first.cores,
            others_cores=min(max(others_s / elapsed_s, 0.0), first.cores),
            stolen_cores=min(max((last.stolen_s - first.stolen_s) / elapsed_s, 0.0), first.cores),
            held_share=min(held, 1.0),
            load=_load_average(self._root),
            spread=spread,
            measured_s=time.time(),
        )


class Patience:
    """The time for repeats: ``share`` of the first tries' time, at most ``limit_s``."""

    def __init__(self, share: float = 1.0, limit_s: float = 10.0) -> None:
        self._share = share
        self._left_s = limit_s
        self._earned_s = 0.0

    def earn(self, first_s: float) -> None:
        """Record the duration of a first try."""
        self._earned_s += self._share * first_s

    def spend(self, repeat_s: float) -> bool:
        """Whether there is time for a repeat of this length, which counts as spent then."""
        if repeat_s > min(self._earned_s, self._left_s):
            return False
        self._earned_s -= repeat_s
        self._left_s -= repeat_s
        return True


def steady(
    measure: Callable[[], tuple[Figure, float]],
    patience: Patience,
    seconds: Callable[[Figure], float],
    *,
    kernel: bool = True,
) -> tuple[Figure, Conditions]:
    """Return the figure of a quiet machine, or the best one that ``patience`` allows.

    ``measure`` returns a figure and the spread of its repeats. It is called again while others use
    the processor or the repeats disagree. Of disturbed figures the one of the fewest ``seconds``
    counts, because others can only make it slower. ``kernel`` is that of LoadMeter.
    """
    best: tuple[bool, float, Figure, Conditions] | None = None
    while True:
        begun_s = time.perf_counter()
        meter = LoadMeter(kernel=kernel)
        figure, spread = measure()
        conditions = meter.conditions(spread)
        took_s = time.perf_counter() - begun_s
        trial = (conditions.is_noisy, seconds(figure), figure, conditions)
        if best is None:
            patience.earn(took_s)
        if best is None or trial[:2] < best[:2]:
            best = trial
        if not conditions.is_noisy or not patience.spend(took_s):
            return best[2], best[3]


def spread_of(values: Sequence[float]) -> float:
    """Return the distance of the quartiles over the median; of 2 or 3 values, of the extremes."""
    if len(values) < 2:
        return 0.0
    ordered = sorted(values)
    quarter = len(ordered) // 4
    median = (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2
    return (ordered[-1 - quarter] - ordered[quarter]) / median if median > 0 else 0.0


def _read(root: Path, *, kernel: bool) -> _Reading:
    cores, busy_s, stolen_s = _processor(root, kernel=kernel)
    own_s = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        own_s += used.ru_utime + (used.ru_stime if kernel else 0.0)
    periods, held = _quota(root)
    return _Reading(cores, busy_s, stolen_s, own_s, periods, held)


def _processor(root: Path, *, kernel: bool) -> tuple[int, float, float]:
    """Return (cores, busy seconds, stolen seconds) of the cores that this process may run on."""
    allowed = os.sched_getaffinity(0)
    rows: dict[str, list[int]] = {}
    for line in read_lines(root / "proc/stat"):
        name, *fields = line.split()
        if re.fullmatch(r"cpu\d*", name):
            rows[name] = [int(item) if item.isdigit() else 0 for item in fields]
    own = [row for name, row in rows.items() if name != "cpu" and int(name[3:]) in allowed]
    counted = own or [rows[name] for name in ("cpu",) if name in rows]
    busy = stolen = 0
    for row in counted:
        user, nice, system, _idle, _iowait, irq, softirq, steal = (*row, *[0] * 8)[:8]
        busy += user + nice + (system + irq + softirq if kernel else 0)
        stolen += steal
    cores = len(own) or len(allowed)
    return cores, busy / _ticks_per_s(), stolen / _ticks_per_s()


def _quota(root: Path) -> tuple[int, int]:
    """Return (periods, periods that stopped us) of the container limit that stopped us most."""
    found = [(0, 0)]
    for group in cgroups(root, "cpu"):
        counts = dict(
            (name, int(value))
            for name, _, value in (line.partition(" ") for line in read_lines(group / "cpu.stat"))
            if value.isdigit()
        )
        found.append((counts.get("nr_periods", 0), counts.get("nr_throttled", 0)))
    return max(found, key=lambda counts: (counts[1], counts[0]))


def _load_average(root: Path) -> float:
    words = " ".join(read_lines(root / "proc/loadavg")).split()
    try:
        return float(words[0]) if words else 0.0
    except ValueError:
        return 0.0


def _ticks_per_s() -> int:
    return os.sysconf("SC_CLK_TCK")
