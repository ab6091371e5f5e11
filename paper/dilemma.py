"""The DILEMMA paper's integer program as it is printed, with a switch to repair each oddity.

docs/dilemma.md explains the repairs, and shows results without them. Deployments are planned by
``planning.planner`` instead.

Source: Hosseinzadeh and Khamfroush, "DILEMMA: Joint LLM Quantization and Distributed LLM Inference
Over Edge Computing Systems", equations (1) to (7).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import pulp

from model import costs
from model.spec import QUANTIZED_TENSORS, ModelSpec
from planning.exact.solver import SolverError, SolverName, run
from planning.plan import PlanError
from planning.problem import PlanningProblem

ByWidth = Mapping[int, float]

# Solvers keep each row to about 1e-6 of its limit.
_TOLERANCE = 2e-6

_State = tuple[int, int, tuple[int, ...]]
_MOST_STATES = 20_000
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Repairs:
    """The repaired oddities of the program. All False is the program as the paper prints it.

    coverage: (2c) gives each layer one place, instead of each width one layer.
    sharing: (2d) lets a device host many layers, instead of one.
    storage: (2e) bounds all layers of a device together, instead of each alone.
    widths: (2f) charges a transfer between layers of different widths too.
    transfers: (1) charges each transfer with its own layer's output at its own width. As printed,
    a pair of devices is charged once, for the outputs of all layers.
    """

    coverage: bool = False
    sharing: bool = False
    storage: bool = False
    widths: bool = False
    transfers: bool = False

    @staticmethod
    def of(names: Iterable[str]) -> Repairs:
        """The repairs with these names: 2c, 2d, 2e, 2f and cm. Raises ValueError for others."""
        fields = {
            "2c": "coverage", "2d": "sharing", "2e": "storage", "2f": "widths", "cm": "transfers",
        }  # fmt: skip
        chosen = {}
        for name in names:
            if name not in fields:
                raise ValueError(f"{name!r} is no repair: known are {', '.join(fields)}")
            chosen[fields[name]] = True
        return Repairs(**chosen)


ALL_REPAIRS = Repairs(True, True, True, True, True)


@dataclass(frozen=True, slots=True)
class Instance:
    """The program's data. i and j are devices, l is a layer, b a width.

    compute_s: [i][l] maps b to cp_ilb. A missing width cannot run there.
    transfer_s: [i, j][l] maps b to cm. A missing pair has no link.
    stored_bytes: [l] maps b to the layer's size.
    storage_bytes: [i] is kappa_i.
    errors: [l] maps b to max|w - w_b| / 2^b.
    delta: the bound on errors. inf means no bound.
    losses: [l] maps b to a loss that adds up over layers. Empty: not known.
    budget: the bound on their sum, which the paper does not have. inf means no bound.
    """

    devices: tuple[str, ...]
    bits: tuple[int, ...]
    compute_s: tuple[tuple[ByWidth, ...], ...]
    transfer_s: Mapping[tuple[int, int], tuple[ByWidth, ...]]
    stored_bytes: tuple[Mapping[int, int], ...]
    storage_bytes: tuple[float, ...]
    errors: tuple[ByWidth, ...]
    delta: float = math.inf
    losses: tuple[ByWidth, ...] = ()
    budget: float = math.inf

    @property
    def layers(self) -> int:
        return len(self.stored_bytes)

    def allowed(self, i: int, layer: int, b: int) -> bool:
        """Whether (5)-(7), (2e) for this layer alone, and the device leave x_ilb free.

        For a binary this is equal to rows of the program, but solvers do not resolve a delta of
        1e-7.
        """
        return (
            b in self.compute_s[i][layer]
            and (self.delta == math.inf or self.errors[layer].get(b, math.inf) <= self.delta)
            and (self.budget == math.inf or self.loss(layer, b) <= self.budget)
            and self.stored_bytes[layer][b] <= self.storage_bytes[i]
        )

    def loss(self, layer: int, b: int) -> float:
        """The loss of a layer at a width. inf if it is not known."""
        return self.losses[layer].get(b, math.inf)


@dataclass(frozen=True, slots=True, order=True)
class Choice:
    """A variable x_ilb that is 1."""

    layer: int
    device: int
    bits: int


@dataclass(frozen=True, slots=True)
class Solution:
    """A solution of the program.

    objective_s: the program's T.
    honest_s: the time with every transfer between consecutive layers on different devices charged,
    at the layer's own width. None if the choices do not place each layer once.
    """

    choices: tuple[Choice, ...]
    objective_s: float
    honest_s: float | None
    bound_s: float
    solver: str

    @property
    def proven_optimal(self) -> bool:
        return self.objective_s - self.bound_s <= _TOLERANCE * max(abs(self.objective_s), 1e-9)


def solve(
    instance: Instance,
    repairs: Repairs = ALL_REPAIRS,
    *,
    time_limit_s: float = 60.0,
    solver: SolverName | None = None,
) -> Solution:
    """Minimise T. Raises PlanError if there is no solution, or none was found in time."""
    program = _Program(instance, repairs)
    try:
        outcome = run(program.program, time_limit_s=time_limit_s, solver=solver)
    except SolverError as error:
        raise PlanError(str(error)) from error
    if outcome.status == "infeasible":
        reason = why_infeasible(instance, repairs)
        raise PlanError(f"the paper's program has no solution{reason}")
    if not outcome.values:
        raise PlanError(f"no solution of the paper's program was found in {time_limit_s:g} s")
    chosen = tuple(
        sorted(
            Choice(layer, i, b)
            for (i, layer, b), variable in program.x.items()
            if round(outcome.values[variable.name]) == 1
        )
    )
    objective_s = charge(instance, repairs, chosen)
    check(instance, repairs, chosen)
    bound_s = objective_s if outcome.status == "optimal" else (outcome.bound or 0.0)
    return Solution(chosen, objective_s, _honest(instance, chosen), bound_s, outcome.solver)


def solve_by_stages(instance: Instance) -> Solution | None:
    """Solve the wholly repaired program by dynamic programming, or return None if it is too large.

    A state is the layer's device, its width, and the bytes stored on each device so far. Of equal
    states the cheapest goes on. Equal layers make few states. Then this takes milliseconds, and the
    integer program a second. It knows no budget of losses. Raises PlanError as ``solve``.
    """
    if instance.budget < math.inf:
        return None
    devices = range(len(instance.devices))
    empty = (0,) * len(devices)
    # Maps (device, width, bytes stored by device) to seconds and the choices so far.
    states: dict[_State, tuple[float, tuple[Choice, ...]]] = {}
    for layer in range(instance.layers):
        before = list(states.items()) if layer else [((-1, 0, empty), (0.0, ()))]
        states = {}
        for (device, width, stored), (old_s, made) in before:
            for i, b in itertools.product(devices, instance.bits):
                if not instance.allowed(i, layer, b):
                    continue
                cost_s = old_s + instance.compute_s[i][layer][b]
                if device not in (i, -1):
                    if (device, i) not in instance.transfer_s:
                        continue
                    cost_s += instance.transfer_s[device, i][layer - 1][width]
                kept = stored
                if instance.storage_bytes[i] < math.inf:
                    size = stored[i] + instance.stored_bytes[layer][b]
                    if size > instance.storage_bytes[i] * (1 + _ROUNDING):
                        continue
                    kept = (*stored[:i], size, *stored[i + 1 :])
                if (i, b, kept) not in states or cost_s < states[i, b, kept][0]:
                    states[i, b, kept] = cost_s, (*made, Choice(layer, i, b))
        if len(states) > _MOST_STATES:
            return None
    if not states:
        reason = why_infeasible(instance, ALL_REPAIRS)
        raise PlanError(f"the paper's program has no solution{reason}")
    _, chosen = min(states.values(), key=lambda state: state[0])
    check(instance, ALL_REPAIRS, chosen)
    objective_s = charge(instance, ALL_REPAIRS, chosen)
    honest_s = _honest(instance, chosen)
    return Solution(chosen, objective_s, honest_s, objective_s, "dynamic programming")


def charge(instance: Instance, repairs: Repairs, choices: Sequence[Choice]) -> float:
    """T of the choices with the least y that (2f) allows. inf if a pair has no link."""
    total = [instance.compute_s[c.device][c.layer][c.bits] for c in choices]
    pairs = set()
    crossings = set()
    for a, b in itertools.permutations(choices, 2):
        follows = b.layer == a.layer + 1 and a.device != b.device
        if follows and (repairs.widths or a.bits == b.bits):
            pairs.add((a.device, b.device))
            crossings.add((a.layer, a.device, b.device, a.bits))
    if any(pair not in instance.transfer_s for pair in pairs):
        return math.inf
    if repairs.transfers:
        total += [instance.transfer_s[i, j][layer][b] for layer, i, j, b in crossings]
    else:
        total += [_pair_cost(instance, pair) for pair in pairs]
    return math.fsum(total)


def check(instance: Instance, repairs: Repairs, choices: Sequence[Choice]) -> None:
    """Check the choices against (2c) to (2e) and (5) to (7) without a solver. Raises PlanError."""
    for c in choices:
        if not instance.allowed(c.device, c.layer, c.bits):
            raise PlanError(f"{c} is not allowed")
    keys = [c.layer if repairs.coverage else c.bits for c in choices]
    expected = range(instance.layers) if repairs.coverage else instance.bits
    if sorted(keys) != sorted(expected):
        raise PlanError("the choice breaks (2c)")
    if not repairs.sharing and len({c.device for c in choices}) < len(choices):
        raise PlanError("the choice breaks (2d)")
    if repairs.storage:
        for i, limit in enumerate(instance.storage_bytes):
            used = sum(instance.stored_bytes[c.layer][c.bits] for c in choices if c.device == i)
            if used > limit * (1 + _TOLERANCE):
                raise PlanError(f"the choice stores {used} bytes on device {i}, which has {limit}")
    if instance.budget < math.inf:
        total = math.fsum(instance.loss(c.layer, c.bits) for c in choices)
        if total > instance.budget * (1 + _TOLERANCE):
            raise PlanError(f"the choice loses {total:g}, and the budget is {instance.budget:g}")
    if charge(instance, repairs, choices) == math.inf:
        raise PlanError("the choice uses a link that does not exist")


def why_infeasible(instance: Instance, repairs: Repairs) -> str:
    """The end of a sentence with a reason that is known without solving, maybe empty."""
    placed = instance.layers if repairs.coverage else len(instance.bits)
    if not repairs.sharing and len(instance.devices) < placed:
        return (
            f": (2d) gives each device one layer, and {placed} need as many devices, not"
            f" {len(instance.devices)}; repair 2d"
        )
    bound = "delta" if instance.budget == math.inf else "the budget"
    groups = (
        [
            (f"layer {layer} at no width", f"raise {bound}", layer, None)
            for layer in range(instance.layers)
        ]
        if repairs.coverage
        else [
            (f"{b} bits for no layer, and (2c) wants one", "repair 2c", None, b)
            for b in instance.bits
        ]
    )
    for what, advice, layer, b in groups:
        if not any(
            instance.allowed(i, k, width)
            for i in range(len(instance.devices))
            for k in range(instance.layers)
            for width in instance.bits
            if layer in (None, k) and b in (None, width)
        ):
            return f": delta, storage and devices allow {what}; {advice}"
    return ""


def without_dominated(instance: Instance) -> Instance:
    """The same instance without widths that a narrower one replaces at no cost.

    It keeps the optimum if (2c) and (2f) are repaired. Compute, storage and transfers of a layer
    then depend on its own width alone.
    """
    devices = range(len(instance.devices))

    def replaces(layer: int, small: int, large: int) -> bool:
        return (
            all(
                instance.allowed(i, layer, small)
                and instance.compute_s[i][layer][small] <= instance.compute_s[i][layer][large]
                for i in devices
                if instance.allowed(i, layer, large)
            )
            and instance.stored_bytes[layer][small] <= instance.stored_bytes[layer][large]
            and (
                instance.budget == math.inf
                or instance.loss(layer, small) <= instance.loss(layer, large)
            )
            and all(way[layer][small] <= way[layer][large] for way in instance.transfer_s.values())
        )

    kept = [
        {b for b in instance.bits if not any(replaces(layer, a, b) for a in instance.bits if a < b)}
        for layer in range(instance.layers)
    ]
    return replace(
        instance,
        compute_s=tuple(
            tuple({b: s for b, s in row.items() if b in kept[k]} for k, row in enumerate(rows))
            for rows in instance.compute_s
        ),
    )


# ---- costs -------------------------------------------------------------------------------------


def ccs_instance(
    spec: ModelSpec,
    *,
    clocks_hz: Sequence[float],
    links_bit_per_s: Mapping[tuple[int, int], float],
    storage_bytes: Sequence[float],
    bits: Sequence[int],
    errors: Sequence[ByWidth],
    delta: float = math.inf,
    losses: Sequence[ByWidth] = (),
    budget: float = math.inf,
    tokens: int = 128,
    batch: int = 128,
    original_bits: int = 32,
    outputs_in_compute: bool = False,
) -> Instance:
    """Make an instance with the paper's costs, for the decoder layers only.

    (3) is cp = n FLOPS_l / CCS_i (b p_l / original bits), and (4) is cm = n p_l b / Omega_ij.
    A layer has p_l outputs, batch times width.

    outputs_in_compute: keep p_l in (3) as printed, although cp is then a time times a count.
    """
    blocks = range(1, spec.head_block)
    outputs = batch * spec.hidden
    flops = [batch * costs.block_flops(spec, block, tokens) for block in blocks]
    weights = [
        sum(
            prod(shape)
            for name, shape in spec.block_tensors(block).items()
            if name in QUANTIZED_TENSORS
        )
        for block in blocks
    ]
    factor = outputs if outputs_in_compute else 1
    return Instance(
        devices=tuple(f"server {i + 1}" for i in range(len(clocks_hz))),
        bits=tuple(sorted(bits)),
        compute_s=tuple(
            tuple(
                {b: tokens * work / clock * b * factor / original_bits for b in bits}
                for work in flops
            )
            for clock in clocks_hz
        ),
        transfer_s={
            pair: ({b: tokens * outputs * b / speed for b in bits},) * len(blocks)
            for pair, speed in links_bit_per_s.items()
        },
        stored_bytes=tuple({b: -(-count * b // 8) for b in bits} for count in weights),
        storage_bytes=tuple(storage_bytes),
        errors=tuple(errors),
        delta=delta,
        losses=tuple(losses),
        budget=budget,
    )


def measured_instance(problem: PlanningProblem) -> Instance:
    """Make an instance with the costs of a planning problem. Its layers are the blocks.

    The paper has no memory, KV cache, contiguity or token return, so these are left out. It has one
    error bound, so the least bound of all blocks is taken.
    """
    devices = range(len(problem.devices))
    blocks = range(problem.spec.block_count)
    hop_bits = min(form.bits for form in problem.hop_formats)
    return Instance(
        devices=tuple(device.name for device in problem.devices),
        bits=problem.bits,
        compute_s=tuple(
            tuple(
                {o.bits: o.decode_s for o in device.options[block] if o.bits in problem.bits}
                for block in blocks
            )
            for device in problem.devices
        ),
        transfer_s={
            (i, j): (dict.fromkeys(problem.bits, problem.hop_s(i, j, hop_bits)),) * len(blocks)
            for i, j in itertools.permutations(devices, 2)
            if problem.hop_s(i, j, hop_bits) < math.inf
        },
        stored_bytes=tuple(
            {b: problem.stored_bytes[block][b] for b in problem.bits} for block in blocks
        ),
        storage_bytes=tuple(float(device.storage_bytes) for device in problem.devices),
        errors=problem.weight_errors,
        delta=min(problem.max_weight_error),
    )


def quantization_ratio(
    instance: Instance, choices: Sequence[Choice], original_bits: int = 32
) -> float:
    """The bits of all chosen layers together, as a share of the original's. From 0 to 1."""
    kept = sum(instance.stored_bytes[c.layer][c.bits] for c in choices)
    original = sum(instance.stored_bytes[c.layer][c.bits] * original_bits / c.bits for c in choices)
    return kept / original


