"""The agent: finds the coordinator, joins, carries out its requests and sends heartbeats.

The main thread reads the control connection, and a heartbeat thread writes to it. One worker
carries out the long requests (measure, fetch, load) in order. Other threads belong to modules:
agent.quiet measures again in idle moments, agent.gauges reads sensors, agent.relay runs the stage,
agent.integrity hashes its files, agent.hop has two, and agent.peers one for each peer. An agent
that loses the coordinator keeps its stage and searches again. The next coordinator takes the stage
over or has it unloaded.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial

import psutil

from agent.blocks import BlockCache, CacheError, remove_leftovers
from agent.config import AgentConfig, claim, device_identity
from agent.credentials import Credentials
from agent.files import FileExchange
from agent.gauges import Gauges
from agent.links import Link, Measuring
from agent.loaded import encode
from agent.loading import Source, StageLoader
from agent.memory import FreeMemory
from agent.peers import PeerServer, connect_peer, measure_link
from agent.quality import StreamedModel, measure_quality
from agent.quiet import Cancelled, Figures, QuietMoments
from agent.relay import NOT_LOADED
from agent.stages import Stages
from agent.team import LeadStage
from backends.base import Backend, BackendError
from backends.registry import backend_class
from calibration.device import profile_at_start
from calibration.layers import measure_call, measure_model
from calibration.machine import is_wireless
from calibration.trial import Trials
from model.errors import ModelError
from model.memory import memory_bytes
from model.spec import ModelSpec
from wire import limits
from wire.addresses import is_everywhere, is_loopback, is_own, reachable_addresses
from wire.connection import Connection, Listener, protocol_of_silent
from wire.errors import ConnectFailed, ConnectionLost, NoTls, ProtocolError, WireError
from wire.exhaustive import assert_never
from wire.hygiene import clean
from wire.messages import (
    PROTOCOL_VERSION,
    AgentHello,
    BlocksFound,
    CancelRequest,
    ConnectStage,
    ConnectTeam,
    CoordinatorWelcome,
    DeviceMeasured,
    DevicesKnown,
    Done,
    EncodeTexts,
    Endpoint,
    FetchBlocks,
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
    MeasureTeam,
    Message,
    ModelMeasured,
    Progress,
    ReleaseSequence,
    RequestFailed,
    SequenceFailed,
    StartSequence,
    TakeTrace,
    TeamMeasured,
    TraceTaken,
    UnloadStage,
)
from wire.profile import DeviceProfile
from wire.service import ServiceManager
from wire.versions import Stranger, shoal_version

log = logging.getLogger(__name__)

RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0)
"""The pauses between attempts to join. The last one repeats. The first is short, because a
coordinator waits a moment for a device of which only the connection ended."""

KEPT_S = 600.0
"""A stage is kept for so long without a coordinator. It holds memory that others may need."""

SETTLE_S = 0.05
"""The pause between two looks at a pass that still runs."""

Request = (
    MeasureModel
    | MeasureModelAgain
    | MeasureDevice
    | MeasureQuality
    | MeasureLink
    | LoadStage
    | ConnectStage
    | ConnectTeam
    | MeasureTeam
    | FetchBlocks
    | UnloadStage
    | MakeFiles
    | TakeTrace
)


class Agent:
    """One device of the shoal."""

    def __init__(
        self,
        config: AgentConfig,
        say: Callable[[str], None],
        service: ServiceManager | None = None,
    ) -> None:
        """``say`` shows the user one line.

        Raises ConfigError, IdentityError, BackendError, ConnectFailed.
        """
        self._config = config
        self._say = say
        self._service = service or ServiceManager()
        self._joined = ""
        self._run = secrets.token_hex(8)
        self._attempts = 0
        self._stop = threading.Event()
        self._control: Connection | None = None
        """The newest connection to a coordinator, whether it has welcomed this agent or not."""
        self._line: Connection | None = None
        """The connection that a coordinator has welcomed. None while there is none."""
        self._lost_s = 0.0
        """When the last one was lost, by the monotonic clock."""
        self._told = ""
        self._cancelled: set[int] = set()
        """Cancelled requests of this connection."""
        self._links: dict[str, Link] = {}
        """Maps a peer's device to its link: the reported figures and newer samples."""
        self._measuring = Measuring()
        with contextlib.ExitStack() as unlocking:  # If it cannot start, others may.
            self._state_lock = unlocking.enter_context(claim(config.state_dir))
            remove_leftovers(config.cache_dir)
            self._device = device_identity(config.state_dir)
            # Nobody waits for the measurements only to hear that a token is needed.
            self._credentials = Credentials(config, self._device)
            profile = profile_at_start(
                backend=config.backend,
                cache_dir=config.cache_dir,
                known=config.calibration_path,
                memory_limit_bytes=config.memory_bytes,
                storage_limit_bytes=config.storage_bytes,
                threads=config.threads,
                watts=config.watts,
                exact=config.exact,
            )
            unlocking.pop_all()
        self._figures = Figures(config, profile)
        self._free_memory = self._followed_memory(profile)
        self._gauges = Gauges()
        self._call_s = 0.0
        """The call overhead, if it was measured later than the profile for lack of files."""
        self._carrying_out = False
        """Whether a request is running."""
        self._trials = Trials.of(
            profile,
            config.cache_dir,
            config.trials_path,
            exact=config.exact,
            fast_prompts=config.fast_prompts,
        )
        self._cache = BlockCache(config.cache_dir, profile.storage_bytes)
        self._listener = Listener(
            config.bind_host, config.data_port, answerer=self._credentials.of_others()
        )
        self._peers = PeerServer(self._device, self._listener, self._credentials.contacts)
        self._peers.files = self._cache.held
        self._stages = Stages(self._peers)
        self._loader = StageLoader(
            config,
            self._device,
            self._figures,
            self._trials,
            self._cache,
            self._credentials,
            self._stages,
            self._report,
        )

    def run(self) -> None:
        """Serve until ``stop`` is called."""
        self._peers.start()
        self._service.ready()
        attempt = 0
        try:
            while not self._stop.is_set():
                self._alive()
                try:
                    self._settle()
                    connection, coordinator = self._join()
                    attempt = 0
                    self._serve(connection, coordinator)
                except WireError as error:
                    if not self._stop.is_set():
                        self._tell(f"{error}; trying again")
                self._stop.wait(RETRY_S[min(attempt, len(RETRY_S) - 1)])
                attempt += 1
        finally:
            self._stages.keep()
            self._service.stopping()
            self._peers.close()
            self._state_lock.close()

    def stop(self) -> None:
        """End ``run`` soon. Safe in a signal handler and from any thread."""
        self._stop.set()
        control = self._control
        if control is not None:
            control.close()

    @cached_property
    def _backend(self) -> Backend:
        """The backend, imported at first use. An idle agent holds no accelerator library."""
        return backend_class(self._config.backend)()

    def _followed_memory(self, profile: DeviceProfile) -> FreeMemory | None:
        """Return what follows the machine's memory. That of an accelerator is not followed."""
        if profile.memory_total_bytes != memory_bytes()[1]:
            return None
        return FreeMemory(
            profile.memory_bytes, self._config.memory_bytes, lambda: memory_bytes()[0]
        )

    def _memory_limit(self) -> int | None:
        """The bytes that stages may take, or None if a request is under way that may take some."""
        if self._free_memory is None or self._carrying_out:
            return None
        return self._free_memory.look(tuple(stage.epoch for stage in self._stages))

    # ---- stages without a coordinator -----------------------------------------------------------

    def _alive(self) -> None:
        """Feed the watchdog while no coordinator is there. End stages that nobody took over."""
        self._service.alive()
        if self._stages and time.monotonic() - self._lost_s > KEPT_S:
            log.warning("no coordinator for %.0f s: the stages are unloaded", KEPT_S)
            self._stages.keep()
            self._show_stages()

    def _keep_stages(self) -> None:
        """End all sequences of the stages, and keep the stages for the next coordinator."""
        self._lost_s = time.monotonic()
        self._stages.forget()

    def _settle(self) -> None:
        """Wait for the pass that runs. An agent that could not unload its stage must not join."""
        while self._stages.run and not self._stop.wait(SETTLE_S):
            self._service.alive()

    def _show_stages(self) -> None:
        """Show the service manager what is loaded."""
        self._service.status(f"{self._joined}, {self._stages.words}")

    def _report(self, message: Message) -> None:
        """Send news of a stage to the coordinator. Raises WireError while there is none."""
        line = self._line
        if line is None:
            raise ConnectionLost("no coordinator is there")
        line.send(message)

    # ---- joining --------------------------------------------------------------------------------

    def _join(self) -> tuple[Connection, Endpoint]:
        """Return a control connection that the coordinator has welcomed, and its address."""
        if self._config.coordinator is not None:
            candidates: tuple[Endpoint, ...] = (self._config.coordinator,)
        else:
            from wire.discovery import find_coordinator  # With zeroconf, for who searches.

            self._service.status(f"searching for cluster {self._config.cluster!r} by mDNS")
            candidates = find_coordinator(
                self._config.cluster,
                self._stop,
                lambda: self._tell(
                    f"no coordinator of cluster {self._config.cluster!r} answers by mDNS yet; "
                    "start one, or name it with --coordinator HOST:PORT"
                ),
                self._alive,
                self._credentials.coordinator,
            )
        failure: WireError | None = None
        for endpoint in candidates:
            self._alive()
            try:
                return self._join_at(endpoint), endpoint
            except WireError as error:  # Another address may be the right one.
                # An answer at an address of this machine says nothing about another machine's
                # coordinator.
                if failure is None or not is_own(endpoint.host) or is_own(candidates[0].host):
                    failure = error
        raise failure or ConnectFailed("stopped")

    def _join_at(self, endpoint: Endpoint) -> Connection:
        started_s = time.monotonic()
        try:
            return self._welcomed_at(endpoint)
        except (ConnectionLost, NoTls) as error:
            # An older version closes at once and in silence, and does not speak TLS.
            if self._stop.is_set() or time.monotonic() - started_s > limits.HEARTBEAT_S:
                raise
            protocol = protocol_of_silent(endpoint)
            if protocol is None or protocol == PROTOCOL_VERSION:
                raise
            raise ConnectFailed(Stranger(endpoint.host, protocol).story()) from error

    def _welcomed_at(self, endpoint: Endpoint) -> Connection:
        caller = self._credentials.to_coordinator("control")
        connection = Connection.connect(endpoint, caller=caller)
        self._control = connection
        if self._stop.is_set():
            connection.close()
        try:
            connection.set_receive_timeout(limits.LIVENESS_S)
            connection.send(self._hello(connection))
            answer = clean(connection.receive()[0])
        except WireError:
            connection.close()
            raise
        if isinstance(answer, CoordinatorWelcome) and answer.cluster != self._config.cluster:
            connection.close()
            raise ConnectFailed(
                f"{connection.peer} is the coordinator of cluster {answer.cluster!r}, and this "
                f"agent wants {self._config.cluster!r}: give it --cluster {answer.cluster}, or the "
                "address of another coordinator"
            )
        if isinstance(answer, CoordinatorWelcome):
            connection.set_receive_timeout(limits.COORDINATOR_PATIENCE_S)
            self._joined = (
                f"joined cluster {answer.cluster!r} at {connection.peer} as {answer.name}"
            )
            self._tell(self._joined)
            self._remember()
            self._stages.keep(answer.keeps)
            self._show_stages()
            return connection
        connection.close()
        if isinstance(answer, JoinRefused):
            raise ConnectFailed(f"the coordinator refused: {answer.reason}")
        raise ProtocolError(f"{connection.peer} is not a coordinator")

    def _remember(self) -> None:
        """Remember the coordinator's key, if the agent has joined by an invite."""
        try:
            self._credentials.joined()
        except OSError as error:
            log.warning("the next start needs the token again: %s", error.strerror)

    def _tell(self, state: str) -> None:
        """Show the user the progress of joining, if it has changed."""
        self._service.status(state)
        if state != self._told:
            self._told = state
            self._say(state)

    def _hello(self, connection: Connection) -> AgentHello:
        """Describe this agent and the addresses at which others reach it.

        Loopback is valid on this machine only. It is included only if there is no other address.
        """
        port = self._listener.port
        found = reachable_addresses(self._listener.host)
        here = connection.local_host
        everywhere = is_everywhere(self._listener.host) and (":" in here) == (
            ":" in self._listener.host
        )
        if everywhere:  # Agents probably reach us at the address that the coordinator does.
            found = tuple(dict.fromkeys((here, *found)))
        shared = tuple(host for host in found if not is_loopback(host))
        self._attempts += 1
        return AgentHello(
            device=self._device,
            name=self._config.name,
            version=shoal_version(),
            endpoints=tuple(Endpoint(host, port) for host in shared or found),
            profile=replace(
                self._figures.told_profile(), wireless=is_wireless(connection.local_host)
            ),
            cluster=self._config.cluster,
            run=self._run,
            attempt=self._attempts,
            port=port if everywhere else 0,
            advertised=tuple(Endpoint(e.host, e.port or port) for e in self._config.advertise),
            kept=self._stages.keep_working(),
        )

    # ---- the control connection -----------------------------------------------------------------

    def _serve(self, connection: Connection, coordinator: Endpoint) -> None:
        """Carry out requests until the connection ends, which raises WireError."""
        requests: queue.Queue[Request | None] = queue.Queue()
        ended = threading.Event()
        self._cancelled = set()
        self._line = connection
        quiet = QuietMoments(
            self._figures,
            self._measuring,
            lambda: not (self._stages or self._carrying_out) and requests.empty(),
            connection.send,
            self._memory_limit,
        )
        threads = [
            threading.Thread(target=self._beat, args=(connection, ended), name="heartbeat"),
            threading.Thread(target=quiet.run, args=(ended,), name="quiet"),
            threading.Thread(target=self._gauges.run, args=(ended,), name="gauges"),
            threading.Thread(
                target=self._work, args=(connection, coordinator, requests), name="worker"
            ),
        ]
        try:
            for thread in threads:
                thread.daemon = True
                thread.start()
        except RuntimeError as error:  # The process cannot have more threads.
            self._line = None
            ended.set()  # Those that were started end.
            connection.close()
            raise ConnectFailed(f"cannot serve the coordinator: {error}") from error
        try:
            while True:
                message = clean(connection.receive()[0])  # Heartbeats come every second.
                self._service.alive()
                self._take(message, connection, requests)
        except WireError:
            connection.close()
            requests.put(None)
            if not self._stop.is_set():
                # A running load belongs to this connection, not to the next.
                while threads[-1].is_alive():
                    threads[-1].join(limits.HEARTBEAT_S)
                    self._service.alive()
            raise
        finally:
            # Ctrl-C does not wait for running requests. They end with the process.
            self._line = None
            connection.close()
            ended.set()
            requests.put(None)
            self._keep_stages()

    def _take(
        self,
        message: Message,
        connection: Connection,
        requests: queue.Queue[Request | None],
    ) -> None:
        """Answer one message of the coordinator, or leave it to the worker.

        Raises WireError, and ProtocolError for a message that a coordinator does not send.
        """
        if isinstance(message, FindBlocks):
            # At once, because another device waits for it while this one may be loading.
            found = self._cache.find(message.sha256s)
            connection.send(BlocksFound(message.request, found))
        elif isinstance(message, Request):
            requests.put(message)
        elif isinstance(message, CancelRequest):
            self._cancelled.add(message.request)
        elif isinstance(message, StartSequence):
            relay = self._stages.relay_of(message.epoch)
            if relay is None:
                connection.send(SequenceFailed(message.epoch, message.sequence, NOT_LOADED))
            else:
                relay.start(message)
        elif isinstance(message, EncodeTexts):
            encode(message, self._stages.relay_of(message.epoch), connection)
        elif isinstance(message, ReleaseSequence):
            relay = self._stages.relay_of(message.epoch)
            if relay is not None:
                relay.release(message.sequence)
        elif isinstance(message, DevicesKnown):
            self._credentials.learn(message)
        elif not isinstance(message, Heartbeat):
            raise ProtocolError(f"unexpected {type(message).__name__} from coordinator")

    def _beat(self, connection: Connection, ended: threading.Event) -> None:
        try:
            while not ended.wait(limits.HEARTBEAT_S):
                available_bytes = psutil.virtual_memory().available
                load, celsius = self._gauges.load, self._gauges.celsius
                connection.send(Heartbeat(available_bytes, load, celsius, self._stages.beats))
        except WireError:
            pass  # The reader of the connection sees the loss too, and decides.

    def _work(
        self,
        connection: Connection,
        coordinator: Endpoint,
        requests: queue.Queue[Request | None],
    ) -> None:
        # Any end of this thread ends the connection, because the coordinator must not wait for
        # ever.
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
        match request:
            case MeasureModel() | MeasureModelAgain():
                with self._measuring:
                    return self._measure_model(request, connection, coordinator)
            case MeasureDevice():
                return self._measure_device(request, connection)
            case MeasureQuality():
                with self._measuring:
                    return self._measure_quality(request, connection, coordinator)
            case MeasureLink():
                return self._measure_link(request)
            case LoadStage():
                return self._load(request, connection, coordinator)
            case ConnectStage():
                return self._connect_stage(request)
            case ConnectTeam():
                return self._connect_team(request)
            case MeasureTeam():
                return self._measure_team(request)
            case FetchBlocks():
                source = self._source(request.request, connection, coordinator)
                return self._loader.fetch(request, source)
            case UnloadStage():
                if request.epoch:
                    self._stages.end(request.epoch)
                else:
                    self._stages.keep()
                self._show_stages()
                return Done(request.request)
            case MakeFiles():
                return self._exchange(request.request, connection, coordinator).make(request)
            case TakeTrace():
                relay = self._stages.relay_of(request.epoch)
                passes = () if relay is None else relay.traced(request.sequences)
                return TraceTaken(request.request, round(1e6 * time.monotonic()), passes)
            case _:
                return assert_never(request)

    def _measure_device(self, request: MeasureDevice, connection: Connection) -> Message:
        if self._stages:
            raise BackendError("a stage is loaded, and measuring would delay it: unload it first")
        progress = self._progress(connection, request.request, "measure", "steps")
        with self._measuring:
            self._figures.measure_device(lambda: progress(0, 1))
        return DeviceMeasured(request.request, self._figures.told_profile())

    def _measure_link(self, request: MeasureLink) -> Message:
        with self._measuring, self._connect(request) as peer:
            figures, conditions = measure_link(peer)
        self._links[request.device] = Link(request.device, figures)
        return LinkMeasured(
            request.request,
            figures.rtt_s,
            figures.bytes_per_s,
            figures.rtt_p90_s,
            conditions,
        )

    def _connect_stage(self, request: ConnectStage) -> Message:
        relay = self._stages.relay_of(request.epoch)
        if relay is None:
            raise BackendError("the stage to connect is not loaded")
        relay.connect(
            self._connect(request),
            self._links.get(request.device) or Link(request.device),
            self._measuring,
        )
        return Done(request.request)

    def _connect_team(self, request: ConnectTeam) -> Message:
        team = self._stages.team_of(request.epoch)
        connection = self._connect(request)
        try:
            team.add(request.device, connection)
        except WireError:
            connection.close()
            raise
        return Done(request.request)

    def _measure_team(self, request: MeasureTeam) -> Message:
        stage = self._stages.team_of(request.epoch).stage
        if not isinstance(stage, LeadStage):
            raise BackendError("this device does not lead its team, so it cannot measure the sum")
        with self._measuring:
            return TeamMeasured(request.request, *stage.measure())

    def _exchange(
        self, request: int, connection: Connection, coordinator: Endpoint
    ) -> FileExchange:
        progress = self._progress(connection, request, "files", "bytes")
        caller = self._credentials.to_coordinator("blocks")
        return FileExchange(self._device, self._cache, coordinator, caller, progress)

    def _supplied(self, request: int, connection: Connection, coordinator: Endpoint) -> Backend:
        """Return the backend for ``request``; the shoal makes the files that it lacks."""
        exchange = self._exchange(request, connection, coordinator)
        self._backend.supplier = partial(exchange.supply, self._config.backend)
        return self._backend

    def _connect(self, request: MeasureLink | ConnectStage | ConnectTeam) -> Connection:
        return connect_peer(
            self._device,
            request.device,
            request.endpoints,
            caller=self._credentials.to_device(request.device),
            contacts=self._credentials.contacts,
            hop_key=request.hop_key if isinstance(request, ConnectStage) else b"",
            team_key=request.team_key if isinstance(request, ConnectTeam) else b"",
        )

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
        self._trials.require_widths(spec, request.bits, partial(progress, 0, 0), backend.probe)
        if request.shares and backend.probe().shares:
            self._trials.require_shares(spec, request.bits, partial(progress, 0, 0))
        again = isinstance(request, MeasureModelAgain)
        if not self._figures.profile.call_s and (again or not self._call_s):
            self._call_s = measure_call(backend, threads, self._config.cache_dir, exact=exact)
        timings = measure_model(
            spec,
            request.bits,
            backend,
            threads=threads,
            store=store.again() if again else store,
            progress=progress,
            directory=self._config.cache_dir,
            exact=exact,
            together=request.together,
            shares=request.shares,
        )
        store.note_model(request.spec, request.bits)
        self._figures.told(spec, timings)
        return ModelMeasured(request.request, timings, self._figures.profile.call_s or self._call_s)

    def _measure_quality(
        self, request: MeasureQuality, connection: Connection, coordinator: Endpoint
    ) -> Message:
        progress = self._progress(connection, request.request, "quality", "steps")
        spec = ModelSpec.from_dict(request.spec)
        if request.backend in ("", self._config.backend):
            bits = {bits for _, widths in request.wanted for bits in widths}
            self._trials.require_widths(spec, bits, partial(progress, 0, 0))
        source = StreamedModel(
            spec,
            request.blocks,
            self._cache,
            coordinator,
            self._device,
            self._credentials.to_coordinator("blocks"),
            request.prepared,
        )
        measure_quality(
            request,
            source,
            self._supplied(request.request, connection, coordinator),
            threads=self._config.threads,
            directory=self._config.cache_dir,
            memory_bytes=self._figures.profile.memory_bytes,
            progress=progress,
            report=connection.send,
        )
        return Done(request.request)

    def _load(self, request: LoadStage, connection: Connection, coordinator: Endpoint) -> Message:
        backend = self._supplied(request.request, connection, coordinator)
        source = self._source(request.request, connection, coordinator)
        try:
            answer = self._loader.load(request, backend, source)
        finally:
            self._show_stages()
        stage = self._stages.find(request.epoch)
        if stage is not None:
            self._say(f"loaded {stage.blocks}")
        return answer

    def _source(self, request: int, connection: Connection, coordinator: Endpoint) -> Source:
        fetched = self._progress(connection, request, "fetch", "bytes")
        waiting = partial(self._progress(connection, request, "load", "steps"), 0, 0)
        return Source(coordinator, fetched, waiting)

    def _progress(
        self, connection: Connection, request: int, phase: str, unit: str
    ) -> Callable[[int, int], None]:
        """Return a function that reports progress, and raises Cancelled if cancelled."""
        report, cancelled = _Throttled(connection, request, phase, unit), self._cancelled

        def progress(done: int, total: int) -> None:
            if request in cancelled:
                raise Cancelled("cancelled")
            report(done, total)

        return progress


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
