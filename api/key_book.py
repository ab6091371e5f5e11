"""The API keys of a coordinator: a file of their hashes, which ``shoal key`` changes.

A key is long and random, so a plain SHA-256 tells nothing about it. The coordinator sees a change
of the file at the next request.

There is also a local key. The coordinator makes a new one at each start, and writes it into its
state directory. Whoever can read that directory on the same machine needs no key of the file.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from model.durable import replace_text
from model.state_file import LATEST_S, Kind, Newer, StateFile
from wire.rare_log import RareLog

log = logging.getLogger(__name__)

FILE = "api-keys.json"
LOCK_FILE = "api-keys.lock"
LOCAL_FILE = "local-key"
LOCAL_NAME = "local"
"""The name of the local key in logs. No key of the file may have it."""

VERSION = 1

PREFIX = "sk-shoal-"
KEY_BYTES = 32
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}", re.ASCII)
LARGEST_FILE_BYTES = 1 << 20

CLASSES = ("realtime", "normal", "bulk")
"""The classes of requests, the most urgent first (coordinator/serving/urgency.py)."""


class BadKey(Exception):
    """A key cannot be made, found or read. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key as the file has it."""

    name: str
    sha256: str
    created_s: float
    """Seconds since 1970."""
    urgency: str = ""
    """The class of its requests, as in the header x-shoal-class. Empty: they say it themselves."""


class KeyBook:
    """The keys in a coordinator's state directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = StateFile(directory / FILE, directory / LOCK_FILE, _KIND)
        self._known: dict[str, Key] = {}
        """Maps the hash of a key to it."""
        self._local = ""
        self._rare_log = RareLog(log)

    # ---- what the coordinator asks --------------------------------------------------------------

    def make_local(self) -> None:
        """Make a new local key, and write it for users of this machine. Raises OSError.

        If the file of keys is damaged, the log says so.
        """
        self._local = _new_key()
        replace_text(self._directory / LOCAL_FILE, self._local + "\n", mode=0o600)
        self._try_refresh()

    @property
    def exists(self) -> bool:
        """Whether a key was ever made here. Then requests need one, even if all are revoked."""
        return self._file.path.exists()

    def known(self, key: str) -> Key | None:
        """The entry of a key, or None if it is not known. A damaged file has no keys."""
        given = key.encode(errors="replace")
        if self._local and hmac.compare_digest(given, self._local.encode()):
            return Key(LOCAL_NAME, "", 0.0)
        self._try_refresh()
        # The hash is looked up, not the key. So the time of the look-up tells nothing.
        return self._known.get(hashlib.sha256(given).hexdigest())

    def _try_refresh(self) -> None:
        """Read the file if it has changed. If that fails, no key is known."""
        try:
            keys = self._file.news()
        except BadKey as error:
            self._known = {}
            self._rare_log.warning("keys", "no API key is accepted: %s", error)
        else:
            if keys is not None:
                self._known = {key.sha256: key for key in keys}

    # ---- what ``shoal key`` does ----------------------------------------------------------------

    def listed(self) -> tuple[Key, ...]:
        """All keys, oldest first. Raises BadKey."""
        return self._file.read()

    def create(self, name: str, urgency: str = "") -> str:
        """Make a key of this name, and return it. It is not kept. Raises BadKey, OSError.

        urgency: as of ``Key``.
        """
        if not NAME.fullmatch(name) or name == LOCAL_NAME:
            raise BadKey(
                f"the name {name!r} cannot be used: take up to 63 letters, digits, and . _ @ -, "
                f"but not {LOCAL_NAME!r}"
            )
        with self._file.changing() as change:
            if any(key.name == name for key in change.content):
                raise BadKey(
                    f"there is a key named {name} already: take another name, or revoke it first "
                    f"with `shoal key revoke {name}`"
                )
            key = _new_key()
            sha256 = hashlib.sha256(key.encode()).hexdigest()
            made = Key(name, sha256, round(time.time(), 3), urgency)
            change.content = (*change.content, made)
        return key

    def revoke(self, name: str) -> None:
        """Forget the key of this name. Raises BadKey, OSError."""
        with self._file.changing() as change:
            left = tuple(key for key in change.content if key.name != name)
            if len(left) == len(change.content):
                names = ", ".join(key.name for key in left) or "none"
                raise BadKey(f"there is no key named {name}; known: {names}")
            change.content = left


def _new_key() -> str:
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def _read(values: object) -> Iterator[Key]:
    """The keys in a file's JSON.

    Raises Newer, and ValueError, TypeError, LookupError, AttributeError if it has other things.
    """
    if not isinstance(values, dict) or not isinstance(values["keys"], list):
        raise TypeError("expected an object with a list of keys")
    # A file of an older version has no version.
    if values.get("version", VERSION) != VERSION:
        raise Newer
    names = {field.name for field in fields(Key)}
    for item in values["keys"]:
        if item.keys() - names:
            raise Newer
        # A file of an older version has no classes.
        urgency = item.get("urgency", "")
        key = Key(item["name"], item["sha256"], float(item["created_s"]), urgency)
        if not NAME.fullmatch(key.name) or not re.fullmatch(r"[0-9a-f]{64}", key.sha256):
            raise ValueError("not a key")
        if not 0 <= key.created_s < LATEST_S:
            raise ValueError("not a time")
        if urgency not in ("", *CLASSES):
            raise ValueError("not a class")
        yield key


def _parsed(values: object) -> tuple[Key, ...]:
    return tuple(_read(values))


def _dumped(keys: tuple[Key, ...]) -> dict[str, object]:
    return {"version": VERSION, "keys": [asdict(key) for key in keys]}


_KIND: Kind[tuple[Key, ...]] = Kind(
    name="a file of keys",
    largest_bytes=LARGEST_FILE_BYTES,
    nothing=(),
    parse=_parsed,
    dump=_dumped,
    fault=BadKey,
    if_newer="remove the file and make the keys again",
    if_damaged="remove it, and make the keys again",
)
