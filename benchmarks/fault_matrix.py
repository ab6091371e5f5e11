"""Each fault in each phase of an answer's life, and what the answer then looks like.

    make fault-matrix
    python -m benchmarks.fault_matrix --faults killed,frozen --phases answer --json
    python -m benchmarks.fault_matrix --write docs/faults.md

Four emulated hosts (testbed/) share a model of random weights at 32 bits, which no host can hold
alone. A fault hits the device of the last stage, or the coordinator. A client asks over HTTP,
streamed. If its stream is cut, it asks again with the same ``x-request-id``, and skips what it has.

The phases in which the fault begins:

- ``load``: the model is being loaded. If the load fails, it is repeated after the fault.
- ``prompt``: the prompt runs, and no token has come.
- ``answer``: some tokens have come.
- ``idle``: the model is loaded, and the question comes right after the fault has begun.
- ``move``: the model moves to better devices while it answers, and the fault hits one of these.

The answer must be that of the undisturbed shoal, token for token, or end with a clear error. The
figure of a cell is the longest wait for a token after the fault had begun. The exit code is 1 if an
answer was wrong, lost or repeated tokens, or did not end, or if a log holds a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.faulty import HOSTS, SHAPE, FaultyShoal
from benchmarks.fidelity import say
from benchmarks.random_model import make_model
from cli.client import Client
from cli.errors import CommandFailed
from testbed.bed import Testbed
from testbed.network import HUB, Host, Link, Network

FAR_HOSTS, NEAR_HOSTS = HOSTS[:2], HOSTS[2:]
WIRE, FAR_WIRE = Link(2e-4, 12.5e6), Link(8e-3, 12.5e6)
"""A link between two near hosts, and any other one. So the near hosts are the better ones."""

CPU_PERCENT = 40.0
CONTEXT_TOKENS = 2048
TOKENS, MOVE_TOKENS = 700, 1500
"""The tokens of an answer. It must last until the fault, and a move begins after measurements."""

BEGUN_TOKENS = 20
"""An answer in the phase ``answer`` has so many tokens when the fault begins."""

QUESTION: dict[str, Any] = {
    "prompt": "Where is the lamp, and what does the meter in the cellar read today? " * 24,
    "temperature": 1.0,
    "seed": 5,
    "ignore_eos": True,
    "return_token_ids": True,
    "stream": True,
}

SHORT_S, LONG_S, DOWN_S = 2.0, 12.0, 6.0
"""How long faults last. An agent counts as lost after 5 s of silence."""

AGAIN_S = 0.3
"""The pause before a client asks again."""

DISK_BYTES = 256 << 20
PHASES = ("load", "prompt", "answer", "idle", "move")
BEGIN, END = "<!-- fault matrix -->", "<!-- end of fault matrix -->"


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of a host, and its end after ``lasts_s``."""

    text: str
    begin: Callable[[FaultyShoal, str], None]
    lasts_s: float
    end: Callable[[FaultyShoal, str], None]


def _on_bed(what: str) -> Callable[[FaultyShoal, str], None]:
    return lambda shoal, host: shoal.bed.fault(host, what)


def _power_back(shoal: FaultyShoal, host: str) -> None:
    shoal.bed.fault(host, "heal")
    shoal.start_agent(host)


def _lose_one_way(shoal: FaultyShoal, host: str) -> None:
    for other in HOSTS:
        if other != host:
            shoal.bed.fault(other, f"lose={host}")


def _heal_all(shoal: FaultyShoal, host: str) -> None:
    for other in HOSTS:
        shoal.bed.fault(other, "heal")


FAULTS: dict[str, Fault] = {
    "killed": Fault("agent killed", FaultyShoal.end, DOWN_S, FaultyShoal.start_agent),
    "power": Fault("power lost", _on_bed("kill"), DOWN_S, _power_back),
    "frozen-short": Fault("frozen for 2 s", _on_bed("freeze"), SHORT_S, _on_bed("thaw")),
    "frozen": Fault("frozen for 12 s", _on_bed("freeze"), LONG_S, _on_bed("thaw")),
    "cut": Fault("cable out for 12 s", _on_bed("cut"), LONG_S, _on_bed("heal")),
    "blackhole": Fault("all frames lost for 12 s", _on_bed("blackhole"), LONG_S, _on_bed("heal")),
    "one-way": Fault("frames of other devices lost for 12 s", _lose_one_way, LONG_S, _heal_all),
    "slow-link": Fault(
        "2 Mbit/s and 40 ms for 12 s", _on_bed("link:rate=2,delay=40"), LONG_S, _on_bed("heal")
    ),
    "lossy-link": Fault("5 % of frames lost", _on_bed("link:loss=5"), LONG_S, _on_bed("heal")),
    "little-cpu": Fault("5 % of a core for 12 s", _on_bed("slow=5"), LONG_S, _on_bed("slow=off")),
    "connection": Fault(
        "connection to the coordinator ended", FaultyShoal.end_connections, 0, lambda *_: None
    ),
    "coordinator": Fault(
        "coordinator killed for 1 s",
        lambda shoal, _: shoal.end(HUB),
        1.0,
        lambda shoal, _: shoal.start_coordinator(),
    ),
    "full-disk": Fault("disk full for 6 s", FaultyShoal.fill_disk, DOWN_S, FaultyShoal.free_disk),
}


