"""Other programs' use of the processor: recorded texts of the kernel, and real load."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from calibration import disturbance
from calibration.device import memory_read_rate
from calibration.disturbance import LoadMeter, Patience, spread_of, steady
from wire.conditions import Conditions, worst

CORES = sorted(os.sched_getaffinity(0))

PI_STAT = """\
cpu  {busy} 120 3044 912345 1201 0 310 {steal} 0 0
{cores}
intr 21834 0 0 0
ctxt 7718233
btime 1700000000
processes 4312
"""
CPU_STAT = """\
usage_usec 5000000
user_usec 4000000
system_usec 1000000
nr_periods {periods}
nr_throttled {held}
throttled_usec 12345
"""


class Clock:
    """Stands for time.perf_counter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now_s)


def write_machine(
    root: Path, *, busy: int, steal: int = 0, foreign: int = 0, periods: int = 0, held: int = 0
) -> None:
    """/proc of a machine where ``busy`` ticks were used on our first core and ``steal`` stolen.

    ``foreign``: ticks used on a core that we may not run on.
    """
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "sys/fs/cgroup/box").mkdir(parents=True, exist_ok=True)
    lines = [f"cpu{core} {busy if core == CORES[0] else 0} 0 0 1 1 0 0 0 0 0" for core in CORES]
    lines[0] = f"cpu{CORES[0]} {busy} 0 0 228086 300 0 0 {steal} 0 0"
    lines.append(f"cpu{max(CORES) + 7} {foreign} 0 0 1 1 0 0 0 0 0")
    stat = PI_STAT.format(busy=busy + foreign, steal=steal, cores="\n".join(lines))
    (root / "proc/stat").write_text(stat)
    (root / "proc/loadavg").write_text("1.25 0.80 0.41 2/180 4312\n")
    (root / "proc/self/cgroup").write_text("0::/box\n")
    (root / "sys/fs/cgroup/box/cpu.stat").write_text(CPU_STAT.format(periods=periods, held=held))


def test_what_others_and_the_hypervisor_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    per_s = os.sysconf("SC_CLK_TCK")
    write_machine(tmp_path, busy=1000, steal=50, foreign=10, periods=100, held=7)
    meter = LoadMeter(tmp_path)
    clock.now_s += 10
    write_machine(
        tmp_path,
        busy=1000 + 8 * per_s,
        steal=50 + 2 * per_s,
        foreign=10 + 9 * per_s,
        periods=200,
        held=32,
    )
    found = meter.conditions(0.1)
    assert found.cores == len(CORES)
    assert found.others_cores == pytest.approx(0.8, abs=0.05)
    assert found.stolen_cores == pytest.approx(0.2, abs=0.01)
    assert found.held_share == pytest.approx(0.25)
    assert (found.load, found.spread) == (1.25, 0.1)
    assert found.is_noisy
    assert f"other programs used 0.8 of {len(CORES)} cores" in found.text
    assert "the hypervisor took 0.2" in found.text


def test_a_quiet_machine_is_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    write_machine(tmp_path, busy=1000)
    meter = LoadMeter(tmp_path)
    clock.now_s += 0.25
    write_machine(tmp_path, busy=1002)  # A tick or two that the kernel may be off.
    found = meter.conditions(0.05)
    assert not found.is_noisy
    assert found.text == "nothing else ran"


@pytest.mark.parametrize("text", ["", "cpu\n", "cpu0 a b c\n", "intr 1 2 3\n"])
def test_a_kernel_that_tells_nothing_is_no_obstacle(tmp_path: Path, text: str) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text(text)
    found = LoadMeter(tmp_path).conditions(0.4)
    assert (found.others_cores, found.stolen_cores, found.held_share) == (0, 0, 0)
    assert found.text == "repeats differed by 40%"


def test_repeats_under_a_quota_differ_by_nature() -> None:
    held = Conditions(2, 0.0, 0.0, 0.6, 0.0, 0.9, 0.0)
    assert not held.is_noisy
    assert Conditions(2, 0.0, 0.0, 0.0, 0.0, 0.9, 0.0).is_noisy
    assert worst((None, held, Conditions(2, 1.5, 0.0, 0.0, 0.0, 0.0, 0.0), None)) != held
    assert worst((None,)) is None


def test_hostile_conditions_make_a_short_line() -> None:
    assert len(Conditions(4, 1e308, 1e308, 1e308, 1e308, 1e308, 1e308).text) < 250
    assert Conditions(4, -1e308, -1e308, -1.0, 0.0, -1e308, 0.0).text == "nothing else ran"


@contextmanager
def spinning(processes: int) -> Iterator[None]:
    """Other programs that use the processor, until the context ends."""
    code = "print(flush=True)\nwhile True: pass"
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        for _ in range(processes)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()


def test_real_load_of_others_is_seen_and_ours_is_not() -> None:
    with spinning(len(CORES)):
        meter = LoadMeter()
        memory_read_rate(1)
        beside = meter.conditions()
        assert beside.is_noisy
        assert beside.others_cores > 0.25 * len(CORES)
    # What a process of ours used counts as ours once it was waited for.
    meter = LoadMeter()
    code = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    begun_s, own_s = time.perf_counter(), sum(os.times()[:4])
    subprocess.run([sys.executable, "-c", code], check=True)
    elapsed_s, used_s = time.perf_counter() - begun_s, sum(os.times()[:4]) - own_s
    assert used_s > 0.4
    assert meter.conditions().others_cores <= len(CORES) - used_s / elapsed_s + 0.2


@pytest.mark.parametrize(
    ("spreads", "patience", "calls", "best"),
    [
        ([0.1], Patience(5), 1, 1.0),  # Once is enough on a quiet machine.
        ([0.9, 0.9, 0.1], Patience(5), 3, 3.0),  # Until the repeats agree.
        ([0.9] * 9, Patience(3), 4, 1.0),  # No longer than patience allows; then the fastest.
        ([0.9] * 9, Patience(5, limit_s=2.0), 3, 1.0),
        ([0.9] * 9, Patience(0), 1, 1.0),
    ],
)
def test_a_disturbed_measurement_is_repeated_within_limits(
    monkeypatch: pytest.MonkeyPatch,
    spreads: list[float],
    patience: Patience,
    calls: int,
    best: float,
) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(disturbance, "_processor", lambda *_, **__: (2, 0.0, 0.0))
    made = 0

    def measure() -> tuple[float, float]:
        nonlocal made
        made += 1
        clock.now_s += 1.0
        return float(made), spreads[made - 1]

    figure, found = steady(measure, patience, float)
    assert (made, figure) == (calls, best)
    assert found.spread == spreads[int(best) - 1]


def test_spreads() -> None:
    assert spread_of([]) == spread_of([3.0]) == 0
    assert spread_of([1.0, 3.0]) == 1.0
    assert spread_of([1.0, 1.0, 1.0, 1.0, 50.0]) == 0
    assert spread_of([1.0, 1.0, 4.0, 4.0]) > 1
