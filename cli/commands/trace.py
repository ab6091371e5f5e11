"""``shoal trace``: one request over the devices, as a table, a picture or a Chrome trace."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from rich.markup import escape

from cli.argument_types import count, new_file, svg_file
from cli.commands.trace_views import chrome_trace, hops_of, picture, summary
from cli.parser import add_url_argument
from cli.render import Screen, titled_table

ABOUT = (
    "Devices remember their last passes, so a request can be traced after it ended. Its id is in "
    "the header x-request-id of its answer, and in the coordinator's log. The devices' clocks are "
    "compared over the network. The table says how far they may be off."
)
EXAMPLES = (
    "  shoal trace                     # the last request\n"
    "  shoal trace req-5de88b1f214d436f --svg way.svg\n"
    "  shoal trace --chrome way.json   # for ui.perfetto.dev\n"
)
LAST = "last"


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "request",
        nargs="?",
        default=LAST,
        metavar="REQUEST",
        help="The id of a request. Default: the last one that ran.",
    )
    parser.add_argument(
        "--svg", type=svg_file, metavar="FILE.svg", help="Draw its passes and hops."
    )
    parser.add_argument(
        "--tokens",
        type=count,
        default=8,
        metavar="N",
        help="Draw the prompt and the first N tokens. Default: %(default)s.",
    )
    parser.add_argument(
        "--chrome",
        type=new_file,
        metavar="FILE.json",
        help="Write the whole trace for Chrome's and Perfetto's viewers.",
    )
    add_url_argument(parser)


def run_trace(options: argparse.Namespace, screen: Screen) -> None:
    from cli.client import Client, default_url

    with Client(options.url or default_url()) as client:
        trace = client.get(f"/shoal/v1/trace?request={quote(options.request, safe='')}")
    if options.svg is not None:
        options.svg.write_text(picture(trace, options.tokens), encoding="utf-8")
        screen.note(f"wrote {options.svg}")
    if options.chrome is not None:
        options.chrome.write_text(json.dumps(chrome_trace(trace)), encoding="utf-8")
        screen.note(f"wrote {options.chrome}")
    if screen.json_output:
        screen.json(trace)
    else:
        _show(trace, screen)


def guesses_of(request: Mapping[str, Any]) -> list[str]:
    """Say how many guesses were made and right, by their source; nothing where there were none."""
    drafted, accepted = request.get("drafted_tokens", 0), request.get("accepted_tokens", 0)
    by_model = request.get("model_drafted_tokens", 0), request.get("model_accepted_tokens", 0)
    from_text = drafted - by_model[0], accepted - by_model[1]
    return [
        f"{right} of {made} guesses {source} were right"
        for source, (made, right) in (
            ("from the text", from_text),
            ("by the draft model", by_model),
        )
        if made
    ]


def _show(trace: Mapping[str, Any], screen: Screen) -> None:
    request = trace["request"]
    table = titled_table(f"passes of one row in request {request['id']}, mean ms")
    for column in ("device", "compute", "predicted", "wait", "send", "tokens", "prompt", "clock ±"):
        table.add_column(column, justify="left" if column == "device" else "right", no_wrap=True)
    hops = hops_of(trace)
    for index, stage in enumerate(trace["stages"]):
        row = summary(stage)
        table.add_row(
            escape(stage["device"]),
            *(
                _ms(value)
                for value in (
                    row.compute_s,
                    1e-3 * stage["predicted_token_ms"],
                    row.waited_s,
                    row.sending_s,
                )
            ),
            str(row.tokens),
            _ms(row.prompt_s),
            _ms(stage["clock_error_s"]),
        )
        if len(trace["stages"]) > 1:
            predicted_s = 1e-3 * trace["predicted_hops_ms"][index]
            name = "token return" if index == len(trace["stages"]) - 1 else "hop"
            table.add_row(f"  {name}", _ms(hops[index]), _ms(predicted_s), *[""] * 5)
    screen.table(table)
    first = request["first_token_s"]
    parts = [
        f"{request['prompt_tokens']} prompt tokens",
        f"{request['answer_tokens']} tokens",
        f"took {request['age_s']:.3f} s",
    ]
    parts += guesses_of(request)
    if first is not None:
        parts.insert(1, f"first token after {first:.3f} s")
    screen.out.print("; ".join(parts), soft_wrap=True)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.2f}"
