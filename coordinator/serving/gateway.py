"""Generates answers: a prompt goes to the first stage, tokens come back, text goes to the user.

The deployment's KV slots bound the sequences in flight. Later requests stand in line. The gateway
follows each sequence to its end, and then frees its slot on every stage. A sequence ends by the
model, a stop string, an error, or a user who goes away.

A slot keeps its rows when a sequence ends. A request gets the slot that keeps most of its prompt,
and only the rest of the prompt runs (coordinator.loading.slots).

The gateway keeps every token. If a device is lost and the model is placed anew, the prompt and the
answer so far run through the new stages, and the answer goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from coordinator.errors import (
    AgentDamaged,
    AgentFailed,
    AgentLied,
    AgentLost,
    AnswerWithdrawn,
    CoordinatorError,
    FormatFailed,
    RowsLost,
    Stalled,
)
from coordinator.loading.deployment import Deployment
from coordinator.loading.models import Models
from coordinator.loading.slots import Held
from coordinator.loading.state import EndAnswers, Lost
from coordinator.roster.measurements import together
from coordinator.roster.members import Member, Roster
from coordinator.serving import requests
from coordinator.serving.answer import ALL_SHORTCUTS, Answer, Asked, Shortcuts, Told
from coordinator.serving.journal import AnswerJournal, Entry
from coordinator.serving.kept_answers import KeptAnswers
from coordinator.serving.pieces import Piece, Timing
from coordinator.serving.urgency import Lanes, Urgency
from planning.prompt import CHUNK_TOKENS
from wire.errors import ProtocolError
from wire.logprobs import decode_logprobs
from wire.messages import (
    Message,
    PromptScored,
    ReleaseSequence,
    Sampling,
    SequenceFailed,
    StartSequence,
    TokenSampled,
)
from wire.patience import within

log = logging.getLogger(__name__)

STALL_S = 120.0
STALL_FACTOR = 20
"""The time limit for one token is STALL_S plus STALL_FACTOR times the prompt's predicted time.

Without a limit, requests in line could wait for ever."""


PASSED_TOKENS = 64
"""The rows of an answer are lost if each other answer got so many tokens since its last one.

To these come PASSED_PER_CHUNK tokens for each chunk of the prompts in flight."""

PASSED_PER_CHUNK = 4

SHARED_CHUNK_TOKENS = min(CHUNK_TOKENS)
"""The rows of a prompt's chunk beside other sequences, whose tokens wait for it at each stage.

