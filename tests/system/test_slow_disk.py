"""Another program holds the coordinator's list of devices. Nobody but a new device waits."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import httpx

from coordinator.roster.book import LOCK_FILE
from tests.system.cluster import Cluster, wait_for
from wire.connection import Connection
from wire.identity import own_identity
from wire.introduction import COORDINATOR, Caller
from wire.messages import Endpoint


def test_all_others_go_on_while_a_device_joins(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_coordinator("--no-mdns")
    home = cluster.directory / "coordinator"
    fingerprint = own_identity(home / "identity.pem").fingerprint
    invite = cluster.book().invite(fingerprint)
    new = Caller(
        own_identity(tmp_path / "new.pem"), fingerprint, "control", "new", COORDINATOR, invite
    )
    lock = os.open(home / LOCK_FILE, os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with Connection.connect(Endpoint("127.0.0.1", cluster.control_port), caller=new):
            for _ in range(10):  # Soon the coordinator waits for the list.
                answer = httpx.get(f"{cluster.url}/health", timeout=60, trust_env=False)
                assert answer.status_code in (200, 503)
                time.sleep(0.1)  # The answers are spread over the time of the slow disk.
            assert not cluster.book().devices()
            os.close(lock)
            lock = -1
            wait_for(lambda: bool(cluster.book().devices()), 60, "the device in the list")
    finally:
        if lock >= 0:
            os.close(lock)
