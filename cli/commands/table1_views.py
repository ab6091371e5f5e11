"""Writes and shows what ``shoal study table1`` found: tables, figures and JSON."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape

from cli.commands.study_views import show_sweeps
from cli.render import Screen, titled_table
from model.durable import replace_text

if TYPE_CHECKING:
    from cli.commands.table1 import Found
    from evaluation.bootstrap import Estimate
    from studies.plans import PlanSet
    from studies.rounding import Rounding
    from studies.table1 import Row

_BINS = 80
_BY = {"delta": "delta", "kl_sum": "sum of KL", "bits": "fewer bits"}
_DIGITS = {"perplexity": 6}


def write_table(options: argparse.Namespace, found: Found) -> None:
    """Write the table as far as it is measured."""
    from studies.table1 import table_csv

    replace_text(options.out / "table1.csv", table_csv(found.rows, found.figures))


def write_plans(options: argparse.Namespace, found: Found) -> None:
    """Write the random plans as far as they are measured."""
    from studies.plans import plans_csv

    plans = [plan for drawn in found.plans for plan in drawn.plans]
    replace_text(options.out / "plans.csv", plans_csv(plans, found.figures))


def write_figures(options: argparse.Namespace, screen: Screen, found: Found) -> None:
    """Draw the paper's figures, the table, and what delta and the sums tell of plans."""
    from evaluation.picture import figures_svg
    from paper.study import monte_carlo_figures

    name = options.out
    title = f"{found.bench.data.path.name}: {len(found.bench.tasks.items)} items"
    measured = [
        (row.subject.label, figures)
        for row in found.rows
        if row.is_measured and (figures := found.figures(row))
    ]
    pictures = {
        "figure-2-weights.svg": _weights(screen, found),
        "figure-3-objective.svg": _objective(found),
        "table1.svg": figures_svg(f"Table 1 on {title}", measured),
        "trade-off.svg": _trade_off(found, title),
    }
    judged = [
        (label, {key: one for key, one in figures.items() if key.startswith("judge")})
        for label, figures in measured
    ]
    if any(figures for _, figures in judged):
        pictures["figure-4-judge.svg"] = figures_svg(f"Scores of a judge on {title}", judged)
    else:
        screen.note("no figure 4, because no judge scored the answers: --judge URL")
    if found.sweeps is not None:
        note = f"paper's cost model, the model's own weight errors, seed {options.seed}: computed"
        note += f"; median and 10-90 % of {options.runs} runs"
        pictures |= monte_carlo_figures(*found.sweeps, note)
    for drawn in found.plans:
        pictures[f"plans-{drawn.rounding.scheme}-{drawn.kind}.svg"] = _plans(found, drawn, title)
    for file, text in pictures.items():
        replace_text(name / file, text)
    screen.note(f"{len(pictures)} figures are drawn to {name}")


def _weights(screen: Screen, found: Found) -> str:
    """Draw figure 2: how the weights of the layers are distributed."""
    from studies.pictures import weights_svg
    from studies.rounding import histogram

    edges = np.linspace(-1.0, 1.0, _BINS + 1)
    blocks = list(found.bench.layers)
    with screen.counting("counting weights") as on_step:
        counts, largest = histogram(found.bench.checkpoint, blocks, edges, on_step)
    found.largest_weight = largest
    note = f"{int(counts.sum())} weights of {len(blocks)} layers; the largest is {largest:.3g}"
    return weights_svg("Weights of the layers' matrices", note, edges, counts)


def _objective(found: Found) -> str:
    """Draw figure 3: T by delta, and by the budget of KL divergence beside it."""
    from studies.pictures import Group, Panel, panels_svg

    def group(label: str, rows: Sequence[Row]) -> Group:
        points = tuple(
            (row.bound, row.time_s)
            for row in rows
            if row.bound is not None and row.time_s is not None
        )
        return Group(label, points, joined=True)

    by_delta, by_budget = _groups(found)
    panels = [
        Panel("by the paper's delta", "delta", "T, s", (group("delta", by_delta),), log_y=False),
        Panel(
            "by a budget of KL divergence",
            "sum of KL divergences, nats per token",
            "T, s",
            tuple(group(f"KL, {rounding}", rows) for rounding, rows in by_budget.items()),
            log_y=False,
        ),
    ]
    note = "paper's cost model, assumed servers, storage without limit: computed, not measured"
    return panels_svg("Objective against what a plan may lose", note, panels)