They may be of other models on the same devices.
"""


class _Paused(CoordinatorError):
    """A bulk request makes way for a real-time one."""


class _PrefixLost(CoordinatorError):
    """A stage lacks the kept rows that a sequence was to begin with."""


@dataclass(slots=True)
class _Flight:
    """A sequence in flight. It checks each token that the last stage sends."""

    deployment: Deployment
    sampling: Sampling
    prompt: tuple[int, ...]
    held: Held
    events: asyncio.Queue[Told | CoordinatorError] = field(default_factory=asyncio.Queue)
    tokens: int = 0
    scored: int = 1
    """The next token of the prompt whose log-probability comes. The first one has none."""
    is_bulk: bool = False
    ended: bool = False
    """Later messages of the sequence are dropped."""
    told_at: int = 0
    """The tokens of its deployment that the gateway had been told of at this one's last token."""

    @property
    def waits(self) -> bool:
        """Whether a token of it is to come."""
        return not self.ended and self.events.empty()

    def take(self, message: Told) -> str | None:
        """Queue the next token. Returns what is wrong with it, or None."""
        wrong = self._wrong_score(message) or (
            None if isinstance(message, PromptScored) else self._wrong_token(message)
        )
        if wrong is None:
            self.events.put_nowait(message)
        return wrong

    def _wrong_score(self, message: Told) -> str | None:
        """Check what a message says of log-probabilities."""
        sampling, prompt = self.sampling, self.prompt
        top = max(sampling.top_logprobs, 0)
        left = sampling.prompt_logprobs and self.scored < len(prompt)
        try:
            if isinstance(message, PromptScored):
                if not left or message.position != self.scored:
                    return f"sent the score of prompt token {message.position}"
                self.scored += 1
                told = prompt[message.position]
            elif left:
                return f"sent token {message.index} before the prompt's scores"
            elif sampling.top_logprobs < 0:
                return "sent scores that were not asked for" if message.logprobs else None
            else:
                told = message.token
            decode_logprobs(message.logprobs, token=told, top=top, vocab=self.deployment.spec.vocab)
        except ProtocolError as error:
            return f"sent {error}"
        return None

    def _wrong_token(self, message: TokenSampled) -> str | None:
        limit = self.sampling.max_tokens
        if message.index != self.tokens or self.tokens >= limit:
            return f"sent token number {message.index}, where {self.tokens} of {limit} had come"
        if not 0 <= message.token < self.deployment.spec.vocab:
            return f"sent token {message.token}, of a vocabulary of {self.deployment.spec.vocab}"
        self.tokens += 1
        stops, is_last = message.token in self.sampling.stop_tokens, self.tokens == limit
        if message.finish != ("stop" if stops else "length" if is_last else ""):
            return f"sent token {message.token}, {self.tokens} of {limit}, as {message.finish!r}"
        self.ended = bool(message.finish)
        self.held.sampled(message.token)
        return None

    async def next(self, prompt_tokens: int) -> tuple[list[Told], CoordinatorError | None]:
        """Wait for the next token, and return it, or an error. If it has ended, return the rest.

        prompt_tokens: those that run.
        """
        predicted_s = prompt_tokens * self.deployment.plan.prefill_s_per_token
        limit_s = STALL_S + STALL_FACTOR * predicted_s
        try:
            event = await within(self.events.get(), limit_s)
        except asyncio.TimeoutError:
            return [], Stalled(
                f"no token came for {limit_s:.0f} s although all devices answer: "
                "see the agents' logs, then run `shoal load` again"
            )
        part: list[Told] = []
        while not isinstance(event, CoordinatorError):
            part.append(event)
            if not self.ended or self.events.empty():
                return part, None
            event = self.events.get_nowait()
        return part, event

    def fail(self, name: str, message: SequenceFailed) -> None:
        """End by what a stage of the device ``name`` says."""
        self.ended = True
        if message.prefix_lost and self.held.cached and not self.tokens:
            self.events.put_nowait(_PrefixLost(f"{name}: {message.reason}"))
        elif message.format_failed and self.sampling.grammar:
            self.events.put_nowait(FormatFailed(message.reason))
        else:
            self.events.put_nowait(AgentFailed(name, message.reason))


