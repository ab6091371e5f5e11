"""Bytes <-> messages. No I/O.

A frame is a fixed prefix, a msgpack header and a raw payload. The header is the list of the
message's fields in declared order; nested messages are lists too:

    offset  size  field
    0       4     magic "SHOL"
    4       1     protocol version
    5       1     reserved, 0
    6       2     message code (wire.messages.CODES)
    8       4     header length in bytes
    12      8     payload length in bytes

The prefix and JoinRefused are the same in all versions from 3 on (wire.versions).

All integers are little-endian. Lengths are checked against wire.limits before anything is
allocated. Every field is checked against the type that the dataclass declares. Integers are of 64
bits with a sign.
"""

from __future__ import annotations

import dataclasses
import operator
import struct
import threading
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgpack

from wire import limits
from wire.errors import AuthFailed, ProtocolError, VersionMismatch
from wire.messages import CODES, PROTOCOL_VERSION, WITH_PAYLOAD, JoinRefused, Message

MAGIC = b"SHOL"
_TLS_HANDSHAKE = b"\x16\x03"
UNENCRYPTED = "it runs with --insecure: start both sides alike"
PREFIX = struct.Struct("<4sBBHIQ")
MAX_REFUSAL_BYTES = 960
"""The largest text of a refusal. It fits into what a peer reads from a stranger."""


class Prefix(NamedTuple):
    """The contents of a frame's fixed part. The lengths are within the limits."""

    kind: type[Message]
    header_bytes: int
    payload_bytes: int


def encode(message: Message, payload_bytes: int = 0) -> bytes:
    """Return prefix and header of ``message``; the caller sends the payload after them.

    Raises ProtocolError if the message is over the limits, so that the sender sees its own mistake.
    """
    kind = type(message)
    try:
        header: bytes = _packer.pack(_CONVERTERS[kind][0](message))
    except (OverflowError, ValueError) as error:  # Over 64 bits, or text that is not Unicode.
        raise ProtocolError(f"{kind.__name__} cannot be sent: {error}") from error
    if len(header) > limits.MAX_HEADER_BYTES or payload_bytes > limits.MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"{kind.__name__} is too large to send")
    return (
        PREFIX.pack(MAGIC, PROTOCOL_VERSION, 0, _CODE_OF[kind], len(header), payload_bytes) + header
    )


def encode_refusal(reason: str, version: int) -> bytes:
    """Return a JoinRefused that a peer of protocol ``version`` understands."""
    brief = reason.encode(errors="replace")[:MAX_REFUSAL_BYTES].decode(errors="ignore")
    return encode_as(version, JoinRefused, [brief])


def encode_as(version: int, kind: type[Message], values: list[Any]) -> bytes:
    """Return a frame of another protocol ``version`` with plain values as fields."""
    header: bytes = _packer.pack(values)
    return PREFIX.pack(MAGIC, version, 0, _CODE_OF[kind], len(header), 0) + header


def decode_prefix(data: bytes | bytearray | memoryview) -> Prefix:
    """Parse the first PREFIX.size bytes of a frame. Raises AuthFailed, ProtocolError."""
    magic, version, reserved, code, header_bytes, payload_bytes = PREFIX.unpack(data)
    if magic.startswith(_TLS_HANDSHAKE):
        raise AuthFailed("it encrypts, and this side runs with --insecure", UNENCRYPTED)
    if magic != MAGIC:
        raise ProtocolError("peer does not speak the shoal protocol")
    if version == 0:  # No version 0 ever existed, so zeros get no answer.
        raise ProtocolError("peer does not speak the shoal protocol")
    kind = CODES.get(code)
    is_refusal = kind is JoinRefused and header_bytes <= limits.MAX_HANDSHAKE_BYTES
    if version != PROTOCOL_VERSION and not is_refusal:
        raise VersionMismatch(PROTOCOL_VERSION, version, code, header_bytes)
    if kind is None or reserved:
        raise ProtocolError(f"unknown message code {code}")
    if header_bytes > limits.MAX_HEADER_BYTES or payload_bytes > limits.MAX_PAYLOAD_BYTES:
        raise ProtocolError(
            f"{kind.__name__} announces {header_bytes} + {payload_bytes} bytes, over the limit"
        )
    if payload_bytes and kind not in WITH_PAYLOAD:
        raise ProtocolError(f"{kind.__name__} must not carry a payload")
    return Prefix(kind, header_bytes, payload_bytes)


