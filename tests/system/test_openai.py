"""The real openai package against real processes."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.system.cluster import Cluster

PASSAGE = "The lamp is in the attic. The meter in the cellar reads 42."
QUESTION = f"{PASSAGE} Where is the lamp?"


@pytest.fixture
def client(serving: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_chat(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, temperature=0, messages=[{"role": "user", "content": QUESTION}]
    )
    assert answer.object == "chat.completion"
    assert "attic" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_streaming_gives_the_same_text(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(
        model=model,
        temperature=0,
        messages=[{"role": "user", "content": QUESTION}],
        extra_body={"cache_prompt": False},
    )
    stream = client.chat.completions.create(
        model=model,
        temperature=0,
        messages=[{"role": "user", "content": QUESTION}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"cache_prompt": False},  # So that both have the same usage.
    )
    text, finish, usage = "", None, None
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert text == whole.choices[0].message.content
    assert finish == "stop"
    assert usage == whole.usage


def test_completions_with_text_and_with_tokens(client: openai.OpenAI, model: str) -> None:
    text = client.completions.create(model=model, prompt=QUESTION, temperature=0, max_tokens=8)
    assert "attic" in text.choices[0].text
    details = client.completions.create(
        model=model,
        prompt=QUESTION,
        temperature=0,
        max_tokens=8,
        extra_body={"return_token_ids": True},
    )
    tokens = details.model_extra["shoal"]["prompt_tokens"]  # type: ignore[index] # is there
    again = client.completions.create(model=model, prompt=tokens, temperature=0, max_tokens=8)
    assert again.choices[0].text == text.choices[0].text


def test_seeds_decide_sampling(client: openai.OpenAI, model: str) -> None:
    def sample(seed: int) -> str:
        answer = client.completions.create(
            model=model, prompt="The", temperature=2, seed=seed, max_tokens=24
        )
        return answer.choices[0].text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_stop_strings_end_the_answer_and_are_not_shown(client: openai.OpenAI, model: str) -> None:
    plain = client.completions.create(
        model=model, prompt="The lamp", temperature=2, seed=5, max_tokens=24
    )
    text = plain.choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = client.completions.create(
        model=model, prompt="The lamp", temperature=2, seed=5, max_tokens=24, stop=[stop]
    )
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_max_tokens_ends_with_length(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt="The", temperature=2, seed=3, max_tokens=1
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1


def test_ignore_eos_gives_as_many_tokens_as_were_asked_for(
    client: openai.OpenAI, model: str
) -> None:
    def ask(**extra: bool) -> openai.types.Completion:
        return client.completions.create(
            model=model, prompt=QUESTION, temperature=0, max_tokens=70, extra_body=extra
        )

    usual, longer = ask(), ask(ignore_eos=True)
    assert usual.choices[0].finish_reason == "stop"
    assert longer.choices[0].finish_reason == "length"
    assert longer.usage is not None
    assert longer.usage.completion_tokens == 70
    assert longer.choices[0].text.startswith(usual.choices[0].text)


def test_errors_are_openais(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=model, prompt="the lamp " * 5000)
    assert long.value.code == "context_length_exceeded"
    assert long.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="suffix is not supported"):
        client.completions.create(model=model, prompt="x", suffix="y")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=model, prompt="x", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="at least one message"):
        client.chat.completions.create(model=model, messages=[])


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"{}", {"content-type": "text/plain"}),
        (b"{", {"content-type": "application/json"}),
        (b"[]", {"content-type": "application/json"}),
        (b"[" * 100_000, {"content-type": "application/json"}),
        (b'{"prompt": "x", "surprise": 1}', {"content-type": "application/json"}),
        (b" " * (5 << 20), {"content-type": "application/json"}),
    ],
    ids=["no json type", "broken", "list", "deep", "unknown field", "too large"],
)
def test_bad_requests_get_an_error_object(
    serving: Cluster, body: bytes, headers: dict[str, str]
) -> None:
    answer = httpx.post(
        f"{serving.url}/v1/completions", content=body, headers=headers, trust_env=False
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_unknown_routes_and_methods_get_an_error_object(serving: Cluster) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("PUT", "/v1/completions", 405)):
        answer = httpx.request(method, serving.url + path, trust_env=False)
        assert answer.status_code == status
        assert path in answer.json()["error"]["message"]


def test_requests_wait_their_turn_and_all_are_answered(client: openai.OpenAI, model: str) -> None:
    def ask(_: int) -> str:
        answer = client.completions.create(
            model=model, prompt=QUESTION, temperature=0, max_tokens=8
        )
        return answer.choices[0].text

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(ask, range(12)))) == 1


def test_a_client_that_goes_away_frees_the_model(client: openai.OpenAI, model: str) -> None:
    """A cancelled stream must not hold the only slot until its 100,000 tokens are through."""
    for _ in range(5):
        stream = client.completions.create(
            model=model, prompt="The", temperature=2, max_tokens=100_000, stream=True
        )
        next(iter(stream))
        stream.close()
    answer = client.with_options(timeout=10).completions.create(
        model=model, prompt=QUESTION, temperature=0, max_tokens=8
    )
    assert "attic" in answer.choices[0].text


def test_the_largest_prompts_cost_no_device(serving: Cluster) -> None:
    devices = serving.get("/shoal/v1/devices")["devices"]
    text = "the lamp " * 430_000
    bodies = [{"prompt": text}, {"messages": [{"role": "user", "content": text}]}] * 2

    def ask(body: dict[str, object]) -> httpx.Response:
        route = "chat/completions" if "messages" in body else "completions"
        return httpx.post(f"{serving.url}/v1/{route}", json=body, timeout=120, trust_env=False)

    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        for answer in pool.map(ask, bodies):
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "context_length_exceeded"
    after = serving.get("/shoal/v1/devices")["devices"]
    assert [item["name"] for item in after] == [item["name"] for item in devices]
    assert "device lost" not in serving.log("coordinator")
