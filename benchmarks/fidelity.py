"""Compares predictions of many plans with measurements, on emulated hosts of different speed.

    make bench-fidelity
    python -m benchmarks.fidelity --only chosen,uniform --again --json
    python -m benchmarks.fidelity --teams

Four hosts have CPU quotas and links of their own (testbed/). Their agents measure themselves inside
their quota, and the links between them. The model has random weights; two plans have the embedded
model instead. Each plan is loaded and run a few times. Its prediction is compared with the time
that a prompt took (by the gateway), the time to the first token (by the client), and a token's time
with 1, 4 and 8 answers at once. In some of the plans, teams of devices share layers. Of those the
sum over the team is compared, too: predicted from links and profiles, and measured over the team's
own connections once it is loaded.

There are several passes, and each makes its plans from new measurements. A shared machine's speed
drifts, so only predictions and measurements of the same time can be compared. Results are kept in
--state and are not measured again, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.busy_hosts import await_rest
from benchmarks.random_model import Shape, make_model
from calibration.machine import processor_name
from cli.client import Client
from cli.commands.demo import EMBEDDED_MODEL
from cli.errors import CommandFailed
from model import costs
from model.families import load_spec
from model.quantize import Format
from model.spec import ModelSpec
from planning.forecast import decode_tokens_per_s
from planning.plan import Plan, Stage
from testbed.bed import Testbed
from testbed.cluster import Cluster
from testbed.lab import AgentSettings
from testbed.network import HUB, Host, Link, Network
from wire import limits

STATE = Path("/var/tmp/shoal-fidelity")  # noqa: S108 - a fixed place, so that a run can continue

SHAPE = Shape(hidden=3072, ffn=8192, layers=24, heads=24)
"""A model of 2.4 billion weights. A stage then outlasts the full-speed part of a quota."""
CONTEXT_TOKENS = 512
WIDTHS = (4, 8)
PROMPT_TOKENS = 64
OUTPUT_TOKENS = 13
STREAMS = (1, 4, 8)
"""Answers at once. Slots are as many as the most of them."""
STREAM_TOKENS = 16
SEED = 7

EMBEDDED_CONTEXT_TOKENS = 256
EMBEDDED_TOKENS = 128
"""Its tokens take about a millisecond, so more of them are generated."""

CPU_PERCENT = {"ash": 60, "birch": 45, "cedar": 30, "dogwood": 20}
TIGHT_SHARE = {"ash": 0.40, "birch": 0.32, "cedar": 0.36, "dogwood": 0.30}
"""Each host's share of the model's bytes at 8 bits.

