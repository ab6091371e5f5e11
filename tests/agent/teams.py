"""Teams on loopback sockets for tests: every member with its own peer server, in one process."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import numpy as np

from agent.mesh import Mesh
from agent.peers import PeerServer, connect_peer
from agent.relay import Relay
from agent.team import Team
from backends.base import Array, Artifacts, BackendError, Stage, TeamSum, Tokens
from model.artifact import Tensor
from model.checkpoint import Checkpoint
from model.reference import ReferenceModel
from model.share import Share, share_tensors
from model.spec import ModelSpec
from tests.team import shares_of
from wire.activations import HopBits
from wire.connection import Connection, Listener
from wire.messages import (
    BlockRef,
    Endpoint,
    LoadStage,
    Message,
    Sampling,
    StartSequence,
    TokenSampled,
)

Result = TypeVar("Result")

EPOCH = 7
TEAM_KEY = b"known to members"
CONTEXT = 160
ANSWER_S = 60.0


class ReferenceStage(Stage):
    """The reference with a cache for each slot; ``broken`` slots fail before a cut's sum."""

    def __init__(
        self,
        spec: ModelSpec,
        first_block: int,
        blocks: Sequence[Mapping[str, Tensor]],
        slots: int,
        team_sum: TeamSum | None = None,
    ) -> None:
        """``spec`` and ``blocks`` are those of a share if there is a sum."""
        self.broken: dict[int, int] = {}
        """Maps a slot to the sum of its passes that fails: 0 is the first."""
        self.passes = 0
        self.before_sum: Callable[[], None] = lambda: None
        self._has_head = first_block + len(blocks) == spec.block_count
        self._sum: TeamSum = team_sum or (lambda partial: partial)
        self._slot = self._sums = 0
        self._models = [
            ReferenceModel(spec, blocks, first_block=first_block, team_sum=self._summed)
            for _ in range(slots)
        ]

    @classmethod
    def whole(cls, checkpoint: Checkpoint, blocks: range, slots: int = 1) -> ReferenceStage:
        tensors = [checkpoint.block(block) for block in blocks]
        return cls(checkpoint.spec, blocks[0], tensors, slots)

    def _summed(self, partial: Array) -> Array:
        self.before_sum()
        if self.broken.get(self._slot) == self._sums:
            raise BackendError("this slot is broken")
        self._sums += 1
        return self._sum(partial.astype(np.float32))

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
    ) -> Array:
        self.passes += 1
        self._slot, self._sums = slot, 0
        rows: Array = self._models[slot].forward(inputs, position)
        if not self._has_head:
            return rows
        return rows[len(rows) - logits :]

    @property
    def memory_bytes(self) -> int:
        return 1

    def close(self) -> None:
        self._models = []


class Member:
    """A device of a team. What it would tell the coordinator is in ``reports``."""

    def __init__(
        self,
        device: str,
        devices: Sequence[str],
        checkpoint: Checkpoint,
        blocks: range,
        share: Share,
        *,
        sum_bits: HopBits,
        slots: int,
    ) -> None:
        spec = checkpoint.spec
        self.device = device
        self.blocks = blocks
        self.reports: queue.Queue[Message] = queue.Queue()
        request = LoadStage(
            1,
            EPOCH,
            {},
            tuple(BlockRef("0" * 64, 1, block) for block in blocks),
            slots,
            CONTEXT,
            "",
            b"",
            team=tuple(devices),
            share=share.to_tuple(),
            team_key=TEAM_KEY,
            sum_bits=sum_bits,
        )
        self.team = Team(request, device, spec, self.reports.put)
        self.stages: list[ReferenceStage] = []

        def load(own: ModelSpec, artifacts: Artifacts, team_sum: TeamSum | None = None, /) -> Stage:
            blocks = [
                share_tensors(spec, block, checkpoint.block(block), share)
                if team_sum
                else checkpoint.block(block)
                for block, _ in artifacts
            ]
            self.stages.append(ReferenceStage(own, artifacts[0][0], blocks, slots, team_sum))
            return self.stages[-1]

        self.stage = self.team.load(load, [(block, Path()) for block in blocks])
        self.listener = Listener("127.0.0.1", 0)
        self.peers = PeerServer(device, self.listener)
        self.peers.teams = (self.team,)
        self.peers.start()

    @property
    def share_stage(self) -> ReferenceStage:
        return self.stages[-1]

    def connect(self, other: Member) -> None:
        endpoint = Endpoint("127.0.0.1", other.listener.port)
        connection = connect_peer(self.device, other.device, [endpoint], team_key=TEAM_KEY)
        self.team.add(other.device, connection)

    def close(self) -> None:
        self.team.close()
        self.peers.close()


