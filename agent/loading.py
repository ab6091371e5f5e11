"""Makes a loaded stage of a request: fetches its blocks, checks and loads them, and has it run."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from agent.blocks import BlockCache, CacheError
from agent.config import AgentConfig
from agent.credentials import Credentials
from agent.drafter import Drafter, require_whole
from agent.grammars import open_grammars, with_vocabulary
from agent.holders import Holders
from agent.integrity import Contents, Watch, load_whole
from agent.loaded import relay_of
from agent.pace import PacedStage
from agent.peers import Entrance, connect_peer
from agent.quiet import Figures
from agent.relay import Relay
from agent.stages import LoadedStage, Stages
from agent.team import Team
from backends.base import Artifacts, Backend, BackendError, Stage, StageOptions, TeamSum
from calibration.trial import Trials
from model.artifact import read_format
from model.grammar_process import library_version
from model.spec import ModelSpec
from wire.connection import Connection
from wire.errors import WireError
from wire.messages import (
    BlockRef,
    BlocksFetched,
    DraftModel,
    Endpoint,
    FetchBlocks,
    FileRef,
    Holder,
    LoadStage,
    Message,
    StageDamaged,
    StageLoaded,
)

log = logging.getLogger(__name__)

LEAST_WEIGHT = 1e-3
"""With less, a stage would stand still beside others."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the files of a request come from, and who hears how far it is."""

    coordinator: Endpoint
    fetched: Callable[[int, int], None]
    """Gets the bytes that are here, and those that are wanted. Raises Cancelled."""
    waiting: Callable[[], None]
    """Is called while the stage is loaded. Raises Cancelled."""