def _trade_off(found: Found, title: str) -> str:
    """Draw what each row's widths save against what they were measured to lose."""
    from studies.pictures import Group, Panel, panels_svg

    by_delta, by_budget = _groups(found)
    named = {"delta": by_delta} | {f"KL, {rounding}": rows for rounding, rows in by_budget.items()}
    panels = []
    for figure, label in (("loss", "measured loss, nats"), ("kl", "measured KL, nats")):
        groups = tuple(
            Group(
                name,
                tuple(
                    (100 * row.ratio, values[figure].value)
                    for row in rows
                    if row.is_measured and figure in (values := found.figures(row))
                ),
            )
            for name, rows in named.items()
        )
        panels.append(Panel(label.partition(",")[0], "bits, % of 32", label, groups, log_x=False))
    return panels_svg(f"Bits against loss: {title}", "each dot is a row of the table", panels)


def _groups(found: Found) -> tuple[list[Row], dict[Rounding, list[Row]]]:
    """Return the rows by delta, and those by budget for each rounding."""
    by_budget: dict[Rounding, list[Row]] = {}
    for row in found.rows:
        if row.kind == "kl" and row.subject.rounding is not None:
            by_budget.setdefault(row.subject.rounding, []).append(row)
    return [row for row in found.rows if row.kind == "delta"], by_budget


def _plans(found: Found, drawn: PlanSet, title: str) -> str:
    """Draw the measured loss of random plans against both predictions."""
    from studies.pictures import Group, Panel, panels_svg
    from studies.plans import correlations

    plans = drawn.plans
    figures = {plan.subject.key: found.figures(plan) for plan in plans}
    told = {one.outcome: one for one in correlations(plans, found.figures, found.bench.seed)}
    panels = []
    for predictor, label in (("delta", "delta"), ("kl_sum", "sum of KL divergences, nats")):
        groups = tuple(
            Group(
                f"narrowest layer {bits} bits",
                tuple(
                    (plan.predicted(predictor), figures[plan.subject.key]["loss"].value)
                    for plan in plans
                    if plan.least_bits == bits and "loss" in figures[plan.subject.key]
                ),
            )
            for bits in sorted({plan.least_bits for plan in plans})
        )
        heading = _BY[predictor]
        if "loss" in told:
            heading += f": {_text(told['loss'].by[predictor], 2)}"
        panels.append(Panel(heading, label, "measured loss, nats", groups))
    words = f"{drawn}; rank correlation with the loss, and its 95 % interval"
    return panels_svg(f"What predicts the loss: {title}", words, panels)


# ---- on the screen -----------------------------------------------------------------------------


def show_table1(options: argparse.Namespace, screen: Screen, found: Found) -> None:
    """Print what was found, as JSON or as tables."""
    if options.json:
        screen.json(_answer(options, found))
        return
    _show_rows(screen, found)
    for drawn in found.plans:
        _show_correlations(screen, found, drawn)
    if found.sweeps is not None:
        show_sweeps(screen, *found.sweeps, options.runs)
    for line in _lines(found):
        screen.out.print(escape(line), soft_wrap=True)


def _show_rows(screen: Screen, found: Found) -> None:
    table = titled_table(f"Table 1 on {escape(found.bench.data.path.name)}")
    table.add_column("row", no_wrap=True)
    names = {
        "loss": "loss, 95 %",
        "perplexity": "perplexity",
        "kl": "KL",
        "bleu": "BLEU",
        "exact_match": "EM, %",
        "f1": "F1, %",
        "judge": "judge",
    }
    figures = [found.figures(row) if row.is_measured else {} for row in found.rows]
    shown = [name for name in names if any(name in one for one in figures)]
    for column in ("bits of layers", "ratio", "T, s", *(names[name] for name in shown)):
        table.add_column(column, justify="right")
    for row, one in zip(found.rows, figures, strict=True):
        if not row.is_measured:
            table.add_row(row.subject.label, "none fits", "", "", *("" for _ in shown))
            continue
        cells = [
            "" if name not in one else _cell(name, one[name], interval=name == "loss")
            for name in shown
        ]
        bits = _bits(row.subject.bits)
        table.add_row(row.subject.label, bits, f"{row.ratio:.2%}", f"{row.time_s:.2f}", *cells)
    screen.table(table)


