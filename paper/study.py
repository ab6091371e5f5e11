"""Plans many times: under random link speeds, and for the experiments of the DILEMMA paper.

``simulate`` shows how a plan's time varies with the speeds of links. ``study_dilemma`` computes the
bits of the paper's Table 1 and its figures 3, 5 and 6. They come from the paper's cost model and
synthetic weights, and nothing in them was measured on a device.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.spec import LayerSpec, ModelSpec
from paper import dilemma
from paper.study_log import StudyLog
from planning.insight.picture import Curve, curves_svg
from planning.insight.team import reassessed
from planning.plan import Plan, PlanError
from planning.planner import solve
from planning.problem import PlanningProblem

SPEED_FACTOR = 10.0
"""Each link's speed is drawn between its own and this many times its own (Source: DILEMMA)."""

Solve = Callable[[PlanningProblem, float], Plan]
OnRun = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Spread:
    """The distribution of values over the runs."""

    runs: int
    low: float
    tenth: float
    median: float
    ninetieth: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Make it from at least one value. Percentiles are interpolated."""
        ordered = sorted(values)
        if len(ordered) == 1:
            return Spread(1, *ordered * 5)
        tenths = statistics.quantiles(ordered, n=10, method="inclusive")
        return Spread(
            len(ordered),
            ordered[0],
            tenths[0],
            statistics.median(ordered),
            tenths[8],
            ordered[-1],
        )


@dataclass(frozen=True, slots=True)
class Simulation:
    """The predicted objective in seconds under drawn link speeds.

    kept: of the given plan in each draw.
    replanned: of the best plan of each draw, or None if every search ran out of time.
    distinct: the number of different best plans.
    unsolved: the number of draws whose search ran out of time.
    unproven: the number of draws whose plan may not be the best.
    """

    kept: Spread
    replanned: Spread | None
    distinct: int
    unsolved: int
    unproven: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def simulate(
    plan: Plan,
    problem: PlanningProblem,
    runs: int,
    *,
    seed: int = 0,
    solve_limit_s: float = 5.0,
    solve_again: Solve | None = None,
    on_run: OnRun = lambda done, total: None,
) -> Simulation:
    """Draw each link's speed uniformly in [its own, SPEED_FACTOR times its own], ``runs`` times.

    Both directions of a pair get the same factor, and round trips stay. Equal seeds draw equally.
    """
    again = solve_again or (lambda drawn, limit_s: solve(drawn, time_limit_s=limit_s))
    random_source = random.Random(seed)  # noqa: S311 - a simulation
    kept: list[float] = []
    best: list[float] = []
    placements = set()
    unproven = 0
    for run in range(runs):
        on_run(run, runs)
        drawn = _drawn(problem, random_source)
        same = reassessed(plan, drawn).value
        kept.append(same)
        try:
            found = again(drawn, solve_limit_s)
        except PlanError:
            continue
        unproven += not found.proven_optimal
        best.append(min(found.value, same))
        placements.add((found.placements, tuple(stage.devices for stage in found.stages)))
    on_run(runs, runs)
    return Simulation(
        Spread.of(kept),
        Spread.of(best) if best else None,
        len(placements),
        runs - len(best),
        unproven,
    )


def _drawn(problem: PlanningProblem, random_source: random.Random) -> PlanningProblem:
    factors = {
        pair: random_source.uniform(1.0, SPEED_FACTOR)
        for pair in sorted({(min(pair), max(pair)) for pair in problem.links})
    }
    links = {
        pair: replace(link, bytes_per_s=link.bytes_per_s * factors[min(pair), max(pair)])
        for pair, link in problem.links.items()
    }
    return replace(problem, links=links)


# ---- the paper's experiments -------------------------------------------------------------------

DELTAS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
PAPER_BITS = dict(zip(DELTAS, (12, 10, 8, 8, 6, 4, 4, 4), strict=True))
"""The quantization ratios of Table 1 times the original's 32 bits."""
STUDY_BITS = tuple(range(4, 33, 2))
"""From 4 bits on in steps of 2 (Source: DILEMMA, "Environment Setup")."""
MIN_LINK_BIT_PER_S = (1e6, 1e7, 1e8, 1e9, 1e10)
CLOCKS_HZ = (0.5e9, 1e9, 2e9, 4e9)

