"""Figures, picture and Chrome trace of one request's passes, as the coordinator describes them.

Times are seconds since the request arrived. A hop lies between the end of a pass on one device and
the arrival of its rows on the next. The last device's token goes to the first device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from planning.insight.picture import Drawing

Pass = Mapping[str, Any]
Trace = Mapping[str, Any]

_COMPUTE, _WAIT, _SEND, _HOP, _PALE = "#1d4ed8", "#fbbf24", "#15803d", "#6b7280", "#6b7280"
_LANE, _BAR, _LEFT, _RIGHT, _TOP, _WIDTH = 64, 22, 130, 44, 84, 1000


@dataclass(frozen=True, slots=True)
class Summary:
    """Means over a stage's passes of one row, in seconds; None without any.

    prompt_s: the compute of all passes with more rows.
    """

    compute_s: float | None
    waited_s: float | None
    sending_s: float | None
    tokens: int
    prompt_s: float


def summary(stage: Mapping[str, Any]) -> Summary:
    single = [item for item in stage["passes"] if item["rows"] == 1]
    prompt_s = sum(
        item["computed_s"] - item["started_s"] for item in stage["passes"] if item["rows"] > 1
    )

    def mean(begin: str, end: str) -> float | None:
        return fmean(item[end] - item[begin] for item in single) if single else None

    return Summary(
        mean("started_s", "computed_s"),
        mean("arrived_s", "started_s"),
        mean("computed_s", "sent_s"),
        len(single),
        prompt_s,
    )


def hops_of(trace: Trace) -> list[float | None]:
    """The mean seconds of each stage's hop to the next, for passes of one row."""
    ways = _ways(trace["stages"])
    found: list[list[float]] = [[] for _ in trace["stages"]]
    for index, before, after in ways:
        if before["rows"] == 1:
            found[index].append(after["arrived_s"] - before["computed_s"])
    return [fmean(seconds) if seconds else None for seconds in found]


def _ways(stages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Pass, Pass]]:
    """Each way of rows from a stage: its index, the pass before the hop, and the one after it."""
    for index, stage in enumerate(stages):
        is_last = index == len(stages) - 1
        target = stages[(index + 1) % len(stages)]
        arrived = {(item["sequence"], item["position"]): item for item in target["passes"]}
        for item in stage["passes"]:
            # A token is the row behind the rows that it was sampled from.
            position = item["position"] + (item["rows"] if is_last else 0)
            after = arrived.get((item["sequence"], position))
            if after is not None and len(stages) > 1:
                yield index, item, after


