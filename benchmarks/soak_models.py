"""Three models that are loaded and unloaded at random while clients ask all of them.

    make soak-models
    python -m benchmarks.soak_models --minutes 5 --seed 7 --json

A coordinator and three agents on the loopback interface have memory for all three models, at 32
bits. Clients ask a random model by its name, whole or streamed, and compare the answer with the one
that it gave alone. Meanwhile one thread loads a model beside the others or in their place, some of
them with ``--keep``, or unloads one. Now and then an agent is killed, and started again.

An answer may be refused, because its model is not there or was unloaded under it. It must never be
another one's. The exit code is 1 if an answer was wrong or stuck, or if something was left over. It
is also 1 if a log holds a traceback, or if a figure of the coordinator or of the first agent grew.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import soak
from benchmarks.random_model import Shape, make_model
from benchmarks.soak import AGENTS, FOLLOWED, PATIENCE_S, ROOT, SAMPLE_S, SHOAL, Watch

CONTEXT_TOKENS = 256
TOKENS = 48
SHAPES = {
    name: Shape(hidden=128, ffn=352, layers=layers, heads=4)
    for name, layers in (("minnow", 3), ("perch", 4), ("pike", 5))
}
PROMPTS = ("The lamp is in the attic.", "Where is the meter? " * 3, "x")
CLIENTS = 4


class Shoal(soak.Shoal):
    """The processes, and the folders of three models."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.models = {name: directory / "models" / name for name in SHAPES}
        for name, shape in SHAPES.items():
            make_model(self.models[name], shape, CONTEXT_TOKENS)

    def wait(self) -> None:
        while len(self.get("/shoal/v1/devices")["devices"]) < len(AGENTS):
            time.sleep(0.2)  # Joining tells no event here.

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603 - our own command
            [*SHOAL, *arguments, f"--url={self.url}"],
            check=False, cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip

    def put(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self.command(
            "load", str(self.models[name]), "--bits=32", "--hop-bits=32", "--slots=2",
            f"--context={CONTEXT_TOKENS}", "--max-weight-error=none", "--no-teams", *options,
        )  # fmt: skip

    def body(self, name: str, prompt: str) -> dict[str, Any]:
        return {
            "model": name, "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True,
            "temperature": 0, "return_token_ids": True,
        }  # fmt: skip

    def tokens(self, name: str, prompt: str) -> list[int]:
        answer = httpx.post(
            f"{self.url}/v1/completions", json=self.body(name, prompt), timeout=PATIENCE_S,
            trust_env=False,
        )  # fmt: skip
        answer.raise_for_status()
        found: list[int] = answer.json()["shoal"]["tokens"]
        return found


class Clients:
    """Threads that ask random models until they are stopped."""

    def __init__(self, shoal: Shoal, expected: dict[tuple[str, str], list[int]], seed: int) -> None:
        self._shoal, self._expected = shoal, expected
        self.did: Counter[str] = Counter()
        self.faults: list[str] = []
        self.stop = threading.Event()
        self.threads = [
            threading.Thread(target=self._live, args=(random.Random(f"{seed} {number}"),))
            for number in range(CLIENTS)
        ]

    def _live(self, chance: random.Random) -> None:
        asked = list(self._expected)
        with httpx.Client(timeout=PATIENCE_S, trust_env=False) as client:
            while not self.stop.is_set():
                which = chance.choice(asked)
                try:
                    outcome = self._one(client, which, is_stream=chance.random() < 0.5)
                except httpx.TimeoutException:
                    outcome = "stuck"
                    self.faults.append(f"stuck: {which}")
                except (httpx.TransportError, OSError) as error:
                    outcome = f"broken off: {type(error).__name__}"
                self.did[outcome] += 1
                if outcome not in ("right", "right, streamed"):
                    self.stop.wait(0.3)

    def _one(self, client: httpx.Client, which: tuple[str, str], *, is_stream: bool) -> str:
        body, expected = self._shoal.body(*which), self._expected[which]
        url = f"{self._shoal.url}/v1/completions"
        if not is_stream:
            answer = client.post(url, json=body).json()
            if "error" in answer:
                return f"refused: {answer['error'].get('code')}"
            return self._judged(which, answer["shoal"]["tokens"], expected, "right")
        tokens: list[int] = []
        with client.stream("POST", url, json={**body, "stream": True}) as response:
            if response.status_code != 200:
                error = json.loads(response.read())["error"]
                return f"refused: {error.get('code')}"
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return f"refused: {event['error'].get('code')}"
                tokens = event.get("shoal", {}).get("tokens", tokens)
        return self._judged(which, tokens, expected, "right, streamed")

    def _judged(
        self, which: tuple[str, str], tokens: list[int], expected: list[int], right: str
    ) -> str:
        if tokens == expected:
            return right
        self.faults.append(f"wrong: {which}: {tokens[:8]} in place of {expected[:8]}")
        return "wrong"


def operate(shoal: Shoal, chance: random.Random, over: threading.Event, did: Counter[str]) -> None:
    """Load and unload at random until it is over."""
    while not over.is_set():
        name = chance.choice(list(SHAPES))
        deed = chance.choices(("load", "load --keep", "load --replace", "unload"), (4, 2, 1, 3))[0]
        if deed == "unload":
            done = shoal.command("unload", name)
        else:
            options = {"load": (), "load --keep": ("--keep=2s",), "load --replace": ("--replace",)}
            done = shoal.put(name, *options[deed])
        did[deed if done.returncode == 0 else f"{deed}: failed"] += 1
        over.wait(chance.uniform(0.5, 4.0))


def alone(shoal: Shoal) -> dict[tuple[str, str], list[int]]:
    """The tokens of every request, asked of each model when no other is there."""
    answers = {}
    for name in SHAPES:
        done = shoal.put(name, "--replace")
        if done.returncode:
            raise RuntimeError(done.stderr)
        for prompt in PROMPTS:
            answers[name, prompt] = shoal.tokens(name, prompt)
    return answers


def left_over(shoal: Shoal) -> list[str]:
    """The things that are still there once all models are unloaded."""
    deadline_s = time.monotonic() + PATIENCE_S
    while shoal.command("unload").returncode and time.monotonic() < deadline_s:
        time.sleep(0.5)  # Another operation may be under way.
    ps, flying = shoal.get("/shoal/v1/ps"), shoal.get("/shoal/v1/requests")["in_flight"]
    found = [f"{ps['model']['model']} is {ps['model']['state']}"] if ps["model"] else []
    return found + [f"{len(flying)} in flight"] * bool(flying)


def run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    shoal, deeds = Shoal(directory), Counter[str]()
    soak.MEMORY = "64M"
    try:
        shoal.start()
        shoal.wait()
        expected = alone(shoal)
        clients, over = Clients(shoal, expected, options.seed), threading.Event()
        watch = Watch({name: psutil.Process(shoal.processes[name].pid) for name in FOLLOWED})

        def sample() -> None:
            while not over.wait(SAMPLE_S):
                watch.sample()

        chance = random.Random(options.seed)
        operator = threading.Thread(target=operate, args=(shoal, chance, over, deeds))
        threads = [threading.Thread(target=sample), operator, *clients.threads]
        watch.sample()
        for thread in threads:
            thread.start()
        until_s = time.monotonic() + 60 * options.minutes
        try:
            kills = soak.disturb(shoal, random.Random(-options.seed), until_s, options.kill_every)
        finally:
            clients.stop.set()
            over.set()
            for thread in threads:
                thread.join()
        left = left_over(shoal)
        shoal.wait()
        again = [] if alone(shoal) == expected else ["the answers differ at the end"]
    finally:
        shoal.stop()
    did = {"operations": dict(deeds.most_common()), "did": dict(clients.did.most_common())}
    faults = [*clients.faults, *left, *again]
    return soak.summary(shoal, watch, options, kills, faults) | did


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill-every", type=float, default=60.0, metavar="S")
    parser.add_argument("--logs", type=Path, help="Keep the processes' files in this folder.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.logs is not None:
        options.logs.mkdir(parents=True)
        seen = run(options, options.logs)
    else:
        with tempfile.TemporaryDirectory(prefix="shoal-soak-") as directory:
            seen = run(options, Path(directory))
    soak.tell(seen, as_json=options.json)


if __name__ == "__main__":
    main()
