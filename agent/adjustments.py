"""Changes of the model's logits that a request asks for, before a token is drawn.

In this order: the bias of named tokens, the penalty of repetition, those of frequency and presence,
and the tokens that a grammar forbids.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from backends.base import BackendError
from model.grammar_process import GrammarFailed, GrammarProcessLost
from wire.messages import Sampling

Logits = npt.NDArray[np.float32]


class Matcher(Protocol):
    """Follows an answer through a grammar. model.grammar_process has the one in use."""

    @property
    def is_ready(self) -> bool:
        """Whether ``allowed`` would not wait."""
        ...

    def allowed(self) -> bytes:
        """Return a bit for each token that may come next, the lowest id in the lowest bit.

        Raises GrammarFailed.
        """
        ...

    def accept(self, token: int) -> None:
        """Go on behind ``token``, which was allowed and is no stop token."""
        ...


class FormatFailed(BackendError):
    """The answer cannot be kept to the format of its request. No device is at fault."""


class Adjustments:
    """The changes of one sequence. They depend on its earlier tokens."""

    def __init__(self, sampling: Sampling, matcher: Matcher | None) -> None:
        self._sampling = sampling
        self._matcher = matcher
        self._biased = np.array([token for token, _ in sampling.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in sampling.logit_bias], np.float32)
        self._before = np.unique(np.array(sampling.penalized, np.int64))
        """The tokens of the prompt and of the answer, each once, if they are penalized."""
        self._answer, self._times = np.unique(
            np.array(sampling.answer, np.int64), return_counts=True
        )
        """The different tokens of the answer, and how often each was drawn."""
        self._stop_tokens = np.array(sampling.stop_tokens, np.int64)

    @staticmethod
    def of(sampling: Sampling, matcher: Matcher | None) -> Adjustments | None:
        """Return the changes that a request asks for, or None if it asks for none."""
        if (
            matcher is None
            and not sampling.logit_bias
            and sampling.repetition_penalty == 1
            and not sampling.frequency_penalty
            and not sampling.presence_penalty
        ):
            return None
        return Adjustments(sampling, matcher)

    @property
    def waits(self) -> bool:
        """Whether ``apply`` would wait for the process that follows the grammar."""
        return self._matcher is not None and not self._matcher.is_ready

    def apply(self, logits: Logits) -> Logits:
        """Return the changed logits [vocab] for the next token. Raises FormatFailed, BackendError.

        What becomes infinite or no number is left so, for the sampler to find.
        """
        changed: Logits = logits.copy()
        with np.errstate(over="ignore", invalid="ignore"):
            self._penalize(changed)
        if self._matcher is not None:
            changed[~self._allowed(self._matcher, len(changed))] = -np.inf
        return changed

    def _penalize(self, changed: Logits) -> None:
        sampling = self._sampling
        changed[self._biased] += self._bias
        if sampling.repetition_penalty != 1:
            penalty = np.float32(sampling.repetition_penalty)
            values = changed[self._before]
            changed[self._before] = np.where(values < 0, values * penalty, values / penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            weighed = sampling.frequency_penalty * self._times + sampling.presence_penalty
            changed[self._answer] -= weighed.astype(np.float32)

    def note(self, token: int) -> None:
        """Go on behind a drawn token."""
        sampling = self._sampling
        if sampling.repetition_penalty != 1 and token not in self._before:
            self._before = np.append(self._before, token)
        if sampling.frequency_penalty or sampling.presence_penalty:
            (found,) = np.nonzero(self._answer == token)
            if len(found):
                self._times[found] += 1
            else:
                self._answer = np.append(self._answer, token)
                self._times = np.append(self._times, 1)
        if self._matcher is not None and token not in sampling.stop_tokens:
            self._matcher.accept(token)

    def _allowed(self, matcher: Matcher, vocab: int) -> npt.NDArray[np.bool_]:
        """Return whether each token may come next. All stop tokens may where one of them may."""
        try:
            bits = np.frombuffer(matcher.allowed(), np.uint8)
        except GrammarProcessLost as error:
            raise BackendError(f"cannot follow the answer's format: {error}") from error
        except GrammarFailed as error:
            raise FormatFailed(f"the answer's format cannot be kept: {error}") from error
        known = np.unpackbits(bits, bitorder="little", count=vocab).astype(np.bool_)
        stops = self._stop_tokens[self._stop_tokens < vocab]
        known[stops] = known[stops].any()
        if not known.any():
            raise FormatFailed("the answer's format allows no token here")
        return known