LARGEST_WEIGHT = (0.21, 0.32)
"""The range of max|w| of a synthetic layer.

Truncation with step R / 2^(b-1) gives Table 1's bits only for 0.2048 < R <= 0.3277. At 1e-4 six
bits must fail, and at 1e-5 eight bits must suffice."""
_SYNTHETIC_WEIGHTS = 1 << 14
# The paper does not give these. Assumed are three servers, each with room for 2/5 of the model.
_SERVER_CLOCKS_HZ = (1.2e9, 1.8e9, 2.4e9)
_STORAGE_SHARE = 0.4
_STUDY_DELTA = 1e-3
_STUDY_LINK_BIT_PER_S = 1e7
SOLVE_LIMIT_S = 60.0

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class TableRow:
    """The results for one delta: the bits of all layers, their ratio, and the program's T."""

    delta: float
    bits: tuple[int, ...]
    """The different widths among the layers."""
    paper_bits: int
    quantization_ratio: float
    objective_s: float
    proven: bool


@dataclass(frozen=True, slots=True)
class Sweep:
    """The objective in seconds over the runs, at each value of one varied quantity."""

    values: tuple[float, ...]
    spreads: tuple[Spread, ...]
    unproven: int


@dataclass(frozen=True, slots=True)
class OddityRow:
    """The paper's program on a small case with one repair left out.

    honest_s: the time with every transfer charged, or None if the choices make no model.
    bits: the bits of each layer.
    servers: the number of used servers.
    """

    left_out: str
    verdict: str
    objective_s: float | None = None
    honest_s: float | None = None
    bits: tuple[int, ...] = ()
    servers: int = 0


@dataclass(frozen=True, slots=True)
class DilemmaStudy:
    """The results of ``shoal study dilemma``. ``solver`` computed the table."""

    seed: int
    runs: int
    solver: str
    table: tuple[TableRow, ...]
    oddities: tuple[OddityRow, ...]
    links: Sweep
    """The sweep over the least link speed in bit/s."""
    clocks: Sweep
    """The sweep over the clock of every server in Hz."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def figures(self) -> dict[str, str]:
        """The paper's figures as SVG text, by file name."""
        note = f"paper's cost model, assumed servers, seed {self.seed}: computed, not measured"
        drawn = f"{note}; median and 10-90 % of {self.runs} runs"
        return {
            "figure-3-delta.svg": curves_svg(
                [Curve("objective", tuple((row.delta, row.objective_s) for row in self.table))],
                title="Objective against delta (2e relaxed)",
                note=note,
                x_label="delta",
                y_label="T, s",
            ),
            **monte_carlo_figures(self.links, self.clocks, drawn),
        }


def monte_carlo_figures(links: Sweep, clocks: Sweep, note: str) -> dict[str, str]:
    """Figures 5 and 6 as SVG text, by file name."""
    return {
        "figure-5-links.svg": curves_svg(
            [_curve(links, 1e6)],
            title="Objective against the slowest link",
            note=note,
            x_label="least link speed, Mbit/s",
            y_label="T, s",
            from_zero=False,
        ),
        "figure-6-clock.svg": curves_svg(
            [_curve(clocks, 1e9)],
            title="Objective against the servers' clock",
            note=note,
            x_label="clock (CCS), GHz",
            y_label="T, s",
        ),
    }


def study_dilemma(
    *,
    runs: int = 100,
    seed: int = 0,
    layers: int = 24,
    on_step: OnStep = lambda what, done, total: None,
    log: Path | None = None,
) -> DilemmaStudy:
    """Compute Table 1 and figures 3, 5 and 6 on ``layers`` layers of OPT-350m's shape.

    log: a file that gets each draw's result at once. Results of the same study in it are not
    computed again, even if it had fewer runs.
    Raises PlanError if a program is not solved within a minute, OSError if the file cannot be
    written.
    """
    what = {"name": "dilemma", "seed": seed, "layers": layers, "version": 1}
    with StudyLog(log, what) as kept:
        return _study(runs, seed, layers, on_step, kept)


def _study(runs: int, seed: int, layers: int, on_step: OnStep, kept: StudyLog) -> DilemmaStudy:
    spec = opt_350m(layers)
    errors = synthetic_errors(layers, seed)
    rows = []
    solver = ""
    for done, delta in enumerate(DELTAS):
        on_step("Table 1", done, len(DELTAS))
        relaxed = relaxed_instance(spec, errors, STUDY_BITS, delta=delta)
        solution = dilemma.solve(relaxed, dilemma.ALL_REPAIRS, time_limit_s=SOLVE_LIMIT_S)
        solver = solution.solver
        rows.append(
            TableRow(
                delta=delta,
                bits=tuple(sorted({choice.bits for choice in solution.choices})),
                paper_bits=PAPER_BITS[delta],
                quantization_ratio=dilemma.quantization_ratio(relaxed, solution.choices),
                objective_s=solution.objective_s,
                proven=solution.proven_optimal,
            )
        )
    on_step("Table 1", len(DELTAS), len(DELTAS))
    oddities = dilemma_oddities(seed, on_step)
    links, clocks = monte_carlo(spec, errors, runs, seed, on_step, kept)
    return DilemmaStudy(seed, runs, solver, tuple(rows), oddities, links, clocks)


