"""What fewer bits do to a model: asked for, kept on disk, and turned into bounds for a plan.

Sensitivities are measured one block at a time; a plan's divergence is predicted as their sum times
a margin, because errors of several blocks can reinforce each other. The margin is the largest
measured / predicted of whole plans (docs/calibration.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coordinator.errors import RequestInvalid
from coordinator.plan import Plan
from coordinator.problem import DEFAULT_HOPS, HopFormat, PlanningProblem
from coordinator.request_fields import read_widths, take_form, take_model
from model.checkpoint import Checkpoint
from model.quantize import DEFAULT_GROUP_SIZE, Scheme
from model.spec import ModelSpec
from wire.activations import HOP_BITS

log = logging.getLogger(__name__)

STORE_VERSION = 1

ASSUMED_MARGIN = 1.5
"""Where no plan was checked. The largest ratio measured so far is 1.48 (docs/calibration.md)."""

_NOISE_KL = 1e-7
"""Sums below it say nothing about ratios: rounding in fp32 is as large."""

MAX_CHECKS = 8
"""Plans that are measured before a budget is given up."""

MAX_TOKENS = 1 << 16
MAX_PLANS = 64

Sequences = tuple[tuple[int, ...], ...]


def budget_margin(checks: Iterable[tuple[float, float]]) -> float:
    """What sums of sensitivities are multiplied with, from (predicted, measured) of plans.

    The largest ratio, never below 1; ASSUMED_MARGIN without any plan.
    """
    ratios = [measured / predicted for predicted, measured in checks if predicted > _NOISE_KL]
    return max(1.0, *ratios) if ratios else ASSUMED_MARGIN


def scaled(rows: Sequence[Mapping[int, float]], margin: float) -> tuple[Mapping[int, float], ...]:
    """Sensitivities with the margin applied: what plans add up against a budget."""
    return tuple({bits: kl * margin for bits, kl in row.items()} for row in rows)


def with_lossless(
    rows: Sequence[Mapping[int, float]], checkpoint: Checkpoint
) -> tuple[Mapping[int, float], ...]:
    """Sensitivities, 0 where nothing was measured and the width keeps a block as it is.

    Rows that are not one per block stay as they are, for ``build_problem`` to refuse.
    """
    if len(rows) != checkpoint.spec.block_count:
        return tuple(rows)
    lossless = [checkpoint.lossless_format(block).bits for block in range(len(rows))]
    return tuple(
        {bits: 0.0 for bits in (16, 32) if bits >= least} | dict(row)
        for row, least in zip(rows, lossless, strict=True)
    )


Own = Mapping[str, Mapping[int, Mapping[int, float]]]
"""By arithmetic, layer's block and bits: what the block adds where it is computed so."""


def scaled_own(own: Own, margin: float) -> Own:
    """As ``scaled``."""
    return {
        arithmetic: {
            block: {bits: kl * margin for bits, kl in row.items()} for block, row in rows.items()
        }
        for arithmetic, rows in own.items()
    }


def own_rows(
    arithmetics: Mapping[str, str],
    sensitivities: Sequence[Mapping[int, float]] | None,
    own: Own,
) -> dict[str, tuple[Mapping[int, float], ...]]:
    """Sensitivities per block of each device in ``arithmetics`` (device -> arithmetic, or empty)
    whose arithmetic adds its own; ``build_problem`` takes them.

    Layers have what was measured of the arithmetic, and nothing where nothing was. Embedding and
    head are computed alike everywhere.
    """
    if not sensitivities:
        return {}
    ends = (0, len(sensitivities) - 1)
    return {
        device: tuple(
            row if block in ends else own.get(arithmetic, {}).get(block, {})
            for block, row in enumerate(sensitivities)
        )
        for device, arithmetic in arithmetics.items()
        if arithmetic
    }


def choose_hops(
    asked: Iterable[int] | None, sensitivities: Mapping[int, float], quality_budget: float | None
) -> tuple[HopFormat, ...]:
    """What hops may be sent as, with the known ``sensitivities`` (bits -> KL divergence).

    Not asked for, it is the default alone, or every width of known sensitivity where there is a
    budget that bounds what narrow ones do.
    """
    if asked is not None:
        widths = sorted(set(asked))
    elif quality_budget is not None:
        widths = sorted(HOP_BITS)
    else:
        widths = [form.bits for form in DEFAULT_HOPS]
    forms = (
        HopFormat(bits, sensitivities[bits])
        if bits in sensitivities
        else HopFormat.unmeasured(bits)
        for bits in widths
    )
    return tuple(form for form in forms if asked is not None or form.sensitivity is not None)


