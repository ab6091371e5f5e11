"""A stage at work: rows come in, run through the blocks, and go to the next device.

The ring is first stage -> ... -> last stage -> first stage. Prompt chunks and single tokens take
the same way. The last stage samples, and its token is the first stage's next input. The coordinator
is told every token, but the ring does not wait for it.

One thread at a time runs the stage. If the stage is idle and has one sequence, its token runs in
the thread that received it, because a hand-over would cost more than the call. All other rows wait
in agent.sequences for the stage's own thread. That thread runs the tokens of several sequences in
one pass, and one prompt chunk between two such passes. Rows that left a stage in one pass run in
one pass of the next. The thread also waits while a stage of another model computes
(agent.turnstile). Connections are read meanwhile, because a sender takes an unread connection for
dead. Results leave by agent.hop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import cast

import numpy as np

from agent.adjustments import FormatFailed
from agent.drafter import Drafter
from agent.drafts import History, Pacer, Plan
from agent.hop import Hop
from agent.links import Link, Measuring
from agent.mesh import TeamLost
from agent.meter import StageMeter
from agent.sampler import Sampler
from agent.sampling_limits import problem_of
from agent.sequences import Drafting, Rows, Sequence, SequenceTable, Turn
from agent.turnstile import Ticket, Turnstile
from backends.base import ALL_LOGITS, Array, BackendError, Stage, Tokens
from model.grammar_process import GrammarProcess
from model.spec import ModelSpec
from wire import limits
from wire.activations import HopBits, decode_rows, encode_rows, payload_bytes
from wire.connection import Connection
from wire.errors import ProtocolError, WireError
from wire.messages import (
    Activation,
    FinishReason,
    Message,
    PeerLost,
    PromptScored,
    SequenceFailed,
    StageCounts,
    StartSequence,
    TokenSampled,
    TracedPass,
)
from wire.rare_log import RareLog

log = logging.getLogger(__name__)

START_WAIT_S = limits.LIVENESS_S
"""How long rows wait for the coordinator's StartSequence, which they may overtake."""

GATHERING_SHARE = 0.25
GATHERING_S = 0.05
"""How long a pass waits for rows that follow: this share of the last pass, and never longer."""

NOT_LOADED = "the stage is not loaded"

INTERNAL_ERROR = "internal error in the stage; see the agent's log"


