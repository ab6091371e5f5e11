"""Keeps measured sensitivities on disk, and turns them into bounds for a plan.

Sensitivities are measured one block at a time. A plan's divergence is predicted as their sum times
a margin, because errors of several blocks can reinforce each other. The margin is the largest ratio
of measured to predicted divergence among whole plans (docs/calibration.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.aging import by_use
from model.bounded import read_json
from model.checkpoint import Checkpoint
from model.durable import replace_text
from model.loss_store import LossStore
from model.quantize import DEFAULT_GROUP_SIZE, DEFAULT_SCHEME, Quantizer
from model.spec import ModelSpec
from planning.errors import RequestInvalid
from planning.json_codec import to_plain
from planning.request_fields import (
    BITS_EXPECTED,
    MODEL_EXPECTED,
    SCHEME_TEXT_EXPECTED,
    read_request,
    require,
    require_adapter,
    require_form,
    require_model,
    require_scheme_text,
    require_widths,
)
from planning.sensitivity import budget_margin
from wire.activations import HOP_BITS

log = logging.getLogger(__name__)

STORE_VERSION = 1

_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError)
"""Errors of reading values that ``save`` did not write."""

MAX_TOKENS = 1 << 16
MAX_PLANS = 64

Sequences = tuple[tuple[int, ...], ...]

_EXPECTED = {
    "model": MODEL_EXPECTED,
    "bits": BITS_EXPECTED,
    "sequences": f"lists of token ids, {MAX_TOKENS} in all at most",
    "plans": f"at most {MAX_PLANS} lists of bits",
    "scheme_text": SCHEME_TEXT_EXPECTED,
    "on": "an agent's name, or null",
}


@dataclass(frozen=True, slots=True)
class QualityRequest:
    """The request of ``shoal calibrate --quality --on``. ``on`` None means the fastest agent."""

    model: Path
    bits: tuple[int, ...]
    sequences: Sequences
    plans: tuple[tuple[int, ...], ...] = ()
    scheme: Quantizer = DEFAULT_SCHEME
    group_size: int = DEFAULT_GROUP_SIZE
    on: str | None = None
    adapter: str | None = None
    scheme_text: str | None = None
    """Both as in ``LoadRequest``."""

    def __post_init__(self) -> None:
        require_model(self.model)
        require_adapter(self.adapter)
        require_form(self.scheme, self.group_size)
        require_scheme_text(self.scheme_text)
        require_widths(self.bits, "bits")
        object.__setattr__(self, "bits", tuple(sorted(set(self.bits))))
        require(_are_token_lists(self.sequences), "sequences", _EXPECTED["sequences"])
        require(len(self.plans) <= MAX_PLANS, "plans", _EXPECTED["plans"])
        for plan in self.plans:
            require_widths(plan, "plans")

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> QualityRequest:
        """Read a user's JSON. Raises RequestInvalid naming the field."""
        return QualityRequest(**read_request(QualityRequest, values, _EXPECTED))

    def to_dict(self) -> dict[str, Any]:
        """The JSON that ``from_dict`` reads."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    def check(self, spec: ModelSpec) -> None:
        """Raise RequestInvalid if the request does not fit the model."""
        for sequence in self.sequences:
            if not 2 <= len(sequence) <= spec.max_context or max(sequence) >= spec.vocab:
                raise RequestInvalid(
                    f"sequences: expected 2 to {spec.max_context} tokens, all below {spec.vocab}",
                    "sequences",
                )
        if any(len(plan) != spec.block_count for plan in self.plans):
            raise RequestInvalid(
                f"plans: expected the bits of {spec.block_count} blocks in each", "plans"
            )


@dataclass(slots=True)
class KnownQuality:
    """The measurements of one model over one text, for one scheme and group size.

    blocks: (block, bits) -> (KL divergence, max|w - w_b|).
    plans: the bits of all blocks -> KL divergence of the plan.
    hops: (boundary, bits) -> KL divergence of rounding the rows there.
    own: (arithmetic, block, bits) -> as blocks, for layers computed with a lossy arithmetic
    (DeviceProfile).
    """

    sequences: Sequences
    scheme: Quantizer
    group_size: int
    blocks: dict[tuple[int, int], tuple[float, float]]
    plans: dict[tuple[int, ...], float]
    hops: dict[tuple[int, int], float] = field(default_factory=dict)
    own: dict[tuple[str, int, int], tuple[float, float]] = field(default_factory=dict)

    def own_sensitivities(self) -> dict[str, dict[int, dict[int, float]]]:
        """The KL divergence of each block alone, by arithmetic, block and bits."""
        found: dict[str, dict[int, dict[int, float]]] = {}
        for (arithmetic, block, bits), (kl, _) in self.own.items():
            found.setdefault(arithmetic, {}).setdefault(block, {})[bits] = kl
        return found

    def sensitivities(self, block_count: int) -> tuple[Mapping[int, float], ...]:
        """The KL divergence of each block alone, as a mapping from bits."""
        rows: tuple[dict[int, float], ...] = tuple({} for _ in range(block_count))
        for (block, bits), (kl, _) in self.blocks.items():
            rows[block][bits] = kl
        return rows

    def worst_hops(self, block_count: int) -> dict[int, float]:
        """The largest KL divergence of a boundary, by bits.

        Bits for which a boundary was not measured are left out.
        """
        boundaries = range(block_count - 1)
        return {
            bits: max((self.hops[boundary, bits] for boundary in boundaries), default=0.0)
            for bits in sorted({bits for _, bits in self.hops}, reverse=True)
            if all((boundary, bits) in self.hops for boundary in boundaries)
        }

    def checks(self) -> list[tuple[tuple[int, ...], float, float]]:
        """The (bits, predicted, measured) of each measured plan whose blocks are all known."""
        return [
            (plan, math.fsum(self.blocks[place][0] for place in enumerate(plan)), kl)
            for plan, kl in self.plans.items()
            if all(place in self.blocks for place in enumerate(plan))
        ]

    @property
    def margin(self) -> float:
        """The factor on the sum over blocks."""
        return budget_margin((predicted, measured) for _, predicted, measured in self.checks())


class QualityStore:
    """Results on the coordinator's disk, one file per checkpoint, text and format.

    Each result is written as soon as it comes. Losing a file costs time, never correctness.
    """

    def __init__(self, state_dir: Path) -> None:
        self._directory = state_dir / "quality"
        self.losses = LossStore(state_dir)
        """The losses measured while planning."""

    def open(
        self, checkpoint: Checkpoint, sequences: Sequences, scheme: Quantizer, group_size: int
    ) -> KnownQuality:
        """The measurements over this text so far, maybe none."""
        path = self._path(checkpoint, sequences, scheme, group_size)
        known = self._read(path, checkpoint.spec) if path.exists() else None
        return known or KnownQuality(sequences, scheme, group_size, {}, {})

    def latest(
        self, checkpoint: Checkpoint, scheme: Quantizer, group_size: int
    ) -> KnownQuality | None:
        """The newest measurements of the checkpoint in this scheme and group size."""
        pattern = f"{checkpoint.fingerprint}-{scheme}-{group_size}-*.json"
        for path in reversed(by_use(self._directory.glob(pattern))):
            known = self._read(path, checkpoint.spec)
            if known is not None:
                return known
        return None

    def save(self, checkpoint: Checkpoint, known: KnownQuality) -> None:
        """Replace the measurements on disk. Raises OSError."""
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
        replace_text(path, json.dumps(content))

    def _read(self, path: Path, spec: ModelSpec) -> KnownQuality | None:
        with contextlib.suppress(OSError, *_DAMAGE):
            content = read_json(path)
            blocks = {
                (int(block), int(bits)): (float(kl), float(error))
                for block, bits, kl, error in content["blocks"]
            }
            hops = {
                (int(boundary), int(bits)): float(kl)
                # Files of older versions have no hops.
                for boundary, bits, kl in content.get("hops", ())
            }
            plans = {tuple(map(int, plan)): float(kl) for plan, kl in content["plans"]}
            own = {
                (str(arithmetic), int(block), int(bits)): (float(kl), float(error))
                for arithmetic, block, bits, kl, error in content.get("own", ())
            }
            if (
                content["version"] == STORE_VERSION
                and all(0 <= block < spec.block_count for block, _ in blocks)
                and all(0 <= value < math.inf for pair in blocks.values() for value in pair)
                and all(0 <= kl < math.inf for kl in plans.values())
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
                    plans,
                    hops,
                    own,
                )
        log.warning("%s is damaged or of another version: it is measured again", path)
        return None

    def _path(
        self, checkpoint: Checkpoint, sequences: Sequences, scheme: Quantizer, group_size: int
    ) -> Path:
        text = hashlib.sha256(json.dumps(sequences).encode()).hexdigest()[:16]
        return self._directory / f"{checkpoint.fingerprint}-{scheme}-{group_size}-{text}.json"


def _are_token_lists(sequences: Sequences) -> bool:
    return (
        bool(sequences)
        and all(token >= 0 for tokens in sequences for token in tokens)
        and sum(map(len, sequences)) <= MAX_TOKENS
    )
