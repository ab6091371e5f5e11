"""Models that were planned together lose a device: they are planned together again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pytest

from model.families import load_spec
from tests.system import made_up
from tests.system.cluster import FIXTURES, Cluster, last_json, wait_for

CONTEXT = 256
TOKENS = 24
EXACT = ("--bits=32", "--hop-bits=32", f"--context={CONTEXT}", "--objective=latency")
WEIGHTS = (1.0, 3.0)


def endless(directory: Path, name: str, fixture: str) -> Path:
    """A model that talks as long as it is let."""
    model = Path(shutil.copytree(FIXTURES / fixture, directory / name))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    return model


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return endless(tmp_path, "speaker", "qwen3"), endless(tmp_path, "talker", "llama")


def start(cluster: Cluster, name: str, *options: str) -> None:
    cluster.start_agent(name, f"--coordinator=127.0.0.1:{cluster.control_port}", *options)


def shown(cluster: Cluster) -> dict[str, dict[str, Any]]:
    ps = cluster.get("/shoal/v1/ps")
    found = [ps["model"], *ps.get("beside", ())] if ps["model"] else []
    return {model["model"]: model for model in found}


def states(cluster: Cluster) -> dict[str, str]:
    return {name: model["state"] for name, model in shown(cluster).items()}


def devices(cluster: Cluster) -> dict[str, set[str]]:
    """The devices of each model."""
    return {
        name: {stage["device"] for stage in model["plan"]["stages"]}
        for name, model in shown(cluster).items()
    }


def answer(cluster: Cluster, model: str) -> str:
    body = {"model": model, "prompt": "The lamp", "max_tokens": TOKENS, "temperature": 0}
    found = httpx.post(f"{cluster.url}/v1/completions", json=body, trust_env=False, timeout=60)
    assert found.status_code == 200, found.text
    return str(found.json()["choices"][0]["text"])


def load_together(cluster: Cluster, models: tuple[Path, Path]) -> Any:
    weights = "--weights=" + ",".join(f"{weight:g}" for weight in WEIGHTS)
    return last_json(cluster.run("load", *map(str, models), *EXACT, weights, "--json"))


def needed_bytes(cluster: Cluster, model: Path) -> int:
    """The memory of a whole model on one device."""
    plan = cluster.load(model, *EXACT, "--replace")["plan"]
    return sum(stage["memory_bytes"] for stage in plan["stages"])


def slower(cluster: Cluster, models: tuple[Path, Path], times: float) -> str:
    """The option of an agent whose device takes so many times as long as the others."""
    directory = cluster.directory / f"measurements-{times:g}"
    directory.mkdir()
    with (
        patch.object(made_up, "READ_BYTES_PER_S", made_up.READ_BYTES_PER_S / times),
        patch.object(made_up, "FLOP_PER_S", made_up.FLOP_PER_S / times),
        patch.object(made_up, "CALL_S", times * made_up.CALL_S),
        patch.object(made_up, "OWN_S", times * made_up.OWN_S),
    ):
        made_up.add_device(directory / "calibration.json")
        for model in models:
            made_up.add_model(directory / "calibration.json", load_spec(model))
    return f"--measurements-dir={directory}"


def lose(cluster: Cluster, name: str) -> None:
    cluster.kill(name)
    cluster.processes[name].wait()
    wait_for(lambda: name not in cluster.names(), 60, "the loss")


@pytest.mark.thorough
def test_models_that_were_planned_together_are_planned_together_again(
    cluster: Cluster, models: tuple[Path, Path]
) -> None:
    """The large one fits only the quick device, which each would take if it were alone."""
    names = large, small = [model.name for model in models]
    cluster.start_coordinator()
    start(cluster, "whole")
    cluster.wait_for_agents("whole")
    large_bytes, small_bytes = (needed_bytes(cluster, model) for model in models)
    assert large_bytes > small_bytes
    slow = slower(cluster, models, 32)
    start(cluster, "quick", f"--memory={large_bytes + 4000}", slower(cluster, models, 8))
    start(cluster, "slow", f"--memory={small_bytes + 4000}", slow)
    cluster.wait_for_agents("quick", "slow", "whole")
    load_together(cluster, models)
    assert devices(cluster) == {name: {"whole"} for name in names}
    kept = json.loads((cluster.directory / "coordinator" / "loaded.json").read_text())["models"]
    weights = dict(zip(names, WEIGHTS, strict=True))
    assert [kept[name]["request"]["together"] for name in names] == [weights] * 2
    expected = {name: answer(cluster, name) for name in names}

    lose(cluster, "whole")
    wait_for(lambda: states(cluster) == dict.fromkeys(names, "ready"), 60, "both models")
    assert devices(cluster) == {large: {"quick"}, small: {"slow"}}
    assert {name: answer(cluster, name) for name in names} == expected

    # Without the slow device there is room for one of them. It stays where it is.
    lose(cluster, "slow")
    wait_for(lambda: states(cluster)[small] == "recovering", 60, "the loss")
    wait_for(lambda: "waits for room" in shown(cluster)[small]["reason"], 60, "the reason")
    assert f"{small} waits for room beside {large}: " in shown(cluster)[small]["reason"]
    assert answer(cluster, large) == expected[large]

    start(cluster, "slow", f"--memory={small_bytes + 4000}", slow)
    wait_for(lambda: states(cluster) == dict.fromkeys(names, "ready"), 60, "both models again")
    assert devices(cluster) == {large: {"quick"}, small: {"slow"}}
    assert {name: answer(cluster, name) for name in names} == expected
