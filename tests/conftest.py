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
    "agent/test_credentials.py",
    "agent/test_daemon.py",
    "agent/test_draft_model.py",
    "agent/test_encoding.py",
    "agent/test_files.py",
    "agent/test_grammars.py",
    "agent/test_holders.py",
    "agent/test_hop.py",
    "agent/test_integrity.py",
    "agent/test_kept_stage.py",
    "agent/test_loopback.py",
    "agent/test_prefix.py",
    "agent/test_relay.py",
    "agent/test_relay_cost.py",
    "agent/test_reuse.py",
    "agent/test_revoked.py",
    "agent/test_run_delay.py",
    "agent/test_speculation.py",
    "agent/test_stages.py",
    "agent/test_sum_cost.py",
    "agent/test_team.py",
    "agent/test_team_daemon.py",
    "agent/test_team_sum.py",
    "api/test_given.py",
    "api/test_guard.py",
    "api/test_http.py",
    "api/test_http_tls.py",
    "api/test_page.py",
    "api/test_tracking.py",
    "calibration/test_command.py",
    "calibration/test_device.py",
    "calibration/test_disturbance.py",
    "calibration/test_layers.py",
    "calibration/test_probe_key.py",
    "calibration/test_quality.py",
    "calibration/test_sensors.py",
    "calibration/test_survey.py",
    "calibration/test_sustain.py",
    "calibration/test_trial.py",
    "cli/test_bench.py",
    "cli/test_calibrate_agent.py",
    "cli/test_compress.py",
    "cli/test_doctor.py",
    "cli/test_eval.py",
    "cli/test_given.py",
    "cli/test_imports.py",
    "cli/test_in_hand.py",
    "cli/test_pins.py",
    "cli/test_planning.py",
    "cli/test_process.py",
    "cli/test_pull.py",
    "cli/test_restarts.py",
    "cli/test_signals.py",
    "cli/test_state_archive.py",
    "cli/test_sweep.py",
    "cli/test_table1.py",
    "coordinator/test_choices.py",
    "coordinator/test_compiled.py",
    "coordinator/test_disk.py",
    "coordinator/test_encoding.py",
    "coordinator/test_gateway.py",
    "coordinator/test_gateway_prefix.py",
    "coordinator/test_holders.py",
    "coordinator/test_idling.py",
    "coordinator/test_journal.py",
    "coordinator/test_kept_answers.py",
    "coordinator/test_measurements.py",
    "coordinator/test_members.py",
    "coordinator/test_moving.py",
    "coordinator/test_names.py",
    "coordinator/test_rebalancing.py",
    "coordinator/test_record.py",
    "coordinator/test_recovery.py",
    "coordinator/test_returns.py",
    "coordinator/test_stalls.py",
    "coordinator/test_standstills.py",
    "coordinator/test_teams.py",
    "coordinator/test_two_models.py",
    "coordinator/test_urgency.py",
    "model/test_hub_download.py",
    "model/test_template_process.py",
    "model/test_tokenizer.py",
    "planning/test_dilemma.py",
    "planning/test_joint.py",
    "planning/test_planner.py",
    "planning/test_properties.py",
    "planning/test_search.py",
    "planning/test_solvers.py",
    "wire/test_connection.py",
    "wire/test_handshake.py",
    "wire/test_hostile.py",
    "wire/test_introduction.py",
    "wire/test_lobby.py",
    "wire/test_patience.py",
    "wire/test_service.py",
    "wire/test_tls.py",
    "wire/test_transport.py",
    "wire/test_versions.py",
}
"""Tests with processes or connections, or of many seconds. A test that starts a process or opens a
connection fails where its file is missing here, with ``--fast`` or without."""

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

PROGRAMS = ("cbc", "ldconfig", "uname")
"""Programs that a fast test may run: a solver, and what ctypes and platform ask once."""

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
    """Fails fast tests that start processes or open connections, in every run.

    So ``--fast`` cannot go red, or slow, unseen.
    """
    if not is_fast(request.path.relative_to(Path(__file__).parent).as_posix()):
        yield
        return
    _breaches.clear()
    _guarded.set()
    try:
        yield
    finally:
        _guarded.clear()
    assert not _breaches, f"{', '.join(_breaches)}: list the file as SLOW in {__file__}"


def is_fast(name: str) -> bool:
    """Whether ``--fast`` runs the file of this name below tests/."""
    return name.startswith(tuple(f"{folder}/" for folder in FAST)) and name not in SLOW


_guarded = threading.Event()
"""Set while a fast test runs."""

_breaches: list[str] = []
"""What a fast test did that it must not do. A thread may have swallowed the exception."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="only tests without processes and connections"
    )


def pytest_configure(config: pytest.Config) -> None:
    sys.addaudithook(_refuse)  # It cannot be taken away.
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
    config.hook.pytest_deselected(items=[i for i in items if not is_fast(names[i.path])])
    items[:] = [item for item in items if is_fast(names[item.path])]


def _refuse(event: str, details: tuple[object, ...]) -> None:
    """Stop a fast test that starts a process or opens a connection."""
    if not _guarded.is_set():
        return
    if event == "subprocess.Popen":
        if Path(str(details[0])).name in PROGRAMS or _renders(details[1]):
            return
        breach = f"a fast test starts {details[0]}"
    elif event == "socket.connect" and isinstance(details[1], tuple):
        breach = f"a fast test connects to {details[1]}"
    else:
        return
    _breaches.append(breach)
    raise AssertionError(breach)


def _renders(command: object) -> bool:
    """Whether this starts the process for chat templates, which all tests of a worker share."""
    module = sys.modules.get("model.template_process")
    return module is not None and isinstance(command, list) and command[-1] == module._CHILD
