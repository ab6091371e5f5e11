"""The DILEMMA paper's Table 1 on a model's own weights, with budgets of KL divergence beside it.

A row bounds what the layers may lose, by the paper's delta or by a sum of KL divergences. The
paper's program then chooses the widths with the least T. What the rounded model loses is measured.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from evaluation.bootstrap import Estimate
from evaluation.report import plain
from model.quantize import INTEGER_BITS
from paper import dilemma
from paper.study import DELTAS, SOLVE_LIMIT_S, STUDY_BITS, relaxed_instance
from planning.plan import PlanError
from studies.bench import Bench, ByWidth, Subject, widths_text
from studies.rounding import ORIGINAL, Rounding

BUDGETS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""The default budgets of KL divergence, in nats per token."""

TRUNCATED_BITS = (4, 6, 8, 10, 12, 16)
"""The widths of truncated layers whose sensitivities are measured: the paper's up to 12, and 16."""

PAPER_FIGURES: Mapping[float, tuple[float, float, float, float]] = {
    1e-7: (0.0591, 1.0609, 0.2949, 0.3750),
    1e-6: (0.0591, 1.0609, 0.2945, 0.3125),
    1e-5: (0.0591, 1.0609, 0.2942, 0.2500),
    1e-4: (0.0591, 1.0609, 0.2942, 0.2500),
    1e-3: (0.0591, 1.0609, 0.3050, 0.1875),
    1e-2: (0.0605, 1.0623, 0.2939, 0.1250),
    1e-1: (0.0605, 1.0623, 0.2939, 0.1250),
    1.0: (0.0605, 1.0623, 0.2939, 0.1250),
}
"""The paper's own loss, perplexity, BLEU and ratio by delta (Source: DILEMMA, Table 1)."""

_TIE = 0.2
"""The time of a whole budget, as a share of the least time of a layer."""

