"""A machine of a test that has joined a cluster, and then says what it likes to the others."""

from __future__ import annotations

from tests.machines import identity_of
from tests.system.cluster import START_TIMEOUT_S, Cluster, wait_for
from wire.connection import Connection
from wire.introduction import COORDINATOR, Caller
from wire.invite import read_invite
from wire.messages import Endpoint


class Member:
    """Known to the coordinator and so to all agents, without being an agent."""

    def __init__(self, cluster: Cluster, device: str = "stranger") -> None:
        """Join by the cluster's token. Its coordinator must run."""
        self.device = device
        self._cluster = cluster
        self._identity = identity_of(device)
        invite = read_invite(cluster.token())
        assert invite is not None
        endpoint = Endpoint("127.0.0.1", cluster.control_port)
        caller = Caller(self._identity, invite.coordinator, "control", device, COORDINATOR, invite)
        with Connection.connect(endpoint, caller=caller):
            wait_for(lambda: device in self._known(), START_TIMEOUT_S, f"{device} being known")

    def to(self, device: str) -> Caller:
        """What a connection to the agent of this device id needs."""
        return Caller(self._identity, self._known()[device], "data", self.device, device)

    def _known(self) -> dict[str, bytes]:
        devices = self._cluster.book().devices()
        return {item.device: bytes.fromhex(item.fingerprint) for item in devices}
