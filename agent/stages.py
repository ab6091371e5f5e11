"""The stages that this device has loaded, each of another deployment.

A device may hold stages of several models. For a moment it may also hold two of one model, when
that moves. Each stage has its own relay or team. One of them computes at a time (agent.turnstile).
A member that does not lead its team is an exception: it runs the passes of the lead at once. If it
waited for its turn here, two teams that share two devices could wait for each other for ever.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from agent.integrity import Watch
from agent.loaded import AnyRelay
from agent.pace import PacedStage
from agent.peers import Entrance, PeerServer
from agent.team import Team
from agent.turnstile import Turnstile
from backends.base import BackendError
from wire.messages import KeptStage, StageBeat

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class LoadedStage:
    """One stage, with what runs it and who may send to it."""

    epoch: int
    blocks: str
    """Its first and last block in words."""
    layers: int
    """The number of layers of the whole model."""
    memory_bytes: int
    files: frozenset[str]
    """The hashes of the files that it was loaded from."""
    relay: AnyRelay | None
    """Runs the stage, unless another member of its team leads."""
    team: Team | None
    """None if this device is alone."""
    paced: PacedStage | None
    entrance: Entrance | None
    """Admits the previous device of the ring. None unless there is a relay."""
    watch: Watch | None = None
    """Hashes the remaining files of the stage, until it is done."""
    is_damaged: bool = False
    """Whether one of its files is damaged. Then it is never kept for another coordinator."""

    @property
    def works(self) -> bool:
        """Whether new sequences can run, as far as this device knows."""
        relay, team = self.relay, self.team
        if self.is_damaged:
            return False
        return (relay is None or relay.works) and (team is None or team.works)

    @property
    def kept(self) -> KeptStage:
        return KeptStage(self.epoch, 0 if self.relay is None else self.relay.newest)

    @property
    def beat(self) -> StageBeat:
        token_s = 0.0 if self.paced is None else self.paced.token_s
        return StageBeat(self.epoch, token_s, None if self.relay is None else self.relay.counts())

    def stop(self) -> None:
        """Run no other pass. Only ``close`` frees the stage."""
        if self.team is not None:
            self.team.stop()  # A pass that waits for another member ends at once.
        if self.relay is not None:
            self.relay.close()

    def close(self) -> None:
        """End all its sequences, wait for the running pass, and free the stage."""
        if self.team is not None:
            self.team.stop()
        if self.watch is not None:
            self.watch.close()
        if self.relay is not None:
            self.relay.close()
        if self.team is not None:
            self.team.close()


class Stages:
    """All loaded stages, oldest first. One thread at a time adds and ends; any thread may read."""

    def __init__(self, peers: PeerServer) -> None:
        """Let ``peers`` admit devices to the stages."""
        self.turnstile = Turnstile()
        """Lets one stage compute at a time."""
        self._peers = peers
        self._loaded: tuple[LoadedStage, ...] = ()

    def __iter__(self) -> Iterator[LoadedStage]:
        return iter(self._loaded)

    def __bool__(self) -> bool:
        return bool(self._loaded)

    @property
    def words(self) -> str:
        """All that is loaded, in words."""
        each = [f"{stage.blocks} of {stage.layers} layers" for stage in self]
        return "; ".join(each) or "no stage"

    @property
    def memory_bytes(self) -> int:
        return sum(stage.memory_bytes for stage in self)

    @property
    def files(self) -> frozenset[str]:
        """The hashes of all files that stages were loaded from."""
        return frozenset().union(*(stage.files for stage in self))

    @property
    def run(self) -> bool:
        """Whether a pass is running."""
        return any(stage.relay is not None and stage.relay.runs for stage in self)

    @property
    def beats(self) -> tuple[StageBeat, ...]:
        return tuple(stage.beat for stage in self)

    def find(self, epoch: int) -> LoadedStage | None:
        """The stage of this deployment, or None."""
        return next((stage for stage in self if stage.epoch == epoch), None)

    def relay_of(self, epoch: int) -> AnyRelay | None:
        """The relay of this deployment, or None if there is none here."""
        stage = self.find(epoch)
        return None if stage is None else stage.relay

    def team_of(self, epoch: int) -> Team:
        """The team of this deployment. Raises BackendError if this device is in none."""
        stage = self.find(epoch)
        if stage is None or stage.team is None:
            raise BackendError("the stage of this team is not loaded")
        return stage.team

    def add(self, stage: LoadedStage) -> None:
        """Add a stage of a deployment that has none here yet."""
        self._set((*self._loaded, stage))

    def end(self, epoch: int) -> None:
        """Unload the stage of a deployment, if it is here."""
        self.keep([stage.epoch for stage in self if stage.epoch != epoch])

    def keep(self, epochs: Collection[int] = ()) -> None:
        """Unload all stages but those of these deployments."""
        ended = [stage for stage in self if stage.epoch not in epochs]
        self._set(tuple(stage for stage in self if stage.epoch in epochs))
        for stage in ended:
            stage.close()

    def keep_working(self) -> tuple[KeptStage, ...]:
        """Unload stages that have lost a neighbour, and return the remaining ones."""
        self.keep([stage.epoch for stage in self if stage.works])
        return tuple(stage.kept for stage in self)

    def forget(self) -> None:
        """End the sequences of all stages."""
        for stage in self:
            if stage.relay is not None:
                stage.relay.forget()

    def _set(self, stages: tuple[LoadedStage, ...]) -> None:
        self._loaded = stages
        self._peers.entrances = tuple(stage.entrance for stage in stages if stage.entrance)
        self._peers.teams = tuple(stage.team for stage in stages if stage.team)
