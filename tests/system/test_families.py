"""Family fixtures over real agents: all of them by hand, and three in the suite.

    python -m tests.system.test_families [name ...]

prints how many of a continuation's tokens 1, 2 and 3 agents gave as transformers did.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.parity import FAMILIES, NAMES, Golden
from tests.system.cluster import Cluster, last_json, shoal

CHOSEN = ("gpt2", "mistral3-sees", "phi3-long")
"""Transposed matrices; a part of a model that sees; long factors of LongRoPE, on the wire too."""


def with_tokenizer(name: str, directory: Path) -> Path:
    """Copy a fixture, with a tokenizer whose word ``w7`` is token 7."""
    model = Path(copytree(FAMILIES / name, directory / name))
    words = {f"w{token}": token for token in range(128)}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))
    return model


def demo(name: str, agents: int, directory: Path) -> Any:
    """Have some agents continue a fixture's prompt at 32 bits, hops too."""
    golden = Golden.load(FAMILIES / name)
    prompt = " ".join(f"w{token}" for token in golden.prompt)
    return last_json(
        shoal(
            "demo", "--json", f"--model={with_tokenizer(name, directory)}", f"--prompt={prompt}",
            f"--agents={agents}", "--bits=32", "--hop-bits=32",
            f"--context={len(golden.prompt) + len(golden.continuation)}",
            f"--max-tokens={len(golden.continuation)}", f"--measurements-dir={directory}",
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("two"))
    try:
        cluster.start_coordinator()
        for agent in ("pi-1", "pi-2"):
            cluster.start_agent(agent, f"--coordinator=127.0.0.1:{cluster.control_port}", "--exact")
        cluster.wait_for_agents("pi-1", "pi-2")
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.parametrize("name", CHOSEN)
def test_two_agents_continue_as_transformers_does(two: Cluster, name: str, tmp_path: Path) -> None:
    golden = Golden.load(FAMILIES / name)
    tokens = len(golden.prompt) + len(golden.continuation)
    wishes = ("--bits=32", "--hop-bits=32", "--no-teams", f"--context={tokens}")
    pins = ("--pin=embedding:pi-1", "--pin=head:pi-2")
    plan = two.load(with_tokenizer(name, tmp_path), *wishes, *pins)["plan"]
    assert len(plan["stages"]) == 2
    body = {
        "model": name,
        "prompt": golden.prompt.tolist(),
        "temperature": 0,
        "max_tokens": len(golden.continuation),
        "return_token_ids": True,
    }
    url = f"{two.url}/v1/completions"
    answer = httpx.post(url, json=body, timeout=60, trust_env=False).json()
    assert answer["shoal"]["tokens"] == golden.continuation.tolist()


def main(names: list[str]) -> None:
    for name in names or NAMES:
        golden, counts = Golden.load(FAMILIES / name), []
        for agents in (1, 2, 3):
            with tempfile.TemporaryDirectory() as directory:
                answer = demo(name, agents, Path(directory))
            assert len(answer["plan"]["stages"]) == agents
            pairs = zip(answer["tokens"], golden.continuation, strict=True)
            counts.append(sum(own == expected for own, expected in pairs))
        print(name, *counts, "of", len(golden.continuation), flush=True)  # noqa: T201 - a command


if __name__ == "__main__":
    main(sys.argv[1:])
