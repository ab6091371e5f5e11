"""A stage that several devices share: the lead announces each pass, and all members run it.

The lead's stage looks like any other stage to agent.relay. The other members run passes in a thread
of their own. Passes are numbered from 1. Every member runs each of them, or leaves it early
(agent.mesh). All compute with equal hidden rows, so the lead too takes the rows as it sent them.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Protocol

import numpy as np

from agent.mesh import Mesh, TeamLost, TeamStopped
from agent.pace import PacedStage
from agent.team_logits import JoinedLogits, encode_logits, pick
from agent.team_sum import TeamSum
from backends.base import ALL_LOGITS, Array, Artifacts, BackendError, Stage, Tokens
from backends.base import TeamSum as Sum
from model.errors import UnsupportedModelError
from model.share import Share, share_spec
from model.spec import ModelSpec
from wire import limits
from wire.activations import HopBits, decode_rows, encode_rows, payload_bytes
from wire.codec import encode
from wire.connection import Connection
from wire.errors import ProtocolError, WireError
from wire.messages import LoadStage, Message, PeerHello, PeerLost, TeamLogits, TeamPass, TeamTrial

log = logging.getLogger(__name__)

LEAD = 0
"""The lead's place among the members."""

INTERNAL_ERROR = "internal error in the stage; see the agent's log"

ROW_SUMS = 25
CHUNK_SUMS = 5
MAX_SUMS = 1000
"""The sums of one measurement of one row and of a chunk, and the most that a lead may ask for."""


class LoadShare(Protocol):
    """Loads blocks of a model, with the sum if it is a share's."""

    def __call__(
        self, spec: ModelSpec, artifacts: Artifacts, team_sum: Sum | None = None, /
    ) -> Stage: ...


