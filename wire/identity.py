"""The identity of a machine: a private key, and a certificate that the key signed itself.

An identity is made at the first start and kept in one file of the state directory. Other machines
know it by its fingerprint, the SHA-256 of the certificate. So nothing else in the certificate
counts: no name, no issuer and no date. A Raspberry Pi has no clock when it boots.

The key is EC P-256. Every OpenSSL since 1.1.1 takes it, and so does every browser.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import re
import ssl
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from wire.claim import Fingerprint, fingerprint_of
from wire.errors import NeedsPerson

MAX_CERTIFICATE_BYTES = 512
"""The largest certificate of a peer. One that is made here has about 300 bytes."""

MAX_IDENTITY_FILE_BYTES = 16 << 10

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""How a file system says that it has no hard links, as FAT and exFAT of a USB stick."""

_BEGIN = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
_END = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.timezone.utc)
"""RFC 5280, section 4.1.2.5: the end of a certificate that has none."""


class IdentityError(Exception):
    """An identity cannot be used. The message says why and what to do."""


class IdentityWrong(IdentityError, NeedsPerson):
    """... because its file is damaged, or others can read it."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A machine's own key and certificate."""

    path: Path
    """A PEM file with the key and the certificate, which ``ssl`` reads."""
    certificate: bytes
    """DER."""
    _key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def fingerprint(self) -> Fingerprint:
        return fingerprint_of(self.certificate)

    def sign(self, data: bytes) -> bytes:
        """Return a signature that ``has_signed`` checks."""
        return self._key.sign(data, ec.ECDSA(hashes.SHA256()))


def has_signed(certificate: bytes, signature: bytes, data: bytes) -> bool:
    """Whether the key of a peer's certificate made this signature. Malformed ones did not."""
    if len(certificate) > MAX_CERTIFICATE_BYTES:
        return False
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        if not isinstance(key.curve, ec.SECP256R1):
            return False
        key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion, ValueError, TypeError):
        return False
    return True


def own_identity(path: Path) -> Identity:
    """Return the identity in a file, and make both at the first call. Raises IdentityError."""
    doing = "read"
    try:
        if not path.exists():
            doing = "write"
            _make(path)
        data = path.read_bytes()
        if path.stat().st_mode & 0o077:
            raise IdentityWrong(f"others can read the key in {path}: {_advice(path)}")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise IdentityError(f"cannot {doing} the key in {path}: {reason}") from error
    return _read(path, data)


def _advice(path: Path) -> str:
    """Return how to keep others from reading the file. FAT and exFAT have no permissions."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=path.parent) as probe:
        if os.fstat(probe.fileno()).st_mode & 0o077:
            return (
                "its file system keeps no permissions; use a --state-dir on another one, or mount "
                "it with umask=077"
            )
    return f"run `chmod 600 {path}`"


def _read(path: Path, data: bytes) -> Identity:
    text = data.decode("ascii", "replace")
    found = re.search(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", text, re.DOTALL)
    try:
        if found is None or len(data) > MAX_IDENTITY_FILE_BYTES:
            raise ValueError("it has no certificate")
        certificate = ssl.PEM_cert_to_DER_cert(found[0])
        key = serialization.load_pem_private_key(data, password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError("the key is of another kind")
        if x509.load_der_x509_certificate(certificate).public_key() != key.public_key():
            raise ValueError("key and certificate do not belong together")
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise IdentityWrong(
            f"{path} is damaged: restore it from a backup, or remove it and join again"
        ) from error
    return Identity(path, certificate, key)


def _make(path: Path) -> None:
    """Write a new identity. If another process has written one meanwhile, that one stays."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "shoal")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_BEGIN)
        .not_valid_after(_END)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    data = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    data += certificate.public_bytes(pem)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name_of_new = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    new = Path(name_of_new)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if os.geteuid() == 0:  # Whose directory it is runs the coordinator or the agent.
                owner = path.parent.stat()
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _name(new, path)
    finally:
        new.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # Others know the key from now on. No power cut undoes it.
        directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _name(new: Path, path: Path) -> None:
    """Give a whole file its name, unless another process was first. Raises OSError."""
    try:
        os.link(new, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:  # Without links, one process after the other looks whether it is the first.
            fcntl.flock(directory, fcntl.LOCK_EX)
            if not path.exists():
                new.replace(path)
        finally:
            os.close(directory)
