"""Prints the tables, progress bars and streamed text of commands.

Tables and answers go to stdout. Progress, notes and errors go to stderr, so that a pipe gets only
the answer.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from cli.service.journal import prefixed
from cli.tables import fitting
from wire.sizes import format_size

if TYPE_CHECKING:
    from rich.progress import TaskID

BAR_AFTER_S = 2.0
"""Work that ends sooner needs no progress bar."""

LEAST_COLUMNS = 20
"""Lines of a narrower terminal are broken by the terminal."""

NOISY = " *"
"""Marks a device whose figures may have been measured on a busy machine."""

NOISE_LINES = 8

_SUMS_PER_LAYER = 2

PHASES = {
    "measure": "measuring blocks",
    "links": "measuring links",
    "weight errors": "measuring weight errors",
    "plan": "solving the plan",
    "quantize": "quantizing blocks",
    "quality": "measuring sensitivities",
    "check": "measuring what the plan loses",
    "load": "loading stages",
    "files": "having files made",
    "fetch": "fetching",
}


KEY_CHARACTERS = 9
"""The shown beginning of a device's key: enough to tell devices apart."""


_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}"
    for code in (*range(32), *range(127, 160))
    if chr(code) not in "\n\t"
}
"""Characters by which text moves a terminal's cursor, or changes its title or its clipboard."""


