"""What a user asks to be planned or loaded, checked before anything is done about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from model.quantize import DEFAULT_GROUP_SIZE, Format, Scheme
from planning.errors import RequestInvalid
from planning.plan import PlanError
from planning.problem import Objective, ObjectiveKind
from planning.request_fields import read_widths, take_form, take_model
from planning.saved import SavedPlan
from planning.sensitivity import Own
from wire.activations import HOP_BITS

DEFAULT_BITS = (4, 8, 16)
DEFAULT_MAX_WEIGHT_ERROR = 1e-3
"""Default bound on max|w - w_b| / 2^b: at this value the paper's model lost nothing measurable
(Source: DILEMMA, Table 1)."""
DEFAULT_CONTEXT_TOKENS = 2048
DEFAULT_TIME_LIMIT_S = 20.0

MAX_SLOTS = 64
"""More would fill no stage better, and each takes a context of memory."""
THROUGHPUT_SLOTS = 4
"""Default for the objective ``throughput``, which one sequence at a time cannot reach."""


def default_slots(objective: ObjectiveKind) -> int:
    """How many sequences a deployment holds unless told otherwise."""
    return THROUGHPUT_SLOTS if objective == "throughput" else 1


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a user asks to be planned. ``max_weight_error`` None means no bound."""

    model: Path
    bits: tuple[int, ...] = DEFAULT_BITS
    scheme: Scheme = "rtn"
    group_size: int = DEFAULT_GROUP_SIZE
    max_weight_error: float | None = DEFAULT_MAX_WEIGHT_ERROR
    context_tokens: int | None = None
    time_limit_s: float = DEFAULT_TIME_LIMIT_S
    slots: int = 1
    """Sequences at once, each with a KV cache of ``context_tokens``."""
    objective: Objective = field(default_factory=Objective)
    pins: Mapping[int, str] = field(default_factory=dict)
    """Block -> the device that it must be on: name or id, its id once ``identified``."""
    exclude: tuple[str, ...] = ()
    """Devices as in ``pins``."""
    sensitivities: tuple[Mapping[int, float], ...] | None = None
    """Per block: bits -> what it adds to the KL divergence. None: what the coordinator measured,
    where there is a budget."""
    own_sensitivities: Own = field(default_factory=dict)
    """Those of layers in arithmetics that add their own; goes with ``sensitivities``."""
    hop_sensitivities: Mapping[int, float] = field(default_factory=dict)
    """Bits -> what one hop at them adds; goes with ``sensitivities``."""
    hop_bits: tuple[int, ...] | None = None
    """Widths that a hop may use; None: ``coordinator.quality.store.choose_hops``."""
    quality_budget: float | None = None
    quality_margin: float | None = None
    """What ``sensitivities`` are multiplied with; None: what the coordinator knows or assumes."""
    check_quality: bool = False
    """Measure the plan's divergence, and plan again until it keeps the budget."""
    given: SavedPlan | None = None
    """This plan instead of the best."""
    with_problem: bool = False
    """Answer with the planning problem too."""
    asked: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The JSON that this was read from."""
    devices: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Names in ``asked`` -> ids of the devices that they meant when they were asked for."""

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> PlanRequest:
        """Read a user's JSON. Raises RequestInvalid naming the field."""
        plain = dict(values)
        model = take_model(plain)
        bits = read_widths(plain.pop("bits", list(DEFAULT_BITS)), "bits")
        scheme, group_size = take_form(plain)
        error_bound = plain.pop("max_weight_error", DEFAULT_MAX_WEIGHT_ERROR)
        if error_bound is not None and (
            not isinstance(error_bound, (int, float)) or not error_bound >= 0
        ):
            raise RequestInvalid("max_weight_error: a number >= 0, or null", "max_weight_error")
        context = plain.pop("context_tokens", None)
        if context is not None and (type(context) is not int or context < 1):
            raise RequestInvalid("context_tokens: a positive whole number", "context_tokens")
        limit_s = plain.pop("time_limit_s", DEFAULT_TIME_LIMIT_S)
        if not isinstance(limit_s, (int, float)) or not 0 < limit_s <= 3600:
            raise RequestInvalid("time_limit_s: between 0 and 3600", "time_limit_s")
        slots = plain.pop("slots", None)
        if slots is not None and (type(slots) is not int or not 1 <= slots <= MAX_SLOTS):
            raise RequestInvalid(f"slots: a whole number from 1 to {MAX_SLOTS}, or null", "slots")
        wishes = _wishes(plain)
        kind = wishes.get("objective", Objective()).kind
        if plain:
            raise RequestInvalid(f"unknown fields: {', '.join(sorted(plain))}")
        return PlanRequest(
            model,
            tuple(sorted(set(bits))),
            scheme,
            group_size,
            None if error_bound is None else float(error_bound),
            context,
            float(limit_s),
            slots or default_slots(kind),
            asked=values,
            **wishes,
        )

    def identified(self, find: Callable[[str], str | None]) -> PlanRequest:
        """The same request, with ids in place of names.

        ``find`` gives the id of a name or id, and None for an unknown one, which stays as it is.
        """
        meant: dict[str, str] = {}

        def device(text: str) -> str:
            found = find(text)
            if found is None:
                return text
            meant[text] = found
            return found

        given = self.given
        if given is not None:
            ids = given.devices
            given = given.renamed(lambda text: ids[text] if text in ids else device(text))
        return replace(
            self,
            pins={block: device(text) for block, text in self.pins.items()},
            exclude=tuple(map(device, self.exclude)),
            given=given,
            devices={**self.devices, **meant},
        )

    def format(self, bits: int) -> Format:
        return Format.of(bits, self.scheme, self.group_size)