Kind = Literal["original", "delta", "kl"]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table.

    kind: what is bounded: "delta", "kl" or nothing.
    bound: of delta or of the sum of KL divergences. None without a bound.
    time_s: T of the paper's cost model. None: no widths keep the bound, as ``why`` says.
    """

    kind: Kind
    bound: float | None
    subject: Subject
    ratio: float
    time_s: float | None
    why: str = ""

    @property
    def is_measured(self) -> bool:
        return self.time_s is not None


def rows_by_delta(
    bench: Bench, rounding: Rounding, deltas: Sequence[float] = DELTAS
) -> tuple[list[Row], list[ByWidth]]:
    """Return a row per delta, and the weight errors by layer and width that they keep."""
    errors = bench.weight_errors(rounding, STUDY_BITS)
    rows = [
        _row(bench, "delta", delta, rounding, STUDY_BITS, errors, [], f"delta {delta:g}")
        for delta in deltas
    ]
    return rows, errors


def rows_by_budget(
    bench: Bench, rounding: Rounding, budgets: Sequence[float] = BUDGETS
) -> tuple[list[Row], list[ByWidth]]:
    """Return a row per budget of KL divergence, and the sensitivities by layer and width."""
    losses = bench.sensitivities(rounding, widths_of(rounding))
    widths = (*widths_of(rounding), ORIGINAL)
    rows = [
        _row(bench, "kl", budget, rounding, widths, [], losses, f"KL {budget:g}, {rounding}")
        for budget in budgets
    ]
    return rows, losses


def original_row(bench: Bench) -> Row:
    """Return the row of the model as it is."""
    bits = (ORIGINAL,) * len(bench.layers)
    instance = relaxed_instance(bench.checkpoint.spec, (), (ORIGINAL,))
    found = dilemma.solve(instance, time_limit_s=SOLVE_LIMIT_S)
    return Row("original", None, Subject("original", bits, None), 1.0, found.objective_s)


def widths_of(rounding: Rounding) -> tuple[int, ...]:
    """Return the widths whose sensitivities a study measures."""
    return TRUNCATED_BITS if rounding.scheme == "truncate" else (*INTEGER_BITS, 16)


def _row(
    bench: Bench,
    kind: Kind,
    bound: float,
    rounding: Rounding,
    widths: Sequence[int],
    errors: Sequence[ByWidth],
    losses: Sequence[ByWidth],
    label: str,
) -> Row:
    spec = bench.checkpoint.spec
    if kind == "delta":
        instance = relaxed_instance(spec, errors, widths, delta=bound)
    else:
        instance = relaxed_instance(spec, errors, widths, losses=losses, budget=bound)
    try:
        few = dilemma.without_dominated(_with_ties_broken(instance, bound))
        choices = dilemma.solve(few, time_limit_s=SOLVE_LIMIT_S).choices
    except PlanError as error:
        return Row(kind, bound, Subject(label, (), rounding), 0.0, None, str(error))
    ratio = dilemma.quantization_ratio(instance, choices)
    bits = tuple(choice.bits for choice in choices)
    time_s = dilemma.charge(instance, dilemma.ALL_REPAIRS, choices)
    return Row(kind, bound, Subject(label, bits, rounding), ratio, time_s)


def _with_ties_broken(instance: dilemma.Instance, budget: float) -> dilemma.Instance:
    """Return the instance with a little time for each loss, so that of equal T the least counts.

    Plans differ in T by about a bit of one layer, and all losses together take less.
    """
    if not instance.losses or not budget:
        return instance
    seconds = [s for rows in instance.compute_s for row in rows for s in row.values()]
    second_per_nat = _TIE * min(seconds) / budget
    return replace(
        instance,
        compute_s=tuple(
            tuple(
                {
                    b: s + second_per_nat * min(instance.loss(layer, b), budget)
                    for b, s in row.items()
                }
                for layer, row in enumerate(rows)
            )
            for rows in instance.compute_s
        ),
    )


# ---- what goes out -----------------------------------------------------------------------------

COLUMNS = ("loss", "perplexity", "kl", "bleu", "exact_match", "f1", "judge")
"""The measured columns of the table, each with its interval."""


def table_csv(rows: Sequence[Row], measured: Callable[[Row], Mapping[str, Estimate]]) -> str:
    """Return the table with one line a row. Figures that are not measured yet are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["row", "rounding", "bits_of_layers", "ratio_to_32_bits", "time_s"]
    for name in COLUMNS:
        head += [name, f"{name}_low", f"{name}_high"]
    writer.writerow([*head, "paper_loss", "paper_perplexity", "paper_bleu", "paper_ratio", "why"])
    for row in rows:
        found = measured(row) if row.is_measured else {}
        cells: list[object] = [
            row.subject.label,
            row.subject.rounding or "",
            widths_text(row.subject.bits),
            row.ratio if row.is_measured else "",
            row.time_s if row.is_measured else "",
        ]
        for name in COLUMNS:
            one = found.get(name)
            cells += ["", "", ""] if one is None else [one.value, one.low, one.high]
        paper = paper_of(row)
        writer.writerow([*cells, *(paper or [""] * 4), row.why])
    return text.getvalue()


def row_json(row: Row, found: Mapping[str, Estimate]) -> dict[str, Any]:
    """Return a row as plain values for JSON."""
    paper = paper_of(row)
    names = ("loss", "perplexity", "bleu", "ratio")
    return {
        "row": row.subject.label,
        "kind": row.kind,
        "bound": row.bound,
        "rounding": None if row.subject.rounding is None else asdict(row.subject.rounding),
        "bits_of_layers": list(row.subject.bits),
        "ratio_to_32_bits": row.ratio if row.is_measured else None,
        "time_s": row.time_s,
        "why": row.why or None,
        "figures": plain(found),
        "paper": None if paper is None else dict(zip(names, paper, strict=True)),
    }


def paper_of(row: Row) -> tuple[float, float, float, float] | None:
    """Return the figures that the paper prints for a row's delta, if it has that row."""
    if row.kind != "delta" or row.bound is None:
        return None
    return PAPER_FIGURES.get(row.bound)
