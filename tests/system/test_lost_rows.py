"""Rows that get lost between two stages: the answer goes on within seconds."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.system.cluster import FIXTURES, Cluster, streamed_tokens

CONTEXT = 1000
REQUEST = {"prompt": "The lamp", "temperature": 1.0, "seed": 5, "max_tokens": 300}

LOSING = """
import pathlib, sys
from agent.relay import Relay
from cli.main import main

once, always = (pathlib.Path(sys.argv.pop(1)) for _ in range(2))
deliver, epochs = Relay._deliver_rows, []

def deliver_some(relay, message, payload):
    epochs.append(relay.epoch)
    if once.exists():
        once.unlink()
    elif not always.exists() or relay.epoch != epochs[0]:
        deliver(relay, message, payload)

Relay._deliver_rows = deliver_some
sys.exit(main())
"""
"""An agent that loses one message of rows while ``once`` exists, or all of its first stage while
``always`` exists."""


class LosingCluster(Cluster):
    """Its agent pi-2 loses rows when it is told to."""

    def command(self, name: str) -> list[str]:
        if name != "pi-2":
            return super().command(name)
        return [sys.executable, "-c", LOSING, *map(str, (self.once, self.always))]

    @property
    def once(self) -> Path:
        return self.directory / "once"

    @property
    def always(self) -> Path:
        return self.directory / "always"


@pytest.fixture
def losing(tmp_path: Path) -> Iterator[LosingCluster]:
    cluster = LosingCluster(tmp_path)
    yield cluster
    cluster.stop()


def test_an_answer_runs_again_and_then_the_model_is_placed_anew(
    losing: LosingCluster, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(FIXTURES / "llama", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config |= {"max_position_embeddings": CONTEXT, "eos_token_id": None}
    (model / "config.json").write_text(json.dumps(config))
    losing.start_coordinator()
    for name in ("pi-1", "pi-2"):
        losing.start_agent(name)
    losing.wait_for_agents("pi-1", "pi-2")
    pins = "--pin=embedding:pi-1", "--pin=layers=1:pi-1", "--pin=head:pi-2"
    losing.load(model, "--bits=32", "--hop-bits=32", f"--context={CONTEXT}", *pins)
    undisturbed = streamed_tokens(losing, REQUEST, threading.Event(), 1)
    assert len(undisturbed) == REQUEST["max_tokens"]

    def kinds() -> list[str]:
        return [event["kind"] for event in losing.get("/shoal/v1/events")["events"]]

    for path, replaced in ((losing.once, 0), (losing.always, 1)):
        begun = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(streamed_tokens, losing, REQUEST, begun, 20)
            assert begun.wait(60)
            path.touch()
            assert answer.result(60) == undisturbed
        assert kinds().count("replaced") == replaced
    assert not losing.once.exists()
    assert "left" not in kinds()
