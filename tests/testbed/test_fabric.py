"""The path of a frame through the switch, with the arithmetic in comments."""

from __future__ import annotations

import json
import math
import random

import pytest

from testbed import tap
from testbed.network import Host, Link, Network, NetworkError
from testbed.switch import QUEUE_S, Fabric, PortFault

BROADCAST = b"\xff" * 6
MDNS = bytes.fromhex("01005e0000fb")
ADDRESS = {name: bytes([2, 0, 0, 0, 0, index]) for index, name in enumerate("abc")}


def frame(source: str, target: bytes, size: int = 976) -> bytes:
    """A frame that takes ``size`` + 24 bytes on a wire."""
    return bytes(tap.VIRTIO_HEADER_BYTES) + target + ADDRESS[source] + bytes(size - 12)


def fabric(**options: object) -> Fabric:
    return Fabric(Network({name: Host() for name in "abc"}, **options), random.Random(1))  # type: ignore[arg-type] # options are Network's


def learn(fabric: Fabric) -> None:
    for name in "abc":
        list(fabric.carry(name, frame(name, BROADCAST), 0.0))


def test_a_frame_takes_its_bytes_and_the_delay() -> None:
    # 1000 bytes at 1 MB/s: 1 ms; then 5 ms.
    net = fabric(default=Link(5e-3, 1e6))
    times, hosts = zip(*net.carry("a", frame("a", BROADCAST), 1.0), strict=True)
    assert hosts == ("b", "c")
    assert times == pytest.approx((1.006, 1.006))


def test_frames_wait_for_each_other_on_a_link() -> None:
    net = fabric(default=Link(0.0, 1e6))
    learn(net)
    times = [next(net.carry("a", frame("a", ADDRESS["b"]), 1.0))[0] for _ in range(3)]
    assert times == [pytest.approx(1 + 1e-3 * n) for n in (1, 2, 3)]


def test_a_host_receives_no_faster_than_its_fastest_link() -> None:
    net = fabric(default=Link(0.0, 1e6))
    learn(net)
    (first, _), (second, _) = (
        next(net.carry(name, frame(name, ADDRESS["c"]), 1.0)) for name in "ab"
    )
    assert (first, second) == pytest.approx((1.001, 1.002))


def test_a_slow_link_does_not_hold_up_the_others() -> None:
    # a to b takes 10 ms per frame, a to c 1 ms; the port of a is as fast as its fastest link.
    net = fabric(links={("a", "b"): Link(0.0, 1e5)}, default=Link(0.0, 1e6))
    learn(net)
    assert next(net.carry("a", frame("a", ADDRESS["b"]), 1.0))[0] == pytest.approx(1.010)
    assert next(net.carry("a", frame("a", ADDRESS["c"]), 1.0))[0] == pytest.approx(1.002)


def test_a_full_queue_drops() -> None:
    net = fabric(default=Link(0.0, 1e6))
    learn(net)
    arrived = [list(net.carry("a", frame("a", ADDRESS["b"]), 1.0)) for _ in range(100)]
    # 1 ms each: the frame that would begin after 50 ms is the 52nd.
    assert sum(map(bool, arrived)) == pytest.approx(QUEUE_S * 1e3, abs=2)
    assert net.dropped == 100 - sum(map(bool, arrived))


def test_devices_without_a_link_do_not_reach_each_other() -> None:
    net = fabric(links={("a", "b"): Link(), ("b", "a"): Link()}, default=None)
    assert [name for _, name in net.carry("a", frame("a", BROADCAST), 1.0)] == ["b"]
    assert list(net.carry("c", frame("c", BROADCAST), 1.0)) == []


def test_jitter_spreads_and_does_not_reorder() -> None:
    net = Fabric(
        Network({"a": Host(jitter_s=1e-3), "b": Host()}, default=Link(5e-3)), random.Random(1)
    )
    list(net.carry("b", frame("b", BROADCAST), 0.0))
    times = [next(net.carry("a", frame("a", ADDRESS["b"]), now))[0] - now for now in range(200)]
    assert min(times) < 4.1e-3
    assert max(times) > 5.9e-3
    near = [next(net.carry("a", frame("a", ADDRESS["b"]), 300 + n * 1e-5))[0] for n in range(50)]
    assert near == sorted(near)


def test_loss_is_met_on_both_ends() -> None:
    hosts = {"a": Host(loss=0.2), "b": Host(loss=0.5)}
    net = Fabric(Network(hosts), random.Random(1))
    list(net.carry("b", frame("b", BROADCAST), 0.0))
    arrived = sum(bool(list(net.carry("a", frame("a", ADDRESS["b"]), now))) for now in range(4000))
    # 0.8 * 0.5 of 4000, three standard deviations of 31.
    assert arrived == pytest.approx(1600, abs=93)
    assert net.loses_frames