No host holds the model, any three do, and memory says nothing about speed.
"""

ROOMY_SHARE = 1.5

WIRED = Link(0.2e-3, 125e6)
FAST = Link(0.4e-3, 12.5e6)
RADIO = Link(2.5e-3, 5e6)
SLOW_HOST = "dogwood"
NAMES = tuple(CPU_PERCENT)
REQUEST = {"kind": "request", "prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS}
BASELINES = ("uniform", "RAM-proportional", "greedy", "single fastest")


@dataclass(frozen=True, slots=True)
class Case:
    """One plan. ``split`` None lets the planner choose; ``memory`` names the agents' limits.

    teams: the devices that share layers, "ash+birch" each. Without ``others``, devices outside the
        teams run nothing.
    embedded: whether it is a plan of the embedded model.
    """

    name: str
    memory: str
    bits: tuple[int, ...]
    wishes: Mapping[str, Any] = field(default_factory=dict)
    split: Callable[[ModelSpec, Sequence[str]], Mapping[int, str]] | None = None
    teams: tuple[str, ...] = ()
    others: bool = False
    embedded: bool = False

    def of_planner(self) -> dict[str, Any]:
        """Return the wishes of a request for this plan, but for pins."""
        if not self.teams:
            return dict(self.wishes)
        teams = [team.split("+") for team in self.teams]
        used = {name for team in teams for name in team}
        outside = [name for name in NAMES if name not in used]
        return {**self.wishes, "teams": teams} | ({} if self.others else {"exclude": outside})


def main() -> None:
    options = _arguments()
    spec = make_model(options.state / "model", SHAPE, CONTEXT_TOKENS)
    embedded = load_spec(EMBEDDED_MODEL)
    results = Results(options.state / "results.json", again=options.again)
    cases = [
        case
        for case in CASES
        if (not options.only or case.name in options.only) and (case.teams or not options.teams)
    ]
    for number in range(options.passes):
        todo = [case for case in cases if len(results.of(case)) <= number]
        if len(todo) == len(cases):
            forget_calibration(options.state)
        for memory in dict.fromkeys(case.memory for case in todo):
            with cluster(options.state, spec, memory) as (bed, client, fastest):
                for case in (case for case in todo if case.memory == memory):
                    say(f"pass {number + 1} of {options.passes}, {case.name}: planning and loading")
                    first = next(iter(results.of(case)), None)
                    whose = embedded if case.embedded else spec
                    results.add(case, run(bed, client, case, whose, options, fastest, first))
    report([summarised(results.of(case)) for case in cases], as_json=options.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Predicted and measured times of many plans on emulated hosts; needs root.",
        epilog="example: python -m benchmarks.fidelity --only chosen,uniform --again",
    )
    parser.add_argument("--state", type=Path, default=STATE, metavar="DIR", help=f"default {STATE}")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="A,B", help="plans")
    parser.add_argument("--teams", action="store_true", help="only plans with teams")
    parser.add_argument("--again", action="store_true", help="measure anew what is in --state")
    parser.add_argument("--passes", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        metavar="N",
        help="generations per plan and pass, default 3",
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


class Results:
    """The measurements of each pass and plan, on disk."""

    def __init__(self, path: Path, *, again: bool) -> None:
        self._path = path
        self._rows: dict[str, list[dict[str, Any]]] = {}
        if path.exists() and not again:
            self._rows = json.loads(path.read_text())

    def of(self, case: Case) -> list[dict[str, Any]]:
        return self._rows.get(case.name, [])

    def add(self, case: Case, row: dict[str, Any]) -> None:
        self._rows.setdefault(case.name, []).append(row)
        self._path.write_text(json.dumps(self._rows, indent=1))


# ---- the hosts ----------------------------------------------------------------------------------


def network() -> Network:
    """Return three wired hosts, one of them behind a 100 Mbit port, and one on radio."""
    links = {(a, b): WIRED for a in NAMES for b in NAMES if a != b}
    for name in NAMES:
        if name not in ("cedar", SLOW_HOST):
            links[name, "cedar"] = links["cedar", name] = FAST
        if name != SLOW_HOST:
            links[name, SLOW_HOST] = links[SLOW_HOST, name] = RADIO
    for name in NAMES:
        links[HUB, name] = links[name, HUB] = Link()
    hosts = {HUB: Host()} | {name: Host(cpu_percent=CPU_PERCENT[name]) for name in NAMES}
    return Network(hosts, links, None)


def memory_bytes(spec: ModelSpec, memory: str) -> dict[str, int]:
    """Return each agent's limit: TIGHT_SHARE of the model at 8 bits, or more than enough."""
    blocks = range(spec.block_count)
    total = sum(
        costs.executed_bytes(spec, block, Format.of(8), 8)
        + max(STREAMS) * costs.kv_bytes(spec, block, CONTEXT_TOKENS)
        for block in blocks
    )
    rows = limits.PREFILL_CHUNK_TOKENS
    buffers = costs.stage_buffer_bytes(spec, blocks, rows, CONTEXT_TOKENS)
    shares = TIGHT_SHARE if memory == "tight" else dict.fromkeys(NAMES, ROOMY_SHARE)
    return {name: buffers + int(share * total) for name, share in shares.items()}


def forget_calibration(state: Path) -> None:
    """Make agents measure themselves again."""
    for path in (state / "hosts").glob("*/calibration.json"):
        path.unlink()


@contextmanager
def cluster(
    state: Path, spec: ModelSpec, memory: str
) -> Iterator[tuple[Testbed, Client, list[str]]]:
    """Start a coordinator and agents; yield its API, and the hosts from fast to slow."""
    with Testbed(network(), "fidelity") as bed:
        shoal = Cluster(bed, state / "hosts")
        shoal.start_coordinator()
        with Client(shoal.open_door(0)) as client:
            for count, (name, limit) in enumerate(memory_bytes(spec, memory).items(), start=1):
                shoal.start_agent(name, AgentSettings(limit, 8 << 30))
                shoal.wait_for_agents(NAMES[:count])
                say(f"{name}: calibrating")
                # Agents join one at a time. Real hosts share nothing, but these share cores. The
                # plan only makes the new agent measure itself and its links.
                with suppress(CommandFailed):
                    client.operate("/shoal/v1/plan", request(state, WIDTHS), lambda step: None)
            yield bed, client, sorted(NAMES, key=lambda name: -CPU_PERCENT[name])


# ---- plans ---------------------------------------------------------------------------------------


