"""The switch of a testbed: a process that carries frames between the hosts' TAP interfaces.

``python -m testbed.switch DIRECTORY`` makes the interfaces, prints "ready" and forwards until it is
killed. The switch shapes links itself for two reasons. Many kernels lack netem. And a lab's link
joins a pair of hosts, while a queue belongs to one interface. Faults come as lines of JSON over a
Unix socket in the directory.
"""

from __future__ import annotations

import ctypes
import heapq
import itertools
import json
import math
import os
import random
import select
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from testbed import namespaces, tap
from testbed.network import Network, NetworkError

QUEUE_S = 0.05
"""A port or link drops a frame that would wait longer than this, as a small router does."""

_BROADCAST = b"\xff" * 6
_FRAME_BYTES = 1 << 17
_BURST_FRAMES = 16
_NICE = -15
_PR_SET_TIMERSLACK = 29
_REQUEST_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class PortFault:
    """The faults of a host's port. None, or the default, means no fault.

    cut: the carrier goes away too.
    blackhole: every frame is lost, but the carrier stays.
    loses: hosts whose frames from this host are lost. The other direction works.
    firewall: the host can open TCP connections, but nobody can open one to it.

    The other fields replace the described values of every link of the host, in both directions.
    """

    cut: bool = False
    blackhole: bool = False
    firewall: bool = False
    loses: tuple[str, ...] = ()
    multicast: bool = True
    delay_s: float | None = None
    bytes_per_s: float | None = None
    jitter_s: float | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        if (
            (self.delay_s is not None and not 0 <= self.delay_s < math.inf)
            or (self.bytes_per_s is not None and not self.bytes_per_s > 0)
            or (self.jitter_s is not None and not 0 <= self.jitter_s < math.inf)
            or (self.loss is not None and not 0 <= self.loss < 1)
        ):
            raise NetworkError(f"{self}: not possible")


@dataclass(slots=True)
class _Port:
    """A host's port: the times at which it can send and receive again, and its seconds per byte."""

    fault: PortFault
    send_s_per_byte: float = 0.0
    receive_s_per_byte: float = 0.0
    send_free_s: float = 0.0
    receive_free_s: float = 0.0


@dataclass(slots=True)
class _Path:
    """One direction between two hosts, including faults."""

    delay_s: float
    s_per_byte: float
    jitter_s: float
    loss: float
    free_s: float = 0.0
    last_s: float = 0.0


@dataclass(slots=True)
class Fabric:
    """Decides the fate of each frame from the network, the faults, the clock and chance."""

    network: Network
    chance: random.Random = field(default_factory=random.Random)
    dropped: int = 0
    _ports: dict[str, _Port] = field(default_factory=dict)
    _paths: dict[tuple[str, str], _Path] = field(default_factory=dict)
    _owner: dict[bytes, str] = field(default_factory=dict)
    """Maps a hardware address to the host where it was last seen."""

    def __post_init__(self) -> None:
        self._ports = {name: _Port(PortFault()) for name in self.network.hosts}
        self._compile()

    def set_fault(self, host: str, fault: PortFault) -> None:
        """Apply a fault from now on. Frames on their way still arrive."""
        self._ports[host].fault = fault
        self._compile()

    @property
    def loses_frames(self) -> bool:
        """True if some frames are lost by chance. Then each packet must be a frame of its own."""
        return any(path.loss for path in self._paths.values())

    def carry(self, source: str, frame: bytes, now_s: float) -> Iterator[tuple[float, str]]:
        """Yield (time, host) of each arrival of a frame, which includes its virtio header."""
        header = tap.VIRTIO_HEADER_BYTES
        target, origin = frame[header : header + 6], frame[header + 6 : header + 12]
        self._owner[origin] = source
        port = self._ports[source]
        if port.fault.cut or port.fault.blackhole:
            return
        size = tap.wire_bytes(frame)
        sent_s = max(now_s, port.send_free_s)
        if sent_s - now_s > QUEUE_S:
            self.dropped += 1
            return
        port.send_free_s = sent_s + size * port.send_s_per_byte
        to_group = bool(target[0] & 1)
        multicast = to_group and target != _BROADCAST
        known = None if to_group else self._owner.get(target)
        for name in self._ports if known is None else (known,):
            blocked = multicast and not (port.fault.multicast and self._ports[name].fault.multicast)
            if name == source or blocked or name in port.fault.loses:
                continue
            if self._ports[name].fault.firewall and tap.opens_connection(frame):
                continue
            arrival_s = self._through(source, name, size, sent_s)
            if arrival_s is not None:
                yield arrival_s, name

    def reaches(self, host: str) -> bool:
        """False if the host's port loses the frames that are on their way to it."""
        fault = self._ports[host].fault
        return not fault.cut and not fault.blackhole

    def _through(self, source: str, target: str, size: int, sent_s: float) -> float | None:
        """Return when a frame that leaves at ``sent_s`` has arrived whole, or None if it is lost.

        The path and the receiving port pass bytes on as they come (cut-through). So the slowest of
        sender, path and receiver decides, and each is busy for as long as it needs for the frame.
        """
        path = self._paths.get((source, target))
        if path is None or not self.reaches(target):
            return None
        if path.loss and self.chance.random() < path.loss:
            return None
        port = self._ports[target]
        start_s = max(sent_s, path.free_s, port.receive_free_s)
        if start_s - sent_s > QUEUE_S:
            self.dropped += 1
            return None
        path.free_s = max(sent_s, path.free_s) + size * path.s_per_byte
        port.receive_free_s = max(sent_s, port.receive_free_s) + size * port.receive_s_per_byte
        arrival_s = start_s + size * path.s_per_byte + path.delay_s
        if path.jitter_s:
            arrival_s += self.chance.uniform(-path.jitter_s, path.jitter_s)
        # A link does not reorder.
        path.last_s = max(arrival_s, path.last_s)
        return path.last_s

    def _compile(self) -> None:
        """Compute ports and paths again from the faults. Their queues stay."""
        hosts, ports = self.network.hosts, self._ports
        for port in ports.values():
            port.send_s_per_byte = port.receive_s_per_byte = math.inf
        for source, target in itertools.permutations(hosts, 2):
            link = self.network.link(source, target)
            if link is None:
                self._paths.pop((source, target), None)
                continue
            faults = ports[source].fault, ports[target].fault
            delays = [fault.delay_s for fault in faults if fault.delay_s is not None]
            speeds = [fault.bytes_per_s for fault in faults if fault.bytes_per_s is not None]
            s_per_byte = 1 / min(speeds, default=link.bytes_per_s)
            passes = 1.0
            for name, fault in zip((source, target), faults, strict=True):
                passes *= 1 - (hosts[name].loss if fault.loss is None else fault.loss)
            path = self._paths.setdefault((source, target), _Path(0.0, 0.0, 0.0, 0.0))
            path.delay_s = sum(delays) if delays else link.delay_s
            path.s_per_byte = s_per_byte
            path.jitter_s = sum(
                hosts[name].jitter_s if fault.jitter_s is None else fault.jitter_s
                for name, fault in zip((source, target), faults, strict=True)
            )
            path.loss = 1 - passes
            sender, receiver = ports[source], ports[target]
            sender.send_s_per_byte = min(sender.send_s_per_byte, s_per_byte)
            receiver.receive_s_per_byte = min(receiver.receive_s_per_byte, s_per_byte)


