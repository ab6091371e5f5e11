"""The stage of an encoder at work: passes of whole texts come in, run, and go on.

The coordinator forms the passes. There are no sequences, slots or prompts here, and nothing is kept
between two passes. The last stage tells the coordinator the result.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from agent.hop import Hop
from agent.links import Link, Measuring
from agent.meter import StageMeter
from agent.sequences import Rows, Sequence, Turn
from agent.turnstile import Ticket, Turnstile
from backends.base import Array, BackendError, Stage, Tokens
from model.spec import ModelSpec
from model.texts import Texts, pass_rows
from wire import limits
from wire.activations import HopBits, decode_rows, encode_rows, payload_bytes
from wire.connection import Connection
from wire.errors import ProtocolError, WireError
from wire.messages import (
    EncodeTexts,
    Message,
    PassFailed,
    PeerLost,
    Sampling,
    SequenceFailed,
    StageCounts,
    StartSequence,
    TextRows,
    TextsEncoded,
    TracedPass,
)

log = logging.getLogger(__name__)

MOST_WAITING = 64
"""Passes that wait here. The coordinator has only a few in flight for each stage."""

ENCODES = "this model encodes texts and generates none"

_NO_SAMPLING = Sampling(0, ())


@dataclass(frozen=True, slots=True)
class _Pass:
    """A pass that waits. ``content``: tokens [n], or hidden rows as received with their bits."""

    number: int
    texts: Texts
    content: Tokens | tuple[memoryview, HopBits]
    arrived_s: float


class EncoderRelay:
    """The stage of an encoder's deployment on this device, with its hop to the next.

    It has the methods of agent.relay.Relay, by which the daemon drives both.
    """

    def __init__(
        self,
        stage: Stage,
        spec: ModelSpec,
        blocks: range,
        *,
        epoch: int,
        context_tokens: int,
        hop_bits: HopBits,
        report: Callable[[Message], None],
        turnstile: Turnstile | None = None,
        weight: float = 1.0,
    ) -> None:
        """Run ``stage``, whose rows leave at ``hop_bits`` a value. The rest is as of Relay."""
        self.epoch = epoch
        self.newest = 0
        """No sequence is ever started here."""
        self._stage = stage
        stage.between = self._pause
        self._spec = spec
        self._is_first = blocks.start == 0
        self._is_last = blocks.stop == spec.block_count
        self._context_tokens = context_tokens
        self._hop_bits = hop_bits
        self._report = report
        self._turnstile = turnstile or Turnstile()
        self._ticket = Ticket(weight)
        self._hop: Hop | None = None
        self._hop_lost: PeerLost | None = None
        self._changed = threading.Condition()
        """Guards the following fields. Never held while the stage runs or a message is sent."""
        self._waiting: deque[_Pass] = deque()
        self._busy = False
        self._closed = False
        self._meter = StageMeter()
        threading.Thread(target=self._work, name="stage", daemon=True).start()

    def connect(self, connection: Connection, link: Link, measuring: Measuring) -> None:
        """Set the way to the next device of the ring. The last one sends nothing there."""

        def on_lost(reason: str) -> None:
            self._hop_lost = PeerLost(self.epoch, link.device, reason)
            self._try_report(self._hop_lost)

        self._hop = Hop(connection, link, measuring, on_lost=on_lost, on_news=self._try_report)

    def close(self) -> None:
        """Drop every pass, the hop and the stage, after the running pass."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        if self._hop is not None:
            self._hop.close()
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)
        self._stage.close()

    def forget(self) -> None:
        """Forget all waiting passes."""
        with self._changed:
            self._waiting.clear()

    # ---- what is told of it ---------------------------------------------------------------------

    @property
    def runs(self) -> bool:
        """Whether a pass is running."""
        return self._busy

    @property
    def works(self) -> bool:
        """Whether new passes can run: it is not closed, and its hop is not lost."""
        return not self._closed and self._hop_lost is None

    def counts(self) -> StageCounts:
        """Return what the stage and its hop have done so far. Nothing is cached."""
        return self._meter.counts(None if self._hop is None else self._hop.counts())

    def traced(self, sequences: tuple[int, ...]) -> tuple[TracedPass, ...]:
        """Return the remembered passes of these numbers, oldest first."""
        return self._meter.passes_of(sequences)

    # ---- what arrives ---------------------------------------------------------------------------

    def start(self, message: StartSequence) -> None:
        """Refuse a prompt, which this model cannot continue."""
        self._try_report(SequenceFailed(self.epoch, message.sequence, ENCODES))

    def release(self, number: int) -> None:
        """Nothing is kept of a sequence."""

    def encode(self, message: EncodeTexts) -> None:
        """Queue a pass of the coordinator, if this is the first stage."""
        texts = Texts(message.lengths, message.seconds)
        tokens = np.asarray(message.tokens, dtype=np.int64)
        if not self._is_first or not self._fits(texts) or texts.rows != len(tokens):
            self._fail(message.number, "the coordinator sent texts that do not fit")
        elif tokens.min() < 0 or tokens.max() >= self._spec.vocab:
            self._fail(message.number, "a text has tokens outside the vocabulary")
        else:
            self._add(_Pass(message.number, texts, tokens, time.monotonic()))

    def deliver(self, message: Message, payload: memoryview) -> None:
        """Take rows from the previous device, and drop messages of another epoch."""
        if not isinstance(message, TextRows) or message.epoch != self.epoch:
            return
        texts = Texts(message.lengths, message.seconds)
        if (
            self._is_first
            or not self._fits(texts)
            or len(payload) != payload_bytes(texts.rows, self._spec.hidden, message.bits)
        ):
            self._fail(message.number, "the previous device sent rows that do not fit")
            return
        content = payload, message.bits
        self._add(_Pass(message.number, texts, content, time.monotonic()))

    def _fits(self, texts: Texts) -> bool:
        return (
            texts.are_sound
            and max(texts.lengths) <= self._context_tokens
            and texts.padded_rows <= pass_rows(self._context_tokens)
        )

    def _add(self, one: _Pass) -> None:
        with self._changed:
            full = len(self._waiting) >= MOST_WAITING
            if not full and not self._closed:
                self._waiting.append(one)
                self._changed.notify_all()
        if full:
            self._fail(one.number, f"more than {MOST_WAITING} passes wait here")

    # ---- one pass after the other ---------------------------------------------------------------

    def _work(self) -> None:
        """Run waiting passes in the stage's thread until the relay is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                one = self._waiting.popleft()
                self._busy = True
            try:
                self._run(one)
            except Exception as error:  # The thread's outermost loop: it ends one pass.
                self._give_up(one.number, error)
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _run(self, one: _Pass) -> None:
        count = one.texts.rows
        rows = Rows(0, count, True, np.empty(0, np.int64), arrived_s=one.arrived_s)
        turns: list[Turn] = [(Sequence(one.number, 0, _NO_SAMPLING, None), rows)]
        started_s = time.monotonic()
        self._meter.begins(turns, started_s)
        try:
            content = one.content
            inputs = (
                decode_rows(content[0], count, self._spec.hidden, content[1])
                if isinstance(content, tuple)
                else content
            )
            output = self._computed(inputs, one.texts)
        finally:
            self._meter.ends()
        self._meter.ran(turns, started_s, time.monotonic())
        if self._is_last:
            self._tell(one.number, output)
        elif self._hop is None:
            raise BackendError("the next device is not connected yet")
        else:
            message = TextRows(
                self.epoch, one.number, self._hop_bits, one.texts.lengths, one.texts.seconds
            )
            self._hop.send(message, encode_rows(output, self._hop_bits))
        self._meter.sent(one.number, rows)

    def _computed(self, inputs: Tokens | Array, texts: Texts) -> Array:
        """Compute a pass when the other stages of this device let it."""
        self._turnstile.enter(self._ticket)
        try:
            return self._stage.encode(inputs, texts)
        finally:
            self._turnstile.leave(self._ticket)

    def _pause(self) -> float:
        """Let shorter passes of other models compute, between two layers of this one.

        Return the seconds for which they did.
        """
        waited_s = self._turnstile.pause(self._ticket)
        self._meter.paused(waited_s)
        return waited_s

    def _tell(self, number: int, output: Array) -> None:
        """Tell the coordinator the result in messages of RESULT_BYTES, each of whole rows."""
        values = np.ascontiguousarray(output, "<f4")
        step = max(limits.RESULT_BYTES // values[0].nbytes, 1)
        for first in range(0, len(values), step):
            part = values[first : first + step].tobytes()
            self._report(TextsEncoded(self.epoch, number, first, part))

    # ---- what fails -----------------------------------------------------------------------------

    def _give_up(self, number: int, error: Exception) -> None:
        if isinstance(error, ProtocolError):
            self._fail(number, f"the previous device sent invalid rows: {error}")
        elif isinstance(error, WireError):
            log.info("pass %d ends here: %s", number, error)
            if self._hop_lost is not None:
                self._try_report(self._hop_lost)
        elif isinstance(error, BackendError):
            self._fail(number, str(error))
        else:
            log.error("stage failed", exc_info=error)
            self._fail(number, "internal error in the stage; see the agent's log")

    def _fail(self, number: int, reason: str) -> None:
        self._try_report(PassFailed(self.epoch, number, reason))

    def _try_report(self, message: Message) -> None:
        try:
            self._report(message)
        except WireError:
            log.info("not reported, the coordinator is gone: %s", message)
