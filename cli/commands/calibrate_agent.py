"""Where ``shoal calibrate`` keeps figures, so that the agent of this machine uses them.

An agent that runs as a service has its state below /var/lib and its settings below /etc: the same
threads, backend and exactness must be measured, or it would not find what it looks for.
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

if TYPE_CHECKING:
    from calibration.store import CalibrationStore


PATIENCE_S = 10.0
"""For measuring the device again while others disturb it."""


@dataclass(frozen=True, slots=True)
class Target:
    """Whose figures are measured. ``unreachable`` is a service's directory that others own."""

    state_dir: Path
    threads: int
    backend: str
    exact: bool
    unreachable: Path | None = None


def target_of(state_dir: Path | None, root: Path = Path("/")) -> Target:
    """The agent whose state is in ``state_dir``; else the service, where it may be written; else
    the user's. ``root`` stands for / in tests. Raises UsageError for settings that are wrong."""
    from agent.config import default_state_dir

    parser = argparse.ArgumentParser(prog="shoal agent")
    daemons.add_agent_arguments(parser)
    defaults = parser.get_default
    service = root / STATE.relative_to("/") / "agent"
    config = root / CONFIG.relative_to("/") / "agent.toml"
    settings: Mapping[str, Any] = {}
    unreachable: Path | None = None
    chosen = state_dir or default_state_dir()
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
    """Measure anew what the agent tells of itself and of its models, and keep it for the agent.

    A running agent notices within seconds. Returns what was measured, as JSON. Raises BackendError.
    """
    from backends.registry import backend_class
    from calibration.device import kept_profile, profile_device
    from calibration.layers import measure_model
    from model.spec import ModelSpec

    profile = profile_device(
        backend=target.backend,
        cache_dir=target.state_dir,
        threads=threads,
        exact=target.exact,
        patience_s=PATIENCE_S,
    )
    kept = kept_profile(profile, store, exact=target.exact)
    models = store.models()
    for number, (spec, bits) in enumerate(models, 1):
        with screen.counting(f"measuring model {number} of {len(models)} anew") as on_step:
            measure_model(
                ModelSpec.from_dict(spec),
                bits,
                backend_class(target.backend)(),
                threads=threads,
                store=store.again(),
                progress=on_step,
                exact=target.exact,
            )
    screen.note(
        f"measured anew for the agent in {target.state_dir}: the device and {len(models)} models; "
        "a running agent takes them over within seconds"
    )
    return {
        "state_dir": str(target.state_dir),
        "models": len(models),
        "memory_read_bytes_per_s": kept.memory_read_bytes_per_s,
        "disk_write_bytes_per_s": kept.disk_write_bytes_per_s,
        "call_s": kept.call_s,
        "relay_s": kept.relay_s,
        "conditions": {name: asdict(of) for name, of in kept.conditions},
    }
