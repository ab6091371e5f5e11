"""Made-up figures of this machine, with which the agents of a cluster need not measure it.

Measuring a model takes an agent seconds of processor time, and most tests are about something else.
These figures have the keys and conditions of measured ones. They are about what one core of a small
computer has. Where a test is about measuring, its cluster ``measures``.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from backends.base import Backend
from backends.registry import backend_class
from calibration import layers
from calibration.device import figure_keys
from calibration.machine import usable_cores
from calibration.store import CalibrationStore, Values
from model import costs
from model.quantize import BITS, Format
from model.spec import ModelSpec
from wire.conditions import Conditions

_Figure = tuple[Mapping[str, Any], Values]
"""A key in the store and what is stored under it."""

BACKEND = "onnx_cpu"
READ_BYTES_PER_S = 5e9
FLOP_PER_S = 2e10
CALL_S = 50e-6
OWN_S = 30e-6
"""The agent's own time for a token, and for a sum of a team."""

THREADS = 1
"""Every agent of a test's cluster computes with one thread."""


def add_device(path: Path, backend: str = BACKEND) -> set[str]:
    """Add the device's own figures to the calibration file ``path``. Return the entries' names."""
    known = _backend(backend).probe()
    keys = figure_keys(backend=known.backend, version=known.version, threads=THREADS, exact=False)
    values = {"memory": READ_BYTES_PER_S, "call": CALL_S, "relay": OWN_S, "sum": OWN_S}
    return _add(path, [(keys[name], (value,)) for name, value in values.items()])


def add_model(path: Path, spec: ModelSpec, backend: str = BACKEND) -> set[str]:
    """Add the times of the model's blocks and shares at all widths. Return the entries' names."""
    store, kind = _Remembering(), _backend(backend)
    with patch.object(layers, "Bench", _Formula):
        layers.measure_model(
            spec, BITS, kind, threads=THREADS, store=store, together=True, shares=True
        )
    return _add(path, store.kept)


class _Formula(layers.Bench):
    """Computes the time of a stage from its bytes and operations, and loads none."""

    def _time(
        self, spec: ModelSpec, blocks: range, bits: int, rows: Sequence[int], **_: Any
    ) -> tuple[list[float], Conditions]:
        container = dict(self.backend.probe().container_bits)[bits]
        fmt = Format.of(bits)
        read_s = sum(costs.read_bytes(spec, b, fmt, container) for b in blocks) / READ_BYTES_PER_S
        row_s = sum(costs.block_flops(spec, b, 1) for b in blocks) / FLOP_PER_S
        return [CALL_S + read_s + count * row_s for count in rows], _quiet()


class _Remembering(CalibrationStore):
    """A store in memory, which knows nothing beforehand."""

    def __init__(self) -> None:
        super().__init__(Path("calibration.json"))
        self.kept: list[_Figure] = []

    def found(self, key: Mapping[str, Any]) -> tuple[None, None]:
        return None, None

    def keep(
        self, key: Mapping[str, Any], values: Values, conditions: Conditions
    ) -> tuple[Values, Conditions]:
        self.kept.append((key, values))
        return values, conditions


def _add(path: Path, figures: Iterable[_Figure]) -> set[str]:
    """Add the figures to the file in one write, because each is synced to the disk."""
    named = {json.dumps(k, sort_keys=True, separators=(",", ":")): v for k, v in figures}
    with CalibrationStore(path)._changed() as content:
        content.entries = named | content.entries
        content.conditions = dict.fromkeys(named, _quiet()) | content.conditions
    return set(named)


def _quiet() -> Conditions:
    """The conditions of a measurement that nothing disturbed."""
    return Conditions(
        cores=usable_cores(),
        others_cores=0.0,
        stolen_cores=0.0,
        held_share=0.0,
        load=0.0,
        spread=0.0,
        measured_s=time.time(),
    )


@functools.cache
def _backend(name: str) -> Backend:
    return backend_class(name)()
