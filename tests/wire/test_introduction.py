"""Who gets through TLS and the introduction in it, and what each side is told.

Each attack is one that a neighbour on the LAN can try: to announce itself, to pass bytes on, to
record and repeat, to use a proof elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from wire import introduction
from wire.async_connection import AsyncConnection, serve
from wire.claim import Claim
from wire.codec import encode
from wire.connection import Connection, Listener
from wire.errors import AuthFailed, ConnectFailed, WireError
from wire.handshake import NEEDED
from wire.identity import Identity, own_identity
from wire.introduction import COORDINATOR, Answerer, Caller
from wire.invite import Invite, new_invite
from wire.messages import (
    AuthAnswer,
    AuthChallenge,
    Endpoint,
    Heartbeat,
    Introduction,
    JoinRefused,
    Message,
    ProbePing,
)
from wire.tls import TlsTransport, own_client_context

ANSWER_S = 60.0
UNKNOWN = "this shoal does not know that device"
PAYLOAD = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    """The identities of all machines here, by name."""
    directory = tmp_path_factory.mktemp("identities")
    return {
        name: own_identity(directory / name) for name in (COORDINATOR, "attic", "porch", "mallory")
    }


class Machine:
    """Answers at one port: echoes messages; the last one of each caller, or its error, is kept."""

    def __init__(self, answerer: Answerer) -> None:
        self.listener = Listener("127.0.0.1", 0, answerer=answerer)
        self.endpoint = Endpoint("127.0.0.1", self.listener.port)
        self.outcomes: list[WireError | Message] = []
        self.claims: list[Claim] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while (connection := self.listener.accept()) is not None:
            outcome: WireError | Message | None = None
            with connection:
                try:
                    connection.set_receive_timeout(ANSWER_S)
                    while True:
                        message, payload = connection.receive()
                        if outcome is None:
                            assert connection.claim is not None
                            self.claims.append(connection.claim)
                        outcome = message
                        connection.send(message, payload)
                except WireError as error:
                    self.outcomes.append(outcome or error)

    def close(self) -> None:
        self.listener.close()
        self._thread.join(ANSWER_S)


Serve = Callable[[Answerer], Machine]


@pytest.fixture
def machine() -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def make(answerer: Answerer) -> Machine:
            made = Machine(answerer)
            stack.callback(made.close)
            return made

        yield make


def knowing(*known: Identity) -> Callable[[Claim], None]:
    """Admit these machines only."""

    def admit(claim: Claim) -> None:
        if claim.fingerprint not in {identity.fingerprint for identity in known}:
            raise AuthFailed(UNKNOWN, UNKNOWN)

    return admit


def coordinator_of(identities: dict[str, Identity]) -> Answerer:
    return Answerer(
        identities[COORDINATOR],
        COORDINATOR,
        frozenset(("control", "blocks")),
        knowing(identities["attic"], identities["porch"]),
    )


def agent_of(identities: dict[str, Identity], name: str) -> Answerer:
    return Answerer(identities[name], name, frozenset(("data",)), knowing(identities["attic"]))


def attic_to_coordinator(identities: dict[str, Identity]) -> Caller:
    return Caller(
        identities["attic"],
        identities[COORDINATOR].fingerprint,
        "control",
        "attic",
        COORDINATOR,
    )


def converse(endpoint: Endpoint, caller: Caller) -> None:
    with Connection.connect(endpoint, caller=caller) as connection:
        connection.set_receive_timeout(ANSWER_S)
        connection.send(Heartbeat(5))
        message, payload = connection.receive()
        if isinstance(message, JoinRefused):
            raise AuthFailed(message.reason)
        connection.send(ProbePing(5), PAYLOAD)
        message, payload = connection.receive()
        assert (message, bytes(payload)) == (ProbePing(5), PAYLOAD)


def test_a_known_machine_gets_through_and_is_known_for_sure(
    identities: dict[str, Identity], machine: Serve
) -> None:
    answering = machine(coordinator_of(identities))
    converse(answering.endpoint, attic_to_coordinator(identities))
    answering.close()
    assert answering.outcomes == [ProbePing(5)]
    (claim,) = answering.claims
    assert (claim.fingerprint, claim.purpose, claim.device) == (
        identities["attic"].fingerprint,
        "control",
        "attic",
    )


def test_asyncio_answers_the_same(identities: dict[str, Identity]) -> None:
    claims: list[Claim | None] = []

    async def handle(connection: AsyncConnection) -> None:
        claims.append(connection.claim)
        for _ in range(2):
            message, payload = await connection.receive(ANSWER_S)
            await connection.send(message, payload)

    async def main() -> None:
        server, port = await serve("127.0.0.1", 0, handle, answerer=coordinator_of(identities))
        endpoint = Endpoint("127.0.0.1", port)
        async with server:
            known = attic_to_coordinator(identities)
            await asyncio.to_thread(converse, endpoint, known)
            stranger = replace(known, identity=identities["mallory"])
            with pytest.raises(AuthFailed, match=UNKNOWN):
                await asyncio.to_thread(converse, endpoint, stranger)

    asyncio.run(main())
    assert [claim.device for claim in claims if claim] == ["attic"]


def test_an_impostor_is_left_before_anything_is_said(
    identities: dict[str, Identity], machine: Serve
) -> None:
    """It announces itself as the coordinator, but has another key."""
    impostor = machine(replace(coordinator_of(identities), identity=identities["mallory"]))
    with pytest.raises(AuthFailed, match="is another machine"):
        converse(impostor.endpoint, attic_to_coordinator(identities))
    impostor.close()
    (outcome,) = impostor.outcomes
    assert "closed the connection" in str(outcome)
    assert impostor.claims == []


def test_a_stranger_is_told_that_nobody_knows_it(
    identities: dict[str, Identity], machine: Serve
) -> None:
    answering = machine(coordinator_of(identities))
    stranger = replace(attic_to_coordinator(identities), identity=identities["mallory"])
    with pytest.raises(AuthFailed, match=UNKNOWN):
        converse(answering.endpoint, stranger)


def passing_on(source: socket.socket, target: socket.socket, seen: bytearray) -> None:
    """Pass bytes on in both directions until one side ends."""
    ends = {source: target, target: source}
    while True:
        for ready in select.select(list(ends), [], [])[0]:
            data = ready.recv(65536)
            if not data:
                return
            seen += data
            ends[ready].sendall(data)


@pytest.fixture
def relay() -> Iterator[Callable[[Endpoint], tuple[Endpoint, bytearray]]]:
    """A host that passes one connection on to an address, and keeps all bytes."""
    with contextlib.ExitStack() as stack:

        def make(target: Endpoint) -> tuple[Endpoint, bytearray]:
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            seen = bytearray()

            def run() -> None:
                with (
                    listening.accept()[0] as source,
                    socket.create_connection((target.host, target.port)) as onward,
                    contextlib.suppress(OSError),
                ):
                    passing_on(source, onward, seen)

            thread = threading.Thread(target=run)
            thread.start()
            stack.callback(thread.join, ANSWER_S)
            return Endpoint("127.0.0.1", listening.getsockname()[1]), seen

        yield make


Relay = Callable[[Endpoint], tuple[Endpoint, bytearray]]


def test_a_relay_to_the_coordinator_learns_nothing(
    identities: dict[str, Identity], machine: Serve, relay: Relay
) -> None:
    between, seen = relay(machine(coordinator_of(identities)).endpoint)
    converse(between, attic_to_coordinator(identities))
    assert len(seen) > 2 * len(PAYLOAD)
    assert PAYLOAD[:64] not in seen
    assert b"attic" not in seen
    assert identities["attic"].certificate not in seen


def test_a_relay_that_changes_a_byte_ends_the_connection(
    identities: dict[str, Identity], machine: Serve
) -> None:
    answering = machine(coordinator_of(identities))
    with Connection.connect(answering.endpoint, caller=attic_to_coordinator(identities)) as ours:
        transport = ours._transport
        assert isinstance(transport, TlsTransport)
        sealed = bytearray(transport._channel.seal(encode(Heartbeat(5))))
        sealed[-1] ^= 1
        transport._socket.sendall(sealed)
        ours.set_receive_timeout(ANSWER_S)
        with pytest.raises(WireError):
            ours.receive()
    answering.close()
    (outcome,) = answering.outcomes
    assert "breaks TLS" in str(outcome)


def test_a_call_to_the_coordinator_cannot_be_passed_on_to_another_agent(
    identities: dict[str, Identity], machine: Serve, relay: Relay
) -> None:
    """A call for control that reaches an agent's data port is left at once."""
    between, _ = relay(machine(agent_of(identities, "porch")).endpoint)
    with pytest.raises(AuthFailed, match="is another machine"):
        converse(between, attic_to_coordinator(identities))