class SafeConsole(Console):
    """A console that shows a terminal none of the control characters in text.

    Answers are a model's text, and errors may quote a stranger's files. A file or a pipe gets
    everything.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if self.is_terminal and not segment.control:
                yield Segment(segment.text.translate(_CONTROLS), segment.style)
            else:
                yield segment


class Screen:
    """The output of a command. With ``json_output``, stdout gets only JSON."""

    def __init__(self, *, json_output: bool, journal: bool = False) -> None:
        """Open the consoles.

        journal: lines on stderr begin with a priority for the journal (cli.service.journal).
        """
        self.json_output = json_output
        self._journal = journal
        self.out: Console = SafeConsole(highlight=False, stderr=json_output)
        self.err: Console = SafeConsole(highlight=False, stderr=True)
        self._plain = Console(highlight=False)
        for console in (self.out, self.err, self._plain):
            # COLUMNS=0 means that nobody knows. In a few characters, cells would be left out.
            if console.width < LEAST_COLUMNS:
                console.width = LEAST_COLUMNS

    def note(self, text: str) -> None:
        """Print one line about something that happened."""
        if self._journal:
            text = prefixed(logging.INFO, text)
        self.err.print(escape(text), style="dim", soft_wrap=True)

    def step(self, text: str) -> None:
        """Print one line about the next step, if stderr is a terminal."""
        if self.err.is_terminal:
            self.note(text)

    def error(self, text: str) -> None:
        """Print the line that says what went wrong."""
        if self._journal:
            self.err.print(escape(prefixed(logging.ERROR, f"error: {text}")), soft_wrap=True)
            return
        self.err.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)

    def json(self, values: Mapping[str, Any]) -> None:
        """Print a JSON object as one line."""
        self._plain.print(
            json.dumps(values), markup=False, soft_wrap=True, emoji=False, highlight=False
        )

    def text(self, piece: str) -> None:
        """Print a piece of streamed text. A file or a pipe gets it as it is."""
        self.out.print(piece, end="", markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def progress(self) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Yield a function that takes the coordinator's steps, and draws bars for slow ones.

        Without a terminal there are no bars. rich would end them with an empty line even so.
        """
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            console=self.err,
            transient=True,
        )
        tasks: dict[tuple[str, str], TaskID] = {}
        is_due = threading.Event()

        def begin() -> None:
            is_due.set()
            if tasks:
                bars.start()

        # The next step of slow work may come late, or never.
        timer = threading.Timer(BAR_AFTER_S, begin)

        def on_step(step: Mapping[str, Any]) -> None:
            # Each device has its bar, because several are measured at once. Links share one.
            apart = step["unit"] != "steps" or step["phase"] == "measure"
            key = (step["phase"], step["label"] if apart else "")
            label = PHASES.get(step["phase"], step["phase"])
            if step["label"]:
                label += f" ({escape(step['label'])})"
            total = step["total"] or None
            amount = f"{step['done']}/{step['total']}" if total else ""
            if total and step["unit"] == "bytes":
                amount = f"{format_size(step['done'])}/{format_size(step['total'])}"
            amount += step.get("note", "")
            if key not in tasks:
                tasks[key] = bars.add_task(label, total=total, amount=amount)
            bars.update(
                tasks[key], description=label, completed=step["done"], total=total, amount=amount
            )
            if is_due.is_set():
                bars.start()

        if self.err.is_interactive:
            timer.start()
        try:
            yield on_step
        finally:
            timer.cancel()
            if timer.is_alive():
                timer.join()
            if bars.live.is_started:
                bars.stop()

    @contextmanager
    def counting(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """Yield a function that takes (done, total), and draws a bar for slow work."""
        with self.progress() as on_step:

            def report(done: int, total: int) -> None:
                on_step(
                    {"phase": label, "label": "", "unit": "steps", "done": done, "total": total}
                )

            yield report

    # ---- tables ---------------------------------------------------------------------------------

    def table(self, table: Table, keys: int = 1) -> None:
        """Print a table that fits the terminal. The first ``keys`` columns name a row."""
        if table.title is not None:
            self.out.print(Text.from_markup(str(table.title), style="table.title"))
        for part in fitting(table, self.out.width, keys):
            self.out.print(part)

    def devices(self, answer: Mapping[str, Any]) -> None:
        """Print the joined devices, their measurements and links."""
        table = titled_table(f"measured devices of cluster {answer['cluster']}")
        table.add_column("device", no_wrap=True)
        table.add_column("processor")
        table.add_column("backend", no_wrap=True)
        for column in ("threads", "memory", "storage", "GB/s"):
            table.add_column(column, justify="right", no_wrap=True)
        has_keys = any(device.get("key") for device in answer["devices"])
        if has_keys:
            table.add_column("key", no_wrap=True)
        for device in answer["devices"]:
            table.add_row(
                escape(device["name"]) + (NOISY if device.get("noise") else ""),
                escape(device["processor"]),
                escape(device["backend"]),
                str(device["threads"]),
                format_size(device["memory_bytes"]),
                format_size(device["storage_bytes"]),
                f"{device['memory_read_bytes_per_s'] / 1e9:.1f}",
                *([str(device.get("key", ""))[:KEY_CHARACTERS]] if has_keys else []),
            )
        self.table(table)
        self._versions(answer)
        if answer["links"]:
            links = titled_table("measured links")
            links.add_column("from")
            links.add_column("to")
            links.add_column("round trip ms", justify="right")
            links.add_column("90 %", justify="right")
            links.add_column("Mbit/s", justify="right")
            for link in answer["links"]:
                links.add_row(
                    escape(link["source"]),
                    escape(link["target"]),
                    f"{link['rtt_s'] * 1e3:.2f}",
                    f"{link['rtt_p90_s'] * 1e3:.2f}" if link["rtt_p90_s"] else "-",
                    f"{link['bytes_per_s'] * 8e-6:.0f}",
                )
            self.table(links)
        for link in answer.get("no_links", ()):  # Older coordinators do not send them.
            age_s = link["age_s"]
            since = f"{age_s:.0f} s" if age_s < 120 else f"{age_s / 60:.0f} min"
            text = f"[red]no link:[/] {escape(link['text'])}, tried {since} ago"
            self.out.print(text, soft_wrap=True)
        self.noise([device["noise"] for device in answer["devices"] if device.get("noise")])

    def _versions(self, answer: Mapping[str, Any]) -> None:
        """Print the versions of shoal, with advice if they differ."""
        from wire.versions import shoal_version

        here, version = shoal_version(), answer.get("version", "of an older version")
        runs: dict[str, list[str]] = {version: ["the coordinator"]}
        for device in answer["devices"]:
            runs.setdefault(device["version"], []).append(device["name"])
        if here != version:
            runs.setdefault(here, []).append("this command")
        if len(runs) == 1:
            line = f"shoal {version} on the coordinator and all devices"
        else:
            line = "; ".join(f"shoal {one} on {', '.join(names)}" for one, names in runs.items())
            line += ": install the same on all machines"
        self.out.print(escape(line))

    def noise(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Print which figures may be wrong because the machine was busy, with advice."""
        for entry in entries[:NOISE_LINES]:
            self.out.print(f"{NOISY.strip()} {escape(entry['text'])}", soft_wrap=True)
        if len(entries) > NOISE_LINES:
            self.out.print(
                f"{NOISY.strip()} and {len(entries) - NOISE_LINES} more devices: see the field "
                "noise of `shoal devices --json`",
                soft_wrap=True,
            )

    def plan(
        self,
        plan: Mapping[str, Any],
        title: str,
        *,
        times: Mapping[str, Any] | None = None,
        noise: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Print a plan's stages, hops and prediction.

        times: the source of described or assumed times, or None for measured ones.
        noise: as for ``self.noise``.
        """
        table = titled_table(title)
        table.add_column("device", no_wrap=True)
        table.add_column("blocks", no_wrap=True)
        table.add_column("bits", overflow="fold", min_width=8)
        for column in ("memory", "limit", "ms"):
            table.add_column(column, justify="right", no_wrap=True)
        noisy = {entry["device"] for entry in noise}
        for index in range(len(plan["stages"])):
            _add_stage(table, plan, index, noisy)
        if plan["hops"]:
            back = "result return" if plan.get("encodes") else "token return"
            table.add_row(f"  {back}", "", "", "", "", f"{plan['return_s'] * 1e3:.2f}")
        self.table(table)
        proof = "optimal" if plan["proven_optimal"] else f"within {plan['gap']:.1%} of the optimum"
        if times is not None:
            proof += f" for {'assumed' if times['assumed'] else 'described'} times"
        tokens, encodes = plan["prompt_tokens"], plan.get("encodes", False)
        if encodes:
            ms = plan["predicted_ms_per_pass"]
            each = f"{1e3 * tokens / ms:.0f} tokens/s one after the other"
            speed = f"{ms:.2f} ms for texts of {tokens} tokens in one pass ({each})"
        else:
            ms = plan["predicted_ms_per_token"]
            speed = f"{ms:.2f} ms per token ({1e3 / ms:.1f} tokens/s)"
        self.out.print(
            f"predicted: {speed}, proven {proof} "
            f"by {plan['proof']['solver']} in {plan['proof']['solve_s']:.2f} s",
            soft_wrap=True,
        )
        if tokens and not encodes:
            self.out.print(
                f"predicted: {plan['predicted_prompt_s']:.3g} s for a prompt of {tokens} tokens,"
                f" its first token after {plan['predicted_first_token_s']:.3g} s",
                soft_wrap=True,
            )
        if times is not None:
            self.out.print(f"times: {escape(times['text'])}", soft_wrap=True)
        if plan["slots"] > 1 and not encodes:
            self.out.print(
                f"predicted for {plan['slots']} sequences at once: "
                f"{plan['predicted_tokens_per_s']:.1f} tokens/s in all"
            )
        self.noise(noise)

    def models(self, models: Sequence[Mapping[str, Any]]) -> None:
        """Print the models that are loaded or being loaded."""
        if not models:
            self.out.print("no model is loaded")
        for model in models:
            if "stages" in model:
                self._deployment(model)
            else:
                self.out.print(escape(_state_line(model)), soft_wrap=True)
            if model["reason"]:
                self.out.print(f"[red]{escape(model['reason'])}[/]")

    def events(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Print the coordinator's last events, oldest first."""
        if self.json_output:
            self.json({"events": list(events)})
        elif not events:
            self.out.print("nothing has happened yet")
        else:
            table = Table(box=None, pad_edge=False, show_header=False)
            for event in events:
                when = datetime.fromtimestamp(event["time_s"]).astimezone()
                table.add_row(
                    f"{when:%Y-%m-%d %H:%M:%S}.{when.microsecond // 1000:03d}",
                    *(escape(event[column]) for column in ("kind", "subject", "text")),
                )
            self.table(table)

    def _deployment(self, model: Mapping[str, Any]) -> None:
        """Print a model with its stages."""
        table = titled_table(_state_line(model))
        table.add_column("device")
        pace = "ms a pass" if model["plan"].get("encodes") else "ms a token"
        for column in ("blocks", "memory", "fetched", "load s", pace):
            table.add_column(column, justify="right")
        shared = []
        for stage, planned in zip(model["stages"], model["plan"]["stages"], strict=True):
            first, last = planned["first"], planned["first"] + len(planned["bits"])
            members = stage.get("members", ())  # Older coordinators know no teams.
            name = "+".join(member["device"] for member in members) or stage["device"]
            table.add_row(escape(name), rf"\[{first}, {last})", *_load_figures(stage))
            for member in members:
                share = f"{model['plan']['shares'][member['device']]:.0%} of each"
                table.add_row(f"  {escape(member['device'])}", share, *_load_figures(member))
            if members:
                line = f"{name} share blocks {max(first, 1)}..{last - 1}"
                line += f", with sums at {planned['sum_bits']} bits"
                if measured := planned.get("measured_sum"):
                    line += f" of {measured['row_s'] * 1e3:.2f} ms, measured"
                shared.append(line)
        self.table(table)
        for line in [*shared, *model.get("weights", ()), *model.get("slow", ())]:
            self.out.print(escape(line), soft_wrap=True)
        for line in [use_text(model), wishes_text(model)]:
            if line:
                self.out.print(escape(line), soft_wrap=True)
        self.draft(model)
        if not model["plan"].get("encodes"):
            self.sampling_defaults(model)

    def draft(self, model: Mapping[str, Any]) -> None:
        """Print the draft model, and how much it helps: as counted so far, or as assumed."""
        draft = model.get("draft")  # Older coordinators know none.
        if not draft:
            return
        if draft["device"] is None:
            line = f"draft model: {draft['model']} is not loaded, for lack of room; answers go on"
            self.out.print(escape(line), soft_wrap=True)
            return
        share = f"{draft['acceptance']:.0%} of guesses right"
        if draft["acceptance_is"] == "measured":
            share += f" (measured, {draft['checked_tokens']} checked)"
        else:
            share += " (assumed, none measured yet)"
        self.out.print(
            escape(
                f"draft model: {draft['model']} at {draft['bits']} bits on {draft['device']}, "
                f"{format_size(draft['memory_bytes'])}; {draft['token_s'] * 1e3:.2f} ms a guess "
                f"(predicted), {share}: {draft['predicted_gain']:.2f} times the tokens per second "
                "(predicted)"
            ),
            soft_wrap=True,
        )

    def sampling_defaults(self, model: Mapping[str, Any]) -> None:
        """Print what requests take that do not say how to draw tokens, if the model says it."""
        values = model.get("sampling_defaults") or {}  # Older coordinators do not send them.
        if values:
            words = (f"{name.replace('_', ' ')} {value:g}" for name, value in values.items())
            self.out.print(f"requests take, unless they say: {', '.join(words)}", soft_wrap=True)


def _load_figures(loaded: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Memory, fetched bytes, load seconds and measured pace of a stage or of a member's part."""
    sizes = format_size(loaded["memory_bytes"]), format_size(loaded["fetched_bytes"])
    token_s = loaded.get("token_s")
    return (*sizes, f"{loaded['load_s']:.2f}", "" if token_s is None else f"{token_s * 1e3:.2f}")


def _add_stage(table: Table, plan: Mapping[str, Any], index: int, noisy: set[str]) -> None:
    """Add the rows of one stage: its device or team, its sums, and the hop behind it."""
    from planning.plan import bits_text

    stage = plan["stages"][index]
    blocks = [item for item in plan["blocks"] if item["device"] == stage["device"]]
    names = [item["name"] for item in blocks]
    members = stage.get("members", ())
    device = escape(stage["device"]) + (NOISY if stage["device"] in noisy else "")
    table.add_row(
        f"team of {len(members)}" if members else device,
        names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}",
        bits_text([item["bits"] for item in blocks]),
        format_size(stage["memory_bytes"]),
        format_size(stage["memory_limit_bytes"]),
        f"{stage['compute_s'] * 1e3:.2f}",
    )
    for member in members:
        _add_member(table, member, plan["shares"], noisy)
    if members:
        sums_ms = f"{stage['sums_s'] * 1e3:.2f}"
        table.add_row("  sums", "", str(stage["sum_bits"]), "", "", sums_ms)
    if measured := stage.get("measured_sum"):
        layers = sum(name.startswith("layer") for name in names)
        seconds = _SUMS_PER_LAYER * layers * measured["row_s"]
        table.add_row("  sums, measured", "", "", "", "", f"{seconds * 1e3:.2f}")
    if index < len(plan["hops"]):
        hop_ms = f"{plan['hops'][index]['seconds'] * 1e3:.2f}"
        table.add_row("  hop", "", str(stage.get("hop_bits") or ""), "", "", hop_ms)


def _add_member(
    table: Table, member: Mapping[str, Any], shares: Mapping[str, float], noisy: set[str]
) -> None:
    """Add a row for a member of a team, below the row of its stage."""
    name = member["device"]
    table.add_row(
        f"  {escape(name)}" + (NOISY if name in noisy else ""),
        f"{shares[name]:.0%} of each layer",
        "",
        format_size(member["memory_bytes"]),
        format_size(member["memory_limit_bytes"]),
        f"{member['compute_s'] * 1e3:.2f}",
    )


def use_text(model: Mapping[str, Any]) -> str:
    """The use of a model now: sequences by their classes, or requests with texts."""
    slots = model.get("slots")
    if slots is None:
        count = model["requests"]
        passes = [stage for stage in model["stages"] if stage.get("pass_s")]
        mean = f"; {passes[0]['pass_tokens']:.0f} tokens a pass so far" if passes else ""
        return f"requests with texts: {count} now{mean}"
    # An older coordinator tells no classes.
    classes = ", ".join(f"{count} {name}" for name, count in slots.get("classes", {}).items())
    line = f"sequences: {slots['used']} of {slots['total']} slots in use"
    line += f" ({classes})" if classes else ""
    return line + (f", {slots['waiting']} in line" if slots["waiting"] else "")


def wishes_text(model: Mapping[str, Any]) -> str:
    """The wishes of a model's load beside its plan, or empty."""
    found = []
    if model.get("keep_s") is not None:
        found.append(f"unloaded after {_duration(model['keep_s'])} without a request")
    if model.get("weight", 1.0) != 1.0:
        found.append(f"weight {model['weight']:g} on shared devices")
    if together := model.get("together"):
        parts = ", ".join(f"{name} {weight:g}" for name, weight in together.items())
        found.append(f"planned together by requests: {parts}")
    return "; ".join(found)


def _duration(seconds: float) -> str:
    return f"{seconds:g} s" if seconds < 120 else f"{seconds / 60:g} min"


def _state_line(model: Mapping[str, Any]) -> str:
    """The state of a model in words, such as "tiny-opt: resuming, waiting for pi-1"."""
    line = f"{model['model']}: {model['state']}"
    if model["waiting_for"]:
        line += f", waiting for {', '.join(model['waiting_for'])}"
    if model.get("step"):
        line += f", step {model['step']}"
    return line


def titled_table(title: str) -> Table:
    """An empty table in the style of all commands. ``title`` is plain text."""
    return Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
