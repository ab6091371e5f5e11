"""What a plan is made from, as plain numbers: the model's blocks, the devices, the links.

``build_problem`` derives them once from profiles, timings and the cost formulas; the planner and
``planning.plan.verify`` read nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from model import costs
from model.spec import ModelSpec
from planning.json_codec import from_plain, to_plain
from planning.prompt import CHUNK_TOKENS, Passage, block_passage, chunk_choices, turns
from planning.together import row_s
from wire.activations import HOP_BITS
from wire.profile import TIMED_ROWS, LinkProfile

_MOST_COUNTED = 8
"""Of plans with more stages all are compared together."""

TOKEN_BYTES = 4
"""What the last stage sends the first: one token id. Half a round trip is all that it costs."""


ObjectiveKind = Literal["latency", "throughput", "request", "energy"]


@dataclass(frozen=True, slots=True)
class Objective:
    """What a plan is to minimise, in seconds; ``energy`` in joules.

    ``latency``: one decoded token. ``throughput``: the slowest stage with the link that leaves it,
    which is what each token takes when many are on their way. ``request``: a prompt of
    ``prompt_tokens`` until its first token is there (planning/prompt.py), and ``output_tokens``
    decoded one by one. ``energy``: what the stages draw while they compute one decoded token; what
    devices draw while they wait or send is left out.
    ``migration_weight`` adds that many seconds per second of loading what devices do not hold yet;
    ``energy`` has none. The prompt is also the one whose seconds a plan shows, whatever counts.
    The defaults are what is minimised unless a user says otherwise (docs/planner.md says why).
    """

    kind: ObjectiveKind = "request"
    prompt_tokens: int = 512
    output_tokens: int = 128
    migration_weight: float = 0.0

    def __post_init__(self) -> None:
        tokens = (self.prompt_tokens, self.output_tokens)
        if (
            self.kind not in get_args(ObjectiveKind)
            or min(*tokens, self.migration_weight) < 0
            or (self.kind == "request" and not any(tokens))
            or (self.kind == "energy" and self.migration_weight)
        ):
            raise ValueError(f"cannot minimise {self}")

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of the prompt that counts, and how often a decoded one counts, outside energy."""
        if self.kind == "request":
            return self.prompt_tokens, self.output_tokens
        return 0, int(self.kind == "latency")

    def within(self, context_tokens: int) -> Objective:
        """The same with a prompt and an answer that fit the context, each shorter in proportion."""
        prompt, output = self.prompt_tokens, self.output_tokens
        longest = max(prompt + output, 1)
        if longest <= context_tokens:
            return self
        shorter = prompt * context_tokens // longest
        return replace(self, prompt_tokens=shorter, output_tokens=context_tokens - shorter)


ONE_TOKEN = Objective("latency", prompt_tokens=0, output_tokens=1)
"""What counts where a problem is made of numbers alone, and says nothing of requests."""


@dataclass(frozen=True, slots=True)
class HopFormat:
    """Hidden values sent at ``bits`` on a link.

    ``sensitivity`` is the KL divergence (nats) that one hop at this width adds, the largest over
    all boundaries between blocks; None where it was not measured.
    """

    bits: int
    sensitivity: float | None = None

    def __post_init__(self) -> None:
        known = self.sensitivity
        if self.bits not in HOP_BITS or (known is not None and not 0 <= known < math.inf):
            raise ValueError(f"a hop cannot be sent as {self}: its bits are one of {HOP_BITS}")

    @staticmethod
    def unmeasured(bits: int) -> HopFormat:
        """What is assumed where nothing was measured: 32 bits lose nothing, and 16, with a relative
        error of 2^-11 per value, too little to count; of 8 nothing is known.
        """
        return HopFormat(bits, None if bits == 8 else 0.0)


DEFAULT_HOPS = (HopFormat.unmeasured(16),)
"""8 bits have to be asked for."""


