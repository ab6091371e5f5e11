"""The pieces that an answer is made of, with their tokens and times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.tokenizer import StreamDecoder
from wire.logprobs import TokenLogprobs, decode_logprobs
from wire.messages import FinishReason, Sampling, TokenSampled


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of an answer that one step adds. ``tokens`` and ``text`` may be empty."""

    text: str
    tokens: tuple[int, ...]
    finish: FinishReason
    notice: str = ""
    """The reason of a pause. Such a piece has nothing else."""
    withdraws: bool = False
    """Whether all earlier pieces are wrong, and the answer begins again."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """The log-probabilities of each of the tokens, if they are asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """The log-probabilities of the prompt's tokens but the first. Such a piece has nothing else."""
    stop: str = ""
    """The stop string that has ended the answer; empty if none has."""


@dataclass(slots=True)
class Timing:
    """When an answer began at the gateway (by a monotonic clock), and what its tokens took.

    The last stage times the tokens. Where the gateway is held up, they arrive there all at once.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Leading tokens of the prompt that did not run, because their rows were kept."""
    started_s: float = 0.0
    first_s: float | None = None
    decoded: int = 0
    """Tokens that followed another one."""
    decoding_us: int = 0
    """The time of these tokens."""
    drafted_tokens: int = 0
    """Tokens that the first stage guessed ahead."""
    accepted_tokens: int = 0
    """Guesses that were right."""
    kept_tokens: int = 0
    """Tokens of the answer that an identical request had got before."""

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens that ran per second until the first token. None before that."""
        if self.first_s is None:
            return None
        return (self.prompt_tokens - self.cached_tokens) / (self.first_s - self.started_s)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens per second after the first one. None with fewer than two."""
        return 1e6 * self.decoded / self.decoding_us if self.decoded else None


class StopFilter:
    """Ends text at the first stop string. It holds text back that may begin one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str]:
        """Return the text that is safe to show, and the stop string that was met, or ""."""
        self._held += text
        found = [(at, len(stop)) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            at, chars = min(found)
            shown, stop, self._held = self._held[:at], self._held[at : at + chars], ""
            return shown, stop
        keep = max((self._overlap(stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, ""

    def rest(self) -> str:
        """The held text, once no more text comes."""
        rest, self._held = self._held, ""
        return rest

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins ``stop``."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)


def piece_of(
    event: TokenSampled, decoder: StreamDecoder, text: StopFilter, timing: Timing
) -> Piece:
    timing.first_s = timing.first_s or time.monotonic()
    if event.after_us > 0:  # After a pause, the first token of the new stages has none.
        timing.decoded += 1
        timing.decoding_us += event.after_us
    timing.drafted_tokens += event.drafted
    timing.accepted_tokens += event.accepted
    if event.finish == "stop":
        shown, stop = text.feed(decoder.finish())
        return Piece(shown + text.rest(), (), "stop", stop=stop)
    shown, stop = text.feed(decoder.push(event.token))
    if event.finish == "length" and not stop:
        more, stop = text.feed(decoder.finish())
        shown += more + text.rest()
    return Piece(shown, (event.token,), "stop" if stop else event.finish, stop=stop)


def with_logprobs(piece: Piece, event: TokenSampled, sampling: Sampling, vocab: int) -> Piece:
    """Return the piece of a token with its log-probabilities."""
    scores = decode_logprobs(
        event.logprobs, token=event.token, top=sampling.top_logprobs, vocab=vocab
    )
    return replace(piece, logprobs=(scores,))


def scored_piece(
    prompt: Sequence[int], scores: list[bytes], sampling: Sampling, vocab: int
) -> Piece:
    """The piece of all tokens of a prompt but the first."""
    top = max(sampling.top_logprobs, 0)
    told = tuple(
        decode_logprobs(score, token=token, top=top, vocab=vocab)
        for token, score in zip(prompt[1:], scores, strict=True)
    )
    return Piece("", (), "", prompt_logprobs=told)
