"""An answer as it grows, over all deployments of its model.

If a device is lost and the model is placed anew, the answer goes on behind the tokens that it has.
If a stage was damaged, it begins again. Its caller then has more tokens than the answer, until it
has come as far. Should it differ from these, it is withdrawn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from coordinator.errors import AnswerWithdrawn
from coordinator.loading.deployment import Deployment
from coordinator.serving import requests
from coordinator.serving.journal import Entry
from coordinator.serving.pieces import (
    Piece,
    StopFilter,
    Timing,
    piece_of,
    scored_piece,
    with_logprobs,
)
from model.spec import ModelSpec
from model.tokenizer import Tokenizer
from planning.errors import RequestInvalid
from wire import limits
from wire.messages import PromptScored, Sampling, TokenSampled

Told = TokenSampled | PromptScored
"""A message of the last stage about a sequence."""


@dataclass(frozen=True, slots=True)
class Shortcuts:
    """Ways to an answer that change its time only.

    cache_prompt: the prompt may begin with rows that a slot has kept. Their last bits depend on the
        chunks in which they were computed.
    drafts: the most tokens that the first stage may guess ahead. 0: none.
    draft_model: a draft model may guess them, where one is loaded.
    """

    cache_prompt: bool = True
    drafts: int = limits.DRAFT_TOKENS
    draft_model: bool = True

    def within(self, allowed: Shortcuts) -> Shortcuts:
        """Return those that are allowed, too."""
        return Shortcuts(
            self.cache_prompt and allowed.cache_prompt,
            min(self.drafts, allowed.drafts),
            self.draft_model and allowed.draft_model,
        )


ALL_SHORTCUTS = Shortcuts()


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to the gateway.

    stop: the strings that end the answer.
    withdrawable: the caller accepts pieces that withdraw all earlier ones.
    markers: the special tokens whose texts are shown.
    shortcuts: those that the request may take.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    stop: tuple[str, ...] = ()
    withdrawable: bool = False
    markers: Collection[str] = ()
    shortcuts: Shortcuts = ALL_SHORTCUTS


class Answer:
    """The tokens of an answer so far."""

    def __init__(self, asked: Asked, deployment: Deployment, timing: Timing, entry: Entry) -> None:
        """Begin with the tokens of ``entry``, and write later ones into it.

        Raises RequestInvalid if the context has no room for an answer.
        """
        room = room_for_answer(len(asked.prompt), deployment.context_tokens, deployment.spec)
        self._asked = asked
        self._limit = min(asked.sampling.max_tokens, room)
        self._vocab = deployment.spec.vocab
        self._timing = timing
        self._entry = entry
        self._request = requests.current()
        self._decoder = deployment.tokenizer.stream(asked.markers)
        self._text = StopFilter(asked.stop)
        usable = all(0 <= token < self._vocab for token in entry.tokens)
        self._tokens = list(entry.tokens[: self._limit - 1]) if usable else []
        self._given = list(self._tokens)
        """The tokens that the caller has. There are fewer in ``_tokens`` after a new beginning."""
        self._scores: list[bytes] = []
        """The log-probabilities of the prompt's tokens but the first."""
        self._lost_at, self._lost_times = -1, 0
        """The number of tokens when rows were lost last, and how often they were lost there."""
        timing.prompt_tokens = len(asked.prompt)

    def kept(self) -> Iterator[Piece]:
        """Yield the pieces of the tokens with which the answer begins."""
        for token in self._given:
            yield piece_of(TokenSampled(0, 0, 0, token, ""), self._decoder, self._text, Timing())
            self._request.answers(1)

    @property
    def sequence(self) -> tuple[int, ...]:
        """The prompt and the answer so far."""
        return (*self._asked.prompt, *self._tokens)

    def rest(self) -> Sampling:
        """How the rest of the answer is drawn."""
        sampling = self._asked.sampling
        is_scored = len(self._scores) == len(self._asked.prompt) - 1
        if sampling.prompt_logprobs and not is_scored:
            self._scores.clear()
        looks_back = sampling.grammar or sampling.presence_penalty or sampling.frequency_penalty
        return replace(
            sampling,
            max_tokens=self._limit - len(self._tokens),
            answer=tuple(self._tokens) if looks_back else (),
            prompt_logprobs=sampling.prompt_logprobs and not is_scored,
        )

    def begin_again(self, tokenizer: Tokenizer) -> Piece | None:
        """Forget all tokens. Return the piece that withdraws those of the caller, if any can be."""
        self._tokens.clear()
        if not (self._given and self._asked.withdrawable):
            return None
        self._given.clear()
        self._decoder = tokenizer.stream(self._asked.markers)
        self._text = StopFilter(self._asked.stop)
        return Piece("", (), "", withdraws=True)

    def take(self, event: Told) -> Piece | None:
        """Return the piece of what the last stage tells. None: it adds nothing for the caller.

        Raises AnswerWithdrawn if the token is not the one that the caller has.
        """
        if isinstance(event, PromptScored):
            return self._take_score(event)
        at = len(self._tokens)
        if at < len(self._given):
            if event.finish or event.token != self._given[at]:
                raise AnswerWithdrawn
            self._tokens.append(event.token)
            self._entry.add((event.token,))
            return None
        piece = piece_of(event, self._decoder, self._text, self._timing)
        if event.logprobs and piece.tokens:
            piece = with_logprobs(piece, event, self._asked.sampling, self._vocab)
        self._request.answers(len(piece.tokens))
        self._request.guesses(event.drafted, event.accepted, by_model=event.by_model)
        self._tokens += piece.tokens
        self._given += piece.tokens
        self._entry.add(piece.tokens)
        return piece

    def _take_score(self, event: PromptScored) -> Piece | None:
        self._scores.append(event.logprobs)
        prompt = self._asked.prompt
        if len(self._scores) < len(prompt) - 1:
            return None
        return scored_piece(prompt, self._scores, self._asked.sampling, self._vocab)

    def lose_rows(self) -> int:
        """Return how often rows were lost behind the last token, with this time."""
        at = len(self._tokens)
        self._lost_times = self._lost_times + 1 if self._lost_at == at else 1
        self._lost_at = at
        return self._lost_times


def room_for_answer(
    prompt_tokens: int, context_tokens: int, spec: ModelSpec, *, at_least: bool = False
) -> int:
    """The number of tokens that may follow a prompt. Raises RequestInvalid if there is no room.

    at_least: the prompt is not tokenized yet, and may have more than ``prompt_tokens``.
    """
    if not prompt_tokens:
        raise RequestInvalid("the prompt is empty", "prompt")
    if prompt_tokens >= context_tokens:
        larger = context_tokens < spec.max_context
        has = f"has {'at least ' * at_least}{prompt_tokens} tokens"
        raise RequestInvalid(
            f"the prompt {has} and the context {context_tokens}: shorten it"
            + (", or load the model with a larger --context" if larger else ""),
            "prompt",
            "context_length_exceeded",
        )
    return context_tokens - prompt_tokens
