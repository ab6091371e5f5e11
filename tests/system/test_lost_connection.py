"""An agent whose control connection alone ends comes back, and nothing is loaded anew."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.system.cluster import FIXTURES, Cluster, streamed_tokens
from tests.system.connections import Way

NAMES = ("pi-1", "pi-2")
CONTEXT = 2000
REQUEST = {"prompt": "The lamp", "temperature": 1.0, "seed": 5, "max_tokens": 400}


@pytest.mark.parametrize("victim", NAMES)
def test_an_answer_goes_on_over_the_same_stages(
    cluster: Cluster, tmp_path: Path, victim: str
) -> None:
    model = Path(shutil.copytree(FIXTURES / "llama", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config |= {"max_position_embeddings": CONTEXT, "eos_token_id": None}
    (model / "config.json").write_text(json.dumps(config))
    cluster.start_coordinator()
    with contextlib.closing(Way(cluster.control_port)) as way:
        for name in NAMES:
            port = way.port if name == victim else cluster.control_port
            cluster.start_agent(name, f"--coordinator=127.0.0.1:{port}")
        cluster.wait_for_agents(*NAMES)
        cluster.load(
            model,
            *("--bits=32", "--hop-bits=32", f"--context={CONTEXT}"),
            *("--pin=embedding:pi-1", "--pin=layers=1:pi-1", "--pin=head:pi-2"),
        )
        undisturbed = streamed_tokens(cluster, REQUEST, threading.Event(), 1)
        assert len(undisturbed) == REQUEST["max_tokens"]
        with ThreadPoolExecutor(1) as pool:
            for _ in range(2):
                begun = threading.Event()
                answer = pool.submit(streamed_tokens, cluster, REQUEST, begun, 20)
                assert begun.wait(60)
                way.cut()
                assert answer.result(60) == undisturbed
        assert way.carried >= 3
        told = [event["kind"] for event in cluster.get("/shoal/v1/events")["events"]]
        assert told.count("adopted") == 2
        assert "replaced" not in told
        for name in NAMES:
            assert cluster.log(name).count("loaded ") == 1, cluster.log(name)
        assert f"{victim} is back with its stage" in cluster.log("coordinator")