def chrome_trace(trace: Trace) -> dict[str, Any]:
    """The trace in Chrome's format: a process for each device, times in microseconds."""
    events: list[dict[str, Any]] = []
    for index, stage in enumerate(trace["stages"]):
        events.append(
            {"ph": "M", "name": "process_name", "pid": index, "args": {"name": stage["device"]}}
        )
        for item in stage["passes"]:
            for name, begin, end in (
                ("wait", "arrived_s", "started_s"),
                ("compute", "started_s", "computed_s"),
                ("send", "computed_s", "sent_s"),
            ):
                events.append(
                    {
                        "ph": "X",
                        "name": name,
                        "pid": index,
                        "tid": 0 if name != "wait" else 1,
                        "ts": 1e6 * item[begin],
                        "dur": 1e6 * (item[end] - item[begin]),
                        "args": {key: item[key] for key in ("position", "rows", "together")},
                    }
                )
    for number, (index, before, after) in enumerate(_ways(trace["stages"])):
        ends = (
            ("s", index, before["computed_s"]),
            ("f", (index + 1) % len(trace["stages"]), after["arrived_s"]),
        )
        for phase, process, time_s in ends:
            events.append(
                {
                    "ph": phase,
                    "bp": "e",
                    "name": "hop",
                    "cat": "hop",
                    "id": number,
                    "pid": process,
                    "tid": 0,
                    "ts": 1e6 * time_s,
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": trace["request"]}


def picture(trace: Trace, tokens: int) -> str:
    """Draw the prompt and the first ``tokens`` tokens as SVG: a lane for each device."""
    stages = trace["stages"]
    begin_s: float = min(item["arrived_s"] for stage in stages for item in stage["passes"])
    end_s = _end_of(stages, tokens)
    scale = (_WIDTH - _LEFT - _RIGHT) / max(end_s - begin_s, 1e-6)

    def x(time_s: float) -> float:
        return _LEFT + scale * (min(time_s, end_s) - begin_s)

    height = _TOP + _LANE * len(stages) + 44
    drawing = Drawing(_WIDTH, height, f"request {trace['request']['id']}")
    drawing.words(24, 30, f"Request {trace['request']['id']}", size=16, bold=True)
    drawing.words(24, 50, _caption(trace, tokens), fill=_PALE)
    _legend(drawing)
    for index, stage in enumerate(stages):
        middle = _TOP + _LANE * index + _LANE / 2
        drawing.words(_LEFT - 12, middle + 4, stage["device"][:16], anchor="end")
        drawing.path([(_LEFT, middle), (_WIDTH - _RIGHT, middle)], stroke="#e5e7eb", width=1)
    for index, before, after in _ways(stages):
        if after["arrived_s"] <= end_s:
            target = (index + 1) % len(stages)
            lanes = [_TOP + _LANE * lane + _LANE / 2 for lane in (index, target)]
            points = [(x(before["computed_s"]), lanes[0]), (x(after["arrived_s"]), lanes[1])]
            drawing.path(points, stroke=_HOP, width=1, opacity=0.7)
    for index, stage in enumerate(stages):
        top = _TOP + _LANE * index + (_LANE - _BAR) / 2
        for item in stage["passes"]:
            if item["started_s"] < end_s:
                _draw_pass(drawing, x, top, item)
    _axis(drawing, x, begin_s, end_s, height)
    return drawing.text()


def _end_of(stages: Sequence[Mapping[str, Any]], tokens: int) -> float:
    """When the pass of the token number ``tokens`` ends on the last stage."""
    passes = stages[-1]["passes"]
    single = [item for item in passes if item["rows"] == 1]
    last: Pass = single[min(tokens, len(single)) - 1] if single else passes[-1]
    end_s: float = last["sent_s"]
    return end_s


def _caption(trace: Trace, tokens: int) -> str:
    shown = min(tokens, trace["request"]["answer_tokens"])
    error_ms = 1e3 * max(stage["clock_error_s"] for stage in trace["stages"])
    return (
        f"{trace['request']['prompt_tokens']} prompt tokens and the first {shown} tokens; "
        f"measured; clocks of devices may be off by {error_ms:.2f} ms"
    )


def _legend(drawing: Drawing) -> None:
    at = _LEFT
    for colour, text in ((_WAIT, "wait"), (_COMPUTE, "compute"), (_SEND, "send"), (_HOP, "hop")):
        drawing.box(at, 62, 12, 12, fill=colour)
        drawing.words(at + 18, 72, text, size=11, fill=_PALE)
        at += 80


def _draw_pass(drawing: Drawing, x: Callable[[float], float], top: float, item: Pass) -> None:
    about = f"position {item['position']}, {item['rows']} rows, {item['together']} together"
    for colour, begin, end in (
        (_WAIT, "arrived_s", "started_s"),
        (_COMPUTE, "started_s", "computed_s"),
        (_SEND, "computed_s", "sent_s"),
    ):
        left, right = x(item[begin]), x(item[end])
        hint = f"{about}: {1e3 * (item[end] - item[begin]):.3f} ms"
        if right - left > 0.05:
            height = _BAR if colour != _WAIT else _BAR / 3
            drawing.box(left, top, right - left, height, fill=colour, hint=hint)


def _axis(
    drawing: Drawing, x: Callable[[float], float], begin_s: float, end_s: float, height: float
) -> None:
    for part in range(6):
        time_s = begin_s + part * (end_s - begin_s) / 5
        drawing.words(x(time_s), height - 16, f"{1e3 * time_s:.2f} ms", size=11, anchor="middle")
