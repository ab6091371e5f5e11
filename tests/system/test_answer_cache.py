"""Identical greedy requests to a coordinator that keeps answers."""

from __future__ import annotations

from typing import Any

import httpx

from tests.system.cluster import TINY_OPT, Cluster

CHAT = {
    "messages": [{"role": "user", "content": "The lamp is in the attic. Where is the lamp?"}],
    "temperature": 0,
    "max_tokens": 12,
}


def ask(cluster: Cluster, **more: Any) -> tuple[str, int]:
    """The text of an answer, and how many of its tokens were kept."""
    answer = httpx.post(
        f"{cluster.url}/v1/chat/completions", json={**CHAT, **more}, timeout=60, trust_env=False
    ).json()
    details = answer["usage"]["completion_tokens_details"]
    return answer["choices"][0]["message"]["content"], details.get("cached_tokens", 0)


def streamed(cluster: Cluster) -> str:
    text = ""
    with httpx.stream(
        "POST",
        f"{cluster.url}/v1/chat/completions",
        json={**CHAT, "stream": True},
        timeout=60,
        trust_env=False,
    ) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in httpx.Response(200, text=line[6:]).json()["choices"]:
                    text += choice["delta"].get("content") or ""
    return text


def test_an_answer_is_kept_until_the_model_is_loaded_anew(cluster: Cluster) -> None:
    cluster.start_coordinator("--no-mdns", "--answer-cache=1M")
    cluster.start_agent("one")
    cluster.wait_for_agents("one")
    cluster.load(TINY_OPT, "--bits=8")
    text, kept = ask(cluster)
    assert (bool(text), kept) == (True, 0)
    again, kept = ask(cluster)
    assert again == text
    assert kept > 0
    assert streamed(cluster) == text
    assert ask(cluster, cache_prompt=False)[1] == 0
    assert ask(cluster, temperature=1, seed=1)[1] == 0
    cluster.load(TINY_OPT, "--bits=16")
    assert ask(cluster)[1] == 0