def _in_shares(spec: ModelSpec, shares: Mapping[str, float]) -> dict[int, str]:
    """Split layers in proportion to ``shares``; embedding with the first, head with the last."""
    total, names = sum(shares.values()), list(shares)
    ends, run = [], 0.0
    for name in names:
        run += shares[name]
        ends.append(round(run / total * len(spec.layers)))
    pins: dict[int, str] = {}
    begin = 0
    for name, end in zip(names, ends, strict=True):
        pins |= dict.fromkeys(range(1 + begin, 1 + end), name)
        begin = end
    return {0: pins[1], **pins, spec.head_block: pins[len(spec.layers)]}


def uniform(spec: ModelSpec, fastest: Sequence[str]) -> dict[int, str]:
    return _in_shares(spec, dict.fromkeys(NAMES, 1.0))


def by_memory(spec: ModelSpec, fastest: Sequence[str]) -> dict[int, str]:
    return _in_shares(spec, TIGHT_SHARE)


def greedy(spec: ModelSpec, fastest: Sequence[str]) -> dict[int, str]:
    """Fill the fastest host, then the next, whatever the links are."""
    room = memory_bytes(spec, "tight")
    buffers = costs.stage_buffer_bytes(
        spec, range(spec.block_count), limits.PREFILL_CHUNK_TOKENS, CONTEXT_TOKENS
    )
    pins: dict[int, str] = {}
    hosts = iter(fastest)
    name, left = "", 0
    for block in range(spec.block_count):
        size = costs.executed_bytes(spec, block, Format.of(8), 8)
        size += max(STREAMS) * costs.kv_bytes(spec, block, CONTEXT_TOKENS)
        while size > left:
            name = next(hosts)
            left = room[name] - buffers
        pins[block] = name
        left -= size
    return pins


def single(spec: ModelSpec, fastest: Sequence[str]) -> dict[int, str]:
    return dict.fromkeys(range(spec.block_count), fastest[0])


def backwards(spec: ModelSpec, fastest: Sequence[str]) -> dict[int, str]:
    """Cross the radio link twice, and put the fastest host last."""
    return _in_shares(spec, {"cedar": 2.0, SLOW_HOST: 1.0, "ash": 3.0})


def three(spec: ModelSpec, fastest: Sequence[str]) -> dict[int, str]:
    """Split layers between the three hosts that have no radio."""
    return _in_shares(spec, {name: 1.0 for name in NAMES if name != SLOW_HOST})


