"""Samples the load and the temperature of this machine, for heartbeats.

It has a thread of its own. A sensor that hangs must not delay heartbeats.
"""

from __future__ import annotations

import threading

import psutil

from calibration.sensors import Sensors
from wire.hygiene import CELSIUS

SAMPLE_S = 5.0


class Gauges:
    """The last sampled values. ``celsius`` is None where no sensor is known."""

    def __init__(self, sensors: Sensors | None = None) -> None:
        self._sensors = sensors or Sensors()
        self.load = 0.0
        """The share of the processor in use since the sample before, by all programs."""
        self.celsius: float | None = None

    def run(self, ended: threading.Event) -> None:
        """Sample each SAMPLE_S until ``ended``."""
        psutil.cpu_percent()  # The first call only begins.
        while not ended.wait(SAMPLE_S):
            self.sample()

    def sample(self) -> None:
        """Read all sensors now."""
        self.load = min(max(psutil.cpu_percent() / 100, 0.0), 1.0)
        low_c, high_c = CELSIUS  # Broken sensors tell of other worlds.
        try:
            found_c = self._sensors.temperatures_c().values()
        except OSError:
            found_c = {}.values()
        self.celsius = max((value for value in found_c if low_c <= value <= high_c), default=None)
