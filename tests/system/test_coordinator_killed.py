"""A coordinator that is killed and started again takes its stages over; nothing is loaded anew."""

from __future__ import annotations

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai import APIConnectionError, OpenAI

from tests.system.cluster import TINY_OPT, Cluster, wait_for

WAIT_S = 60
QUESTION = {
    "model": "tiny-opt",
    "prompt": "Hello",
    "max_tokens": 24,
    "temperature": 1.0,
    "ignore_eos": True,
}
ID = {"x-request-id": "mine-8"}
BEGUN = 400
"""The characters after which a client's answer is cut off."""
END = 2
"""The token at the end of tiny-opt's answers."""


def restart(cluster: Cluster) -> None:
    """Start the coordinator again where it was."""
    process = cluster.processes["coordinator"]
    process.wait(WAIT_S)
    assert process.stdout is not None
    process.stdout.close()
    cluster.start_coordinator("--no-mdns", f"--port={cluster.control_port}")


def ask(cluster: Cluster) -> str:
    url = f"{cluster.url}/v1/completions"
    answer = httpx.post(url, json=QUESTION, headers=ID, timeout=WAIT_S, trust_env=False)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def kinds(cluster: Cluster) -> list[str]:
    return [event["kind"] for event in cluster.get("/shoal/v1/events")["events"]]


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "stopped"])
def test_nothing_is_loaded_again_and_the_same_request_has_the_same_answer(
    cluster: Cluster, killed: bool
) -> None:
    cluster.start_coordinator()
    for name in ("a1", "a2"):
        cluster.start_agent(name)
    cluster.wait_for_agents("a1", "a2")
    loaded = cluster.load(TINY_OPT, "--bits=8", "--pin=embedding:a1", "--pin=head:a2")
    assert [stage["device"] for stage in loaded["stages"]] == ["a1", "a2"]
    undisturbed = ask(cluster)
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        cut = pool.submit(cut_off, cluster, begun)
        assert begun.wait(WAIT_S)
        if killed:
            cluster.kill("coordinator")
        else:
            cluster.processes["coordinator"].terminate()
        errors = cut.result(WAIT_S)
    # A coordinator that is stopped says so in the stream. A killed one cannot.
    assert errors == ([] if killed else ["the coordinator was stopped"])
    restart(cluster)
    wait_for(
        lambda: (model := cluster.get("/shoal/v1/ps")["model"]) and model["state"] == "ready",
        WAIT_S,
        "the model to answer again",
    )
    assert ask(cluster) == undisturbed
    told = kinds(cluster)
    assert "adopted" in told
    assert "served" not in told
    for name in ("a1", "a2"):
        assert cluster.log(name).count("loaded ") == 1, cluster.log(name)
    # The next loss is that of any other deployment.
    cluster.kill("a2")
    wait_for(lambda: "replaced" in kinds(cluster), WAIT_S, "the model to be placed anew")
    assert ask(cluster)


def cut_off(cluster: Cluster, begun: threading.Event) -> list[str]:
    """Return the messages of the error events of a long answer that ends before its time."""
    body = {**QUESTION, "max_tokens": 2000, "stream": True}
    errors = []
    try:
        with httpx.stream(
            "POST", f"{cluster.url}/v1/completions", json=body, timeout=WAIT_S, trust_env=False
        ) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    begun.set()
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        errors.append(str(event["error"]["message"]))
    except httpx.TransportError:
        pass
    return errors


def chat(client: OpenAI, begun: threading.Event, headers: dict[str, str]) -> tuple[str, str]:
    """Return the id that a chat was given, and its text until its end or the coordinator's.

    ``begun`` is set once some text is there.
    """
    raw = client.chat.completions.with_raw_response.create(
        model="tiny-opt",
        messages=[{"role": "user", "content": "Where is the lamp?"}],
        max_tokens=400,
        temperature=1.0,
        stream=True,
        extra_headers=headers,
        # The end token has no text, and may come again and again.
        extra_body={"ignore_eos": True, "logit_bias": {str(END): -100}},
    )
    text = ""
    with contextlib.suppress(APIConnectionError):
        for chunk in raw.parse():
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
            if len(text) > BEGUN:
                begun.set()
    return raw.headers["x-request-id"], text


def test_a_client_gets_the_rest_by_the_id_that_it_was_given(cluster: Cluster) -> None:
    cluster.start_coordinator()
    for name in ("a1", "a2"):
        cluster.start_agent(name)
    cluster.wait_for_agents("a1", "a2")
    cluster.load(TINY_OPT, "--bits=8", "--pin=embedding:a1", "--pin=head:a2")
    answers = cluster.directory / "coordinator" / "answers"

    def client() -> OpenAI:
        return OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S)

    with client() as before, ThreadPoolExecutor(1) as pool:
        chat(before, threading.Event(), {})  # The next one begins with rows that slots keep.
        begun = threading.Event()
        cut = pool.submit(chat, before, begun, {})
        assert begun.wait(WAIT_S)
        cluster.kill("coordinator")
        given, part = cut.result(WAIT_S)
    restart(cluster)
    with client() as after:  # It asks before the agents are back, and waits for them.
        assert len(list(answers.iterdir())) == 1
        again, text = chat(after, threading.Event(), {"x-request-id": given})
        other, different = chat(after, threading.Event(), {})
    assert again == given
    # A model that samples at 8 bits would hardly say so much twice, if its rows ran again.
    assert text.startswith(part)
    assert len(text) > len(part) > BEGUN
    assert different != text
    assert other != given
    assert "served" not in kinds(cluster)
    assert list(answers.iterdir()) == []
