"""`shoal rebalance` says whether another plan would be better, and moves the model there."""

from __future__ import annotations

from tests.system.cluster import TINY_OPT, Cluster, last_json


def test_the_present_plan_is_compared_with_the_best_one(cluster: Cluster) -> None:
    cluster.start_coordinator()
    refused = cluster.run("rebalance", "--dry-run")
    assert refused.returncode == 1
    assert refused.stderr.strip() == "error: no model answers now: see `shoal ps`"
    cluster.start_agent("a1")
    cluster.wait_for_agents("a1")
    cluster.load(TINY_OPT, "--bits=8")
    before = cluster.get("/shoal/v1/ps")["model"]
    alone = last_json(cluster.run("rebalance", "--dry-run", "--json"))
    # The only device cannot do better.
    assert (alone["moves"], alone["gain"]) == (False, 0)
    assert alone["why"] == "no plan is better by the present figures"
    assert alone["present"]["stages"] == alone["plan"]["stages"]
    cluster.start_agent("a2")
    cluster.wait_for_agents("a1", "a2")
    compared = last_json(cluster.run("rebalance", "--dry-run", "--json"))
    assert compared["gain"] <= 1
    assert {stage["device"] for stage in compared["present"]["stages"]} == {"a1"}
    shown = cluster.run("rebalance", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "tiny-opt now; by the present figures" in shown.stdout
    after = cluster.get("/shoal/v1/ps")["model"]
    assert after["stages"] == before["stages"]
    # Without a better plan nothing is moved either way.
    kept = last_json(cluster.run("rebalance", "--json"))
    kinds = [event["kind"] for event in cluster.get("/shoal/v1/events")["events"]]
    assert ("moved_to" in kept, "moving" in kinds) == (kept["moves"], kept["moves"])
