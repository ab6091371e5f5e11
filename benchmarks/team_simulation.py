"""Teams of 2 to 8 equal devices, simulated from the parts in a lab file.

    python -m benchmarks.team_simulation
    python -m benchmarks.team_simulation --rtt-ms 0.1 0.3 --sum-ms 0.15 0.4 --json

Nothing is run. The parts are those of the lab's first device and first link. The device has times
of a whole layer and head, of shares of them, and of one sum's software. The link has a round trip
and a speed. The arithmetic is printed below the table. It is written apart from the planner's.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from planning.labs.lab import LabModel
from planning.labs.lab_file import read_lab
from wire.activations import HopBits, payload_bytes

LAB = Path(__file__).parents[1] / "examples" / "labs" / "four-pis-8b.yaml"
GROUP = 64
"""MLP columns that are one quantization group: the smallest step of a share."""
SUMS_PER_LAYER = 2
SUM_BITS: HopBits = 16


@dataclass(frozen=True)
class Parts:
    """The parts of which a token's time is put together. Times are seconds."""

    model: LabModel
    kv_heads: int
    layers: int
    layer_s: float
    head_s: float
    share_times: Mapping[float, float]
    sum_s: float
    rtt_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Simulated:
    """One token on a team of so many members. Times are seconds."""

    members: int
    share: float
    """Time of the slowest shares of a layer, relative to the whole layer."""
    layers_s: float
    head_s: float
    one_sum_s: float
    sums_s: float
    pass_s: float
    """The hidden row to the members, and their logits back."""

    @property
    def token_s(self) -> float:
        return self.layers_s + self.head_s + self.sums_s + self.pass_s


def parts_of(path: Path, *, bits: int, layers: int, kv_heads: int) -> Parts:
    """Read the parts of the first device of a lab. Raises LabError, or ValueError if some lack."""
    lab = read_lab(path)
    device, link = lab.devices[0], lab.links[0]
    if lab.model is None or not device.share_times:
        raise ValueError(f"{path}: its first device has no times of shares")
    return Parts(
        lab.model,
        kv_heads,
        layers,
        device.layer_decode_s[bits],
        device.head_s[bits],
        {**device.share_times, 1.0: 1.0},
        device.sum_s,
        link.rtt_s,
        link.bytes_per_s,
    )


def share_time(fraction: float, times: Mapping[float, float]) -> float:
    """Time of a share relative to a whole layer: linear between the shares that are known."""
    known = sorted(times)
    above = next((index for index, share in enumerate(known) if share >= fraction), len(known) - 1)
    low, high = known[max(above, 1) - 1], known[max(above, 1)]
    slope = (times[high] - times[low]) / (high - low)
    return times[low] + slope * (fraction - low)


