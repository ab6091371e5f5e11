"""A planning problem as plain numbers: the model's blocks, the devices and the links.

``build_problem`` computes the numbers once from profiles, timings and the cost formulas. The
planner and ``planning.plan.verify`` read nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from model import costs
from model.experts import ExpertCounts
from model.share import Share
from model.spec import ModelSpec
from planning.json_codec import from_plain, to_plain
from planning.prompt import CHUNK_TOKENS, Passage, block_passage, chunk_choices, turns
from planning.together import row_s
from wire.activations import HOP_BITS
from wire.profile import TIMED_ROWS, LinkProfile

_MOST_COUNTED = 8
"""All plans with this many stages or more are one variant."""

TOKEN_BYTES = 4
"""Size of the token id that the last stage sends to the first."""


ObjectiveKind = Literal["latency", "throughput", "request", "energy"]


@dataclass(frozen=True, slots=True)
class Objective:
    """The quantity that a plan minimises: seconds, or joules for ``energy``.

    ``latency``: seconds of one decoded token.
    ``throughput``: seconds between two tokens when several sequences are decoded at once. This is
    the time of a row in the slowest stage with the link that leaves it (planning/together.py). With
    few sequences it is a token's time through the ring, divided by their number, if that is longer.
    ``request``: seconds of a prompt of ``prompt_tokens`` until its first token
    (planning/prompt.py), and of ``output_tokens`` decoded one by one.
    ``energy``: joules that the stages draw while they compute one decoded token. Devices that wait
    or send are not counted.
    ``migration_weight`` adds that many seconds per second of loading blocks that a device does not
    hold yet. ``energy`` has no such weight.

    Every plan shows the seconds of a prompt of ``prompt_tokens``, for any objective. The default
    values apply unless the user asks for others (docs/planner.md says why).
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
        """Tokens of the prompt in the objective, and how often one decoded token is counted."""
        if self.kind == "request":
            return self.prompt_tokens, self.output_tokens
        return 0, int(self.kind == "latency")

    def within(self, context_tokens: int) -> Objective:
        """The objective with prompt and answer shortened in proportion to fit the context."""
        prompt, output = self.prompt_tokens, self.output_tokens
        longest = max(prompt + output, 1)
        if longest <= context_tokens:
            return self
        shorter = prompt * context_tokens // longest
        return replace(self, prompt_tokens=shorter, output_tokens=context_tokens - shorter)


ONE_TOKEN = Objective("latency", prompt_tokens=0, output_tokens=1)
"""The objective of a problem that is made of numbers alone and says nothing of requests."""


@dataclass(frozen=True, slots=True)
class HopFormat:
    """Hidden values sent at ``bits`` on a link.

    ``sensitivity`` is the KL divergence (nats) that one hop at this width adds. It is the largest
    over all boundaries between blocks, or None if it was not measured.
    """

    bits: int
    sensitivity: float | None = None

    def __post_init__(self) -> None:
        known = self.sensitivity
        if self.bits not in HOP_BITS or (known is not None and not 0 <= known < math.inf):
            raise ValueError(f"a hop cannot be sent as {self}: its bits are one of {HOP_BITS}")

    @staticmethod
    def unmeasured(bits: int) -> HopFormat:
        """A format with the assumed sensitivity: 0 at 32 and 16 bits, unknown at 8.

        32 bits lose nothing. At 16 bits a relative error of 2^-11 per value counts as nothing.
        """
        return HopFormat(bits, None if bits == 8 else 0.0)


DEFAULT_HOPS = (HopFormat.unmeasured(16),)
"""Formats of hops by default. 8 bits need a request, or a budget and a known sensitivity."""


@dataclass(frozen=True, slots=True)
class BlockOption:
    """One block run at ``bits`` on one device.

    ``executed_bytes`` are the weights in the device's memory, which may be wider than ``bits``.
    ``sensitivity`` is the KL divergence that the block adds on this device, if the device's
    arithmetic adds to it: inf if that was not measured. None: the same as on any device.
    ``rows_s`` has the seconds of one pass of TIMED_ROWS rows, each of another sequence. It is empty
    if passes of several rows were not measured.
    ``shares_s``: measured shares of the block, as (fraction, decode_s, prefill_s_per_token), by
    fraction. Empty: not measured (planning/teams.py assumes them).
    """

    bits: int
    executed_bytes: int
    decode_s: float
    prefill_s_per_token: float
    sensitivity: float | None = None
    rows_s: tuple[float, ...] = ()
    shares_s: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.sensitivity is not None and not self.sensitivity >= 0:
            raise ValueError(f"a sensitivity cannot be {self.sensitivity}")


