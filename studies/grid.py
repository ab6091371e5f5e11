"""A grid of planning problems, made of one problem and lists of values, and what plans it gives."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from evaluation.bootstrap import Estimate
from evaluation.weights import mean_bits
from planning.plan import InfeasiblePlan, Plan, PlanError
from planning.planner import solve
from planning.problem import Objective, ObjectiveKind, PlanningProblem
from planning.time_limit import now_s
from studies.bench import widths_text

Axis = Literal["objective", "bits", "memory", "links", "max_weight_error", "quality_budget"]
AXES: tuple[Axis, ...] = (
    "objective", "bits", "memory", "links", "max_weight_error", "quality_budget",
)  # fmt: skip
"""The axes in the order of a grid. The last one varies fastest."""

MEASURED = ("loss", "perplexity", "kl", "exact_match", "f1", "bleu")
"""The figures of an evaluation that a table of plans has."""


@dataclass(frozen=True, slots=True)
class Amount:
    """An amount for every device or link: an absolute one, or so many times its own."""

    value: float
    is_factor: bool = False

    def of(self, own: float) -> float:
        return own * self.value if self.is_factor else self.value


OWN = Amount(1.0, is_factor=True)
"""Each device's or link's own amount."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The values of one problem of the grid.

    bits: the widths that a block may have.
    memory: bytes of every device. links: bytes per second of every link.
    max_weight_error: the paper's delta. quality_budget: nats per token. None: no bound.
    """

    objective: ObjectiveKind
    bits: tuple[int, ...]
    memory: Amount
    links: Amount
    max_weight_error: float | None
    quality_budget: float | None

    def text(self, axis: Axis) -> str:
        """Return the value on an axis as a user writes it."""
        value = getattr(self, axis)
        if axis == "bits":
            return ",".join(map(str, value))
        if isinstance(value, Amount):
            unit = {"memory": 2.0**-20, "links": 8e-6}[axis]
            return f"x{value.value:g}" if value.is_factor else f"{value.value * unit:g}"
        return str(value) if axis == "objective" else "none" if value is None else f"{value:g}"

    def number(self, axis: Axis) -> float | None:
        """Return the value on an axis as a number. None: it has none, as "no bound" has not."""
        value = getattr(self, axis)
        if isinstance(value, Amount):
            unit = {"memory": 2.0**-20, "links": 8e-6}[axis]
            return value.value if value.is_factor else value.value * unit
        return value if isinstance(value, float) else None

    @property
    def key(self) -> str:
        """The name of the cell's results."""
        return " ".join(f"{axis}={self.text(axis)}" for axis in AXES)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The plan of one cell, as plain values. All figures are predictions.

    status: "optimal", "within gap", "infeasible", or "none" if no plan was found in time.
    value: of the objective, in seconds; joules for energy.
    bits: the width of each block.
    """

    status: str
    why: str = ""
    value: float | None = None
    gap: float | None = None
    decode_ms: float | None = None
    first_token_s: float | None = None
    stages: int | None = None
    devices: tuple[str, ...] = ()
    bits: tuple[int, ...] = ()
    bits_per_weight: float | None = None
    kl: float | None = None
    weight_error: float | None = None
    solver: str = ""
    solve_s: float = 0.0

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Outcome:
        """Make it from the values that ``asdict`` gave. Raises TypeError for other ones."""
        sequences = {"devices": tuple(values["devices"]), "bits": tuple(values["bits"])}
        return Outcome(**{**values, **sequences})


def cells_of(values: Mapping[Axis, Sequence[Any]]) -> list[Cell]:
    """Return the cells of a grid with these values on every axis."""
    return [
        Cell(**dict(zip(AXES, chosen, strict=True)))
        for chosen in itertools.product(*(values[axis] for axis in AXES))
    ]


def problem_of(base: PlanningProblem, cell: Cell) -> PlanningProblem:
    """Return the problem of a cell. Raises ValueError if a bound lacks what it bounds.

    Hops may have the formats of ``base``. Its own bounds are replaced.
    """
    if cell.quality_budget is not None and not base.sensitivities:
        raise ValueError("a quality budget needs sensitivities")
    if cell.max_weight_error is not None and not all(base.weight_errors):
        raise ValueError("a bound on weight errors needs the model's weights")
    bound = math.inf if cell.max_weight_error is None else cell.max_weight_error
    return replace(
        base,
        bits=tuple(sorted(cell.bits)),
        devices=tuple(
            replace(device, memory_bytes=int(cell.memory.of(device.memory_bytes)))
            for device in base.devices
        ),
        links={
            pair: replace(link, bytes_per_s=cell.links.of(link.bytes_per_s))
            for pair, link in base.links.items()
        },
        max_weight_error=(bound,) * base.spec.block_count,
        quality_budget=cell.quality_budget,
        objective=_objective(base.objective, cell.objective),
    )


def outcome_of(problem: PlanningProblem, time_limit_s: float) -> Outcome:
    """Plan, and return what came of it."""
    started_s = now_s()
    try:
        plan = solve(problem, time_limit_s=time_limit_s)
    except InfeasiblePlan as error:
        return Outcome("infeasible", str(error), solve_s=now_s() - started_s)
    except PlanError as error:
        return Outcome("none", str(error), solve_s=now_s() - started_s)
    return described(problem, plan)


def described(problem: PlanningProblem, plan: Plan) -> Outcome:
    """Return a plan as an outcome."""
    bits = tuple(placement.bits for placement in plan.placements)
    members = (one.device for stage in plan.stages for one in stage.members)
    devices = dict.fromkeys([*(stage.device for stage in plan.stages), *members])
    return Outcome(
        status="optimal" if plan.proven_optimal else "within gap",
        value=plan.value,
        gap=plan.gap,
        decode_ms=1e3 * plan.decode_s,
        first_token_s=plan.first_token_s(plan.objective.prompt_tokens),
        stages=len(plan.stages),
        devices=tuple(devices),
        bits=bits,
        bits_per_weight=mean_bits(problem.spec, bits),
        kl=plan.total_sensitivity,
        weight_error=plan.worst_weight_error,
        solver=plan.proof.solver,
        solve_s=plan.proof.solve_s,
    )


def sweep_csv(
    cells: Sequence[Cell],
    outcomes: Mapping[Cell, Outcome],
    figures: Mapping[Cell, Mapping[str, Estimate]],
) -> str:
    """Return one line for each cell that has an outcome. Memory is in MiB, links in Mbit/s."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measured = [f"{name}{end}" for name in MEASURED for end in ("", "_low", "_high")]
    writer.writerow([*AXES, *_COLUMNS, *(f"measured_{name}" for name in measured), "why"])
    for cell in cells:
        if cell not in outcomes:
            continue
        one, found = outcomes[cell], figures.get(cell, {})
        plain = [
            one.status, one.value, one.gap, one.decode_ms, one.first_token_s, one.stages,
            " ".join(one.devices), widths_text(one.bits), one.bits_per_weight, one.kl,
            one.weight_error, one.solver, f"{one.solve_s:.3f}",
        ]  # fmt: skip
        row: list[object] = [cell.text(axis) for axis in AXES]
        row += ["" if value is None else value for value in plain]
        for name in MEASURED:
            known = found.get(name)
            row += ["", "", ""] if known is None else [known.value, known.low, known.high]
        writer.writerow([*row, one.why])
    return text.getvalue()


_COLUMNS = (
    "status", "predicted_objective", "proved_gap", "predicted_ms_per_token",
    "predicted_first_token_s", "stages", "devices", "bits_of_blocks", "bits_per_weight",
    "predicted_kl", "weight_error", "solver", "solve_s",
)  # fmt: skip


def _objective(base: Objective, kind: ObjectiveKind) -> Objective:
    weight = 0.0 if kind == "energy" else base.migration_weight
    return replace(base, kind=kind, migration_weight=weight)