class Team:
    """This device's place in a team, from LoadStage on until ``close``."""

    def __init__(
        self,
        request: LoadStage,
        device: str,
        spec: ModelSpec,
        report: Callable[[Message], None],
    ) -> None:
        """``spec`` is the whole model's. ``report`` sends to the coordinator.

        Raises BackendError if the request does not fit together.
        """
        members = request.team
        if device not in members or len(set(members)) != len(members) or len(members) < 2:
            raise BackendError("the coordinator sent a team that this device is no member of")
        try:
            self.share = Share.from_tuple(request.share)
            self.own_spec = share_spec(spec, self.share)
        except UnsupportedModelError as error:
            raise BackendError(f"this device's share cannot be run: {error}") from error
        self.epoch = request.epoch
        self.spec = spec
        self.slots = request.slots
        self.context_tokens = request.context_tokens
        self.has_head = request.blocks[-1].block == spec.head_block
        self.row_bits: HopBits = 32 if request.sum_bits == 32 else 16
        """The width of hidden rows at the start of a pass. They are sent once, so 8 gain little."""
        self.most_rows = max(limits.PREFILL_CHUNK_TOKENS, self.slots)
        self._key = request.team_key
        self._report = report
        largest = max(
            payload_bytes(self.most_rows, spec.hidden, 32),
            2 * payload_bytes(max(self.slots, 1 + limits.DRAFT_TOKENS), spec.vocab, 32),
        )
        self.mesh = Mesh(request.epoch, members, members.index(device), largest)
        self.sum = TeamSum(self.mesh, spec.hidden, request.sum_bits)
        self.stage: Stage | None = None
        """The loaded stage, which is a LeadStage if this member leads."""
        self.paced: PacedStage | None = None
        """The stage of this member's share, which knows its pace."""
        self._thread: threading.Thread | None = None

    @property
    def leads(self) -> bool:
        return self.mesh.index == LEAD

    @property
    def works(self) -> bool:
        """Whether passes can run: it is not stopped, and no member is lost."""
        return self.mesh.works

    def load(self, load: LoadShare, artifacts: Artifacts) -> Stage:
        """Load this member's blocks, and return the stage. The lead's has the embedding, too.

        Raises what ``load`` raises, and BackendError if there is nothing to share.
        """
        whole = [one for one in artifacts if self.spec.block_kind(one[0]) == "embedding"]
        shared = artifacts[len(whole) :]
        if not shared or (whole and not self.leads):
            raise BackendError("the coordinator sent blocks that this member cannot share")
        embedding = load(self.spec, whole) if whole else None
        try:
            stage = self.paced = PacedStage(
                load(self.own_spec, shared, self.sum), self.epoch, lambda: self.mesh.waited_s
            )
        except BaseException:  # Also when cancelled, the embedding does not stay.
            if embedding is not None:
                embedding.close()
            raise
        self.stage = LeadStage(self, stage, embedding) if self.leads else stage
        return self.stage

    def admits(self, hello: PeerHello) -> bool:
        """Whether a peer is a member before this one, which connects here."""
        return (
            bool(self._key)
            and hello.device in self.mesh.devices[: self.mesh.index]
            and hmac.compare_digest(hello.team_key, self._key)
        )

    def add(self, device: str, connection: Connection) -> None:
        """Own the connection to another member. With the last one, this member runs passes.

        Raises ProtocolError if the device is no other member, or the team is complete.
        """
        if self.mesh.add(device, connection) and not self.leads and self.stage is not None:
            self._thread = threading.Thread(
                target=self._run, args=(self.stage,), name="team", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """End the current pass, and run no other. The others are not told why.

        They wait for this member until the coordinator has loaded them again.
        """
        self.mesh.stop()

    def close(self) -> None:
        """Stop, and close the connections. A member that does not lead closes its stage, too.

        The lead's stage belongs to its relay, which must have been closed after ``stop``.
        """
        self.mesh.stop()
        if self._thread is not None:
            self._thread.join()
        if self.stage is not None and not self.leads:
            self.stage.close()
        self.mesh.close()

    # ---- the thread of a member that does not lead ----------------------------------------------

    def _run(self, stage: Stage) -> None:
        """Run the lead's passes until the team ends."""
        while True:
            try:
                self._run_next(stage)
            except TeamStopped:
                return
            except TeamLost as error:
                log.info("the team has ended: %s", error.reason)
                with contextlib.suppress(WireError):
                    self._report(PeerLost(self.epoch, error.device, error.reason))
                return
            except BackendError as error:  # The lead tells the coordinator.
                log.info("a pass of the team failed: %s", error)
            except Exception:  # The outermost loop of the thread, which serves other passes.
                log.exception("a pass of the team failed")

    def _run_next(self, stage: Stage) -> None:
        mesh = self.mesh
        message, payload = mesh.receive(LEAD, at_rest=True)
        number = getattr(message, "number", 0)
        if number != mesh.number + 1:
            raise self._wrong(f"pass {number} behind pass {mesh.number}")
        mesh.number = number
        if isinstance(message, TeamPass):
            try:
                self._check(message)
                rows = decode_rows(payload, message.rows, self.spec.hidden, message.bits)
            except ProtocolError as error:
                raise self._wrong(str(error)) from error
            with leaving_early(mesh):
                self._pass(stage, message, rows)
        elif isinstance(message, TeamTrial) and (
            0 < message.rows <= self.most_rows and 0 < message.sums <= MAX_SUMS
        ):
            with leaving_early(mesh):
                for _ in range(message.sums):
                    self.sum(np.ones((message.rows, self.spec.hidden), np.float32))
        else:
            raise self._wrong(f"{type(message).__name__} in place of a pass")

    def _pass(self, stage: Stage, message: TeamPass, rows: Array) -> None:
        wanted = message.candidates
        slots, positions = message.slots, message.positions
        if len(slots) == 1:
            count = message.logits if wanted else 0
            output = stage.forward(slots[0], positions[0], rows, logits=count)
        else:
            output = stage.decode(slots, positions, rows)
        if wanted:
            first = self.share.vocab[0]
            logits, ids = pick(output, first, wanted)
            count, each = logits.shape
            answer = TeamLogits(self.epoch, message.number, count, each, first)
            body = encode_logits(logits, ids)
            self.mesh.send(LEAD, encode(answer, len(body)), body)

    def _check(self, message: TeamPass) -> None:
        """Raise ProtocolError unless a pass fits this member's stage."""
        slots, positions, rows = message.slots, message.positions, message.rows
        alone = len(slots) == 1
        if not (
            0 < rows <= self.most_rows
            and len(slots) == len(positions)
            and (alone or len(slots) == rows == len(set(slots)))
            and all(0 <= slot < self.slots for slot in slots)
            and all(0 <= at <= self.context_tokens - (rows if alone else 1) for at in positions)
            and 0 < message.logits <= min(rows, 1 + limits.DRAFT_TOKENS)
            and ALL_LOGITS <= message.candidates <= (self.spec.vocab if self.has_head else 0)
            and (self.has_head or not message.candidates)
        ):
            raise ProtocolError("a pass that does not fit the stage")

    def _wrong(self, what: str) -> TeamLost:
        return self.mesh.lose(self.mesh.devices[LEAD], f"the lead of the team sent {what}")


class LeadStage(Stage):
    """The stage of a whole team, as its lead runs it.

    Errors of another member are BackendErrors. If a member is lost, all calls raise TeamLost.
    Logits are valid until the next call.
    """

    def __init__(self, team: Team, share: Stage, embedding: Stage | None) -> None:
        self._team = team
        self._mesh = team.mesh
        self._share = share
        self._embedding = embedding
        self._logits = JoinedLogits(team.spec.vocab)
        self._lock = threading.Lock()
        """Held for a pass or a trial."""

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
    ) -> Array:
        if self._embedding is not None:
            inputs = self._embedding.forward(slot, position, inputs)
        with self._lock:
            return self._pass((slot,), (position,), inputs, int(logits))

    def decode(
        self, slots: Sequence[int], positions: Sequence[int], inputs: Array | Tokens
    ) -> Array:
        if self._embedding is not None:
            inputs = self._embedding.decode(slots, positions, inputs)
        with self._lock:
            return self._pass(tuple(slots), tuple(positions), inputs, 1)

    def measure(self) -> tuple[float, int, float]:
        """Return the median seconds of a sum of one row, a chunk's rows, and those of its sum."""
        chunk_rows = limits.PREFILL_CHUNK_TOKENS
        with self._lock:
            return self._sum_s(1, ROW_SUMS), chunk_rows, self._sum_s(chunk_rows, CHUNK_SUMS)

    @property
    def memory_bytes(self) -> int:
        whole = 0 if self._embedding is None else self._embedding.memory_bytes
        return whole + self._share.memory_bytes

    @property
    def kept_files(self) -> Mapping[Path, str]:
        whole = {} if self._embedding is None else self._embedding.kept_files
        return {**whole, **self._share.kept_files}

    def close(self) -> None:
        """Free the stages. The connections belong to the team."""
        self._share.close()
        if self._embedding is not None:
            self._embedding.close()

    def _pass(
        self,
        slots: tuple[int, ...],
        positions: tuple[int, ...],
        inputs: Array | Tokens,
        logits: int,
    ) -> Array:
        team, mesh = self._team, self._mesh
        wanted = 0
        if logits and team.has_head:
            wanted = self.candidates if self.candidates < team.spec.vocab else ALL_LOGITS
        count, bits = len(inputs), team.row_bits
        mesh.check()
        payload = encode_rows(inputs.astype(np.float32, copy=False), bits)
        rows = decode_rows(payload, count, team.spec.hidden, bits)
        mesh.number += 1
        message = TeamPass(
            team.epoch, mesh.number, slots, positions, count, bits, wanted, max(logits, 1)
        )
        self._announce(encode(message, len(payload)), payload)
        with leaving_early(mesh, flush=True):
            if len(slots) == 1:
                most = logits if wanted else 0
                output = self._share.forward(slots[0], positions[0], rows, logits=most)
            else:
                output = self._share.decode(slots, positions, rows)
            return self._joined(output, wanted) if wanted else output

    def _announce(self, frame: bytes, payload: memoryview) -> None:
        for other in self._mesh.others:
            self._mesh.send(other, frame, payload)

    def _joined(self, own: Array, wanted: int) -> Array:
        """Return logits [n, vocab] from this member's [n, own vocab] and those of the others."""
        first = self._team.share.vocab[0]
        joined = self._logits
        joined.begin(len(own))
        joined.put(*pick(own, first, wanted), first)
        for other in self._mesh.others:
            message, payload = self._mesh.receive(other)
            try:
                if not isinstance(message, TeamLogits) or message.number != self._mesh.number:
                    raise ProtocolError(f"{type(message).__name__} in place of logits")
                joined.take(message, payload, wanted)
            except ProtocolError as error:
                raise self._mesh.lose(self._mesh.devices[other], f"it sent {error}") from error
        return joined.logits

    def _sum_s(self, rows: int, sums: int) -> float:
        team, mesh = self._team, self._mesh
        mesh.check()
        mesh.number += 1
        self._announce(encode(TeamTrial(team.epoch, mesh.number, rows, sums)), memoryview(b""))
        times_s = []
        with leaving_early(mesh, flush=True):
            for _ in range(sums):
                partial = np.ones((rows, team.spec.hidden), np.float32)
                started_s = time.perf_counter()
                team.sum(partial)
                times_s.append(time.perf_counter() - started_s)
        return median(times_s)


@contextlib.contextmanager
def leaving_early(mesh: Mesh, *, flush: bool = False) -> Iterator[None]:
    """Tell the other members if the current pass ends with an error of this member.

    flush: hand over all frames before the error goes on, because this member sends nothing at rest.
    """
    try:
        yield
    except WireError:  # The team has ended or was stopped.
        raise
    except Exception as error:  # The others must hear of any error, which then goes on.
        mesh.leave(str(error) if isinstance(error, BackendError) else INTERNAL_ERROR)
        if flush:
            mesh.flush()
        raise
