"""Every table is whole on a narrow terminal: no cell is cut, and no column is lost."""

from __future__ import annotations

import argparse
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cli.main import _parser
from cli.render import Screen
from cli.tables import fitting
from model.hub import served_name

WIDTHS = (120, 80, 60, 40)


class Recording(Screen):
    """A screen that keeps its tables."""

    def __init__(self) -> None:
        super().__init__(json_output=False)
        self.out = Console(file=io.StringIO(), width=200, highlight=False)
        self.tables: list[tuple[Table, int]] = []

    def table(self, table: Table, keys: int = 1) -> None:
        self.tables.append((table, keys))
        super().table(table, keys)

    def check(self) -> None:
        """Every table is whole on every terminal, and with its columns side by side on most."""
        assert self.tables
        for table, keys in self.tables:
            for width in WIDTHS:
                check_whole(table, fitting(table, width, keys), width)


LAB = Path(__file__).parents[2] / "examples" / "labs" / "home-4-pis.yaml"
MODEL = Path(__file__).parents[1] / "fixtures" / "llama"
TINY_OPT = Path(__file__).parents[2] / "examples" / "tiny-opt" / "model"


def letters(text: str) -> Counter[str]:
    """Characters besides spaces and the lines of a table."""
    return Counter(re.sub(r"[\s\u2500-\u257f]", "", text))


def plain(markup: object) -> str:
    return Text.from_markup(str(markup)).plain


def cells(table: Table) -> str:
    return "".join(
        plain(cell) for column in table.columns for cell in (column.header, *column.cells)
    )


