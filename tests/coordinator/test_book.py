"""Which devices a coordinator lets in, and how invites end."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from agent.config import device_identity
from api.key_book import KeyBook
from coordinator.roster import book as books
from coordinator.roster.book import BadBook, DeviceBook
from wire.claim import Claim, prove_invite
from wire.errors import AuthFailed
from wire.identity import own_identity
from wire.invite import Invite
from wire.messages import DevicesKnown, KnownDevice

HERE = bytes(range(32))
TEXT = b"what the caller has signed"


ATTIC = {"device": "attic", "fingerprint": "0" * 64, "name": "", "joined_s": 1.0, "invite": ""}


class Clock:
    now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(tmp_path: Path, clock: Clock) -> DeviceBook:
    return DeviceBook(tmp_path, clock)


def claim(
    device: str, invite: Invite | None = None, *, key: int | None = None, purpose: str = "control"
) -> Claim:
    """What a device has proved, with a certificate of its own, or that of ``key``."""
    fingerprint = bytes([key if key is not None else ord(device[0])]) * 32
    proof = b"" if invite is None else prove_invite(invite.secret, TEXT)
    return Claim(fingerprint, purpose, device, invite.id if invite else "", TEXT, proof)


def test_a_device_joins_once_and_is_known_by_its_key_then(book: DeviceBook) -> None:
    with pytest.raises(AuthFailed, match="does not know this device"):
        book.admit(claim("attic"))
    invite = book.invite(HERE)
    assert invite.coordinator == HERE
    book.admit(claim("attic", invite))
    for purpose in ("control", "blocks"):
        book.admit(claim("attic", purpose=purpose))
    book.admit(claim("attic", invite))  # It is started with the same token again.
    assert book.known() == DevicesKnown((KnownDevice("attic", claim("attic").fingerprint),))
    with pytest.raises(AuthFailed, match=r"joined with another key.*devices revoke attic"):
        book.admit(claim("attic", key=1))
    with pytest.raises(AuthFailed, match="joined with another key"):
        book.admit(claim("attic", book.invite(HERE), key=1))


def test_an_invite_is_for_one_device_by_default(book: DeviceBook) -> None:
    invite = book.invite(HERE)
    book.admit(claim("attic", invite))
    with pytest.raises(AuthFailed, match="used up"):
        book.admit(claim("porch", invite))
    assert book.invites() == ()


def test_an_invite_may_have_several_uses_or_any_number(book: DeviceBook) -> None:
    two, many = book.invite(HERE, uses=2), book.invite(HERE, uses=None)
    for name in "ab":
        book.admit(claim(name, two))
    with pytest.raises(AuthFailed, match="used up"):
        book.admit(claim("c", two))
    for name in "cdefg":
        book.admit(claim(name, many))
    assert [item.device for item in book.devices()] == list("abcdefg")


def test_open_invites_are_bounded_so_that_the_file_stays_readable(
    book: DeviceBook, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books, "MOST_INVITES", 2)
    first, _ = book.invite(HERE), book.invite(HERE)
    with pytest.raises(BadBook, match="revoke some with `shoal token revoke ID`"):
        book.invite(HERE)
    book.revoke_invite(first.id)
    book.invite(HERE)
    clock.now_s += books.DEFAULT_TTL_S
    assert [item.id for item in book.invites()] == []
    book.invite(HERE)  # Those that have ended leave room.


def test_an_invite_ends_after_its_time(book: DeviceBook, clock: Clock) -> None:
    short, endless = book.invite(HERE, ttl_s=60), book.invite(HERE, ttl_s=None)
    clock.now_s += 59
    assert len(book.invites()) == 2
    clock.now_s += 1
    with pytest.raises(AuthFailed, match="has expired"):
        book.admit(claim("attic", short))
    clock.now_s += 1e9
    book.admit(claim("attic", endless))
    book.admit(claim("attic"))


def test_an_invite_that_has_ended_does_not_live_again_when_the_clock_is_set_back(
    book: DeviceBook, clock: Clock
) -> None:
    """A Raspberry Pi that starts without a network believes it is years ago."""
    short = book.invite(HERE, ttl_s=3600)
    clock.now_s -= 3599
    assert len(book.invites()) == 1  # An hour is what a wrong time zone makes.
    clock.now_s -= 1e7
    with pytest.raises(AuthFailed, match="has expired"):
        book.admit(claim("attic", short))
    other = book.invite(HERE, ttl_s=3600)
    assert [item.id for item in book.invites()] == [other.id]
    clock.now_s += 1e7 + 3599  # The network is back, and nothing was thrown away.
    book.admit(claim("attic", short))


@pytest.mark.parametrize("change", ["secret", "revoked", "purpose", "none"])
def test_nobody_joins_without_a_valid_invite(book: DeviceBook, change: str) -> None:
    invite = book.invite(HERE)
    if change == "revoked":
        book.revoke_invite(invite.id)
    trying = claim("attic", invite, purpose="blocks" if change == "purpose" else "control")
    if change == "secret":
        trying = Claim(trying.fingerprint, "control", "attic", invite.id, TEXT, bytes(32))
    if change == "none":
        trying = claim("attic")
    with pytest.raises(AuthFailed, match="does not know"):
        book.admit(trying)
    assert book.devices() == ()


def test_a_revoked_device_is_out_at_once_in_a_running_coordinator(
    book: DeviceBook, tmp_path: Path, clock: Clock
) -> None:
    book.admit(claim("attic", book.invite(HERE)))
    book.named("attic", "upstairs")
    command = DeviceBook(tmp_path, clock)
    with pytest.raises(BadBook, match="no device cellar; known: upstairs"):
        command.revoke_device("cellar")
    assert command.revoke_device("upstairs").device == "attic"
    with pytest.raises(AuthFailed, match="does not know this device"):
        book.admit(claim("attic"))
    book.admit(claim("attic", command.invite(HERE), key=1))


def test_two_devices_of_one_name_are_told_apart_by_id(book: DeviceBook) -> None:
    for device in ("attic", "porch"):
        book.admit(claim(device, book.invite(HERE)))
        book.named(device, "pi")
    with pytest.raises(BadBook, match="by its id: attic, porch"):
        book.revoke_device("pi")
    book.revoke_device("porch")
    assert [item.device for item in book.devices()] == ["attic"]


def test_one_use_admits_one_device_whoever_comes_at_once(
    book: DeviceBook, tmp_path: Path, clock: Clock
) -> None:
    invite = book.invite(HERE)
    outcomes: list[bool] = []

    def join(name: str) -> None:
        try:
            DeviceBook(tmp_path, clock).admit(claim(name, invite))
        except AuthFailed:
            outcomes.append(False)
        else:
            outcomes.append(True)

    threads = [threading.Thread(target=join, args=(name,)) for name in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 5 + [True]


def test_only_the_owner_can_read_the_file(book: DeviceBook, tmp_path: Path) -> None:
    book.invite(HERE)
    assert stat.S_IMODE((tmp_path / books.FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[]",
        '{"version": 1, "devices": [{}], "invites": []}',
        json.dumps(
            {
                "version": 1,
                "devices": [
                    {
                        "device": "a",
                        "fingerprint": "x" * 64,
                        "name": "",
                        "joined_s": 0,
                        "invite": "",
                    }
                ],
                "invites": [],
            }
        ),
    ],
)
def test_a_damaged_file_lets_nobody_in(book: DeviceBook, tmp_path: Path, text: str) -> None:
    book.admit(claim("attic", book.invite(HERE)))
    (tmp_path / books.FILE).write_text(text)
    with pytest.raises(AuthFailed, match="is damaged"):
        book.admit(claim("attic"))
    with pytest.raises(BadBook, match="is damaged"):
        book.invite(HERE)


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"devices": [ATTIC | {"until_s": 1}]}, {"invites": [{"net": "a"}]}]
)
def test_a_file_of_a_newer_version_is_said_to_be_that(
    book: DeviceBook, tmp_path: Path, change: dict[str, object]
) -> None:
    """What this version does not know may be a restriction. So nobody is let in without it."""
    newer = {"version": 1, "devices": [ATTIC], "invites": []}
    (tmp_path / books.FILE).write_text(json.dumps(newer))
    assert [device.device for device in book.devices()] == ["attic"]
    (tmp_path / books.FILE).write_text(json.dumps(newer | change))
    with pytest.raises(BadBook, match="was written by a newer version of shoal: install that one"):
        book.devices()


@pytest.mark.parametrize("joined_s", [1e300, "today", None, -1])
def test_a_time_that_cannot_be_shown_is_damage(
    book: DeviceBook, tmp_path: Path, joined_s: object
) -> None:
    content = {"version": 1, "devices": [ATTIC | {"joined_s": joined_s}], "invites": []}
    (tmp_path / books.FILE).write_text(json.dumps(content))
    with pytest.raises(BadBook, match="is damaged"):
        book.devices()


def test_root_gives_no_file_of_others_to_a_service_that_was_taken_over(
    tmp_path: Path, book: DeviceBook
) -> None:
    """The lock's file was given to the owner of the directory, wherever a link of it led."""
    (tmp_path / books.LOCK_FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        book.invite(HERE)
    assert not (tmp_path / "precious").exists()


def test_a_device_whose_id_is_anothers_name_can_be_revoked(book: DeviceBook) -> None:
    """The name of neither says which of the two is meant, but an id is one device's alone."""
    invite = book.invite(HERE, uses=2)
    book.admit(claim("0123", invite))
    book.named("0123", "pi-3")
    book.admit(claim("pi-3", invite))
    assert book.revoke_device("pi-3").device == "pi-3"
    assert book.revoke_device("pi-3").device == "0123"
    assert book.devices() == ()


@pytest.mark.parametrize("device", ["\x1b[2J", "", "a b", "a" * 64, "../x", "\N{SNOWMAN}"])
def test_an_id_that_a_terminal_should_not_show_joins_nobody(device: str, book: DeviceBook) -> None:
    invite = book.invite(HERE)
    with pytest.raises(AuthFailed, match="other characters"):
        book.admit(claim(device, invite, key=1))
    assert book.devices() == ()
    assert book.invites() != ()


def test_no_power_cut_brings_back_who_was_shut_out(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renamed file may have its old contents again until its directory is on the disk, too."""
    brought: list[tuple[int, set[str]]] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            brought.append((os.fstat(descriptor).st_ino, set(os.listdir(descriptor))))

    monkeypatch.setattr(os, "fsync", noted)
    keys, book = KeyBook(tmp_path), DeviceBook(tmp_path, clock)
    keys.create("phone")
    book.admit(claim("attic", book.invite(HERE)))
    own_identity(tmp_path / "identity.pem")
    device_identity(tmp_path)
    before = len(brought)
    keys.revoke("phone")
    book.revoke_device("attic")
    assert (before, len(brought)) == (5, 7)
    assert {number for number, _ in brought} == {tmp_path.stat().st_ino}
    files = {"api-keys.json", "devices.json", "identity.pem", "device-id"}
    assert files <= brought[before - 1][1]
