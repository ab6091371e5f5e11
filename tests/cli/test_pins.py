"""The command and the key of an HTTPS coordinator: agreed to once, then held to it."""

from __future__ import annotations

import datetime
import io
import ipaddress
import json
import os
import ssl
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cli.client import Client, default_url
from cli.errors import CommandFailed, CoordinatorUnreachable
from cli.service.running import Running, told
from wire.claim import shown
from wire.identity import Identity, own_identity


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.asked.append(self.headers.get("Authorization", ""))
        body = json.dumps({"model": None}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """An HTTPS server that notes the keys of requests. ``show`` changes its certificate."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked: list[str] = []
        self.context: ssl.SSLContext | None = None

    def show(self, identity: Identity) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(identity.path)

    def get_request(self):  # type: ignore[no-untyped-def]  # As in socketserver.
        sock, address = super().get_request()
        if self.context is None:
            return sock, address
        return self.context.wrap_socket(sock, server_side=True), address

    def handle_error(self, *_: object) -> None:
        pass  # Clients that leave are part of the tests.

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("SHOAL_API_KEY", "secret")
    monkeypatch.delenv("SHOAL_FINGERPRINT", raising=False)
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def identity(tmp_path: Path, server: Server) -> Identity:
    made = own_identity(tmp_path / "identity.pem")
    server.show(made)
    return made


class Typed(io.StringIO):
    def isatty(self) -> bool:
        return True


_SIGNING = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


def issued(authority_path: Path) -> bytes:
    """A key and a certificate of 127.0.0.1, by an authority whose certificate is written."""
    now = datetime.datetime.now(datetime.timezone.utc)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in "ab"]
    made = []
    for index, extension in enumerate(
        (
            _SIGNING,
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
        )
    ):
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[index])
            .issuer_name(names[0])
            .public_key(keys[index].public_key())
            .serial_number(index + 1)
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=index == 0, path_length=None), critical=True)
            .add_extension(extension, critical=index == 0)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(keys[index].public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()),
                critical=False,
            )
        )
        certificate = builder.sign(keys[0], hashes.SHA256())
        made.append(certificate.public_bytes(serialization.Encoding.PEM))
    authority_path.write_bytes(made[0])
    private = keys[1].private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return private + made[1]


def ask(server: Server) -> object:
    with Client(server.url) as client:
        return client.get("/shoal/v1/ps")


def test_an_unknown_key_gets_nothing(
    server: Server, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # No terminal.
    text = f"SHOAL_FINGERPRINT={shown(identity.fingerprint)}"
    with pytest.raises(CommandFailed, match=text):
        ask(server)
    monkeypatch.setattr(sys, "stdin", Typed("n\n"))
    with pytest.raises(CommandFailed, match="nothing was sent"):
        ask(server)
    assert server.asked == []


def test_a_key_that_was_agreed_to_is_kept_and_another_one_refused(
    server: Server,
    identity: Identity,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", Typed("y\n"))
    assert ask(server) == {"model": None}
    assert shown(identity.fingerprint) in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert ask(server) == {"model": None}
    assert server.asked == ["Bearer secret"] * 2

    server.show(own_identity(tmp_path / "impostor.pem"))
    monkeypatch.setattr(sys, "stdin", Typed("y\n"))
    with pytest.raises(CommandFailed, match=r"another key than before.*nothing was sent"):
        ask(server)
    assert len(server.asked) == 2


@pytest.mark.parametrize("as_hex", [True, False])
def test_a_fingerprint_can_be_named(
    as_hex: bool,
    server: Server,
    identity: Identity,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fingerprint = identity.fingerprint
    monkeypatch.setenv("SHOAL_FINGERPRINT", fingerprint.hex() if as_hex else shown(fingerprint))
    assert ask(server) == {"model": None}
    server.show(own_identity(tmp_path / "impostor.pem"))
    with pytest.raises(CommandFailed, match="names another one"):
        ask(server)
    assert len(server.asked) == 1


def test_a_certificate_that_the_system_trusts_needs_no_agreement(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "http.pem"
    path.write_bytes(issued(tmp_path / "ca.pem"))
    server.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.context.load_cert_chain(path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(CommandFailed, match="have not seen yet"):
        ask(server)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    assert ask(server) == {"model": None}


def test_this_machines_coordinator_is_known_by_its_own_file(
    server: Server, identity: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "state" / "shoal" / "coordinator"
    directory.mkdir(parents=True)
    monkeypatch.delenv("SHOAL_COORDINATOR", raising=False)
    running = Running(os.getpid(), "", 7420, "attic", server.url, identity.fingerprint.hex())
    with told(directory, running):
        assert ask(server) == {"model": None}
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(CommandFailed, match="have not seen yet"):
        ask(server)
    with told(directory, Running(os.getpid(), "", 7420, "attic", "https://127.0.0.1:7421", "")):
        assert default_url() == "https://127.0.0.1:7421"
    assert default_url() == "http://127.0.0.1:7421"


def test_errors_say_what_to_do(server: Server, identity: Identity) -> None:
    with (
        Client(server.url.replace("https:", "http:")) as client,
        pytest.raises(CommandFailed, match=f"say --url {server.url}"),
    ):
        client.get("/shoal/v1/ps")
    server.context = None
    with pytest.raises(CommandFailed, match=r"does not speak TLS: use http://"):
        ask(server)
    with pytest.raises(CoordinatorUnreachable, match="no coordinator answers at https://"):
        Client("https://127.0.0.1:1")
