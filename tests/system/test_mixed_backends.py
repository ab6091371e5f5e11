"""Devices of different kinds in one shoal: each runs its share through its own backend."""

from __future__ import annotations

import pytest

from backends.base import BackendUnavailable
from backends.edgetpu_devices import find_devices
from backends.registry import backend_class
from cli.errors import EXIT_FAILED
from tests.system.cluster import FIXTURES, TINY_OPT, Cluster, last_json

QUESTION = "The lamp is in the attic. The meter in the cellar reads 42. Where is the lamp?"
BACKENDS = {
    "gpu": "torch_cpu",
    "int8": "tflite_cpu",
    "pi-1": "onnx_cpu",
    "pi-2": "onnx_cpu",
}


def test_four_agents_with_three_backends_answer_together(cluster: Cluster) -> None:
    for backend in set(BACKENDS.values()):
        try:
            backend_class(backend).probe()
        except BackendUnavailable as unavailable:
            pytest.skip(str(unavailable))
    cluster.backends = sorted(set(BACKENDS.values()))
    cluster.start_coordinator()
    for name, backend in BACKENDS.items():
        where = f"--coordinator=127.0.0.1:{cluster.control_port}"
        cluster.start_agent(name, where, "--memory=1G", f"--backend={backend}")
    cluster.wait_for_agents(*BACKENDS)
    devices = cluster.get("/shoal/v1/devices")["devices"]
    assert {device["name"]: device["backend"] for device in devices} == BACKENDS
    assert "tflite_cpu" in cluster.run("devices").stdout

    pins = "--pin=layers=0-1:pi-1", "--pin=layers=2-3:gpu", "--pin=layers=4-5:int8"
    answer = cluster.load(TINY_OPT, "--bits=8", *pins, "--pin=layers=6-7:pi-2")
    assert {stage["device"] for stage in answer["plan"]["stages"]} == set(BACKENDS)
    said = last_json(cluster.run("run", "tiny-opt", QUESTION, "--json"))
    assert said["text"].strip() == "in the attic"
    assert said["finish_reason"] == "stop"

    # Three layers of random weights: the fourth device gets the head. These are measured.
    cluster.backends = []
    pins = "--pin=layers=0-0:pi-1", "--pin=layers=1-1:gpu", "--pin=layers=2-2:int8"
    answer = cluster.load(FIXTURES / "llama", "--bits=8", *pins, "--exclude=pi-2")
    assert len(answer["plan"]["stages"]) >= 3
    run = "run", "llama", "one two", "--json", "--max-tokens=12", "--temperature=0"
    first, second = (last_json(cluster.run(*run)) for _ in range(2))
    assert first["text"] == second["text"]


@pytest.mark.skipif(bool(find_devices()), reason="this machine has an Edge TPU")
def test_a_backend_without_its_hardware_says_so(cluster: Cluster) -> None:
    """A service is started again: a chip on USB comes back a second after it was lost."""
    cluster.start_coordinator()
    process = cluster.start_agent(
        "coral", f"--coordinator=127.0.0.1:{cluster.control_port}", "--backend=edgetpu"
    )
    assert process.wait(60) == EXIT_FAILED
    assert "backend edgetpu is not available: no Edge TPU on USB" in cluster.log("coral")
