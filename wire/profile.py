"""What calibration found out about devices and links: the data that plans are made from.

Agents fill these in, the coordinator only reads them. All times are seconds, all sizes bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wire.conditions import Conditions

TIMED_ROWS = (2, 4, 8)
"""Rows of a pass, each of another sequence, that are timed beside one."""

TimingKind = Literal["embedding", "layer", "head"]


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """One device as it measured itself, and what its user lets it give.

    ``memory_bytes`` is what a stage may take (weights as executed, KV cache, compute buffers): the
    user's limit, or what was free at start less headroom. ``container_bits`` lists (bits, bits as
    executed) pairs of the backend. ``call_s`` is what a call of a stage takes besides its blocks; 0
    where measuring it takes files that others make, and comes with the first model measured.
    ``relay_s`` is what the agent itself takes for each call; 0 where that was not measured.
    ``watts`` is what the device draws while it computes, as declared. ``on_chip_bytes``: where an
    accelerator keeps weights, how many (one byte each at 8 bits) cross no bus at a call; None where
    weights are in ordinary memory. ``makes`` lists (backend, version of what makes them) of the
    files that this device can make for others. ``arithmetic`` names the backend whose rounding of
    layers the device's has, where that is measured apart from what the weights' bits lose.
    ``conditions`` are those under which figures were measured, by name: memory, disk, call, relay.
    ``kernel_id`` is the same for all agents on one running machine, containers included; empty:
    not known. ``wireless``: what it sends goes over the air, which others use as well.
    """

    machine: str
    processor: str
    cores: int
    threads: int
    backend: str
    backend_version: str
    container_bits: tuple[tuple[int, int], ...]
    memory_bytes: int
    memory_total_bytes: int
    storage_bytes: int
    memory_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    call_s: float = 0.0
    watts: float | None = None
    on_chip_bytes: int | None = None
    makes: tuple[tuple[str, str], ...] = ()
    arithmetic: str = ""
    conditions: tuple[tuple[str, Conditions], ...] = ()
    kernel_id: str = ""
    wireless: bool = False
    relay_s: float = 0.0

    def container(self, bits: int) -> int | None:
        """Width in memory of a block stored at ``bits``; None where the backend cannot run it."""
        return dict(self.container_bits).get(bits)


@dataclass(frozen=True, slots=True)
class BlockTiming:
    """Measured seconds of one block of a given shape at ``bits``.

    ``variant`` is the index of the block's shape among the model's distinct layer shapes (0 for
    embedding and head). ``decode_s`` is one row at short context, ``prefill_s_per_token`` one
    token of a chunk (of a head, which sees a prompt's last row only: its share in a chunk's time).
    ``conditions``: None where nobody wrote them down. ``rows_s`` is one pass of TIMED_ROWS rows;
    empty where that was not measured.
    """

    kind: TimingKind
    variant: int
    bits: int
    decode_s: float
    prefill_s_per_token: float
    conditions: Conditions | None = None
    rows_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """The link from ``source`` to ``target``, measured through the relay's own sockets.

    ``rtt_s`` is the median round trip of a small frame, ``rtt_p90_s`` its 90th percentile (0 where
    that is not known). ``conditions`` are those at its source; None where it was seen in use.
    """

    source: str
    target: str
    rtt_s: float
    bytes_per_s: float
    rtt_p90_s: float = 0.0
    conditions: Conditions | None = None

    def transfer_s(self, size_bytes: int) -> float:
        """Predicted seconds until ``size_bytes`` have arrived: half a round trip plus the bytes."""
        return self.rtt_s / 2 + size_bytes / self.bytes_per_s
