"""Devices that share layers, as real processes: the same answers, and losses that nobody sees."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from coordinator.files.artifacts import HEADER_BYTES
from tests.system.cluster import FIXTURES, Cluster, last_json, streamed_tokens, wait_for
from tests.team import StagePlan, write_plan

NAMES = ("pi-1", "pi-2", "pi-3", "pi-4")
CONTEXT = 1000
TOKENS = 600
LOST_AFTER = 20
EXACT = ("--bits=32", "--hop-bits=32", "--slots=2", "--replace")
PROMPTS = ("The lamp", "a long one " * 20)


def talkative(directory: Path, name: str) -> Path:
    """A copy of a model that talks as long as it is let."""
    model = Path(shutil.copytree(FIXTURES / name, directory / name))
    config = json.loads((model / "config.json").read_text())
    changes: dict[str, Any] = {"eos_token_id": None}
    if name == "llama":
        changes["max_position_embeddings"] = CONTEXT
    (model / "config.json").write_text(json.dumps(config | changes))
    return model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return talkative(tmp_path, "llama")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A coordinator and four agents. Each test leaves it with all of them."""
    cluster = Cluster(tmp_path_factory.mktemp("four"))
    try:
        start(cluster, "pi-1", "pi-2")
        for name in ("llama", "opt-pre"):
            cluster.load(talkative(cluster.directory, name), *EXACT)
        # All agents are on one machine. So the others need not measure it again.
        cluster.keep_measurements()
        for other in ("pi-3", "pi-4"):
            cluster.start_agent(other)
        cluster.wait_for_agents(*NAMES)
        yield cluster
    finally:
        cluster.stop()


def start(cluster: Cluster, *names: str) -> None:
    cluster.start_coordinator()
    for name in names:
        cluster.start_agent(name)
    cluster.wait_for_agents(*names)


def tokens_of(cluster: Cluster, prompt: str, count: int, begun: threading.Event) -> list[int]:
    """The tokens of a streamed greedy answer. ``begun`` is set once some of them are there."""
    request = {"prompt": prompt, "temperature": 0, "max_tokens": count}
    return streamed_tokens(cluster, request, begun, LOST_AFTER)