def _show_correlations(screen: Screen, found: Found, drawn: PlanSet) -> None:
    from evaluation.report import LABELS
    from studies.plans import correlations, same_widths

    table = titled_table(f"{drawn}: Spearman's correlation, 95 % interval")
    table.add_column("with the measured")
    for label in (*_BY.values(), "sum of KL ahead of delta"):
        table.add_column(label, justify="right", no_wrap=True)
    for one in correlations(drawn.plans, found.figures, found.bench.seed):
        cells = [_text(one.by[name], 2) for name in _BY]
        table.add_row(LABELS[one.outcome], *cells, _text(one.kl_sum_ahead, 2))
    screen.table(table)
    if drawn.kind == "even":
        return
    same = titled_table("plans with the same narrowest layer")
    for column in ("bits", "plans", "delta", "sum of KL", "measured loss"):
        same.add_column(column, justify="right", no_wrap=True)
    for group in same_widths(drawn.plans, found.figures):
        ranges = (group.delta, group.kl_sum, group.measured)
        same.add_row(
            str(group.bits),
            str(group.plans),
            *(f"{low:.3g} to {high:.3g}" for low, high in ranges),
        )
    screen.table(same)


def _lines(found: Found) -> list[str]:
    bench = found.bench
    tokens = sum(map(len, bench.sequences))
    lines = [
        f"{len(bench.tasks.targets)} of {bench.tasks.of} items; losses and KL are computed on this "
        "machine from rounded weights; activations and hops are not rounded",
        f"sensitivities: {tokens} tokens of other items; embedding and head stay as they are",
        "T: by the paper's cost model on three assumed servers: computed, not measured",
        f"the largest weight of a layer is {found.largest_weight:.4g}",
    ]
    lines += [f"{row.subject.label}: {row.why}" for row in found.rows if row.why]
    if found.bench.with_bleu and not any("bleu" in found.figures(row) for row in found.rows):
        lines.append("no BLEU: it compares four words at a time, which no accepted answer has")
    return lines


def _answer(options: argparse.Namespace, found: Found) -> dict[str, Any]:
    """Return everything as plain values for JSON."""
    from studies.plans import correlations, plan_json, same_widths
    from studies.table1 import row_json

    bench = found.bench
    return {
        "data": str(bench.data.path),
        "items": len(bench.tasks.items),
        "items_in_data": bench.tasks.of,
        "seed": options.seed,
        "tokens_of_sensitivities": sum(map(len, bench.sequences)),
        "largest_weight": found.largest_weight,
        "rows": [
            row_json(row, found.figures(row) if row.is_measured else {}) for row in found.rows
        ],
        "plans": [
            {
                "rounding": asdict(drawn.rounding),
                "kind": drawn.kind,
                "plans": [plan_json(plan, found.figures(plan)) for plan in drawn.plans],
                "correlations": [
                    _correlation_json(one)
                    for one in correlations(drawn.plans, found.figures, bench.seed)
                ],
                "same_narrowest_width": [
                    asdict(group) for group in same_widths(drawn.plans, found.figures)
                ],
            }
            for drawn in found.plans
        ],
        "runs": options.runs,
        "links": None if found.sweeps is None else asdict(found.sweeps[0]),
        "clocks": None if found.sweeps is None else asdict(found.sweeps[1]),
    }


def _correlation_json(one: Any) -> dict[str, Any]:
    by: Mapping[str, Estimate] = one.by
    return {
        "outcome": one.outcome,
        "by": {name: asdict(estimate) for name, estimate in by.items()},
        "kl_sum_ahead_of_delta": asdict(one.kl_sum_ahead),
    }


def _cell(name: str, one: Estimate, *, interval: bool) -> str:
    return _text(one, _DIGITS.get(name, 4)) if interval else f"{one.value:.{_DIGITS.get(name, 4)}g}"


def _text(one: Estimate, digits: int) -> str:
    value, low, high = (f"{part:.{digits}g}" for part in (one.value, one.low, one.high))
    return f"{value} ({low} to {high})"


def _bits(bits: Sequence[int]) -> str:
    """Return how many layers have each width, such as 4x3 8x5, in any order."""
    counts = {width: list(bits).count(width) for width in sorted(set(bits))}
    return " ".join(f"{width}x{count}" for width, count in counts.items())
