"""Who a machine is, and the token by which it joins."""

from __future__ import annotations

import base64
import errno
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509

from wire.claim import fingerprint_of, shown
from wire.identity import IdentityError, has_signed, own_identity
from wire.invite import TokenError, new_invite, parse_invite, read_invite

DATA = b"what is signed"


def test_an_identity_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "state" / "identity.pem"
    first = own_identity(path)
    again = own_identity(path)
    assert first.fingerprint == again.fingerprint == fingerprint_of(first.certificate)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [item.name for item in path.parent.iterdir()] == ["identity.pem"]
    assert own_identity(tmp_path / "other.pem").fingerprint != first.fingerprint
    assert "PRIVATE" not in repr(first)


def test_an_identity_that_cannot_be_made_is_said_to_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(IdentityError, match=r"cannot write the key in .*: file exists"):
        own_identity(tmp_path / "file" / "identity.pem")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for others")
def test_an_identity_that_root_makes_belongs_to_the_owner_of_the_directory(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, 12345, 12345)
    own_identity(state / "identity.pem")
    status = (state / "identity.pem").stat()
    assert (status.st_uid, status.st_gid) == (12345, 12345)
    assert stat.S_IMODE(status.st_mode) == 0o600


def test_two_threads_that_start_at_once_have_one_identity(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(own_identity(path).fingerprint))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


def test_a_certificate_has_no_dates_to_rely_on(tmp_path: Path) -> None:
    certificate = x509.load_der_x509_certificate(own_identity(tmp_path / "i.pem").certificate)
    assert certificate.not_valid_before_utc.year == 1970
    assert certificate.not_valid_after_utc.year == 9999


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_only_the_key_of_the_certificate_signs_for_it(tmp_path: Path) -> None:
    one, other = own_identity(tmp_path / "one.pem"), own_identity(tmp_path / "other.pem")
    signature = one.sign(DATA)
    assert has_signed(one.certificate, signature, DATA)
    assert not has_signed(other.certificate, signature, DATA)
    assert not has_signed(one.certificate, signature, DATA + b"!")
    assert not has_signed(one.certificate, signature[:-1], DATA)
    assert not has_signed(one.certificate, b"", DATA)
    for cut in range(0, len(one.certificate), 7):
        assert not has_signed(one.certificate[:cut], signature, DATA)
    assert not has_signed(one.certificate + bytes(1000), signature, DATA)
    # Some of these name another algorithm or version.
    for place in range(len(one.certificate)):
        for flip in (1, 8, 0x80):
            changed = bytearray(one.certificate)
            changed[place] ^= flip
            if has_signed(bytes(changed), signature, DATA):
                assert fingerprint_of(bytes(changed)) != one.fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [("nonsense", "is damaged"), ("", "is damaged"), (None, "others can read the key")],
)
def test_an_identity_that_cannot_be_used_is_named(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "identity.pem"
    own_identity(path)
    if text is None:
        path.chmod(0o640)
    else:
        path.write_text(text)
    with pytest.raises(IdentityError, match=message):
        own_identity(path)


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "one.pem", tmp_path / "other.pem"
    own_identity(one)
    own_identity(other)
    key = one.read_text().partition("-----BEGIN CERTIFICATE")[0]
    certificate = other.read_text().partition("-----BEGIN CERTIFICATE")[2]
    one.write_text(key + "-----BEGIN CERTIFICATE" + certificate)
    with pytest.raises(IdentityError, match="is damaged"):
        own_identity(one)


def test_fingerprints_are_shown_in_groups() -> None:
    assert shown(bytes(32)) == "AAAA-AAAA-AAAA-AAAA"
    assert shown(bytes(9) + b"\1" + bytes(22)) != shown(bytes(32))


def test_a_token_names_the_coordinator_and_goes_through_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invite = new_invite(bytes(range(32)))
    path = tmp_path / "token"
    path.write_text(invite.text + "\n")
    path.chmod(0o640)
    assert read_invite(path) == invite
    monkeypatch.setenv("SHOAL_TOKEN", invite.text)
    assert read_invite(None) == invite
    monkeypatch.delenv("SHOAL_TOKEN")
    assert read_invite(None) is None
    assert new_invite(bytes(32)).id != invite.id
    assert invite.secret.hex() not in repr(invite)
    assert repr(invite.secret) not in repr(invite)


def test_tokens_that_cannot_be_used_say_what_to_do(tmp_path: Path) -> None:
    text = new_invite(bytes(32)).text
    with pytest.raises(TokenError, match="shoal token create"):
        parse_invite("0123456789abcdef0123456789abcdef", "here")
    for cut in (1, 5, 44):
        with pytest.raises(TokenError, match=r"here: .*(copy all of it|no token)"):
            parse_invite(text[:-cut], "here")
    with pytest.raises(TokenError, match="copy all of it"):
        parse_invite(text[:-1] + "ü", "here")
    path = tmp_path / "token"
    with pytest.raises(TokenError, match="no such file"):
        read_invite(path)
    path.write_text(text)
    path.chmod(0o644)
    with pytest.raises(TokenError, match="chmod o= "):
        read_invite(path)


def test_a_key_of_a_kind_that_nobody_knows_is_named(tmp_path: Path) -> None:
    """One bit of the file has flipped, in the name of the key's algorithm."""
    path = tmp_path / "identity.pem"
    own_identity(path)
    _, begin, rest = path.read_text().partition("-----BEGIN PRIVATE KEY-----")
    key, end, rest = rest.partition("-----END PRIVATE KEY-----")
    der = bytearray(base64.b64decode(key))
    der[10] ^= 1
    path.write_text(begin + "\n" + base64.encodebytes(bytes(der)).decode() + end + rest)
    with pytest.raises(IdentityError, match="is damaged"):
        own_identity(path)


def without_links(source: object, target: object) -> None:
    """What a FAT file system says. The kernel of a test machine may have none."""
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_where_there_are_no_hard_links_all_starts_have_one_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", without_links)
    path = tmp_path / "identity.pem"
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(own_identity, path) for _ in range(8)]
        fingerprints = {one.result().fingerprint for one in found}
    assert fingerprints == {own_identity(path).fingerprint}
    assert [item.name for item in tmp_path.iterdir()] == ["identity.pem"]