def relaxed_instance(
    spec: ModelSpec,
    errors: Sequence[Mapping[int, float]],
    bits: Sequence[int],
    *,
    delta: float = math.inf,
    losses: Sequence[Mapping[int, float]] = (),
    budget: float = math.inf,
) -> dilemma.Instance:
    """The study's servers with storage without limit, as for Table 1 and figure 3."""
    return dilemma.ccs_instance(
        spec,
        clocks_hz=_SERVER_CLOCKS_HZ,
        links_bit_per_s=_links(_STUDY_LINK_BIT_PER_S),
        storage_bytes=(math.inf,) * len(_SERVER_CLOCKS_HZ),
        bits=bits,
        errors=errors,
        delta=delta,
        losses=losses,
        budget=budget,
    )


def monte_carlo(
    spec: ModelSpec,
    errors: Sequence[Mapping[int, float]],
    runs: int,
    seed: int,
    on_step: OnStep,
    kept: StudyLog,
) -> tuple[Sweep, Sweep]:
    """T over ``runs`` draws of link speeds: by the least link speed, and by the servers' clock.

    Raises PlanError if a program is not solved within a minute.
    """
    random_source = random.Random(seed)  # noqa: S311 - a simulation
    factors = [
        {
            pair: random_source.uniform(1.0, SPEED_FACTOR)
            for pair in itertools.combinations(range(len(_SERVER_CLOCKS_HZ)), 2)
        }
        for _ in range(runs)
    ]
    links = _sweep(
        "figure 5",
        MIN_LINK_BIT_PER_S,
        factors,
        lambda least, drawn: _instance(
            spec, errors, _STUDY_DELTA, _SERVER_CLOCKS_HZ, _links(least, drawn)
        ),
        on_step,
        kept,
    )
    clocks = _sweep(
        "figure 6",
        CLOCKS_HZ,
        factors,
        lambda clock, drawn: _instance(
            spec,
            errors,
            _STUDY_DELTA,
            (clock,) * len(_SERVER_CLOCKS_HZ),
            _links(_STUDY_LINK_BIT_PER_S, drawn),
        ),
        on_step,
        kept,
    )
    return links, clocks


def dilemma_oddities(
    seed: int = 0, on_step: OnStep = lambda what, done, total: None
) -> tuple[OddityRow, ...]:
    """Solve a small case with each repair left out.

    It has four layers on four servers that hold two each, links of 1 Mbit/s, and delta 1e-3.
    """
    clocks_hz = (1.2e9, 1.5e9, 1.8e9, 2.1e9)
    instance = dilemma.ccs_instance(
        opt_350m(4),
        clocks_hz=clocks_hz,
        links_bit_per_s={pair: 1e6 for pair in itertools.permutations(range(4), 2)},
        storage_bytes=(float("inf"),) * 4,
        bits=STUDY_BITS,
        errors=synthetic_errors(4, seed),
        delta=_STUDY_DELTA,
    )
    layer_bytes = instance.stored_bytes[0][PAPER_BITS[_STUDY_DELTA]]
    instance = replace(instance, storage_bytes=(2.7 * layer_bytes,) * 4)
    cases = {"nothing": dilemma.ALL_REPAIRS}
    names = ("2c", "2d", "2e", "2f", "cm")
    for name in names:
        cases[name] = dilemma.Repairs.of(other for other in names if other != name)
    cases["all five"] = dilemma.Repairs()
    rows = []
    for done, (left_out, repairs) in enumerate(cases.items()):
        on_step("oddities", done, len(cases))
        try:
            found = dilemma.solve(instance, repairs, time_limit_s=SOLVE_LIMIT_S)
        except PlanError as error:
            rows.append(OddityRow(left_out, str(error).removeprefix("the paper's program has ")))
            continue
        rows.append(
            OddityRow(
                left_out,
                "optimal" if found.proven_optimal else "not proven",
                found.objective_s,
                found.honest_s,
                tuple(choice.bits for choice in found.choices),
                len({choice.device for choice in found.choices}),
            )
        )
    on_step("oddities", len(cases), len(cases))
    return tuple(rows)


