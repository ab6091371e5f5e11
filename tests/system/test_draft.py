"""A draft model guesses tokens on the first device: answers stay, whatever happens to it."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from model import costs
from model.checkpoint import Checkpoint
from model.quantize import Format
from tests.system.cluster import FIXTURES, Cluster, last_json, streamed_tokens, wait_for
from tests.team import write_plan
from wire import limits

NAMES = ("pi-1", "pi-2", "pi-3")
PINS = ("--pin=embedding:pi-1", "--pin=layers=1:pi-2", "--pin=head:pi-3")
CONTEXT = 1500
TOKENS = 32
SLOTS = 4
EXACT = ("--bits=32", "--hop-bits=32", f"--context={CONTEXT}", f"--slots={SLOTS}")
PLAIN = {"speculative.n_max": 0}
DRAWN: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.7, "seed": 5},
    {"temperature": 1.2, "top_p": 0.9, "seed": 6},
    {"temperature": 1.0, "top_k": 30, "seed": 7, "repetition_penalty": 1.2},
)


def long_model(path: Path, **changes: Any) -> Path:
    """A model that never ends by itself."""
    model = Path(shutil.copytree(FIXTURES / "llama", path))
    config = json.loads((model / "config.json").read_text())
    longer = {"max_position_embeddings": CONTEXT, "eos_token_id": None}
    (model / "config.json").write_text(json.dumps(config | longer | changes))
    return model


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """The model, and the same one under another name. At 4 bits it is the draft model."""
    return long_model(tmp_path / "big"), long_model(tmp_path / "small")


def start_all(cluster: Cluster, *options: str) -> None:
    cluster.start_coordinator()
    for name in NAMES:
        start(cluster, name, *options)
    cluster.wait_for_agents(*NAMES)


def start(cluster: Cluster, name: str, *options: str) -> None:
    cluster.start_agent(name, f"--coordinator=127.0.0.1:{cluster.control_port}", *options)


def asked(cluster: Cluster, prompt: list[int], **fields: Any) -> list[int]:
    body = {"prompt": prompt, "max_tokens": TOKENS, "return_token_ids": True, **fields}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=120, trust_env=False)
    tokens: list[int] = answer.json()["shoal"]["tokens"]
    return tokens


def prompts(count: int) -> list[list[int]]:
    return [[(7 * seed + seed * at * at) % 250 for at in range(40)] for seed in range(1, 1 + count)]


def draft_of(cluster: Cluster) -> dict[str, Any]:
    found: dict[str, Any] = cluster.get("/shoal/v1/ps")["model"]["draft"]
    return found


def test_answers_with_a_draft_model_are_those_without(
    cluster: Cluster, models: tuple[Path, Path]
) -> None:
    model, small = models
    start_all(cluster)
    cluster.know(small)
    loaded = cluster.load(model, *EXACT, *PINS, f"--draft={small}")
    assert loaded["draft"]["device"] == "pi-1"
    assert loaded["draft"]["acceptance_is"] == "assumed"
    cases = list(zip(prompts(4), DRAWN, strict=True))
    whole = {**PLAIN, "cache_prompt": False}
    expected = [asked(cluster, prompt, **how, **whole) for prompt, how in cases]
    # One after the other, then with kept prefixes, four at once.
    assert [asked(cluster, prompt, **how) for prompt, how in cases] == expected
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda case: asked(cluster, case[0], **case[1]), cases))
    assert found == expected
    cancelled_streams_leave_the_draft_model_right(cluster)
    wait_for(
        lambda: (
            asked(cluster, cases[0][0], **cases[0][1]) == expected[0]
            and draft_of(cluster)["drafted_tokens"] > 0
        ),
        120,
        "a guess by the draft model",
    )
    the_sources_of_guesses_are_told(cluster)
    unused = draft_of(cluster)["drafted_tokens"]
    asked(cluster, cases[0][0], **{"speculative.draft_model": False})
    assert draft_of(cluster)["drafted_tokens"] == unused


def cancelled_streams_leave_the_draft_model_right(cluster: Cluster) -> None:
    prompt = prompts(1)[0]
    expected = asked(cluster, prompt, temperature=0)
    body = {"prompt": prompt, "max_tokens": 900, "stream": True, "temperature": 0}
    with httpx.stream(
        "POST", f"{cluster.url}/v1/completions", json=body, timeout=60, trust_env=False
    ) as stream:
        for number, _ in enumerate(stream.iter_lines()):
            if number == 20:
                break
    longer = [*prompt, *expected]
    whole = asked(cluster, longer, temperature=0, cache_prompt=False, **PLAIN)
    assert asked(cluster, longer, temperature=0) == whole


def the_sources_of_guesses_are_told(cluster: Cluster) -> None:
    metrics = httpx.get(f"{cluster.url}/metrics", trust_env=False, timeout=60).text
    name = 'shoal_model_drafted_tokens_total{model="big"} '
    assert any(
        line.startswith(name) and float(line.removeprefix(name)) > 0
        for line in metrics.splitlines()
    )
    request = cluster.get("/shoal/v1/trace?request=last")["request"]
    assert request["drafted_tokens"] >= request["model_drafted_tokens"] >= 0
    assert "draft model: small at 4 bits on pi-1" in " ".join(cluster.run("ps").stdout.split())


def test_draft_models_that_cannot_guess_are_refused(
    cluster: Cluster, models: tuple[Path, Path], tmp_path: Path
) -> None:
    model, small = models
    start_all(cluster)
    cluster.know(small)
    other = long_model(tmp_path / "other")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    tokens = vocabulary["model"]["vocab"]
    first, second = sorted(tokens, key=tokens.get)[40:42]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    refused = cluster.run("load", str(model), *EXACT, f"--draft={other}")
    assert refused.returncode != 0
    words = " ".join(refused.stderr.split())
    assert "other has another vocabulary than big" in words
    assert "token 40 is" in words or "token 41 is" in words
    missing = cluster.run("load", str(model), *EXACT, f"--draft={tmp_path / 'nothing'}")
    assert missing.returncode != 0
    assert "nothing" in missing.stderr
    alone = cluster.run("load", str(model), *EXACT, "--draft-bits=4")
    assert "--draft-bits needs --draft" in " ".join(alone.stderr.split())
    assert "stages" not in (cluster.get("/shoal/v1/ps")["model"] or {})


def sizes(model: Path) -> tuple[int, int]:
    """The memory of a stage with half of the model, and of the smallest first one with a draft."""
    spec = Checkpoint.open(model).spec
    buffers = costs.stage_buffer_bytes(
        spec, range(spec.block_count), limits.PREFILL_CHUNK_TOKENS, CONTEXT
    )

    def block(at: int, bits: int) -> int:
        weights = costs.executed_bytes(spec, at, Format.of(bits), bits)
        return weights + SLOTS * costs.kv_bytes(spec, at, CONTEXT)

    blocks = range(spec.block_count)
    half = max(
        sum(block(at, 32) for at in part) for part in (blocks[: len(blocks) // 2], blocks[2:])
    )
    draft = buffers + sum(block(at, 4) for at in blocks)
    return buffers + half, buffers + block(0, 32) + draft


def test_a_draft_model_without_room_is_refused_and_lost_ones_come_back(
    cluster: Cluster, models: tuple[Path, Path], tmp_path: Path
) -> None:
    model, small = models
    half, with_draft = sizes(model)
    little = half + (with_draft - half) // 4
    cluster.start_coordinator()
    for name in NAMES[1:]:
        start(cluster, name, f"--memory={little}")
    cluster.wait_for_agents(*NAMES[1:])
    cluster.know(small)
    options = (*EXACT, f"--draft={small}")
    refused = cluster.run("load", str(model), *options)
    assert refused.returncode != 0
    words = " ".join(refused.stderr.split())
    assert "no device has room for the first stage and the draft model small beside it" in words
    assert "lacks" in words
    # A saved plan that would fit without the draft model is refused for the same reason.
    saved = write_plan(tmp_path, model, [(("pi-2",), 2, ()), (("pi-3",), 3, ())])
    refused = cluster.run("load", str(model), *options, f"--plan={saved}")
    assert refused.returncode != 0
    words = " ".join(refused.stderr.split())
    assert "has no room for the draft model small: pi-2, which would run the first stage, " in words
    start(cluster, "pi-1", "--memory=1G")
    cluster.wait_for_agents(*NAMES)
    # Without the wish about the last layer, pi-1 would have the whole model.
    pins = ("--pin=layers=2:pi-2", "--pin=head:pi-3")
    assert cluster.load(model, *options, *pins)["draft"]["device"] == "pi-1"
    request: dict[str, Any] = {
        "prompt": prompts(1)[0],
        "max_tokens": 150,
        "temperature": 1.0,
        "seed": 3,
    }
    expected = asked(cluster, **{**request, **PLAIN})
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(streamed_tokens, cluster, request, begun, 20)
        assert begun.wait(60)
        cluster.kill("pi-1")
        assert answer.result(120) == expected
    draft = draft_of(cluster)
    assert (draft["model"], draft["device"]) == ("small", None)
    assert "small is not loaded, for lack of room" in " ".join(cluster.run("ps").stdout.split())
    cluster.processes["pi-1"].wait(60)
    start(cluster, "pi-1", "--memory=1G")
    cluster.wait_for_agents(*NAMES)
    moved = last_json(cluster.run("rebalance", "--json"))
    assert moved["moves"], moved
    assert draft_of(cluster)["device"] == "pi-1"
    assert asked(cluster, **request) == expected


def test_a_restarted_coordinator_takes_the_draft_model_over(
    cluster: Cluster, models: tuple[Path, Path]
) -> None:
    model, small = models
    start_all(cluster)
    cluster.know(small)
    cluster.load(model, *EXACT, *PINS, f"--draft={small}")
    prompt = prompts(1)[0]
    expected = asked(cluster, prompt, temperature=0)
    before = draft_of(cluster)
    coordinator = cluster.processes["coordinator"]
    coordinator.terminate()
    coordinator.wait(60)
    assert coordinator.stdout is not None
    coordinator.stdout.close()
    cluster.start_coordinator("--no-mdns", f"--port={cluster.control_port}")
    wait_for(
        lambda: (found := cluster.get("/shoal/v1/ps")["model"]) and found["state"] == "ready",
        60,
        "the model is taken over",
    )
    after = draft_of(cluster)
    assert all(after[key] == before[key] for key in ("model", "bits", "device", "memory_bytes"))
    assert asked(cluster, prompt, temperature=0) == expected
