"""The town model is what its card says: its data, its answers, and that widths matter to it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import Checkpoint
from model.quantize import Format, quantize
from model.reference import ReferenceModel
from model.spec import QUANTIZED_TENSORS
from model.tokenizer import Tokenizer
from tests.greedy import generate_greedy

HOME = Path(__file__).parents[2] / "examples" / "town"
MODEL = HOME / "model"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=HOME, check=False
    )


@cache
def dev() -> list[dict[str, str]]:
    return [json.loads(line) for line in (HOME / "dev.jsonl").read_text().splitlines()]


def share_right(bits: int, kind: str, count: int) -> float:
    """Share of the first ``count`` questions that the reference answers exactly."""
    checkpoint = Checkpoint.open(MODEL)
    blocks: list[dict[str, Any]] = [
        {
            name: quantize(tensor, Format.of(bits)) if name in QUANTIZED_TENSORS else tensor
            for name, tensor in checkpoint.block(block).items()
        }
        for block in range(checkpoint.spec.block_count)
    ]
    model, tokenizer = ReferenceModel(checkpoint.spec, blocks), Tokenizer.load(MODEL)
    (end,) = model.spec.eos_tokens
    right = 0
    for line in [line for line in dev() if line["kind"] == kind][:count]:
        tokens = generate_greedy(model, tokenizer.encode(line["prompt"]), 14).tokens
        if end in tokens:
            tokens = tokens[: tokens.index(end)]
        right += tokenizer.decode(tokens).strip() == line["answer"]
    return right / count


def test_the_dev_set_is_what_the_generator_writes() -> None:
    completed = run("generate.py", "--split", "dev", "--per-kind", "200")
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout == (HOME / "dev.jsonl").read_text()


def test_no_dev_passage_is_drawn_for_training() -> None:
    completed = run("generate.py", "--check", "dev.jsonl")
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout == "800 questions, 0 faults\n"


def test_a_training_passage_in_the_dev_set_is_a_fault(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.jsonl"
    train = run("generate.py", "--split", "train", "--per-kind", "2")
    wrong.write_text(train.stdout)
    completed = run("generate.py", "--check", str(wrong), "--train-passages", "10")
    assert completed.returncode == 1
    assert "the passage belongs to the training set" in completed.stderr


def test_every_answer_is_right() -> None:
    """By the sentences, and by the facts that the generator has about people."""
    completed = run(
        "-c", "import generate as g, json; print(json.dumps([p.number for p in g.PEOPLE]))"
    )
    numbers = set(json.loads(completed.stdout))
    for line in dev():
        prompt, answer = line["prompt"], line["answer"]
        if line["kind"] == "sum":
            sentence = next(part for part in prompt.split(". ") if " rose by " in part)
            first, second = (int(word) for word in sentence.rstrip(".").split() if word.isdigit())
            assert int(answer) == first + second
            assert 100 <= first < 1000
            assert int(answer) < 1000
        else:
            name = " ".join(answer.split()[1:3] if line["kind"] == "home" else answer.split()[:2])
            thing = " ".join(prompt.rstrip("?").split()[-2:])
            assert f"The {thing} is with {name}." in prompt
        if line["kind"] == "call":
            assert answer.split()[-1] in numbers


def test_tokens_are_words_and_digits() -> None:
    tokenizer = Tokenizer.load(MODEL)
    text = "The brass key is with Ada Berg. The meter read 347 and rose by 285."
    tokens = tokenizer.encode(text)
    assert len(tokens) == 8 + 12 + 1  # A full stop is a token, and each digit is one.
    assert tokenizer.decode(tokens).strip() == text.lower()


def test_reading_and_memory_work_at_16_bits() -> None:
    assert share_right(16, "read", 12) >= 0.8
    assert share_right(16, "call", 12) >= 0.5


def test_three_bits_cost_memory() -> None:
    assert share_right(3, "call", 12) < share_right(16, "call", 12)


def test_the_training_code_and_the_reference_are_the_same_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    program = (
        "import sys, json, torch, train, generate\n"
        "from model.safetensors import read_safetensors\n"
        "stored = read_safetensors(train.HERE / 'model' / 'model.safetensors')\n"
        "town = train.Town(len(generate.VOCABULARY), train.WIDTH, train.FFN, train.HEADS,"
        " train.KV_HEADS, train.LAYERS)\n"
        "town.load_state_dict({n: torch.from_numpy(stored.float32(n).copy())"
        " for n in stored.entries})\n"
        "row = train.Row(sys.argv[1], [generate.Asked('read', sys.argv[2], sys.argv[3])])\n"
        "packed = train.pack([row])\n"
        "with torch.no_grad():\n"
        "    hidden, _ = town(packed.ids, packed.positions, packed.mask)\n"
        "print(json.dumps([packed.ids[0].tolist(), town.logits(hidden)[0].tolist()]))\n"
    )
    passage, question = "the brass key is with ada berg .", "who has the brass key ?"
    completed = run("-c", program, passage, question, "ada berg")
    assert completed.returncode == 0, completed.stderr
    ids, expected = json.loads(completed.stdout)
    text = "The brass key is with Ada Berg. Who has the brass key? ada berg"
    assert Tokenizer.load(MODEL).encode(text) == ids[:-1]
    checkpoint = Checkpoint.open(MODEL)
    found = ReferenceModel.from_checkpoint(checkpoint).forward(ids)
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=2e-4)