@pytest.mark.parametrize(
    "change", [{"purpose": "data"}, {"expected": "attic"}, {"expected": "porch"}]
)
def test_a_proof_for_another_port_or_device_is_refused(
    identities: dict[str, Identity], machine: Serve, change: dict[str, str]
) -> None:
    answering = machine(coordinator_of(identities))
    caller = replace(attic_to_coordinator(identities), **change)  # type: ignore[arg-type] # a table
    with pytest.raises(AuthFailed, match=introduction.MISDIRECTED):
        converse(answering.endpoint, caller)


def inside_tls(answering: Machine, identities: dict[str, Identity]) -> Connection:
    """A connection that says what it likes inside TLS."""
    fingerprint = identities[COORDINATOR].fingerprint
    connection = Connection.connect(
        answering.endpoint,
        transport=lambda sock: TlsTransport(sock, own_client_context(), fingerprint),
    )
    connection.set_receive_timeout(ANSWER_S)
    return connection


def introduced(
    answering: Machine, identities: dict[str, Identity], caller: Caller, **changes: object
) -> tuple[Message, Introduction]:
    """The answer to a heartbeat after an introduction with some fields changed, and the latter."""
    steps = introduction.call(caller)
    with inside_tls(answering, identities) as connection:
        challenge = next(steps)
        assert isinstance(challenge, AuthChallenge)
        connection.send(challenge)
        next(steps)
        said = steps.send(connection.receive()[0])
        assert isinstance(said, Introduction)
        connection.send(replace(said, **changes))  # type: ignore[arg-type] # a table
        connection.send(Heartbeat(5))
        return connection.receive()[0], said


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "porch"},
        {"purpose": "blocks"},
        {"signature": bytes(70)},
        {"signature": b""},
        {"certificate": b""},
    ],
)
def test_a_changed_introduction_is_refused(
    identities: dict[str, Identity], machine: Serve, changes: dict[str, object]
) -> None:
    answering = machine(coordinator_of(identities))
    answer, _ = introduced(answering, identities, attic_to_coordinator(identities), **changes)
    assert answer == JoinRefused(introduction.FORGED)


