"""Models on one, two and three agents, against transformers and the reference's equal weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.quantize import Format
from model.reference import ReferenceModel
from model.tokenizer import Tokenizer
from tests.greedy import generate_greedy
from tests.system.cluster import FIXTURES, Cluster
from tests.thorough import some

FAMILIES = ("opt-pre", "opt-post", "llama", "mistral", "qwen2", "qwen3")
NAMES = ("pi-1", "pi-2", "pi-3")
TOKENS = 64

TIE = 1e-3
"""Two logits closer than this may change places: fp32 sums in another order differ by about 1e-5
of logits of order 1, and int8 or 4-bit codes do not add to that, being exact in both."""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A coordinator and three exact agents."""
    cluster = Cluster(tmp_path_factory.mktemp("three"))
    try:
        cluster.start_coordinator()
        for name in NAMES:
            cluster.start_agent(name, f"--coordinator=127.0.0.1:{cluster.control_port}", "--exact")
        cluster.wait_for_agents(*NAMES)
        yield cluster
    finally:
        cluster.stop()


def load(cluster: Cluster, model: Path, bits: int, agents: int) -> Any:
    """Load a model at one width on the first ``agents`` devices. Returns its plan."""
    used = NAMES[:agents]
    places = ("embedding", "head") if agents == 2 else ("embedding", "layers=1", "head")
    pins = [f"--pin={place}:{name}" for place, name in zip(places, used, strict=False)]
    without = [f"--exclude={name}" for name in NAMES[agents:]]
    exactly = (f"--bits={bits}", "--hop-bits=32", "--no-teams", "--max-weight-error=none")
    return cluster.load(model, *exactly, *pins, *without)["plan"]


def answer(cluster: Cluster, model: Path, prompt: str) -> list[int]:
    """The greedy tokens behind a prompt."""
    body = {
        "model": model.name,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": TOKENS,
        "return_token_ids": True,
    }
    url = f"{cluster.url}/v1/completions"
    reply = httpx.post(url, json=body, timeout=60, trust_env=False).json()
    assert reply["usage"]["prompt_tokens"] == len(Tokenizer.load(model).encode(prompt))
    tokens: list[int] = reply["shoal"]["tokens"]
    return tokens


@pytest.mark.parametrize("agents", some([1, 2, 3], 3))
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_at_32_bits_are_those_of_transformers(
    three: Cluster, family: str, agents: int
) -> None:
    model = FIXTURES / family
    golden = np.load(model / "golden.npz")
    prompt = Tokenizer.load(model).decode(golden["prompt"].tolist())
    assert list(Tokenizer.load(model).encode(prompt)) == golden["prompt"].tolist()
    plan = load(three, model, 32, agents)
    assert answer(three, model, prompt) == golden["continuation"][:TOKENS].tolist()
    assert len(plan["stages"]) == agents
    assert {stage["hop_bits"] for stage in plan["stages"][:-1]} <= {32}
    assert {block["bits"] for block in plan["blocks"]} == {32}


@pytest.mark.parametrize("bits", some([8, 4], 4))
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_tokens_are_those_of_the_reference(
    three: Cluster, family: str, bits: int, tmp_path: Path
) -> None:
    model = FIXTURES / family
    prompt = "The quick brown fox"
    assert len(load(three, model, bits, 3)["stages"]) == 3
    tokens = answer(three, model, prompt)
    checkpoint = Checkpoint.open(model)
    blocks = [
        (block, write_artifact(tmp_path, block, checkpoint.block(block), Format.of(bits)).path)
        for block in range(checkpoint.spec.block_count)
    ]
    reference = ReferenceModel.from_artifacts(checkpoint.spec, blocks)
    expected = generate_greedy(reference, list(Tokenizer.load(model).encode(prompt)), TOKENS)
    for index, token in enumerate(tokens):
        if token != expected.tokens[index]:
            # After a tie the continuations may differ; before one they must not.
            assert expected.margins[index] < TIE
            return
    assert tokens
