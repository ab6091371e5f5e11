"""Shows plans of several models as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from cli.render import Screen, titled_table
from wire.sizes import format_size

if TYPE_CHECKING:
    from planning.joint.compare import JointExplanation
    from planning.joint.plan import JointPlan


def show_joint(screen: Screen, answer: Mapping[str, Any], title: str) -> None:
    """Show where each model's blocks are, then what each model takes alone and beside the others.

    answer: a joint plan as JSON (planning.joint.view).
    """
    from planning.plan import bits_text

    where = titled_table(title)
    where.add_column("model", no_wrap=True)
    where.add_column("device", no_wrap=True)
    where.add_column("blocks", no_wrap=True)
    where.add_column("bits", overflow="fold", min_width=8)
    for column in ("memory", "ms"):
        where.add_column(column, justify="right", no_wrap=True)
    for entry in answer["models"]:
        for index, stage in enumerate(entry["plan"]["stages"]):
            last = stage["first"] + len(stage["bits"])
            more = len(stage["members"]) - 1
            where.add_row(
                escape(entry["model"]) if index == 0 else "",
                escape(stage["device"]) + (f" + {more} more" if more > 0 else ""),
                f"{stage['first']}-{last - 1}",
                bits_text(stage["bits"]),
                format_size(stage["memory_bytes"]),
                f"{stage['compute_s'] * 1e3:.2f}",
            )
    screen.table(where)
    _show_devices(screen, answer)
    _show_times(screen, answer)
    proof = "optimal" if answer["proven_optimal"] else f"within {answer['gap']:.1%} of the optimum"
    energy = answer["objective"] == "energy"
    mean = _amount(answer["predicted_mean_s"], answer["objective"])
    planned = _amount(answer["planned_mean_s"], answer["objective"])
    what = "joules of a token" if energy else "time of a request while all models answer"
    screen.out.print(f"predicted: mean {what} {mean} (simulated)", soft_wrap=True)
    screen.out.print(
        f"by the planner's formula {planned}, proven {proof} by {answer['solver']} in"
        f" {answer['solve_s']:.2f} s",
        soft_wrap=True,
    )
    for entry in answer["models"]:
        if "times" in entry:
            screen.out.print(
                f"times of {escape(entry['model'])}: {escape(entry['times']['text'])}",
                soft_wrap=True,
            )


def _show_devices(screen: Screen, answer: Mapping[str, Any]) -> None:
    names = [entry["model"] for entry in answer["models"]]
    table = titled_table("memory of each device")
    table.add_column("device", no_wrap=True)
    for name in names:
        table.add_column(escape(name), justify="right", no_wrap=True)
    table.add_column("of its limit", justify="right", no_wrap=True)
    for device in answer["devices"]:
        table.add_row(
            escape(device["device"]),
            *(format_size(size) if size else "-" for size in device["memory_bytes"]),
            f"{device['memory_part']:.0%}",
        )
    screen.table(table)


def _show_times(screen: Screen, answer: Mapping[str, Any]) -> None:
    """Show each model alone, and while the others answer all the time."""
    kind = answer["objective"]
    table = titled_table("predicted for each model")
    table.add_column("model", no_wrap=True)
    table.add_column("requests", justify="right", no_wrap=True)
    for column in ("ms per token or pass", "first token s", "alone", "all busy", "x"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in answer["models"]:
        alone_s, together_s = entry["predicted_alone_s"], entry["predicted_together_s"]
        table.add_row(
            escape(entry["model"]),
            f"{entry['share']:.0%}",
            *_own_times(entry["plan"]),
            _amount(alone_s, kind),
            _amount(together_s, kind),
            f"{together_s / alone_s:.2f}" if alone_s else "-",
        )
    screen.table(table)


def _own_times(plan: Mapping[str, Any]) -> tuple[str, str]:
    """The predicted ms of a token and s of the first one. An encoder has the ms of a pass."""
    if plan["encodes"]:
        return f"{plan['predicted_ms_per_pass']:.2f} a pass", "-"
    return f"{plan['predicted_ms_per_token']:.2f}", f"{plan['predicted_first_token_s']:.3g}"


def show_joint_explanation(
    screen: Screen, names: Sequence[str], explanation: JointExplanation, plan: JointPlan
) -> None:
    """Show where models wait for each other, and what loading one after the other would give."""
    from planning.joint.compare import Turn

    kind = plan.plans[0].objective.kind
    if kind != "energy":
        table = titled_table("computing seconds of one request on each device")
        table.add_column("device", no_wrap=True)
        for name in names:
            table.add_column(escape(name), justify="right", no_wrap=True)
        table.add_column("waits", no_wrap=True)
        for device in explanation.devices:
            waits = [
                f"{name} {wait_s:.3g}"
                for name, wait_s in zip(names, device.wait_s, strict=True)
                if wait_s > 1e-3 * plan.value
            ]
            table.add_row(
                escape(device.device),
                *(f"{busy_s:.3g}" if busy_s else "-" for busy_s in device.busy_s),
                escape(", ".join(waits)) or "-",
            )
        screen.table(table)
    table = titled_table("one after the other, each with what is left, by the planner's formula")
    table.add_column("order", no_wrap=True)
    for name in names:
        table.add_column(escape(name), justify="right", no_wrap=True)
    for column in ("mean", "against joint", "simulated mean"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row(
        "together",
        *(_amount(one, kind) for one in plan.together_s),
        _amount(plan.value, kind),
        "",
        _amount(Turn((), plan).simulated_mean_s or 0.0, kind),
    )
    for turn in explanation.turns:
        order = ", then ".join(turn.order)
        if turn.together_s is None or turn.value is None:
            table.add_row(escape(order), *("-" for _ in names), "does not fit", "", "")
            continue
        table.add_row(
            escape(order),
            *(_amount(one, kind) for one in turn.together_s),
            _amount(turn.value, kind),
            f"x {turn.value / plan.value:.2f}",
            _amount(turn.simulated_mean_s or 0.0, kind),
        )
    screen.table(table)


def _amount(value: float, kind: str) -> str:
    """Seconds or joules with their unit."""
    if kind == "energy":
        return f"{value:.3g} J"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
