"""Encoders over several agents, through HTTP and the command line, against the reference."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from backends.base import BackendUnavailable
from backends.registry import backend_class
from model.checkpoint import Checkpoint
from model.reference import ReferenceModel
from model.texts import Texts
from model.tokenizer import Tokenizer
from tests.encoder_cases import ENCODERS
from tests.system.cluster import Cluster

WORDS = [
    "The ship is in the river.",
    "a house",
    "Who was the red bird, and where is it? It was in the town.",
    "9",
]
QUESTION = "where is the ship?"
CONTEXT = "The red house is in the town. the ship is in the river, and the bird is in the house."


def expected(name: str, *pairs: tuple[str, ...]) -> list[np.ndarray]:
    """What the reference computes of each text alone."""
    directory = ENCODERS / name
    model = ReferenceModel.from_checkpoint(Checkpoint.open(directory))
    tokenizer = Tokenizer.load(directory)
    results = []
    for pair in pairs:
        text = tokenizer.encode_text(*pair)
        tokens = np.array(text.tokens)
        result = model.encode(tokens, Texts((len(tokens),), (text.second,)))
        results.append(result if len(result) > 1 else result[0])
    return results


def post(cluster: Cluster, path: str, body: dict[str, Any], status: int = 200) -> Any:
    answer = httpx.post(cluster.url + path, json=body, timeout=120)
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.fixture
def three(cluster: Cluster) -> Cluster:
    """Three exact agents, of two kinds."""
    try:
        backend_class("torch_cpu").probe()
        kinds = ["onnx_cpu", "torch_cpu", "onnx_cpu"]
    except BackendUnavailable:
        kinds = ["onnx_cpu"] * 3
    cluster.start_coordinator()
    where = f"--coordinator=127.0.0.1:{cluster.control_port}"
    names = [f"pi-{index}" for index in range(1, 4)]
    for name, kind in zip(names, kinds, strict=True):
        cluster.start_agent(name, where, "--memory=1G", "--exact", f"--backend={kind}")
    cluster.wait_for_agents(*names, timeout_s=180)
    return cluster


PINS = ("--pin=layers=0-0:pi-1", "--pin=layers=1-1:pi-2", "--pin=layers=2-2:pi-3")
EXACT = ("--bits=32", "--hop-bits=32", "--replace")


@pytest.mark.thorough
def test_each_kind_of_encoder_answers_over_three_agents(three: Cluster) -> None:
    vectors_of(three)
    classes_of(three)
    tokens_of(three)
    spans_of(three)
    commands_of(three)
    losses_of(three)


def vectors_of(three: Cluster) -> None:
    answer = three.load(ENCODERS / "minilm", *EXACT, *PINS)
    assert len(answer["plan"]["stages"]) == 3
    said = post(three, "/v1/embeddings", {"model": "minilm", "input": WORDS})
    wanted = expected("minilm", *((text,) for text in WORDS))
    found = [item["embedding"] for item in said["data"]]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert [item["index"] for item in said["data"]] == [0, 1, 2, 3]
    tokens = Tokenizer.load(ENCODERS / "minilm")
    count = sum(len(tokens.encode(text)) for text in WORDS)
    assert said["usage"] == {"prompt_tokens": count, "total_tokens": count}
    packed = post(
        three, "/v1/embeddings", {"input": tokens.encode(WORDS[0]), "encoding_format": "base64"}
    )
    values = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(values, wanted[0], atol=1e-4)
    refused(three)


def refused(three: Cluster) -> None:
    """What this model cannot do is refused by its name, with what to do."""
    long = "town " * 100
    for path, body, said in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "/v1/embed"),
        ("/v1/completions", {"prompt": "a"}, "minilm encodes texts and generates none"),
        ("/v1/completions", {"prompt": "a", "stream": True}, "load a model that generates"),
        ("/v1/classify", {"input": "a"}, "load a model that classifies"),
        ("/v1/answers", {"question": "a", "context": "b"}, "load a model for questions"),
        ("/v1/embeddings", {"input": long}, "102 tokens and the context 64"),
        ("/v1/embeddings", {"input": []}, "1 to 2048"),
        ("/v1/embeddings", {"input": [500]}, "outside the vocabulary"),
        ("/v1/embeddings", {"input": "a", "dimensions": 16}, "gives 32"),
        ("/v1/embeddings", {"input": "a", "wishes": 1}, "unknown field 'wishes'"),
        ("/v1/embeddings", {"input": "a", "prompt_name": "query"}, "no prompts"),
    ):
        answer = post(three, path, body, 400)
        assert said in answer["error"]["message"], answer
    cut = post(three, "/v1/embeddings", {"input": long, "truncate": True})
    assert cut["usage"]["prompt_tokens"] == 64


def classes_of(three: Cluster) -> None:
    three.load(ENCODERS / "bert-class", *EXACT, *PINS)
    pair = ["where is the ship", "in the river"]
    said = post(three, "/v1/classify", {"input": [*WORDS, pair]})
    wanted = expected("bert-class", *((text,) for text in WORDS), tuple(pair))
    for item, scores in zip(said["data"], wanted, strict=True):
        shares = np.exp(scores - scores.max())
        np.testing.assert_allclose(item["probs"], shares / shares.sum(), atol=1e-4)
        assert item["label"] == ("red", "green", "blue")[int(scores.argmax())]
        assert item["num_classes"] == 3
    refusal = post(three, "/v1/embeddings", {"input": "a"}, 400)
    assert "answers /v1/classify" in refusal["error"]["message"]


def tokens_of(three: Cluster) -> None:
    three.load(ENCODERS / "bert-tokens", *EXACT, *PINS)
    said = post(three, "/v1/classify", {"input": WORDS[:2]})
    for item, text, rows in zip(
        said["data"], WORDS[:2], expected("bert-tokens", *((w,) for w in WORDS[:2])), strict=True
    ):
        names = [("red", "green", "blue")[label] for label in rows[1:-1].argmax(axis=1)]
        runs = [name for at, name in enumerate(names) if not at or names[at - 1] != name]
        assert [entity["label"] for entity in item["entities"]] == runs
        assert item["entities"][0]["start"] == 0
        assert item["entities"][-1]["end"] == len(text)


def spans_of(three: Cluster) -> None:
    three.load(ENCODERS / "bert-span", *EXACT, *PINS)
    body = {"question": QUESTION, "context": CONTEXT, "top": 3}
    said = post(three, "/v1/answers", body)
    (rows,) = expected("bert-span", (QUESTION, CONTEXT))
    text = Tokenizer.load(ENCODERS / "bert-span").encode_text(QUESTION, CONTEXT)
    best = max(
        (
            (begin, end)
            for begin, part in enumerate(text.parts)
            for end in range(begin, min(begin + 30, len(text.parts)))
            if part == 1 == text.parts[end]
        ),
        key=lambda span: rows[span[0], 0] + rows[span[1], 1],
    )
    first = said["data"][0]
    assert first["start"] == text.offsets[best[0]][0]
    assert first["end"] == text.offsets[best[1]][1]
    assert first["answer"] == CONTEXT[first["start"] : first["end"]]
    assert len(said["data"]) == 3
    # A text that is longer than the context is read in windows, which overlap.
    long = post(three, "/v1/answers", body | {"context": f"{CONTEXT} " * 6})
    assert long["usage"]["prompt_tokens"] > 64
    assert long["data"][0]["score"] > 0


def commands_of(three: Cluster) -> None:
    run = three.run("run", "bert-span", CONTEXT, "--question", QUESTION)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 3
    for arguments, said in (
        (("run", "bert-span", CONTEXT), "ask one with --question"),
        (("run", "bert-span"), "a chat is held on a terminal"),
    ):
        run = three.run(*arguments)
        assert run.returncode == 2
        assert said in run.stderr


def losses_of(three: Cluster) -> None:
    """A lost device costs no result: what had none runs again on those that are left."""
    body = {"question": QUESTION, "context": CONTEXT}
    before = post(three, "/v1/answers", body)
    three.kill("pi-2")
    after = post(three, "/v1/answers", body)
    assert after["data"][0]["start"] == before["data"][0]["start"]
    assert after["data"][0]["score"] == pytest.approx(before["data"][0]["score"], abs=1e-4)


def test_three_backends_share_an_encoder(cluster: Cluster) -> None:
    kinds = {"cpu": "onnx_cpu", "gpu": "torch_cpu", "int8": "tflite_cpu"}
    for kind in kinds.values():
        try:
            backend_class(kind).probe()
        except BackendUnavailable as unavailable:
            pytest.skip(str(unavailable))
    cluster.start_coordinator()
    where = f"--coordinator=127.0.0.1:{cluster.control_port}"
    for name, kind in kinds.items():
        cluster.start_agent(name, where, "--memory=1G", f"--backend={kind}")
    cluster.wait_for_agents(*kinds, timeout_s=180)
    pins = "--pin=layers=0-0:cpu", "--pin=layers=1-1:gpu", "--pin=layers=2-2:int8"
    answer = cluster.load(ENCODERS / "minilm", *pins)
    assert {bits for stage in answer["plan"]["stages"] for bits in stage["bits"]} == {8}
    said = post(cluster, "/v1/embeddings", {"input": WORDS})
    wanted = np.array(expected("minilm", *((text,) for text in WORDS)))
    found = np.array([item["embedding"] for item in said["data"]])
    assert (found * wanted).sum(axis=1).min() > 0.97  # The cosine, because both are unit vectors.