@dataclass(frozen=True, slots=True)
class PartOption:
    """A member's part of one block at ``bits``, KV cache included. Its seconds have no sums."""

    bits: int
    memory_bytes: int
    storage_bytes: int
    decode_s: float


@dataclass(frozen=True, slots=True)
class Part:
    """One member of a team: its share, its limits and its part of every block.

    Fields that ``Device`` has too mean the same here. ``sum_s``: its own work for one sum of one
    row over this team.
    """

    name: str
    share: Share
    memory_bytes: int
    storage_bytes: int
    stage_bytes: int
    call_s: float
    load_bytes_per_s: float
    sum_s: float
    options: tuple[tuple[PartOption, ...], ...]

    def option(self, block: int, bits: int) -> PartOption:
        """The member's part of ``block`` at ``bits``, a width that the team has."""
        return next(option for option in self.options[block] if option.bits == bits)


@dataclass(frozen=True, slots=True)
class Team:
    """The members of a device that is a team: real devices that share each layer.

    ``parts``: the members, lead first. ``lead``: its index in the problem's devices. The lead alone
    has links to other stages, and the embedding.
    ``sum_bits``: width of the partial rows that members exchange.
    ``sum_s``: seconds of one sum of one row. Each layer has two.
    """

    lead: int
    parts: tuple[Part, ...]
    sum_bits: int
    sum_s: float


@dataclass(frozen=True, slots=True)
class Device:
    """One device: its limits and, for each block, every width that it can run the block at.

    ``memory_bytes``: memory that shoal may use, of ``memory_total_bytes`` that are built in.
    Only advice reads the total.
    ``stage_bytes``: memory that any stage here needs besides weights and KV cache.
    ``call_s``: seconds that a stage here adds to each token, whatever its blocks. The agent's own
    work is included.
    ``backend_bits``: widths that the backend takes, measured or not. Only messages use them.
    ``held``: widths of each block that are on the device's disk already. Empty: none is.
    ``watts``: power while the device computes. If it is unknown, no plan for ``energy`` uses the
    device.
    ``shares``: whether it can run a share of layers. ``sum_s``: its own work for one sum.
    ``team``: the members, if this is no real device but a team (planning/teams.py). Bytes are then
    sums over the members, and ``call_row_s`` is the time that each row of a chunk adds to a call.
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
    memory_total_bytes: int | None = None
    shares: bool = False
    sum_s: float = 0.0
    team: Team | None = None
    call_row_s: float = 0.0

    @property
    def holders(self) -> tuple[Device | Part, ...]:
        """The real devices that run a stage here, each with limits of its own; the lead first."""
        return (self,) if self.team is None else self.team.parts

    @property
    def shares_passes(self) -> bool:
        """Whether a pass of several rows was timed for any block."""
        return any(option.rows_s for row in self.options for option in row)

    def option(self, block: int, bits: int) -> BlockOption | None:
        """How this device runs ``block`` at ``bits``; None if it cannot."""
        # Large problems call this once per option: a loop is twice as fast as a generator.
        for option in self.options[block]:
            if option.bits == bits:
                return option
        return None


@dataclass(frozen=True, slots=True)
class NoLink:
    """A link that was tried and does not work, with the reason.

    ``addresses`` are the ``host:port`` at which ``source`` tried to reach ``target``.
    """

    source: str
    target: str
    reason: str
    addresses: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One clause for the user: source, target, reason, and the addresses that were tried."""
        unnamed = [address for address in self.addresses if address not in self.reason]
        tried = f"; its addresses are {', '.join(unnamed)}" if unnamed else ""
        return f"{self.source} cannot reach {self.target} ({self.reason}{tried})"

    @property
    def remedy(self) -> str:
        """The connection to allow, in words that follow "let"."""
        ports = dict.fromkeys(address.rpartition(":")[2] for address in self.addresses)
        port = f"TCP port {' or '.join(ports)}" if ports else "its agent's TCP port"
        return f"{self.source} connect to {port} of {self.target}"


