"""Blocks come from the devices that have them, between real processes."""

from __future__ import annotations

import os
from typing import Any

from tests.system.cluster import TINY_OPT, Cluster, last_json

PROMPT = "The lamp is in the attic. Where is the lamp?"
NAMES = ("one", "two", "three")


def load(cluster: Cluster, *order: str) -> dict[str, Any]:
    """Load with two layers or more on each device, in this order."""
    pins = [f"--pin=layers={2 * place}-{2 * place + 1}:{name}" for place, name in enumerate(order)]
    wide = ("--bits=32", "--hop-bits=32")  # So the blocks are large enough to be worth a question.
    loaded: dict[str, Any] = cluster.load(TINY_OPT, *wide, *pins)
    return loaded


def answer(cluster: Cluster) -> list[int]:
    asked = ("run", str(TINY_OPT), PROMPT, "--max-tokens=12", "--json")
    tokens: list[int] = last_json(cluster.run(*asked))["tokens"]
    return tokens


def fetched(cluster: Cluster) -> tuple[int, int]:
    """The bytes that all devices fetched for the loaded model, and those that devices sent."""
    stages = cluster.get("/shoal/v1/ps")["model"]["stages"]
    came = sum(stage["fetched_bytes"] for stage in stages)
    return came, sum(stage["from_peers_bytes"] for stage in stages)


def test_a_model_that_moves_comes_from_the_devices_that_had_it(cluster: Cluster) -> None:
    cluster.start_coordinator()
    for name in NAMES:
        cluster.start_agent(name)
    cluster.wait_for_agents(*NAMES)
    load(cluster, *NAMES)
    came, from_peers = fetched(cluster)
    assert came > 0
    assert from_peers == 0  # Nobody had anything.
    expected = answer(cluster)

    load(cluster, *NAMES[1:], NAMES[0])
    came, from_peers = fetched(cluster)
    # Where the link was measured while others computed, the coordinator may seem nearer.
    assert came >= from_peers > 1 << 20
    assert answer(cluster) == expected

    # Files that rotted there are caught by their hashes. The coordinator sends them instead.
    for name in NAMES:
        for path in (cluster.directory / name / "blocks").glob("?" * 64):
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))
    load(cluster, NAMES[2], *NAMES[:2])
    came, from_peers = fetched(cluster)
    assert (came > 3 << 20, from_peers) == (True, 0)
    assert answer(cluster) == expected
    assert any("arrived damaged" in cluster.log(name) for name in NAMES)