def _honest(instance: Instance, choices: Sequence[Choice]) -> float | None:
    if sorted(c.layer for c in choices) != list(range(instance.layers)):
        return None
    honest = charge(instance, ALL_REPAIRS, choices)
    return None if honest == math.inf else honest


def _pair_cost(instance: Instance, pair: tuple[int, int]) -> float:
    """The sum over l of cm_ilj, which (1) multiplies with y_ij.

    cm_ilj has no width in the paper. The widest one is taken.
    """
    widest = max(instance.bits)
    return math.fsum(row[widest] for row in instance.transfer_s[pair])


# ---- the program -------------------------------------------------------------------------------


class _Program:
    """The program in PuLP, with its variables ``x[i, l, b]``."""

    def __init__(self, instance: Instance, repairs: Repairs) -> None:
        self._instance = instance
        self._repairs = repairs
        self.program = pulp.LpProblem("dilemma", pulp.LpMinimize)
        self.x = {
            (i, layer, b): self.program.add_variable(f"x_{i}_{layer}_{b}", cat=pulp.LpBinary)
            for i in range(len(instance.devices))
            for layer in range(instance.layers)
            for b in instance.bits
            if instance.allowed(i, layer, b)
        }
        self._by_layer: dict[tuple[int, int], dict[int, pulp.LpVariable]] = defaultdict(dict)
        for (i, layer, b), variable in self.x.items():
            self._by_layer[i, layer][b] = variable
        self._y: dict[tuple[int, ...], pulp.LpVariable] = {}
        self._cost: list[tuple[pulp.LpVariable, float]] = [
            (variable, instance.compute_s[i][layer][b])
            for (i, layer, b), variable in self.x.items()
        ]
        self._add_coverage()
        self._add_sharing()
        self._add_storage()
        self._add_budget()
        self._add_transfers()
        self.program.setObjective(pulp.LpAffineExpression(self._cost))

    def _sum(self, **fixed: int) -> pulp.LpAffineExpression:
        """The sum of all x with the given device, layer or bits."""
        names = ("device", "layer", "bits")
        return pulp.lpSum(
            variable
            for key, variable in self.x.items()
            if all(dict(zip(names, key, strict=True))[name] == fixed[name] for name in fixed)
        )

    def _add_coverage(self) -> None:
        if self._repairs.coverage:
            for layer in range(self._instance.layers):
                self.program += self._sum(layer=layer) == 1
        else:
            # As printed, "for all l" has no l to range over. Each width gets one layer.
            for b in self._instance.bits:
                self.program += self._sum(bits=b) == 1

    def _add_sharing(self) -> None:
        if not self._repairs.sharing:
            # It is printed with a sum over i and "for all i". The text says one layer per server.
            for i in range(len(self._instance.devices)):
                self.program += self._sum(device=i) <= 1

    def _add_storage(self) -> None:
        if not self._repairs.storage:
            return  # ``Instance.allowed`` is (2e) as printed.
        for i, limit in enumerate(self._instance.storage_bytes):
            if limit < math.inf:
                self.program += (
                    pulp.lpSum(
                        variable * (self._instance.stored_bytes[layer][b] / limit)
                        for (device, layer, b), variable in self.x.items()
                        if device == i
                    )
                    <= 1
                )

    def _add_budget(self) -> None:
        budget = self._instance.budget
        if 0 < budget < math.inf:  # With 0, ``Instance.allowed`` leaves nothing to add up.
            terms = [
                variable * (self._instance.loss(layer, b) / budget)
                for (_, layer, b), variable in self.x.items()
            ]
            self.program += pulp.lpSum(terms) <= 1

    def _add_transfers(self) -> None:
        for i, j in itertools.permutations(range(len(self._instance.devices)), 2):
            for layer in range(self._instance.layers - 1):
                here = self._by_layer[i, layer]
                after = self._by_layer[j, layer + 1]
                for b, variable in here.items():
                    for follower in self._followers(b, after):
                        row = variable + follower - 1
                        if (i, j) in self._instance.transfer_s:
                            row -= self._transfer(i, j, layer, b)
                        self.program += row <= 0

        if self._repairs.coverage and self._repairs.widths and self._repairs.transfers:
            self._add_departures()

    def _add_departures(self) -> None:
        """Add rows that exclude no solution, but prove the optimum sooner. The paper lacks them.

        If layer l is on i, then l + 1 is on i too, or a transfer leaves i. Backwards likewise.
        """
        leaving: dict[tuple[int, int], list[pulp.LpVariable]] = defaultdict(list)
        arriving: dict[tuple[int, int], list[pulp.LpVariable]] = defaultdict(list)
        for (i, j, layer, _), variable in self._y.items():
            leaving[i, layer].append(variable)
            arriving[j, layer].append(variable)
        for i in range(len(self._instance.devices)):
            for layer in range(self._instance.layers - 1):
                here = pulp.lpSum(self._by_layer[i, layer].values())
                after = pulp.lpSum(self._by_layer[i, layer + 1].values())
                self.program += here - after - pulp.lpSum(leaving[i, layer]) <= 0
                self.program += after - here - pulp.lpSum(arriving[i, layer]) <= 0

    def _followers(self, b: int, after: Mapping[int, pulp.LpVariable]) -> list[pulp.LpVariable]:
        """The terms that (2f) adds to x_ilb: x_j(l+1)b as printed, or the next layer's widths."""
        if not self._repairs.widths:
            return [after[b]] if b in after else []
        if self._repairs.coverage:
            # At most one of them is 1. So one row is enough, and bounds better.
            return [pulp.lpSum(after.values())] if after else []
        return list(after.values())

    def _transfer(self, i: int, j: int, layer: int, b: int) -> pulp.LpVariable:
        """The variable y_ij as printed, or y_lijb. The first call makes it, with its cost."""
        key = (i, j, layer, b) if self._repairs.transfers else (i, j)
        if key not in self._y:
            name = "y_" + "_".join(map(str, key))
            self._y[key] = self.program.add_variable(name, cat=pulp.LpBinary)
            cost_s = (
                self._instance.transfer_s[i, j][layer][b]
                if self._repairs.transfers
                else _pair_cost(self._instance, (i, j))
            )
            self._cost.append((self._y[key], cost_s))
        return self._y[key]
