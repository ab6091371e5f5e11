"""Random faults while four clients ask: each answer must be right, or a clear error.

    make chaos
    python -m benchmarks.chaos --minutes 2 --seed 7 --json

Four emulated hosts (testbed/) share a model of random weights at 32 bits, which no host can hold
alone. Four clients ask over HTTP, streamed, one request after the other. Answers are greedy or
drawn. The right answers were recorded before the first fault.

Meanwhile the seed chooses one fault at a time:

- An agent is killed or frozen, or the coordinator is killed and started again.
- The connection between an agent and the coordinator ends.
- A cable is cut, or loses every frame, or loses the frames to one host.
- A link is slow or loses some frames.
- Files in an agent's cache are damaged while it is down.
- A host of the model becomes slow, and the model moves to a better plan.

Each answer counts as right, refused, wrong or stuck. Refused means an error message, or that the
coordinator was down. Wrong means any text that the undisturbed answer lacks. Stuck means no end
within --patience seconds. The exit code is 1 if an answer was wrong or stuck, if a log holds a
traceback, or if no answer was right.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.faulty import HOSTS, SHAPE, FaultyShoal
from benchmarks.fidelity import say
from benchmarks.random_model import make_model
from cli.client import Client
from cli.errors import CommandFailed
from testbed.bed import Testbed
from testbed.network import HUB, Host, Link, Network

CONTEXT_TOKENS = 512
STREAMS = 4
SLOW_PERCENT = 6
"""The share of a core for a host that the model is to leave."""

NOTICED_S = 8.0
"""The time in which the coordinator hears that a device has become slow."""

TOKENS = 320
PROMPTS: tuple[dict[str, Any], ...] = (
    {"prompt": "The lamp is in the attic.", "temperature": 0},
    {"prompt": "The meter in the cellar reads 42. " * 4, "temperature": 0},
    {"prompt": "Where is the lamp?", "temperature": 1.0, "seed": 5},
    {"prompt": "x", "temperature": 0.8, "top_p": 0.9, "seed": 6},
    {"prompt": "a long one " * 20, "temperature": 1.2, "top_k": 40, "seed": 7},
)


@dataclass
class Tally:
    """Counts the outcomes of answers, which the clients' threads add."""

    answers: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, outcome: str, detail: str = "") -> None:
        with self._lock:
            self.answers[outcome] += 1
            if outcome == "refused":
                self.errors[detail] += 1
            elif detail:
                self.wrong.append(f"{outcome}: {detail}")
                say(f"{outcome}: {detail}")


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. It has tokens, because many tokens of a random model have no text."""

    text: str
    tokens: tuple[int, ...]


class Clients:
    """STREAMS threads that ask until they are stopped."""

    def __init__(self, url: str, expected: list[Answer], tally: Tally, patience_s: float) -> None:
        self._url, self._expected, self._tally = url, expected, tally
        self._patience_s = patience_s
        self._stop = threading.Event()
        self._began_s = [0.0] * STREAMS
        self._threads = [
            threading.Thread(target=self._ask, args=(number,), daemon=True)
            for number in range(STREAMS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Let the answers in flight end. Any that do not are stuck."""
        self._stop.set()
        for number, thread in enumerate(self._threads):
            thread.join(self._patience_s)
            if thread.is_alive():
                waited_s = time.monotonic() - self._began_s[number]
                self._tally.add("stuck", f"an answer did not end within {waited_s:.0f} s")

    def _ask(self, number: int) -> None:
        chance = random.Random(number)
        while not self._stop.is_set():
            which = chance.randrange(len(PROMPTS))
            self._began_s[number] = time.monotonic()
            outcome, detail = self._one(which)
            lasted_s = time.monotonic() - self._began_s[number]
            if lasted_s > self._patience_s:
                outcome, detail = "stuck", f"an answer ended after {lasted_s:.0f} s ({outcome})"
            self._tally.add(outcome, detail)
            if outcome == "refused":
                self._stop.wait(0.5)

    def _one(self, which: int) -> tuple[str, str]:
        expected, text = self._expected[which], ""
        tokens: tuple[int, ...] = ()
        try:
            with Client(self._url) as client:
                for event in client.stream("/v1/completions", body(which)):
                    more, tokens = read(event, tokens)
                    text += more
                    if not expected.text.startswith(text):
                        return "wrong", f"{PROMPTS[which]}: {text[-80:]!r} after {len(text)}"
        except CommandFailed as error:
            return "refused", str(error)
        if Answer(text, tokens) != expected:
            return "wrong", f"{PROMPTS[which]}: {len(tokens)} tokens, ended with {text[-80:]!r}"
        return "right", ""