@dataclass(frozen=True, slots=True)
class BlockOption:
    """One block run at ``bits`` on one device.

    ``executed_bytes`` are the weights in the device's memory, which may be wider than ``bits``.
    ``sensitivity`` is what the block adds to the KL divergence here, where the device's arithmetic
    adds its own: inf where that was not measured. None: what it adds anywhere. ``rows_s`` is what
    TIMED_ROWS rows of as many sequences take in one pass; empty where that was not measured.
    """

    bits: int
    executed_bytes: int
    decode_s: float
    prefill_s_per_token: float
    sensitivity: float | None = None
    rows_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.sensitivity is not None and not self.sensitivity >= 0:
            raise ValueError(f"a sensitivity cannot be {self.sensitivity}")


@dataclass(frozen=True, slots=True)
class Device:
    """One device: its limits and, for each block, every width that it can run the block at.

    ``stage_bytes`` is memory that any stage here needs besides weights and KV cache;
    ``call_s`` is what each token pays once for there being a stage here, the agent's work included.
    ``backend_bits`` are the
    widths that the backend takes, measured or not: only messages use them. ``held`` has the widths
    of each block that are on the device's disk already (empty: nothing is). ``watts`` is what it
    draws while it computes; where that is not known, no plan for ``energy`` uses it.
    """

    name: str
    memory_bytes: int
    storage_bytes: int
    options: tuple[tuple[BlockOption, ...], ...]
    stage_bytes: int = 0
    call_s: float = 0.0
    backend_bits: tuple[int, ...] = ()
    held: tuple[frozenset[int], ...] = ()
    load_bytes_per_s: float = math.inf
    watts: float | None = None

    @property
    def shares_passes(self) -> bool:
        """Whether it is known of any block what several rows take in one pass."""
        return any(option.rows_s for row in self.options for option in row)

    def option(self, block: int, bits: int) -> BlockOption | None:
        """How this device runs ``block`` at ``bits``; None where it cannot."""
        # Asked for each option of large problems: a loop is twice as fast as a generator.
        for option in self.options[block]:
            if option.bits == bits:
                return option
        return None