def tightened(problem: PlanningProblem, plan: Plan, measured_kl: float) -> PlanningProblem:
    """The problem with so little budget that ``plan``, measured above its budget, is too much.

    ``problem`` has the user's budget. Another plan whose measured divergence is as many times its
    prediction keeps it.
    """
    predicted = plan.total_sensitivity
    if predicted is None or problem.quality_budget is None:
        raise ValueError("there is no budget to tighten")
    budget = predicted * min(problem.quality_budget / measured_kl, 0.99)
    return replace(problem, quality_budget=budget)


def own_share(problem: PlanningProblem, plan: Plan) -> float:
    """What the arithmetic of single devices is predicted to add to what the plan's bits lose."""
    indices = {device.name: index for index, device in enumerate(problem.devices)}
    return math.fsum(
        max((problem.sensitivity(indices[one.device], one.block, one.bits) or 0.0) - common, 0.0)
        for one in plan.placements
        if (common := problem.sensitivities[one.block].get(one.bits)) is not None
    )


@dataclass(frozen=True, slots=True)
class QualityRequest:
    """What ``shoal calibrate --quality --on`` asks for. ``on`` None: the fastest agent."""

    model: Path
    bits: tuple[int, ...]
    sequences: Sequences
    plans: tuple[tuple[int, ...], ...] = ()
    scheme: Scheme = "rtn"
    group_size: int = DEFAULT_GROUP_SIZE
    on: str | None = None

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> QualityRequest:
        """Read a user's JSON. Raises RequestInvalid naming the field."""
        plain = dict(values)
        model = take_model(plain)
        bits = read_widths(plain.pop("bits", None), "bits")
        sequences = plain.pop("sequences", None)
        if not _is_token_lists(sequences):
            raise RequestInvalid("sequences: lists of token ids", "sequences")
        plans = plain.pop("plans", [])
        if not isinstance(plans, list) or len(plans) > MAX_PLANS:
            raise RequestInvalid(f"plans: at most {MAX_PLANS} lists of bits", "plans")
        on = plain.pop("on", None)
        if on is not None and not isinstance(on, str):
            raise RequestInvalid("on: an agent's name, or null", "on")
        scheme, group_size = take_form(plain)
        if plain:
            raise RequestInvalid(f"unknown fields: {', '.join(sorted(plain))}")
        return QualityRequest(
            model,
            tuple(sorted(set(bits))),
            tuple(map(tuple, sequences)),
            tuple(read_widths(plan, "plans") for plan in plans),
            scheme,
            group_size,
            on,
        )

    def check(self, spec: ModelSpec) -> None:
        """Raise RequestInvalid where the request does not fit the model."""
        for sequence in self.sequences:
            if not 2 <= len(sequence) <= spec.max_context or max(sequence) >= spec.vocab:
                raise RequestInvalid(
                    f"sequences: 2 to {spec.max_context} tokens below {spec.vocab}", "sequences"
                )
        if any(len(plan) != spec.block_count for plan in self.plans):
            raise RequestInvalid(f"plans: the bits of {spec.block_count} blocks each", "plans")


@dataclass(slots=True)
class KnownQuality:
    """What is known of a model over one text and in one kind of format.

    ``blocks`` maps (block, bits) to (KL divergence, max|w - w_b|), ``plans`` the bits of all blocks
    to the plan's KL divergence, ``hops`` (boundary, bits) to that of rounding the rows there.
    ``own`` is as ``blocks``, by (arithmetic, block, bits), of layers computed with an arithmetic
    that loses more than weights do (DeviceProfile).
    """

    sequences: Sequences
    scheme: Scheme
    group_size: int
    blocks: dict[tuple[int, int], tuple[float, float]]
    plans: dict[tuple[int, ...], float]
    hops: dict[tuple[int, int], float] = field(default_factory=dict)
    own: dict[tuple[str, int, int], tuple[float, float]] = field(default_factory=dict)

    def own_sensitivities(self) -> dict[str, dict[int, dict[int, float]]]:
        """By arithmetic, block and bits: KL divergence of the block alone so computed."""
        found: dict[str, dict[int, dict[int, float]]] = {}
        for (arithmetic, block, bits), (kl, _) in self.own.items():
            found.setdefault(arithmetic, {}).setdefault(block, {})[bits] = kl
        return found

    def sensitivities(self, block_count: int) -> tuple[Mapping[int, float], ...]:
        """For each block: bits -> KL divergence of the block alone."""
        rows: tuple[dict[int, float], ...] = tuple({} for _ in range(block_count))
        for (block, bits), (kl, _) in self.blocks.items():
            rows[block][bits] = kl
        return rows

    def worst_hops(self, block_count: int) -> dict[int, float]:
        """Bits -> the largest KL divergence of all boundaries, where all of them are known."""
        boundaries = range(block_count - 1)
        return {
            bits: max((self.hops[boundary, bits] for boundary in boundaries), default=0.0)
            for bits in sorted({bits for _, bits in self.hops}, reverse=True)
            if all((boundary, bits) in self.hops for boundary in boundaries)
        }

    def checks(self) -> list[tuple[tuple[int, ...], float, float]]:
        """(bits, predicted, measured) of each measured plan whose blocks are all known."""
        return [
            (plan, math.fsum(self.blocks[place][0] for place in enumerate(plan)), kl)
            for plan, kl in self.plans.items()
            if all(place in self.blocks for place in enumerate(plan))
        ]

    @property
    def margin(self) -> float:
        """What the sum over blocks is multiplied with."""
        return budget_margin((predicted, measured) for _, predicted, measured in self.checks())


