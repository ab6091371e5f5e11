"""``shoal compress`` with the times of a live shoal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.system.cluster import FIXTURES, ROOT, Cluster, last_json

pytest.importorskip("torch", reason="needs the extra torch")
pytestmark = pytest.mark.thorough

LLAMA = FIXTURES / "llama"


def asked(out: Path, *more: str) -> list[str]:
    """The arguments of a small run without a lab."""
    text = out.parent / "text.txt"
    passages = (ROOT / "model" / "passages.txt").read_text(encoding="utf-8")
    text.write_text(passages[:3000], encoding="utf-8")
    return [
        *("compress", str(LLAMA), f"--data={text}", f"--out={out}", "--sizes=1,0.7", "--steps=0"),
        *("--window=24", "--questions=20", "--threads=1", "--bits=16,4", "--context=32", *more),
    ]


def test_times_are_those_of_the_devices(cluster: Cluster, tmp_path: Path) -> None:
    """Without --lab, the coordinator plans every size, and one is chosen by the times."""
    out = tmp_path / "out"
    cluster.start_coordinator()
    none = cluster.run(*asked(out, "--at-most=100000"))
    assert none.returncode == 1
    assert "the coordinator has no devices" in none.stderr
    cluster.start_agent("one")
    cluster.wait_for_agents("one")
    found = last_json(cluster.run(*asked(out, "--at-most=100000", "--json")))
    assert found["lab"] is None
    assert found["times_predicted_for"] == "the coordinator's devices, as measured"
    assert len(found["points"]) == 4
    assert all(point["latency_ms"] > 0 for point in found["points"])
    chosen = found["chosen"]
    assert chosen["kl"] <= min(point["kl"] for point in found["points"])
    fast = min(point["latency_ms"] for point in found["points"]) * 1.01
    mixed = last_json(cluster.run(*asked(out, f"--at-most={fast}", "--json")))["chosen"]
    assert mixed["latency_ms"] <= fast
    loaded = cluster.run("load", mixed["folder"] or str(LLAMA), "--plan", mixed["plan"])
    assert loaded.returncode == 0, loaded.stderr
    plan = last_json(cluster.run(*planned(LLAMA)))["plan"]
    whole = next(one for one in found["points"] if (one["size"], one["bits"]) == (1, 4))
    assert whole["latency_ms"] == pytest.approx(1e3 * plan["decode_s"])
    # A lab is another source, so both at once are refused.
    lab = ROOT / "examples" / "labs" / "wifi-3.yaml"
    both = cluster.run(*asked(out, f"--lab={lab}"))
    assert both.returncode == 2
    assert "--lab and --url both give times" in both.stderr


def planned(model: Path) -> tuple[Any, ...]:
    return (
        *("plan", str(model), "--bits=4", "--context=32", "--objective=latency"),
        *("--quality-budget=none", "--json"),
    )
