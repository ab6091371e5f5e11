"""The requests in flight, and the last ones that ended: who asks, and how far each answer is.

The HTTP server opens a request and closes it. In between, each part of the coordinator that works
for it finds it by ``current``, however deep it is called. So the gateway can count tokens without
knowing HTTP.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

from coordinator.serving.urgency import Urgency
from coordinator.watching import Signal

MOST_ENDED = 256
"""The ended requests that are remembered."""

MOST_SEQUENCES = 64
"""The last sequences of a request that are remembered. Each recovery adds one."""

RequestState = Literal["waiting", "prompt", "answering", "ended"]


@dataclass(slots=True, eq=False)
class InFlight:
    """One HTTP request for answers. All seconds are of the monotonic clock, but ``time_s``.

    A request may ask for several answers. Their tokens are added up, and the state is that of the
    answer that is furthest.
    """

    id: str
    """As in the header x-request-id. It is the client's if that sent one."""
    path: str = ""
    client: str = ""
    """The address of the client, or of the proxy before it."""
    key: str = ""
    """The name of the API key; empty without one."""
    model: str = ""
    """Empty until the request has reached a model."""
    state: RequestState = "waiting"
    arrived_s: float = field(default_factory=time.monotonic)
    time_s: float = field(default_factory=time.time)
    """When it arrived, in seconds since 1970."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """The prompt tokens that a slot still had from before."""
    answer_tokens: int = 0
    drafted_tokens: int = 0
    """Tokens that were guessed, to be checked together."""
    accepted_tokens: int = 0
    """Guessed tokens that were right."""
    model_drafted_tokens: int = 0
    model_accepted_tokens: int = 0
    """The share of both that a draft model guessed. The text before gave the others."""
    started_s: float | None = None
    """When the first of its prompts got a slot."""
    first_s: float | None = None
    """When its first token came."""
    last_s: float | None = None
    """When its last token came so far."""
    ended_s: float | None = None
    status: int = 0
    """The HTTP status. 0 before the answer begins, 499 if the client went away before."""
    error: str = ""
    """The reason if it failed, also in the middle of a stream."""
    sequences: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=MOST_SEQUENCES))
    """The epoch and number of each sequence on the stages, for ``shoal trace``."""
    urgency: Urgency = Urgency.NORMAL
    most_urgent: Urgency | None = None
    """The class of its key, or None without one. Its own class is no more urgent."""
    on_change: Callable[[], None] = lambda: None

    def asks(self, model: str, prompt_tokens: int) -> None:
        """Note a prompt that now waits for a slot."""
        self.model = model
        self.prompt_tokens += prompt_tokens
        self.on_change()

    def starts(self, epoch: int, sequence: int) -> None:
        """Note that a prompt has a slot, and runs as this sequence."""
        self.sequences.append((epoch, sequence))
        if self.started_s is None:
            self.started_s = time.monotonic()
        if self.state == "waiting":
            self.state = "prompt"
            self.on_change()

    def answers(self, tokens: int) -> None:
        """Count tokens of an answer. Called for each step, so it does no more."""
        self.answer_tokens += tokens
        self.last_s = time.monotonic()
        if self.first_s is None:
            self.first_s = self.last_s
            self.state = "answering"
            self.on_change()

    def guesses(self, drafted: int, accepted: int, *, by_model: bool) -> None:
        """Count the guesses of a pass. Called for each step, so it does no more."""
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted
        if by_model:
            self.model_drafted_tokens += drafted
            self.model_accepted_tokens += accepted

    @property
    def seed(self) -> int:
        """The seed of its draws if it says none.

        The same id gives the same draws. So a client whose answer was cut off asks again with its
        id, and gets the answer from the start.
        """
        if not self.id:
            return secrets.randbits(32)
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:4], "big")

    @property
    def doing(self) -> str:
        """Say what the request waits for. The text stays the same while that does."""
        if self.state == "prompt":
            return f"reading the prompt of {self.prompt_tokens} tokens"
        if self.state == "answering":
            return "the next token is being computed"
        return f"{self.model} has no free slot: waiting in line" if self.model else "waiting"

    @property
    def token_s(self) -> float | None:
        """Mean seconds between two tokens so far. None with fewer than two."""
        if self.answer_tokens < 2 or self.first_s is None or self.last_s is None:
            return None
        return (self.last_s - self.first_s) / (self.answer_tokens - 1)

    def to_dict(self) -> dict[str, Any]:
        """Describe it as JSON. Times are seconds since it arrived, or None."""

        def since(time_s: float | None) -> float | None:
            return None if time_s is None else round(time_s - self.arrived_s, 6)

        return {
            "id": self.id,
            "path": self.path,
            "client": self.client,
            "key": self.key,
            "model": self.model,
            "class": self.urgency.name.lower(),
            "state": self.state,
            "time_s": self.time_s,
            "age_s": since(self.ended_s or time.monotonic()),
            "started_s": since(self.started_s),
            "first_token_s": since(self.first_s),
            "token_s": self.token_s,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "answer_tokens": self.answer_tokens,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "model_drafted_tokens": self.model_drafted_tokens,
            "model_accepted_tokens": self.model_accepted_tokens,
            "status": self.status,
            "error": self.error,
        }


_current: ContextVar[InFlight | None] = ContextVar("request", default=None)


def current() -> InFlight:
    """Return the request that this task works for. Without one, a new one that nobody watches."""
    return _current.get() or InFlight("")


class Requests:
    """All requests in flight, and the last MOST_ENDED that ended.

    ``changed`` fires when a request arrives, changes its state or ends. It does not fire for each
    token.
    """

    def __init__(self) -> None:
        self._open: dict[int, InFlight] = {}
        self._ended: deque[InFlight] = deque(maxlen=MOST_ENDED)
        self._on_end: list[Callable[[InFlight], None]] = []
        self.changed = Signal()

    def subscribe(self, on_end: Callable[[InFlight], None]) -> None:
        """Call ``on_end`` for each request that ends. It must not wait."""
        self._on_end.append(on_end)

    @contextlib.contextmanager
    def serve(self, request: InFlight) -> Iterator[InFlight]:
        """Make ``request`` the current one of this task, and of those that it starts."""
        request.on_change = self.changed.fire
        self._open[id(request)] = request  # A client may use one request id twice.
        self.changed.fire()
        token = _current.set(request)
        try:
            yield request
        finally:
            _current.reset(token)
            del self._open[id(request)]
            request.state, request.ended_s = "ended", time.monotonic()
            self._ended.append(request)
            for on_end in self._on_end:
                on_end(request)
            self.changed.fire()

    @property
    def in_flight(self) -> tuple[InFlight, ...]:
        """The requests that have not ended, oldest first."""
        return tuple(self._open.values())

    @property
    def ended(self) -> tuple[InFlight, ...]:
        """The last requests that ended, newest first."""
        return tuple(reversed(self._ended))

    def find(self, request_id: str) -> InFlight | None:
        """The newest request with this id that is remembered."""
        known = (*reversed(self._open.values()), *self.ended)
        return next((request for request in known if request.id == request_id), None)