@dataclass(frozen=True, slots=True)
class PlanningProblem:
    """Everything that decides a plan. Tuples over blocks have ``spec.block_count`` entries.

    ``links``: by (source, target), which are indices into ``devices``. A pair without a link cannot
    be neighbours in a plan. ``no_links`` says why, for pairs that were tried.
    ``bits``: widths that a plan may use. Devices may have options at other widths, for advice.
    ``weight_errors``: bits -> normalised error of a block. ``max_weight_error`` is its bound (inf:
    none).
    ``sensitivities``: bits -> mean KL divergence (nats) of the model's next token from a block.
    The sensitivity of a device's option replaces it on that device.
    ``quality_budget``: bound on the sum of sensitivities, hops included. None: no bound.
    ``hop_formats``: formats that a hop may use. With a budget, only those of known sensitivity.
    ``pins``: block -> index of the device that must run it. ``excluded`` devices run no block.
    ``chunk_tokens``: rows of a chunk of a prompt. None: the best of ``chunk_choices`` for the plan.
    ``sequences``: how many are decoded at once, for the objective throughput. None: enough to keep
    all stages busy, with one row each at a time.
    ``least_stages``, ``most_stages``: limits on the number of stages. None: no upper limit.
    ``teams``: sets of devices (indices) that must share layers. Each of them is one stage, and a
    pin to one of its devices means this stage. ``no_teams``: no devices may share layers.
    ``group_size``: largest quantization group of the formats, which shares must not cut; 0: none.
    ``pass_tokens``: rows that go through at a time. An encoder runs whole texts. Its problem counts
    a pass of them as one decoded token, and ``decode_s`` is that of the pass.
    ``experts``: how often rows of a text took each expert. None: they choose uniformly.
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
    teams: tuple[tuple[int, ...], ...] = ()
    no_teams: bool = False
    group_size: int = 0
    pass_tokens: int = 1
    experts: ExpertCounts | None = None

    @property
    def real(self) -> range:
        """The indices of real devices. They come before teams."""
        count = len(self.devices)
        return range(next((i for i in range(count) if self.devices[i].team is not None), count))

    @property
    def only_shared(self) -> frozenset[int]:
        """Devices of teams that were asked for, which run nothing alone, once teams are made."""
        if not self.teams or len(self.real) == len(self.devices):
            return frozenset()
        return frozenset(index for team in self.teams for index in team)

    def lead(self, device: int) -> int:
        """The real device that has the links of ``device``: the lead of a team, or itself."""
        team = self.devices[device].team
        return device if team is None else team.lead

    def link(self, source: int, target: int) -> LinkProfile | None:
        """The link between two devices or teams; None without one."""
        return self.links.get((self.lead(source), self.lead(target)))

    @property
    def variants(self) -> tuple[PlanningProblem, ...]:
        """Problems of which at least one has the best plan.

        Each has one size of a prompt's chunks, or one number of stages, and so of rows that meet.
        """
        if self.shared_by is None:
            return tuple(replace(self, chunk_tokens=rows) for rows in self.chunk_choices)
        given = self.least_stages > 1 or self.most_stages is not None
        if given or not any(device.shares_passes for device in self.devices):
            return (self,)
        # With a stage for each sequence they share nothing: more stages change no time of a row.
        most = max(2, min(len(self.real), self.shared_by, _MOST_COUNTED))
        counted = [
            replace(self, least_stages=count, most_stages=count if count < most else None)
            for count in range(2, most + 1)
        ]
        # Without links, every plan has one stage.
        return (replace(self, links={}, most_stages=1), *counted)

    @property
    def shared_by(self) -> int | None:
        """Number of sequences that may share passes; None if no row shares a pass."""
        return self.sequences if self.objective.kind == "throughput" else None

    def row_s(self, one_s: float, rows_s: Sequence[float]) -> float:
        """Seconds that a row keeps a stage busy, from its passes of one row and of TIMED_ROWS."""
        if self.shared_by is None:
            return one_s
        alone = self.most_stages == 1
        # If more stages are allowed, the fewest count: there most rows share a pass.
        return row_s(one_s, rows_s, self.shared_by, 1 if alone else max(self.least_stages, 2))

    @property
    def chunk_choices(self) -> tuple[int | None, ...]:
        """Sizes of a chunk to compare; ``chunk_tokens`` alone if it is set or no prompt counts."""
        prompt, _ = self.objective.tokens
        if not prompt or self.chunk_tokens is not None:
            return (self.chunk_tokens,)
        return chunk_choices(prompt)

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk of the prompt that counts; 0 if no prompt counts."""
        return min(self.chunk_tokens or CHUNK_TOKENS[0], self.objective.tokens[0])

    @property
    def turns(self) -> float:
        """How many chunks follow the first. Each waits for the slowest stage or link."""
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
        """Permitted formats for a hop that no other format beats, the cheapest first.

        Empty without a link. Of equal formats the one with more bits stays.
        """
        if self.link(source, target) is None:
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
        """One clause for the user about a pair without a link."""
        source, target = self.lead(source), self.lead(target)
        known = self.no_links.get((source, target))
        if known is not None:
            return str(known)
        return f"there is no link from {self.devices[source].name} to {self.devices[target].name}"

    def hop_sensitivity(self, bits: int) -> float | None:
        """KL divergence that one hop at ``bits`` adds; None if it is not known."""
        known = {form.bits: form.sensitivity for form in self.hop_formats}
        return known.get(bits, HopFormat.unmeasured(bits).sensitivity)

    def hop_bytes(self, bits: int) -> int:
        """Bytes of one pass's hidden state on a link."""
        return self.pass_tokens * costs.hop_bytes(self.spec, bits)

    def hop_s(self, source: int, target: int, bits: int) -> float:
        """Seconds of one token's hidden state on a link; inf without one."""
        link = self.link(source, target)
        return math.inf if link is None else link.transfer_s(self.hop_bytes(bits))

    def return_s(self, last: int, first: int) -> float:
        """Seconds of the sampled token's way back; 0 on one device, inf without a link."""
        if last == first:
            return 0.0
        link = self.link(last, first)
        return math.inf if link is None else link.transfer_s(TOKEN_BYTES)

    def passage(self, block: int, option: BlockOption) -> Passage:
        """The passage of a prompt's chunks through a block. The head computes only the last row."""
        if block == self.spec.head_block:
            return Passage(0.0, 0.0, option.decode_s)
        return block_passage(option.decode_s, option.prefill_s_per_token)

    def hop_passage(self, source: int, target: int, bits: int) -> Passage:
        """The passage of a prompt's chunks over a link, which must exist."""
        link = self.links[self.lead(source), self.lead(target)]
        return Passage(0.0, self.hop_bytes(bits) / link.bytes_per_s, link.transfer_s(0))

    def block_cost(self, device: int, block: int, option: BlockOption) -> float:
        """The block's part of the objective's sum. ``turn_s`` is its part of the slowest stage."""
        if self.objective.kind == "energy":
            return self._watts(device) * option.decode_s
        seconds = self.objective.tokens[1] * option.decode_s
        if rows := self.chunk_rows:
            passage = self.passage(block, option)
            seconds += passage.busy_s(rows) + passage.delay_s
        weight = self.objective.migration_weight
        return seconds + weight * self.load_s(device, block, option.bits) if weight else seconds

    def call_cost(self, device: int) -> float:
        """The part of the objective's sum that a stage on the device has without its blocks."""
        if self.objective.kind == "energy":
            return self._watts(device) * self.devices[device].call_s
        calls = self.objective.tokens[1] + bool(self.chunk_rows)
        own = self.devices[device]
        return calls * own.call_s + self.chunk_rows * own.call_row_s

    def hop_cost(self, source: int, target: int, bits: int) -> float:
        """The hop's part of the objective's sum; inf without a link."""
        if self.link(source, target) is None:
            return math.inf
        seconds = self.objective.tokens[1] * self.hop_s(source, target, bits)
        if rows := self.chunk_rows:
            passage = self.hop_passage(source, target, bits)
            seconds += passage.busy_s(rows) + passage.delay_s
        return seconds

    def return_cost(self, last: int, first: int) -> float:
        """The way back's part of the objective's sum; 0 on one device, inf without a link."""
        seconds = self.return_s(last, first)
        return seconds if seconds == math.inf else self.objective.tokens[1] * seconds

    @property
    def slowest_counts(self) -> float:
        """The factor of the slowest stage (or link) in the objective; ``turn_s`` is its time."""
        return 1.0 if self.objective.kind == "throughput" else self.turns

    @property
    def link_apart(self) -> bool:
        """Whether a stage computes the next chunk while it sends, so that links count apart."""
        return self.objective.kind != "throughput"

    def call_turn_s(self, device: int) -> float:
        """The call's part of its stage's time, for the slowest stage."""
        own = self.devices[device]
        if self.objective.kind == "throughput" and own.shares_passes:
            return self.row_s(own.call_s, (own.call_s,) * len(TIMED_ROWS))
        return own.call_s + (0.0 if self.shared_by else self.chunk_rows * own.call_row_s)

    def turn_s(self, block: int, option: BlockOption) -> float:
        """The block's part of its stage's time, for the slowest stage."""
        if self.objective.kind == "throughput":
            return self.row_s(option.decode_s, option.rows_s)
        return self.passage(block, option).busy_s(self.chunk_rows)

    def hop_turn_s(self, source: int, target: int, bits: int) -> float:
        """Seconds of a hop, for the slowest stage or link; inf without a link."""
        if self.link(source, target) is None:
            return math.inf
        if self.objective.kind == "throughput":
            return self.hop_s(source, target, bits)
        return self.hop_passage(source, target, bits).busy_s(self.chunk_rows)

    def return_turn_s(self, last: int, first: int) -> float:
        """Seconds of the way back, for the slowest stage; 0 unless the objective is throughput."""
        return self.return_s(last, first) if self.objective.kind == "throughput" else 0.0

    def _watts(self, device: int) -> float:
        # ``allows`` keeps all blocks away from a device of unknown watts.
        return self.devices[device].watts or 0.0

    def load_s(self, device: int, block: int, bits: int) -> float:
        """Seconds of loading the block; 0 if the device holds it."""
        own = self.devices[device]
        if own.held and bits in own.held[block]:
            return 0.0
        if own.team is not None:
            return max(
                part.option(block, bits).storage_bytes / part.load_bytes_per_s
                for part in own.team.parts
            )
        return self.stored_bytes[block][bits] / own.load_bytes_per_s

    def sensitivity(self, device: int, block: int, bits: int) -> float | None:
        """KL divergence that the block adds on the device; None if it was not measured."""
        option = self.devices[device].option(block, bits)
        if option is not None and option.sensitivity is not None:
            return None if option.sensitivity == math.inf else option.sensitivity
        return self.sensitivities[block].get(bits) if self.sensitivities else None

    def loss(self, device: int, block: int, bits: int) -> float:
        """The block's part of the quality budget; 0 without a budget, inf if not known."""
        if self.quality_budget is None:
            return 0.0
        known = self.sensitivity(device, block, bits)
        return math.inf if known is None else known

    def allows(self, device: int, block: int, bits: int) -> bool:
        """True if quality, watts, pins and exclusions permit this placement."""
        return (
            bits in self.bits
            and (self.objective.kind != "energy" or self.devices[device].watts is not None)
            and device not in self.excluded
            and self.may_run(device, block)
            and self.within_error(block, bits)
            and self.loss(device, block, bits) < math.inf
        )

    def may_run(self, device: int, block: int) -> bool:
        """True if pins and teams that were asked for permit the device or team to run ``block``."""
        if device in self.only_shared:
            return False
        pinned = self.pins.get(block, device)
        team = self.devices[device].team
        if pinned == device or team is None or not any(pinned in asked for asked in self.teams):
            return pinned == device
        if block == 0:
            return team.lead == pinned
        return self.devices[pinned].name in (part.name for part in team.parts)

    def taken(self, device: int, block: int, option: BlockOption) -> tuple[tuple[int, int], ...]:
        """Bytes of memory and storage that the block takes of each of the device's holders."""
        team = self.devices[device].team
        if team is None:
            memory = option.executed_bytes + self.kv_bytes[block]
            return ((memory, self.stored_bytes[block][option.bits]),)
        parts = (part.option(block, option.bits) for part in team.parts)
        return tuple((part.memory_bytes, part.storage_bytes) for part in parts)

    def weight_error(self, block: int, bits: int) -> float | None:
        """Normalised weight error of a block; None if it was not measured."""
        return self.weight_errors[block].get(bits)

    def within_error(self, block: int, bits: int) -> bool:
        """True if the error bound allows ``block`` at ``bits``. Unknown errors are too large."""
        bound = self.max_weight_error[block]
        return bound == math.inf or self.weight_errors[block].get(bits, math.inf) <= bound

    def to_dict(self) -> dict[str, Any]:
        """The problem as plain values, as JSON has them. ``from_dict`` is the inverse."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    @staticmethod
    def from_dict(values: object) -> PlanningProblem:
        """The problem of plain values, as ``to_dict`` makes them; defaults may be left out.

        Raises ValueError naming a key that is missing, unknown or wrong.
        """
        problem: PlanningProblem = from_plain(PlanningProblem, values, "problem")
        problem._check_shape()
        return problem

    def _check_shape(self) -> None:
        """Raise ValueError if a table or an index does not fit the model and the devices."""
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
            ("teams", [index for team in self.teams for index in team], devices),
        ):
            for index in indices:
                if index not in known:
                    raise ValueError(f"problem.{name}: there is no {index}")
        if self.pass_tokens < 1:
            raise ValueError(f"problem.pass_tokens: expected at least 1, not {self.pass_tokens}")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"problem.chunk_tokens: expected at least 1, not {self.chunk_tokens}")
