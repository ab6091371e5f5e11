"""Ethernet interfaces whose cable ends in a file descriptor (TAP), by system calls.

Numbers and structures are those of linux/if_tun.h, linux/sockios.h, linux/if.h and
linux/virtio_net.h.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

DEVICE = "/dev/net/tun"
INTERFACE = "eth0"

VIRTIO_HEADER_BYTES = 10
"""The size of flags, kind, header length, segment size, checksum start and offset.

These come before every frame.
"""

_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
_TUNSETCARRIER = 0x400454E2
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 0x01, 0x02, 0x04
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C
_IFF_UP, _IFF_RUNNING = 0x1, 0x40
_ETHERNET_HEADER_BYTES, _IPV4, _TCP, _SYN, _ACK = 14, b"\x08\x00", 6, 0x02, 0x10
_ETHERNET_OVERHEAD_BYTES = 24
"""The preamble, checksum and gap of a frame on a wire."""


def open_tap(address: str) -> int:
    """Make ``INTERFACE`` in the calling thread's network, with an address in a /24 network.

    The interface lives as long as the descriptor, which does not block. Raises OSError.
    """
    descriptor = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), flags))
    fcntl.ioctl(descriptor, _TUNSETVNETHDRSZ, struct.pack("i", VIRTIO_HEADER_BYTES))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        _set_up(control, "lo")
        for request, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, "255.255.255.0")):
            sockaddr = struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(value))
            fcntl.ioctl(control, request, struct.pack("16s16s8x", INTERFACE.encode(), sockaddr))
        _set_up(control, INTERFACE)
    return descriptor


def set_carrier(descriptor: int, connected: bool) -> None:
    """Plug the cable in or pull it. The host notices."""
    fcntl.ioctl(descriptor, _TUNSETCARRIER, struct.pack("i", int(connected)))


def set_segmentation(descriptor: int, large: bool) -> None:
    """Choose whether the host may send TCP segments of up to 64 KiB as one frame."""
    offload = _TUN_F_CSUM | (_TUN_F_TSO4 | _TUN_F_TSO6 if large else 0)
    fcntl.ioctl(descriptor, _TUNSETOFFLOAD, offload)


def wire_bytes(frame: bytes) -> int:
    """Bytes of a frame on a wire, with the headers of all packets that it stands for."""
    size = len(frame) - VIRTIO_HEADER_BYTES
    kind, header_bytes, segment_bytes = frame[1], frame[2] | frame[3] << 8, frame[4] | frame[5] << 8
    packets = 1
    if kind and segment_bytes:
        packets = max(1, -(-(size - header_bytes) // segment_bytes))
    return size + (packets - 1) * header_bytes + packets * _ETHERNET_OVERHEAD_BYTES


def opens_connection(frame: bytes) -> bool:
    """Whether a frame holds the first packet of a TCP connection over IPv4."""
    packet = VIRTIO_HEADER_BYTES + _ETHERNET_HEADER_BYTES
    if len(frame) < packet + 20 or frame[packet - 2 : packet] != _IPV4 or frame[packet + 9] != _TCP:
        return False
    flags = packet + 4 * (frame[packet] & 0xF) + 13
    return len(frame) > flags and frame[flags] & (_SYN | _ACK) == _SYN


def _set_up(control: socket.socket, interface: str) -> None:
    flags = _IFF_UP | _IFF_RUNNING
    fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", interface.encode(), flags))