@dataclass(frozen=True, slots=True)
class NoLink:
    """A link that was tried and does not work: why, and where ``target`` was looked for.

    ``addresses`` are ``host:port``.
    """

    source: str
    target: str
    reason: str
    addresses: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Who cannot reach whom, why, and where it was tried."""
        unnamed = [address for address in self.addresses if address not in self.reason]
        tried = f"; its addresses are {', '.join(unnamed)}" if unnamed else ""
        return f"{self.source} cannot reach {self.target} ({self.reason}{tried})"

    @property
    def remedy(self) -> str:
        """What to allow so that the link works."""
        ports = dict.fromkeys(address.rpartition(":")[2] for address in self.addresses)
        port = f"TCP port {' or '.join(ports)}" if ports else "its agent's TCP port"
        return f"{self.source} connect to {port} of {self.target}"


@dataclass(frozen=True, slots=True)
class PlanningProblem:
    """Everything that decides a plan. Tuples over blocks have ``spec.block_count`` entries.

    ``links`` holds (source, target) as indices into ``devices``; a pair without a link cannot be
    neighbours in a plan, and ``no_links`` says why where that was tried. ``weight_errors`` maps
    bits to the normalised error of a block, and ``max_weight_error`` is its bound (inf: none). Only
    widths in ``bits`` are planned with; those beside them serve for advice. ``sensitivities`` maps
    bits to what a block adds to the mean KL divergence of the model's next token (nats), where the
    device's option does not say otherwise; their sum, hops included, keeps ``quality_budget``. A
    hop uses one of ``hop_formats``; with a budget, one of known sensitivity. ``pins`` maps blocks
    to the device (an index) that must run them, ``excluded`` devices run none. A prompt runs in
    chunks of ``chunk_tokens``; None: in what is best for the plan, one of ``chunk_choices``.
    ``sequences`` are decoded at once where the objective is throughput; None: so many that all
    stages are always busy, each with one row at a time. Plans have at least ``least_stages`` and at
    most ``most_stages`` (None: any number).
    """

    spec: ModelSpec
    devices: tuple[Device, ...]
    links: Mapping[tuple[int, int], LinkProfile]
    bits: tuple[int, ...]
    stored_bytes: tuple[Mapping[int, int], ...]
    kv_bytes: tuple[int, ...]
    weight_errors: tuple[Mapping[int, float], ...]
    max_weight_error: tuple[float, ...]
    sensitivities: tuple[Mapping[int, float], ...] = ()
    quality_budget: float | None = None
    objective: Objective = ONE_TOKEN
    pins: Mapping[int, int] = field(default_factory=dict)
    excluded: frozenset[int] = frozenset()
    hop_formats: tuple[HopFormat, ...] = DEFAULT_HOPS
    no_links: Mapping[tuple[int, int], NoLink] = field(default_factory=dict)
    chunk_tokens: int | None = None
    sequences: int | None = None
    least_stages: int = 1
    most_stages: int | None = None

    @property
    def variants(self) -> tuple[PlanningProblem, ...]:
        """Problems of which one has the best plan, each with one way of counting: a size of a
        prompt's chunks, or how many rows meet in a stage.
        """
        if self.shared_by is None:
            return tuple(replace(self, chunk_tokens=rows) for rows in self.chunk_choices)
        given = self.least_stages > 1 or self.most_stages is not None
        if given or not any(device.shares_passes for device in self.devices):
            return (self,)
        # Where at most two rows meet they share nothing, however many stages there are.
        most = max(2, min(len(self.devices), math.ceil(self.shared_by / 2), _MOST_COUNTED))
        counted = [
            replace(self, least_stages=count, most_stages=count if count < most else None)
            for count in range(2, most + 1)
        ]
        # Without links one device has everything.
        return (replace(self, links={}, most_stages=1), *counted)

    @property
    def shared_by(self) -> int | None:
        """How many sequences the objective counts; None: it counts none."""
        return self.sequences if self.objective.kind == "throughput" else None

    def row_s(self, one_s: float, rows_s: Sequence[float]) -> float:
        """What a row keeps a stage busy for, given what one and TIMED_ROWS rows take there."""
        if self.shared_by is None:
            return one_s
        alone = self.most_stages == 1
        # Where there may be more stages, the fewest share the most.
        return row_s(one_s, rows_s, self.shared_by, 1 if alone else max(self.least_stages, 2))

    @property
    def chunk_choices(self) -> tuple[int | None, ...]:
        """The chunks that plans have to be compared for; None where no prompt counts."""
        prompt, _ = self.objective.tokens
        if not prompt or self.chunk_tokens is not None:
            return (self.chunk_tokens,)
        return chunk_choices(prompt)

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk of the prompt that counts; 0 where none does."""
        return min(self.chunk_tokens or CHUNK_TOKENS[0], self.objective.tokens[0])

    @property
    def turns(self) -> float:
        """How often the slowest stage or link with a chunk is waited for, beside the first one."""
        prompt, _ = self.objective.tokens
        return turns(prompt, self.chunk_rows)

    @property
    def permitted_hops(self) -> tuple[HopFormat, ...]:
        """The formats that a hop may use: with a budget, those of known sensitivity."""
        return tuple(
            form
            for form in self.hop_formats
            if self.quality_budget is None or form.sensitivity is not None
        )

    def hop_choices(self, source: int, target: int) -> tuple[HopFormat, ...]:
        """Permitted formats for a hop that no other one beats, the cheapest first.

        Empty without a link. Equal ones are decided by the wider bits.
        """
        if (source, target) not in self.links:
            return ()

        def figures(form: HopFormat) -> tuple[float, ...]:
            hop = source, target, form.bits
            loss = form.sensitivity if self.quality_budget is not None else 0.0
            return self.hop_cost(*hop), self.hop_s(*hop), loss or 0.0

        best = sorted(self.permitted_hops, key=lambda form: (figures(form), -form.bits))
        return tuple(
            form
            for index, form in enumerate(best)
            if not any(
                all(x <= y for x, y in zip(figures(other), figures(form), strict=True))
                for other in best[:index]
            )
        )

    def no_link(self, source: int, target: int) -> str:
        """What to say where a pair has no link."""
        known = self.no_links.get((source, target))
        if known is not None:
            return str(known)
        return f"there is no link from {self.devices[source].name} to {self.devices[target].name}"

    def hop_sensitivity(self, bits: int) -> float | None:
        """KL divergence that one hop at ``bits`` adds; None where it was not measured."""
        known = {form.bits: form.sensitivity for form in self.hop_formats}
        return known.get(bits, HopFormat.unmeasured(bits).sensitivity)

    def hop_bytes(self, bits: int) -> int:
        """What one token's hidden state weighs on a link."""
        return costs.hop_bytes(self.spec, bits)

    def hop_s(self, source: int, target: int, bits: int) -> float:
        """Seconds from device to device for one token's hidden state; inf without a link."""
        link = self.links.get((source, target))
        return math.inf if link is None else link.transfer_s(self.hop_bytes(bits))

    def return_s(self, last: int, first: int) -> float:
        """Seconds for the sampled token's way back; 0 on one device, inf without a link."""
        if last == first:
            return 0.0
        link = self.links.get((last, first))
        return math.inf if link is None else link.transfer_s(TOKEN_BYTES)

    def passage(self, block: int, option: BlockOption) -> Passage:
        """What a chunk of a prompt takes in a block. The head computes the last row alone, once."""
        if block == self.spec.head_block:
            return Passage(0.0, 0.0, option.decode_s)
        return block_passage(option.decode_s, option.prefill_s_per_token)

    def hop_passage(self, source: int, target: int, bits: int) -> Passage:
        """What a chunk of a prompt takes on a link that exists."""
        link = self.links[source, target]
        return Passage(0.0, self.hop_bytes(bits) / link.bytes_per_s, link.transfer_s(0))

    def block_cost(self, device: int, block: int, option: BlockOption) -> float:
        """What a block adds to the objective, beside the slowest stage where that counts."""
        if self.objective.kind == "energy":
            return self._watts(device) * option.decode_s
        seconds = self.objective.tokens[1] * option.decode_s
        if rows := self.chunk_rows:
            passage = self.passage(block, option)
            seconds += passage.busy_s(rows) + passage.delay_s
        weight = self.objective.migration_weight
        return seconds + weight * self.load_s(device, block, option.bits) if weight else seconds

    def call_cost(self, device: int) -> float:
        """What a stage on the device adds to the objective, whatever its blocks."""
        if self.objective.kind == "energy":
            return self._watts(device) * self.devices[device].call_s
        calls = self.objective.tokens[1] + bool(self.chunk_rows)
        return calls * self.devices[device].call_s

    def hop_cost(self, source: int, target: int, bits: int) -> float:
        """What a hop adds to the objective; inf without a link."""
        if (source, target) not in self.links:
            return math.inf
        seconds = self.objective.tokens[1] * self.hop_s(source, target, bits)
        if rows := self.chunk_rows:
            passage = self.hop_passage(source, target, bits)
            seconds += passage.busy_s(rows) + passage.delay_s
        return seconds

    def return_cost(self, last: int, first: int) -> float:
        """What the way back adds to the objective; 0 on one device, inf without a link."""
        seconds = self.return_s(last, first)
        return seconds if seconds == math.inf else self.objective.tokens[1] * seconds

    @property
    def slowest_counts(self) -> float:
        """How often the slowest stage adds to the objective, by ``turn_s`` of what it has."""
        return 1.0 if self.objective.kind == "throughput" else self.turns

    @property
    def link_apart(self) -> bool:
        """Whether a stage goes on while what leaves it is being sent, so that links count alone."""
        return self.objective.kind != "throughput"

    def call_turn_s(self, device: int) -> float:
        """What a call adds to the time of a stage, where the slowest one counts."""
        own = self.devices[device]
        if self.objective.kind == "throughput" and own.shares_passes:
            return self.row_s(own.call_s, (own.call_s,) * len(TIMED_ROWS))
        return own.call_s

    def turn_s(self, block: int, option: BlockOption) -> float:
        """What a block adds to the time of its stage, where the slowest one counts."""
        if self.objective.kind == "throughput":
            return self.row_s(option.decode_s, option.rows_s)
        return self.passage(block, option).busy_s(self.chunk_rows)

    def hop_turn_s(self, source: int, target: int, bits: int) -> float:
        """What a hop takes, where the slowest stage counts; inf without a link."""
        if (source, target) not in self.links:
            return math.inf
        if self.objective.kind == "throughput":
            return self.hop_s(source, target, bits)
        return self.hop_passage(source, target, bits).busy_s(self.chunk_rows)

    def return_turn_s(self, last: int, first: int) -> float:
        """What the way back takes, where the slowest stage counts: nothing beside a prompt."""
        return self.return_s(last, first) if self.objective.kind == "throughput" else 0.0

    def _watts(self, device: int) -> float:
        # Where they are not known ``allows`` keeps all blocks away.
        return self.devices[device].watts or 0.0

    def load_s(self, device: int, block: int, bits: int) -> float:
        """Seconds to bring the block to the device; 0 where it is."""
        own = self.devices[device]
        if own.held and bits in own.held[block]:
            return 0.0
        return self.stored_bytes[block][bits] / own.load_bytes_per_s

    def sensitivity(self, device: int, block: int, bits: int) -> float | None:
        """KL divergence that the block at ``bits`` adds there; None where it was not measured."""
        option = self.devices[device].option(block, bits)
        if option is not None and option.sensitivity is not None:
            return None if option.sensitivity == math.inf else option.sensitivity
        return self.sensitivities[block].get(bits) if self.sensitivities else None

    def loss(self, device: int, block: int, bits: int) -> float:
        """What the block there takes of the quality budget; 0 without one, inf if not known."""
        if self.quality_budget is None:
            return 0.0
        known = self.sensitivity(device, block, bits)
        return math.inf if known is None else known

    def allows(self, device: int, block: int, bits: int) -> bool:
        """True where neither quality nor a pin nor an exclusion forbids this placement."""
        return (
            bits in self.bits
            and (self.objective.kind != "energy" or self.devices[device].watts is not None)
            and device not in self.excluded
            and self.pins.get(block, device) == device
            and self.within_error(block, bits)
            and self.loss(device, block, bits) < math.inf
        )

    def weight_error(self, block: int, bits: int) -> float | None:
        """Normalised weight error of a block; None where it was not measured."""
        return self.weight_errors[block].get(bits)

    def within_error(self, block: int, bits: int) -> bool:
        """True where the error bound allows ``block`` at ``bits``; unknown errors are too large."""
        bound = self.max_weight_error[block]
        return bound == math.inf or self.weight_errors[block].get(bits, math.inf) <= bound

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, the same as from a JSON file; ``from_dict`` is the inverse."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    @staticmethod
    def from_dict(values: object) -> PlanningProblem:
        """Inverse of ``to_dict``; what has a default may be left out.

        Raises ValueError naming a key that is missing, unknown or wrong.
        """
        problem: PlanningProblem = from_plain(PlanningProblem, values, "problem")
        problem._check_shape()
        return problem

    def _check_shape(self) -> None:
        """Raise ValueError where a table or an index does not fit the model and the devices."""
        blocks, devices = range(self.spec.block_count), range(len(self.devices))
        tables: list[tuple[str, Sequence[object]]] = [
            ("stored_bytes", self.stored_bytes),
            ("kv_bytes", self.kv_bytes),
            ("weight_errors", self.weight_errors),
            ("max_weight_error", self.max_weight_error),
            *((f"devices[{i}].options", device.options) for i, device in enumerate(self.devices)),
            *((f"devices[{i}].held", d.held) for i, d in enumerate(self.devices) if d.held),
        ]
        if self.sensitivities or self.quality_budget is not None:
            tables.append(("sensitivities", self.sensitivities))
        if not self.hop_formats:
            raise ValueError("problem.hop_formats: expected at least one")
        for name, table in tables:
            if len(table) != len(blocks):
                raise ValueError(f"problem.{name}: {len(table)} blocks, not {len(blocks)}")
        for name, indices, known in (
            ("links", [index for pair in self.links for index in pair], devices),
            ("no_links", [index for pair in self.no_links for index in pair], devices),
            ("pins", [*self.pins.values()], devices),
            ("pins", [*self.pins], blocks),
            ("excluded", [*self.excluded], devices),
        ):
            for index in indices:
                if index not in known:
                    raise ValueError(f"problem.{name}: there is no {index}")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"problem.chunk_tokens: expected at least 1, not {self.chunk_tokens}")