def halves(model: LabModel, kv_heads: int, members: int) -> list[tuple[float, float]]:
    """For each half of a layer, its part of the weights and the fraction of the busiest member.

    The members wait for each other after each half. KV heads are whole, and columns whole groups.
    """
    by_heads = 2 * model.hidden * (model.q_rows + model.kv_rows) / model.layer_weights
    groups = model.ffn // GROUP
    return [
        (by_heads, -(-kv_heads // members) / kv_heads),
        (1 - by_heads, -(-groups // members) / groups),
    ]


def simulate(parts: Parts, members: int) -> Simulated:
    """Put one token's time together for a team of so many devices. One member is alone."""
    if members == 1:
        layers_s = parts.layers * parts.layer_s
        return Simulated(1, 1.0, layers_s, parts.head_s, 0.0, 0.0, 0.0)
    share = math.fsum(
        part * share_time(fraction, parts.share_times)
        for part, fraction in halves(parts.model, parts.kv_heads, members)
    )
    row_bytes = payload_bytes(1, parts.model.hidden, SUM_BITS)
    wire_s = parts.rtt_s / 2 + (members - 1) * row_bytes / parts.bytes_per_s
    one_sum_s = wire_s + parts.sum_s
    return Simulated(
        members,
        share,
        parts.layers * parts.layer_s * share,
        parts.head_s * share_time(1 / members, parts.share_times),
        one_sum_s,
        SUMS_PER_LAYER * parts.layers * one_sum_s,
        wire_s + parts.rtt_s / 2,
    )


def arithmetic(parts: Parts, found: Simulated) -> str:
    """The sum of one row of the table, with its figures."""
    row_bytes = payload_bytes(1, parts.model.hidden, SUM_BITS)
    return (
        f"{found.members} members: {parts.layers} layers x {1e3 * parts.layer_s:.3g} ms x"
        f" {found.share:.3f} + head {1e3 * found.head_s:.1f} ms"
        f" + {SUMS_PER_LAYER * parts.layers} sums x ({1e3 * parts.rtt_s / 2:.3g} ms one way"
        f" + {found.members - 1} x {row_bytes} B / {parts.bytes_per_s / 1e6:.4g} MB/s"
        f" + {1e3 * parts.sum_s:.3g} ms of software)"
        f" + {1e3 * found.pass_s:.2f} ms to and fro = {1e3 * found.token_s:.1f} ms"
    )


def show(console: Console, parts: Parts, rows: list[Simulated]) -> None:
    """Print one setting's table and its arithmetic."""
    alone_s = rows[0].token_s
    table = Table(
        title=f"SIMULATED, not run: {parts.model.name}, round trip {1e3 * parts.rtt_s:g} ms,"
        f" sums {parts.sum_s * 1e3:g} ms",
        title_justify="left",
    )
    for name in ("members", "of a layer", "compute ms", "sums ms", "token ms", "tok/s", "gain"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.members),
            f"{row.share:.3f}",
            f"{1e3 * (row.layers_s + row.head_s):.1f}",
            f"{1e3 * row.sums_s:.1f}",
            f"{1e3 * row.token_s:.1f}",
            f"{1 / row.token_s:.2f}",
            f"{alone_s / row.token_s:.2f} x",
        )
    console.print(table)
    for row in rows[1:]:
        console.print(arithmetic(parts, row), soft_wrap=True)


def main() -> None:
    """Simulate teams for each combination of round trip and software cost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lab", type=Path, default=LAB)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--members", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--rtt-ms", type=float, nargs="+", help="Instead of the lab's.")
    parser.add_argument("--sum-ms", type=float, nargs="+", help="Instead of the lab's.")
    parser.add_argument(
        "--share",
        type=_share,
        action="append",
        default=[],
        metavar="0.5=0.56",
        help="Time of such a share, relative to the whole layer. May be repeated, instead of the "
        "lab's.",
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lab = parts_of(options.lab, bits=options.bits, layers=options.layers, kv_heads=options.kv_heads)
    if options.share:
        lab = replace(lab, share_times={**dict(options.share), 1.0: 1.0})
    console, answer = Console(), []
    for rtt_ms in options.rtt_ms or [1e3 * lab.rtt_s]:
        for sum_ms in options.sum_ms or [1e3 * lab.sum_s]:
            parts = replace(lab, rtt_s=rtt_ms / 1e3, sum_s=sum_ms / 1e3)
            rows = [simulate(parts, members) for members in [1, *options.members]]
            answer.append(_plain(parts, rows))
            if not options.json:
                show(console, parts, rows)
    if options.json:
        print(json.dumps({"simulated": True, "lab": str(options.lab), "settings": answer}))


def _share(text: str) -> tuple[float, float]:
    share, _, time = text.partition("=")
    return float(share), float(time)


def _plain(parts: Parts, rows: list[Simulated]) -> dict[str, Any]:
    teams = [
        {**asdict(row), "token_s": row.token_s, "gain": rows[0].token_s / row.token_s}
        for row in rows
    ]
    return {"rtt_s": parts.rtt_s, "sum_s": parts.sum_s, "teams": teams}


if __name__ == "__main__":
    main()
