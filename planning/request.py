"""A user's request to plan or load: one value for command line, HTTP and disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from model.hub import served_name
from model.quantize import BITS, DEFAULT_GROUP_SIZE, DEFAULT_SCHEME, Format, Quantizer
from model.spec import ModelSpec
from planning.errors import RequestInvalid
from planning.json_codec import to_plain
from planning.plan import PlanError
from planning.problem import Objective, ObjectiveKind
from planning.request_fields import (
    BITS_EXPECTED,
    MODEL_EXPECTED,
    SCHEME_TEXT_EXPECTED,
    is_weight,
    read_request,
    require,
    require_adapter,
    require_form,
    require_model,
    require_scheme_text,
    require_teams,
    require_widths,
)
from planning.saved import SavedPlan
from planning.sensitivity import Own, applying_budget
from wire.activations import HOP_BITS

DEFAULT_BITS = (3, 4, 5, 6, 8)
ENCODER_BITS = (8,)
"""No loss is known for what an encoder returns, so a plan could not choose fewer."""
DEFAULT_CONTEXT_TOKENS = 2048
DEFAULT_DRAFT_BITS = 4
"""A draft model may be wrong now and then, and must be fast."""
DEFAULT_TIME_LIMIT_S = 20.0

MAX_SLOTS = 64
"""More slots fill no stage better, and each takes the memory of a context."""
THROUGHPUT_SLOTS = 4
"""Default for ``throughput``. One sequence at a time cannot reach the predicted speed."""

MOST_NAMED = 1024
"""The most devices that a request names to exclude, or in teams: four times a whole shoal."""

MOST_PINS = 1 << 13
"""More blocks than any model has."""

MOST_TOGETHER = 8
"""The most models that are planned together."""

MAX_WEIGHT = 100.0
"""The largest weight of a model. With more, others on its devices would stand still."""


def default_slots(objective: ObjectiveKind) -> int:
    """The default number of sequences that a deployment holds."""
    return THROUGHPUT_SLOTS if objective == "throughput" else 1


_EXPECTED = {
    "model": MODEL_EXPECTED,
    "bits": BITS_EXPECTED,
    "max_weight_error": "a number >= 0, or null",
    "context_tokens": "a positive whole number, or null",
    "time_limit_s": "seconds above 0, at most 3600",
    "slots": f"a whole number from 1 to {MAX_SLOTS}, or null",
    "objective": f"kind ({', '.join(get_args(ObjectiveKind))}), prompt_tokens, output_tokens,"
    " migration_weight",
    "pins": f"an object of block number to device name, at most {MOST_PINS}",
    "exclude": f"a list of device names, at most {MOST_NAMED}",
    "teams": f"a list of teams, each a list of at least two device names, at most {MOST_NAMED} in"
    " all",
    "no_teams": "true or false",
    "sensitivities": "for each block an object of bits to KL divergence",
    "own_sensitivities": "an object of arithmetic to block to bits to KL divergence",
    "hop_sensitivities": "an object of bits to KL divergence",
    "hop_bits": f"a list out of {', '.join(map(str, HOP_BITS))}, or null",
    "quality_budget": "a number >= 0, or null",
    "quality_margin": "a number >= 1, or null",
    "scheme_text": SCHEME_TEXT_EXPECTED,
    "unbounded": "true or false",
    "check_quality": "true or false",
    "generation_defaults": "true or false",
    "with_problem": "true or false",
    "replaces": "true or false",
    "keep_s": "seconds from 1 up, or null",
    "draft": f"{MODEL_EXPECTED}, or null",
    "draft_bits": f"one of {', '.join(map(str, BITS))}",
    "weight": f"a number from {1 / MAX_WEIGHT} to {MAX_WEIGHT:g}",
    "together": f"an object of at most {MOST_TOGETHER} models' names to numbers above 0",
}
"""The allowed values of each field, in words for the user."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """A user's request to plan or load a model.

    The command line sends it as ``to_dict``, HTTP reads it with ``from_dict``, and the coordinator
    keeps it on disk. Raises RequestInvalid, with the field's name, for a value that is not allowed.
    """

    model: Path
    """The absolute path of the model's directory."""
    bits: tuple[int, ...] = DEFAULT_BITS
    scheme: Quantizer = DEFAULT_SCHEME
    group_size: int = DEFAULT_GROUP_SIZE
    max_weight_error: float | None = None
    """The DILEMMA paper's bound on max|w - w_b| / 2^b of each block. None: no bound."""
    context_tokens: int | None = None
    """Positions of a context. None: DEFAULT_CONTEXT_TOKENS, or the model's limit if it is less."""
    time_limit_s: float = DEFAULT_TIME_LIMIT_S
    slots: int = 1
    """Sequences at once, each with a KV cache of ``context_tokens``."""
    objective: Objective = field(default_factory=Objective)
    pins: Mapping[int, str] = field(default_factory=dict)
    """Block -> the device that must run it: a name or an id, an id once ``identified``."""
    exclude: tuple[str, ...] = ()
    """Devices that run no block, as names or ids like in ``pins``."""
    teams: tuple[tuple[str, ...], ...] = ()
    """Devices that must share layers, as names or ids like in ``pins``. Each is in one team."""
    no_teams: bool = False
    """Plan without teams: every layer is on one device."""
    sensitivities: tuple[Mapping[int, float], ...] | None = None
    """Per block: bits -> KL divergence of the block. None: those that the coordinator measured."""
    own_sensitivities: Own = field(default_factory=dict)
    """The same for layers in arithmetics that add losses. Needs ``sensitivities``."""
    hop_sensitivities: Mapping[int, float] = field(default_factory=dict)
    """Bits -> KL divergence that one hop adds. Needs ``sensitivities``."""
    hop_bits: tuple[int, ...] | None = None
    """Widths that a hop may use. None: ``planning.sensitivity.choose_hops`` decides."""
    quality_budget: float | None = None
    """Bound on the plan's KL divergence, in nats per token. None: ``loss_budget`` decides."""
    quality_margin: float | None = None
    """Factor on ``sensitivities``. None: the margin that the coordinator knows or assumes."""
    unbounded: bool = False
    """Plan without any bound on the loss, instead of the default budget."""
    check_quality: bool = False
    """Measure the plan's divergence, and plan again until it keeps the budget."""
    plan: SavedPlan | None = None
    """Use this plan instead of the best one."""
    generation_defaults: bool = True
    """Let the model's generation_config.json decide what requests leave open."""
    with_problem: bool = False
    """Also answer with the planning problem."""
    scheme_text: str | None = None
    """The text that ``scheme`` looks at. None: the model's own, or the built-in one."""
    adapter: str | None = None
    """The absolute path of a LoRA adapter to merge; ``none`` leaves out one beside the model."""
    replaces: bool = False
    """Take the place of all loaded models. Otherwise the model gets what they leave."""
    weight: float = 1.0
    """The model's part of devices that it shares, against the weights of other models there."""
    draft: Path | None = None
    """The path of a small model with the same vocabulary that guesses tokens. None: none does."""
    draft_bits: int = DEFAULT_DRAFT_BITS
    """The width of all weights of the draft model."""
    keep_s: float | None = None
    """Unload the model after so long without a request. A request loads it again. None: never."""
    together: Mapping[str, float] = field(default_factory=dict)
    """The models that were planned together with this one, itself included, and how many requests
    each of them gets, in any unit. They are planned together again. Empty: it was planned alone."""

    def __post_init__(self) -> None:
        require_model(self.model)
        if self.draft is not None:
            require_model(self.draft, "draft")
        require_widths((self.draft_bits,), "draft_bits")
        require_adapter(self.adapter)
        require_form(self.scheme, self.group_size)
        require_scheme_text(self.scheme_text)
        require_widths(self.bits, "bits")
        # Equal requests compare equal, in whatever order their widths were given.
        object.__setattr__(self, "bits", tuple(sorted(set(self.bits))))
        if self.hop_bits is not None:
            object.__setattr__(self, "hop_bits", tuple(sorted(set(self.hop_bits))))
        for name, holds in self._checks().items():
            require(holds, name, _EXPECTED[name])
        if self.check_quality and self.quality_budget is None:
            raise RequestInvalid("check_quality needs a quality_budget", "check_quality")
        require_teams(self.teams, self.exclude, no_teams=self.no_teams)

    def _checks(self) -> dict[str, bool]:
        """Field name -> whether its value is allowed."""
        own = [row for rows in self.own_sensitivities.values() for row in rows.values()]
        known = self.hop_sensitivities
        return {
            "max_weight_error": _within(self.max_weight_error, 0),
            "context_tokens": _within(self.context_tokens, 1),
            "time_limit_s": 0 < self.time_limit_s <= 3600,
            "slots": 1 <= self.slots <= MAX_SLOTS,
            "pins": len(self.pins) <= MOST_PINS and all(block >= 0 for block in self.pins),
            "exclude": len(self.exclude) <= MOST_NAMED,
            "teams": sum(map(len, self.teams)) <= MOST_NAMED,
            "sensitivities": _divergences(self.sensitivities or ()),
            "own_sensitivities": _divergences(own),
            "hop_sensitivities": set(known) <= set(HOP_BITS) and _divergences([known]),
            "hop_bits": self.hop_bits is None
            or (bool(self.hop_bits) and set(self.hop_bits) <= set(HOP_BITS)),
            "quality_budget": _within(self.quality_budget, 0),
            "quality_margin": _within(self.quality_margin, 1),
            "keep_s": _within(self.keep_s, 1),
            "weight": 1 / MAX_WEIGHT <= self.weight <= MAX_WEIGHT,
            "together": len(self.together) <= MOST_TOGETHER
            and all(map(is_weight, self.together.values())),
        }

    def for_model(self, spec: ModelSpec) -> LoadRequest:
        """The same request with the widths that are the default of this kind of model."""
        if spec.encodes and self.bits == DEFAULT_BITS and self.plan is None:
            return replace(self, bits=ENCODER_BITS)
        return self

    @property
    def loss_budget(self) -> float | None:
        """The bound on the plan's KL divergence that applies; None: no bound."""
        decided = self.plan is not None or len(self.bits) == 1
        return applying_budget(
            self.quality_budget, self.max_weight_error, unbounded=self.unbounded, decided=decided
        )

    def to_dict(self) -> dict[str, Any]:
        """The request as JSON that ``from_dict`` reads."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> LoadRequest:
        """Read a user's JSON. Raises RequestInvalid naming the field.

        A null ``max_weight_error`` alone asks for no bound at all.
        """
        given = {
            key: value
            for key, value in values.items()
            if value is not None or key not in ("slots", "objective")
        }
        try:
            read = read_request(LoadRequest, given, _EXPECTED)
        except PlanError as error:
            raise RequestInvalid(str(error), "plan") from error
        if "max_weight_error" in read and read["max_weight_error"] is None:
            read.setdefault("unbounded", read.get("quality_budget") is None)
        read.setdefault("slots", default_slots(read.get("objective", Objective()).kind))
        return LoadRequest(**read)

    def identified(self, find: Callable[[str], str | None]) -> LoadRequest:
        """The same request with ids in place of names.

        ``find`` gives the id of a name or id, or None if it is unknown. Unknown names stay.
        """

        def device(text: str) -> str:
            found = find(text)
            return text if found is None else found

        plan = self.plan
        if plan is not None:
            ids = plan.devices
            plan = plan.renamed(lambda text: ids[text] if text in ids else device(text))
        return replace(
            self,
            pins={block: device(text) for block, text in self.pins.items()},
            exclude=tuple(map(device, self.exclude)),
            teams=tuple(tuple(map(device, team)) for team in self.teams),
            plan=plan,
        )

    def format(self, bits: int) -> Format:
        return Format.of(bits, self.scheme, self.group_size)


def _within(value: float | None, least: float) -> bool:
    return value is None or least <= value < math.inf


def _divergences(rows: Iterable[Mapping[int, float]]) -> bool:
    """True if all values can be KL divergences."""
    return all(0 <= kl < math.inf for row in rows for kl in row.values())


def model_name(path: Path) -> str:
    """The name under which the model at a path is served (``model.hub.served_name``)."""
    return served_name(path)
