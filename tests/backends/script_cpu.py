"""A backend that says what the prompt tells it to, for tests of how answers are read.

A prompt that has ``[[say]]first[[then]]second[[end]]`` is answered by first, and in the assistant's
next turn by second. A prompt without a script is answered by NO_SCRIPT. The model's tokenizer must
be the one of ``tests.system.scripted``, and one device must run all of the model.

A prompt with ``[[hang]]PATH[[end]]`` hangs the first stage that finds a file at PATH. The file is
renamed to PATH.taken, and the stage goes on once that file is removed. A process with
SCRIPT_DELAY_S in its environment takes so many seconds for each pass.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from backends.base import Array, Artifacts, Backend, Capabilities, Stage, StageOptions, Tokens
from backends.checks import check_blocks, check_inputs, check_rows
from model.costs import kv_bytes
from model.quantize import BITS
from model.spec import ModelSpec

BOS, EOS = 256, 257
SAY, THEN, END = "[[say]]", "[[then]]", "[[end]]"
HANG = "[[hang]]"
DELAY_S = float(os.environ.get("SCRIPT_DELAY_S", "0"))
TURN = f"{chr(BOS)}assistant\n"
NO_SCRIPT = "I was told nothing."


def next_token(tokens: Sequence[int]) -> int:
    """Return the token that follows a prompt and the answer so far."""
    text = "".join(map(chr, tokens))
    prompt, _, answer = text.rpartition(TURN)
    begin = prompt.rfind(SAY)
    end = prompt.find(END, begin)
    steps = [NO_SCRIPT]
    if begin >= 0 and end >= 0:
        steps = prompt[begin + len(SAY) : end].split(THEN)
    step = steps[min(prompt.count(TURN, max(end, 0)), len(steps) - 1)]
    return ord(step[len(answer)]) if len(answer) < len(step) else EOS


def hang(tokens: Sequence[int]) -> None:
    """Wait if the prompt says so."""
    _, found, rest = "".join(map(chr, tokens)).rpartition(HANG)
    path = Path(rest.partition(END)[0])
    if found and path.exists():
        taken = path.rename(f"{path}.taken")
        while taken.exists():
            time.sleep(0.02)


class ScriptBackend(Backend):
    """Every width, and nothing computed."""

    @classmethod
    def probe(cls) -> Capabilities:
        return Capabilities("script_cpu", "1", dict.fromkeys(BITS, 32))

    def load(self, spec: ModelSpec, artifacts: Artifacts, options: StageOptions) -> Stage:
        return ScriptStage(spec, artifacts, options)


class ScriptStage(Stage):
    """The tokens of each slot, and nothing else."""

    def __init__(self, spec: ModelSpec, artifacts: Artifacts, options: StageOptions) -> None:
        blocks = [block for block, _ in artifacts]
        check_blocks(spec, blocks, options)
        self._spec, self._options = spec, options
        self._first, self._last = blocks[0], blocks[-1]
        self._tokens: list[list[int]] = [[] for _ in range(options.slots)]
        cache = sum(kv_bytes(spec, block, options.context_tokens) for block in blocks)
        self._memory_bytes = options.slots * cache + (1 << 20)

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = True
    ) -> Array:
        time.sleep(DELAY_S)
        check_inputs(inputs, self._spec, tokens=self._first == 0)
        check_rows(slot, position, len(inputs), self._options.slots, self._options.context_tokens)
        if self._last < self._spec.head_block:
            return np.zeros((len(inputs), self._spec.hidden), np.float32)
        if self._first == 0:
            self._tokens[slot][position:] = map(int, inputs)
            hang(self._tokens[slot])
        rows = np.zeros((int(logits), self._spec.vocab), np.float32)
        tokens = self._tokens[slot]
        for row in range(len(rows)):
            known = tokens[: len(tokens) - len(rows) + row + 1]
            rows[row, next_token(known)] = 30.0
        return rows

    def close(self) -> None:
        self._tokens = []