class Relay:
    """The stage of one deployment on this device, with its hop to the next."""

    def __init__(
        self,
        stage: Stage,
        spec: ModelSpec,
        blocks: range,
        *,
        epoch: int,
        slots: int,
        context_tokens: int,
        hop_bits: HopBits,
        report: Callable[[Message], None],
        grammars: GrammarProcess | None = None,
        turnstile: Turnstile | None = None,
        weight: float = 1.0,
        drafter: Drafter | None = None,
        rows_at_once: tuple[int, ...] = (),
    ) -> None:
        """Run ``stage``, whose rows leave at ``hop_bits`` a value.

        turnstile: lets one stage of the device compute at a time. None: there is no other stage.
        weight: the part of the time that this stage gets there, against those of others.
        drafter: guesses tokens on the first stage, where it has one.
        rows_at_once: the most rows of a pass of the first stage, as LoadStage has them.

        ``report`` sends to the coordinator. If it raises WireError, the sequence of the message
        ends. Without ``grammars``, answers cannot be kept to a grammar. The relay closes it, as it
        closes the drafter.
        """
        self.epoch = epoch
        self._stage = stage
        stage.between = self._pause
        self._spec = spec
        self._is_first = blocks.start == 0
        self._is_last = blocks.stop == spec.block_count
        self._context_tokens = context_tokens
        self._hop_bits = hop_bits
        self._report = report
        self._grammars = grammars
        self._turnstile = turnstile or Turnstile()
        self._ticket = Ticket(weight)
        self._hop: Hop | None = None
        self._hop_lost: PeerLost | None = None
        """The report that was sent when the hop was lost."""
        self._lock = threading.Lock()
        """Guards the following fields. Never held while the stage runs or a message is sent."""
        self._changed = threading.Condition(self._lock)
        self._meter = StageMeter()
        self._table = SequenceTable(slots, context_tokens)
        self._pacer = Pacer()
        self._rows_at_once = rows_at_once
        self._gathers_until_s = 0.0
        """Until then, rows that belong to one pass are still to come."""
        self._gathers = False
        """Whether the stage's thread waits for them, with a limit."""
        self._pass_s = 0.0
        """How long the last pass of tokens took. Written without the lock."""
        self._drafter = self._drafts_by = drafter
        """The draft model, and the same while it works."""
        self._busy = False
        """Whether a thread runs the stage. The stage belongs to that thread until it is done."""
        self._closed = False
        self._rare_log = RareLog(log)
        threading.Thread(target=self._work, name="stage", daemon=True).start()

    def connect(self, connection: Connection, link: Link, measuring: Measuring) -> None:
        """Set the way to the next device of the ring. A stage that is alone needs none."""

        def on_lost(reason: str) -> None:
            self._hop_lost = PeerLost(self.epoch, link.device, reason)
            self._try_report(self._hop_lost)

        self._hop = Hop(
            connection,
            link,
            measuring,
            on_lost=on_lost,
            on_news=self._try_report,
            on_room=self._wake,
            on_wait=self._cede,
        )

    def close(self) -> None:
        """Drop every sequence, the hop and the stage, after the running forward pass."""
        with self._lock:
            self._closed = True
            self._table.clear()
            self._changed.notify_all()
        if self._hop is not None:
            self._hop.close()
        with self._lock:
            self._changed.wait_for(lambda: not self._busy)
        self._stage.close()
        if self._drafter is not None:
            self._drafter.close()
        if self._grammars is not None:
            self._grammars.close()

    def forget(self) -> None:
        """Forget all sequences. Later ones must have larger numbers."""
        with self._lock:
            self._table.clear()

    # ---- what is told of it ---------------------------------------------------------------------

    @property
    def runs(self) -> bool:
        """Whether a pass is running."""
        return self._busy

    @property
    def works(self) -> bool:
        """Whether new sequences can run: it is not closed, and its hop is not lost."""
        return not self._closed and self._hop_lost is None

    @property
    def newest(self) -> int:
        """The newest sequence that was started."""
        return self._table.newest

    def counts(self) -> StageCounts:
        """Return what the stage and its hop have done so far."""
        hop = self._hop
        with self._lock:
            held_rows = self._table.held_rows
            busy = self._busy or self._table.waiting
        return self._meter.counts(
            None if hop is None else hop.counts(),
            held_rows,
            self._table.most_rows,
            busy=busy or (hop is not None and hop.is_sending),
        )

    def traced(self, sequences: tuple[int, ...]) -> tuple[TracedPass, ...]:
        """Return the remembered passes of these sequences, oldest first."""
        return self._meter.passes_of(sequences)

    # ---- what arrives ---------------------------------------------------------------------------

    def start(self, message: StartSequence) -> None:
        """Give the slot to a sequence. The first stage runs its prompt, chunk by chunk."""
        number, sampling = message.sequence, message.sampling
        prompt = np.asarray(message.prompt, dtype=np.int64)
        problem = self._problem(message, prompt)
        if problem is not None:
            self._fail(number, problem)
            return
        # A prompt that is scored goes row by row, so that each row's logits come.
        chunk_tokens = 1 if sampling.prompt_logprobs else message.chunk_tokens
        cached = message.cached
        sampler = self._sampler(message) if self._is_last else None
        with self._lock:
            has_prefix, sequence = self._table.keeps(message.slot, cached), None
            closed = self._closed
            if not closed:
                sequence = self._table.open(number, message.slot, sampling, sampler, cached)
            if sequence is not None and not has_prefix:
                self._table.spoil(sequence)
            elif sequence is not None and self._is_first:
                if message.drafts:
                    history = History(prompt, self._context_tokens)
                    sequence.drafting = Drafting(
                        history, message.drafts, uses_model=message.draft_model
                    )
                for begin in range(cached, len(prompt), chunk_tokens):
                    chunk = prompt[begin : begin + chunk_tokens]
                    last = begin + len(chunk) == len(prompt) or sampling.prompt_logprobs
                    self._table.add(sequence, Rows(begin, len(chunk), last, chunk))
            self._changed.notify_all()
        if closed:
            self._fail(number, NOT_LOADED)
        elif sequence is not None and not has_prefix:
            self._report_lost_prefix(number)

    def _problem(self, message: StartSequence, prompt: Tokens) -> str | None:
        """Return why a sequence cannot be started, or None if it can."""
        cached = message.cached
        if (
            not self._table.fits(
                message.slot, cached, len(prompt) - cached if self._is_first else 1
            )
            or not 0 < message.chunk_tokens <= limits.PREFILL_CHUNK_TOKENS
            or not 0 <= message.drafts <= limits.DRAFT_TOKENS
        ):
            return "the coordinator sent a prompt that does not fit"
        if len(prompt) and (prompt.min() < 0 or prompt.max() >= self._spec.vocab):
            return "the prompt has tokens outside the vocabulary"
        problem = problem_of(message.sampling, self._spec.vocab)
        if problem is not None:
            return problem
        if self._is_last and message.sampling.grammar and self._grammars is None:
            return "this device cannot keep an answer to a grammar"
        if self._is_last and message.sampling.prompt_logprobs and not message.prompt:
            return "the coordinator sent no prompt to tell the log-probabilities of"
        return None

    def _sampler(self, message: StartSequence) -> Sampler:
        """Return what draws the sequence's tokens, once its grammar begins to be compiled."""
        sampling, matcher = message.sampling, None
        if sampling.grammar and self._grammars is not None:
            matcher = self._grammars.open(sampling.grammar.decode(), sampling.answer)
        return Sampler(sampling, matcher, message.prompt)

    def deliver(self, message: Message, payload: memoryview) -> None:
        """Take a data-plane message from a peer, and drop messages of another epoch."""
        if isinstance(message, Activation):
            if message.epoch == self.epoch:
                self._deliver_rows(message, payload)
        elif isinstance(message, TokenSampled) and message.epoch == self.epoch:
            self._deliver_token(message)

    def release(self, number: int) -> None:
        """Forget a sequence. Later rows for it are dropped."""
        with self._lock:
            self._table.drop(number)
            self._gathers_until_s = 0.0  # Its group need not wait for it.
            self._changed.notify_all()

    def _deliver_rows(self, message: Activation, payload: memoryview) -> None:
        number, position, count = message.sequence, message.position, message.rows
        if (
            self._is_first
            or not self._table.fits(message.slot, position, count)
            or len(payload) != payload_bytes(count, self._spec.hidden, message.bits)
            or (message.drafts and not _are_checkable(message))
        ):
            self._fail(number, "the previous device sent rows that do not fit")
            return
        with self._lock:
            sequence = self._started(number)
            if sequence is not None and sequence.slot != message.slot:
                sequence = None
            content = payload, message.bits
            rows = Rows(position, count, message.last, content, message.drafts, message.by_model)
            turns = self._add(sequence, rows, message.following)
        if turns:
            self._run(turns)

    def _deliver_token(self, message: TokenSampled) -> None:
        if not self._is_first or self._is_last or not 0 <= message.token < self._spec.vocab:
            return
        with self._lock:
            sequence = self._table.find(message.sequence)
            rows = None if sequence is None else self._following(sequence, message)
            turns = [] if rows is None else self._add(sequence, rows, message.following)
        if turns:
            self._run(turns)

    def _following(self, sequence: Sequence, sampled: TokenSampled) -> Rows | None:
        """Return the row of a sampled token, and rows of guesses. None for a false message.

        The caller holds the lock.
        """
        drafting, accepted = sequence.drafting, sampled.accepted
        position, token = sequence.sure + accepted, sampled.token
        if not sequence.sure <= position <= sequence.arrived or position >= self._context_tokens:
            return None
        if drafting is None:
            return Rows(position, 1, True, np.array([token], dtype=np.int64))
        now_s = time.monotonic()
        alone = self._table.alone
        if drafting.began_s and alone:
            self._pacer.note(
                now_s - drafting.began_s,
                len(drafting.checked),
                accepted,
                drafting.matched,
                draft_s=drafting.draft_s,
                by_model=drafting.by_model,
            )
        drafting.history.append((*drafting.checked[:accepted], token))
        drafting.by_model, drafting.draft_s = False, 0.0
        most = min(
            drafting.most,
            sequence.sampling.max_tokens - sampled.index - 2,
            self._context_tokens - position - 1,
        )
        # Rows of several sequences run together, and guesses would keep them apart.
        guesses, drafting.matched = drafting.history.guess(most) if alone else ((), 0)
        plan = self._planned(sequence, drafting, guesses, most if alone else 0)
        drafting.checked = () if plan.by_model else guesses[: plan.guesses]
        drafting.began_s = now_s if alone else 0.0
        tokens = np.array([token, *drafting.checked], dtype=np.int64)
        rows = Rows(position, len(tokens), True, tokens, drafting.checked)
        rows.wanted = plan.guesses if plan.by_model else 0
        return rows

    def _planned(
        self, sequence: Sequence, drafting: Drafting, guesses: tuple[int, ...], most: int
    ) -> Plan:
        """Choose the guesses of the next pass, of which the text gives these.

        The caller holds the lock.
        """
        drafter = self._drafts_by
        if drafter is None or not drafting.uses_model:
            return Plan(self._pacer.choose(len(guesses), drafting.matched))
        lag = drafter.lag(sequence.slot, drafting.history.tokens)
        return self._pacer.plan(
            len(guesses),
            drafting.matched,
            0 if lag is None else most,
            lambda count: drafter.seconds(count, lag or 1),
        )

    def _started(self, number: int) -> Sequence | None:
        """Return this sequence once the coordinator has started it, or None if it is over.

        The caller holds the lock.
        """
        sequence = self._table.find(number)
        if sequence is None and self._table.may_start(number):
            self._changed.wait_for(
                lambda: self._closed or number <= self._table.newest, START_WAIT_S
            )
            sequence = self._table.find(number)
        if sequence is None and number > self._table.newest:
            self._rare_log.warning(
                "sequence",
                "dropped rows of sequence %d, which the coordinator has not started",
                number,
            )
        return sequence

    def _add(self, sequence: Sequence | None, rows: Rows, following: int) -> list[Turn]:
        """Queue rows for the stage's thread; return those that the calling thread must run instead.

        Rows that are not the next ones of a sequence are dropped, because the sequence was released
        while they were on their way. The pass waits for ``following`` ones of other sequences. The
        caller holds the lock.
        """
        if self._closed or sequence is None or not self._table.add(sequence, rows):
            return []
        wait_s = min(GATHERING_SHARE * self._pass_s, GATHERING_S)
        self._gathers_until_s = time.monotonic() + wait_s if following else 0.0
        if self._busy:
            return []
        at_once = self._table.alone and not self._turnstile.is_taken
        turns = self._table.take(chunks=False) if at_once else []
        if turns:
            self._busy = True
        elif not (following and self._gathers):
            self._changed.notify_all()
        return turns

    # ---- one pass after the other ---------------------------------------------------------------

    def _work(self) -> None:
        """Run waiting rows in the stage's thread until the relay is closed."""
        while True:
            fed = None
            with self._lock:
                while self._busy or not (turns := self._next_turns()):
                    self._cede()
                    if self._closed:
                        return
                    fed = None if self._busy else self._behind()
                    if fed is not None:
                        break
                    self._gathers = not self._busy and self._gathers_until_s > 0
                    self._changed.wait(self._gathering_s() if self._gathers else None)
                    self._gathers = False
                self._busy = True
            if turns:
                self._run(turns)
            elif fed is not None:
                self._feed(*fed)

    def _next_turns(self) -> list[Turn]:
        """Take the rows of the next pass, unless some of them are still to come.

        The caller holds the lock.
        """
        if self._gathering_s() > 0:
            return []
        self._gathers_until_s = 0.0
        limits_of = self._rows_at_once
        most = limits_of[min(self._table.count, len(limits_of)) - 1] if limits_of else None
        turns = self._table.take(chunks=self._has_room(), most=most)
        if not turns:
            self._gathers_until_s = self._table.due_s
        return turns

    def _gathering_s(self) -> float:
        """How long the next pass may still wait for rows. The caller holds the lock."""
        if not self._gathers_until_s:
            return 0.0
        return max(self._gathers_until_s - time.monotonic(), 0.0)

    def _has_room(self) -> bool:
        """Whether a chunk can be sent on. Otherwise tokens go first, which need no room."""
        return self._hop is None or self._hop.has_room

    def _goes_on(self) -> bool:
        """Whether this stage has other rows to run, while another stage waits to compute."""
        if not self._turnstile.is_wanted:
            return False
        with self._lock:
            return self._table.waiting

    def _cede(self) -> None:
        """Give up the place that was kept for the next pass, if it was.

        Nobody may wait for another device while a place is kept. The stages of other models would
        wait, too.
        """
        self._turnstile.cede(self._ticket)

    def give_way(self) -> None:
        """Let other stages compute, because the running pass waits for other members of a team."""
        self._turnstile.give_way(self._ticket)

    def _pause(self) -> float:
        """Let shorter passes of other models compute, between two layers of this one.

        Return the seconds for which they did.
        """
        waited_s = self._turnstile.pause(self._ticket)
        self._meter.paused(waited_s)
        return waited_s

    def _wake(self) -> None:
        with self._lock:
            self._changed.notify_all()

    def _run(self, turns: list[Turn]) -> None:
        """Run one pass in the thread that made the relay busy, and free the relay."""
        self._pass(turns)
        with self._lock:
            self._busy = False
            if self._closed or not self._table.waiting:
                # The rows for which the place was kept may be gone.
                self._cede()
            if self._closed or self._table.waiting or self._behind() is not None:
                self._changed.notify_all()

    # ---- the draft model ------------------------------------------------------------------------

    def _behind(self) -> tuple[Sequence, Tokens] | None:
        """Return the lone sequence and its tokens, if the draft model is to be fed some of them.

        It is fed while the device waits for the ring. The caller holds the lock.
        """
        drafter, sequence = self._drafts_by, self._table.lone
        drafting = None if sequence is None else sequence.drafting
        if drafter is None or sequence is None or drafting is None or not drafting.uses_model:
            return None
        if self._is_last:  # The device does not wait.
            return None
        tokens = drafting.history.tokens
        lag = drafter.lag(sequence.slot, tokens)
        if lag is None or lag < 2 or not self._pacer.trusts_model(lambda n: drafter.seconds(n, 1)):
            return None
        return sequence, tokens

    def _feed(self, sequence: Sequence, tokens: Tokens) -> None:
        """Feed a part of a sequence to the draft model in the thread that made the relay busy."""
        self._turnstile.enter(self._ticket)
        began_s = time.monotonic()
        try:
            if self._drafts_by is not None:
                self._drafts_by.feed(sequence.slot, tokens[:-1])
        except Exception as error:  # The thread's outermost loop: it ends the draft model alone.
            self._lose_drafter(error)
        finally:
            self._turnstile.leave(self._ticket, returns=self._goes_on())
        now_s = time.monotonic()
        with self._lock:
            self._busy = False
            if sequence.waiting:
                self._pacer.charge(now_s - max(sequence.waiting[0].arrived_s, began_s))
            if self._closed or not self._table.waiting:
                self._cede()
            self._changed.notify_all()

    def _draft(self, sequence: Sequence, rows: Rows) -> None:
        """Have the draft model guess what follows the newest token, and add the rows to ``rows``.

        The caller has made the relay busy.
        """
        drafting, drafter = sequence.drafting, self._drafts_by
        if drafting is None or drafter is None or not self._table.alone:
            return
        began_s = time.monotonic()
        try:
            guesses = drafter.guess(
                sequence.slot,
                drafting.history.tokens,
                rows.wanted,
                sequence.sampling,
                self._spec.vocab,
            )
        except (BackendError, MemoryError) as error:  # The answer needs no guesses.
            self._lose_drafter(error)
            return
        with self._lock:
            drafting.draft_s = time.monotonic() - began_s
            if guesses and self._table.extend(sequence, rows, guesses):
                drafting.checked, drafting.by_model = guesses, True

    def _lose_drafter(self, error: Exception) -> None:
        """Free the draft model, which failed, and go on without it."""
        log.warning("the draft model failed: answers go on without it: %s", error)
        self._drafts_by = None
        if self._drafter is not None:
            self._drafter.close()

    # ---- one pass -------------------------------------------------------------------------------

    def _pass(self, turns: list[Turn], outputs: Array | None = None, following: int = 0) -> None:
        """Run the stage, unless ``outputs`` is given, and pass each row's result on.

        If several rows fail together, each runs alone, which shows the row at fault. After these
        rows, ``following`` more of the same pass are passed on.
        """
        alone = len(turns) == 1
        sequence, rows = turns[0]
        try:
            if outputs is None:
                self._turnstile.enter(self._ticket)
                try:
                    if rows.wanted and alone:
                        self._draft(sequence, rows)
                    started_s = time.monotonic()
                    self._meter.begins(turns, started_s)
                    outputs = self._computed(turns)
                finally:
                    self._meter.ends()
                    self._turnstile.leave(self._ticket, returns=self._goes_on())
                computed_s = time.monotonic()
                self._meter.ran(turns, started_s, computed_s)
                if rows.count == 1:
                    self._pass_s = computed_s - started_s
            if alone:
                self._pass_on(sequence, rows, outputs, following)
                self._meter.sent(sequence.number, rows)
                return
        except Exception as error:  # It ends one sequence, and the thread serves others.
            if alone:
                self._give_up(sequence, error)
                return
            log.info("%d rows at once failed: %s", len(turns), error)
            outputs = None
        for index, turn in enumerate(turns):
            if outputs is None:
                self._pass([turn])
            else:
                self._pass([turn], outputs[index : index + 1], len(turns) - 1 - index)

    def _computed(self, turns: list[Turn]) -> Array:
        """Run the stage: hidden rows, or logits [n, vocab] of last rows and of guesses."""
        if self._is_last:
            self._stage.candidates = _candidates(turns)
        if len(turns) == 1:
            ((sequence, rows),) = turns
            content = self._unpacked(rows)
            logits = 1 + len(rows.drafts) if rows.last and self._is_last else 0
            outputs = self._stage.forward(sequence.slot, rows.position, content, logits=logits)
        else:
            outputs = self._decode(turns)
        with self._lock:
            self._table.ran(turns)
        return outputs

    def _decode(self, turns: list[Turn]) -> Array:
        """Return hidden rows, or logits [n, vocab], for one row of each of n sequences."""
        slots = [sequence.slot for sequence, _ in turns]
        positions = [rows.position for _, rows in turns]
        parts = [self._unpacked(rows) for _, rows in turns]
        inputs = cast("Array | Tokens", np.concatenate(parts))  # All parts of a stage are alike.
        return self._stage.decode(slots, positions, inputs)

    def _unpacked(self, rows: Rows) -> Array | Tokens:
        if isinstance(rows.content, tuple):
            payload, bits = rows.content
            return decode_rows(payload, rows.count, self._spec.hidden, bits)
        return rows.content

    def _pass_on(self, sequence: Sequence, rows: Rows, output: Array, following: int) -> None:
        """Send rows on, or sample from them."""
        if self._is_last:
            sampler = sequence.sampler
            if rows.last and sampler is not None:
                end = rows.position + rows.count
                told = sampler.told(end)
                if told is None:
                    self._answer(sequence, rows, sampler, output, following)
                else:
                    scored = sampler.logprobs(output[0], told)
                    self._report(PromptScored(self.epoch, sequence.number, end, scored))
            return
        message = Activation(
            self.epoch,
            sequence.number,
            sequence.slot,
            rows.position,
            rows.count,
            self._hop_bits,
            rows.last,
            rows.drafts,
            rows.by_model,
            following,
        )
        self._next().send(message, encode_rows(output, self._hop_bits))

    def _answer(
        self, sequence: Sequence, rows: Rows, sampler: Sampler, logits: Array, following: int
    ) -> None:
        """Sample a token, and go on with those of right guesses. Tell both ends.

        logits: [1 + guesses, vocab], of the rows that the guesses follow.
        """
        tokens: list[tuple[int, FinishReason]] = []
        sure = rows.position + rows.count - len(rows.drafts)
        for row, draft in zip(logits, (*rows.drafts, None), strict=True):
            end = sure + len(tokens)
            if sampler.waits:
                self._cede()
            token = sampler.sample(row, end)
            finish: FinishReason = ""
            if token in sequence.sampling.stop_tokens:
                finish = "stop"
            elif (
                sequence.sampled_tokens + len(tokens) + 1 >= sequence.sampling.max_tokens
                or end >= self._context_tokens
            ):
                finish = "length"
            tokens.append((token, finish))
            if finish or token != draft:
                break
        before_s, sequence.sampled_s = sequence.sampled_s, time.monotonic()
        each_us = max(round(1e6 * (sequence.sampled_s - before_s) / len(tokens)), 1)
        sampled = [
            TokenSampled(
                self.epoch,
                sequence.number,
                index,
                token,
                finish,
                each_us if index else 0,
            )
            for index, (token, finish) in enumerate(tokens, sequence.sampled_tokens)
        ]
        sequence.sampled_tokens += len(sampled)
        newest = sampled[-1]
        newest.drafted, newest.accepted = len(rows.drafts), len(sampled) - 1
        newest.by_model = rows.by_model and bool(rows.drafts)
        newest.following = following
        if not newest.finish and not self._is_first:
            self._next().send(newest)
        for one, row in zip(sampled, logits, strict=False):  # There may be more rows.
            if sampler.tells_logprobs:
                one.logprobs = sampler.logprobs(row, one.token)
            self._report(one)
        if not newest.finish and self._is_first:
            with self._lock:
                after = self._following(sequence, newest)
                if after is not None:
                    self._table.add(sequence, after)

    def _next(self) -> Hop:
        if self._hop is None:
            raise BackendError("the next device is not connected yet")
        return self._hop

    # ---- what fails -----------------------------------------------------------------------------

    def _give_up(self, sequence: Sequence, error: Exception) -> None:
        """Forget a sequence that cannot continue, and report it.

        A backend may have emptied its slot. So a later sequence cannot begin with rows of the slot.
        """
        with self._lock:
            heir = self._table.spoil(sequence)
        if heir is not None:
            self._report_lost_prefix(heir.number)
        if isinstance(error, ProtocolError):
            reason = f"the previous device sent an invalid activation: {error}"
        elif isinstance(error, WireError):
            # The hop, the team or the coordinator is lost. The coordinator may have been told
            # before it knew this deployment, so it is told again.
            log.info("sequence %d ends here: %s", sequence.number, error)
            if isinstance(error, TeamLost):
                self._try_report(PeerLost(self.epoch, error.device, error.reason))
            elif self._hop_lost is not None:
                self._try_report(self._hop_lost)
            return
        elif isinstance(error, BackendError):
            reason = str(error)
        else:
            log.error("stage failed", exc_info=error)
            reason = INTERNAL_ERROR
        self._fail(sequence.number, reason, format_failed=isinstance(error, FormatFailed))

    def _report_lost_prefix(self, number: int) -> None:
        reason = "the slot does not keep the first rows of the prompt"
        self._try_report(SequenceFailed(self.epoch, number, reason, prefix_lost=True))

    def _fail(self, number: int, reason: str, *, format_failed: bool = False) -> None:
        self._try_report(SequenceFailed(self.epoch, number, reason, format_failed=format_failed))

    def _try_report(self, message: Message) -> None:
        try:
            self._report(message)
        except WireError:
            log.info("not reported, the coordinator is gone: %s", message)


def _are_checkable(message: Activation) -> bool:
    """Whether a message with guesses has one row that is none, and its sequence's last ones."""
    return message.last and 1 + len(message.drafts) == message.rows <= 1 + limits.DRAFT_TOKENS


def _candidates(turns: list[Turn]) -> int:
    """Return how many of the highest logits are needed where most are, or ALL_LOGITS."""
    counts = [sequence.sampler.candidates for sequence, _ in turns if sequence.sampler is not None]
    return ALL_LOGITS if ALL_LOGITS in counts else max(counts, default=1)
