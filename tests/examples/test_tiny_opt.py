"""The embedded model is what its card says: its data, its answers, its architecture."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.checkpoint import Checkpoint
from model.quantize import Format, quantize
from model.reference import ReferenceModel
from model.spec import QUANTIZED_TENSORS
from model.template_values import WatchedMessage
from model.tokenizer import Tokenizer
from tests.greedy import generate_greedy

HOME = Path(__file__).parents[2] / "examples" / "tiny-opt"
MODEL = HOME / "model"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=HOME, check=False
    )


def questions(kind: str) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of a kind of the dev set."""
    for article in json.loads((HOME / "dev.json").read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                if qa["kind"] == kind:
                    yield f"{paragraph['context']} {qa['question']}", qa["answers"][0]["text"]


def reference(bits: int) -> ReferenceModel:
    checkpoint = Checkpoint.open(MODEL)
    blocks: list[dict[str, Any]] = [
        {
            name: quantize(tensor, Format.of(bits)) if name in QUANTIZED_TENSORS else tensor
            for name, tensor in checkpoint.block(block).items()
        }
        for block in range(checkpoint.spec.block_count)
    ]
    return ReferenceModel(checkpoint.spec, blocks)


def share_right(bits: int, kind: str, count: int) -> float:
    """Share of the first ``count`` questions that the reference answers exactly."""
    model, tokenizer = reference(bits), Tokenizer.load(MODEL)
    asked = list(questions(kind))[:count]
    right = sum(is_answered(model, tokenizer, prompt, answer) for prompt, answer in asked)
    return right / count


def is_answered(model: ReferenceModel, tokenizer: Tokenizer, prompt: str, answer: str) -> bool:
    """Whether the model's greedy answer to ``prompt`` is exactly ``answer``."""
    tokens = generate_greedy(model, tokenizer.encode(prompt), 8).tokens
    end = model.spec.eos_tokens[0]
    if end in tokens:
        tokens = tokens[: tokens.index(end)]
    return tokenizer.decode(tokens).strip().lower() == answer.lower()


def test_the_dev_set_is_what_the_generator_writes() -> None:
    completed = run("generate.py", "--split", "dev")
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout == (HOME / "dev.json").read_text()


def test_no_dev_passage_is_drawn_for_training() -> None:
    completed = run("generate.py", "--check", "dev.json")
    assert completed.returncode == 0, completed.stderr
    assert ", 0 faults" in completed.stdout


def test_one_fact_questions_are_answered_at_16_bits() -> None:
    assert share_right(16, "one-fact", 20) >= 0.9


def test_a_second_question_about_a_passage_is_answered() -> None:
    """The chat template reads every message of the chat and leaves none out."""
    model, tokenizer = reference(16), Tokenizer.load(MODEL)
    passages = json.loads((HOME / "dev.json").read_text())["data"][0]["paragraphs"][:10]
    right = 0
    for passage in passages:
        first, second = passage["qas"][:2]
        said = (
            ("user", f"{passage['context']} {first['question']}"),
            ("assistant", first["answers"][0]["text"]),
            ("user", second["question"]),
        )
        chat = [WatchedMessage({"role": role, "content": text}) for role, text in said]
        prompt = tokenizer.apply_chat_template(chat)
        right += is_answered(model, tokenizer, prompt, second["answers"][0]["text"])
    assert right >= 9


def test_two_bits_cost_quality() -> None:
    assert share_right(2, "count", 20) < share_right(16, "count", 20)


def test_the_training_code_and_the_reference_are_the_same_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    monkeypatch.syspath_prepend(str(HOME))
    import evaluate  # type: ignore[import-not-found] # beside it

    tokens = Tokenizer.load(MODEL).encode(next(questions("two-hop"))[0])
    with torch.no_grad():
        model = evaluate.load_model(MODEL, Format.of(8))
        expected = evaluate.forward(model, torch.tensor([tokens]))[0].numpy()
    np.testing.assert_allclose(reference(8).forward(tokens), expected, atol=2e-4)
