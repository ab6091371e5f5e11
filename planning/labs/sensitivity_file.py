"""The file that ``shoal calibrate --json`` prints: the losses of a model's blocks by width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.bounded import read_json
from model.quantize import BITS
from model.spec import ModelSpec
from planning.sensitivity import Own, budget_margin
from wire.activations import HOP_BITS

MAX_SENSITIVITY_BYTES = 16 << 20
"""Enough for 10 000 blocks at 8 widths, with a line of a few hundred bytes each."""


class SensitivityError(Exception):
    """The file cannot be used. The message is one line: its name and what was expected."""


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """The results of a calibration of one model, by bits.

    ``kl``: KL divergence (nats) that each block adds.
    ``weight_errors``: max|w - w_b| / 2^b of each block.
    ``form``: how the calibration stored the blocks.
    ``margin``: factor on a plan's sum of ``kl`` and ``hops`` (``planning.sensitivity``).
    ``hops``: KL divergence that one hop adds.
    ``own``: like ``kl``, for layers in arithmetics that add losses.
    """

    kl: tuple[Mapping[int, float], ...]
    weight_errors: tuple[Mapping[int, float], ...]
    form: Mapping[str, object]
    margin: float
    hops: Mapping[int, float]
    own: Own


def read_sensitivities(path: Path, spec: ModelSpec) -> Sensitivities:
    """The sensitivities in a file of ``shoal calibrate --json``. Raises SensitivityError."""
    try:
        values = read_json(path, MAX_SENSITIVITY_BYTES)
    except OSError as error:
        raise SensitivityError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise SensitivityError(f"{path}: {error}: expected what calibrate --json prints") from error
    blocks = values.get("blocks") if isinstance(values, dict) else None
    if not isinstance(blocks, list):
        raise SensitivityError(
            f"{path}: has no list of blocks: expected what calibrate --json prints"
        )
    kl: dict[str, list[dict[int, float]]] = {"": [{} for _ in range(spec.block_count)]}
    errors: list[dict[int, float]] = [{} for _ in range(spec.block_count)]
    for index, item in enumerate(blocks):
        where = f"{path}: blocks[{index}]"
        if not isinstance(item, dict):
            raise SensitivityError(f"{where}: expected an object")
        block, bits = item.get("block"), item.get("bits")
        if type(block) is not int or not 0 <= block < spec.block_count:
            raise SensitivityError(
                f"{where}: block {block!r:.20}, the model has {spec.block_count}"
            )
        if type(bits) is not int or bits not in BITS:
            raise SensitivityError(
                f"{where}: {bits!r:.20} is no width: known are {', '.join(map(str, BITS))}"
            )
        arithmetic = item.get("arithmetic", "")
        if not isinstance(arithmetic, str) or (arithmetic and spec.block_kind(block) != "layer"):
            raise SensitivityError(f"{where}: arithmetic: expected a backend's name, of a layer")
        rows = kl.setdefault(arithmetic, [{} for _ in range(spec.block_count)])
        for key, into in (("kl", rows), ("normalized_weight_error", errors)):
            value = item.get(key)
            if (
                not isinstance(value, (int, float))
                or isinstance(value, bool)
                or not 0 <= value < math.inf
            ):
                raise SensitivityError(f"{where}: {key}: expected a number from 0 up")
            into[block][bits] = float(value)
    form = {key: values[key] for key in ("scheme", "group_size") if key in values}
    margin = _margin(values.get("plans"), path)
    hops = _worst_hops(values.get("worst_hops"), path)
    common = kl.pop("")
    own = {arithmetic: dict(enumerate(rows)) for arithmetic, rows in kl.items()}
    return Sensitivities(tuple(common), tuple(errors), form, margin, hops, own)


def _worst_hops(values: object, path: Path) -> dict[int, float]:
    """KL divergence of one hop by bits; empty without any. Raises SensitivityError."""
    found: dict[int, float] = {}
    known = {str(bits): bits for bits in HOP_BITS}
    if values is not None and not isinstance(values, dict):
        raise SensitivityError(f"{path}: worst_hops: expected an object of bits to KL divergence")
    for key, kl in (values or {}).items():
        if key not in known:
            raise SensitivityError(f"{path}: worst_hops: {key:.20}: known are {', '.join(known)}")
        if not isinstance(kl, (int, float)) or isinstance(kl, bool) or not 0 <= kl < math.inf:
            raise SensitivityError(f"{path}: worst_hops: {key}: expected a number from 0 up")
        found[known[key]] = float(kl)
    return found


_CHECKED = ("predicted_kl", "measured_kl")


def _margin(plans: object, path: Path) -> float:
    """The margin, from the measured and predicted losses of plans. Raises SensitivityError."""
    checks: list[tuple[float, float]] = []
    for index, plan in enumerate(plans if isinstance(plans, list) else ()):
        values = [plan.get(key) if isinstance(plan, dict) else None for key in _CHECKED]
        known = [float(v) for v in values if isinstance(v, (int, float)) and v >= 0]
        if len(known) != 2 or not all(map(math.isfinite, known)):
            raise SensitivityError(f"{path}: plans[{index}]: expected {' and '.join(_CHECKED)}")
        checks.append((known[0], known[1]))
    return budget_margin(checks)