def body(which: int) -> dict[str, Any]:
    """Return the request of a prompt."""
    return {**PROMPTS[which], "max_tokens": TOKENS, "stream": True, "return_token_ids": True}


def read(event: dict[str, Any], tokens: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return an event's text, and all tokens so far if it names them, else ``tokens``."""
    text = "".join(choice["text"] for choice in event["choices"])
    return text, tuple(event.get("shoal", {}).get("tokens", tokens))


class Shoal(FaultyShoal):
    """A shoal, and random faults to apply to it."""

    def __init__(self, bed: Testbed, directory: Path, chance: random.Random) -> None:
        super().__init__(bed, directory, {"context_tokens": CONTEXT_TOKENS, "slots": STREAMS})
        self._chance = chance

    def ask(self, which: int) -> Answer:
        """Ask for an undisturbed answer."""
        text, tokens = "", tuple[int, ...]()
        with Client(self.url) as client:
            for event in client.stream("/v1/completions", body(which)):
                more, tokens = read(event, tokens)
                text += more
        return Answer(text, tokens)

    # ---- faults ---------------------------------------------------------------------------------

    def faults(self) -> dict[str, Callable[[], str]]:
        """Return the faults by name. Each applies itself, waits, undoes itself and describes it."""
        return {
            "kill": self._kill,
            "freeze": lambda: self._for_a_while("freeze", "thaw"),
            "cut": lambda: self._for_a_while("cut", "heal"),
            "blackhole": lambda: self._for_a_while("blackhole", "heal"),
            "one-way loss": self._one_way,
            "slow link": lambda: self._for_a_while("link:rate=2,delay=40", "heal"),
            "lossy link": lambda: self._for_a_while("link:loss=5", "heal"),
            "connection ended": self._end_connections,
            "coordinator killed": self._kill_coordinator,
            "move": self._move,
            "damaged cache": self._damage,
        }

    def _victim(self) -> str:
        return self._chance.choice(HOSTS)

    def _pause(self) -> float:
        pause_s = self._chance.uniform(2, 14)
        time.sleep(pause_s)
        return pause_s

    def _for_a_while(self, fault: str, end: str) -> str:
        host = self._victim()
        self.bed.fault(host, fault)
        return f"{host}, {self._undo(host, end):.0f} s"

    def _undo(self, host: str, end: str) -> float:
        try:
            return self._pause()
        finally:
            self.bed.fault(host, end)

    def _one_way(self) -> str:
        source, target = self._chance.sample(HOSTS, 2)
        self.bed.fault(source, f"lose={target}")
        return f"{source} to {target}, {self._undo(source, 'heal'):.0f} s"

    def _kill(self) -> str:
        host = self._victim()
        self.end(host)
        pause_s = self._pause()
        self.start_agent(host)
        return f"{host}, down for {pause_s:.0f} s"

    def _kill_coordinator(self) -> str:
        self.end(HUB)
        pause_s = self._pause()
        self.start_coordinator()
        return f"down for {pause_s:.0f} s"

    def _end_connections(self) -> str:
        host = self._victim()
        self.end_connections(host)
        return host

    def _damage(self) -> str:
        host = self._chance.choice([host for host in HOSTS if self.cached(host)])
        self.end(host)
        count = self.damage(host, self._chance)
        self.start_agent(host)
        return f"{host}, {count} files"

    def _move(self) -> str:
        """Let the model move to a better plan, because one of its devices has become slow."""
        stages = self.stages()
        if not stages:
            return "the model does not answer"
        host = self._chance.choice(stages)
        try:
            self.bed.fault(host, f"slow={SLOW_PERCENT}")
            time.sleep(NOTICED_S)  # The time that passes is the fault.
            with Client(self.url) as client:
                answer = client.operate("/shoal/v1/rebalance", {"dry_run": False}, lambda _: None)
            return f"{host} slow, " + ("moved" if answer["moves"] else answer["why"])
        except CommandFailed as error:
            return f"{host} slow, no move: {error}"
        finally:
            self._pause()
            self.bed.fault(host, "slow=off")


def network() -> Network:
    """Return four equal hosts on wires, and the coordinator's host."""
    wire = Link(2e-4, 12.5e6)
    return Network({HUB: Host()} | {name: Host(cpu_percent=40) for name in HOSTS}, {}, wire)


def run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Run everything, and return the observations."""
    chance = random.Random(options.seed)
    tally, done = Tally(), Counter[str]()
    unsettled: list[str] = []
    make_model(directory / "model", SHAPE, CONTEXT_TOKENS)
    with Testbed(network(), "chaos") as bed:
        shoal = Shoal(bed, directory, chance)
        shoal.load()
        expected = [shoal.ask(which) for which in range(len(PROMPTS))]
        say(f"undisturbed answers: {[len(answer.tokens) for answer in expected]} tokens")
        clients = Clients(shoal.url, expected, tally, options.patience)
        clients.start()
        faults = shoal.faults()
        names = options.faults.split(",") if options.faults else list(faults)
        started_s = time.monotonic()
        while (elapsed_s := time.monotonic() - started_s) < options.minutes * 60:
            name = chance.choice(names)
            what = faults[name]()
            done[name] += 1
            back = shoal.settle(60)
            if not back:
                unsettled.append(f"after {name} ({what})")
            say(
                f"{elapsed_s:4.0f} s {name}: {what}{'' if back else '; NOT ALL CAME BACK'}; "
                + ", ".join(f"{count} {outcome}" for outcome, count in tally.answers.items())
            )
            time.sleep(chance.uniform(1, 6))
        clients.finish()
        return {
            "seed": options.seed,
            "minutes": options.minutes,
            "faults": dict(done),
            "answers": dict(tally.answers),
            "refusals": dict(tally.errors),
            "wrong": tally.wrong,
            "not_back": unsettled,
            "tracebacks": shoal.tracebacks(),
        }


def report(seen: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"{seen['minutes']:g} minutes of faults, seed {seen['seed']}")
    table.add_column("fault")
    table.add_column("times", justify="right")
    for name, count in sorted(seen["faults"].items()):
        table.add_row(name, str(count))
    console.print(table)
    for outcome in ("right", "refused", "wrong", "stuck"):
        console.print(f"{seen['answers'].get(outcome, 0):6} answers {outcome}")
    for message, count in sorted(seen["refusals"].items(), key=lambda item: -item[1])[:12]:
        console.print(f"       {count:4} x {message}", markup=False)
    console.print(f"{len(seen['tracebacks']):6} logs with a traceback")
    for text in (*seen["wrong"], *seen["not_back"], *seen["tracebacks"]):
        console.print(text, markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Faults at random while four clients ask; needs root.",
        epilog="example: python -m benchmarks.chaos --minutes 2 --faults kill,cut",
    )
    parser.add_argument("--minutes", type=float, default=10, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--faults", metavar="A,B", help="only these; default: all")
    parser.add_argument("--patience", type=float, default=180, metavar="S", help="for an answer")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and state there")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    directory = options.keep or Path(tempfile.mkdtemp(prefix="shoal-chaos-"))
    try:
        seen = run(options, directory)
    finally:
        if options.keep is None:
            shutil.rmtree(directory, ignore_errors=True)
    if options.json:
        print(json.dumps(seen))
    else:
        report(seen)
    bad = seen["tracebacks"] or seen["answers"].keys() & {"wrong", "stuck"}
    sys.exit(1 if bad or not seen["answers"].get("right") else 0)


if __name__ == "__main__":
    main()