def test_a_certificate_without_its_key_is_refused(
    identities: dict[str, Identity], machine: Serve
) -> None:
    answering = machine(coordinator_of(identities))
    thief = replace(attic_to_coordinator(identities), identity=identities["mallory"])
    stolen = identities["attic"].certificate
    answer, _ = introduced(answering, identities, thief, certificate=stolen)
    assert answer == JoinRefused(introduction.FORGED)


def test_a_recorded_introduction_is_refused(
    identities: dict[str, Identity], machine: Serve
) -> None:
    """Even the coordinator's own record of an earlier connection is worth nothing."""
    answering = machine(coordinator_of(identities))
    caller = attic_to_coordinator(identities)
    answer, recorded = introduced(answering, identities, caller)
    assert answer == Heartbeat(5)
    repeated = {
        "certificate": recorded.certificate,
        "signature": recorded.signature,
    }
    answer, _ = introduced(answering, identities, caller, **repeated)
    assert answer == JoinRefused(introduction.FORGED)


def test_an_introduction_to_one_agent_is_worth_nothing_at_another(
    identities: dict[str, Identity], machine: Serve
) -> None:
    """An agent that was called cannot call a third one in the caller's name."""
    coordinator = machine(coordinator_of(identities))
    to_mallory = replace(
        attic_to_coordinator(identities), answerer=identities["mallory"].fingerprint
    )
    answer, _ = introduced(coordinator, identities, to_mallory)
    assert answer == JoinRefused(introduction.FORGED)


def test_a_machine_joins_by_an_invite(identities: dict[str, Identity], machine: Serve) -> None:
    invite = new_invite(identities[COORDINATOR].fingerprint)
    seen: list[bool] = []

    def admit(claim: Claim) -> None:
        seen.append(claim.invite_id == invite.id and claim.knows(invite.secret))
        if not seen[-1]:
            raise AuthFailed(UNKNOWN, UNKNOWN)

    answering = machine(replace(coordinator_of(identities), admit=admit))
    joining = replace(
        attic_to_coordinator(identities), identity=identities["mallory"], invite=invite
    )
    converse(answering.endpoint, joining)
    wrong = replace(joining, invite=Invite(invite.coordinator, bytes(32)))
    for other in (replace(joining, invite=None), wrong):
        with pytest.raises(AuthFailed, match=UNKNOWN):
            converse(answering.endpoint, other)
    assert seen == [True, False, False]
    # The proof of an invite is of no use for another certificate.
    _, said = introduced(answering, identities, joining)
    other_caller = replace(joining, identity=identities["attic"])
    answer, _ = introduced(
        answering, identities, other_caller, invite=said.invite, invite_proof=said.invite_proof
    )
    assert answer == JoinRefused(UNKNOWN)


def test_plain_and_encrypted_ends_name_the_cause(
    identities: dict[str, Identity], machine: Serve
) -> None:
    answering = machine(coordinator_of(identities))
    with Connection.connect(answering.endpoint) as connection:
        connection.set_receive_timeout(ANSWER_S)
        connection.send(Heartbeat(5))
        assert connection.receive()[0] == JoinRefused(NEEDED)
    answering.close()
    (outcome,) = answering.outcomes
    assert isinstance(outcome, AuthFailed)
    plain = Listener("127.0.0.1", 0)

    def answer() -> None:
        connection = plain.accept()
        assert connection is not None
        with connection, pytest.raises(AuthFailed, match="this side runs with --insecure"):
            connection.receive()

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(ConnectFailed, match="it runs with --insecure: start both"):
        converse(Endpoint("127.0.0.1", plain.port), attic_to_coordinator(identities))
    thread.join(ANSWER_S)
    plain.close()


def test_the_old_handshake_is_refused_inside_tls(
    identities: dict[str, Identity], machine: Serve
) -> None:
    answering = machine(coordinator_of(identities))
    for first in (AuthChallenge(1, bytes(32)), AuthAnswer(bytes(32)), Heartbeat(5)):
        with inside_tls(answering, identities) as connection:
            connection.send(first)
            assert isinstance(connection.receive()[0], JoinRefused), first