def last_alone(spec: ModelSpec, fastest: Sequence[str]) -> dict[int, str]:
    """Put the last layers and the head on one host; the others are the planner's."""
    layers = range(1 + len(spec.layers) * 2 // 3, spec.head_block + 1)
    return dict.fromkeys(layers, "cedar")


CASES = (
    Case("chosen", "tight", (8,)),
    Case("uniform", "tight", (8,), split=uniform),
    Case("RAM-proportional", "tight", (8,), split=by_memory),
    Case("greedy", "tight", (8,), split=greedy),
    Case("throughput", "tight", (8,), {"objective": {"kind": "throughput"}}),
    Case("request", "tight", (8,), {"objective": REQUEST}),
    Case("4 bits", "tight", (4,), {"pins": {"0": "birch"}}),
    Case("single fastest", "roomy", (8,), split=single),
    Case("without ash", "roomy", (8,), {"exclude": ["ash"]}),
    Case("over radio", "roomy", (8,), split=backwards),
    Case("embedded on one host", "roomy", (8,), split=single, embedded=True),
    Case("embedded on three hosts", "roomy", (8,), split=three, embedded=True),
    Case("team of two", "roomy", (8,), teams=("ash+birch",)),
    Case("team at 4 bits", "roomy", (4,), teams=("ash+birch",)),
    Case("uneven team", "roomy", (8,), teams=("ash+cedar",)),
    Case("team of three", "roomy", (8,), teams=("ash+birch+cedar",)),
    Case("team of four", "roomy", (8,), teams=("ash+birch+cedar+dogwood",)),
    Case("team over radio", "roomy", (8,), teams=("birch+dogwood",)),
    Case("two teams", "roomy", (8,), teams=("ash+birch", "cedar+dogwood")),
    Case(
        "team and cedar",
        "roomy",
        (8,),
        {"exclude": [SLOW_HOST]},
        last_alone,
        teams=("ash+birch",),
        others=True,
    ),
)


def run(
    bed: Testbed,
    client: Client,
    case: Case,
    spec: ModelSpec,
    options: argparse.Namespace,
    fastest: Sequence[str],
    first: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Load a case's plan and measure it. Later passes use the plan of the ``first`` one."""
    wishes = case.of_planner()
    if first is not None:
        wishes["teams"] = first.get("teams", [])
        wishes["pins"] = {
            str(at): name
            for name, begin, bits in first["stages"]
            for at in range(begin, begin + len(bits))
        }
    elif case.split is not None:
        wishes["pins"] = {str(block): name for block, name in case.split(spec, fastest).items()}
    body = {**request(options.state, case.bits), "slots": max(STREAMS), **wishes}
    if case.embedded:
        body |= {"model": str(EMBEDDED_MODEL), "context_tokens": EMBEDDED_CONTEXT_TOKENS}
    described = client.operate("/shoal/v1/load", body, lambda step: None)["plan"]
    await_rest(bed, NAMES)
    say(f"{case.name}: measuring")
    generate(client, 2, 8)
    measured: dict[str, list[float]] = {name: [] for name in FIGURES}
    for _ in range(options.rounds):
        timing = generate(client, EMBEDDED_TOKENS if case.embedded else OUTPUT_TOKENS)
        measured["prompt_ms"].append(1e3 * PROMPT_TOKENS / timing["prefill_tokens_per_s"])
        measured["first_token_ms"].append(1e3 * first_token_s(client))
        measured[token_ms(1)].append(1e3 / timing["decode_tokens_per_s"])
        for count in STREAMS[1:]:
            tokens = EMBEDDED_TOKENS if case.embedded else STREAM_TOKENS
            measured[token_ms(count)].append(1e3 * together_s(client, count, tokens))
    client.post("/shoal/v1/unload", {})
    plan = plan_of(described)
    first_ms = 1e3 * plan.first_token_s(PROMPT_TOKENS)
    return {
        "plan": case.name,
        "memory": case.memory,
        "stages": [[s["device"], s["first"], s["bits"]] for s in described["stages"]],
        "teams": [
            [one["device"] for one in s["members"]] for s in described["stages"] if s.get("members")
        ],
        "sums": [sum_figures(s) for s in described["stages"] if s.get("members")],
        "predicted": {"prompt_ms": first_ms, "first_token_ms": first_ms}
        | {token_ms(count): 1e3 * count / decode_tokens_per_s(plan, count) for count in STREAMS},
        "measured": measured,
    }


def plan_of(described: Mapping[str, Any]) -> Plan:
    """Return the plan in what the API says of it."""
    fields = {name: described[name] for name in Plan.__dataclass_fields__ if name in described}
    own = Stage.__dataclass_fields__
    stages = [{key: value for key, value in s.items() if key in own} for s in fields["stages"]]
    return Plan.from_dict({**fields, "stages": stages})


def token_ms(streams: int) -> str:
    """Return the name of the figure: milliseconds between two tokens of each of these answers."""
    return f"token_ms_at_{streams}"


FIGURES = ("prompt_ms", "first_token_ms", *map(token_ms, STREAMS))


def sum_figures(stage: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of one sum of one row over a team: predicted, and measured if it was.

    A team that has only the head adds nothing up. Its predicted sum is 0.
    """
    layers = len(stage["bits"]) - (stage["first"] == 0)
    layers -= int(stage["hop_bits"] is None)
    measured = stage.get("measured_sum") or {}
    return {"predicted_s": stage["sums_s"] / max(2 * layers, 1)} | (
        {"measured_s": measured["row_s"]} if "row_s" in measured else {}
    )


def request(state: Path, bits: Sequence[int]) -> dict[str, Any]:
    """Return the request for a plan of the model at these widths, without other wishes."""
    return {
        "model": str((state / "model").absolute()),
        "bits": list(bits),
        "max_weight_error": None,
        "context_tokens": CONTEXT_TOKENS,
    }


def generate(
    client: Client, tokens: int, prompt_tokens: int = PROMPT_TOKENS, seed: int = SEED
) -> dict[str, Any]:
    """Run one generation, and return its own figures."""
    random = np.random.default_rng(seed)
    body = {
        "prompt": random.integers(0, 256, prompt_tokens).tolist(),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "cache_prompt": False,
        "speculative.n_max": 0,  # A plan predicts passes of one row.
    }
    account: dict[str, Any] = {}
    with closing(client.stream("/v1/completions", body)) as events:
        for event in events:
            account = event.get("shoal") or account
    return account


def first_token_s(client: Client) -> float:
    """Return the seconds of an answer of one token, as the client sees them."""
    began_s = time.perf_counter()
    generate(client, 1)
    return time.perf_counter() - began_s


def together_s(client: Client, count: int, tokens: int) -> float:
    """Return the seconds between two tokens of each of ``count`` answers that run at once."""

    def one(seed: int) -> float:
        with Client(client.url) as own:
            return float(generate(own, tokens, 1, seed)["decode_tokens_per_s"])

    with ThreadPoolExecutor(count) as pool:
        return 1 / statistics.fmean(pool.map(one, range(SEED, SEED + count)))


def summarised(passes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a row of the table: medians over a plan's passes, also of the errors."""
    row: dict[str, Any] = {**passes[0], "passes": len(passes), "figures": {}}
    for name in FIGURES:
        predicted = [item["predicted"][name] for item in passes]
        measured = [statistics.median(item["measured"][name]) for item in passes]
        errors = [p / m - 1 for p, m in zip(predicted, measured, strict=True)]
        row["figures"][name] = {
            "predicted": statistics.median(predicted),
            "measured": statistics.median(measured),
            "all_measured": [item["measured"][name] for item in passes],
            "all_errors": errors,
            "error": statistics.median(errors),
        }
    sums = [item.get("sums", []) for item in passes]
    row["sums"] = [
        {
            name: statistics.median(one[name] for one in team)
            for name in team[0]
            if all(name in one for one in team)
        }
        for team in zip(*sums, strict=False)
    ]
    return row


def report(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """Print the table, or all measurements as JSON."""
    token = token_ms(1)
    chosen = next((row for row in rows if row["plan"] == "chosen"), None)
    ratios = {
        row["plan"]: row["figures"][token]["measured"] / chosen["figures"][token]["measured"]
        for row in rows
        if chosen is not None and row["plan"] in BASELINES
    }
    with_teams = [row for row in rows if row.get("teams")]
    without = [row for row in rows if not row.get("teams")]
    summary = {
        of: {
            name: {
                "median": statistics.median(abs(row["figures"][name]["error"]) for row in counted),
                "worst": max(abs(row["figures"][name]["error"]) for row in counted),
            }
            for name in FIGURES
        }
        for of, counted in (("devices alone", without), ("with teams", with_teams))
        if counted
    }
    if as_json:
        machine = {"machine": processor_name(), "date": date.today().isoformat()}
        print(json.dumps(machine | {"rows": rows, "summary": summary, "ratios": ratios}))
        return
    table = Table(title=f"{processor_name()}, {date.today()}", title_justify="left")
    for column in ("plan", "stages"):
        table.add_column(column, no_wrap=True)
    for name in FIGURES:
        table.add_column(f"{name.replace('_', ' ')}\nmeasured, predicted, error", no_wrap=True)
    for row in rows:
        table.add_row(
            row["plan"],
            "\n".join(
                f"{_who(row, device)} {len(bits)} @ {'/'.join(map(str, sorted(set(bits))))}"
                for device, _, bits in row["stages"]
            ),
            *(
                f"{one['measured']:.4g}, {one['predicted']:.4g}\n{_with_range(one['all_errors'])}"
                for one in row["figures"].values()
            ),
        )
    console = Console(width=max(Console().width, 180))
    console.print(table)
    for of, errors in summary.items():
        for name, error in errors.items():
            text = f"median {error['median']:.1%}, worst {error['worst']:.1%}"
            console.print(f"{of}, {name.replace('_', ' ')}: {text}")
    for row in with_teams:
        for team, figures in zip(row["teams"], row["sums"], strict=False):
            who = "+".join(team)
            console.print(f"{row['plan']}: a sum of one row over {who}: {sums_text(figures)}")
    for name, ratio in ratios.items():
        console.print(f"{name}: {ratio:.2f} times the chosen plan's ms per token")


def sums_text(figures: Mapping[str, float]) -> str:
    """Return the result of ``sum_figures`` in milliseconds."""
    return ", ".join(f"{name[:-2]} {1e3 * seconds:.3f} ms" for name, seconds in figures.items())


def _who(row: Mapping[str, Any], lead: str) -> str:
    """Return the device or the team of a stage with this lead."""
    return next(("+".join(team) for team in row.get("teams", ()) if team[0] == lead), lead)


def _with_range(errors: Sequence[float]) -> str:
    """Return the median of a plan's errors over passes, and the extremes if there are several."""
    if len(errors) == 1:
        return f"{errors[0]:+.1%}"
    return f"{statistics.median(errors):+.1%} ({min(errors):+.0%} to {max(errors):+.0%})"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
