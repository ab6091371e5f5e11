"""The agent: find the coordinator, join, carry out what it asks, and say that one is alive.

Threads: the main one reads the control connection; a heartbeat thread writes to it; one worker
carries out the long requests (measure, fetch, load) in order; agent.relay has one that runs the
stage, agent.hop two, agent.peers one per peer. Losing the coordinator ends the stage, not the
agent: it searches again.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from agent.blocks import BlockCache, CacheError, remove_leftovers
from agent.config import AgentConfig, claim, device_identity
from agent.files import FileExchange
from agent.links import Link, Measuring
from agent.peers import PeerServer, connect_peer, measure_link_steadily
from agent.quality import StreamedModel, measure_quality
from agent.quiet import Cancelled, Figures, QuietMoments
from agent.relay import Relay
from backends.base import Backend, BackendError, StageOptions
from backends.registry import backend_class
from calibration.device import profile_in_child
from calibration.layers import measure_call, measure_model
from calibration.machine import is_wireless
from model.errors import ModelError
from model.spec import ModelSpec
from wire import limits
from wire.connection import Connection, Listener
from wire.discovery import find_coordinator, reachable_addresses
from wire.errors import ConnectFailed, ProtocolError, WireError
from wire.messages import (
    AgentHello,
    BlockRef,
    BlocksFound,
    CancelRequest,
    ConnectStage,
    CoordinatorWelcome,
    DeviceMeasured,
    Done,
    Endpoint,
    FindBlocks,
    Heartbeat,
    JoinRefused,
    LinkMeasured,
    LoadStage,
    MakeFiles,
    MeasureDevice,
    MeasureLink,
    MeasureModel,
    MeasureModelAgain,
    MeasureQuality,
    Message,
    ModelMeasured,
    Progress,
    ReleaseSequence,
    RequestFailed,
    SequenceFailed,
    StageLoaded,
    StartSequence,
    UnloadStage,
)
from wire.service import ServiceManager

log = logging.getLogger(__name__)

RETRY_S = (0.5, 1.0, 2.0, 5.0)
"""Pauses between attempts to join; the last one repeats."""

Request = (
    MeasureModel
    | MeasureModelAgain
    | MeasureDevice
    | MeasureQuality
    | MeasureLink
    | FindBlocks
    | LoadStage
    | ConnectStage
    | UnloadStage
    | MakeFiles
)


class Agent:
    """One device of the shoal."""

    def __init__(
        self,
        config: AgentConfig,
        say: Callable[[str], None],
        service: ServiceManager | None = None,
    ) -> None:
        """``say`` shows the user one line. Raises ConfigError, BackendError, ConnectFailed."""
        self._config = config
        self._say = say
        self._service = service or ServiceManager()
        self._joined = ""
        self._stop = threading.Event()
        self._control: Connection | None = None
        self._told = ""
        self._relay: Relay | None = None
        self._cancelled: set[int] = set()
        """Requests of this connection that nobody waits for any more."""
        self._links: dict[str, Link] = {}
        """By the peer's device: what the coordinator knows of them, and what was seen since."""
        self._measuring = Measuring()
        self._state_lock = claim(config.state_dir)
        remove_leftovers(config.cache_dir)
        self._device = device_identity(config.state_dir)
        profile = profile_in_child(
            backend=config.backend,
            cache_dir=config.cache_dir,
            memory_limit_bytes=config.memory_bytes,
            storage_limit_bytes=config.storage_bytes,
            threads=config.threads,
            watts=config.watts,
            exact=config.exact,
        )
        self._figures = Figures(config, profile)
        self._call_s = 0.0
        """Where the profile has none: the backend needed files for it that others make."""
        self._carrying_out = False
        """Whether a request is under way."""
        self._cache = BlockCache(config.cache_dir, profile.storage_bytes)
        self._listener = Listener(config.bind_host, config.data_port, token=config.token)
        self._peers = PeerServer(self._device, self._listener, self._deliver)

    def run(self) -> None:
        """Serve until ``stop`` is called."""
        self._peers.start()
        self._service.ready()
        attempt = 0
        try:
            while not self._stop.is_set():
                self._service.alive()
                try:
                    connection, coordinator = self._join()
                    attempt = 0
                    self._serve(connection, coordinator)
                except WireError as error:
                    if not self._stop.is_set():
                        self._tell(f"{error}; trying again")
                self._stop.wait(RETRY_S[min(attempt, len(RETRY_S) - 1)])
                attempt += 1
        finally:
            self._service.stopping()
            self._peers.close()
            self._state_lock.close()

    def stop(self) -> None:
        """End ``run`` soon; safe in a signal handler and from any thread."""
        self._stop.set()
        control = self._control
        if control is not None:
            control.close()

    @cached_property
    def _backend(self) -> Backend:
        """Imported when first used: at rest, an agent need not hold an accelerator's library."""
        return backend_class(self._config.backend)()

    # ---- joining --------------------------------------------------------------------------------

    def _join(self) -> tuple[Connection, Endpoint]:
        """A control connection that the coordinator has welcomed, and where it was found."""
        if self._config.coordinator is not None:
            candidates: tuple[Endpoint, ...] = (self._config.coordinator,)
        else:
            self._service.status(f"searching for cluster {self._config.cluster!r} by mDNS")
            candidates = find_coordinator(
                self._config.cluster,
                self._stop,
                lambda: self._tell(
                    f"no coordinator of cluster {self._config.cluster!r} answers by mDNS yet; "
                    "start one, or name it with --coordinator HOST:PORT"
                ),
                self._service.alive,
            )
        failure: WireError = ConnectFailed("stopped")
        for endpoint in candidates:
            self._service.alive()
            try:
                return self._join_at(endpoint), endpoint
            except WireError as error:  # Of several addresses, another may be the right one.
                failure = error
        raise failure

    def _join_at(self, endpoint: Endpoint) -> Connection:
        connection = Connection.connect(endpoint, token=self._config.token)
        self._control = connection
        if self._stop.is_set():
            connection.close()
        try:
            connection.set_receive_timeout(limits.LIVENESS_S)
            connection.send(self._hello(connection))
            answer, _ = connection.receive()
        except WireError:
            connection.close()
            raise
        if isinstance(answer, CoordinatorWelcome):
            self._joined = (
                f"joined cluster {answer.cluster!r} at {connection.peer} as {answer.name}"
            )
            self._tell(self._joined)
            self._service.status(f"{self._joined}, no stage")
            return connection
        connection.close()
        if isinstance(answer, JoinRefused):
            raise ConnectFailed(f"the coordinator refused: {answer.reason}")
        raise ProtocolError(f"{connection.peer} is not a coordinator")

    def _tell(self, state: str) -> None:
        """Show the user how joining stands, when that has changed."""
        self._service.status(state)
        if state != self._told:
            self._told = state
            self._say(state)

    def _hello(self, connection: Connection) -> AgentHello:
        addresses = dict.fromkeys(
            (connection.local_host, *reachable_addresses(self._config.bind_host))
        )
        return AgentHello(
            device=self._device,
            name=self._config.name,
            version=shoal_version(),
            endpoints=tuple(Endpoint(host, self._listener.port) for host in addresses),
            profile=replace(
                self._figures.told_profile(), wireless=is_wireless(connection.local_host)
            ),
        )

    # ---- the control connection -----------------------------------------------------------------

    def _serve(self, connection: Connection, coordinator: Endpoint) -> None:
        """Carry out requests until the connection ends, which raises WireError."""
        requests: queue.Queue[Request | None] = queue.Queue()
        ended = threading.Event()
        self._cancelled = set()
        quiet = QuietMoments(
            self._figures,
            self._measuring,
            lambda: self._relay is None and not self._carrying_out and requests.empty(),
            connection.send,
        )
        threads = [
            threading.Thread(target=self._beat, args=(connection, ended), name="heartbeat"),
            threading.Thread(target=quiet.run, args=(ended,), name="quiet"),
            threading.Thread(
                target=self._work, args=(connection, coordinator, requests), name="worker"
            ),
        ]
        for thread in threads:
            thread.daemon = True
            thread.start()
        try:
            while True:
                message, _ = connection.receive()  # A heartbeat each second, at least.
                self._service.alive()
                if isinstance(message, Request):
                    requests.put(message)
                elif isinstance(message, CancelRequest):
                    self._cancelled.add(message.request)
                elif isinstance(message, StartSequence):
                    relay = self._relay_of(message.epoch)
                    if relay is None:
                        reason = "the stage is not loaded"
                        connection.send(SequenceFailed(message.epoch, message.sequence, reason))
                    else:
                        relay.start(message)
                elif isinstance(message, ReleaseSequence):
                    relay = self._relay_of(message.epoch)
                    if relay is not None:
                        relay.release(message.sequence)
                elif not isinstance(message, Heartbeat):
                    raise ProtocolError(f"unexpected {type(message).__name__} from coordinator")
        except WireError:
            connection.close()
            requests.put(None)
            if not self._stop.is_set():
                # A load that is still under way belongs to this connection, not to the next.
                while threads[-1].is_alive():
                    threads[-1].join(limits.HEARTBEAT_S)
                    self._service.alive()
            raise
        finally:
            # Ctrl-C does not wait for what is under way: it ends with the process.
            connection.close()
            ended.set()
            requests.put(None)
            self._unload()

    def _beat(self, connection: Connection, ended: threading.Event) -> None:
        try:
            while not ended.wait(limits.HEARTBEAT_S):
                connection.send(Heartbeat(psutil.virtual_memory().available))
        except WireError:
            pass  # The reader of the connection sees it too, and decides.

    def _work(
        self,
        connection: Connection,
        coordinator: Endpoint,
        requests: queue.Queue[Request | None],
    ) -> None:
        # Whatever ends this thread ends the connection: the coordinator must not wait for ever.
        with connection, contextlib.suppress(WireError):
            while (request := requests.get()) is not None:
                self._carrying_out = True
                try:
                    answer = self._carry_out(request, connection, coordinator)
                except (BackendError, ModelError, CacheError, WireError, Cancelled) as error:
                    answer = RequestFailed(request.request, str(error))
                except MemoryError:
                    answer = RequestFailed(request.request, "out of memory")
                except Exception as error:
                    log.exception("request failed")
                    answer = RequestFailed(
                        request.request, f"internal error ({error}); see the agent's log"
                    )
                finally:
                    self._carrying_out = False
                connection.send(answer)

    def _carry_out(
        self, request: Request, connection: Connection, coordinator: Endpoint
    ) -> Message:
        if isinstance(request, (MeasureModel, MeasureModelAgain)):
            with self._measuring:
                return self._measure_model(request, connection, coordinator)
        if isinstance(request, MeasureDevice):
            if self._relay is not None:
                raise BackendError("a stage is loaded, which others wait for: unload it first")
            progress = self._progress(connection, request.request, "measure", "steps")
            with self._measuring:
                self._figures.measure_device(lambda: progress(0, 1))
            return DeviceMeasured(request.request, self._figures.told_profile())
        if isinstance(request, MeasureQuality):
            with self._measuring:
                return self._measure_quality(request, connection, coordinator)
        if isinstance(request, FindBlocks):
            return BlocksFound(request.request, self._cache.find(request.sha256s))
        if isinstance(request, MeasureLink):
            with (
                self._measuring,
                self._connect(request) as peer,
            ):
                figures, conditions = measure_link_steadily(peer)
            self._links[request.device] = Link(request.device, figures)
            return LinkMeasured(
                request.request,
                figures.rtt_s,
                figures.bytes_per_s,
                figures.rtt_p90_s,
                conditions,
            )
        if isinstance(request, LoadStage):
            return self._load(request, connection, coordinator)
        if isinstance(request, ConnectStage):
            relay = self._relay_of(request.epoch)
            if relay is None:
                raise BackendError("the stage to connect is not loaded")
            relay.connect(
                self._connect(request),
                self._links.get(request.device) or Link(request.device),
                self._measuring,
            )
            return Done(request.request)
        if isinstance(request, MakeFiles):
            return self._exchange(request.request, connection, coordinator).make(request)
        self._unload()
        return Done(request.request)

    def _exchange(
        self, request: int, connection: Connection, coordinator: Endpoint
    ) -> FileExchange:
        progress = self._progress(connection, request, "files", "bytes")
        return FileExchange(self._device, self._cache, coordinator, self._config.token, progress)

    def _supplied(self, request: int, connection: Connection, coordinator: Endpoint) -> Backend:
        """The backend, which has the shoal make the files that it lacks, for ``request``."""
        exchange = self._exchange(request, connection, coordinator)
        self._backend.supplier = partial(exchange.supply, self._config.backend)
        return self._backend

    def _connect(self, request: MeasureLink | ConnectStage) -> Connection:
        token = self._config.token
        return connect_peer(self._device, request.device, request.endpoints, token=token)

    def _measure_model(
        self,
        request: MeasureModel | MeasureModelAgain,
        connection: Connection,
        coordinator: Endpoint,
    ) -> Message:
        progress = self._progress(connection, request.request, "measure", "steps")
        backend = self._supplied(request.request, connection, coordinator)
        threads, exact = self._config.threads, self._config.exact
        spec, store = ModelSpec.from_dict(request.spec), self._figures.store
        if not (self._call_s or self._figures.profile.call_s):
            self._call_s = measure_call(backend, threads, self._config.cache_dir, exact=exact)
        timings = measure_model(
            spec,
            request.bits,
            backend,
            threads=threads,
            store=store.again() if isinstance(request, MeasureModelAgain) else store,
            progress=progress,
            exact=exact,
        )
        store.note_model(request.spec, request.bits)
        self._figures.told(spec, timings)
        return ModelMeasured(request.request, timings, self._figures.profile.call_s or self._call_s)

    def _measure_quality(
        self, request: MeasureQuality, connection: Connection, coordinator: Endpoint
    ) -> Message:
        progress = self._progress(connection, request.request, "quality", "steps")
        source = StreamedModel(
            ModelSpec.from_dict(request.spec),
            request.blocks,
            self._cache,
            coordinator,
            self._device,
            self._config.token,
        )
        measure_quality(
            request,
            source,
            self._supplied(request.request, connection, coordinator),
            threads=self._config.threads,
            directory=self._config.state_dir / "quality",
            memory_bytes=self._figures.profile.memory_bytes,
            progress=progress,
            report=connection.send,
        )
        return Done(request.request)

    def _load(self, request: LoadStage, connection: Connection, coordinator: Endpoint) -> Message:
        spec = ModelSpec.from_dict(request.spec)
        indices = [ref.block for ref in request.blocks]
        if not indices or indices != list(range(indices[0], indices[0] + len(indices))):
            raise BackendError("the blocks of a stage must be contiguous")
        if indices[0] < 0 or indices[-1] >= spec.block_count:
            raise BackendError("the model has no such blocks")
        self._unload()
        fetched_bytes = self._cache.fetch(
            request.blocks,
            coordinator,
            self._device,
            self._progress(connection, request.request, "fetch", "bytes"),
            token=self._config.token,
        )
        prepared_dir, prepared_bytes = self._prepared(request.blocks)
        started = time.perf_counter()
        stage = self._supplied(request.request, connection, coordinator).load(
            spec,
            [(ref.block, self._cache.path(ref.sha256)) for ref in request.blocks],
            StageOptions(
                request.slots,
                request.context_tokens,
                self._config.threads,
                memory_bytes=self._figures.profile.memory_bytes,
                exact=self._config.exact,
                prepared_dir=prepared_dir,
                prepared_bytes=prepared_bytes,
                fast_prompts=self._config.fast_prompts,
            ),
        )
        self._relay = Relay(
            stage,
            spec,
            range(indices[0], indices[-1] + 1),
            epoch=request.epoch,
            slots=request.slots,
            context_tokens=request.context_tokens,
            hop_bits=request.hop_bits,
            report=connection.send,
        )
        names = dict.fromkeys((spec.block_name(indices[0]), spec.block_name(indices[-1])))
        self._say(f"loaded {' .. '.join(names)}")
        self._service.status(f"{self._joined}, {' .. '.join(names)} of {len(spec.layers)} layers")
        return StageLoaded(
            request.request, stage.memory_bytes, fetched_bytes, time.perf_counter() - started
        )

    def _prepared(self, blocks: Sequence[BlockRef]) -> tuple[Path | None, int]:
        """Where the backend may keep prepared weights, and how many bytes: nowhere if storage
        leaves them no room.

        Exact stages keep none: theirs are many times larger, and nobody is in a hurry.
        """
        factor = self._backend.PREPARED_FACTOR * (2 if self._config.fast_prompts else 1)
        if self._config.exact or factor == 0:
            return None, 0
        size_bytes = int(factor * sum(ref.size_bytes for ref in blocks))
        return self._cache.prepare(blocks, size_bytes), size_bytes

    def _progress(
        self, connection: Connection, request: int, phase: str, unit: str
    ) -> Callable[[int, int], None]:
        """What reports how far ``request`` is, and raises Cancelled once it is cancelled."""
        report, cancelled = _Throttled(connection, request, phase, unit), self._cancelled

        def progress(done: int, total: int) -> None:
            if request in cancelled:
                raise Cancelled("cancelled")
            report(done, total)

        return progress

    # ---- the stage ------------------------------------------------------------------------------

    def _deliver(self, message: Message, payload: memoryview) -> None:
        relay = self._relay
        if relay is not None:
            relay.deliver(message, payload)

    def _relay_of(self, epoch: int) -> Relay | None:
        relay = self._relay
        return relay if relay is not None and relay.epoch == epoch else None

    def _unload(self) -> None:
        relay, self._relay = self._relay, None
        if relay is not None:
            relay.close()
            self._service.status(f"{self._joined}, no stage")


class _Throttled:
    """Reports progress at most five times a second, and always the end."""

    def __init__(self, connection: Connection, request: int, phase: str, unit: str) -> None:
        self._connection, self._request = connection, request
        self._phase, self._unit = phase, unit
        self._last_s = 0.0

    def __call__(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if done < total and now_s - self._last_s < 0.2:
            return
        self._last_s = now_s
        self._connection.send(Progress(self._request, self._phase, done, total, self._unit))


def shoal_version() -> str:
    """The installed version, or "source" where the tree is run uninstalled."""
    try:
        return version("shoal-llm")
    except PackageNotFoundError:
        return "source"
