"""Finds the agent of this machine, so that it can use the figures of ``shoal calibrate``.

An agent that runs as a service has its state below /var/lib and its settings below /etc. It looks
for figures of its own threads, backend and exactness. So these are measured.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.render import Screen
from cli.service import daemons
from cli.service.install import CONFIG, STATE
from cli.service.settings import read_settings
from wire.service import default_state_dir

if TYPE_CHECKING:
    from calibration.store import CalibrationStore


PATIENCE_S = 10.0
"""The longest time for measuring the device again while other programs disturb it."""


@dataclass(frozen=True, slots=True)
class Target:
    """The agent whose figures are measured.

    unreachable: the state directory of a service, if this user cannot write it.
    """

    state_dir: Path
    threads: int
    backend: str
    exact: bool
    unreachable: Path | None = None


def target_of(state_dir: Path | None, root: Path = Path("/")) -> Target:
    """Find the agent: that of ``state_dir``, else the service if it is writable, else the user's.

    root: / or a test's directory in its place.
    Raises UsageError for wrong settings.
    """
    parser = argparse.ArgumentParser(prog="shoal agent")
    daemons.add_agent_arguments(parser)
    defaults = parser.get_default
    service = root / STATE.relative_to("/") / "agent"
    config = root / CONFIG.relative_to("/") / "agent.toml"
    settings: Mapping[str, Any] = {}
    unreachable: Path | None = None
    chosen = state_dir or default_state_dir("agent")
    if state_dir is None and service.is_dir():
        if os.access(service, os.W_OK | os.X_OK):
            chosen = service
            settings = read_settings(config, parser) if config.exists() else {}
        else:
            unreachable = service
    return Target(
        state_dir=chosen,
        threads=settings.get("threads", defaults("threads")),
        backend=settings.get("backend", defaults("backend")),
        exact=settings.get("exact", defaults("exact")),
        unreachable=unreachable,
    )


def measure_for_agent(
    target: Target, threads: int, store: CalibrationStore, screen: Screen
) -> dict[str, Any]:
    """Measure the agent's device and models again, and keep the figures for it.

    A running agent notices within seconds. Returns the figures as JSON. Raises BackendError.
    """
    from backends.registry import backend_class
    from calibration.device import kept_profile, profile_device
    from calibration.layers import kept_timings, measure_model

    profile = profile_device(
        backend=target.backend,
        cache_dir=target.state_dir,
        threads=threads,
        exact=target.exact,
        patience_s=PATIENCE_S,
    )
    kept = kept_profile(profile, store, exact=target.exact)
    models = store.specs()
    for number, (spec, bits) in enumerate(models, 1):
        backend = backend_class(target.backend)()
        kept_before = kept_timings(
            spec, bits, backend, threads=threads, store=store, exact=target.exact
        )
        with screen.counting(f"measuring model {number} of {len(models)} anew") as on_step:
            measure_model(
                spec,
                bits,
                backend,
                threads=threads,
                store=store.again(),
                progress=on_step,
                exact=target.exact,
                shares=any(timing.shares_s for timing in kept_before),
            )
    screen.note(
        f"measured anew for the agent in {target.state_dir}: the device and {len(models)} models; "
        "a running agent uses them within seconds"
    )
    return {
        "state_dir": str(target.state_dir),
        "models": len(models),
        "memory_read_bytes_per_s": kept.memory_read_bytes_per_s,
        "disk_write_bytes_per_s": kept.disk_write_bytes_per_s,
        "call_s": kept.call_s,
        "relay_s": kept.relay_s,
        "sum_s": kept.sum_s,
        "conditions": {name: asdict(of) for name, of in kept.conditions},
    }