class QualityStore:
    """Results on the coordinator's disk, one file per checkpoint, text and format.

    Each result is written as soon as it comes. Losing a file costs time, never correctness.
    """

    def __init__(self, state_dir: Path) -> None:
        self._directory = state_dir / "quality"

    def open(
        self, checkpoint: Checkpoint, sequences: Sequences, scheme: Scheme, group_size: int
    ) -> KnownQuality:
        """What is known over this text so far; empty where nothing is."""
        path = self._path(checkpoint, sequences, scheme, group_size)
        known = self._read(path, checkpoint.spec) if path.exists() else None
        return known or KnownQuality(sequences, scheme, group_size, {}, {})

    def latest(
        self, checkpoint: Checkpoint, scheme: Scheme, group_size: int
    ) -> KnownQuality | None:
        """What was measured last for the checkpoint in this kind of format, over any text."""
        pattern = f"{checkpoint.fingerprint}-{scheme}-{group_size}-*.json"
        for path in sorted(
            self._directory.glob(pattern), key=lambda path: path.stat().st_mtime_ns, reverse=True
        ):
            known = self._read(path, checkpoint.spec)
            if known is not None:
                return known
        return None

    def save(self, checkpoint: Checkpoint, known: KnownQuality) -> None:
        """Write what is known, in place of what was. Raises OSError."""
        path = self._path(checkpoint, known.sequences, known.scheme, known.group_size)
        content = {
            "version": STORE_VERSION,
            "scheme": known.scheme,
            "group_size": known.group_size,
            "sequences": known.sequences,
            "blocks": [[*place, *values] for place, values in known.blocks.items()],
            "plans": [[list(plan), kl] for plan, kl in known.plans.items()],
            "hops": [[*place, kl] for place, kl in known.hops.items()],
            "own": [[*place, *values] for place, values in known.own.items()],
        }
        self._directory.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self._directory)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file)
            Path(temporary).replace(path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _read(self, path: Path, spec: ModelSpec) -> KnownQuality | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            content = json.loads(path.read_text(encoding="utf-8"))
            blocks = {
                (int(block), int(bits)): (float(kl), float(error))
                for block, bits, kl, error in content["blocks"]
            }
            hops = {
                (int(boundary), int(bits)): float(kl)
                # Files of before hops were measured have none.
                for boundary, bits, kl in content.get("hops", ())
            }
            own = {
                (str(arithmetic), int(block), int(bits)): (float(kl), float(error))
                for arithmetic, block, bits, kl, error in content.get("own", ())
            }
            if (
                content["version"] == STORE_VERSION
                and all(0 <= block < spec.block_count for block, _ in blocks)
                and all(0 < block < spec.head_block for _, block, _ in own)
                and all(0 <= kl < math.inf for kl, _ in own.values())
                and all(0 <= b < spec.head_block and bits in HOP_BITS for b, bits in hops)
                and all(0 <= kl < math.inf for kl in hops.values())
            ):
                return KnownQuality(
                    tuple(map(tuple, content["sequences"])),
                    content["scheme"],
                    content["group_size"],
                    blocks,
                    {tuple(plan): float(kl) for plan, kl in content["plans"]},
                    hops,
                    own,
                )
        log.warning("%s is damaged or of another version: measured anew", path)
        return None

    def _path(
        self, checkpoint: Checkpoint, sequences: Sequences, scheme: Scheme, group_size: int
    ) -> Path:
        text = hashlib.sha256(json.dumps(sequences).encode()).hexdigest()[:16]
        return self._directory / f"{checkpoint.fingerprint}-{scheme}-{group_size}-{text}.json"


def _is_token_lists(values: object) -> bool:
    return (
        isinstance(values, list)
        and bool(values)
        and all(
            isinstance(item, list) and all(type(token) is int and token >= 0 for token in item)
            for item in values
        )
        and sum(map(len, values)) <= MAX_TOKENS
    )
