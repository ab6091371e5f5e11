"""Shows what the studies of ``shoal study`` found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cli.render import Screen, titled_table

if TYPE_CHECKING:
    from paper.study import DilemmaStudy, Sweep


def show_dilemma_study(screen: Screen, study: DilemmaStudy) -> None:
    """Show the bits of Table 1, then the points of the figures."""
    table = titled_table("Table 1 with synthetic weights: computed, not measured")
    for column in ("delta", "bits", "paper", "ratio", "T, s"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in study.table:
        table.add_row(
            f"{row.delta:g}",
            ", ".join(map(str, row.bits)),
            str(row.paper_bits),
            f"{row.quantization_ratio:.2%}",
            f"{row.objective_s:.2f}",
        )
    screen.table(table)
    oddities = titled_table("one repair left out: four layers, four servers")
    for column in ("left out", "T, s", "with every transfer", "bits", "servers", "verdict"):
        oddities.add_column(column, overflow="fold")
    for oddity in study.oddities:
        figures = [
            "-" if value is None else f"{value:.2f}"
            for value in (oddity.objective_s, oddity.honest_s)
        ]
        bits = " ".join(map(str, oddity.bits))
        oddities.add_row(
            oddity.left_out, *figures, bits, str(oddity.servers or "-"), oddity.verdict
        )
    screen.table(oddities)
    show_sweeps(screen, study.links, study.clocks, study.runs)
    unproven = study.links.unproven + study.clocks.unproven
    verdict = "all proven optimal" if not unproven else f"{unproven} not proven optimal"
    screen.out.print(
        f"{verdict}: the table by {study.solver}, figures 5 and 6 by dynamic programming"
    )


def show_sweeps(screen: Screen, links: Sweep, clocks: Sweep, runs: int) -> None:
    """Show the points of figures 5 and 6."""
    for title, label, sweep, unit in (
        ("figure 5", "least Mbit/s", links, 1e6),
        ("figure 6", "clock GHz", clocks, 1e9),
    ):
        points = titled_table(f"{title}: T in s over {runs} runs")
        for column in (label, "10 %", "median", "90 %"):
            points.add_column(column, justify="right", no_wrap=True)
        for value, spread in zip(sweep.values, sweep.spreads, strict=True):
            drawn = (spread.tenth, spread.median, spread.ninetieth)
            points.add_row(f"{value / unit:g}", *(f"{figure:.2f}" for figure in drawn))
        screen.table(points)
