"""A model with experts through the whole line: in a pipeline, and in a team with whole experts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, models

from tests.parity import FAMILIES, Golden
from tests.system.cluster import Cluster, last_json
from tests.team import write_plan

EXACT = ("--bits=32", "--hop-bits=32", "--max-weight-error=none")


def with_words(directory: Path, name: str) -> Path:
    """A copy of a family's fixture, whose tokens are words."""
    model = Path(shutil.copytree(FAMILIES / name, directory / name))
    words = {f"w{token}": token for token in range(64)}
    words_only = models.WordLevel(words, "w0")
    Tokenizer(words_only).save(str(model / "tokenizer.json"))
    return model


def continued(cluster: Cluster, golden: Golden) -> list[int]:
    body: dict[str, Any] = {
        "prompt": golden.prompt.tolist(),
        "temperature": 0,
        "max_tokens": len(golden.continuation),
        "return_token_ids": True,
    }
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60, trust_env=False)
    tokens: list[int] = answer.json()["shoal"]["tokens"]
    return tokens


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("experts"))
    try:
        cluster.start_coordinator()
        for agent in ("pi-1", "pi-2"):
            cluster.start_agent(agent)
        cluster.wait_for_agents("pi-1", "pi-2")
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_answer_in_a_pipeline_and_in_a_team(two: Cluster, name: str) -> None:
    model, golden = with_words(two.directory, name), Golden.load(FAMILIES / name)
    expected = golden.continuation.tolist()

    pinned = ("--pin=embedding:pi-1", "--pin=head:pi-2", "--no-teams")
    answer = two.load(model, *EXACT, *pinned)
    assert len(answer["stages"]) > 1
    assert continued(two, golden) == expected

    stages = [(("pi-2", "pi-1"), 4, (2, 1))]
    answer = two.load(model, *EXACT, f"--plan={write_plan(two.directory, model, stages)}")
    (stage,) = answer["stages"]
    assert [member["device"] for member in stage["members"]] == ["pi-2", "pi-1"]
    assert continued(two, golden) == expected

    if name == "qwen3_moe":
        plan = last_json(two.run("plan", str(model), "--bits=4,8", "--json"))
        assert plan["plan"]["blocks"]
