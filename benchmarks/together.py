"""Devices that share layers, against one device and a pipeline, on emulated hosts.

    make bench-together
    python -m benchmarks.together --cases two,half --shapes 8b --rounds 7 --json
    python -m benchmarks.together --distributed-llama DIR --llama-cpp DIR/bin --llama-python PYTHON

The shapes are four layers of Llama-8B and all of Llama-1B, at 4 bits, with random weights and a
vocabulary of 32,000. The hosts have network namespaces of their own (testbed/), and a LAN of 0.3 ms
round trip and 1 Gbit/s. The cases are:

- two: two hosts, each with a whole core that no other host has;
- half: the same, but the second host has half of its core;
- four: four hosts of 40 % of a core each, in periods of 5 ms.

Each plan is loaded as a user would, and answers over HTTP. In a round every plan, and every other
program, has its turn, in one order and then in the other. A turn decodes behind a short prompt, and
reads a prompt of 512 tokens. Reported are medians over rounds, and medians of the ratios to one
host within a round. The other programs run on the same hosts, with one thread each:

- distributed-llama has equal shares on 2^n hosts, in its format q40;
- llama.cpp has a pipeline over its RPC servers, in Q4_0. Its client holds the embedding, on a host
  of its own without a limit.

What the emulation takes away: the switch, the coordinator and this client share the cores of the
hosts. The report says how much of the machine they took while tokens were decoded ("others", in
cores). Real hosts have their own, and a real switch takes nothing. The quota of the case "four"
stops a host for up to 3 ms of 5, and then its whole team waits. But a host whose turn is shorter
than its share of a period is not slowed down at all. Sums are frequent and short, so both happen.
A host that has just loaded a stage hashes its files for some seconds. Turns begin after that.

Models, files and the hosts' measurements are kept in --state.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import distributed_llama, gguf, llama_cpp_process
from benchmarks.busy_hosts import await_rest, busy_s
from benchmarks.fidelity import (
    forget_calibration,
    generate,
    plan_of,
    say,
    sum_figures,
    sums_text,
)
from benchmarks.pipeline import split, start_llama
from benchmarks.random_model import Shape, make_model
from calibration.machine import processor_name
from cli.client import Client
from cli.errors import CommandFailed
from model.spec import ModelSpec
from testbed.bed import Testbed, TestbedError
from testbed.cluster import Cluster
from testbed.lab import AgentSettings
from testbed.network import HUB, Host, Link, Network

STATE = Path("/var/tmp/shoal-together")  # noqa: S108 - a fixed place, so that models stay

SHAPES = {
    "8b": Shape(hidden=4096, ffn=14336, layers=4, heads=32),
    "1b": Shape(hidden=2048, ffn=8192, layers=16, heads=32),
}
VOCAB = 32_000
BITS = 4
LAN = Link(0.15e-3, 125e6)
MEMORY_BYTES, STORAGE_BYTES = 5 << 30, 8 << 30

SHORT_TOKENS = 32
"""The prompt before the decoded tokens."""

PROMPT_TOKENS = 512
CONTEXT_TOKENS = PROMPT_TOKENS + 128

"""The hosts have this long to come to rest. They are at rest if they use less, for a look."""

NAMES = ("ash", "birch", "cedar", "dogwood")
ALONE = "alone"


@dataclass(frozen=True, slots=True)
class Case:
    """Hosts, the plans for them, and the numbers of hosts that other programs run on."""

    hosts: Mapping[str, Host]
    plans: tuple[str, ...]
    distributed_llama: tuple[int, ...] = (1, 2)
    llama_cpp: tuple[int, ...] = (1, 2)


def case_of(case: str) -> Case:
    """Return the case of this name, one of CASES."""
    # Cores are counted among those that this process may use.
    first, second = (*sorted(os.sched_getaffinity(0)), 0, 1)[:2]
    if case == "two":
        hosts = {"ash": Host(cores=(first,)), "birch": Host(cores=(second,))}
        return Case(hosts, (ALONE, "team", "pipeline"))
    if case == "half":
        hosts = {"ash": Host(cores=(first,)), "birch": Host(cpu_percent=50, cores=(second,))}
        return Case(hosts, (ALONE, "team"), llama_cpp=())
    hosts = {name: Host(cpu_percent=40) for name in NAMES}
    return Case(hosts, (ALONE, "team", "pairs", "pipeline"), (1, 4), (1, 4))


CASES = ("two", "half", "four")


@dataclass(slots=True)
class Runner:
    """One way to run the model, and what each of its rounds measured."""

    name: str
    run: Callable[[], Mapping[str, float]]
    rounds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    about: dict[str, Any] = field(default_factory=dict)

    def turn(self) -> None:
        for name, value in self.run().items():
            self.rounds[name].append(value)

    def row(self, alone: Runner) -> dict[str, Any]:
        """Return medians over the rounds, and of the ratios to ``alone`` within each."""

        def gain(name: str) -> float:
            pairs = zip(alone.rounds[name], self.rounds[name], strict=True)
            return statistics.median(before / after for before, after in pairs)

        medians = {name: statistics.median(values) for name, values in self.rounds.items()}
        errors = {
            error: self.about[f"predicted_{name}"] / medians[name] - 1
            for error, name in (("error", "ms_per_token"), ("prompt_error", "prompt_s"))
            if f"predicted_{name}" in self.about
        }
        return {
            "what": self.name,
            **self.about,
            **medians,
            **errors,
            "tokens_per_s": 1e3 / medians["ms_per_token"],
            "gain": gain("ms_per_token"),
            "prompt_gain": gain("prompt_s"),
            "rounds": dict(self.rounds),
        }


def main() -> None:
    options = _arguments()
    result = []
    for shape in options.shapes:
        spec = make_model(options.state / shape, SHAPES[shape], CONTEXT_TOKENS, vocab=VOCAB)
        for name, bits in itertools.product(options.cases, options.bits):
            try:
                rows = measure(options, Experiment(spec, shape, bits, name, case_of(name)))
            except TestbedError as error:
                sys.exit(str(error))
            result.append({"shape": shape, "bits": bits, "case": name} | rows)
    about = {
        "machine": processor_name(),
        "date": date.today().isoformat(),
        "load": os.getloadavg()[2],
        "round_trip_ms": 2e3 * LAN.delay_s,
        "mbit_per_s": LAN.bytes_per_s * 8e-6,
    }
    if options.json:
        print(json.dumps(about | {"cases": result}))
        return
    for one in result:
        _show(one, about)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state", type=Path, default=STATE, metavar="DIR", help=f"default {STATE}")
    parser.add_argument("--cases", type=_some_of(CASES), default=CASES, metavar=",".join(CASES))
    parser.add_argument("--shapes", type=_some_of(SHAPES), default=tuple(SHAPES), metavar="8b,1b")
    parser.add_argument(
        "--bits",
        type=lambda text: tuple(map(int, text.split(","))),
        default=(BITS,),
        metavar="4,8",
        help=f"default {BITS}; other programs run at {BITS} only",
    )
    parser.add_argument("--plans", type=lambda text: text.split(","), help="only these and alone")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="decoded in a turn")
    parser.add_argument("--again", action="store_true", help="have the hosts measure anew")
    parser.add_argument("--distributed-llama", type=Path, metavar="DIR", help="with its dllama")
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="bin of a build with RPC")
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python")
    parser.add_argument("--llama-batch", type=int, default=512, help="rows that it has at once")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if (options.llama_cpp is None) != (options.llama_python is None):
        parser.error("--llama-cpp and --llama-python belong together")
    if options.llama_cpp:
        llama_cpp_process.find_server(options.llama_cpp)
    if options.distributed_llama:
        distributed_llama.find_program(options.distributed_llama)
    return options


def _some_of(known: Sequence[str] | Mapping[str, Any]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if set(found) - set(known):
            raise argparse.ArgumentTypeError(f"known are {', '.join(known)}")
        return found

    return parse


# ---- one case ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Experiment:
    """A model at a width, on the hosts of a case."""

    spec: ModelSpec
    shape: str
    bits: int
    name: str
    case: Case

    @property
    def hosts(self) -> list[str]:
        return list(self.case.hosts)

    def request(self, options: argparse.Namespace) -> dict[str, Any]:
        """Return the request for a plan without other wishes."""
        return {
            "model": str((options.state / self.shape).absolute()),
            "bits": [self.bits],
            "max_weight_error": None,
            "context_tokens": CONTEXT_TOKENS,
        }


def measure(options: argparse.Namespace, one: Experiment) -> dict[str, Any]:
    """Measure one experiment, on hosts that are made for it."""
    case = one.case
    links = {(HUB, host): Link() for host in case.hosts}
    links |= {(host, HUB): Link() for host in case.hosts}
    network = Network({HUB: Host()} | dict(case.hosts), links, LAN)
    state = options.state / one.name
    if options.again:
        forget_calibration(state)
    with ExitStack() as stack:
        bed = stack.enter_context(Testbed(network, "together"))
        client = stack.enter_context(_shoal(bed, state, one.hosts, one.request(options)))
        chosen = client.operate("/shoal/v1/plan", one.request(options), lambda step: None)["plan"]
        runners = [
            _plan_runner(bed, client, options, one, plan)
            for plan in case.plans
            if not options.plans or plan in (ALONE, *options.plans)
        ]
        if one.bits == BITS:
            runners += _others(bed, options, one, stack)
        for number in range(options.rounds):
            what = f"{one.shape} at {one.bits} bits, {one.name}"
            say(f"{what}: round {number + 1} of {options.rounds}")
            # The second one finds a warmer machine, so they take turns.
            for runner in runners if number % 2 else reversed(runners):
                runner.turn()
    return {
        "chosen": _members(chosen),
        "chosen_ms_per_token": chosen["predicted_ms_per_token"],
        "rows": [runner.row(runners[0]) for runner in runners],
    }


@contextmanager
def _shoal(
    bed: Testbed, state: Path, hosts: Sequence[str], body: Mapping[str, Any]
) -> Iterator[Client]:
    """Start a coordinator and agents; yield the API when all hosts have measured themselves."""
    shoal = Cluster(bed, state / "hosts")
    shoal.start_coordinator()
    with Client(shoal.open_door(0)) as client:
        for count, host in enumerate(hosts, start=1):
            shoal.start_agent(host, AgentSettings(MEMORY_BYTES, STORAGE_BYTES))
            shoal.wait_for_agents(hosts[:count])
            say(f"{host}: calibrating")
            # These hosts share cores, so they join and measure one at a time.
            with suppress(CommandFailed):
                client.operate("/shoal/v1/plan", dict(body), lambda step: None)
        yield client


def _wishes(plan: str, spec: ModelSpec, hosts: Sequence[str]) -> dict[str, Any]:
    """Return the part of a request that leads to this plan."""
    if plan == ALONE:
        return {"exclude": list(hosts[1:])}
    if plan == "team":
        return {"teams": [list(hosts)]}
    if plan == "pairs":
        return {"teams": [list(hosts[:2]), list(hosts[2:])]}
    runs = split(spec, len(hosts))
    return {"pins": {str(at): host for host, run in zip(hosts, runs, strict=True) for at in run}}


def _plan_runner(
    bed: Testbed, client: Client, options: argparse.Namespace, one: Experiment, plan: str
) -> Runner:
    """Return what loads a plan and asks it, each time anew."""
    hosts = one.hosts
    body = one.request(options) | _wishes(plan, one.spec, hosts)

    def run() -> dict[str, float]:
        loaded = client.operate("/shoal/v1/load", body, lambda step: None)["plan"]
        runner.about |= {
            "stages": _members(loaded),
            "sums": [sum_figures(stage) for stage in loaded["stages"] if stage.get("members")],
            "predicted_ms_per_token": loaded["predicted_ms_per_token"],
            "predicted_prompt_s": plan_of(loaded).first_token_s(PROMPT_TOKENS),
        }
        generate(client, 4, SHORT_TOKENS)
        await_rest(bed, hosts)
        before, begun_s = busy_s(bed, hosts), time.perf_counter()
        decoded = generate(client, options.tokens, SHORT_TOKENS)
        elapsed_s, after = time.perf_counter() - begun_s, busy_s(bed, hosts)
        prompt = generate(client, 2, PROMPT_TOKENS)
        client.post("/shoal/v1/unload", {})
        return {
            "ms_per_token": 1e3 / decoded["decode_tokens_per_s"],
            "prompt_s": PROMPT_TOKENS / prompt["prefill_tokens_per_s"],
            "hosts_cores": (after[0] - before[0]) / elapsed_s,
            "others_cores": (after[1] - before[1]) / elapsed_s,
        }

    runner = Runner(plan, run)
    return runner


def _members(plan: Mapping[str, Any]) -> list[str]:
    """Describe the stages of a plan, a team's with the part of each member's columns."""
    found = []
    for stage in plan["stages"]:
        who = stage["device"]
        members = stage.get("members") or ()
        if members:
            columns = [one["share"]["columns"] for one in members]
            total = max(end for _, end in columns)
            who = " + ".join(
                f"{one['device']} {(end - begin) / total:.0%}"
                for one, (begin, end) in zip(members, columns, strict=True)
            )
        found.append(f"{who}: {len(stage['bits'])} blocks")
    return found


# ---- other programs ----------------------------------------------------------------------------


def _others(
    bed: Testbed, options: argparse.Namespace, one: Experiment, stack: ExitStack
) -> list[Runner]:
    runners = []
    spec, hosts, home = one.spec, one.hosts, options.state / one.shape
    if options.distributed_llama:
        program = distributed_llama.find_program(options.distributed_llama).absolute()
        files = distributed_llama.write_files(home, spec, CONTEXT_TOKENS)
        for count in one.case.distributed_llama:

            def run(used: Sequence[str] = tuple(hosts[:count])) -> dict[str, float]:
                _, token_s = distributed_llama.measure(
                    bed, program, files, used, SHORT_TOKENS, options.tokens
                )
                prompt_s, _ = distributed_llama.measure(bed, program, files, used, PROMPT_TOKENS, 3)
                return {"ms_per_token": 1e3 * token_s, "prompt_s": prompt_s}

            runners.append(Runner(f"distributed-llama, {count}", run))
    if options.llama_cpp:
        model = home / "model.gguf"
        if not model.exists():
            gguf.write_llama(model, spec, "q4_0", CONTEXT_TOKENS)
        for count in one.case.llama_cpp:
            worker = start_llama(
                options, bed, hosts[:count], HUB, split(spec, count), model.absolute(), stack
            )

            def ask(worker: llama_cpp_process.Worker = worker) -> dict[str, float]:
                token_s = statistics.fmean(worker.ask("decode", SHORT_TOKENS, options.tokens))
                (prompt_s,) = worker.ask("prefill", PROMPT_TOKENS)
                return {"ms_per_token": 1e3 * token_s, "prompt_s": prompt_s}

            runners.append(Runner(f"llama.cpp RPC, {count}", ask))
    return runners


def _show(result: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    title = f"{result['shape']} at {result['bits']} bits, {result['case']}"
    title += f"; {about['machine']}, {about['date']}"
    table = Table(title=f"{title}, load {about['load']:.1f}", title_justify="left")
    columns = {
        "what": "{}",
        "tokens_per_s": "{:.2f}",
        "ms_per_token": "{:.1f}",
        "predicted_ms_per_token": "{:.1f}",
        "error": "{:+.1%}",
        "gain": "{:.2f}",
        "prompt_s": "{:.2f}",
        "predicted_prompt_s": "{:.2f}",
        "prompt_error": "{:+.1%}",
        "prompt_gain": "{:.2f}",
        "hosts_cores": "{:.2f}",
        "others_cores": "{:.2f}",
    }
    for name in columns:
        left = name == "what"
        heading = name.replace("predicted", "pred.").replace("_", " ")
        table.add_column(heading, justify="left" if left else "right", no_wrap=left)
    table.add_column("stages", no_wrap=True)
    for row in result["rows"]:
        cells = [form.format(row[name]) if name in row else "-" for name, form in columns.items()]
        sums = [f"a sum of one row: {sums_text(sums)}" for sums in row.get("sums", ())]
        table.add_row(*cells, "\n".join([*row.get("stages", ()), *sums]))
    console = Console(width=max(Console().width, 220))
    console.print(table)
    console.print(
        f"the planner's own choice: {'; '.join(result['chosen'])}, predicted"
        f" {result['chosen_ms_per_token']:.1f} ms a token",
        markup=False,
    )


if __name__ == "__main__":
    main()