class Gateway:
    """Runs prompts on a deployment, one sequence per KV slot."""

    def __init__(
        self,
        roster: Roster,
        models: Models,
        shortcuts: Shortcuts = ALL_SHORTCUTS,
        kept: KeptAnswers | None = None,
        journal: AnswerJournal | None = None,
    ) -> None:
        """Answer with the deployments of ``models``, by no other shortcuts than these.

        kept: answers that identical requests get again. None keeps none.
        journal: keeps answers that are cut off. None keeps none.
        """
        self._kept = kept or KeptAnswers(0)
        self._journal = journal or AnswerJournal()
        self._models = models
        self._shortcuts = shortcuts
        self._lanes = Lanes()
        self._newest = 0
        """The number of the newest sequence."""
        self._flights: dict[int, _Flight] = {}
        self._told: Counter[int] = Counter()
        """The number of tokens of which agents have told, by the epochs in flight."""
        roster.subscribe(self.on_event, lambda *_: None)  # Losses end answers by EndAnswers.
        models.carry_out(EndAnswers, self._end)

    def generate(
        self,
        deployment: Deployment,
        prompt: Sequence[int],
        sampling: Sampling,
        stop: Sequence[str] = (),
        timing: Timing | None = None,
        *,
        withdrawable: bool = False,
        markers: Collection[str] = (),
        shortcuts: Shortcuts = ALL_SHORTCUTS,
    ) -> AsyncGenerator[Piece, None]:
        """Wait for a slot, then yield the answer's pieces. The last one has a finish reason.

        ``max_tokens`` is cut to the room in the context. If a device is lost, the answer goes on
        once the model is placed anew. If a stage was damaged, the answer begins again. Should it
        then differ from the tokens that the caller has, AnswerWithdrawn is raised. An answer that
        was cut off before, to a request with the same id, begins with the tokens that it had.

        withdrawable: the caller accepts pieces that withdraw all earlier ones instead.
        markers: the special tokens whose texts are shown.
        shortcuts: those that the request may take, if the gateway allows them.
        Closing the iterator cancels the sequence on every stage. Raises RequestInvalid,
        CoordinatorError.
        """
        timing = timing or Timing()
        asked = Asked(tuple(prompt), sampling, tuple(stop), withdrawable, markers, shortcuts)
        pieces = self._journaled(deployment, asked, timing)
        if not shortcuts.cache_prompt:
            return pieces
        key = self._kept.key(deployment.epoch, prompt, sampling, stop, markers)
        if key is None:
            return pieces
        answer = self._kept.find(key)
        if answer is None:
            return self._kept.record(key, pieces)
        return _again(answer, deployment.name, len(prompt), timing)

    async def _journaled(
        self, deployment: Deployment, asked: Asked, timing: Timing
    ) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of an answer that is computed, as ``generate`` says."""
        model, sampling = (deployment.name, deployment.fingerprint), asked.sampling
        # The scores of earlier tokens are not kept.
        is_kept = not sampling.prompt_logprobs and sampling.top_logprobs < 0
        journal = self._journal if requests.current().id and is_kept else AnswerJournal()
        parts = model, asked.prompt, sampling, asked.stop
        with journal.entry(requests.current().id, *parts) as entry:
            pieces = self._pieces(deployment, asked, timing, entry)
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece

    async def _pieces(
        self, deployment: Deployment, asked: Asked, timing: Timing, entry: Entry
    ) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of ``generate``, and write their tokens into ``entry``."""
        answer = Answer(asked, deployment, timing, entry)
        taken = asked.shortcuts.within(self._shortcuts)
        requests.current().asks(deployment.name, len(asked.prompt))
        for piece in answer.kept():
            yield piece
        while True:
            before = deployment
            try:
                deployment = await self._models.latest(before)
            finally:
                if self._models.is_suspect(before):  # A later answer would begin with its tokens.
                    entry.withdraw()
            if before is not deployment and self._models.is_suspect(before):
                withdrawn = answer.begin_again(deployment.tokenizer)
                if withdrawn is not None:
                    yield withdrawn
            events = self._tokens(deployment, answer.sequence, answer.rest(), timing, taken)
            try:
                async with aclosing(events):
                    async for event in events:
                        grown = answer.take(event)
                        if grown is None:
                            continue
                        if isinstance(event, TokenSampled) and event.by_model:
                            deployment.draft_counts.add(event.drafted, event.accepted)
                        yield grown
                        if grown.finish:
                            return
            except _Paused:
                continue  # It goes on behind the tokens that it has.
            except (AnswerWithdrawn, AgentLied):
                entry.withdraw()
                raise  # Not even the earlier tokens can be trusted.
            except RowsLost as error:
                times = answer.lose_rows()
                if times > 2:
                    raise
                if times == 2 and self._models.ended_by(deployment) is None:
                    self._models.apply(deployment.name, Lost(error))
                notice = f"{error}. Its last part runs again"
            except CoordinatorError as error:
                if isinstance(error, AgentDamaged):  # A user may have unloaded the model since.
                    entry.withdraw()
                if not self._models.is_replaced(deployment):
                    raise
                does = "begins again" if self._models.is_suspect(deployment) else "goes on"
                notice = f"{error}. The answer {does} once the model is placed anew"
            yield Piece("", (), "", notice)

    async def _tokens(
        self,
        deployment: Deployment,
        prompt: tuple[int, ...],
        sampling: Sampling,
        timing: Timing,
        shortcuts: Shortcuts,
    ) -> AsyncGenerator[Told, None]:
        """Yield the tokens after a prompt, once a slot is free. Raises CoordinatorError.

        A client may read its answer slowly. The slot is free again when the stages have ended it.
        """
        # All rows of a prompt that is scored run.
        reuse = shortcuts.cache_prompt and not sampling.prompt_logprobs
        urgency = requests.current().urgency
        last: list[Told] = []
        async with (
            self._lane(deployment, urgency),
            deployment.slots.one(prompt, reuse=reuse, rank=urgency) as held,
        ):
            self._models.require(deployment)
            if urgency == Urgency.BULK and self._lanes.are_urgent(deployment):
                raise _Paused("a real-time request has come")
            while not last:
                events = self._sequence(deployment, held, prompt, sampling, timing, shortcuts)
                try:
                    async with aclosing(events):
                        async for part, ended in events:
                            if ended:
                                last = part
                                break
                            for event in part:
                                yield event
                except _PrefixLost as lost:
                    log.info("the whole prompt runs: %s", lost)
                    held.forget()
                except _Paused:
                    raise  # All stages have the rows of the tokens that came.
                except CoordinatorError:
                    held.forget()
                    raise
        for event in last:
            yield event

    @contextlib.asynccontextmanager
    async def _lane(self, deployment: Deployment, urgency: Urgency) -> AsyncGenerator[None, None]:
        """Let a bulk request wait for real-time ones, and let these pause bulk ones."""
        if urgency == Urgency.BULK:
            with deployment.slots.in_use():
                await self._lanes.free(deployment)
        if urgency != Urgency.REALTIME:
            yield
            return
        with self._lanes.urgent(deployment):
            for flight in self._flights.values():
                if flight.is_bulk and self._lanes.are_urgent(flight.deployment):
                    flight.events.put_nowait(_Paused("a real-time request has come"))
            yield

    async def _sequence(
        self,
        deployment: Deployment,
        held: Held,
        prompt: tuple[int, ...],
        sampling: Sampling,
        timing: Timing,
        shortcuts: Shortcuts,
    ) -> AsyncGenerator[tuple[list[Told], bool], None]:
        """Run a sequence in a slot, and yield tokens with whether they are the last ones.

        Raises CoordinatorError.
        """
        # Stages that were loaded before this coordinator was started know earlier sequences.
        number = self._newest = max(self._newest, deployment.newest_sequence) + 1
        is_bulk = requests.current().urgency == Urgency.BULK
        flight = _Flight(deployment, sampling, prompt, held, is_bulk=is_bulk)
        flight.told_at = self._told[deployment.epoch]
        self._flights[number] = flight
        try:
            timing.started_s = timing.started_s or time.monotonic()
            is_new = timing.first_s is None
            if is_new:
                timing.cached_tokens = held.cached
            requests.current().starts(deployment.epoch, number)
            shares = (
                deployment.slots.used > 1
                or self._models.ended_by(deployment) is not None
                or self._models.is_busy_beside(deployment)
            )
            chunk_tokens = deployment.plan.chunk_tokens(len(prompt) - held.cached)
            if shares:
                chunk_tokens = min(chunk_tokens, SHARED_CHUNK_TOKENS)
            await _begin(deployment, number, held, prompt, sampling, shortcuts, chunk_tokens)
            ended = False
            while not ended:
                part, error = await flight.next(len(prompt) - held.cached)
                if part and is_new:  # Until now, a stage may have lacked the kept rows.
                    requests.current().cached_tokens += held.cached
                    is_new = False
                ended = flight.ended and error is None
                if part:
                    yield part, ended
                if error is not None:
                    raise error.with_traceback(None)
        finally:
            del self._flights[number]
            # Stages that were taken over have another deployment of the same epoch.
            epochs = {other.deployment.epoch for other in self._flights.values()}
            if deployment.epoch not in epochs:
                del self._told[deployment.epoch]
            await asyncio.shield(_release(deployment, number))

    async def warm(self, before: Deployment, after: Deployment) -> None:
        """Run what the sequences of ``before`` have so far through the stages of ``after``.

        Slots of ``after`` keep the rows. So little has to run there once the answers go on.
        Raises CoordinatorError.
        """

        async def run(tokens: tuple[int, ...]) -> None:
            async with after.slots.one(tokens) as held:
                sampling = Sampling(1, ())
                events = self._sequence(
                    after, held, tokens, sampling, Timing(), Shortcuts(drafts=0)
                )
                async with aclosing(events):
                    async for _ in events:
                        pass

        flights = [one for one in self._flights.values() if one.deployment is before]
        known = [flight.held.tokens for flight in flights if not flight.ended]
        await together(run(tokens) for tokens in known if len(tokens) < after.context_tokens)

    def on_event(self, member: Member, message: Message) -> None:
        """Take a token or a failure from an agent. A message of no known flight is dropped.

        Raises ProtocolError for a token that no working agent sends. It ends the flight.
        """
        if not isinstance(message, (TokenSampled, PromptScored, SequenceFailed)):
            return
        flight = self._flights.get(message.sequence)
        if flight is None or flight.deployment.epoch != message.epoch or flight.ended:
            return
        if isinstance(message, SequenceFailed):
            if member in flight.deployment.devices:
                flight.fail(member.name, message)
        elif member is flight.deployment.leads[-1]:
            lie = flight.take(message)
            self._told[message.epoch] += 1
            flight.told_at = self._told[message.epoch]
            if lie is not None:
                flight.ended = True
                flight.events.put_nowait(AgentLied(member.name, lie))
                raise ProtocolError(f"it {lie}")

    def waits(self, deployment: Deployment) -> bool:
        """Whether an answer of the deployment waits for a token."""
        return any(flight.waits for flight in self._of(deployment))

    def run_again(self, deployment: Deployment, *, only_passed: bool) -> None:
        """Run answers again that wait for a token, because their rows are lost.

        only_passed: only those that the others have passed by far.
        """
        flights = self._of(deployment)
        chunks = sum(len(one.prompt) - one.held.cached for one in flights) // SHARED_CHUNK_TOKENS
        most = (len(flights) - 1) * (PASSED_TOKENS + PASSED_PER_CHUNK * chunks)
        for flight in flights:
            is_passed = len(flights) > 1 and self._told[deployment.epoch] - flight.told_at > most
            if flight.waits and (is_passed or not only_passed):
                flight.events.put_nowait(RowsLost())

    def _of(self, deployment: Deployment) -> list[_Flight]:
        return [one for one in self._flights.values() if one.deployment is deployment]

    def _end(self, action: EndAnswers) -> None:
        """End every flight of a deployment that has ended."""
        for flight in self._flights.values():
            if flight.deployment is action.deployment:
                flight.events.put_nowait(action.error)