@contextmanager
def team_of(
    checkpoint: Checkpoint,
    weights: Sequence[int],
    *,
    sum_bits: HopBits = 32,
    slots: int = 1,
    first_block: int = 0,
    end_block: int | None = None,
) -> Iterator[list[Member]]:
    """Connected members with shares in proportion to ``weights``; the first leads."""
    spec = checkpoint.spec
    end = spec.block_count if end_block is None else end_block
    devices = [f"member-{index}" for index in range(len(weights))]
    members = [
        Member(
            device,
            devices,
            checkpoint,
            range(max(first_block, index > 0), end),
            share,
            sum_bits=sum_bits,
            slots=slots,
        )
        for index, (device, share) in enumerate(zip(devices, shares_of(spec, weights), strict=True))
    ]
    try:
        for index, member in enumerate(members):
            for other in members[index + 1 :]:
                member.connect(other)
        yield members
    finally:
        for member in members:
            member.team.stop()
        for member in members:
            member.close()


class Ring:
    """The relay of a team that is the whole ring, as the lead runs it."""

    def __init__(self, members: Sequence[Member], spec: ModelSpec, slots: int = 1) -> None:
        self.lead = members[0]
        self.relay = Relay(
            self.lead.stage,
            spec,
            self.lead.blocks,
            epoch=EPOCH,
            slots=slots,
            context_tokens=CONTEXT,
            hop_bits=32,
            report=self.lead.reports.put,
        )

    def start(
        self, number: int, prompt: Sequence[int], sampling: Sampling, slot: int = 0, chunk: int = 64
    ) -> None:
        self.relay.start(StartSequence(EPOCH, number, slot, tuple(prompt), sampling, chunk))

    def answers(self, count: int) -> dict[int, list[int]]:
        """The tokens of ``count`` sequences, by number, once all have finished."""
        tokens: dict[int, list[int]] = {}
        while count:
            message = self.lead.reports.get(timeout=ANSWER_S)
            assert isinstance(message, TokenSampled), message
            tokens.setdefault(message.sequence, []).append(message.token)
            count -= bool(message.finish)
        return tokens

    def close(self) -> None:
        self.lead.team.stop()
        self.relay.close()


@contextmanager
def meshes_of(
    members: int, *, largest_bytes: int = 16 << 20, silence_s: float = ANSWER_S
) -> Iterator[list[Mesh]]:
    """Connected meshes of one team, without stages."""
    devices = [f"member-{index}" for index in range(members)]
    meshes = [
        Mesh(EPOCH, devices, index, largest_bytes, silence_s=silence_s) for index in range(members)
    ]
    with ExitStack() as stack:
        for mesh in meshes:
            stack.callback(mesh.close)
        for first, second in combinations(range(members), 2):
            near, far = connected()
            meshes[first].add(devices[second], near)
            meshes[second].add(devices[first], far)
        yield meshes


def connected() -> tuple[Connection, Connection]:
    """Both ends of a connection on loopback."""
    listener = Listener("127.0.0.1", 0)
    near = Connection.connect(Endpoint("127.0.0.1", listener.port))
    far = listener.accept()
    listener.close()
    assert far is not None
    return near, far


def together(calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run calls at once in threads of their own, and return their results in order."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(ANSWER_S) for future in [pool.submit(call) for call in calls]]
