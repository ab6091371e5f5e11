"""``shoal top``: the shoal at work, in a terminal. It follows the state that the page follows."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli.client import Client, default_url
from cli.errors import CommandFailed
from cli.parser import add_url_argument
from cli.render import PHASES, Screen, use_text, wishes_text
from cli.service.signals import Terminated
from wire.sizes import format_size

STATE = "/shoal/v1/state"
RETRY_S = 1.0
BAR_CELLS = 16
OTHER_LINES = 18
"""Lines of the screen beside devices, stages and requests, before events."""

ABOUT = (
    "It shows devices, the stages of the loaded model with predicted and measured times, requests "
    "and events, and follows them until Ctrl-C. Without a terminal it prints them once."
)
EXAMPLES = "  shoal top\n  shoal top --once\n  shoal top --json | jq '.devices[].name'\n"


def add_top_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--once", action="store_true", help="Print the state once, and exit.")
    add_url_argument(parser)


def run_top(options: argparse.Namespace, screen: Screen) -> None:
    with Client(options.url or default_url()) as client:
        state = client.get(STATE)
        if options.json:
            screen.json(state)
        elif options.once or not screen.out.is_terminal:
            screen.out.print(top_view(state, time.time()))
        else:
            try:
                _follow(client, screen, state)
            except Terminated:
                raise
            except KeyboardInterrupt:  # The way to leave it.
                return


def _follow(client: Client, screen: Screen, state: dict[str, Any]) -> None:
    """Show the state until the user interrupts. A coordinator that is restarted is awaited."""
    with Live(console=screen.out, screen=True, auto_refresh=False) as live:

        def show(note: str = "") -> None:
            view = top_view(state, time.time(), height=screen.out.height, note=note)
            live.update(view, refresh=True)

        while True:
            show()
            try:
                for parts in client.follow(STATE):
                    state.update(parts)
                    show()
                show("the coordinator stopped: trying again")
            except CommandFailed as error:
                show(str(error))
            time.sleep(RETRY_S)  # A coordinator that starts again tells nobody.


def top_view(
    state: Mapping[str, Any], now_s: float, *, height: int | None = None, note: str = ""
) -> RenderableType:
    """Return the state as tables. With ``height``, as many events as fit into so many lines."""
    shoal, models, requests = state["shoal"], state["models"], state["requests"]
    head = Text(f"shoal {shoal['version']}, cluster {shoal['cluster']}", style="bold")
    if note:
        head.append(f"   {note}", style="red")
    parts: list[RenderableType] = [head, ""]
    if not models:
        parts.append("no model is loaded")
    for model in models:
        parts += _model(model)
    parts += [_progress(state["operation"]), _devices(state["devices"], now_s)]
    running = [request for request in requests if request["state"] != "ended"]
    parts.append(_requests(running, now_s))
    rows = sum(len(model.get("stages", ())) * 2 for model in models)
    used = OTHER_LINES + rows + len(state["devices"]) + len(running)
    most = 8 if height is None else max(height - used, 0)
    parts.append(_events(state["events"][len(state["events"]) - most :] if most else ()))
    return Group(*parts)


def _model(model: Mapping[str, Any]) -> list[RenderableType]:
    """The line about a model, and its stages if it has a plan."""
    line = Text(f"{model['model']}: {model['state']}", style="bold")
    if model["waiting_for"]:
        line.append(f", waiting for {', '.join(model['waiting_for'])}")
    parts: list[RenderableType] = [line]
    if model["reason"]:
        parts.append(Text(model["reason"], style="red"))
    if "plan" not in model:
        return parts
    plan = model["plan"]
    if plan.get("encodes"):
        predicted = (
            f"{plan['predicted_ms_per_pass']:.2f} ms a pass of {plan['prompt_tokens']} tokens"
        )
    else:
        predicted = f"{plan['predicted_ms_per_token']:.2f} ms a token"
    line.append(f"   predicted {predicted}   {use_text(model)}", style="not bold")
    if wishes := wishes_text(model):
        parts.append(Text(wishes, style="dim"))
    parts.append(_stages(model))
    return parts


def _stages(model: Mapping[str, Any]) -> Table:
    from planning.plan import bits_text

    plan = model["plan"]
    table = _table("stage", "blocks", "bits")
    for column in ("memory", "predicted ms", "measured ms"):
        table.add_column(column, justify="right", no_wrap=True)
    seconds = [*(hop["seconds"] for hop in plan["hops"]), plan["return_s"]]
    for index, (stage, loaded) in enumerate(zip(plan["stages"], model["stages"], strict=True)):
        names = [member["device"] for member in stage.get("members", ())] or [stage["device"]]
        first, last = stage["first"], stage["first"] + len(stage["bits"])
        table.add_row(
            escape("+".join(names)),
            rf"\[{first}, {last})",
            bits_text(stage["bits"]),
            format_size(loaded["memory_bytes"]),
            _ms(stage["compute_s"]),
            _ms(loaded.get("pass_s" if plan.get("encodes") else "token_s")),
        )
        if len(plan["stages"]) > 1:
            back = "result back" if plan.get("encodes") else "token back"
            what = back if index == len(plan["hops"]) else "hop"
            width = str(stage.get("hop_bits") or "")
            measured = _ms(loaded.get("hop_s"))
            table.add_row(f"  {what}", "", width, "", _ms(seconds[index]), measured, style="dim")
    return table


def _devices(devices: Sequence[Mapping[str, Any]], now_s: float) -> Table:
    table = _table("device", "backend", "version")
    table.add_column("memory in use", no_wrap=True)
    for column in ("free", "load", "°C", "since"):
        table.add_column(column, justify="right", no_wrap=True)
    for device in devices:
        total, free = device["memory_total_bytes"], device["memory_available_bytes"]
        is_here = device["state"] == "here"
        load, heat = device["load"], device["celsius"]
        table.add_row(
            escape(device["name"]),
            escape(device["backend"]),
            escape(device["version"]),
            ProgressBar(total=total or 1, completed=total - free, width=BAR_CELLS)
            if is_here
            else "lost",
            format_size(free) if is_here else "",
            "-" if load is None else f"{load:.0%} of {device['cores']}",
            "-" if heat is None else f"{heat:.0f}",
            _ago(now_s - device["since_s"]),
            style="" if is_here else "red",
        )
        if not is_here:
            table.add_row("", escape(device["reason"]), style="red")
    return table


def _progress(operation: Mapping[str, Any] | None) -> RenderableType:
    """The newest step of the running operation."""
    if operation is None or not operation["steps"]:
        return Text(operation["what"] if operation else "")
    step = operation["steps"][-1]
    label = PHASES.get(step["phase"], step["phase"])
    label += f" ({step['label']})" if step["label"] else ""
    done = f"   {step['done']} of {step['total']}" if step["total"] else ""
    if done and step["unit"] == "bytes":
        done = f"   {format_size(step['done'])} of {format_size(step['total'])}"
    return Text(label + done, style="yellow")


def _requests(requests: Sequence[Mapping[str, Any]], now_s: float) -> RenderableType:
    if not requests:
        return Text("no request is running", style="dim")
    table = _table("request", "client", "class", "state")
    for column in ("prompt", "answer", "tokens/s", "since"):
        table.add_column(column, justify="right", no_wrap=True)
    for request in requests:
        token_s = request["token_s"]
        table.add_row(
            escape(request["id"][:16]),
            escape(request["key"] or request["client"]),
            request.get("class", ""),
            request["state"],
            str(request["prompt_tokens"]),
            str(request["answer_tokens"]),
            f"{1 / token_s:.1f}" if token_s else "-",
            _ago(now_s - request["time_s"]),
        )
    return table


def _events(events: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for event in events:
        when = datetime.fromtimestamp(event["time_s"]).astimezone()
        texts = (escape(event[column]) for column in ("kind", "subject", "text"))
        table.add_row(f"[dim]{when:%H:%M:%S}[/]", *texts)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


def _ago(seconds: float) -> str:
    """A short duration, such as "3 min"."""
    if seconds < 60:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
