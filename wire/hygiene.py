"""Makes the text and figures of peers safe to keep and to show.

A device that has joined can still lie. Text is cleaned where it enters, by the reader of a control
or file connection. Figures are checked by the code that keeps them, with the limits here.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

from wire.conditions import Conditions
from wire.messages import Heartbeat, Message
from wire.profile import TIMED_ROWS, BlockTiming, DeviceProfile
from wire.text import MAX_TEXT_CHARACTERS as MAX_TEXT_CHARACTERS
from wire.text import clean_text as clean_text

MAX_PROFILE_CHARACTERS = 256
MAX_PROFILE_ENTRIES = 64
"""The largest number of entries of each kind in a profile, which is kept as long as its device."""

MAX_STAGES = 64
"""The largest number of stages that a device tells of. Each holds weights of a model."""

MAX_SHARES = 8
"""The largest number of measured shares of a block."""

MAX_BYTES = 1 << 60
MAX_TIME_S = 1e12
"""The latest plausible time in seconds since 1970, far in the future."""

MAX_SECONDS = 1e6
CELSIUS = (-273.15, 1000.0)
BLOCK_SECONDS = (1e-9, 600.0)
CALL_SECONDS = (0.0, 600.0)
ROUND_TRIP_SECONDS = (1e-7, 60.0)
LINK_BYTES_PER_S = (100.0, 1e12)
"""Wider than any device and link. Solvers fail on figures that differ by much more."""

Cleaner = Callable[[Any], Any]


def clean(message: Message) -> Message:
    """Return the message with all its text cleaned. A message without text is returned itself."""
    kind: Any = type(message)
    cleaner = _cleaner(kind)
    return message if cleaner is None else typing.cast("Message", cleaner(message))


def implausible_profile(profile: DeviceProfile) -> str | None:
    """Name an implausible or oversized entry of a profile, or return None if there is none."""
    for field in dataclasses.fields(profile):
        value = getattr(profile, field.name)
        if isinstance(value, tuple) and len(value) > MAX_PROFILE_ENTRIES:
            return f"{len(value)} entries of {field.name}"
        if any(len(text) > MAX_PROFILE_CHARACTERS for text in _texts(value)):
            return f"a {field.name} that is too long"
        low, high = _PROFILE_RANGES.get(field.name, (None, None))
        if value is not None and low is not None and not low <= value <= high:
            return f"{field.name} {value:g}"
    if not all(0 < bits <= 64 for pair in profile.container_bits for bits in pair):
        return "impossible widths"
    if not all(are_plausible(conditions) for _, conditions in profile.conditions):
        return "impossible conditions"
    return None


def implausible_gauges(heartbeat: Heartbeat) -> str | None:
    """Name an impossible figure of a heartbeat's gauges and stages, or return None."""
    if not 0 <= heartbeat.load <= 1:
        return f"a load of {heartbeat.load:g}"
    low, high = CELSIUS
    if heartbeat.celsius is not None and not low <= heartbeat.celsius <= high:
        return f"a temperature of {heartbeat.celsius:g} degrees"
    if len(heartbeat.stages) > MAX_STAGES:
        return f"{len(heartbeat.stages)} stages"
    for stage in heartbeat.stages:
        if not 0 <= stage.token_s <= MAX_SECONDS:
            return f"{stage.token_s} s a token"
        counts = () if stage.counts is None else dataclasses.astuple(stage.counts)
        if not all(0 <= count <= MAX_BYTES for count in counts):
            return "impossible counts"
    return None


def are_plausible(conditions: Conditions | None) -> bool:
    """Whether a measurement can have had these conditions. None means that they are unknown."""
    return conditions is None or all(
        0 <= figure <= MAX_TIME_S for figure in dataclasses.astuple(conditions)
    )


def is_plausible(timing: BlockTiming) -> bool:
    """Whether a block can take these times."""
    least_s, most_s = BLOCK_SECONDS
    if len(timing.rows_s) not in (0, len(TIMED_ROWS)):
        return False
    fractions = [share[0] for share in timing.shares_s]
    if len(fractions) > MAX_SHARES or fractions != sorted(set(fractions)):
        return False
    if not all(0 < fraction <= 1 for fraction in fractions):
        return False
    times_s = [timing.decode_s, timing.prefill_s_per_token, *timing.rows_s]
    for _, *share_s in timing.shares_s:
        times_s += share_s
    return all(least_s <= time_s <= most_s for time_s in times_s) and are_plausible(
        timing.conditions
    )


def is_plausible_link(rtt_s: float, bytes_per_s: float, rtt_p90_s: float) -> bool:
    """Whether a link can have these figures. A 90th percentile of 0 means unknown."""
    return (
        1e-12 <= rtt_s <= MAX_SECONDS
        and 1e-3 <= bytes_per_s <= 1e18
        and 0 <= rtt_p90_s <= MAX_SECONDS
    )


def within_range(figure: float, limits: tuple[float, float]) -> float:
    """Return the nearest figure within limits, because a busy machine may measure absurd rates."""
    return min(max(figure, limits[0]), limits[1])


_PROFILE_RANGES: dict[str, tuple[float, float]] = {
    "cores": (1, 1 << 16),
    "threads": (1, 1 << 16),
    "memory_bytes": (0, MAX_BYTES),
    "memory_total_bytes": (0, MAX_BYTES),
    "storage_bytes": (0, MAX_BYTES),
    "memory_read_bytes_per_s": (1, 1e15),
    "disk_write_bytes_per_s": (1, 1e15),
    "call_s": CALL_SECONDS,
    "relay_s": CALL_SECONDS,
    "sum_s": CALL_SECONDS,
    "watts": (0, 1e6),
    "on_chip_bytes": (0, MAX_BYTES),
}


def _texts(value: Any) -> list[str]:
    """Return all text in a field of a profile."""
    if isinstance(value, str):
        return [value]
    return [text for item in value for text in _texts(item)] if isinstance(value, tuple) else []


@functools.cache
def _cleaner(annotation: Any) -> Cleaner | None:
    """Return the cleaner for values of this type, or None if they hold no text."""
    if annotation is str:
        return clean_text
    arguments = [item for item in typing.get_args(annotation) if item not in (type(None), ...)]
    origin = typing.get_origin(annotation)
    if dataclasses.is_dataclass(annotation):
        return _record_cleaner(annotation)
    if origin in (dict, typing.Literal) or not arguments:
        return None
    cleaners = [_cleaner(item) for item in arguments]
    if not any(cleaners):
        return None
    if origin is not tuple:  # An optional value has one type besides None.
        (inner,) = filter(None, cleaners)
        return lambda value: None if value is None else inner(value)
    if len(cleaners) == 1:
        (each,) = filter(None, cleaners)
        return lambda values: tuple(map(each, values))
    return lambda values: tuple(
        value if cleaner is None else cleaner(value)
        for cleaner, value in zip(cleaners, values, strict=True)
    )


def _record_cleaner(kind: Any) -> Cleaner | None:
    hints = typing.get_type_hints(kind)
    cleaners = {
        field.name: cleaner
        for field in dataclasses.fields(kind)
        if (cleaner := _cleaner(hints[field.name])) is not None
    }
    if not cleaners:
        return None

    def clean_record(record: Any) -> Any:
        before = {name: getattr(record, name) for name in cleaners}
        after = {name: cleaner(before[name]) for name, cleaner in cleaners.items()}
        return record if after == before else dataclasses.replace(record, **after)

    return clean_record