class Switch:
    """The switch process: TAP interfaces, the control socket and the queue of frames."""

    def __init__(self, directory: Path) -> None:
        state = json.loads((directory / "state.json").read_text())
        self._fabric = Fabric(Network.from_dict(state["network"]))
        self._network = self._fabric.network
        self._taps: dict[str, int] = {}
        for name in self._network.hosts:
            with namespaces.entered(directory / f"{name}.net"):
                self._taps[name] = tap.open_tap(self._network.address(name))
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.bind(str(directory / "switch.sock"))
        self._control.listen()
        self._set_segmentation()

    def run(self) -> None:
        """Forward frames for ever."""
        names = {descriptor: name for name, descriptor in self._taps.items()}
        control = self._control.fileno()
        descriptors = [*names, control]
        fabric, taps = self._fabric, self._taps
        waiting: list[tuple[float, int, str, bytes]] = []
        count = itertools.count()
        while True:
            now_s = time.monotonic()
            while waiting and waiting[0][0] <= now_s:
                _, _, name, frame = heapq.heappop(waiting)
                if fabric.reaches(name):
                    with suppress(OSError):  # The queue is full, or the interface is down.
                        os.write(taps[name], frame)
            rest_s = max(waiting[0][0] - time.monotonic(), 0) if waiting else None
            # epoll's timer counts whole milliseconds.
            for descriptor in select.select(descriptors, (), (), rest_s)[0]:
                if descriptor == control:
                    self._serve()
                    continue
                for _ in range(_BURST_FRAMES):
                    try:
                        frame = os.read(descriptor, _FRAME_BYTES)
                    except OSError:  # There are no more frames, or the interface is down.
                        break
                    for arrival_s, name in fabric.carry(names[descriptor], frame, time.monotonic()):
                        heapq.heappush(waiting, (arrival_s, next(count), name, frame))

    def _serve(self) -> None:
        """Answer one request: {"host": name, "fault": {field: value}}."""
        connection, _ = self._control.accept()
        with connection:
            request: Mapping[str, Any] = json.loads(connection.recv(_REQUEST_BYTES))
            host, fault = request["host"], fault_from_dict(request["fault"])
            self._fabric.set_fault(host, fault)
            self._set_segmentation()
            tap.set_carrier(self._taps[host], not fault.cut)
            with suppress(OSError):  # The process that asked has ended.
                connection.send(b"done")

    def _set_segmentation(self) -> None:
        for descriptor in self._taps.values():
            tap.set_segmentation(descriptor, not self._fabric.loses_frames)


def request_fault(directory: Path, host: str, fault: PortFault) -> None:
    """Have the switch of ``directory`` set a fault, and wait until it is set. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(10)
        connection.connect(str(directory / "switch.sock"))
        body = {"host": host, "fault": fault_to_dict(fault)}
        connection.send(json.dumps(body).encode())
        if connection.recv(16) != b"done":
            raise OSError("the switch has ended")


def fault_to_dict(fault: PortFault) -> dict[str, Any]:
    """Return the fields that differ from a port without faults."""
    nothing = PortFault()
    return {
        name: getattr(fault, name)
        for name in PortFault.__slots__
        if getattr(fault, name) != getattr(nothing, name)
    }


def fault_from_dict(values: Mapping[str, Any]) -> PortFault:
    """Inverse of ``fault_to_dict``, also after JSON."""
    return PortFault(**{**values, "loses": tuple(values.get("loses", ()))})


def main() -> None:
    switch = Switch(Path(sys.argv[1]))
    with suppress(OSError):
        os.nice(_NICE)
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    print("ready", flush=True)  # noqa: T201 - for the process that started this one
    switch.run()


if __name__ == "__main__":
    main()
