"""A stage at work: rows come in, run through the blocks, and go on to the next device.

The ring is first stage -> ... -> last stage -> first stage. Prompt chunks and single tokens take
the same way; the last stage samples, and its token is the first stage's next input. One lock
serialises the stage; it is held for one forward pass at a time, so that a cancelled sequence stops
at the next one. The coordinator is told every token but is not waited for.

Single tokens run in the thread that received them. Prompt chunks wait in a queue with a thread of
its own: a connection that is not read for as long as some chunks take looks dead to its sender.
What goes on leaves by agent.hop.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from agent.hop import Hop
from agent.links import Link, Measuring
from agent.sampler import Sampler
from backends.base import Array, BackendError, Stage, Tokens
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
    Sampling,
    SequenceFailed,
    StartSequence,
    TokenSampled,
)

log = logging.getLogger(__name__)

INTERNAL_ERROR = "internal error in the stage; see the agent's log"


@dataclass(slots=True)
class _Sequence:
    """The generation that holds a KV slot. ``sampler`` exists on the last stage only."""

    number: int
    slot: int
    position: int
    """Rows that have been run: where the next ones go."""
    sampling: Sampling | None
    sampler: Sampler | None
    sampled_tokens: int = 0


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
    ) -> None:
        """``hop_bits``: of each value that goes on to the next device. ``report`` sends to the
        coordinator; it may raise WireError, which ends the relay.
        """
        self.epoch = epoch
        self._stage = stage
        self._spec = spec
        self._is_first = blocks.start == 0
        self._is_last = blocks.stop == spec.block_count
        self._slots = slots
        self._context_tokens = context_tokens
        self._hop_bits = hop_bits
        self._report = report
        self._lock = threading.Lock()
        self._table_lock = threading.Lock()
        """Guards what follows; never held while the stage runs or a message is sent."""
        self._sequences: dict[int, _Sequence] = {}
        self._newest: dict[int, int] = {}
        """Slot -> the newest sequence that held it: numbers only grow."""
        self._waiting: deque[tuple[Activation | TokenSampled, memoryview]] = deque()
        """What the queue's thread has to do; the first is what it is doing."""
        self._hop: Hop | None = None
        self._closed = False

    def connect(self, connection: Connection, link: Link, measuring: Measuring) -> None:
        """Set the way to the next device of the ring. Not used where the stage is alone."""
        self._hop = Hop(
            connection,
            link,
            measuring,
            on_lost=lambda reason: self._try_report(PeerLost(self.epoch, link.device, reason)),
            on_news=self._try_report,
        )

    def close(self) -> None:
        """Drop every sequence, the hop and the stage; waits for a running forward pass."""
        self._closed = True
        if self._hop is not None:
            self._hop.close()
        with self._lock:
            with self._table_lock:
                self._sequences.clear()
            self._stage.close()

    # ---- what arrives ---------------------------------------------------------------------------

    def start(self, message: StartSequence) -> None:
        """Run a prompt through the first stage, chunk by chunk; returns when all are on the way."""
        prompt = np.asarray(message.prompt, dtype=np.int64)
        chunk_tokens = message.chunk_tokens
        if (
            not self._is_first
            or not self._fits(message.slot, 0, len(prompt))
            or not 0 < chunk_tokens <= limits.PREFILL_CHUNK_TOKENS
        ):
            self._fail(message.sequence, "the coordinator sent a prompt that does not fit")
            return
        if not len(prompt) or prompt.min() < 0 or prompt.max() >= self._spec.vocab:
            self._fail(message.sequence, "the prompt has tokens outside the vocabulary")
            return
        sequence = self._open(message.sequence, message.slot, message.sampling)
        if sequence is None:
            return
        for begin in range(0, len(prompt), chunk_tokens):
            end = min(begin + chunk_tokens, len(prompt))
            self._run(sequence, prompt[begin:end], last=end == len(prompt))

    def deliver(self, message: Message, payload: memoryview) -> None:
        """Take a data-plane message from a peer; what belongs to another epoch is dropped."""
        if not isinstance(message, (Activation, TokenSampled)) or message.epoch != self.epoch:
            return
        rows = message.rows if isinstance(message, Activation) else 1
        if isinstance(message, Activation) and (
            self._is_first
            or not self._fits(message.slot, message.position, rows)
            or len(payload) != payload_bytes(rows, self._spec.hidden, message.bits)
        ):
            self._fail(message.sequence, "the previous device sent rows that do not fit")
            return
        with self._table_lock:
            queued = bool(self._waiting) or rows > 1
            room = not queued or self._enqueue(message, payload)
        if not queued:
            self._take(message, payload)
        elif not room:
            self._fail(message.sequence, "the previous device sends more than the context holds")

    def release(self, number: int) -> None:
        """Forget a sequence: what still arrives for it is dropped."""
        with self._table_lock:
            for slot, sequence in list(self._sequences.items()):
                if sequence.number == number:
                    del self._sequences[slot]

    def _enqueue(self, message: Activation | TokenSampled, payload: memoryview) -> bool:
        """Add to the queue if it has room; starts its thread. The caller holds the table's lock."""
        # A prompt that was cancelled, and the one that came after it.
        most_bytes = 2 * self._slots * self._context_tokens * self._spec.hidden * 4
        if len(payload) + sum(len(held) for _, held in self._waiting) > most_bytes:
            return False
        self._waiting.append((message, payload))
        if len(self._waiting) == 1:
            threading.Thread(target=self._work_off, name="chunks", daemon=True).start()
        return True

    def _work_off(self) -> None:
        """Take what waits, in order, until nothing does."""
        more = True
        while more:
            message, payload = self._waiting[0]
            try:
                self._take(message, payload)
            except MemoryError:  # Of a long chunk; what waits behind it may well fit.
                log.exception("no memory to unpack a chunk")
                self._fail(message.sequence, INTERNAL_ERROR)
            with self._table_lock:
                self._waiting.popleft()
                more = bool(self._waiting)

    def _take(self, message: Activation | TokenSampled, payload: memoryview) -> None:
        if isinstance(message, TokenSampled):
            sequence = self._current(message.sequence)
            if sequence is not None and self._is_first and 0 <= message.token < self._spec.vocab:
                self._run(sequence, np.array([message.token], dtype=np.int64), last=True)
            return
        if message.position == 0 and message.sampling is not None:
            sequence = self._open(message.sequence, message.slot, message.sampling)
        else:
            sequence = self._current(message.sequence)
        if sequence is None or sequence.position != message.position:
            return  # Released here, and still on its way from the device before.
        try:
            rows = decode_rows(payload, message.rows, self._spec.hidden, message.bits)
        except ProtocolError as error:
            self._fail(message.sequence, f"the previous device sent what is no activation: {error}")
            return
        self._run(sequence, rows, last=message.last)

    # ---- what goes on ---------------------------------------------------------------------------

    def _run(self, sequence: _Sequence, inputs: Array | Tokens, *, last: bool) -> None:
        """One forward pass and what follows from it; all further ones where the stage is alone."""
        try:
            while True:
                begin = sequence.position
                with self._lock:
                    if self._closed or self._sequences.get(sequence.slot) is not sequence:
                        return
                    output = self._stage.forward(
                        sequence.slot, begin, inputs, logits=last and self._is_last
                    )
                    sequence.position += len(inputs)
                if not self._is_last:
                    self._next().send(
                        Activation(
                            self.epoch,
                            sequence.number,
                            sequence.slot,
                            begin,
                            len(inputs),
                            self._hop_bits,
                            last,
                            sequence.sampling if begin == 0 else None,
                        ),
                        encode_rows(output, self._hop_bits),
                    )
                    return
                if not last:
                    return
                token = self._sample(sequence, output)
                if token is None or not self._is_first:
                    return
                inputs = np.array([token], dtype=np.int64)
        except BackendError as error:
            self._fail(sequence.number, str(error))
        except WireError as error:
            # Lost is the hop, which says so itself, or the coordinator, which needs no telling.
            log.info("sequence %d ends here: %s", sequence.number, error)
        except Exception:
            log.exception("stage failed")
            self._fail(sequence.number, INTERNAL_ERROR)

    def _sample(self, sequence: _Sequence, logits: Array) -> int | None:
        """Sample, tell both ends; the token if the generation goes on."""
        sampler, sampling = sequence.sampler, sequence.sampling
        if sampler is None or sampling is None:
            return None
        token = sampler.sample(logits[0])
        index = sequence.sampled_tokens
        sequence.sampled_tokens += 1
        finish: FinishReason = ""
        if token in sampling.stop_tokens:
            finish = "stop"
        elif (
            sequence.sampled_tokens >= sampling.max_tokens
            or sequence.position >= self._context_tokens
        ):
            finish = "length"
        message = TokenSampled(self.epoch, sequence.number, index, token, finish)
        if not finish and not self._is_first:
            self._next().send(message)
        self._report(message)
        return None if finish else token

    def _next(self) -> Hop:
        if self._hop is None:
            raise BackendError("the next device is not connected yet")
        return self._hop

    def _fail(self, number: int, reason: str) -> None:
        self._try_report(SequenceFailed(self.epoch, number, reason))

    def _try_report(self, message: Message) -> None:
        try:
            self._report(message)
        except WireError:
            log.info("not reported, the coordinator is gone: %s", message)

    # ---- bookkeeping ----------------------------------------------------------------------------

    def _open(self, number: int, slot: int, sampling: Sampling) -> _Sequence | None:
        """Give the slot to a new sequence, whoever held it is over; None for one from the past."""
        if sampling.seed < 0:
            self._fail(number, "the seed is negative")
            return None
        sampler = Sampler(sampling) if self._is_last else None
        sequence = _Sequence(number, slot, 0, sampling, sampler)
        with self._table_lock:
            if number <= self._newest.get(slot, number - 1):
                return None  # Cancelled, and still on its way when the slot was given on.
            self._newest[slot] = number
            self._sequences[slot] = sequence
        return sequence

    def _current(self, number: int) -> _Sequence | None:
        with self._table_lock:
            held = self._sequences.values()
            return next((item for item in held if item.number == number), None)

    def _fits(self, slot: int, position: int, rows: int) -> bool:
        return (
            0 <= slot < self._slots
            and position >= 0
            and rows > 0
            and position + rows <= self._context_tokens
        )
