"""Devices of different kinds in one shoal: each runs its share through its own backend."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.base import BackendUnavailable
from backends.edgetpu import TfliteCpuBackend
from backends.edgetpu_devices import find_devices
from tests.system.cluster import TINY_OPT, Cluster, last_json

QUESTION = "The lamp is in the attic. The meter in the cellar reads 42. Where is the lamp?"


def test_a_tflite_device_takes_part_in_an_answer(cluster: Cluster, tmp_path: Path) -> None:
    try:
        TfliteCpuBackend.probe()
    except BackendUnavailable as unavailable:
        pytest.skip(unavailable.reason)
    cluster.start_coordinator()
    backends = {"int8": "tflite_cpu", "pi": "onnx_cpu"}
    for name, backend in backends.items():
        cluster.start_agent(
            name,
            f"--coordinator=127.0.0.1:{cluster.control_port}",
            "--memory=1G" if name == "int8" else "--memory=6M",
            f"--backend={backend}",
        )
    cluster.wait_for_agents(*backends)
    devices = cluster.get("/shoal/v1/devices")["devices"]
    assert {device["name"]: device["backend"] for device in devices} == backends
    assert "tflite_cpu" in cluster.run("devices").stdout
    # Neither may take all.
    answer = cluster.load(TINY_OPT, "--bits=8", "--pin=layers=1-3:int8", "--pin=layers=6-6:pi")
    assert {stage["device"] for stage in answer["plan"]["stages"]} == set(backends)
    said = last_json(cluster.run("run", "tiny-opt", QUESTION, "--json"))
    assert said["text"].strip() == "in the attic"
    assert said["finish_reason"] == "stop"


@pytest.mark.skipif(bool(find_devices()), reason="this machine has an Edge TPU")
def test_a_backend_without_its_hardware_says_so(cluster: Cluster) -> None:
    cluster.start_coordinator()
    process = cluster.start_agent(
        "coral", f"--coordinator=127.0.0.1:{cluster.control_port}", "--backend=edgetpu"
    )
    assert process.wait(60) == 1
    assert "backend edgetpu is not available: no Edge TPU on USB" in cluster.log("coral")