@dataclass
class Cell:
    """The answer of one fault in one phase. Its ``outcome`` is right, error, wrong or stuck."""

    fault: str
    phase: str
    outcome: str
    detail: str = ""
    lost: int = 0
    repeated: int = 0
    wait_s: float = 0.0
    again: int = 0
    """How often the client had to ask again."""
    is_early: bool = False
    """Whether the answer had ended before the fault began, which proves nothing."""
    story: list[str] = field(default_factory=list)


class Answer(threading.Thread):
    """Asks until the answer is whole, or ends with an error that asking again cannot help."""

    def __init__(self, url: str, patience_s: float, tokens: int) -> None:
        super().__init__(daemon=True)
        self._body = {**QUESTION, "max_tokens": tokens}
        self._url = f"{url}/v1/completions"
        self._deadline_s = time.monotonic() + patience_s
        self._id = f"matrix-{time.monotonic_ns()}"
        self.asked = tokens
        self.text = ""
        self.tokens: list[int] = []
        self.error = ""
        self.again = 0
        self.times_s: list[float] = []
        """When new text or tokens came."""

    @property
    def is_begun(self) -> bool:
        return len(self.times_s) >= BEGUN_TOKENS or not self.is_alive()

    def run(self) -> None:
        while not self.tokens and not self.error and time.monotonic() < self._deadline_s:
            try:
                self._ask()
            except httpx.TransportError:
                time.sleep(AGAIN_S)  # As a client that tries again.
                self.again += 1

    def _ask(self) -> None:
        pieces, text = 0, ""
        with httpx.stream(
            "POST",
            self._url,
            json=self._body,
            headers={"x-request-id": self._id},
            timeout=httpx.Timeout(None, connect=3),
            trust_env=False,
        ) as response:
            if response.status_code != 200:
                self.error = json.loads(response.read())["error"]["message"]
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    self.error = event["error"]["message"]
                    return
                pieces += 1
                text += "".join(choice["text"] for choice in event["choices"])
                if not text.startswith(self.text[: len(text)]):
                    self.error = "after asking again the answer was another one"
                    return
                if pieces > len(self.times_s):
                    self.times_s.append(time.monotonic())
                    self.text = text if len(text) > len(self.text) else self.text
                self.tokens = event.get("shoal", {}).get("tokens", self.tokens)
        if not self.tokens and not self.error:
            raise httpx.ReadError("the stream ended early")

    def wait_after(self, fault_s: float) -> float:
        """Return the longest wait for a token after the fault had begun."""
        times_s = [fault_s, *(time_s for time_s in self.times_s if time_s > fault_s)]
        return max((b - a for a, b in itertools.pairwise(times_s)), default=0.0)


