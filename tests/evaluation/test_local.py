"""Answers of a whole model on this machine, and several requests at once."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from backends.base import StageOptions
from backends.registry import backend_class
from evaluation.flight import in_flight
from evaluation.local import greedy_answers, local_stage
from evaluation.tasks import answer_target
from model.checkpoint import Checkpoint
from model.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY_OPT = Path(__file__).parents[2] / "examples" / "tiny-opt" / "model"


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("fixture", ["llama", "opt-post"])
def test_answers_are_those_of_transformers(fixture: str, slots: int) -> None:
    """Beside others and alone, an answer is the golden continuation, up to where it ends."""
    checkpoint = Checkpoint.open(FIXTURES / fixture)
    golden = np.load(FIXTURES / fixture / "golden.npz")
    prompt, wanted = golden["prompt"].tolist(), golden["continuation"].tolist()[:40]
    prompts = {7: prompt, 2: prompt[:5], 3: prompt + wanted[:4], 9: [1]}
    formats = [None] * checkpoint.spec.block_count
    options = StageOptions(slots, 128, 1, exact=True)
    with local_stage(checkpoint, formats, backend_class("onnx_cpu")(), options) as stage:
        found = dict(greedy_answers(stage, slots, prompts, 20, [], lambda _: False))
        ended = dict(
            greedy_answers(
                stage, slots, prompts, 20, [wanted[6]], lambda tokens: tokens == found[2][:3]
            )
        )
    assert found.keys() == prompts.keys()
    assert found[7] == wanted[:20]
    assert found[3] == wanted[4:24]
    assert all(len(tokens) == 20 for tokens in found.values())
    first = wanted.index(wanted[6])
    assert ended[7] == wanted[:first]
    assert wanted[6] in found[2][:3] or ended[2] == found[2][:3]


def test_requests_at_once_are_as_many_as_asked_for() -> None:
    """Three wait for one another. A fourth would have to wait for one of them to end."""
    together = threading.Barrier(3)
    running: list[int] = []
    most = 0
    lock = threading.Lock()

    def work(item: int) -> int:
        nonlocal most
        with lock:
            running.append(item)
            most = max(most, len(running))
        together.wait(30)
        with lock:
            running.remove(item)
        return item * item

    assert dict(in_flight(work, range(6), 3)) == {item: item * item for item in range(6)}
    assert most == 3


def test_a_failure_ends_all_requests() -> None:
    def work(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    with pytest.raises(ValueError, match="two"):
        list(in_flight(work, range(5), 1))


def test_only_the_answer_is_expected() -> None:
    tokenizer = Tokenizer.load(TINY_OPT)
    prompt, answer = "The lamp is red. What colour is the lamp?", "red"
    target = answer_target(prompt, answer, tokenizer, chat=False)
    assert target is not None
    assert list(target.tokens) == tokenizer.encode(prompt) + tokenizer.encode(answer)
    assert target.tokens[target.first :] == tuple(tokenizer.encode(answer))
    chat = answer_target(prompt, answer, tokenizer, chat=True)
    assert chat == target  # This model's template renders the message as it is.
    assert answer_target(prompt, "", tokenizer, chat=False) is None


def test_tokens_that_join_prompt_and_answer_are_expected() -> None:
    """This tokenizer may join letters over the border. Then the joined token is scored."""
    tokenizer = Tokenizer.load(FIXTURES / "llama")
    target = answer_target("The lamp is", "red", tokenizer, chat=False)
    assert target is not None
    text = tokenizer.decode(target.tokens)
    assert text.endswith("The lamp is red")
    assert tokenizer.decode(target.tokens[target.first :]).strip().endswith("red")
