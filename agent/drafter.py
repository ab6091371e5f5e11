"""A small model that lies whole on the first stage's device, and guesses tokens for the ring.

It has the same vocabulary as the model, and draws from its own logits with the sequence's settings,
seed and positions. So it often draws the same token, also where tokens are drawn at random. The
last stage checks its guesses as any others (agent.drafts).

A slot of it has a KV cache of its own, and knows the tokens that it was fed. A guess feeds what
differs from the sequence now. So rejected guesses, cancelled sequences, kept prefixes and new
sequences need no word to it.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from statistics import median

import numpy as np

from agent.sampler import Sampler
from backends.base import Array, BackendError, Stage, Tokens
from wire import limits
from wire.messages import Sampling

FEED_ROWS = 32
"""The most rows that it is fed at once while the device waits. A token may have to wait for it."""

MEASURED = 9
"""The last passes whose times count."""


class Drafter:
    """A loaded draft model. One caller at a time."""

    def __init__(self, stage: Stage, vocab: int, *, slots: int, context_tokens: int) -> None:
        """Use ``stage``, which holds a whole model of ``vocab`` tokens, for so many slots."""
        self._stage = stage
        self._vocab = vocab
        self._fed = np.empty((slots, context_tokens), np.int64)
        """The tokens whose rows a slot has."""
        self._counts = [0] * slots
        self._steps_s: deque[float] = deque(maxlen=MEASURED)
        """The last passes of one row."""
        self._rows_s: deque[float] = deque(maxlen=MEASURED)
        """Seconds of a row in the last passes of many."""

    @property
    def memory_bytes(self) -> int:
        return self._stage.memory_bytes

    def close(self) -> None:
        """Free everything. Idempotent."""
        self._stage.close()

    def warm_up(self) -> None:
        """Run a few rows, to know what a guess costs before the first one. Raises BackendError."""
        row = np.zeros(1, np.int64)
        for _ in range(4):
            self._pass(0, 0, row)
        self._steps_s.popleft()  # The first pass may have read weights from the disk.
        self._counts[0] = 0

    def lag(self, slot: int, tokens: Tokens) -> int | None:
        """Return how many tokens are to be fed before a guess. None: it cannot follow them."""
        if len(tokens) >= self._fed.shape[1]:
            return None
        rest = tokens[self._kept(slot, tokens) :]
        return None if rest.max() >= self._vocab else len(rest)

    def seconds(self, guesses: int, lag: int) -> float:
        """Return how long so many guesses take, if ``lag`` tokens are to be fed before."""
        step_s = median(self._steps_s) if self._steps_s else 0.0
        row_s = median(self._rows_s) if self._rows_s else step_s
        return max(step_s, lag * row_s if lag > 1 else 0.0) + (guesses - 1) * step_s

    def feed(self, slot: int, tokens: Tokens, most: int = FEED_ROWS) -> None:
        """Feed up to ``most`` of the tokens that the slot lacks. Raises BackendError."""
        kept = self._kept(slot, tokens)
        self._pass(slot, kept, tokens[kept : kept + most])

    def guess(
        self, slot: int, tokens: Tokens, most: int, sampling: Sampling, vocab: int
    ) -> tuple[int, ...]:
        """Return up to ``most`` tokens that may follow ``tokens``. Raises BackendError.

        vocab: of the model that checks them. No guess is outside.
        """
        lag = self.lag(slot, tokens)
        if lag is None:
            return ()
        sampler = Sampler(_plain(sampling))
        self._stage.candidates = sampler.candidates
        while lag > limits.PREFILL_CHUNK_TOKENS:
            self.feed(slot, tokens, limits.PREFILL_CHUNK_TOKENS)
            lag -= limits.PREFILL_CHUNK_TOKENS
        at, rows = len(tokens) - lag, tokens[len(tokens) - lag :]
        guesses: list[int] = []
        most = min(most, self._fed.shape[1] - len(tokens))
        while len(guesses) < most:
            logits = self._pass(slot, at, rows)
            at += len(rows)
            token = sampler.sample(logits[0][: min(vocab, self._vocab)], at)
            guesses.append(token)
            if token in sampling.stop_tokens:
                break
            rows = np.array([token], np.int64)
        return tuple(guesses)

    def _kept(self, slot: int, tokens: Tokens) -> int:
        """Return how many leading tokens need not be fed. The last one is fed for its logits."""
        count = min(self._counts[slot], len(tokens) - 1)
        differs = np.flatnonzero(self._fed[slot, :count] != tokens[:count])
        return int(differs[0]) if len(differs) else count

    def _pass(self, slot: int, position: int, rows: Tokens) -> Array:
        """Run rows, and return the logits [1, vocab] of the last one."""
        self._counts[slot] = 0  # A failed pass may lose the slot's rows.
        began_s = time.perf_counter()
        logits = self._stage.forward(slot, position, rows, logits=1)
        took_s = time.perf_counter() - began_s
        if len(rows) == 1:
            self._steps_s.append(took_s)
        else:
            self._rows_s.append(took_s / len(rows))
        end = position + len(rows)
        self._fed[slot, position:end] = rows
        self._counts[slot] = end
        return logits


def _plain(sampling: Sampling) -> Sampling:
    """Return the settings without all that needs the whole answer or changes logits."""
    return replace(
        sampling,
        repetition_penalty=1.0,
        penalized=(),
        presence_penalty=0.0,
        frequency_penalty=0.0,
        logit_bias=(),
        top_logprobs=-1,
        prompt_logprobs=False,
        grammar=b"",
        answer=(),
    )


def require_whole(blocks: range, block_count: int, *, encodes: bool) -> None:
    """Raise BackendError unless these are all blocks of a model that generates."""
    if blocks != range(block_count) or encodes:
        raise BackendError("the coordinator sent a draft model that is none")
