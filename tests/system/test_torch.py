"""Agents that run their stages by torch on the CPU, beside one by ONNX Runtime."""

from __future__ import annotations

import pytest

from tests.system.cluster import TINY_OPT, Cluster, last_json

pytest.importorskip("torch", reason="torch is not installed")

QUESTION = "The lamp is in the attic. The meter in the cellar reads 42. Where is the lamp?"


def test_devices_of_two_backends_answer_together(cluster: Cluster) -> None:
    cluster.start_coordinator()
    where = f"--coordinator=127.0.0.1:{cluster.control_port}"
    cluster.start_agent("torch", where, "--backend=torch_cpu", "--memory=5M")
    cluster.start_agent("onnx", where, "--memory=5M")
    cluster.wait_for_agents("torch", "onnx")
    shown = {
        device["name"]: device["backend"] for device in cluster.get("/shoal/v1/devices")["devices"]
    }
    assert shown == {"torch": "torch_cpu", "onnx": "onnx_cpu"}
    answer = cluster.load(TINY_OPT, "--bits=8")
    assert len(answer["plan"]["stages"]) == 2
    assert "attic" in last_json(cluster.run("run", "tiny-opt", QUESTION, "--json"))["text"]
