"""Shows plans, explanations, simulations and studies as tables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from cli.render import Screen, titled_table
from wire.sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from model.spec import ModelSpec
    from paper.dilemma import Instance, Solution
    from paper.study import Simulation
    from planning.insight.explain import Explanation, Kind
    from planning.saved import Change, HopChange, SavedPlan


def show_divergence(
    screen: Screen, plan: Mapping[str, Any], quality: Mapping[str, Any] | None
) -> None:
    """Show in one line what the plan's bits do to the model, and how that is known."""
    total = plan["total_sensitivity"]
    if quality is None or total is None:
        screen.out.print("loss not measured: no budget bounds it", soft_wrap=True)
        return
    screen.out.print(escape(loss_text(total, quality)), soft_wrap=True)


def show_weights(screen: Screen, answer: Mapping[str, Any]) -> None:
    """Show what happens to codes that the model's files already have, if they have any."""
    for line in answer.get("weights", ()):
        screen.out.print(escape(line), soft_wrap=True)


def loss_text(total: float, quality: Mapping[str, Any]) -> str:
    """Say in words how much a plan loses.

    total: its predicted KL divergence, in nats per token.
    """
    kind, margin, measured_kl = quality["kind"], quality["margin"], quality["measured_kl"]
    budget = quality["budget"]
    allowed = "" if budget is None else f"; allowed: {budget:g}"
    if kind == "assumed":
        return (
            f"loss not measured ({quality['why']}): by the rule for a typical model it loses"
            f" {total:.3g} nats of KL divergence per token (perplexity x {math.exp(total):.4g},"
            f" assumed){allowed}"
        )
    if kind == "estimated" and measured_kl is not None:
        return (
            f"loses {measured_kl:.3g} nats of KL divergence per token (perplexity x"
            f" {math.exp(measured_kl):.4g}), measured on {quality['tokens']} tokens{allowed}"
        )
    line = f"predicted KL divergence: {total:.3g} nats per token"
    line += f" (sum over blocks and hops {total / margin:.3g}, margin {margin:.2f})"
    if measured_kl is not None:
        line += f"; measured: {measured_kl:.3g}"
    if quality["tokens"] is not None:
        line += f"; blocks were measured on {quality['tokens']} tokens"
    return line + allowed


def show_explanation(screen: Screen, explanation: Explanation) -> None:
    """Show where a token's time goes, then one line for each change that was tried."""
    from planning.insight.explain import change_text

    screen.table(_stages_table(explanation))
    if any(stage.sensitivity is not None for stage in explanation.stages):
        screen.out.print(
            "KL counts weights and hops; stages that round activations lose more"
            " (docs/calibration.md)"
        )
    screen.out.print(f"bottleneck: {escape(explanation.bottleneck)}")
    screen.out.print(f"pipelined: {escape(explanation.pipeline_bottleneck)}")
    if explanation.prompt_bottleneck:
        screen.out.print(f"prompt: {escape(explanation.prompt_bottleneck)}")
    for line in explanation.teams:
        screen.out.print(escape(line), soft_wrap=True)
    screen.out.print("\nsolved again with one thing changed:")
    telling = [item for item in explanation.marginals if item.change != 0.0]
    for item in telling:
        screen.out.print(f"  {escape(str(item))}")
    # Changes without an effect share one line per kind.
    same: dict[tuple[Kind, str], list[str]] = {}
    for item in explanation.marginals:
        if item.change == 0.0:
            same.setdefault((item.kind, item.nothing), []).append(item.subject)
    for (kind, verdict), subjects in same.items():
        subject = subjects[0] if len(subjects) == 1 else f"any one of {', '.join(subjects)}"
        screen.out.print(f"  {escape(change_text(kind, subject))}: {verdict}")
    if not explanation.complete:
        screen.out.print("  (time ended before all changes were tried)")


def _stages_table(explanation: Explanation) -> Table:
    """Return a row for each stage: its times, and its losses and energy where they are known."""
    from planning.plan import bits_text

    table = titled_table("where a token's predicted time goes")
    table.add_column("device", no_wrap=True)
    table.add_column("bits", overflow="fold", min_width=6)
    columns = ["compute ms", "hop ms", "share", "memory"]
    if any(stage.members for stage in explanation.stages):
        columns.insert(1, "sums ms")
    optional = [
        ("worst error", "1e", [stage.worst_weight_error for stage in explanation.stages]),
        ("KL", "3g", [stage.sensitivity for stage in explanation.stages]),
        ("J", "2f", [stage.energy_j for stage in explanation.stages]),
    ]
    # A column without values is left out.
    known = [column for column in optional if any(value is not None for value in column[2])]
    for name in [*columns, *(name for name, _, _ in known)]:
        table.add_column(name, justify="right", no_wrap=True)
    for index, stage in enumerate(explanation.stages):
        used = stage.memory_bytes / stage.memory_limit_bytes
        more = len(stage.members) - 1
        compute = [f"{(stage.compute_s - stage.sums_s) * 1e3:.2f}"]
        if "sums ms" in columns:
            compute.append(f"{stage.sums_s * 1e3:.2f}")
        table.add_row(
            escape(stage.device) + (f" + {more} more" if more > 0 else ""),
            bits_text(stage.bits),
            *compute,
            f"{stage.hop_s * 1e3:.2f}",
            f"{stage.share:.0%}",
            f"{format_size(stage.memory_bytes)} ({used:.0%})",
            *(
                "-" if values[index] is None else format(values[index], f".{style}")
                for _, style, values in known
            ),
        )
    return table