def _wishes(plain: dict[str, Any]) -> dict[str, Any]:
    """Take what is optional about a plan's aim out of ``plain``. Raises RequestInvalid."""
    wishes: dict[str, Any] = {}
    objective = plain.pop("objective", None)
    if objective is not None:
        try:
            wishes["objective"] = Objective(**objective)
        except (TypeError, ValueError) as error:
            kinds = ", ".join(get_args(ObjectiveKind))
            raise RequestInvalid(
                f"objective: kind ({kinds}), prompt_tokens, output_tokens", "objective"
            ) from error
    pins = plain.pop("pins", {})
    if not isinstance(pins, dict) or not all(
        block.isdecimal() and isinstance(device, str) for block, device in pins.items()
    ):
        raise RequestInvalid("pins: an object of block number to device name", "pins")
    wishes["pins"] = {int(block): device for block, device in pins.items()}
    exclude = plain.pop("exclude", [])
    if not isinstance(exclude, list) or not all(isinstance(name, str) for name in exclude):
        raise RequestInvalid("exclude: a list of device names", "exclude")
    wishes["exclude"] = tuple(exclude)
    budget = plain.pop("quality_budget", None)
    if budget is not None and not (isinstance(budget, (int, float)) and budget >= 0):
        raise RequestInvalid("quality_budget: a number >= 0, or null", "quality_budget")
    wishes["quality_budget"] = budget
    margin = plain.pop("quality_margin", None)
    if margin is not None and not (isinstance(margin, (int, float)) and 1 <= margin < math.inf):
        raise RequestInvalid("quality_margin: a number >= 1, or null", "quality_margin")
    wishes["quality_margin"] = margin
    for flag in ("check_quality", "with_problem"):
        wishes[flag] = plain.pop(flag, False)
        if not isinstance(wishes[flag], bool):
            raise RequestInvalid(f"{flag}: true or false", flag)
    if wishes["check_quality"] and budget is None:
        raise RequestInvalid("check_quality needs a quality_budget", "check_quality")
    hop_bits = plain.pop("hop_bits", None)
    if hop_bits is not None:
        if (
            not isinstance(hop_bits, list)
            or not hop_bits
            or any(type(item) is not int or item not in HOP_BITS for item in hop_bits)
        ):
            known = ", ".join(map(str, HOP_BITS))
            raise RequestInvalid(f"hop_bits: a list out of {known}, or null", "hop_bits")
        wishes["hop_bits"] = tuple(sorted(set(hop_bits)))
    wishes["given"] = _given(plain.pop("plan", None))
    wishes["hop_sensitivities"] = _hop_sensitivities(plain.pop("hop_sensitivities", {}))
    wishes["own_sensitivities"] = _own_sensitivities(plain.pop("own_sensitivities", {}))
    rows = plain.pop("sensitivities", None)
    if rows is None:
        return wishes
    try:
        wishes["sensitivities"] = tuple(
            {int(bits): float(kl) for bits, kl in row.items()} for row in rows
        )
        if not all(0 <= kl < math.inf for row in wishes["sensitivities"] for kl in row.values()):
            raise ValueError("not a divergence")
    except (AttributeError, TypeError, ValueError) as error:
        raise RequestInvalid(
            "sensitivities: for each block an object of bits to KL divergence", "sensitivities"
        ) from error
    return wishes


def _own_sensitivities(values: object) -> Own:
    """By arithmetic, block and bits. Raises RequestInvalid."""
    try:
        if not isinstance(values, dict):
            raise TypeError("not an object")
        own = {
            str(arithmetic): {
                int(block): {int(bits): float(kl) for bits, kl in row.items()}
                for block, row in rows.items()
            }
            for arithmetic, rows in values.items()
        }
        if not all(
            0 <= kl < math.inf
            for rows in own.values()
            for row in rows.values()
            for kl in row.values()
        ):
            raise ValueError("not a divergence")
    except (AttributeError, TypeError, ValueError) as error:
        raise RequestInvalid(
            "own_sensitivities: an object of arithmetic to block to bits to KL divergence",
            "own_sensitivities",
        ) from error
    return own


def _hop_sensitivities(values: object) -> dict[int, float]:
    """Bits to KL divergence of one hop. Raises RequestInvalid."""
    known = {str(bits): bits for bits in HOP_BITS}
    if not isinstance(values, dict) or not all(
        key in known and type(kl) in (int, float) and 0 <= kl < math.inf
        for key, kl in values.items()
    ):
        raise RequestInvalid(
            "hop_sensitivities: an object of bits to KL divergence", "hop_sensitivities"
        )
    return {known[key]: float(kl) for key, kl in values.items()}


def _given(values: object) -> SavedPlan | None:
    """A plan file's stages, as JSON. Raises RequestInvalid."""
    if values is None:
        return None
    try:
        return SavedPlan.from_dict(values)
    except PlanError as error:
        raise RequestInvalid(str(error), "plan") from error


def model_name(directory: Path) -> str:
    """What a model is called: its directory, or the one above where that is just ``model``."""
    named = directory.parent if directory.name == "model" else directory
    return named.name or "model"
