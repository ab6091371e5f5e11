"""How tokens are drawn and told, over real processes: a pipeline, a team, and lost devices."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest

from model.checkpoint import Checkpoint
from model.reference import ReferenceModel
from tests.system.cluster import FIXTURES, Cluster, streamed_tokens
from tests.team import StagePlan, write_plan

NAMES = ("pi-1", "pi-2", "pi-3")
PINS = ("--pin=embedding:pi-1", "--pin=layers=1:pi-2", "--pin=head:pi-3")
CONTEXT = 1200
EXACT = ("--bits=32", "--hop-bits=32", f"--context={CONTEXT}", "--slots=3")
END = 257
PROMPT = "The lamp"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{2,6}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "model"
    model = Path(shutil.copytree(FIXTURES / "llama", folder))
    config = json.loads((model / "config.json").read_text())
    changes = {"max_position_embeddings": CONTEXT, "eos_token_id": END}
    (model / "config.json").write_text(json.dumps(config | changes))
    return model


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("three"))
    try:
        cluster.start_coordinator()
        for name in NAMES:
            cluster.start_agent(name)
        cluster.wait_for_agents(*NAMES)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def pipeline(three: Cluster, model: Path) -> Cluster:
    answer = three.load(model, *EXACT, *PINS)
    assert [stage["device"] for stage in answer["plan"]["stages"]] == list(NAMES)
    return three


def complete(cluster: Cluster, **body: Any) -> Any:
    body = {"prompt": PROMPT, "temperature": 0, "return_token_ids": True, **body}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(cluster: Cluster, **body: Any) -> Any:
    body = {"prompt": PROMPT, **body}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def log_softmax(model: Path, tokens: list[int]) -> np.ndarray:
    """The log-probabilities of the token behind each of ``tokens``, by the reference."""
    checkpoint = Checkpoint.open(model)
    blocks = [checkpoint.block(block) for block in range(checkpoint.spec.block_count)]
    logits = ReferenceModel(checkpoint.spec, blocks).forward(tokens).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    whole: np.ndarray = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return whole


# ---- log-probabilities ---------------------------------------------------------------------------


def test_logprobs_of_prompt_and_answer_are_those_of_the_reference(
    pipeline: Cluster, model: Path
) -> None:
    answer = complete(pipeline, logprobs=4, echo=True, max_tokens=12, temperature=1.3, seed=4)
    (choice,) = answer["choices"]
    prompt, tokens = answer["shoal"]["prompt_tokens"], answer["shoal"]["tokens"]
    assert choice["text"].startswith(PROMPT)
    told = choice["logprobs"]
    expected = log_softmax(model, [*prompt, *tokens])
    everything = [*prompt, *tokens]
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    assert told["token_logprobs"][1:] == pytest.approx(
        [expected[at, token] for at, token in enumerate(everything[1:])], abs=1e-3
    )
    for at, tops in enumerate(told["top_logprobs"][1:]):
        likeliest = np.sort(expected[at])[::-1][:4]
        assert sorted(tops.values(), reverse=True) == pytest.approx(likeliest, abs=1e-3)
    assert len(told["tokens"]) == len(told["text_offset"]) == len(everything)
    assert answer["usage"]["completion_tokens"] == len(tokens)


def test_a_prompt_alone_is_scored(pipeline: Cluster, model: Path) -> None:
    whole = complete(pipeline, logprobs=0, echo=True, max_tokens=0, prompt="a long one " * 4)
    (choice,) = whole["choices"]
    assert choice["text"] == "a long one " * 4
    assert choice["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 0
    prompt = whole["shoal"]["prompt_tokens"]
    expected = log_softmax(model, prompt)
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
        [expected[at, token] for at, token in enumerate(prompt[1:])], abs=1e-3
    )
    chunks = streamed(pipeline, logprobs=0, echo=True, max_tokens=0, prompt="a long one " * 4)
    assert [chunk["text"] for chunk in chunks] == ["a long one " * 4, ""]
    assert chunks[0]["logprobs"] == choice["logprobs"]


def test_a_streams_logprobs_are_the_whole_answers(pipeline: Cluster) -> None:
    for extra in ({}, {"echo": True}):
        settings: dict[str, Any] = {"logprobs": 2, "max_tokens": 9, "seed": 3, **extra}
        (choice,) = complete(pipeline, temperature=1, **settings)["choices"]
        chunks = streamed(pipeline, temperature=1, **settings)
        assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
        for name, values in choice["logprobs"].items():
            parts = [chunk["logprobs"][name] for chunk in chunks if chunk["logprobs"]]
            assert list(itertools.chain.from_iterable(parts)) == values


def streamed(cluster: Cluster, **body: Any) -> list[Any]:
    """The choices of a stream's chunks."""
    found = []
    body = {"prompt": PROMPT, "temperature": 0, "stream": True, **body}
    url = f"{cluster.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                found += json.loads(line.removeprefix("data: "))["choices"]
    return found