@pytest.mark.parametrize("fault", [PortFault(cut=True), PortFault(blackhole=True)])
@pytest.mark.parametrize("host", ["a", "b"])
def test_a_lost_link_carries_nothing_until_it_is_healed(host: str, fault: PortFault) -> None:
    net = fabric()
    learn(net)
    net.set_fault(host, fault)
    assert list(net.carry("a", frame("a", ADDRESS["b"]), 1.0)) == []
    assert net.reaches("b") is (host != "b")
    net.set_fault(host, PortFault())
    assert list(net.carry("a", frame("a", ADDRESS["b"]), 1.0)) == [(1.0, "b")]


def test_a_faulty_link_stands_in_for_the_described_one() -> None:
    net = fabric(default=Link(1e-3, 1e6))
    learn(net)
    net.set_fault("b", PortFault(delay_s=0.05, bytes_per_s=1e5))
    # 10 ms for the bytes, 50 ms on the way; a to c is as before.
    assert next(net.carry("a", frame("a", ADDRESS["b"]), 1.0))[0] == pytest.approx(1.060)
    assert next(net.carry("c", frame("c", ADDRESS["a"]), 1.0))[0] == pytest.approx(1.002)


def test_multicast_can_be_lost_alone() -> None:
    net = fabric()
    learn(net)
    net.set_fault("b", PortFault(multicast=False))
    assert [name for _, name in net.carry("a", frame("a", MDNS), 1.0)] == ["c"]
    # Without broadcasts nobody would find anybody's hardware address.
    assert [name for _, name in net.carry("a", frame("a", BROADCAST), 1.0)] == ["b", "c"]
    assert [name for _, name in net.carry("a", frame("a", ADDRESS["b"]), 1.0)] == ["b"]


def test_frames_can_be_lost_in_one_direction_alone() -> None:
    net = fabric()
    learn(net)
    net.set_fault("a", PortFault(loses=("b",)))
    assert list(net.carry("a", frame("a", ADDRESS["b"]), 1.0)) == []
    assert [name for _, name in net.carry("a", frame("a", BROADCAST), 1.0)] == ["c"]
    assert [name for _, name in net.carry("b", frame("b", ADDRESS["a"]), 1.0)] == ["a"]
    net.set_fault("a", PortFault())
    assert list(net.carry("a", frame("a", ADDRESS["b"]), 1.0)) == [(1.0, "b")]


def segment(source: str, target: str, flags: int, protocol: int = 6) -> bytes:
    """A TCP segment with nothing in it, behind an IPv4 header with options."""
    header = bytes([0x46, *bytes(8), protocol, *bytes(14)])
    head = bytes(tap.VIRTIO_HEADER_BYTES) + ADDRESS[target] + ADDRESS[source] + b"\x08\x00"
    return head + header + bytes(13) + bytes([flags]) + bytes(6)


def test_a_firewall_lets_its_host_out_and_nobody_in() -> None:
    syn, answer, ack = 0x02, 0x12, 0x10
    net = fabric()
    learn(net)
    net.set_fault("b", PortFault(firewall=True))

    def passes(source: str, target: str, flags: int, protocol: int = 6) -> bool:
        return bool(list(net.carry(source, segment(source, target, flags, protocol), 1.0)))

    assert not passes("a", "b", syn)
    assert passes("a", "b", answer)
    assert passes("a", "b", ack)
    assert passes("a", "b", syn, protocol=17)
    assert passes("b", "a", syn)
    assert passes("a", "c", syn)
    assert list(net.carry("a", frame("a", ADDRESS["b"], 40), 1.0))


def test_a_large_segment_counts_the_headers_of_its_packets() -> None:
    # 3000 bytes behind a header of 54, in segments of 1448: 3 packets.
    header = bytes([0, 1]) + (54).to_bytes(2, "little") + (1448).to_bytes(2, "little") + bytes(4)
    assert tap.wire_bytes(header + bytes(3054)) == 3054 + 2 * 54 + 3 * 24


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Network({}),
        lambda: Network({"-x": Host()}),
        lambda: Network({"a": Host()}, {("a", "z"): Link()}),
        lambda: Host(loss=1.0),
        lambda: Host(cores=()),
        lambda: Link(-1.0),
        lambda: Link(0.0, 0.0),
        lambda: PortFault(delay_s=math.nan),
        lambda: PortFault(bytes_per_s=0.0),
    ],
)
def test_what_cannot_be_is_refused(wrong: object) -> None:
    with pytest.raises(NetworkError):
        wrong()  # type: ignore[operator] # each is a function


def test_a_network_survives_json() -> None:
    hosts = {"a": Host(20.0, 1 << 30), "b": Host(cores=(0, 1))}
    network = Network(hosts, {("a", "b"): Link(1e-3)}, None)
    assert Network.from_dict(json.loads(json.dumps(network.to_dict()))) == network
