"""The measured figures of devices and links, from which plans are made.

Agents fill these in, and the coordinator only reads them. All times are seconds, all sizes bytes.
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
    """One device as it measured itself, with the limits that its user set.

    memory_bytes: memory for a stage (weights as executed, KV cache, compute buffers). It is the
        user's limit, or what was free at start less headroom.
    container_bits: the backend's pairs of bits and bits as executed.
    call_s: overhead of a stage's call besides its blocks. It is 0 if measuring it takes files that
        others make; then the first measurement of a model brings it.
    relay_s: seconds of the agent itself for each call; 0 if that was not measured.
    sum_s: seconds of the agent itself for a sum of one row with one other member of a team, without
        any wait for the link; 0 if that was not measured.
    watts: declared power while the device computes.
    on_chip_bytes: bytes of weights in an accelerator's own memory, which cross no bus at a call
        (one byte a weight at 8 bits). None if weights are in ordinary memory.
    makes: pairs of a backend and the version of its compiler, if this device can make its files.
    arithmetic: the backend whose rounding of layers this device shares. It is set if that rounding
        is measured apart from the loss by the weights' bits.
    conditions: the conditions of the figures, by name: memory, disk, call, relay, sum.
    kernel_id: the same for all agents on one running machine, containers included. Empty if
        unknown.
    wireless: whether it sends over the air, which others use too.
    shares: whether the backend loads shares of layers (model/share.py).
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
    shares: bool = False
    sum_s: float = 0.0

    def container(self, bits: int) -> int | None:
        """Return the width in memory of a block stored at ``bits``, or None if it cannot run."""
        return dict(self.container_bits).get(bits)


@dataclass(frozen=True, slots=True)
class BlockTiming:
    """Measured seconds of one block of a given shape at ``bits``.

    variant: index of the shape among the model's distinct layer shapes; 0 for embedding and head.
    decode_s: one row at short context.
    prefill_s_per_token: one token of a chunk. A head sees only a prompt's last row, so this is its
        share in the time of a chunk.
    conditions: None if they were not recorded.
    rows_s: one pass of TIMED_ROWS rows; empty if it was not measured.
    shares_s: (fraction, decode_s, prefill_s_per_token) of shares of the block, by fraction. They
        include the cuts of a layer, but no sums. Empty if none was measured.
    """

    kind: TimingKind
    variant: int
    bits: int
    decode_s: float
    prefill_s_per_token: float
    conditions: Conditions | None = None
    rows_s: tuple[float, ...] = ()
    shares_s: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """The link from ``source`` to ``target``, measured through the relay's own sockets.

    rtt_s: median round trip of a small frame.
    rtt_p90_s: its 90th percentile; 0 if unknown.
    conditions: those at the source; None if the figures come from use.
    """

    source: str
    target: str
    rtt_s: float
    bytes_per_s: float
    rtt_p90_s: float = 0.0
    conditions: Conditions | None = None

    def transfer_s(self, size_bytes: int) -> float:
        """Predict the seconds for ``size_bytes`` to arrive: half a round trip plus the bytes."""
        return self.rtt_s / 2 + size_bytes / self.bytes_per_s