class StageLoader:
    """Loads stages, one at a time."""

    def __init__(
        self,
        config: AgentConfig,
        device: str,
        figures: Figures,
        trials: Trials,
        cache: BlockCache,
        credentials: Credentials,
        stages: Stages,
        report: Callable[[Message], None],
    ) -> None:
        """``report`` sends news of a loaded stage to the coordinator. Raises WireError."""
        self._config = config
        self._device = device
        self._figures = figures
        self._trials = trials
        self._cache = cache
        self._credentials = credentials
        self._stages = stages
        self._report = report
        self._wanted: frozenset[str] = frozenset()
        """The hashes of the files of a load that runs. A backend may fetch others beside them."""
        cache.in_use = lambda: self._stages.files | self._wanted
        self._had_damage = False
        """Whether a damaged file has stopped a stage. Then the next load hashes all files."""

    def fetch(self, request: FetchBlocks, source: Source) -> BlocksFetched:
        """Make files present that a later load wants. Raises CacheError, WireError."""
        files = with_vocabulary(request.blocks, request.vocabulary)
        fetched_bytes, from_peers_bytes = self._fetch(files, source, set())
        return BlocksFetched(request.request, fetched_bytes, from_peers_bytes)

    def load(self, request: LoadStage, backend: Backend, source: Source) -> StageLoaded:
        """Load a stage beside those that ``request`` keeps, and unload the others first.

        Raises BackendError, CacheError, ModelError and WireError.
        """
        spec = ModelSpec.from_dict(request.spec)
        blocks = _contiguous(request.blocks, spec)
        if not LEAST_WEIGHT <= request.weight <= 1 / LEAST_WEIGHT:
            raise BackendError(f"the coordinator sent a stage of weight {request.weight}")
        if any(rows < 1 for rows in request.rows_at_once):
            raise BackendError("the coordinator sent groups without rows")
        self._stages.keep([epoch for epoch in request.keeps if epoch != request.epoch])
        contents = Contents(check_all_first=self._had_damage)
        fetched_bytes, from_peers_bytes, fetching_s = 0, 0, 0.0
        files = _files(request)
        started_s = time.perf_counter()

        def fetch(wanted: Sequence[FileRef], into: Contents) -> None:
            nonlocal fetched_bytes, from_peers_bytes, fetching_s
            began_s, came = time.perf_counter(), set[Path]()
            into.expect({self._cache.path(ref.sha256): ref.sha256 for ref in wanted})
            every_bytes, peers_bytes = self._fetch(wanted, source, came)
            fetched_bytes += every_bytes
            from_peers_bytes += peers_bytes
            into.trust(came)
            fetching_s += time.perf_counter() - began_s

        team = Team(request, self._device, spec, self._report) if request.team else None
        with self._in_use(files), contextlib.ExitStack() as undo:
            stage = load_whole(
                contents,
                lambda: fetch(files, contents),
                lambda: self._load_stage(
                    backend, request, spec, contents.hashed, source.waiting, team
                ),
                self._cache.remove,
            )
            undo.callback(stage.close)
            self._had_damage = False
            drafter = None
            if request.draft is not None and blocks.start == 0:
                drafter = self._load_drafter(
                    backend, request.draft, request.slots, contents, fetch, source.waiting, stage
                )
                undo.callback(drafter.close)
            loaded = self._run(request, spec, blocks, stage, team, drafter)
            undo.pop_all()
            self._stages.add(loaded)
        loaded.watch = Watch(contents, partial(self.stop_damaged, loaded))
        return StageLoaded(
            request.request,
            loaded.memory_bytes,
            fetched_bytes,
            time.perf_counter() - started_s - fetching_s,
            contents.damaged_files,
            library_version() if request.vocabulary is not None else "",
            from_peers_bytes,
            0 if drafter is None else drafter.memory_bytes,
        )

    @contextlib.contextmanager
    def _in_use(self, files: Sequence[FileRef]) -> Iterator[None]:
        """Keep files from being evicted until their stage is known."""
        self._wanted = frozenset(ref.sha256 for ref in files)
        try:
            yield
        finally:
            self._wanted = frozenset()

    def stop_damaged(self, stage: LoadedStage, path: Path) -> None:
        """Have the coordinator load a stage again that runs from a damaged file, and stop it.

        The coordinator is told first. A stage that stops waits for its running pass, and refuses
        sequences meanwhile: their answers would end instead of beginning again.
        """
        self._had_damage = stage.is_damaged = True
        reason = f"a file of its stage was damaged in its cache ({path.name})"
        log.warning("%s is damaged: the stage stops, and the file is removed", path)
        try:
            self._cache.remove(path)
        except CacheError as error:
            reason = str(error)
        with contextlib.suppress(WireError):  # The coordinator sees the agent's loss.
            self._report(StageDamaged(stage.epoch, reason))
        stage.stop()

    def _fetch(self, files: Sequence[FileRef], source: Source, came: set[Path]) -> tuple[int, int]:
        """Make files present beside those of loaded stages.

        Returns the bytes that came, and how many of them came from other devices.
        """
        with Holders(self._connect) as holders:
            fetched_bytes = self._cache.fetch(
                files,
                source.coordinator,
                self._device,
                source.fetched,
                caller=self._credentials.to_coordinator("blocks"),
                hashed=came,
                holders=holders,
            )
            return fetched_bytes, holders.came_bytes

    def _connect(self, holder: Holder) -> Connection:
        """Connect to a device that has files. Raises WireError."""
        return connect_peer(
            self._device,
            holder.device,
            holder.endpoints,
            caller=self._credentials.to_device(holder.device),
            contacts=self._credentials.contacts,
        )

    def _run(
        self,
        request: LoadStage,
        spec: ModelSpec,
        blocks: range,
        stage: Stage,
        team: Team | None,
        drafter: Drafter | None,
    ) -> LoadedStage:
        """Return a stage that takes rows from its previous device, unless another member leads."""
        paced = stage if isinstance(stage, PacedStage) else None
        names = dict.fromkeys((spec.block_name(blocks[0]), spec.block_name(blocks[-1])))
        loaded = LoadedStage(
            request.epoch,
            " .. ".join(names),
            len(spec.layers),
            stage.memory_bytes + (0 if drafter is None else drafter.memory_bytes),
            frozenset(ref.sha256 for ref in _files(request)),
            relay=None,
            team=team,
            paced=paced if team is None else team.paced,
            entrance=None,
        )
        if team is None or team.leads:
            turnstile = self._stages.turnstile
            grammars = open_grammars(request, self._cache)
            loaded.relay = relay_of(
                request, stage, spec, self._report, grammars, turnstile, drafter
            )
            if team is not None and isinstance(loaded.relay, Relay):
                team.mesh.on_silence = loaded.relay.give_way
            loaded.entrance = Entrance(request.previous, request.hop_key, loaded.relay.deliver)
        return loaded

    def _load_stage(
        self,
        backend: Backend,
        request: LoadStage,
        spec: ModelSpec,
        hashed: frozenset[Path],
        waiting: Callable[[], None],
        team: Team | None,
    ) -> Stage:
        """Load blocks that are in the cache. The files in ``hashed`` are known to be whole."""
        prepared_dir, prepared_bytes = self._prepared(backend, request)
        draft_bytes = 0 if request.draft is None else request.draft.memory_bytes
        options = StageOptions(
            request.slots,
            request.context_tokens,
            self._config.threads,
            memory_bytes=self._free_bytes(draft_bytes),
            exact=self._config.exact,
            prepared_dir=prepared_dir,
            prepared_bytes=prepared_bytes,
            fast_prompts=self._config.fast_prompts,
            hashed=hashed,
        )

        def load(own: ModelSpec, blocks: Artifacts, team_sum: TeamSum | None = None) -> Stage:
            wished = replace(options, team_sum=team_sum)
            return self._tried(backend, own, blocks, wished, waiting)

        artifacts = self._artifacts(request.blocks)
        if team is None:
            return PacedStage(load(spec, artifacts), request.epoch)
        if not backend.probe().shares:
            raise BackendError(f"{self._config.backend} cannot run shares of layers")
        return team.load(load, artifacts)

    def _load_drafter(
        self,
        backend: Backend,
        draft: DraftModel,
        slots: int,
        contents: Contents,
        fetch: Callable[[Sequence[FileRef], Contents], None],
        waiting: Callable[[], None],
        stage: Stage,
    ) -> Drafter:
        """Load a draft model beside ``stage``. Raises BackendError, CacheError, ModelError.

        contents: the files of both. A damaged one of the stage is left to its watch, because the
        stage would go on with what it has read.
        """
        spec = ModelSpec.from_dict(draft.spec)
        own = Contents(check_all_first=self._had_damage)
        own.trust(contents.hashed)
        require_whole(_contiguous(draft.blocks, spec), spec.block_count, encodes=spec.encodes)

        def load() -> Stage:
            options = StageOptions(
                slots,
                draft.context_tokens,
                self._config.threads,
                memory_bytes=self._free_bytes(stage.memory_bytes),
                exact=self._config.exact,
                hashed=own.hashed,
            )
            return self._tried(backend, spec, self._artifacts(draft.blocks), options, waiting)

        try:
            loaded = load_whole(own, lambda: fetch(draft.blocks, own), load, self._cache.remove)
        except BackendError as error:
            raise BackendError(f"the draft model: {error}") from error
        contents.trust(own.hashed)
        contents.damaged_files += own.damaged_files
        drafter = Drafter(loaded, spec.vocab, slots=slots, context_tokens=draft.context_tokens)
        try:
            drafter.warm_up()
        except BaseException:  # Raised again: no model stays that nobody knows.
            drafter.close()
            raise
        return drafter

    def _tried(
        self,
        backend: Backend,
        spec: ModelSpec,
        blocks: Artifacts,
        options: StageOptions,
        waiting: Callable[[], None],
    ) -> Stage:
        """Load blocks that have run in a child process without harm."""
        kinds = [(block, read_format(path)) for block, path in blocks]
        self._trials.require(spec, kinds, waiting)
        return backend.stage(spec, blocks, options)

    def _artifacts(self, refs: Sequence[BlockRef]) -> Artifacts:
        return [(ref.block, self._cache.path(ref.sha256)) for ref in refs]

    def _free_bytes(self, taken_bytes: int) -> int:
        """The memory that loaded stages leave, less ``taken_bytes``."""
        left_bytes = self._figures.profile.memory_bytes - self._stages.memory_bytes
        return max(left_bytes - taken_bytes, 0)

    def _prepared(self, backend: Backend, request: LoadStage) -> tuple[Path | None, int]:
        """Return a folder for prepared weights (None without room) and its size in bytes.

        Exact stages keep none. Their files would be many times larger, and nobody waits for their
        loads.
        """
        factor = backend.PREPARED_FACTOR * (2 if self._config.fast_prompts else 1)
        if self._config.exact or factor == 0:
            return None, 0
        size_bytes = int(factor * sum(ref.size_bytes for ref in request.blocks))
        return self._cache.prepare(request.blocks, size_bytes), size_bytes


def _files(request: LoadStage) -> Sequence[FileRef]:
    """All files that a stage is loaded from. Raises BackendError."""
    draft = () if request.draft is None else request.draft.blocks
    return (*with_vocabulary(request.blocks, request.vocabulary), *draft)


def _contiguous(refs: Sequence[BlockRef], spec: ModelSpec) -> range:
    """Return the blocks of a stage. Raises BackendError if they are not those of one."""
    indices = [ref.block for ref in refs]
    if not indices or indices != list(range(indices[0], indices[0] + len(indices))):
        raise BackendError("the blocks of a stage must be contiguous")
    if indices[0] < 0 or indices[-1] >= spec.block_count:
        raise BackendError("the model has no such blocks")
    return range(indices[0], indices[-1] + 1)