def opt_350m(layers: int = 24) -> ModelSpec:
    """The shape of the paper's model, with ``layers`` of its layers."""
    layer = LayerSpec(
        hidden=1024,
        heads=16,
        kv_heads=16,
        head_dim=64,
        ffn=4096,
        norm="layernorm",
        norm_eps=1e-5,
        norm_position="post",
        activation="relu",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )
    return ModelSpec(
        vocab=50272,
        hidden=1024,
        embed_dim=512,
        max_context=2048,
        layers=(layer,) * layers,
        learned_positions=2050,
        position_offset=2,
        final_norm=False,
        tied_head=True,
        bos_token=2,
        eos_tokens=(2,),
    )


def synthetic_errors(layers: int, seed: int) -> tuple[dict[int, float], ...]:
    """The max|w - w_b| / 2^b of normal weights. Their largest is drawn from LARGEST_WEIGHT."""
    source = np.random.default_rng(seed)
    errors = []
    for _ in range(layers):
        weights = source.standard_normal(_SYNTHETIC_WEIGHTS)
        weights *= source.uniform(*LARGEST_WEIGHT) / np.abs(weights).max()
        errors.append({b: truncation_error(weights, b) / 2.0**b for b in STUDY_BITS})
    return tuple(errors)


def truncation_error(weights: npt.NDArray[np.float64], bits: int) -> float:
    """The largest |w - w_b| of truncation towards zero with step max|w| / 2^(bits - 1)."""
    step = float(np.abs(weights).max()) / 2.0 ** (bits - 1)
    codes = np.clip(np.trunc(weights / step), -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
    return float(np.abs(weights - codes * step).max())


def _instance(
    spec: ModelSpec,
    errors: Sequence[Mapping[int, float]],
    delta: float,
    clocks_hz: Sequence[float],
    links_bit_per_s: Mapping[tuple[int, int], float],
) -> dilemma.Instance:
    """Make an instance of servers that together hold 6/5 of the model at the least allowed bits."""
    instance = dilemma.ccs_instance(
        spec,
        clocks_hz=clocks_hz,
        links_bit_per_s=links_bit_per_s,
        storage_bytes=(float("inf"),) * len(clocks_hz),
        bits=STUDY_BITS,
        errors=errors,
        delta=delta,
    )
    least = [
        min(size for b, size in sizes.items() if instance.allowed(0, layer, b))
        for layer, sizes in enumerate(instance.stored_bytes)
    ]
    # A server has room for its part of the layers, however few there are.
    part = -(-len(least) // len(clocks_hz)) * max(least)
    storage = max(_STORAGE_SHARE * sum(least), part)
    return replace(instance, storage_bytes=(storage,) * len(clocks_hz))


def _links(
    least_bit_per_s: float, factors: Mapping[tuple[int, int], float] | None = None
) -> dict[tuple[int, int], float]:
    links = {}
    for i, j in itertools.combinations(range(len(_SERVER_CLOCKS_HZ)), 2):
        speed = least_bit_per_s * (factors[i, j] if factors else 1.0)
        links[i, j] = links[j, i] = speed
    return links


def _sweep(
    what: str,
    values: Sequence[float],
    factors: Sequence[Mapping[tuple[int, int], float]],
    instance: Callable[[float, Mapping[tuple[int, int], float]], dilemma.Instance],
    on_step: OnStep,
    kept: StudyLog,
) -> Sweep:
    """Solve for each value and each run. Every value gets the same draws."""

    def solved(value: float, drawn: Mapping[tuple[int, int], float]) -> list[Any]:
        # With all repairs this keeps the optimum. It is many times faster than with 15 widths.
        few = dilemma.without_dominated(instance(value, drawn))
        solution = dilemma.solve_by_stages(few) or dilemma.solve(
            few, dilemma.ALL_REPAIRS, time_limit_s=SOLVE_LIMIT_S
        )
        return [solution.objective_s, solution.proven_optimal]

    spreads = []
    unproven = 0
    for index, value in enumerate(values):
        objectives = []
        for run, drawn in enumerate(factors):
            on_step(what, index * len(factors) + run, len(values) * len(factors))
            objective_s, proven = kept.result(
                f"{what}, {value:g}, draw {run}", functools.partial(solved, value, drawn)
            )
            unproven += not proven
            objectives.append(objective_s)
        spreads.append(Spread.of(objectives))
    on_step(what, len(values) * len(factors), len(values) * len(factors))
    return Sweep(tuple(values), tuple(spreads), unproven)


def _curve(sweep: Sweep, unit: float) -> Curve:
    points = zip(sweep.values, sweep.spreads, strict=True)
    return Curve(
        "median",
        tuple((value / unit, spread.median) for value, spread in points),
        tuple((spread.tenth, spread.ninetieth) for spread in sweep.spreads),
    )