def test_too_many_logprobs_are_refused(pipeline: Cluster) -> None:
    assert refusal(pipeline, logprobs=21)["param"] == "logprobs"
    assert refusal(pipeline, logprobs=True)["param"] == "logprobs"


# ---- drawing -------------------------------------------------------------------------------------


def test_choices_and_batches_are_the_answers_that_each_run_alone_gives(pipeline: Cluster) -> None:
    settings: dict[str, Any] = {"temperature": 1.4, "max_tokens": 12, "logprobs": 1}
    prompts = ["The lamp", "x", "a long one"]
    answer = complete(pipeline, prompt=prompts, n=2, seed=70, **settings)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for index, choice in enumerate(answer["choices"]):
        alone = complete(
            pipeline, prompt=prompts[index // 2], seed=70 + index % 2, echo=False, **settings
        )
        (other,) = alone["choices"]
        assert (choice["text"], choice["finish_reason"]) == (other["text"], other["finish_reason"])
        # Several rows in one pass are rounded differently.
        told, expected = (one["logprobs"]["token_logprobs"] for one in (choice, other))
        assert told == pytest.approx(expected, abs=1e-4)
    assert answer["choices"][0]["text"] != answer["choices"][1]["text"]
    chunks = streamed(pipeline, prompt=prompts, n=2, seed=70, **settings)
    for choice in answer["choices"]:
        own = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
    assert refusal(pipeline, n=129)["param"] == "n"
    assert refusal(pipeline, prompt=["x"] * 65, n=2)["param"] == "n"
    assert refusal(pipeline, n=2, best_of=3)["param"] == "best_of"


def test_biases_and_penalties_change_what_is_drawn(pipeline: Cluster) -> None:
    plain = complete(pipeline, max_tokens=20)["shoal"]["tokens"]
    first = plain[0]
    banned = complete(pipeline, max_tokens=20, logit_bias={str(first): -100})["shoal"]["tokens"]
    assert first not in banned
    forced = complete(pipeline, max_tokens=5, logit_bias={"65": 100})["shoal"]["tokens"]
    assert forced == [65] * 5
    varied = complete(
        pipeline, max_tokens=40, logit_bias={"65": 100, "66": 99}, frequency_penalty=0.6
    )["shoal"]["tokens"]
    assert set(varied) == {65, 66}
    assert min(varied.count(65), varied.count(66)) >= 10
    likeliest = complete(pipeline, max_tokens=20, temperature=2, min_p=1, seed=1)
    assert likeliest["shoal"]["tokens"] == plain
    for wrong in ({"99999": 1}, {"-1": 1}, {"a": 1}, {"1": 101}, {"1": "x"}, [1]):
        assert refusal(pipeline, logit_bias=wrong)["param"] == "logit_bias"


# ---- formats -------------------------------------------------------------------------------------

NAMED = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "p", "schema": SCHEMA},
            }
        },
        "",
    ),
    "llama-server's schema": ({"json_schema": SCHEMA}, ""),
    "vLLM's schema": ({"guided_json": json.dumps(SCHEMA)}, ""),
    "expression": ({"guided_regex": r"[a-f]{3}/\d{2,4}"}, r"[a-f]{3}/\d{2,4}"),
    "choice": ({"structured_outputs": {"choice": ["red", 'a "b"']}}, 'red|a "b"'),
    "GBNF": ({"grammar": 'root ::= ("ab" | "c"){2,3} [0-9]{2}'}, "(ab|c){2,3}[0-9]{2}"),
    "Lark": ({"grammar": 'start: "<" /[x-z]{1,3}/ ">"'}, "<[x-z]{1,3}>"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_keeps_to_its_format(pipeline: Cluster, name: str) -> None:
    body, pattern = FORMATS[name]
    for seed in range(3):
        answer = complete(pipeline, temperature=1.5, seed=seed, max_tokens=400, **body)
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "stop"
        if pattern:
            assert re.fullmatch(pattern, choice["text"])
        else:
            jsonschema.validate(json.loads(choice["text"]), SCHEMA)
        again = complete(pipeline, temperature=1.5, seed=seed, max_tokens=400, **body)
        assert again["choices"] == answer["choices"]


def test_a_json_object_is_one_whatever_the_model_would_say(pipeline: Cluster) -> None:
    answer = complete(
        pipeline,
        response_format={"type": "json_object"},
        max_tokens=300,
        temperature=1,
        seed=5,
        logit_bias={str(ord("}")): 6, str(ord('"')): 6},
    )
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert isinstance(json.loads(choice["text"]), dict)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "object with a schema"),
        ({"json_schema": {"type": "nonsense"}}, "no answer can be kept to it"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": [1]}, "a JSON schema is an object"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "a", "grammar": 'start: "a"'}, "one format"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"grammar": "x" * 300_000}, "256 KiB"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "one of json"),
        ({"guided_choice": []}, "list of texts"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_format_that_cannot_be_kept_is_refused_by_name(
    pipeline: Cluster, body: dict[str, Any], match: str
) -> None:
    error = refusal(pipeline, **body)
    assert match in error["message"]
    assert "\n" not in error["message"]
    assert error["param"]
    complete(pipeline, max_tokens=2)


# ---- lost devices and teams ----------------------------------------------------------------------

LONG: tuple[dict[str, Any], ...] = (
    {"guided_regex": "[a-z ]{300}", "temperature": 1, "seed": 8},
    {
        "json_schema": {
            "type": "array",
            "items": {"type": "integer", "minimum": 100, "maximum": 999},
            "minItems": 70,
            "maxItems": 70,
        },
        "temperature": 0.9,
        "seed": 9,
        "frequency_penalty": 0.3,
        "logit_bias": {"50": 1.5},
    },
)


def test_answers_in_a_format_go_on_equally_where_devices_are_lost(
    tmp_path: Path, model: Path
) -> None:
    cluster = Cluster(tmp_path)
    try:
        cluster.start_coordinator()
        for name in NAMES:
            cluster.start_agent(name)
        cluster.wait_for_agents(*NAMES)
        cluster.load(model, *EXACT, *PINS)

        def ask(body: dict[str, Any], begun: threading.Event) -> list[int]:
            request = {"prompt": PROMPT, "max_tokens": 700, **body}
            return streamed_tokens(cluster, request, begun, 20)

        undisturbed = [ask(body, threading.Event()) for body in LONG]
        events = [threading.Event() for _ in LONG]
        with ThreadPoolExecutor(len(LONG)) as pool:
            asked = [
                pool.submit(ask, body, event) for body, event in zip(LONG, events, strict=True)
            ]
            assert all(event.wait(60) for event in events)
            cluster.kill("pi-3")
            cluster.processes["pi-3"].wait()
            assert [future.result(90) for future in asked] == undisturbed
        (choice,) = complete(cluster, max_tokens=700, **LONG[0])["choices"]
        assert re.fullmatch("[a-z ]{300}", choice["text"])
    finally:
        cluster.stop()


def test_a_team_draws_and_tells_what_a_pipeline_does(
    pipeline: Cluster, model: Path, tmp_path: Path
) -> None:
    requests: list[dict[str, Any]] = [
        {"guided_regex": "[a-z]{20}", "temperature": 1, "seed": 2, "max_tokens": 30},
        {"logprobs": 3, "echo": True, "max_tokens": 6},
        {"min_p": 0.05, "temperature": 1.2, "seed": 4, "max_tokens": 20},
    ]
    expected = [complete(pipeline, **body)["choices"] for body in requests]
    stages: list[StagePlan] = [(("pi-1",), 2, ()), (("pi-2", "pi-3"), 3, (1, 1))]
    plan = write_plan(tmp_path, model, stages)
    pipeline.load(model, *EXACT, f"--plan={plan}")
    try:
        for body, choices in zip(requests, expected, strict=True):
            (choice,) = complete(pipeline, **body)["choices"]
            assert choice["text"] == choices[0]["text"]
            if choice["logprobs"]:
                values = choice["logprobs"]["token_logprobs"][1:]
                assert values == pytest.approx(
                    choices[0]["logprobs"]["token_logprobs"][1:], abs=1e-3
                )
    finally:
        pipeline.load(model, *EXACT, *PINS)
