"""Hygiene for every test: nothing may outlive it. And ``--fast``: the tests of pure code alone."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
"""Before numpy is imported, here and in child processes. Several tests share the cores, and numpy's
threads would spin while they wait for each other."""

os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["HF_HOME"] = os.path.join(tempfile.gettempdir(), "shoal-tests-have-no-hub")  # noqa: PTH118 - text
"""No test reaches the real hub, or sees this user's cache and token."""
for _name in ("HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
    os.environ.pop(_name, None)

hypothesis.settings.register_profile("busy machine", deadline=None)
hypothesis.settings.load_profile("busy machine")

FAST = ("docs", "model", "wire", "planning", "coordinator", "api", "calibration", "agent", "cli")
"""Folders whose tests ``--fast`` runs, but for those in SLOW."""

SLOW = {
    "agent/test_blocks.py",
    "agent/test_daemon.py",
    "agent/test_files.py",
    "agent/test_hop.py",
    "agent/test_integrity.py",
    "agent/test_relay.py",
    "agent/test_reuse.py",
    "agent/test_sum_cost.py",
    "agent/test_team.py",
    "agent/test_team_daemon.py",
    "agent/test_team_sum.py",
    "calibration/test_command.py",
    "calibration/test_device.py",
    "calibration/test_disturbance.py",
    "calibration/test_layers.py",
    "calibration/test_quality.py",
    "calibration/test_sensors.py",
    "calibration/test_survey.py",
    "calibration/test_sustain.py",
    "calibration/test_trial.py",
    "cli/test_bench.py",
    "cli/test_calibrate_agent.py",
    "cli/test_doctor.py",
    "cli/test_given.py",
    "cli/test_imports.py",
    "cli/test_planning.py",
    "cli/test_pull.py",
    "cli/test_process.py",
    "cli/test_signals.py",
    "cli/test_sweep.py",
    "cli/test_table1.py",
    "planning/test_dilemma.py",
    "coordinator/test_gateway.py",
    "api/test_given.py",
    "api/test_http.py",
    "api/test_guard.py",
    "coordinator/test_measurements.py",
    "coordinator/test_members.py",
    "coordinator/test_names.py",
    "planning/test_properties.py",
    "planning/test_solvers.py",
    "coordinator/test_recovery.py",
    "coordinator/test_compiled.py",
    "model/test_hub_download.py",
    "model/test_template_process.py",
    "model/test_tokenizer.py",
    "wire/test_auth.py",
    "wire/test_connection.py",
    "wire/test_hostile.py",
    "wire/test_lobby.py",
    "wire/test_patience.py",
    "wire/test_service.py",
    "wire/test_transport.py",
    "wire/test_versions.py",
}
"""Tests with processes or connections, or of many seconds. ``--fast`` fails where one that starts
a process or opens a connection is missing here."""

LONGEST = (
    "testbed/test_bed.py",
    "system/test_names.py",
    "system/test_mixed_backends.py",
    "system/test_demo.py",
    "system/",
    "testbed/",
    "page/",
    "examples/",
    "test_packaging.py",
    "backends/",
    "planning/",
    "families/",
    "agent/",
    "cli/",
    "calibration/",
)
"""Files and folders whose tests run first, so that short ones fill the last minute of all workers.
``make test`` hands out whole files in this order, and a file's fixtures start once."""

SOLVERS = ("cbc",)
"""Programs that a test of ``--fast`` may run."""

LIBRARY_THREADS = ("asyncio_", "AnyIO", "ThreadPoolExecutor")
"""Pools that their libraries keep for the life of the process."""


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """Shells start background jobs with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_thread_outlives_the_test() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 60
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith(LIBRARY_THREADS):
            thread.join(max(deadline - time.monotonic(), 0))
            assert not thread.is_alive(), f"thread {thread.name} outlived the test"


@pytest.fixture(autouse=True)
def arithmetic_as_usual() -> Iterator[None]:
    """A stage leaves denormals of its thread reading as zero. The next test sees them again."""
    yield
    _C.fesetenv(_DEFAULT_ENVIRONMENT)


_C = ctypes.CDLL("libm.so.6")
_DEFAULT_ENVIRONMENT = ctypes.c_void_p(-1)
"""FE_DFL_ENV of glibc's fenv.h."""


@pytest.fixture(autouse=True)
def only_pure_code(request: pytest.FixtureRequest) -> Iterator[None]:
    """Under ``--fast``: fails tests that start processes or open connections."""
    if not request.config.getoption("--fast"):
        yield
        return
    if not _guard:
        sys.addaudithook(_refuse)
    _guard[:] = [True]
    yield
    _guard[:] = [False]


_guard: list[bool] = []
"""Whether a fast test runs now; an audit hook cannot be taken away."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="only tests without processes and connections"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fast"):
        hypothesis.settings.register_profile("fast", max_examples=20, deadline=None)
        hypothesis.settings.load_profile("fast")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the garbage collector away from what collecting makes.

    A million objects of modules and tests stay until the end. The collector would look at them
    again and again, for half of the time that collecting takes.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000)
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    names = {path: path.relative_to(here).as_posix() for path in {item.path for item in items}}

    def turn(item: pytest.Item) -> int:
        name = names[item.path]
        return next((n for n, first in enumerate(LONGEST) if name.startswith(first)), len(LONGEST))

    items.sort(key=turn)
    if not config.getoption("--fast"):
        return
    chosen, others = list[pytest.Item](), list[pytest.Item]()
    for item in items:
        name = names[item.path]
        fast = name.startswith(FAST) and name not in SLOW
        (chosen if fast else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


def _refuse(event: str, details: tuple[object, ...]) -> None:
    """Stop a test of ``--fast`` that starts a process or opens a connection."""
    if not any(_guard):
        return
    if event == "subprocess.Popen" and Path(str(details[0])).name not in SOLVERS:
        raise AssertionError(f"a fast test starts {details[0]}: list its file as SLOW")
    if event == "socket.connect" and isinstance(details[1], tuple):
        raise AssertionError(f"a fast test connects to {details[1]}: list its file as SLOW")
