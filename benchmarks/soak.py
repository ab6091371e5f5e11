"""Random clients for an hour: they cancel, time out, send garbage; devices fail meanwhile.

    make soak
    python -m benchmarks.soak --minutes 5 --seed 7 --json

A coordinator and three agents on the loopback interface share the embedded model at 32 bits, which
no agent can hold alone. Each client thread chooses again and again what to do:

- ask for a whole answer or a stream, greedy or drawn, and compare it with the one computed alone;
- go away in the middle of a stream, or before the answer;
- wait too short a time;
- send wrong fields, broken JSON, no HTTP at all, a body that never ends, or a wrong key.

Now and then an agent is killed, and started again. The first agent is never killed, so its memory
can be followed. Each ten seconds the memory, descriptors and threads of the coordinator and of the
first agent are read. At the end nothing may be in flight, no slot in use, and no log may hold a
traceback. The exit code is 1 if an answer was wrong or stuck, or if something was left over. It is
also 1 if a figure grew by more than GROWTH from the third quarter of the time to the last.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import httpx
import psutil

ROOT = Path(__file__).parents[1]
SHOAL = (sys.executable, "-m", "cli")
MODEL = ROOT / "examples" / "tiny-opt" / "model"
AGENTS = ("ash", "birch", "cedar")
MEMORY = "7M"
SLOTS, CONTEXT_TOKENS = 3, 192
PATIENCE_S = 90.0
"""An answer that takes longer is stuck. A recovery takes seconds."""

SAMPLE_S = 10.0
GROWTH = 0.05
"""The share by which a median may grow. Caches of the allocator fill for some minutes before."""

PROMPTS = (
    "The lamp is in the attic. The meter in the cellar reads 42. Where is the lamp?",
    "The key is in the kitchen. Where is the key?",
    "The cat",
    "The meter in the cellar reads 17. What does the meter read?",
)
ASKED = tuple(
    {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "return_token_ids": True, **drawn}
    for prompt in PROMPTS
    for tokens in (4, 60)
    for drawn in ({"temperature": 0}, {"temperature": 1.0, "seed": 7})
)
"""The requests whose answers are known."""

GARBAGE: tuple[bytes, ...] = (
    b"{", b"[]", b"null", b'{"prompt": 3}', b'{"prompt": "a", "nonsense": 1}', b"\xff\xfe",
    b'{"prompt": "a", "max_tokens": -1}', b'{"prompt": "' + b"x" * 300_000 + b'"}', b"[" * 10_000,
    b'{"prompt": "a", "temperature": "hot"}', b'{"prompt": "a", "stop": [[]]}',
)  # fmt: skip
RAW = (b"\0" * 64, b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00", b"POST /v1/completions HT")


class Shoal:
    """The processes, on ports of the loopback interface."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.url, self.control_port = "", 0

    def start(self) -> None:
        coordinator = self._spawn(
            "coordinator", "coordinator", "--json", "--no-mdns", "--bind=127.0.0.1", "--port=0",
            "--http=127.0.0.1:0", f"--state-dir={self.directory}/coordinator", "--queue=2",
            "--log-level=warning", "--create-token", f"--token-file={self.directory}/token",
        )  # fmt: skip
        ready = json.loads(coordinator.stdout.readline() if coordinator.stdout else "")
        self.url, self.control_port = ready["http"], ready["control_port"]
        for name in AGENTS:
            self.start_agent(name)

    def start_agent(self, name: str) -> None:
        self._spawn(
            name, "agent", f"--name={name}", "--bind=127.0.0.1", "--threads=1", "--exact",
            f"--memory={MEMORY}", f"--coordinator=127.0.0.1:{self.control_port}",
            f"--state-dir={self.directory}/{name}", f"--measurements-dir={self.directory}",
            f"--token-file={self.directory}/token",
        )  # fmt: skip

    def _spawn(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        out = subprocess.PIPE if name == "coordinator" else subprocess.DEVNULL
        with (self.directory / f"{name}.log").open("a") as log:
            process = subprocess.Popen(  # noqa: S603 - our own command
                [*SHOAL, *arguments], stdout=out, stderr=log, text=True, cwd=ROOT
            )
        self.processes[name] = process
        return process

    def load(self) -> None:
        while len(self.get("/shoal/v1/devices")["devices"]) < len(AGENTS):
            time.sleep(0.2)  # Joining tells no event here.
        subprocess.run(  # noqa: S603 - our own command
            [
                *SHOAL, "load", str(MODEL), "--bits=32", "--hop-bits=32", f"--slots={SLOTS}",
                f"--context={CONTEXT_TOKENS}", "--max-weight-error=none", "--no-teams",
                f"--pin=embedding:{AGENTS[0]}", f"--url={self.url}",
            ],
            check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, timeout=PATIENCE_S, trust_env=False).json()

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait()

    def tracebacks(self) -> list[str]:
        logs = self.directory.glob("*.log")
        return [path.name for path in logs if "Traceback" in path.read_text(errors="replace")]


class Clients:
    """Threads that do one random thing after the other."""

    def __init__(self, shoal: Shoal, expected: list[list[int]], seed: int, count: int) -> None:
        self._shoal, self._expected = shoal, expected
        self.did: Counter[str] = Counter()
        self.faults: list[str] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._live, args=(random.Random(f"{seed} {number}"),))
            for number in range(count)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _live(self, chance: random.Random) -> None:
        deeds: tuple[tuple[Callable[[random.Random], str], int], ...] = (
            (self._whole, 4), (self._stream, 6), (self._cancel, 4), (self._hurry, 3),
            (self._garbage, 3), (self._raw, 2), (self._slow, 1),
        )  # fmt: skip
        kinds, weights = zip(*deeds, strict=True)
        while not self._stop.is_set():
            (deed,) = chance.choices(kinds, weights)
            try:
                self.did[deed(chance)] += 1
            except (httpx.TransportError, OSError) as error:
                self.did[f"broken off: {type(error).__name__}"] += 1
            self._stop.wait(chance.expovariate(20))

    @contextmanager
    def _client(self, timeout_s: float = PATIENCE_S) -> Iterator[httpx.Client]:
        with httpx.Client(base_url=self._shoal.url, timeout=timeout_s, trust_env=False) as client:
            yield client

    def _judge(self, which: int, tokens: list[int], status: int) -> str:
        if status in (429, 503):
            return f"told to come later ({status})"
        if tokens != self._expected[which]:
            self.faults.append(f"wrong: {ASKED[which]}: {status}, {tokens[:8]} ...")
            return "wrong"
        return "right"

    def _whole(self, chance: random.Random) -> str:
        which, started_s = chance.randrange(len(ASKED)), time.monotonic()
        with self._client() as client:
            answer = client.post("/v1/completions", json=ASKED[which])
        if answer.status_code == 502:
            return "refused: a device failed"
        tokens = answer.json().get("shoal", {}).get("tokens", [])
        self._note_stuck(started_s)
        return self._judge(which, tokens, answer.status_code)

    def _stream(self, chance: random.Random) -> str:
        which, started_s, tokens = chance.randrange(len(ASKED)), time.monotonic(), list[int]()
        with (
            self._client() as client,
            client.stream("POST", "/v1/completions", json={**ASKED[which], "stream": True}) as got,
        ):
            for line in got.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return f"refused: {event['error']['code']}"
                tokens = event.get("shoal", {}).get("tokens", tokens)
        self._note_stuck(started_s)
        return self._judge(which, tokens, got.status_code)

    def _note_stuck(self, started_s: float) -> None:
        lasted_s = time.monotonic() - started_s
        if lasted_s > PATIENCE_S:
            self.faults.append(f"stuck: an answer took {lasted_s:.0f} s")

    def _cancel(self, chance: random.Random) -> str:
        body = {**ASKED[chance.randrange(len(ASKED))], "stream": True}
        left = chance.randrange(20)
        with (
            self._client() as client,
            client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            for _ in answer.iter_lines():
                left -= 1
                if left < 0:
                    return "went away in a stream"
        return "wanted to go away too late"

    def _hurry(self, chance: random.Random) -> str:
        try:
            with self._client(chance.uniform(0.001, 0.05)) as client:
                client.post("/v1/completions", json=ASKED[chance.randrange(len(ASKED))])
        except httpx.TimeoutException:
            return "timed out"
        return "was quick enough"

    def _garbage(self, chance: random.Random) -> str:
        path = chance.choice(("/v1/completions", "/v1/chat/completions", "/shoal/v1/load", "/no"))
        body = chance.choice(GARBAGE)
        with self._client() as client:
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        if answer.status_code >= 500 and answer.status_code != 503:
            self.faults.append(f"{path} answers {answer.status_code} to {body[:60]!r}")
        return "sent garbage"

    def _raw(self, chance: random.Random) -> str:
        url = httpx.URL(self._shoal.url)
        port = chance.choice((url.port or 0, self._shoal.control_port))
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as sock:
            sock.sendall(chance.choice(RAW))
            sock.settimeout(0.2)
            with suppress(TimeoutError):
                sock.recv(4096)
        return "sent no request"

    def _slow(self, chance: random.Random) -> str:
        port = httpx.URL(self._shoal.url).port or 0
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as sock:
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            self._stop.wait(chance.uniform(0, 2))
        return "left a body unfinished"


class Watch:
    """Samples of processes that live through the whole run."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self._processes = processes
        self.samples: dict[str, list[dict[str, float]]] = {name: [] for name in processes}

    def sample(self) -> None:
        for name, process in self._processes.items():
            self.samples[name].append(
                {
                    "at_s": time.monotonic(),
                    "rss_bytes": process.memory_info().rss,
                    "descriptors": process.num_fds(),
                    "threads": process.num_threads(),
                }
            )

    def report(self) -> dict[str, Any]:
        """Medians of the third and the last quarter, and the maximum, by process and figure."""
        found: dict[str, Any] = {}
        for name, samples in self.samples.items():
            quarter = max(len(samples) // 4, 1)
            found[name] = {
                figure: {
                    "third_quarter": median(
                        item[figure] for item in samples[-2 * quarter : -quarter] or samples
                    ),
                    "last_quarter": median(item[figure] for item in samples[-quarter:]),
                    "most": max(item[figure] for item in samples),
                }
                for figure in ("rss_bytes", "descriptors", "threads")
            }
        return found


def alone(shoal: Shoal) -> list[list[int]]:
    """The tokens of every known request, asked one after the other."""
    answers = []
    with httpx.Client(base_url=shoal.url, timeout=PATIENCE_S, trust_env=False) as client:
        for body in ASKED:
            answer = client.post("/v1/completions", json=body)
            answer.raise_for_status()
            answers.append(answer.json()["shoal"]["tokens"])
    return answers


def disturb(shoal: Shoal, chance: random.Random, until_s: float, every_s: float) -> int:
    """Kill an agent and start it again, until the time is over. Returns how often."""
    kills = 0
    while time.monotonic() + every_s < until_s:
        time.sleep(every_s * chance.uniform(0.5, 1.0))  # Faults come at random.
        name = chance.choice(AGENTS[1:])
        shoal.processes[name].send_signal(signal.SIGKILL)
        shoal.processes[name].wait()
        kills += 1
        time.sleep(chance.uniform(1.0, 6.0))  # So long the device is gone.
        shoal.start_agent(name)
    time.sleep(max(until_s - time.monotonic(), 0))  # The rest of the soak's time.
    return kills


def left_over(shoal: Shoal) -> list[str]:
    """The things that are still in use once all clients are gone."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        model = shoal.get("/shoal/v1/ps")["model"]
        in_flight = shoal.get("/shoal/v1/requests")["in_flight"]
        slots = model.get("slots", {"used": 0, "waiting": 0})
        found = [f"the model is {model['state']}"] * (model["state"] != "ready")
        found += [f"{slots['used']} slots used"] * bool(slots["used"])
        found += [f"{slots['waiting']} waiting"] * bool(slots["waiting"])
        found += [f"{len(in_flight)} in flight"] * bool(in_flight)
        if not found or time.monotonic() > deadline_s:
            return found
        time.sleep(0.5)  # Between two looks at other processes.


def run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    shoal = Shoal(directory)
    try:
        shoal.start()
        shoal.load()
        expected = alone(shoal)
        clients = Clients(shoal, expected, options.seed, options.clients)
        followed = {name: psutil.Process(shoal.processes[name].pid) for name in FOLLOWED}
        watch, over = Watch(followed), threading.Event()

        def sample() -> None:
            while not over.wait(SAMPLE_S):
                watch.sample()

        watch.sample()
        sampling = threading.Thread(target=sample)
        sampling.start()
        clients.start()
        until_s = time.monotonic() + 60 * options.minutes
        try:
            kills = disturb(shoal, random.Random(options.seed), until_s, options.kill_every)
        finally:
            clients.finish()
            over.set()
            sampling.join()
        left = left_over(shoal)
        again = [] if alone(shoal) == expected else ["the answers differ at the end"]
    finally:
        shoal.stop()
    faults = [*clients.faults, *left, *again]
    did = {"did": dict(clients.did.most_common())}
    return summary(shoal, watch, options, kills, faults) | did


def grown(processes: dict[str, Any]) -> list[str]:
    """The figures that grew from the third quarter of the time to the last."""
    return [
        f"{figure} of {name}: {values['third_quarter']:.0f}, then {values['last_quarter']:.0f}"
        for name, figures in processes.items()
        for figure, values in figures.items()
        if values["last_quarter"] > (1 + GROWTH) * values["third_quarter"] + (figure != "rss_bytes")
    ]


FOLLOWED = ("coordinator", AGENTS[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--kill-every", type=float, default=60.0, metavar="S")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-soak-") as directory:
        seen = run(options, Path(directory))
    tell(seen, as_json=options.json)


def summary(
    shoal: Shoal, watch: Watch, options: argparse.Namespace, kills: int, faults: list[str]
) -> dict[str, Any]:
    """Return the run in figures, with all its faults. The processes have ended."""
    processes = watch.report()
    logs = [f"a traceback in {name}" for name in shoal.tracebacks()]
    return {
        "minutes": options.minutes,
        "seed": options.seed,
        "kills": kills,
        "processes": processes,
        "samples": watch.samples,
        "faults": [*faults, *grown(processes), *logs],
    }


def tell(seen: dict[str, Any], *, as_json: bool) -> NoReturn:
    """Print the run, and exit with 1 if it has a fault or no right answer."""
    if as_json:
        sys.stdout.write(json.dumps(seen) + "\n")
    else:
        show(seen)
    sys.exit(bool(seen["faults"]) or not seen["did"].get("right"))


def show(seen: dict[str, Any]) -> None:
    print(f"{seen['minutes']:g} minutes, seed {seen['seed']}, {seen['kills']} agents killed")
    for what, times in {**seen.get("operations", {}), **seen["did"]}.items():
        print(f"{times:>8}  {what}")
    print(f"{'':<14}{'3rd quarter':>14}{'last quarter':>14}{'most':>14}")
    for name, figures in seen["processes"].items():
        for figure, values in figures.items():
            row = (f"{values[key]:>14.0f}" for key in ("third_quarter", "last_quarter", "most"))
            print(f"{name} {figure}".ljust(28) + "".join(row))
    for fault in seen["faults"]:
        print(f"FAULT: {fault}")


if __name__ == "__main__":
    main()