def rendered(part: Table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    with console.capture() as capture:
        console.print(part)
    return capture.get()


def check_whole(table: Table, parts: list[Table], width: int) -> None:
    """All cells of ``table`` are in what its parts show, within ``width``."""
    names = [str(column.header) for part in parts for column in part.columns]
    assert {str(column.header) for column in table.columns} == set(names)
    rows = {len(list(column.cells)) for part in parts for column in part.columns}
    assert rows <= {table.row_count}
    for part in parts:
        shown = rendered(part, width)
        assert letters(shown) == letters(cells(part))
        assert max(map(len, shown.splitlines())) <= width


words = st.text("ab[]é,9.-", min_size=1, max_size=12)
texts = st.lists(words, max_size=6).map(" ".join)


@given(
    st.integers(1, 7).flatmap(
        lambda count: st.lists(st.lists(texts, min_size=count, max_size=count), min_size=1)
    ),
    st.integers(24, 100),
    st.integers(1, 2),
    st.integers(0, 1 << 14),
)
def test_any_table_is_whole(rows: list[list[str]], width: int, keys: int, kinds: int) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, header in enumerate(rows[0]):
        rigid, right = kinds >> 2 * index & 1, kinds >> 2 * index & 2
        table.add_column(escape(header), no_wrap=bool(rigid), justify="right" if right else "left")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    check_whole(table, fitting(table, width, keys), width)


def test_empty_columns_take_a_character_of_what_there_is() -> None:
    table = Table("", "", "9", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_row("", "9 999 999 99999", "")
    check_whole(table, fitting(table, 24), 24)


def test_columns_that_do_not_fit_come_below_with_the_first_again() -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("device", no_wrap=True)
    for index in range(9):
        table.add_column(f"column {index}", justify="right")
    table.add_row("pi-1", *(f"12345.6{index}" for index in range(9)))
    (whole,) = fitting(table, 120)
    assert len(whole.columns) == 10
    parts = fitting(table, 60)
    assert {str(part.columns[0].header) for part in parts} == {"device"}
    others = [str(column.header) for part in parts for column in part.columns[1:]]
    assert others == [f"column {index}" for index in range(9)]
    assert "12345.68" in rendered(parts[-1], 60)
    check_whole(table, parts, 60)


DEVICE = {
    "version": "0.1.0",
    "backend": "onnx_cpu",
    "threads": 16,
    "memory_bytes": 15 << 30,
    "storage_bytes": 117 << 30,
    "memory_read_bytes_per_s": 153.4e9,
}


@pytest.mark.parametrize("name", ["pi-{}", "raspberry-pi-of-the-living-room-{}"])
def test_devices_and_their_links_are_whole(name: str) -> None:
    processors = (
        "Cortex-A76",
        "AMD Ryzen Threadripper PRO 7995WX 96-Cores",
        "ARMv8 Processor rev 1 (v8l)",
    )
    devices = [
        DEVICE | {"name": name.format(number), "processor": processor}
        for number, processor in enumerate(processors)
    ]
    names = [device["name"] for device in devices]
    links = [
        {"source": a, "target": b, "rtt_s": 0.0123, "rtt_p90_s": 0.2, "bytes_per_s": 1e8}
        for a in names
        for b in names
        if a != b
    ]
    screen = Recording()
    screen.devices({"cluster": "attic", "version": "0.1.0", "devices": devices, "links": links})
    screen.check()
    if len(name) < 10:
        assert [len(fitting(table, 80, keys)) for table, keys in screen.tables] == [1, 1]


@pytest.mark.parametrize(
    ("model", "wishes"),
    [
        (MODEL, ["--pin=layers=0-1:pi-1", "--pin=head:pi-2"]),
        (TINY_OPT, ["--team=pi-1,pi-2,pi-3", "--group-size=32", "--bits=4", "--exclude=attic"]),
    ],
    ids=["pins", "team"],
)
def test_a_plan_with_all_that_is_known_of_it_is_whole(
    model: Path, wishes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    options = parsed(
        *("plan", str(model), f"--devices={LAB}", "--explain", "--simulate=3"),
        *wishes,
        "--time-limit=5",
    )
    screen = Recording()
    options.run(options, screen)
    titles = " ".join(str(table.title) for table, _ in screen.tables)
    for title in (
        f"plan for {served_name(model)}",
        "where a token's predicted time goes",
        "draws of link speeds",
    ):
        assert title in titles
    screen.check()


def test_what_is_loaded_is_whole() -> None:
    stages = [{"device": name, "memory_bytes": 1 << 30, "fetched_bytes": 9 << 20, "load_s": 12.34}
              for name in ("living-room-raspberry-pi-5", "workstation-below-the-desk")]  # fmt: skip
    screen = Recording()
    screen.models(
        [
            {
                "model": "llama-3.2-1b-instruct",
                "state": "ready",
                "reason": None,
                "waiting_for": [],
                "stages": stages,
                "plan": {"stages": [{"first": 0, "bits": [4] * 9}, {"first": 9, "bits": [8] * 9}]},
                "slots": {"total": 4, "used": 1, "waiting": 0},
            }
        ]
    )
    screen.check()


def test_a_loaded_team_shows_its_members_and_shares(capsys: pytest.CaptureFixture[str]) -> None:
    def loaded(name: str, load_s: float) -> dict[str, Any]:
        return {"device": name, "memory_bytes": 3 << 20, "fetched_bytes": 2 << 20, "load_s": load_s}

    members = [loaded("pi-1", 1.5), loaded("pi-2", 0.5)]
    team = {**loaded("pi-1", 1.5), "memory_bytes": 6 << 20, "members": members}
    stages = [
        {"first": 0, "bits": [4] * 18, "sum_bits": 16, "measured_sum": {"row_s": 0.00034}},
        {"first": 18, "bits": [4], "sum_bits": None},
    ]
    shares = {"pi-1": 0.75, "pi-2": 0.25}
    Screen(json_output=False).models(
        [
            {
                "model": "llama",
                "state": "ready",
                "reason": None,
                "waiting_for": [],
                "stages": [team, {**loaded("pi-3", 0.25), "members": []}],
                "plan": {"stages": stages, "shares": shares},
                "slots": {"total": 1, "used": 0, "waiting": 0},
            }
        ]
    )
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["pi-1+pi-2", "[0,", "18)", "6.0", "MiB", "2.0", "MiB", "1.50"] in rows
    assert ["pi-1", "75%", "of", "each", "3.0", "MiB", "2.0", "MiB", "1.50"] in rows
    assert ["pi-2", "25%", "of", "each", "3.0", "MiB", "2.0", "MiB", "0.50"] in rows
    assert ["pi-3", "[18,", "19)", "3.0", "MiB", "2.0", "MiB", "0.25"] in rows
    words = "pi-1+pi-2 share blocks 1..17, with sums at 16 bits of 0.34 ms, measured"
    assert words in out.splitlines()


def parsed(*arguments: str) -> argparse.Namespace:
    return _parser().parse_args(arguments)
