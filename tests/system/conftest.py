"""Clusters of real processes for system tests."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.system.cluster import TINY_OPT, Cluster, logs


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows what its processes have logged."""
    report = yield
    if report.failed:
        report.sections += [(f"log of {name} ({report.when})", text) for name, text in logs()]
    return report


@pytest.fixture(scope="session", autouse=True)
def own_temporary_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tells the processes of this run from those of others on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("run")))
        yield


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster that the test starts as it likes."""
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster for tests of a module that leave it as they found it."""
    cluster = Cluster(tmp_path_factory.mktemp("shared"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The demo model at 16 bits, split over three agents, for the tests of a module."""
    cluster = Cluster(tmp_path_factory.mktemp("serving"))
    try:
        cluster.start_coordinator()
        names = ("pi-1", "pi-2", "pi-3")
        for name in names:
            cluster.start_agent(
                name, f"--coordinator=127.0.0.1:{cluster.control_port}", "--memory=6M"
            )
        cluster.wait_for_agents(*names)
        answer = cluster.load(TINY_OPT, "--bits=16")
        assert len(answer["plan"]["stages"]) > 1
        yield cluster
    finally:
        cluster.stop()