def show_simulation(screen: Screen, simulation: Simulation) -> None:
    table = titled_table(f"{simulation.kept.runs} draws of link speeds, predicted ms")
    table.add_column("plan")
    for column in ("lowest", "10 %", "median", "90 %", "highest"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = [("this one, kept", simulation.kept), ("planned anew", simulation.replanned)]
    for label, spread in rows:
        if spread is not None:
            values = (spread.low, spread.tenth, spread.median, spread.ninetieth, spread.high)
            table.add_row(label, *(f"{value * 1e3:.2f}" for value in values))
    screen.table(table)
    screen.out.print(f"{simulation.distinct} different plans were best for some draw")
    if simulation.unproven:
        screen.out.print(f"{simulation.unproven} of them may not be the best: time ended")
    if simulation.unsolved:
        screen.out.print(f"{simulation.unsolved} draws found no plan within the time limit")


def show_difference(
    screen: Screen,
    before: SavedPlan,
    after: SavedPlan,
    changes: Sequence[Change],
    hops: Sequence[HopChange],
) -> None:
    if not changes:
        alike = ", and send at other bits" if hops else ""
        screen.out.print(f"the two plans place every block alike{alike}")
    if changes or hops:
        table = titled_table(f"from {before.source} to {after.source}")
        for column in ("blocks", "before", "after"):
            table.add_column(column, no_wrap=True)
        for change in changes:
            one = change.last == change.first + 1
            table.add_row(
                str(change.first) if one else f"{change.first}-{change.last - 1}",
                escape(f"{change.before[0]} {change.before[1]} bit"),
                escape(f"{change.after[0]} {change.after[1]} bit"),
            )
        for hop in hops:
            sent = ("no hop" if bits is None else f"{bits} bit" for bits in (hop.before, hop.after))
            table.add_row(f"hop behind {hop.block}", *sent)
        screen.table(table)
    predicted = before.predicted, after.predicted
    old, new = (one.get("ms_per_token") for one in predicted)
    if old and new:
        screen.out.print(
            f"as predicted when they were saved: {old:.2f} -> {new:.2f} ms per token"
            f" ({new / old - 1:+.1%})"
        )
    prompts = [(one.get("prompt_tokens"), one.get("first_token_s")) for one in predicted]
    (tokens, old), (others, new) = prompts
    if old and new and tokens == others:
        screen.out.print(
            f"first token of a prompt of {tokens:g}, predicted: {old:.3g} -> {new:.3g} s"
            f" ({new / old - 1:+.1%})"
        )


def show_dilemma(
    screen: Screen,
    spec: ModelSpec,
    instance: Instance,
    solution: Solution,
    repairs: Sequence[str],
    times: Mapping[str, Any],
) -> None:
    table = titled_table(f"the paper's program, repaired: {', '.join(repairs) or 'nothing'}")
    for column in ("blocks", "device", "bits"):
        table.add_column(column, no_wrap=True)
    runs = itertools.groupby(solution.choices, key=lambda choice: (choice.device, choice.bits))
    for (device, bits), run in runs:
        names = [spec.block_name(choice.layer) for choice in run]
        table.add_row(
            names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}",
            escape(instance.devices[device]),
            str(bits),
        )
    screen.table(table)
    proven = "optimal" if solution.proven_optimal else "not proven optimal"
    screen.out.print(
        f"objective: {solution.objective_s * 1e3:.2f} ms per token predicted, {proven} for"
        f" {'assumed' if times['assumed'] else 'described'} times, by {solution.solver}"
    )
    screen.out.print(f"times: {escape(times['text'])}", soft_wrap=True)
    if solution.honest_s is None:
        screen.out.print("this places some layers twice or never, so no model can run")
    elif solution.honest_s > solution.objective_s * (1 + 1e-9):
        screen.out.print(
            f"with every transfer charged: {solution.honest_s * 1e3:.2f} ms"
            " (the objective leaves some out; repair 2f)"
        )
