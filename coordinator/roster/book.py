"""The devices that a coordinator knows by their keys, and the invites by which new ones join.

A file of the state directory has both. ``shoal token`` and ``shoal devices revoke`` change it
while the coordinator runs, which sees each change at the next connection.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from model.state_file import LATEST_S, Kind, Newer, StateFile
from wire.claim import Claim, Fingerprint, shown
from wire.errors import AuthFailed
from wire.invite import ID_CHARACTERS, SECRET_BYTES, Invite, new_invite
from wire.messages import DevicesKnown, KnownDevice
from wire.rare_log import RareLog

log = logging.getLogger(__name__)

FILE = "devices.json"
LOCK_FILE = "devices.lock"
VERSION = 1
LARGEST_FILE_BYTES = 4 << 20
MOST_DEVICES = 4096
MOST_INVITES = 1024

DEFAULT_TTL_S = 24 * 3600.0

UNKNOWN = (
    "this shoal does not know this device: start it with a token; where the coordinator runs, "
    "`shoal token create` makes one"
)
NO_INVITE = (
    "this shoal does not know the token: it was revoked, or is of another coordinator; "
    "`shoal token create` makes one"
)
ENDED = "the token has expired: `shoal token create` makes another one"
USED = "the token was used up: `shoal token create` makes another one"
OTHER_KEY = (
    "a device of this id has joined with another key: `shoal devices revoke {name}` where the "
    "coordinator runs, then start this one with a token"
)
NO_ID = "this device's id has other characters than letters, digits, and . _ -, or too many"
FULL = f"this shoal knows {MOST_DEVICES} devices: revoke some with `shoal devices revoke NAME`"

_HEX = re.compile(r"[0-9a-f]+")
_DEVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
"""An agent makes 16 hexadecimal digits. Ids are shown at terminals."""


class BadBook(Exception):
    """The file cannot be read, or has no such entry. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device that may join."""

    device: str
    fingerprint: str
    """In hexadecimal."""
    name: str
    """Its name when it was here last. Empty until it has said one."""
    joined_s: float
    """Seconds since 1970."""
    invite: str
    """The id of the invite by which it joined."""


@dataclass(frozen=True, slots=True)
class OpenInvite:
    """An invite as the file has it."""

    id: str
    secret: str
    """In hexadecimal."""
    created_s: float
    ends_s: float | None
    """Seconds since 1970. None never ends."""
    uses: int | None
    """The number of devices that may still join by it. None is any number."""

    def refusal(self, now_s: float) -> str | None:
        """Why nobody can join by it now, or None."""
        # If the clock was set back, an invite that has ended must not live again.
        if self.ends_s is not None and abs(now_s - self.created_s) >= self.ends_s - self.created_s:
            return ENDED
        return USED if self.uses == 0 else None

    def is_over(self, now_s: float) -> bool:
        """Whether nobody can ever join by it."""
        return self.uses == 0 or (self.ends_s is not None and now_s >= self.ends_s)


@dataclass(frozen=True, slots=True)
class _Book:
    devices: tuple[Device, ...] = ()
    invites: tuple[OpenInvite, ...] = ()


class DeviceBook:
    """The file in a coordinator's state directory. One thread uses it."""

    def __init__(self, directory: Path, now_s: Callable[[], float] = time.time) -> None:
        self._file = StateFile(directory / FILE, directory / LOCK_FILE, _KIND)
        self._now_s = now_s
        self._known: dict[str, Device] = {}
        """Maps a device id to the device."""
        self._rare_log = RareLog(log)

    # ---- what the coordinator asks --------------------------------------------------------------

    def admit(self, claim: Claim) -> None:
        """Let a known device in, or a new one that has an invite. Raises AuthFailed."""
        try:
            if not self._is_known(claim):
                self._join(claim)
        except (BadBook, OSError) as error:
            self._rare_log.warning("book", "no device is let in: %s", error)
            raise AuthFailed(
                str(error), "the coordinator cannot read its list of devices"
            ) from error

    def known(self) -> DevicesKnown:
        """Return all devices that may join, as agents are told. Raises BadBook."""
        self._refresh()
        return DevicesKnown(
            tuple(
                KnownDevice(item.device, bytes.fromhex(item.fingerprint))
                for item in self._known.values()
            )
        )

    def named(self, device: str, name: str) -> None:
        """Remember the name of a device that has joined. Raises BadBook, OSError."""
        self._refresh()
        known = self._known.get(device)
        if known is None or known.name == name:
            return
        with self._file.changing() as change:
            devices = tuple(
                replace(item, name=name) if item.device == device else item
                for item in change.content.devices
            )
            change.content = replace(change.content, devices=devices)

    def _is_known(self, claim: Claim) -> bool:
        self._refresh()
        known = self._known.get(claim.device)
        if known is None:
            return False
        if known.fingerprint != claim.fingerprint.hex():
            text = OTHER_KEY.format(name=known.name or known.device)
            raise AuthFailed(f"{text} (its key is {shown(claim.fingerprint)})", text)
        return True

    def _join(self, claim: Claim) -> None:
        if not claim.invite_id or claim.purpose != "control":
            raise AuthFailed(UNKNOWN, UNKNOWN)
        if not _DEVICE_ID.fullmatch(claim.device):
            raise AuthFailed(NO_ID, NO_ID)
        with self._file.changing() as change:
            book = change.content
            invite = next((item for item in book.invites if item.id == claim.invite_id), None)
            if invite is None or not claim.knows(bytes.fromhex(invite.secret)):
                raise AuthFailed(NO_INVITE, NO_INVITE)
            refusal = invite.refusal(self._now_s())
            if refusal is None and len(book.devices) >= MOST_DEVICES:
                refusal = FULL
            if refusal is not None:
                raise AuthFailed(refusal, refusal)
            left = replace(invite, uses=None if invite.uses is None else invite.uses - 1)
            joined = Device(
                claim.device, claim.fingerprint.hex(), "", round(self._now_s(), 3), invite.id
            )
            change.content = _Book(
                (*book.devices, joined),
                tuple(left if item is invite else item for item in book.invites),
            )

    # ---- what ``shoal token`` and ``shoal devices`` do -------------------------------------------

    def devices(self) -> tuple[Device, ...]:
        """All devices, oldest first. Raises BadBook."""
        return self._file.read().devices

    def invites(self) -> tuple[OpenInvite, ...]:
        """All invites by which somebody can still join, oldest first. Raises BadBook."""
        now_s = self._now_s()
        return tuple(item for item in self._file.read().invites if item.refusal(now_s) is None)

    def invite(
        self, coordinator: Fingerprint, ttl_s: float | None = DEFAULT_TTL_S, uses: int | None = 1
    ) -> Invite:
        """Make an invite to this coordinator. Raises BadBook, OSError."""
        made = new_invite(coordinator)
        now_s = self._now_s()
        ends_s = None if ttl_s is None else round(now_s + ttl_s, 3)
        entry = OpenInvite(made.id, made.secret.hex(), round(now_s, 3), ends_s, uses)
        with self._file.changing() as change:
            still = tuple(item for item in change.content.invites if not item.is_over(now_s))
            if len(still) >= MOST_INVITES:  # The file has an end, and nobody could join behind it.
                raise BadBook(
                    f"there are {MOST_INVITES} tokens that nobody has used: revoke some with "
                    "`shoal token revoke ID`"
                )
            change.content = replace(change.content, invites=(*still, entry))
        return made

    def revoke_invite(self, invite_id: str) -> None:
        """Forget an invite. Devices that joined by it stay. Raises BadBook, OSError."""
        with self._file.changing() as change:
            left = tuple(item for item in change.content.invites if item.id != invite_id)
            if len(left) == len(change.content.invites):
                known = ", ".join(item.id for item in left) or "none"
                raise BadBook(f"there is no token {invite_id}; known: {known}")
            change.content = replace(change.content, invites=left)

    def revoke_device(self, name: str) -> Device:
        """Forget a device by its name or id. Raises BadBook, OSError."""
        with self._file.changing() as change:
            devices = change.content.devices
            # An id is one device's alone, whatever others call themselves.
            found = [item for item in devices if name == item.device] or [
                item for item in devices if name == item.name
            ]
            if not found:
                known = ", ".join(item.name or item.device for item in change.content.devices)
                raise BadBook(f"there is no device {name}; known: {known or 'none'}")
            if len(found) > 1:
                ids = ", ".join(item.device for item in found)
                raise BadBook(f"several devices are named {name}: name one by its id: {ids}")
            devices = tuple(item for item in change.content.devices if item is not found[0])
            change.content = replace(change.content, devices=devices)
            return found[0]

    def _refresh(self) -> None:
        """Read the file if it has changed. Raises BadBook."""
        book = self._file.news()
        if book is not None:
            self._known = {item.device: item for item in book.devices}