async def _again(
    answer: Sequence[Piece], model: str, prompt_tokens: int, timing: Timing
) -> AsyncGenerator[Piece, None]:
    """Yield an answer that was kept. Nothing of its prompt runs."""
    timing.prompt_tokens = timing.cached_tokens = prompt_tokens
    request = requests.current()
    request.asks(model, prompt_tokens)
    request.cached_tokens += prompt_tokens
    for piece in answer:
        timing.kept_tokens += len(piece.tokens)
        request.answers(len(piece.tokens))
        yield piece


async def _begin(
    deployment: Deployment,
    number: int,
    held: Held,
    prompt: tuple[int, ...],
    sampling: Sampling,
    shortcuts: Shortcuts,
    chunk_tokens: int,
) -> None:
    """Start a sequence on every stage. The loss of a device ends the flight elsewhere.

    Of a team only the lead is told, because it directs the other members. The first stage gets the
    prompt. It is told last, so that its rows find the others prepared. Only the last stage is told
    what may be long and what only it needs: the prompt's tokens if they are penalized or scored,
    the answer so far, biases and the grammar.

    chunk_tokens: the most rows of a chunk of the prompt.
    """

    async def tell(member: Member, message: StartSequence) -> None:
        with contextlib.suppress(AgentLost):
            await member.send(message)

    common = replace(sampling, answer=(), logit_bias=(), grammar=b"")
    start = StartSequence(
        deployment.epoch,
        number,
        held.slot,
        (),
        common,
        chunk_tokens,
        cached=held.cached,
        drafts=shortcuts.drafts,
        draft_model=shortcuts.draft_model,
    )
    told = [start for _ in deployment.leads]
    if sampling.repetition_penalty != 1:
        sampling = replace(sampling, penalized=tuple(sorted(set(prompt))))
    told[-1] = replace(start, sampling=sampling, prompt=prompt * sampling.prompt_logprobs)
    told[0] = replace(told[0], prompt=prompt)
    first, *others = map(tell, deployment.leads, told)
    await asyncio.gather(*others, first)


async def _release(deployment: Deployment, number: int) -> None:
    for member in deployment.leads:
        with contextlib.suppress(AgentFailed):
            await member.send(ReleaseSequence(deployment.epoch, number))
