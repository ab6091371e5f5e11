"""Labs as testbeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from planning.labs.lab import LabError
from testbed.lab import AGENT_BYTES, read_emulated_lab
from testbed.network import HUB, Link

LABS = Path(__file__).parents[2] / "examples" / "labs"

LAB = """
devices:
  - {name: a, memory: 400M, storage: 1G, layer_ms: {decode: {8: 1}}, embed_ms: 1, head_ms: 1}
  - {name: b, memory: 400M, storage: 1G, layer_ms: {decode: {8: 1}}, embed_ms: 1, head_ms: 1}
default_link: {rtt_ms: 4, mbit_per_s: 80}
"""


def written(directory: Path, text: str) -> Path:
    path = directory / "lab.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(LABS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_labs_leave_the_machine_room_for_the_rest(path: Path) -> None:
    lab = read_emulated_lab(path)
    assert set(lab.network.hosts) == {HUB, *lab.agents}
    assert sum(host.cpu_percent or 0 for host in lab.network.hosts.values()) <= 160


def test_links_and_limits_are_the_labs(tmp_path: Path) -> None:
    emulation = "emulation: {default: {cpu: 30}, hosts: {b: {cpu: 10, jitter_ms: 2, loss: 0.5}}}"
    lab = read_emulated_lab(written(tmp_path, LAB + emulation))
    a, b = lab.network.hosts["a"], lab.network.hosts["b"]
    assert (a.cpu_percent, b.cpu_percent, b.jitter_s, b.loss) == (30, 10, 2e-3, 0.005)
    assert lab.agents["a"].memory_bytes == 400 << 20
    assert a.memory_bytes == AGENT_BYTES + (500 << 20)
    assert lab.network.link("a", "b") == Link(2e-3, 1e7)
    assert lab.agents["b"].backend is None
    assert lab.network.link(HUB, "a") == Link()


def test_the_coral_of_a_lab_runs_its_files_on_the_processor() -> None:
    lab = read_emulated_lab(LABS / "jetson-pis-coral.yaml")
    backends = {name: settings.backend for name, settings in lab.agents.items()}
    assert backends == {"nano": None, "pi-1": None, "pi-2": None, "coral-1": "tflite_cpu"}


@pytest.mark.parametrize(
    ("emulation", "message"),
    [
        ("emulation: {cpus: 3}", "unknown key 'cpus'"),
        ("emulation: {hosts: {c: {cpu: 3}}}", "hosts: unknown key 'c': known are a, b"),
        ("emulation: {default: {cpu: 0.5}}", "percent of one core"),
        ("emulation: {default: {cpu: fast}}", "expected a number"),
        ("emulation: {default: {loss: 100}}", "below 100"),
        ("emulation: {default: {backend: 3}}", "backend: expected a name"),
        ("emulation: [1]", "expected `key: value` pairs"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, emulation: str, message: str) -> None:
    with pytest.raises(LabError, match=message):
        read_emulated_lab(written(tmp_path, LAB + emulation))