def decode_header(kind: type[Message], header: bytes | bytearray | memoryview) -> Message:
    """Parse a msgpack header into a ``kind``. Raises ProtocolError."""
    try:
        values = msgpack.unpackb(header, raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"{kind.__name__}: malformed header: {error}") from error
    if kind is JoinRefused and type(values) is list:
        values = values[:1]  # Later versions may add fields.
    message: Message = _CONVERTERS[kind][1](values)
    return message


class _Packer(threading.local):
    """One packer per thread, because making one costs more than packing a small message."""

    def __init__(self) -> None:
        self.pack: Callable[[Any], bytes] = msgpack.Packer(use_bin_type=True).pack


_packer = _Packer()

# ---- field by field: compiled once per message type from its annotations ------------------------

_Convert = Callable[[Any], Any]

_PLAIN = (int, str, bool, bytes)
"""Types that msgpack writes and reads as they are."""

MAX_INTEGER = (1 << 63) - 1
"""The largest integer of a field. numpy, files and clocks take no larger ones."""


def _same(value: Any) -> Any:
    return value


def _exactly(expected: type, name: str) -> _Convert:
    def check(value: Any) -> Any:
        if type(value) is not expected:
            raise ProtocolError(f"{name}: expected {expected.__name__}, got {_brief(value)}")
        return value

    return check


def _integer(name: str) -> _Convert:
    is_integer = _exactly(int, name)

    def check(value: Any) -> Any:
        if is_integer(value) > MAX_INTEGER:
            raise ProtocolError(f"{name}: {value} has more than 63 bits")
        return value

    return check


def _integers(name: str) -> _Convert:
    """Check a list of integers. It may be a whole prompt, so no Python runs for each of them."""
    is_list, is_integer = _exactly(list, name), _integer(name)

    def check(value: Any) -> Any:
        if is_list(value) and (set(map(type, value)) != {int} or max(value) > MAX_INTEGER):
            return tuple(map(is_integer, value))  # Raises an error that names the value.
        return tuple(value)

    return check


def _number(name: str) -> _Convert:
    def check(value: Any) -> float:
        if type(value) is float or type(value) is int:
            number = float(value)
            if number - number == 0:  # neither infinite nor NaN
                return number
        raise ProtocolError(f"{name}: expected a finite number, got {_brief(value)}")

    return check


def _plain_dict(name: str) -> _Convert:
    def fits(value: Any, levels: int) -> bool:
        if type(value) is int:
            return value <= MAX_INTEGER
        items = value.values() if isinstance(value, dict) else value
        if not isinstance(value, (dict, list)):
            return True
        return levels > 0 and all(fits(item, levels - 1) for item in items)

    def check(value: Any) -> Any:
        if type(value) is not dict or not fits(value, limits.MAX_NESTING):
            raise ProtocolError(f"{name}: expected a map of plain values")
        return value

    return check