class Matrix:
    """Runs the cells, one after the other, on one shoal."""

    def __init__(self, shoal: FaultyShoal, patience_s: float) -> None:
        self.shoal = shoal
        self._patience_s = patience_s
        shoal.load()
        undisturbed = self._ask(MOVE_TOKENS)
        undisturbed.join()
        if undisturbed.error or len(undisturbed.tokens) != MOVE_TOKENS:
            raise SystemExit(f"the undisturbed answer failed: {undisturbed.error}")
        self._expected = undisturbed.tokens

    def run(self, fault: str, phase: str) -> Cell:
        """Run one cell, and put everything back in order."""
        prepare = self._prepare_move if phase == "move" else self._prepare
        prepare()
        seen = len(self.shoal.kinds())
        answer, fault_s, failed = getattr(self, f"_in_{phase}")(FAULTS[fault])
        answer.join(max(self._patience_s, 1))
        cell = Cell(fault, phase, "right", again=answer.again)
        if failed:
            cell.detail = f"load: {failed}"
        if answer.is_alive():
            cell.outcome = "stuck"
        elif answer.error:
            cell.outcome, cell.detail = "error", answer.error
        elif answer.tokens != (expected := self._expected[: answer.asked]):
            cell.outcome = "wrong"
            cell.lost, cell.repeated = _difference(answer.tokens, expected)
        cell.wait_s = answer.wait_after(fault_s)
        cell.is_early = not answer.is_alive() and max(answer.times_s, default=0.0) <= fault_s
        self._restore()
        told = self.shoal.kinds()
        cell.story = told[seen if len(told) >= seen else 0 :]
        return cell

    # ---- phases ---------------------------------------------------------------------------------

    def _in_load(self, fault: Fault) -> tuple[Answer, float, str]:
        begun: list[float] = []
        victim = NEAR_HOSTS[1]

        def on_step(step: dict[str, Any]) -> None:
            if not begun and step["phase"] in ("fetch", "load"):
                begun.append(self._begin(fault, victim))

        failed = ""
        try:
            self.shoal.load(on_step)
        except CommandFailed as error:
            failed = str(error)
        if not begun:
            begun.append(self._begin(fault, victim))
        if failed:
            self._ended.wait()
            self._restore()
            self.shoal.load()
        return self._ask(), begun[0], failed

    def _in_prompt(self, fault: Fault) -> tuple[Answer, float, str]:
        victim, answer = self._last(), self._ask()
        time.sleep(0.1)  # A running prompt tells no event outside.
        return answer, self._begin(fault, victim), ""

    def _in_answer(self, fault: Fault) -> tuple[Answer, float, str]:
        victim, answer = self._last(), self._ask()
        _until(lambda: answer.is_begun, self._patience_s)
        return answer, self._begin(fault, victim), ""

    def _in_idle(self, fault: Fault) -> tuple[Answer, float, str]:
        begun_s = self._begin(fault, self._last())
        return self._ask(), begun_s, ""

    def _in_move(self, fault: Fault) -> tuple[Answer, float, str]:
        answer = self._ask(MOVE_TOKENS)
        _until(lambda: answer.is_begun, self._patience_s)
        begun: list[float] = []

        def on_step(step: dict[str, Any]) -> None:
            if not begun and step["phase"] in ("fetch", "load"):
                begun.append(self._begin(fault, NEAR_HOSTS[1]))

        failed = ""
        try:
            with Client(self.shoal.url) as client:
                moved = client.operate("/shoal/v1/rebalance", {"dry_run": False}, on_step)
                failed = "" if moved["moves"] else f"no move: {moved['why']}"
        except CommandFailed as error:
            failed = str(error)
        if not begun:
            begun.append(self._begin(fault, NEAR_HOSTS[1]))
        return answer, begun[0], failed

    # ---- order ----------------------------------------------------------------------------------

    def _begin(self, fault: Fault, victim: str) -> float:
        """Begin a fault, and have a thread end it."""
        self._ended = threading.Event()
        begun_s = time.monotonic()
        fault.begin(self.shoal, victim)

        def end() -> None:
            time.sleep(fault.lasts_s)  # The fault lasts so long.
            fault.end(self.shoal, victim)
            self._ended.set()

        threading.Thread(target=end, daemon=True).start()
        return begun_s

    def _last(self) -> str:
        return self.shoal.stages()[-1]

    def _ask(self, tokens: int = TOKENS) -> Answer:
        answer = Answer(self.shoal.url, self._patience_s, tokens)
        answer.start()
        return answer

    def _prepare(self) -> None:
        """Load the model on the best of all devices."""
        if set(self.shoal.stages()) != set(NEAR_HOSTS):
            self.shoal.load()

    def _prepare_move(self) -> None:
        """Load the model on far devices, before near ones join."""
        for host in NEAR_HOSTS:
            self.shoal.end(host)
        self.shoal.settle(30, FAR_HOSTS)
        self.shoal.load()
        for host in NEAR_HOSTS:
            self.shoal.start_agent(host)
        self.shoal.settle(60)

    def _restore(self) -> None:
        """Wait for the end of the fault, and for all devices."""
        self._ended.wait()
        for host in HOSTS:
            if not self.shoal.bed.processes(host):
                self.shoal.start_agent(host)
        if not self.shoal.settle(90):
            raise SystemExit("some agents did not come back")
        _until(self.shoal.stages, 60)


def _difference(got: list[int], expected: list[int]) -> tuple[int, int]:
    """Return how many tokens are missing and how many are too many."""
    return max(len(expected) - len(got), 0), max(len(got) - len(expected), 0)


def _until(holds: Callable[[], object], patience_s: float) -> None:
    deadline_s = time.monotonic() + patience_s
    while not holds() and time.monotonic() < deadline_s:
        time.sleep(0.02)  # Other processes tell no event here.


def network() -> Network:
    """Return two hosts that are far from all others, two near ones, and the coordinator's host."""
    hosts = {name: Host(cpu_percent=CPU_PERCENT) for name in HOSTS}
    far = {pair: FAR_WIRE for pair in itertools.permutations(HOSTS, 2) if set(pair) & {*FAR_HOSTS}}
    return Network({HUB: Host(), **hosts}, far, WIRE)


