"""``shoal load A B`` with real processes: two models, planned together, on the same devices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.cluster import FIXTURES, Cluster, last_json

NAMES = ("pi-1", "pi-2")
CONTEXT = 256
TOKENS = 40
EXACT = ("--bits=32", "--hop-bits=32", f"--context={CONTEXT}", "--objective=latency")


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    found = []
    for name, fixture in (("talker", "llama"), ("speaker", "qwen3")):
        model = Path(shutil.copytree(FIXTURES / fixture, tmp_path / name))
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
        found.append(model)
    return found[0], found[1]


def answer(cluster: Cluster, model: str) -> str:
    body = {"model": model, "prompt": "The lamp", "max_tokens": TOKENS, "temperature": 0}
    found = httpx.post(f"{cluster.url}/v1/completions", json=body, trust_env=False, timeout=60)
    assert found.status_code == 200, found.text
    return str(found.json()["choices"][0]["text"])


def states(cluster: Cluster) -> dict[str, str]:
    ps = cluster.get("/shoal/v1/ps")
    found = [ps["model"], *ps.get("beside", ())] if ps["model"] else []
    return {model["model"]: model["state"] for model in found}


def joint(cluster: Cluster, command: str, *arguments: str | Path) -> Any:
    return last_json(cluster.run(command, *map(str, arguments), *EXACT, "--json"))


def test_two_models_are_loaded_together(
    cluster: Cluster, models: tuple[Path, Path], tmp_path: Path
) -> None:
    cluster.start_coordinator()
    for name in NAMES:
        cluster.start_agent(name, f"--coordinator=127.0.0.1:{cluster.control_port}")
    cluster.wait_for_agents(*NAMES)
    names = [model.name for model in models]
    expected = {}
    for model in models:
        cluster.load(model, *EXACT, "--replace")
        expected[model.name] = answer(cluster, model.name)
    only_last = states(cluster)
    assert only_last == {names[1]: "ready"}

    planned = joint(cluster, "plan", *models, "--weights=1,2")
    assert [entry["model"] for entry in planned["models"]] == names
    assert [entry["share"] for entry in planned["models"]] == pytest.approx([1 / 3, 2 / 3])
    assert states(cluster) == only_last  # Nothing is loaded by planning.

    saved, drawn = tmp_path / "plans.json", tmp_path / "plans.svg"
    explained = joint(
        cluster, "plan", *models, "--weights=1,2", "--explain", f"--save={saved}", f"--plot={drawn}"
    )
    assert [turn["order"] for turn in explained["explanation"]["one_after_the_other"]] == [
        names,
        names[::-1],
    ]
    assert not {"problem"} & explained["models"][0].keys()
    assert drawn.read_text().startswith("<svg ")
    # A saved plan is loaded as it is, also if the best one is another.
    wanted = json.loads(saved.read_text())
    assert wanted["weights"] == [1, 2]
    for plan in wanted["plans"]:
        (*_, last) = plan["stages"]
        last["device"] = NAMES[1] if last["device"] == NAMES[0] else NAMES[0]
    saved.write_text(json.dumps(wanted))
    given = joint(cluster, "load", models[1], models[0], f"--plan={saved}", "--replace")
    assert {entry["model"]: entry["share"] for entry in given["models"]} == {
        names[0]: pytest.approx(1 / 3),
        names[1]: pytest.approx(2 / 3),
    }
    assert {
        entry["model"]: [stage["device"] for stage in entry["plan"]["stages"]]
        for entry in given["models"]
    } == {plan["model"]: [stage["device"] for stage in plan["stages"]] for plan in wanted["plans"]}
    assert {name: answer(cluster, name) for name in names} == expected

    loaded = joint(cluster, "load", *models, "--keep=1h", "--replace")
    kept = json.loads((cluster.directory / "coordinator" / "loaded.json").read_text())["models"]
    assert {name: one["request"]["keep_s"] for name, one in kept.items()} == dict.fromkeys(
        names, 3600
    )
    assert [state["model"] for state in loaded["loaded"]] == names
    assert states(cluster) == dict.fromkeys(names, "ready")
    assert {name: answer(cluster, name) for name in names} == expected
    for device in loaded["devices"]:
        assert device["memory_part"] <= 1
    for entry in loaded["models"]:
        assert entry["predicted_together_s"] >= entry["predicted_alone_s"] > 0

    # A third load ends them only if asked. Wrong requests change nothing.
    for arguments, words in (
        ([models[0], models[0]], "a model is named twice"),
        ([*models, "--weights=1"], "--weights has 1 numbers for 2 models"),
    ):
        refused = cluster.run("load", *map(str, arguments))
        assert refused.returncode != 0
        assert words in refused.stderr
    assert states(cluster) == dict.fromkeys(names, "ready")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"models": []}, "models: expected 2 to 8 requests"),
        ({"models": "ab"}, "models: expected a list of requests"),
        (
            {"models": [], "weights": "a"},
            "weights: expected a number from 1e-6 to 1e6 for each model",
        ),
        ({"models": [], "more": 1}, "more: known are models, weights, replaces"),
        ({"models": [], "replaces": 1}, "replaces: expected true or false"),
    ],
)
def test_wrong_requests_are_named(body: dict[str, Any], message: str) -> None:
    from coordinator.loading.several import SeveralRequest
    from planning.errors import RequestInvalid

    with pytest.raises(RequestInvalid, match=message):
        SeveralRequest.from_dict(body)


def test_models_that_do_not_fit_together_leave_the_loaded_one_alone(
    cluster: Cluster, models: tuple[Path, Path]
) -> None:
    cluster.start_coordinator()
    cluster.start_agent("pi-1", f"--coordinator=127.0.0.1:{cluster.control_port}")
    cluster.wait_for_agents("pi-1")
    needed = [
        cluster.load(model, *EXACT, "--replace")["plan"]["stages"][0]["memory_bytes"]
        for model in models
    ]
    cluster.processes["pi-1"].terminate()
    cluster.processes["pi-1"].wait(20)
    cluster.start_agent(
        "pi-1",
        f"--coordinator=127.0.0.1:{cluster.control_port}",
        f"--memory={sum(needed) - 10_000}",
    )
    cluster.wait_for_agents("pi-1")
    cluster.load(models[0], *EXACT, "--replace")
    refused = cluster.run("load", *map(str, models), *EXACT)
    assert refused.returncode != 0
    assert "talker and speaker do not fit together: memory is short by 0.1 MB" in refused.stderr
    assert states(cluster) == {"talker": "ready"}
