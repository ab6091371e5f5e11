"""A device that others reach at a forwarded port only."""

from __future__ import annotations

import functools
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.bed import Testbed
from tests.system.cluster import ROOT, TINY_OPT
from tests.system.namespaces import NetworkCluster, bed_of, unavailable

pytestmark = pytest.mark.netns

HIDDEN_PORT = 7429
FORWARDED_PORT = 7430


@pytest.fixture
def bed() -> Iterator[Testbed]:
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    with bed_of("hub", "ash", "nas") as bed:
        yield bed


@pytest.fixture
def cluster(bed: Testbed, tmp_path: Path) -> Iterator[NetworkCluster]:
    cluster = NetworkCluster(tmp_path, bed)
    yield cluster
    cluster.stop()


@pytest.fixture
def forwarded(bed: Testbed) -> Iterator[str]:
    """The address at which a forward lets others in to HIDDEN_PORT of nas."""
    address = bed.network.address("nas")
    listen = functools.partial(socket.create_server, (address, FORWARDED_PORT))
    with bed.inside("nas", listen) as listener:
        listener.set_inheritable(True)
        module = [sys.executable, "-m", "testbed.forward", str(listener.fileno())]
        command = bed.command("nas", [*module, str(HIDDEN_PORT)])
        process = subprocess.Popen(command, pass_fds=[listener.fileno()], cwd=ROOT)
    yield f"{address}:{FORWARDED_PORT}"
    process.terminate()
    process.wait()


def test_a_device_behind_a_forwarded_port_takes_part(
    cluster: NetworkCluster, forwarded: str
) -> None:
    cluster.start_coordinator()
    joining = f"--coordinator={cluster.address}:{cluster.control_port}"
    # Listening at loopback, nas can be reached by the forward alone.
    cluster.start_agent(
        "nas", joining, "--bind=127.0.0.1", f"--port={HIDDEN_PORT}", f"--advertise={forwarded}"
    )
    cluster.start_agent("ash", joining)
    cluster.wait_for_agents("ash", "nas")
    cluster.load(TINY_OPT, "--bits=8", "--pin=embedding:ash", "--pin=head:nas")
    answer = cluster.run("run", str(TINY_OPT), "Once", "--max-tokens=3")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()


def test_a_device_behind_a_forward_that_it_does_not_name_is_named(
    cluster: NetworkCluster,
) -> None:
    cluster.start_coordinator()
    joining = f"--coordinator={cluster.address}:{cluster.control_port}"
    cluster.start_agent("nas", joining, "--bind=127.0.0.1", f"--port={HIDDEN_PORT}")
    cluster.start_agent("ash", joining)
    cluster.wait_for_agents("ash", "nas")
    refused = cluster.run(
        "load", str(TINY_OPT), "--bits=8", "--pin=embedding:ash", "--pin=head:nas"
    )
    assert refused.returncode != 0
    assert "ash cannot reach nas" in refused.stderr