def _converters(annotation: Any, name: str) -> tuple[_Convert, _Convert]:
    """Return (to plain values, from plain values) for a field with this annotation."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is float:
        return _same, _number(name)
    if annotation is int:
        return _same, _integer(name)
    if annotation in _PLAIN:
        return _same, _exactly(annotation, name)
    if origin is dict:
        return _same, _plain_dict(name)
    if origin is Literal:
        return _same, _one_of(arguments, name)
    if origin is tuple:
        return _tuple(arguments, name)
    if origin in (typing.Union, types.UnionType):
        return _optional(arguments, name)
    return _record(annotation, name)


def _one_of(allowed: tuple[Any, ...], name: str) -> _Convert:
    def check(value: Any) -> Any:
        if value not in allowed:
            raise ProtocolError(f"{name}: {_brief(value)} is not one of {allowed}")
        return value

    return check


def _tuple(arguments: tuple[Any, ...], name: str) -> tuple[_Convert, _Convert]:
    is_list = _exactly(list, name)
    if arguments == (int, ...):
        return list, _integers(name)
    if arguments[-1] is Ellipsis:
        pack, unpack = _converters(arguments[0], name)
        if pack is _same:
            return list, lambda value: tuple(map(unpack, is_list(value)))
        return (
            lambda value: list(map(pack, value)),
            lambda value: tuple(map(unpack, is_list(value))),
        )
    parts = [_converters(argument, name) for argument in arguments]

    def unpack_fixed(value: Any) -> Any:
        if len(is_list(value)) != len(parts):
            raise ProtocolError(f"{name}: expected {len(parts)} values, got {len(value)}")
        return tuple(part[1](item) for part, item in zip(parts, value, strict=True))

    return (
        lambda value: [part[0](item) for part, item in zip(parts, value, strict=True)],
        unpack_fixed,
    )


def _optional(arguments: tuple[Any, ...], name: str) -> tuple[_Convert, _Convert]:
    (inner,) = (argument for argument in arguments if argument is not type(None))
    pack, unpack = _converters(inner, name)
    return (
        lambda value: None if value is None else pack(value),
        lambda value: None if value is None else unpack(value),
    )


def _record(kind: Any, name: str) -> tuple[_Convert, _Convert]:
    """Convert a dataclass to the list of its fields in declared order, and back."""
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        raise TypeError(f"{name}: cannot encode {kind!r}")
    hints = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    count = len(fields)
    parts = [_converters(hints[field], f"{name}.{field}") for field in fields]
    # Every token passes here. All fields that need no conversion cost one call together.
    packers = [(index, part[0]) for index, part in enumerate(parts) if part[0] is not _same]
    unpackers = [
        (index, part[1])
        for index, (field, part) in enumerate(zip(fields, parts, strict=True))
        if hints[field] not in _PLAIN
    ]
    exact = [(index, hints[field]) for index, field in enumerate(fields) if hints[field] in _PLAIN]
    integers = [index for index, expected in exact if expected is int]
    get = _getter(fields)

    def pack(value: Any) -> Any:
        plain = get(value)
        if not packers:
            return plain
        converted = list(plain)
        for index, convert in packers:
            converted[index] = convert(converted[index])
        return converted

    def unpack(values: Any) -> Any:
        if type(values) is not list or len(values) != count:
            raise ProtocolError(f"{name}: expected {count} fields, got {_brief(values)}")
        for index, expected in exact:
            if type(values[index]) is not expected:
                parts[index][1](values[index])  # Raises an error that names the field.
        for index in integers:
            if values[index] > MAX_INTEGER:
                parts[index][1](values[index])  # Raises, too.
        for index, convert in unpackers:
            values[index] = convert(values[index])
        return kind(*values)

    return pack, unpack


def _getter(fields: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    """Return a function that reads a record's fields as a tuple."""
    if len(fields) > 1:
        getter: Callable[[Any], tuple[Any, ...]] = operator.attrgetter(*fields)
        return getter
    return lambda value: tuple(getattr(value, field) for field in fields)


def _brief(value: Any) -> str:
    """Shorten a hostile value for a log line."""
    text = repr(value) if not isinstance(value, (list, dict)) else f"{len(value)} items"
    return text if len(text) <= 40 else text[:37] + "..."


_CODE_OF = {kind: code for code, kind in CODES.items()}


class _Converters(dict[type[Message], tuple[_Convert, _Convert]]):
    """The converters of a message, compiled when it is first sent or received.

    A process meets few of the messages, and to compile all takes 25 ms of each start.
    """

    def __missing__(self, kind: type[Message]) -> tuple[_Convert, _Convert]:
        self[kind] = found = _record(kind, kind.__name__)
        return found


_CONVERTERS = _Converters()
