"""How busy emulated hosts are, so that a measurement can begin when they are at rest."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

from testbed.bed import Testbed

REST_S = 60.0
"""How long to wait at most."""

_LOOK_S = 0.5
_IDLE_CORES = 0.1


def await_rest(bed: Testbed, hosts: Sequence[str]) -> None:
    """Wait until the hosts do nothing.

    After a load they hash their files for some seconds, in a thread of low priority. Beside a stage
    it gets a tenth of a core. An emulated host may have no more than one core for both.
    """
    deadline_s = time.monotonic() + REST_S
    while time.monotonic() < deadline_s:
        before_s, _ = busy_s(bed, hosts)
        time.sleep(_LOOK_S)  # The time over which the processor's use is measured.
        if busy_s(bed, hosts)[0] - before_s < _IDLE_CORES * _LOOK_S:
            return
    print(f"the hosts are still busy after {REST_S:g} s", file=sys.stderr, flush=True)


def busy_s(bed: Testbed, hosts: Sequence[str]) -> tuple[float, float]:
    """Return the processor seconds of the hosts' processes, and of everything else here."""
    times = psutil.cpu_times()
    all_s = times.user + times.nice + times.system + times.irq + times.softirq
    own_s = 0.0
    for host in hosts:
        for process in bed.processes(host):
            with suppress(psutil.Error):  # It has ended meanwhile.
                own_s += sum(psutil.Process(process).cpu_times()[:2])
    return own_s, all_s - own_s
