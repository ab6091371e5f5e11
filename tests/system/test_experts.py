"""A model with experts through the whole line: in a pipeline, and in a team with whole experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer, models

from backends.onnx_session import mixes_experts
from model.safetensors import write_safetensors
from tests.parity import FAMILIES, Golden
from tests.system.cluster import Cluster, last_json
from tests.team import StagePlan, write_plan

NORMS = ("input", "post_attention")
WIDTH = 64
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


def test_a_team_that_changes_gets_only_the_experts_that_are_new(
    two: Cluster, tmp_path: Path
) -> None:
    model, golden = with_words(tmp_path, "granitemoe"), Golden.load(FAMILIES / "granitemoe")
    fetched_bytes, answers = [], []
    for parts in ((3, 2), (2, 3)):
        path = write_plan(tmp_path, model, [(("pi-1", "pi-2"), 4, parts)])
        answer = two.load(model, *EXACT, f"--plan={path}")
        fetched_bytes.append(sum(stage["fetched_bytes"] for stage in answer["stages"]))
        answers.append(continued(two, golden))
    assert answers == [golden.continuation.tolist()] * 2
    # One device needs an expert more of each layer, and the other one has all it needs.
    assert fetched_bytes[1] < 0.6 * fetched_bytes[0]


def wide(directory: Path) -> Path:
    """A Qwen3-MoE with random weights. Its layers are wide enough for the operator of experts."""
    model = with_words(directory, "qwen3_moe")
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_size": WIDTH, "moe_intermediate_size": WIDTH}
    (model / "config.json").write_text(json.dumps(config))
    random, tensors = np.random.default_rng(5), dict[str, npt.NDArray[np.float32]]()
    vocabulary, heads, kv_heads, head = 64, 4, 2, 16
    rows = {"q_proj": heads * head, "k_proj": kv_heads * head, "v_proj": kv_heads * head}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        tensors |= {f"{name}.{norm}_layernorm.weight": np.ones(WIDTH, np.float32) for norm in NORMS}
        for part in "qk":
            tensors[f"{name}.self_attn.{part}_norm.weight"] = np.ones(head, np.float32)
        for part, count in rows.items():
            tensors[f"{name}.self_attn.{part}.weight"] = drawn(random, count, WIDTH)
        tensors[f"{name}.self_attn.o_proj.weight"] = drawn(random, WIDTH, heads * head)
        tensors[f"{name}.mlp.gate.weight"] = drawn(random, config["num_local_experts"], WIDTH)
        for expert in range(config["num_local_experts"]):
            for part in ("gate_proj", "up_proj", "down_proj"):
                weight = f"{name}.mlp.experts.{expert}.{part}.weight"
                tensors[weight] = drawn(random, WIDTH, WIDTH)
    tensors["model.norm.weight"] = np.ones(WIDTH, np.float32)
    for weight in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[weight] = drawn(random, vocabulary, WIDTH)
    write_safetensors(model / "model.safetensors", tensors)
    return model


def drawn(random: np.random.Generator, rows: int, columns: int) -> npt.NDArray[np.float32]:
    return 0.3 * random.standard_normal((rows, columns), np.float32)


def test_agents_run_the_experts_of_a_layer_as_one_operator(two: Cluster, tmp_path: Path) -> None:
    """At 4 bits. Two agents answer as one does, and as a team that shares the experts."""
    if not mixes_experts(4):
        pytest.skip("this ONNX Runtime has no kernels for it")
    model, golden = wide(tmp_path), Golden.load(FAMILIES / "qwen3_moe")
    wishes = ("--bits=4", "--group-size=32", "--hop-bits=32", "--max-weight-error=none")
    layouts: tuple[list[StagePlan], ...] = (
        [(("pi-1",), 4, ())],
        [(("pi-1",), 2, ()), (("pi-2",), 2, ())],
        [(("pi-2", "pi-1"), 4, (2, 1))],
    )
    answers = []
    for stages in layouts:
        path = write_plan(tmp_path, model, stages, bits=4)
        loaded = two.load(model, *wishes, f"--plan={path}")
        assert len(loaded["stages"]) == len(stages)
        answers.append(continued(two, golden))
    for agent in ("pi-1", "pi-2"):
        graphs = (two.directory / agent).rglob("prepared/**/*.onnx")
        assert any(b"QMoE" in path.read_bytes() for path in graphs)
    alone, pipeline, team = answers
    assert len(set(alone)) > len(alone) / 4
    assert pipeline == alone
    # Sums in another order may turn a close choice, and then all that follows differs.
    assert team[0] == alone[0]
