"""The command line against a serving cluster: tables for people, JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import httpx
import pytest

from model.families import load_spec
from tests.system.cluster import FIXTURES, TINY_OPT, Cluster, last_json, shoal

QUESTION = "The lamp is in the attic. The meter in the cellar reads 42. Where is the lamp?"


def test_devices(serving: Cluster) -> None:
    answer = last_json(serving.run("devices", "--json"))
    assert [device["name"] for device in answer["devices"]] == ["pi-1", "pi-2", "pi-3"]
    for device in answer["devices"]:
        assert device["memory_read_bytes_per_s"] > 0
        assert device["disk_write_bytes_per_s"] > 0
        assert device["storage_bytes"] > 0
    assert len(answer["links"]) == 6
    for link in answer["links"]:
        assert 0 < link["rtt_s"] <= link["rtt_p90_s"]
        assert link["bytes_per_s"] > 0
    table = serving.run("devices").stdout
    assert "pi-3" in table
    assert "round trip ms" in table
    assert "90 %" in table


def test_plan_leaves_what_is_loaded_alone(serving: Cluster) -> None:
    before = serving.get("/shoal/v1/ps")
    answer = last_json(serving.run("plan", str(FIXTURES / "opt-post"), "--json", "--bits=4,8"))
    plan = answer["plan"]
    blocks = plan["blocks"]
    assert [block["block"] for block in blocks] == list(range(len(blocks)))
    assert {block["bits"] for block in blocks} <= {4, 8}
    assert plan["predicted_ms_per_token"] > 0
    assert plan["proven_optimal"]
    assert "predicted:" in serving.run("plan", str(FIXTURES / "opt-post")).stdout
    assert serving.get("/shoal/v1/ps") == before


def test_ps(serving: Cluster) -> None:
    answer = last_json(serving.run("ps", "--json"))["model"]
    assert (answer["model"], answer["state"]) == ("tiny-opt", "ready")
    assert Path(answer["directory"]) == TINY_OPT
    assert all(stage["memory_bytes"] > 0 for stage in answer["stages"])
    assert "tiny-opt: ready" in serving.run("ps").stdout


def test_run_by_name_and_by_directory(serving: Cluster) -> None:
    by_name = serving.run("run", "tiny-opt", QUESTION)
    assert by_name.returncode == 0
    assert "attic" in by_name.stdout
    by_directory = last_json(serving.run("run", str(TINY_OPT), QUESTION, "--json", "--chat"))
    assert "attic" in by_directory["text"]
    assert by_directory["finish_reason"] == "stop"
    assert by_directory["prefill_tokens_per_s"] > 0


def test_a_pipe_gets_the_answer_and_nothing_else(serving: Cluster) -> None:
    completed = serving.run("run", "tiny-opt", QUESTION)
    assert completed.stdout.strip() in ("attic", "in the attic", "the attic")
    assert completed.stderr == ""


def test_the_second_load_fetches_nothing(cluster: Cluster) -> None:
    cluster.start_coordinator()
    cluster.start_agent("pi-1")
    cluster.wait_for_agents("pi-1")
    model = FIXTURES / "qwen2"
    first = cluster.load(model, "--bits=8")
    assert first["stages"][0]["fetched_bytes"] > 0
    second = cluster.load(model, "--bits=8")
    assert second["stages"][0]["fetched_bytes"] == 0
    unloaded = cluster.run("unload")
    assert "qwen2 is unloaded" in unloaded.stdout
    assert "no model was loaded" in cluster.run("unload").stdout
    assert cluster.get("/shoal/v1/ps") == {"model": None}
    assert cluster.get("/v1/models")["data"] == []


def test_run_loads_a_directory_first(cluster: Cluster) -> None:
    cluster.start_coordinator()
    cluster.start_agent("pi-1")
    cluster.wait_for_agents("pi-1")
    completed = cluster.run("run", str(TINY_OPT), QUESTION)
    assert completed.returncode == 0, completed.stderr
    assert "attic" in completed.stdout


@pytest.mark.parametrize("command", ["demo", "coordinator", "agent", "devices", "plan", "load"])
def test_help_has_examples(command: str) -> None:
    completed = shoal(command, "--help")
    assert completed.returncode == 0
    assert "examples:\n  shoal " in completed.stdout


def test_backends_are_listed_with_reasons() -> None:
    answer = json.loads(shoal("agent", "--list-backends", "--json").stdout)
    assert answer["onnx_cpu"]["available"]
    assert "onnx_cpu: available" in shoal("agent", "--list-backends").stdout


def test_an_operation_in_progress_keeps_others_out(cluster: Cluster) -> None:
    cluster.start_coordinator()
    cluster.start_agent("pi-1")
    cluster.wait_for_agents("pi-1")
    url = f"{cluster.url}/shoal/v1/load"
    body = {"model": str(FIXTURES / "mistral"), "bits": [2, 4, 8, 32]}
    with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as response:
        lines = response.iter_lines()
        assert "step" in json.loads(next(lines))
        completed = cluster.run("load", str(FIXTURES / "llama"))
        assert completed.returncode == 1
        assert "another plan, load, unload or measurement is under way" in completed.stderr
        assert "result" in json.loads(list(lines)[-1])


def test_wishes_about_a_live_plan_are_kept(serving: Cluster) -> None:
    model = str(FIXTURES / "opt-pre")
    # The loaded model stays, so a plan is for what it leaves.
    used_bytes = dict.fromkeys(serving.names(), 0)
    for stage in serving.get("/shoal/v1/ps")["model"]["stages"]:
        used_bytes[stage["device"]] = stage["memory_bytes"]
    free, *_, full = sorted(used_bytes, key=used_bytes.__getitem__)
    wishes = (f"--pin=head:{free}", f"--exclude={full}")
    pinned = last_json(serving.run("plan", model, "--json", *wishes, "--bits=8"))["plan"]
    assert pinned["blocks"][-1]["device"] == free
    assert full not in {block["device"] for block in pinned["blocks"]}
    throughput = serving.run("plan", model, "--json", "--objective=throughput", "--bits=8")
    assert last_json(throughput)["plan"]["objective"]["kind"] == "throughput"
    for wrong in ("--exclude=pi-9", "--pin=layers=0-99:pi-1", "--quality-budget=0"):
        completed = serving.run("plan", model, wrong)
        assert completed.returncode in (1, 2)
        assert len(completed.stderr.strip().splitlines()) == 1


def test_what_offline_plans_can_do_live_ones_can(serving: Cluster, tmp_path: Path) -> None:
    model = str(FIXTURES / "opt-pre")
    saved, other, drawn = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "plan.svg"
    answer = last_json(
        serving.run(
            "plan", model, "--json", "--bits=4,8", "--explain", "--simulate=3",
            f"--plot={drawn}", f"--save={saved}",
        )
    )  # fmt: skip
    assert answer["figures"] == "predicted from measured devices"
    assert answer["plan"]["proven_optimal"]
    assert answer["simulation"]["kept"]["runs"] == 3
    assert any("dropping pi-" in item["text"] for item in answer["explanation"]["marginals"])
    assert ElementTree.parse(drawn).getroot().tag.endswith("svg")  # noqa: S314 - our own
    serving.run("plan", model, "--bits=4,8", "--pin=head:pi-3", f"--save={other}")
    given = serving.run("plan", model, "--bits=4,8", f"--plan={other}", "--json")
    assert last_json(given)["plan"]["blocks"][-1]["device"] == "pi-3"
    assert "b.json fits" in given.stderr
    changes = last_json(shoal("diff", str(saved), str(other), "--json"))["changes"]
    assert changes == [] or changes[-1]["after"]["device"] == "pi-3"

    edited = json.loads(other.read_text())
    edited["stages"][-1]["device"] = "pi-9"
    other.write_text(json.dumps(edited))
    refused = serving.run("plan", model, f"--plan={other}")
    assert refused.returncode == 1
    assert "b.json: unknown device pi-9: there are pi-1, pi-2, pi-3" in refused.stderr


def test_exactly_the_plan_of_a_file_is_loaded_and_moving_costs(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.start_coordinator()
    for name in ("pi-1", "pi-2"):
        cluster.start_agent(name, f"--coordinator=127.0.0.1:{cluster.control_port}", "--watts=5")
    cluster.wait_for_agents("pi-1", "pi-2")
    model = FIXTURES / "opt-pre"
    plan = tmp_path / "plan.json"
    stages = [{"device": "pi-2", "bits": "8 4x2"}, {"device": "pi-1", "bits": "3 16"}]
    plan.write_text(json.dumps({"shoal_plan": 1, "model": "opt-pre", "stages": stages}))
    loaded = cluster.load(model, f"--plan={plan}", "--max-weight-error=none")
    places = [(block["device"], block["bits"]) for block in loaded["plan"]["blocks"]]
    assert places == [("pi-2", 8), ("pi-2", 4), ("pi-2", 4), ("pi-1", 3), ("pi-1", 16)]
    assert cluster.run("run", "opt-pre", "the", "--max-tokens=3").returncode == 0

    # With moving weighed above all, the plan is what is there already.
    stay = ("--bits=3,4,8,16", "--max-weight-error=none", "--migration-weight=1e6")
    planned = last_json(cluster.run("plan", str(model), "--json", *stay))["plan"]
    assert planned["load_s"] == 0
    assert [(block["device"], block["bits"]) for block in planned["blocks"]] == places
    assert cluster.load(model, *stay)["plan"]["load_s"] == 0
    frugal = last_json(cluster.run("plan", str(model), "--json", "--objective=energy"))["plan"]
    seconds = sum(stage["compute_s"] for stage in frugal["stages"])
    assert frugal["energy_j"] == pytest.approx(5 * seconds)
    stages[0]["bits"] = "8 4"
    plan.write_text(json.dumps({"shoal_plan": 1, "model": "opt-pre", "stages": stages}))
    refused = cluster.run("load", str(model), f"--plan={plan}")
    assert refused.returncode == 1
    assert "plan.json: its stages have 4 blocks and the model 5" in refused.stderr


def test_a_kl_budget_is_kept(serving: Cluster, tmp_path: Path) -> None:
    model = str(FIXTURES / "opt-pre")
    count = load_spec(FIXTURES / "opt-pre").block_count
    measured = tmp_path / "quality.json"
    measured.write_text(
        json.dumps(
            {
                "blocks": [
                    {"block": block, "bits": bits, "kl": kl, "normalized_weight_error": 0.0}
                    for block in range(count)
                    for bits, kl in ((4, 0.1), (8, 0.01))
                ]
            }
        )
    )
    asked = ("plan", model, "--json", "--bits=4,8", f"--sensitivities={measured}")
    plan = last_json(serving.run(*asked, f"--quality-budget={0.01 * count + 0.1}"))["plan"]
    assert sum(block["bits"] == 4 for block in plan["blocks"]) <= 1
    assert plan["total_sensitivity"] <= 0.01 * count + 0.1
    impossible = serving.run(*asked, f"--quality-budget={0.005 * count}")
    assert impossible.returncode == 1
    assert "budget" in impossible.stderr


def test_a_grid_is_planned_for_the_measured_shoal(serving: Cluster, tmp_path: Path) -> None:
    """Every cell keeps its bounds. What is loaded stays."""
    out = tmp_path / "out"
    budgets = "--quality-budget=0.001,none"
    asked = ("sweep", str(TINY_OPT), budgets, "--links=x0.1,x1", f"--out={out}", "--json")
    found = last_json(serving.run(*asked))
    assert found["devices"] == "measured devices"
    assert [one["cell"]["quality_budget"] for one in found["cells"]] == ["0.001", "none"] * 2
    for one in found["cells"]:
        assert set(one["plan"]["devices"]) <= {"pi-1", "pi-2", "pi-3"}
        if one["cell"]["quality_budget"] == "0.001":
            assert one["plan"]["kl"] <= 0.001
    slow, fast = found["cells"][0]["plan"], found["cells"][2]["plan"]
    assert slow["value"] >= fast["value"]
    assert len((out / "sweep.csv").read_text().splitlines()) == 5
    assert serving.get("/shoal/v1/ps")["model"]["state"] == "ready"
