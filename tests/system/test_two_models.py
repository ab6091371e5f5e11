"""Two models on the same devices: both answer, one is unloaded, a device or coordinator is lost."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.cluster import FIXTURES, Cluster, last_json, streamed_tokens, wait_for

NAMES = ("pi-1", "pi-2", "pi-3")
CONTEXT = 600
TOKENS = 400
FEW = 40
EXACT = ("--bits=32", "--hop-bits=32", f"--context={CONTEXT}")
ON_ALL = ("--pin=embedding:pi-1", "--pin=layers=1:pi-2", "--pin=head:pi-3")


def endless(directory: Path, name: str, fixture: str) -> Path:
    """A model that talks as long as it is let."""
    model = Path(shutil.copytree(FIXTURES / fixture, directory / name))
    config = json.loads((model / "config.json").read_text())
    changes = {"max_position_embeddings": CONTEXT, "eos_token_id": None}
    (model / "config.json").write_text(json.dumps(config | changes))
    return model


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return endless(tmp_path, "talker", "llama"), endless(tmp_path, "speaker", "qwen3")


def start_all(cluster: Cluster, *options: str) -> None:
    cluster.start_coordinator()
    for name in NAMES:
        start(cluster, name, *options)
    cluster.wait_for_agents(*NAMES)


def start(cluster: Cluster, name: str, *options: str) -> None:
    cluster.start_agent(name, f"--coordinator=127.0.0.1:{cluster.control_port}", *options)


def request(model: str, tokens: int = FEW) -> dict[str, Any]:
    return {"model": model, "prompt": "The lamp", "max_tokens": tokens, "temperature": 1, "seed": 7}


def answer(
    cluster: Cluster, model: str, tokens: int = FEW, begun: threading.Event | None = None
) -> list[int]:
    return streamed_tokens(cluster, request(model, tokens), begun or threading.Event(), 10)


def shown(cluster: Cluster) -> dict[str, str]:
    """The state of each model."""
    ps = cluster.get("/shoal/v1/ps")
    found = [ps["model"], *ps.get("beside", ())] if ps["model"] else []
    return {model["model"]: model["state"] for model in found}


def story(cluster: Cluster) -> list[str]:
    """The kinds of all events."""
    return [event["kind"] for event in cluster.get("/shoal/v1/events")["events"]]


def listed(cluster: Cluster) -> list[str]:
    return sorted(model["id"] for model in cluster.get("/v1/models")["data"])


def unload(cluster: Cluster, *names: str) -> Any:
    return last_json(cluster.run("unload", *names, "--json"))


def alone(cluster: Cluster, models: tuple[Path, Path]) -> dict[str, list[int]]:
    """The answer of each model when nothing else is loaded."""
    answers = {}
    for model in models:
        cluster.load(model, *EXACT, *ON_ALL, "--replace")
        assert listed(cluster) == [model.name]
        answers[model.name] = answer(cluster, model.name, TOKENS)
        assert len(answers[model.name]) == TOKENS
    return answers


def test_a_device_and_then_the_coordinator_are_lost_while_both_answer(
    cluster: Cluster, models: tuple[Path, Path]
) -> None:
    start_all(cluster)
    expected = alone(cluster, models)
    cluster.load(models[0], *EXACT, *ON_ALL)  # The other one stays.
    names = [model.name for model in models]
    assert shown(cluster) == dict.fromkeys(names, "ready")
    assert listed(cluster) == sorted(names)
    metrics = httpx.get(cluster.url + "/metrics", trust_env=False).text
    for name in names:
        assert f'shoal_stage_token_predicted_seconds{{device="pi-1",model="{name}"}}' in metrics
    with ThreadPoolExecutor(2) as pool:
        begun = {name: threading.Event() for name in names}
        answers = {name: pool.submit(answer, cluster, name, TOKENS, begun[name]) for name in names}
        wait_for(lambda: all(event.is_set() for event in begun.values()), 60, "two answers")
        cluster.kill("pi-2")
        cluster.processes["pi-2"].wait()
        assert {name: found.result(120) for name, found in answers.items()} == expected
    assert story(cluster).count("lost") == 2
    assert shown(cluster) == dict.fromkeys(names, "ready")

    cluster.kill("coordinator")
    with cluster.processes["coordinator"]:  # Its pipe is closed, too.
        pass
    cluster.start_coordinator("--no-mdns", f"--port={cluster.control_port}")
    wait_for(lambda: shown(cluster) == dict.fromkeys(names, "ready"), 60, "both models")
    assert story(cluster).count("adopted") == 2  # Nothing was loaded again.
    few = {name: tokens[:FEW] for name, tokens in expected.items()}
    assert {name: answer(cluster, name) for name in names} == few

    assert unload(cluster, names[0])["models"] == [names[0]]
    assert shown(cluster) == {names[1]: "ready"}
    assert answer(cluster, names[1]) == few[names[1]]
    refused = httpx.post(f"{cluster.url}/v1/completions", json=request(names[0]), trust_env=False)
    assert refused.json()["error"]["code"] == "model_not_found"
    missing = cluster.run("unload", "nobody")
    assert missing.returncode != 0
    assert f"'nobody' is not loaded; {names[1]} is" in missing.stderr
    assert unload(cluster)["models"] == [names[1]]
    assert shown(cluster) == {}


def test_a_model_gets_what_the_others_leave(cluster: Cluster, tmp_path: Path) -> None:
    """Memory for one and a half models: the second one is refused until the first one goes."""
    first, other = endless(tmp_path, "talker", "llama"), endless(tmp_path, "speaker", "llama")
    cluster.start_coordinator()
    start(cluster, "pi-1")
    cluster.wait_for_agents("pi-1")
    needed_bytes = cluster.load(first, *EXACT)["plan"]["stages"][0]["memory_bytes"]
    unload(cluster)
    cluster.processes["pi-1"].terminate()
    cluster.processes["pi-1"].wait(20)
    wait_for(lambda: not cluster.names(), 60, "the agent's end")
    start(cluster, "pi-1", f"--memory={int(1.5 * needed_bytes)}")
    cluster.wait_for_agents("pi-1")
    cluster.load(first, *EXACT)
    refused = cluster.run("load", str(other), *EXACT)
    assert refused.returncode != 0
    assert "talker stays loaded. Alone it would fit" in refused.stderr
    assert shown(cluster) == {"talker": "ready"}
    before = answer(cluster, "talker")
    cluster.load(first, *EXACT)  # It takes its own place.
    assert answer(cluster, "talker") == before
    cluster.load(other, *EXACT, "--replace")
    assert shown(cluster) == {"speaker": "ready"}


def test_a_model_that_nobody_uses_makes_room_until_a_request_names_it(
    cluster: Cluster, models: tuple[Path, Path]
) -> None:
    start_all(cluster)
    sleeper, other = models
    cluster.load(sleeper, *EXACT, "--keep=2s")
    expected = answer(cluster, sleeper.name)
    cluster.load(other, *EXACT)
    wait_for(lambda: shown(cluster)[sleeper.name] == "asleep", 60, "sleep")
    assert listed(cluster) == sorted(model.name for model in models)
    assert answer(cluster, other.name)
    url = f"{cluster.url}/v1/completions"
    body = {**request(sleeper.name), "stream": True}
    with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as response:
        first = next(line for line in response.iter_lines() if line)
        assert first == f": {sleeper.name} is asleep"
    assert answer(cluster, sleeper.name) == expected
    wait_for(lambda: shown(cluster)[sleeper.name] == "asleep", 60, "sleep")
    whole = httpx.post(url, json=request(sleeper.name), timeout=60, trust_env=False)
    assert whole.json()["usage"]["completion_tokens"] == FEW