def _parsed(values: object) -> _Book:
    """The content of the file.

    Raises Newer, and ValueError, TypeError, LookupError if it is something else.
    """
    if not isinstance(values, dict):
        raise TypeError("expected a list of devices")
    if type(values["version"]) is int and values["version"] > VERSION:
        raise Newer
    if values["version"] != VERSION:
        raise ValueError("not a version")
    _require_known(Device, values["devices"])
    _require_known(OpenInvite, values["invites"])
    book = _Book(
        tuple(Device(**item) for item in values["devices"]),
        tuple(OpenInvite(**item) for item in values["invites"]),
    )
    for device in book.devices:
        _require_hex(device.fingerprint, 64)
        _require_time(device.joined_s)
        if not isinstance(device.device, str) or not isinstance(device.name, str):
            raise TypeError("not a device")
    for invite in book.invites:
        _require_hex(invite.secret, 2 * SECRET_BYTES)
        _require_hex(invite.id, ID_CHARACTERS)
        _require_time(invite.created_s)
        if invite.ends_s is not None:
            _require_time(invite.ends_s)
        if type(invite.uses) not in (int, type(None)):
            raise TypeError("not an invite")
    return book


def _require_known(kind: type[Device] | type[OpenInvite], items: Any) -> None:
    names = {field.name for field in fields(kind)}
    if any(item.keys() - names for item in items):
        raise Newer


def _require_time(value: object) -> None:
    if type(value) not in (int, float) or not 0 <= cast("float", value) < LATEST_S:
        raise ValueError("not a time")


def _require_hex(text: object, characters: int) -> None:
    if not isinstance(text, str) or len(text) != characters or not _HEX.fullmatch(text):
        raise ValueError("not hexadecimal digits")


def _dumped(book: _Book) -> dict[str, Any]:
    return {"version": VERSION, **asdict(book)}


_KIND = Kind(
    name="a list of devices",
    largest_bytes=LARGEST_FILE_BYTES,
    nothing=_Book(),
    parse=_parsed,
    dump=_dumped,
    fault=BadBook,
    if_newer="restore the file from a backup",
    if_damaged="restore it from a backup, or remove it and let all devices join again",
)
