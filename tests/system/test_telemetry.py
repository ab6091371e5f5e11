"""What a running shoal tells of itself: metrics, traces, the example dashboard and alert rules."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.system.cluster import ROOT, TINY_OPT, Cluster, last_json, wait_for

QUESTION = {
    "model": "tiny-opt",
    "prompt": "The lamp is in the attic.",
    "max_tokens": 40,
    "temperature": 0,
    "ignore_eos": True,
    "speculative.n_max": 0,
}
MONITORING = ROOT / "deploy" / "monitoring"


def samples(cluster: Cluster) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = httpx.get(f"{cluster.url}/metrics", trust_env=False).text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_and_traces_agree_with_the_answers(cluster: Cluster) -> None:
    cluster.start_coordinator()
    for name in ("a1", "a2"):
        cluster.start_agent(name)
    cluster.wait_for_agents("a1", "a2")
    cluster.load(
        TINY_OPT, "--bits=8", "--max-weight-error=none", "--pin=embedding:a1", "--pin=head:a2"
    )
    before = samples(cluster)
    url = f"{cluster.url}/v1/completions"
    answer = httpx.post(url, json=QUESTION, timeout=60, headers={"x-request-id": "mine-1"}).json()
    prompt, tokens = answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]
    assert tokens == 40

    found = before

    def value(name: str, **labels: str) -> float:
        # Metrics of stages and hops also have the model's name, and one model is loaded.
        wanted = frozenset(labels.items())
        values = [
            value
            for (known, given), value in found.items()
            if known == f"shoal_{name}"
            and wanted <= given
            and {label for label, _ in given - wanted} <= {"model"}
        ]
        return sum(values)

    def counted() -> bool:
        """Heartbeats bring the counts of stages each second."""
        nonlocal found
        found = samples(cluster)
        passes = [value("stage_passes_total", device=device) for device in ("a1", "a2")]
        frames = [value("hop_frames_total", source="a1", target="a2")]
        return bool(min(passes + frames) >= tokens)

    wait_for(counted, 60, "the counts of the answer")
    assert value("answer_tokens_total", model="tiny-opt") == tokens
    assert value("prompt_tokens_total", model="tiny-opt") == prompt
    assert value("requests_total", path="/v1/completions", status="200") == 1
    assert value("time_to_first_token_seconds_count", model="tiny-opt") == 1
    assert value("model_state", model="tiny-opt", state="ready") == 1
    for device in ("a1", "a2"):
        assert value("stage_rows_total", device=device) >= prompt + tokens - 1
        assert value("stage_compute_seconds_total", device=device) > 0
        assert value("device_memory_available_bytes", device=device) > 0
    assert value("hop_frames_total", source="a1", target="a2") >= tokens
    row_bytes = value("hop_bytes_total", source="a1", target="a2") / (prompt + tokens - 1)
    assert row_bytes >= 2 * 64, "each row has the model's hidden values at 16 bits"

    check_monitoring({name for name, _ in found})
    check_trace(cluster, prompt, tokens)


def check_monitoring(names: set[str]) -> None:
    """Every metric that the dashboard and the rules ask for exists."""
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    asked = [rule["expr"] for group in groups for rule in group["rules"]]
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    asked += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    known = names | {"shoal_device_temperature_celsius"}  # Not every machine has a sensor.
    used = {name for text in asked for name in re.findall(r"shoal_\w+", text)}
    assert used - known == set()
    assert len(used) > 15


def test_both_sides_of_an_alert_have_the_same_labels() -> None:
    """Prometheus compares only samples with equal labels, and refuses `2 * on (...)` as a whole."""
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        for comparison in rule["expr"].split(" and "):
            left, right = re.split(r" (?:>|<|==) ", comparison)
            if not re.fullmatch(r"[\d.]+", right):
                kept = [re.findall(r"by \([^)]*\)|on \(", side) for side in (left, right)]
                assert kept[0] == kept[1], rule["alert"]


def check_trace(cluster: Cluster, prompt: int, tokens: int) -> None:
    trace = last_json(cluster.run("trace", "mine-1", "--json"))
    assert trace["request"]["id"] == "mine-1"
    assert [stage["device"] for stage in trace["stages"]] == ["a1", "a2"]
    rows = [sum(item["rows"] for item in stage["passes"]) for stage in trace["stages"]]
    assert rows == [prompt + tokens - 1] * 2
    for stage in trace["stages"]:
        for item in stage["passes"]:
            assert item["arrived_s"] <= item["started_s"] <= item["computed_s"] <= item["sent_s"]
    check_order(trace)
    picture, chrome = cluster.directory / "way.svg", cluster.directory / "way.json"
    shown = cluster.run("trace", f"--svg={picture}", f"--chrome={chrome}")
    assert shown.returncode == 0, shown.stderr
    assert "mine-1" in shown.stdout
    assert "token return" in shown.stdout
    assert ET.parse(picture).getroot().tag.endswith("svg")  # noqa: S314 - our own file
    events = json.loads(chrome.read_text())["traceEvents"]
    assert sum(event["ph"] == "s" for event in events) == 2 * tokens - 1
    wrong = cluster.run("trace", "nobody")
    assert wrong.returncode == 1
    assert "no request 'nobody' is remembered" in wrong.stderr


def check_order(trace: dict[str, Any]) -> None:
    """No row arrives before it was computed, on the common clock."""
    first, last = trace["stages"]
    left = {item["position"]: item["computed_s"] for item in first["passes"]}
    for item in last["passes"]:
        assert item["arrived_s"] >= left[item["position"]] - 1e-6
