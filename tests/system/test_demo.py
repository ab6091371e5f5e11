"""`shoal demo` against transformers' tokens, and the reference with the same weights."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.quantize import Format
from model.reference import ReferenceModel
from model.tokenizer import Tokenizer
from tests.greedy import generate_greedy
from tests.system.cluster import COMMAND, FIXTURES, ROOT, TINY_OPT, demo_processes, last_json, shoal

FAMILIES = ("opt-pre", "opt-post", "llama", "mistral", "qwen2", "qwen3")
TOKENS = 64

EXACT_HOPS = "--hop-bits=32"
"""A hop at 16 bits rounds, which is not what is compared here."""

TIE = 1e-3
"""Two logits closer than this may change places: fp32 sums in another order differ by about 1e-5
of logits of order 1, and int8 or 4-bit codes do not add to that, being exact in both."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Lets the demos of this file measure each model once."""
    return f"--measurements-dir={tmp_path_factory.mktemp('measured')}"


def demo(model: Path, prompt: str, *options: str) -> Any:
    return last_json(shoal("demo", "--json", f"--model={model}", f"--prompt={prompt}", *options))


@pytest.mark.parametrize("agents", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_at_32_bits_are_those_of_transformers(family: str, agents: int, kept: str) -> None:
    model = FIXTURES / family
    golden = np.load(model / "golden.npz")
    prompt = Tokenizer.load(model).decode(golden["prompt"].tolist())
    answer = demo(
        model, prompt, "--bits=32", EXACT_HOPS, f"--agents={agents}", f"--max-tokens={TOKENS}", kept
    )
    assert answer["prompt_tokens"] == golden["prompt"].tolist()
    assert answer["tokens"] == golden["continuation"][:TOKENS].tolist()
    assert len(answer["plan"]["stages"]) == agents
    assert {stage["hop_bits"] for stage in answer["plan"]["stages"][:-1]} <= {32}
    assert {block["bits"] for block in answer["plan"]["blocks"]} == {32}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_tokens_are_those_of_the_reference(
    family: str, bits: int, tmp_path: Path, kept: str
) -> None:
    model = FIXTURES / family
    prompt = "The quick brown fox"
    answer = demo(
        model,
        prompt,
        "--exact",
        f"--bits={bits}",
        EXACT_HOPS,
        "--max-weight-error=none",
        f"--max-tokens={TOKENS}",
        kept,
    )
    assert len(answer["plan"]["stages"]) == 3
    checkpoint = Checkpoint.open(model)
    blocks = [
        (block, write_artifact(tmp_path, block, checkpoint.block(block), Format.of(bits)).path)
        for block in range(checkpoint.spec.block_count)
    ]
    reference = ReferenceModel.from_artifacts(checkpoint.spec, blocks)
    expected = generate_greedy(reference, answer["prompt_tokens"], TOKENS)
    for index, token in enumerate(answer["tokens"]):
        if token != expected.tokens[index]:
            # After a tie the continuations may differ; before one they must not.
            assert expected.margins[index] < TIE
            return
    assert answer["tokens"]


def test_the_demo_answers_rightly_the_same_split_and_unsplit(kept: str) -> None:
    answers = [
        last_json(shoal("demo", "--json", "--bits=16", EXACT_HOPS, f"--agents={agents}", kept))
        for agents in (1, 2, 3)
    ]
    assert [len(answer["plan"]["stages"]) for answer in answers] == [1, 2, 3]
    assert {tuple(answer["tokens"]) for answer in answers} == {tuple(answers[0]["tokens"])}
    assert "attic" in answers[0]["text"]
    # The answer is as short as it is right; the speed is measured over more tokens than it has.
    assert all(len(answer["tokens"]) < 64 <= answer["speed_tokens"] for answer in answers)
    assert all(answer["decode_tokens_per_s"] > 0 for answer in answers)


def test_the_demo_shows_devices_plan_answer_and_speed() -> None:
    completed = shoal("demo", "--memory=4M,5M,20M")
    assert completed.returncode == 0, completed.stderr
    for shown in ("measured devices", "device-3", "predicted", "attic"):
        assert shown in completed.stdout
    rate = re.search(r"decode: [\d]+ tokens/s measured over (\d+) tokens", completed.stdout)
    assert rate is not None, completed.stdout
    assert int(rate[1]) >= 64
    assert "Traceback" not in completed.stderr


def on_a_terminal(*arguments: str) -> list[str]:
    """What a command that succeeds shows on standard error where that is a terminal."""
    ours, its = pty.openpty()
    command = [*COMMAND, *arguments]
    environment = os.environ | {"TERM": "dumb"}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=its, cwd=ROOT, env=environment
    ) as process:
        os.close(its)
        shown = b""
        with os.fdopen(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
            # Reading fails once the other end is closed.
            while piece := terminal.read(1 << 16):
                shown += piece
    assert process.returncode == 0
    return shown.decode().splitlines()


def test_a_terminal_is_told_what_the_demo_does_from_its_first_moment(kept: str) -> None:
    lines = on_a_terminal("demo", "--memory=4M,5M,20M", kept)
    steps = [line for line in lines if "demo: " in line]
    assert steps[0] == "demo: reading the model"
    assert steps[1] == "demo: starting a coordinator"
    assert steps[2] == (
        "demo: starting 3 agents with 4.0 MiB, 5.0 MiB, 20.0 MiB; they measure this machine"
    )
    last = steps.index("demo: 3 of 3 agents have joined")
    assert {"demo: measuring links", "demo: quantizing blocks"} <= set(steps[last + 1 : -1])
    assert steps[-1].startswith("demo: loaded in ")


def test_nothing_is_left_running(kept: str) -> None:
    completed = shoal("demo", "--json", f"--model={TINY_OPT}", "--max-tokens=2", kept)
    answer = last_json(completed)
    assert {"model", "devices", "plan", "prompt_tokens", "tokens", "text"} <= set(answer)
    assert {"prefill_tokens_per_s", "decode_tokens_per_s"} <= set(answer)
    assert {"block", "device", "bits"} <= set(answer["plan"]["blocks"][0])
    assert answer["plan"]["predicted_ms_per_token"] > 0
    assert not demo_processes()