def answers(cluster: Cluster, count: int) -> list[list[int]]:
    """The answers to all prompts at once, each in a slot of its own."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        asked = [
            pool.submit(tokens_of, cluster, prompt, count, threading.Event()) for prompt in PROMPTS
        ]
        return [future.result(60) for future in asked]


def teams(cluster: Cluster) -> list[list[str]]:
    """The devices of each stage that is loaded."""
    stages = cluster.get("/shoal/v1/ps")["model"]["stages"]
    return [[one["device"] for one in stage["members"]] or [stage["device"]] for stage in stages]


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("llama", [(("pi-1", "pi-2"), 5, (1, 1))]),
        ("llama", [(("pi-3",), 2, ()), (("pi-1", "pi-2"), 3, (1, 1))]),
        ("llama", [(("pi-3",), 1, ()), (("pi-2", "pi-1"), 3, (1, 1)), (("pi-4",), 1, ())]),
        ("opt-pre", [(("pi-2", "pi-3", "pi-1"), 5, (1, 1, 2))]),
        ("opt-pre", [(("pi-1", "pi-2"), 2, (3, 1)), (("pi-3", "pi-4"), 3, (1, 1))]),
    ],
    ids=["two", "behind one", "between two", "three", "two teams"],
)
def test_teams_answer_as_one_device_does(
    four: Cluster, tmp_path: Path, name: str, stages: list[StagePlan]
) -> None:
    model = talkative(tmp_path, name)
    alone = four.load(model, "--no-teams", *EXACT)
    assert all(stage["members"] == [] for stage in alone["stages"])
    expected = answers(four, 30)
    loaded = four.load(model, *EXACT, f"--plan={write_plan(tmp_path, model, stages)}")
    assert teams(four) == [list(names) for names, _, _ in stages]
    assert answers(four, 30) == expected
    for stage, planned in zip(loaded["stages"], loaded["plan"]["stages"], strict=True):
        assert ("measured_sum" in planned) == bool(stage["members"])
        room = HEADER_BYTES * len(planned["bits"])
        for member, part in zip(stage["members"], planned["members"], strict=True):
            assert member["fetched_bytes"] <= part["storage_bytes"] + room
    table = four.run("ps").stdout
    assert all("+".join(team) in table for team in teams(four))


def test_a_team_that_is_asked_for_is_loaded(four: Cluster, model: Path) -> None:
    four.load(model, *EXACT, "--no-teams")
    expected = answers(four, 30)
    four.load(model, *EXACT, "--team=pi-1,pi-2")
    (team,) = [team for team in teams(four) if len(team) > 1]
    assert sorted(team) == ["pi-1", "pi-2"]
    assert answers(four, 30) == expected


def test_a_team_that_was_asked_for_is_taken_up_again(four: Cluster, model: Path) -> None:
    """Its lead has the same blocks alone. On one machine a team saves no time."""
    others = ("--exclude=pi-3", "--exclude=pi-4")
    four.load(model, *EXACT, "--team=pi-1,pi-2", *others)
    (team,) = [team for team in teams(four) if len(team) > 1]
    lost = team[1]
    four.kill(lost)
    four.processes[lost].wait(60)
    wait_for(lambda: teams(four) == [[team[0]]], 60, "the lead alone")
    four.start_agent(lost)
    four.wait_for_agents(*NAMES)
    answer = last_json(four.run("rebalance", "--json"))
    assert answer["moves"], answer
    assert "it is what was asked for" in answer["why"]
    assert sorted(itertools.chain.from_iterable(teams(four))) == ["pi-1", "pi-2"]


def test_a_draft_model_guesses_for_a_team(four: Cluster, model: Path, tmp_path: Path) -> None:
    four.load(model, *EXACT, "--no-teams")
    expected = answers(four, 60)
    small = Path(shutil.copytree(model, tmp_path / "small"))
    four.know(small)
    loaded = four.load(model, *EXACT, "--team=pi-1,pi-2", f"--draft={small}", "--draft-bits=8")
    assert loaded["draft"]["device"] == teams(four)[0][0]

    def guesses() -> int:
        return int(four.get("/shoal/v1/ps")["model"]["draft"]["drafted_tokens"])

    # It guesses for a sequence that is alone, once it is known to pay.
    wait_for(
        lambda: tokens_of(four, PROMPTS[0], 60, threading.Event()) == expected[0] and guesses() > 0,
        120,
        "a guess by the draft model",
    )
    assert answers(four, 60) == expected


@pytest.mark.parametrize(
    ("victim", "how"),
    [("pi-1", signal.SIGKILL), ("pi-2", signal.SIGKILL), ("pi-2", signal.SIGSTOP)],
    ids=["killed lead", "killed member", "frozen member"],
)
def test_an_answer_goes_on_when_a_member_is_lost(
    four: Cluster, tmp_path: Path, model: Path, victim: str, how: signal.Signals
) -> None:
    plan = write_plan(tmp_path, model, [(("pi-1", "pi-2"), 4, (1, 1)), (("pi-3",), 1, ())])
    four.load(model, *EXACT, f"--context={CONTEXT}", f"--plan={plan}")
    undisturbed = [tokens_of(four, prompt, TOKENS, threading.Event()) for prompt in PROMPTS]
    assert all(len(tokens) == TOKENS for tokens in undisturbed)
    said = len(four.log("coordinator"))
    begun = [threading.Event() for _ in PROMPTS]
    process = four.processes[victim]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        asked = [
            pool.submit(tokens_of, four, prompt, TOKENS, event)
            for prompt, event in zip(PROMPTS, begun, strict=True)
        ]
        wait_for(lambda: all(event.is_set() for event in begun), 60, "two answers")
        try:
            process.send_signal(how)
            assert [future.result(60) for future in asked] == undisturbed
        finally:
            process.send_signal(signal.SIGCONT)
    left = set(itertools.chain.from_iterable(teams(four)))
    assert left <= set(NAMES) - {victim}
    log = four.log("coordinator")[said:]
    assert f"{victim}: device lost" in log
    assert "llama is loaded again" in log
    assert "no link from" not in log
    if how == signal.SIGKILL:
        process.wait()
        four.start_agent(victim)
    four.wait_for_agents(*NAMES)


def test_a_coordinator_that_is_started_again_loads_the_same_team(
    four: Cluster, tmp_path: Path, model: Path
) -> None:
    plan = write_plan(tmp_path, model, [(("pi-2", "pi-1"), 5, (1, 1))])
    before = four.load(model, *EXACT, f"--plan={plan}")
    expected = tokens_of(four, PROMPTS[0], 30, threading.Event())
    coordinator = four.processes["coordinator"]
    coordinator.kill()
    coordinator.wait(60)
    if coordinator.stdout is not None:
        coordinator.stdout.close()
    four.start_coordinator("--no-mdns", f"--port={four.control_port}")
    assert tokens_of(four, PROMPTS[0], 30, threading.Event()) == expected
    after = four.get("/shoal/v1/ps")["model"]
    for stages in (before["plan"]["stages"], after["plan"]["stages"]):
        shares = [(part["device"], part["share"]) for part in stages[0]["members"]]
        assert [device for device, _ in shares] == ["pi-2", "pi-1"]
        assert [share["kv_heads"] for _, share in shares] == [[0, 1], [1, 2]]
    # The members still had their stages, so nothing was loaded again.
    told = [event["kind"] for event in four.get("/shoal/v1/events")["events"]]
    assert "adopted" in told
    four.wait_for_agents(*NAMES)
