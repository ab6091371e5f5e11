"""Reads heat, throttling and watts from the kernel, where it shows them.

Sources: the hwmon, cpufreq, thermal_throttle and powercap ABI of the Linux kernel; Raspberry Pi
documentation, "vcgencmd get_throttled"; NVIDIA Jetson Linux developer guide, "Power monitoring"
(INA3221 rails).
"""

from __future__ import annotations

import re
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

_PI_FLAGS = {
    0: "under-voltage",
    1: "clock capped",
    2: "throttled",
    3: "soft temperature limit",
}
_SINCE_BOOT_SHIFT = 16
_VCGENCMD_TIMEOUT_S = 2.0

_TOTAL_RAILS = ("VDD_IN", "POM_5V_IN")
"""Rails that carry the whole module. The other rails are parts of them."""


@dataclass(frozen=True, slots=True)
class Throttling:
    """The reasons for throttling that a Raspberry Pi's firmware reports, now and since boot."""

    now: tuple[str, ...]
    since_boot: tuple[str, ...]


Rail = Callable[[], float | None]
"""Returns the present watts of a rail, or None if its sensor does not answer."""


class PowerMeter(ABC):
    """Measures mean watts from its creation to the last ``sample``.

    Sample at least once a minute, because an energy counter may wrap around only once in between.
    """

    source: str

    @abstractmethod
    def sample(self) -> None:
        """Read the sensor now."""

    @abstractmethod
    def watts(self) -> float | None:
        """Return mean watts so far, or None before the first useful sample."""


class Sensors:
    """The sensors of this machine. ``root`` stands for / in tests."""

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        clock_s: Callable[[], float] = time.perf_counter,
        ask_firmware: Callable[[], str] | None = None,
        temperatures_c: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self.root = root
        self._clock_s = clock_s
        self._ask_firmware = ask_firmware or _vcgencmd
        self._temperatures_c = temperatures_c or _psutil_temperatures

    def temperatures_c(self) -> dict[str, float]:
        """Return degrees Celsius by sensor. Empty if there are none."""
        return self._temperatures_c()

    def throttling(self) -> Throttling | None:
        """Return a Raspberry Pi's flags, or None on other machines."""
        for path in sorted(self.root.glob("sys/devices/platform/soc/*firmware/get_throttled")):
            text = _read(path)
            if text:
                return parse_throttled(text)
        return parse_throttled(self._ask_firmware())

    def clock_hz(self) -> float | None:
        """Return the mean clock of the cores now, or None if the kernel does not govern it."""
        rates = [
            _number(path)
            for path in self.root.glob("sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq")
        ]
        known = [rate * 1e3 for rate in rates if rate]
        return sum(known) / len(known) if known else None

    def throttle_events(self) -> int | None:
        """Return how often an x86 processor's cores have slowed down for heat since boot."""
        counts = [
            _number(path)
            for path in self.root.glob(
                "sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count"
            )
        ]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None

    def power_meter(self) -> PowerMeter | None:
        """Start a meter: a Jetson's rails, else RAPL counters, else None."""
        rails = _total_rails(dict(_ina_hwmon(self.root)) or dict(_ina_iio(self.root)))
        if rails:
            return _RailMeter(rails)
        counters = [
            path
            for path in sorted(self.root.glob("sys/class/powercap/intel-rapl:*/energy_uj"))
            # intel-rapl:N is a package, and intel-rapl:N:M is a part of one.
            if path.parent.name.count(":") == 1 and _number(path) is not None
        ]
        return _RaplMeter(counters, self._clock_s) if counters else None


def parse_throttled(text: str) -> Throttling | None:
    """Parse ``throttled=0x50005`` of vcgencmd, or ``50005`` of sysfs. None for other text."""
    match = re.fullmatch(r"(?:throttled=)?(?:0x)?([0-9a-fA-F]{1,8})", text.strip())
    if match is None:
        return None
    flags = int(match[1], 16)
    now = tuple(name for bit, name in _PI_FLAGS.items() if flags >> bit & 1)
    ever = tuple(name for bit, name in _PI_FLAGS.items() if flags >> bit + _SINCE_BOOT_SHIFT & 1)
    return Throttling(now, ever)


class _RaplMeter(PowerMeter):
    """Counters of microjoules, one for each processor package, that wrap around."""

    source = "RAPL"

    def __init__(self, counters: list[Path], clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._started_s = self._sampled_s = clock_s()
        self._last = {path: _number(path) or 0 for path in counters}
        self._microjoules = 0

    def sample(self) -> None:
        for path, before in self._last.items():
            now = _number(path)
            if now is None:
                continue
            if now < before:
                self._microjoules += _number(path.with_name("max_energy_range_uj")) or 0
            self._microjoules += now - before
            self._last[path] = now
        self._sampled_s = self._clock_s()

    def watts(self) -> float | None:
        elapsed_s = self._sampled_s - self._started_s
        return self._microjoules * 1e-6 / elapsed_s if elapsed_s > 0 else None


class _RailMeter(PowerMeter):
    """Sensors of momentary watts, whose sum is averaged over the samples."""

    source = "INA3221"

    def __init__(self, rails: list[Rail]) -> None:
        self._rails = rails
        self._sum_watts = 0.0
        self._samples = 0

    def sample(self) -> None:
        values = [rail() for rail in self._rails]
        known = [value for value in values if value is not None]
        if known:
            self._sum_watts += sum(known)
            self._samples += 1

    def watts(self) -> float | None:
        return self._sum_watts / self._samples if self._samples else None


def _ina_hwmon(root: Path) -> Iterator[tuple[str, Rail]]:
    """Yield rails as JetPack 5 and later show them: millivolts and milliamperes."""
    for label in sorted(root.glob("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in*_label")):
        number = label.name[2 : -len("_label")]
        volts, amperes = (label.with_name(f"{kind}{number}_input") for kind in ("in", "curr"))
        if amperes.exists():  # in7 is a sum of shunt voltages.
            yield _read(label), partial(_product, volts, amperes)


def _ina_iio(root: Path) -> Iterator[tuple[str, Rail]]:
    """Yield rails as JetPack 4 shows them: milliwatts."""
    for label in sorted(root.glob("sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_*")):
        power = label.with_name(f"in_power{label.name.rpartition('_')[2]}_input")
        yield _read(label), partial(_scaled, power)


def _total_rails(rails: dict[str, Rail]) -> list[Rail]:
    for name in _TOTAL_RAILS:
        if name in rails:
            return [rails[name]]
    return list(rails.values())


def _product(millivolts: Path, milliamperes: Path) -> float | None:
    volts, amperes = _number(millivolts), _number(milliamperes)
    return None if volts is None or amperes is None else volts * amperes * 1e-6


def _scaled(milliwatts: Path) -> float | None:
    value = _number(milliwatts)
    return None if value is None else value * 1e-3


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if re.fullmatch(r"-?\d{1,19}", text) else None


def _vcgencmd() -> str:
    try:
        return subprocess.run(
            ["vcgencmd", "get_throttled"],  # noqa: S607 - its path differs by system
            capture_output=True,
            text=True,
            timeout=_VCGENCMD_TIMEOUT_S,
            check=False,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _psutil_temperatures() -> dict[str, float]:
    found: dict[str, float] = {}
    for chip, entries in psutil.sensors_temperatures().items():
        for index, entry in enumerate(entries):
            name = entry.label or str(index)
            if entry.current is not None:
                found[f"{chip} {name}"] = float(entry.current)
    return found
