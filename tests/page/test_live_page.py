"""The page and ``shoal top`` before a real coordinator with three agents."""

from __future__ import annotations

import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from tests.page.browser import Browser
from tests.system.cluster import TINY_OPT, Cluster, last_json, wait_for

AGENTS = ("nano", "pi-1", "pi-2")
QUESTION = "Where is the lamp?"
VISIBLE_S = 6.0
"""The time within which a killed agent must be seen."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Cluster]:
    """Three agents so small that the model is split over all of them."""
    cluster = Cluster(tmp_path_factory.mktemp("live"))
    try:
        cluster.start_coordinator()
        for name in AGENTS:
            cluster.start_agent(
                name, f"--coordinator=127.0.0.1:{cluster.control_port}", "--memory=6M"
            )
        cluster.wait_for_agents(*AGENTS)
        yield cluster
    finally:
        browser.forget()
        cluster.stop()


@pytest.fixture(autouse=True)
def no_earlier_chat(browser: Browser) -> None:
    browser.forget()


def answer(cluster: Cluster) -> str:
    """The answer that any client gets."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    url = f"{cluster.url}/v1/chat/completions"
    found = httpx.post(url, json=body, timeout=60, trust_env=False).json()
    return str(found["choices"][0]["message"]["content"]).strip()


def test_a_load_and_a_chat_are_shown_as_they_happen(browser: Browser, cluster: Cluster) -> None:
    browser.open(cluster.url)
    for number, name in enumerate(AGENTS, 1):
        browser.until(f".device:nth-child({number})", name)
        browser.until(f".device:nth-child({number})", "cores")  # Of its first heartbeat.
    assert "No model is loaded" in browser.text()
    browser.click(".top .main-button")
    browser.type("dialog input[list]", str(TINY_OPT))
    boxes = "[...document.querySelectorAll('dialog .check')].filter((box) => "
    browser.js(f"{boxes}['3','4','5','6','8','16'].includes(box.innerText.trim()))"
               ".forEach((box) => box.querySelector('input').click())")  # fmt: skip
    browser.click("dialog .main-button")
    browser.until(".model .pill-ready", timeout_s=90)
    assert browser.count("dialog") == 0
    plan = cluster.get("/shoal/v1/ps")["model"]["plan"]
    assert len(plan["stages"]) > 1
    assert browser.count(".ring .block") == len(plan["blocks"])
    rows = browser.js("return document.querySelectorAll('.stages tbody th').length")
    assert rows == 2 * len(plan["stages"])
    browser.say(QUESTION)
    browser.until(".message.assistant .figures", "tokens")
    assert browser.text(".message.assistant .markdown") == answer(cluster)
    browser.until(".request.over", "done")
    kinds = "return [...document.querySelectorAll('.kind')].map((kind) => kind.innerText)"
    assert {"joined", "load began", "served"} <= set(browser.js(kinds))


def test_a_killed_agent_is_seen_soon_and_the_ring_heals(browser: Browser, cluster: Cluster) -> None:
    served = cluster.get("/shoal/v1/ps")["model"]["stages"][0]["device"]
    browser.open(cluster.url)
    browser.until(".model .pill-ready")
    began_s = time.monotonic()
    cluster.kill(served)
    browser.until(".device-lost", served, VISIBLE_S)
    assert time.monotonic() - began_s < VISIBLE_S
    cluster.processes[served].wait()
    cluster.start_agent(served, f"--coordinator=127.0.0.1:{cluster.control_port}", "--memory=6M")
    wait_for(lambda: browser.count(".device-lost") == 0, 60, "the agent's return")
    browser.until(".model .pill-ready", timeout_s=60)
    browser.say(QUESTION)
    browser.until(".message.assistant .figures", "tokens", timeout_s=60)
    assert browser.text(".message.assistant .markdown") == answer(cluster)


def test_the_page_goes_on_after_a_restart_of_the_coordinator(
    browser: Browser, cluster: Cluster
) -> None:
    browser.open(cluster.url)
    browser.until(".model .pill-ready")
    process = cluster.processes["coordinator"]
    process.terminate()
    assert process.wait(20) == 0
    assert process.stdout is not None
    process.stdout.close()
    browser.until(".banner", "The coordinator does not answer")
    address = urlsplit(cluster.url)
    ports = f"--port={cluster.control_port}", f"--http={address.hostname}:{address.port}"
    cluster.start_coordinator("--no-mdns", *ports)
    browser.until(".top-state", "tiny-opt", timeout_s=30)
    browser.until(".model .pill-ready", timeout_s=60)
    assert browser.count(".banner") == 0
    browser.say(QUESTION)
    browser.until(".message.assistant .figures", "tokens", timeout_s=60)
    assert browser.text(".message.assistant .markdown") == answer(cluster)


def test_top_prints_the_same_shoal(cluster: Cluster) -> None:
    shown = cluster.run("top").stdout
    for text in (*AGENTS, "tiny-opt: ready", "predicted ms", "token back", "no request is running"):
        assert text in shown
    state = last_json(cluster.run("top", "--json"))
    assert [one["name"] for one in state["devices"] if one["state"] == "here"] == list(AGENTS)
