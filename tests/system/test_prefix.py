"""Turns of a chat go on in their slots, with the answers of whole prompts: over real agents."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.system.cluster import FIXTURES, Cluster

NAMES = ("pi-1", "pi-2", "pi-3")
PINS = ("--pin=embedding:pi-1", "--pin=layers=1:pi-2", "--pin=head:pi-3")
CONTEXT = 1500
TOKENS = 20


def served(
    cluster: Cluster, tmp_path: Path, names: tuple[str, ...], pins: tuple[str, ...], *options: str
) -> None:
    """A model that never ends by itself, with two slots."""
    model = Path(shutil.copytree(FIXTURES / "llama", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    changes = {"max_position_embeddings": CONTEXT, "eos_token_id": None}
    (model / "config.json").write_text(json.dumps(config | changes))
    cluster.start_coordinator(*options)
    for name in names:
        cluster.start_agent(name, f"--coordinator=127.0.0.1:{cluster.control_port}")
    cluster.wait_for_agents(*names)
    cluster.load(model, "--bits=32", "--hop-bits=32", f"--context={CONTEXT}", "--slots=2", *pins)


def asked(cluster: Cluster, prompt: list[int], **fields: Any) -> tuple[list[int], list[int], int]:
    """The tokens of prompt and answer, and the number of cached ones."""
    answer = httpx.post(
        f"{cluster.url}/v1/completions",
        json={"prompt": prompt, "max_tokens": TOKENS, "return_token_ids": True, **fields},
        timeout=60,
        trust_env=False,
    ).json()
    details = answer["usage"]["prompt_tokens_details"]
    return answer["shoal"]["prompt_tokens"], answer["shoal"]["tokens"], details["cached_tokens"]


def chat(cluster: Cluster, seed: int, turns: int, **fields: Any) -> tuple[list[list[int]], int]:
    """The answers of a chat whose prompts grow, and all its cached tokens."""
    sampling = {"temperature": 1.1, "top_p": 0.9, "seed": seed} if seed % 2 else {"temperature": 0}
    prompt = [(7 * seed + 3 * index) % 250 for index in range(150)]
    answers, cached = [], 0
    for turn in range(turns):
        whole, answer, reused = asked(cluster, prompt, **sampling, **fields)
        answers.append(answer)
        assert reused <= len(whole) - 1
        cached += reused
        prompt = [*prompt, *answer, *(11 * turn + seed, 5, 9)]
    return answers, cached


def test_chats_give_what_whole_prompts_give(cluster: Cluster, tmp_path: Path) -> None:
    served(cluster, tmp_path, NAMES, PINS)
    turns = 4
    seeds = range(2)
    plain = {"cache_prompt": False, "speculative.n_max": 0}
    whole = [chat(cluster, seed, turns, **plain) for seed in seeds]
    assert [cached for _, cached in whole] == [0, 0]
    # The slots keep parts of these chats, which are of use from the first turn on.
    with ThreadPoolExecutor(len(seeds)) as pool:
        kept = list(pool.map(lambda seed: chat(cluster, seed, turns), seeds))
    assert [answers for answers, _ in kept] == [answers for answers, _ in whole]
    assert all(cached > 150 * (turns - 1) for _, cached in kept)
    cancelled_streams_leave_slots_that_go_on_rightly(cluster)
    repeated_text_gives_the_same(cluster)


def cancelled_streams_leave_slots_that_go_on_rightly(cluster: Cluster) -> None:
    prompt = [(5 * index) % 250 for index in range(100)]
    expected = asked(cluster, prompt, temperature=0)[1]
    body = {"prompt": prompt, "max_tokens": 900, "stream": True, "temperature": 0}
    for _ in range(3):
        with httpx.stream(
            "POST", f"{cluster.url}/v1/completions", json=body, timeout=60, trust_env=False
        ) as stream:
            for number, _ in enumerate(stream.iter_lines()):
                if number == 30:
                    break
        longer = [*prompt, *expected]
        _, answer, cached = asked(cluster, longer, temperature=0)
        assert cached > len(prompt)
        assert answer == asked(cluster, longer, temperature=0, cache_prompt=False)[1]


def repeated_text_gives_the_same(cluster: Cluster) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6] * 20
    for sampling in ({"temperature": 0}, {"temperature": 0.3, "seed": 4}):
        fields = {**sampling, "max_tokens": 300, "cache_prompt": False}
        plain = asked(cluster, prompt, **fields, **{"speculative.n_max": 0})[1]
        assert asked(cluster, prompt, **fields)[1] == plain


def test_a_coordinator_keeps_no_prefix_if_it_is_told_so(cluster: Cluster, tmp_path: Path) -> None:
    served(cluster, tmp_path, NAMES[:1], (), "--no-prefix-cache", "--speculate=0")
    prompt = list(range(50))
    assert [asked(cluster, prompt)[2] for _ in range(2)] == [0, 0]