@contextlib.contextmanager
def disks(directory: Path) -> Iterator[None]:
    """Give the agent of each host a file system of its own, which can be full."""
    mounted = []
    try:
        for host in HOSTS:
            place = directory / "hosts" / host
            place.mkdir(parents=True)
            options = ["-o", f"size={DISK_BYTES},mode=700"]
            subprocess.run(  # noqa: S603 - our own command
                ["mount", "-t", "tmpfs", *options, "shoal-disk", str(place)],  # noqa: S607 - util-linux, as root
                check=True,
            )
            mounted.append(place)
        yield
    finally:
        for place in mounted:
            subprocess.run(["umount", "--lazy", str(place)], check=False)  # noqa: S603, S607 - as above


@contextlib.contextmanager
def standing(directory: Path, name: str, patience_s: float = 120.0) -> Iterator[Matrix]:
    """Yield a matrix on a testbed of this name, with its files in ``directory``."""
    make_model(directory / "model", SHAPE, CONTEXT_TOKENS)
    request = {"context_tokens": CONTEXT_TOKENS, "slots": 1}
    with disks(directory), Testbed(network(), name) as bed:
        yield Matrix(FaultyShoal(bed, directory, request), patience_s)


# ---- the table ---------------------------------------------------------------------------------


def table(cells: list[Cell], conditions: str) -> str:
    """Return the cells as a table in Markdown."""
    phases = [phase for phase in PHASES if any(cell.phase == phase for cell in cells)]
    lines = [
        f"Measured {conditions}.",
        "",
        "| fault | " + " | ".join(phases) + " |",
        "| --- |" + " --- |" * len(phases),
    ]
    found = {(cell.fault, cell.phase): cell for cell in cells}
    for name, fault in FAULTS.items():
        row = [found.get((name, phase)) for phase in phases]
        if any(row):
            lines.append(f"| {fault.text} | " + " | ".join(map(_words, row)) + " |")
    lost, repeated = (sum(getattr(cell, what) for cell in cells) for what in ("lost", "repeated"))
    right = sum(cell.outcome == "right" for cell in cells)
    lines += [
        "",
        f"{right} of {len(cells)} answers right, {lost} tokens lost, {repeated} repeated.",
    ]
    return "\n".join(lines)


def _words(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.outcome != "right":
        return f"**{cell.outcome}**"
    if cell.is_early:
        return "ended before"
    notes = [", asked again"] * bool(cell.again) + [", loaded again"] * bool(
        cell.phase == "load" and cell.detail
    )
    return f"{cell.wait_s:.1f} s{''.join(notes)}"


def told(cell: Cell) -> str:
    """Return a line about a cell."""
    return (
        f"{cell.phase}, {cell.fault}: {cell.outcome}, {cell.wait_s:.1f} s"
        + (f" ({cell.detail})" if cell.detail else "")
        + (f", asked again {cell.again} times" if cell.again else "")
        + ", ended before the fault" * cell.is_early
        + f"; {', '.join(cell.story)}"
    )


def write(page: Path, text: str) -> None:
    """Put the table between the two markers of a page."""
    marked = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    old = page.read_text()
    if marked.search(old) is None:
        raise SystemExit(f"{page}: the markers {BEGIN} and {END} are missing")
    page.write_text(marked.sub(lambda _: f"{BEGIN}\n{text}\n{END}", old))


def main() -> None:
    parser = argparse.ArgumentParser(description="Each fault in each phase; needs root.")
    parser.add_argument("--faults", metavar="A,B", default=",".join(FAULTS))
    parser.add_argument("--phases", metavar="A,B", default=",".join(PHASES))
    parser.add_argument("--patience", type=float, default=120, metavar="S", help="for an answer")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and state there")
    parser.add_argument("--conditions", default="on emulated hosts", help="words for the page")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table there")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    directory = options.keep or Path(tempfile.mkdtemp(prefix="shoal-faults-"))
    cells: list[Cell] = []
    try:
        with standing(directory, "faults", options.patience) as matrix:
            chosen = itertools.product(options.phases.split(","), options.faults.split(","))
            with contextlib.suppress(KeyboardInterrupt):  # The table has the cells until then.
                for phase, fault in chosen:
                    cells.append(matrix.run(fault, phase))
                    say(told(cells[-1]))
            tracebacks = matrix.shoal.tracebacks()
    finally:
        if options.keep is None:
            shutil.rmtree(directory, ignore_errors=True)
    text = table(cells, options.conditions)
    if options.write is not None:
        write(options.write, text)
    if options.json:
        print(json.dumps({"cells": list(map(asdict, cells)), "tracebacks": tracebacks}))
    else:
        print("\n".join([text, *tracebacks]))
    is_bad = bool(tracebacks) or any(cell.outcome in ("wrong", "stuck") for cell in cells)
    sys.exit(is_bad)


if __name__ == "__main__":
    main()
