"""Frames of all kinds with values that nobody expects, whole and damaged."""

from __future__ import annotations

import random
import typing
from functools import lru_cache
from typing import Any

import msgpack

from wire.codec import MAGIC, PREFIX, encode
from wire.messages import CODES, PROTOCOL_VERSION, WITH_PAYLOAD, Message

INTEGERS = (0, 1, 2, 7, 255, 4096, -1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e308, 5e-324, 0.001)
TEXTS = ("", "a", "0" * 16, "ä" * 40, "\x1b[2J", "../../etc/passwd", "x" * 700, "\x00")
HOSTILE: tuple[object, ...] = (
    None,
    True,
    2**64 - 1,
    float("nan"),
    float("inf"),
    b"\xff" * 40,
    [],
    [[[[[[[[]]]]]]]],
    {},
    {"a": {"b": [1, {"c": None}]}},
    "x" * 20_000,
)


@lru_cache
def _fields(kind: type) -> tuple[tuple[str, Any], ...]:
    return tuple(typing.get_type_hints(kind).items())


class Frames:
    """Endless frames. The same seed gives the same ones."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._kinds = tuple(CODES.values())

    def message(self, kind: type[Message] | None = None) -> Message:
        """A message whose fields have the right types."""
        made: Message = self._value(kind or self.random.choice(self._kinds))
        return made

    def whole(self, kind: type[Message] | None = None) -> bytes:
        """A frame that can be decoded, with its payload."""
        message = self.message(kind)
        payload = b""
        if type(message) in WITH_PAYLOAD:
            payload = self.random.randbytes(self.random.choice((0, 4, 64, 2048)))
        return encode(message, len(payload)) + payload

    def damaged(self, kind: type[Message] | None = None) -> bytes:
        """A frame that nobody should send."""
        frame = bytearray(self.whole(kind))
        match self.random.randrange(6):
            case 0:
                for _ in range(self.random.randint(1, 6)):
                    frame[self.random.randrange(len(frame))] = self.random.randrange(256)
            case 1:
                del frame[self.random.randrange(len(frame)) :]
            case 2:
                other = self.whole()
                frame[self.random.randrange(len(frame)) :] = other[
                    self.random.randrange(len(other)) :
                ]
            case 3:  # A prefix that promises something else.
                code, header, payload = (
                    self.random.choice((*CODES, 0, 9999)),
                    self.random.choice((0, 1, len(frame), 2**20, 2**32 - 1)),
                    self.random.choice((0, 1, 2**20, 2**63)),
                )
                version = self.random.choice((0, 1, 2, PROTOCOL_VERSION, 9, 255))
                frame[: PREFIX.size] = PREFIX.pack(MAGIC, version, 0, code, header, payload)
            case 4:  # One field of another type.
                values = msgpack.unpackb(frame[PREFIX.size :][: _header_bytes(frame)], raw=False)
                if values:
                    values[self.random.randrange(len(values))] = self.random.choice(HOSTILE)
                header_bytes = msgpack.packb(values)
                code = PREFIX.unpack(frame[: PREFIX.size])[3]
                frame[:] = PREFIX.pack(MAGIC, PROTOCOL_VERSION, 0, code, len(header_bytes), 0)
                frame += header_bytes
            case _:
                frame[PREFIX.size :] = self.random.randbytes(len(frame) - PREFIX.size)
        return bytes(frame)

    def any(self, kind: type[Message] | None = None) -> bytes:
        return self.whole(kind) if self.random.random() < 0.4 else self.damaged(kind)

    def _value(self, annotation: Any) -> Any:
        pick = self.random.choice
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if annotation is int:
            return pick(INTEGERS)
        if annotation is float:
            return pick(FLOATS)
        if annotation is str:
            return pick(TEXTS)
        if annotation is bytes:
            return self.random.randbytes(pick((0, 1, 16, 32, 64)))
        if annotation is bool:
            return pick((True, False))
        if origin is dict:
            return {"a": pick(INTEGERS), "b": [pick(TEXTS), None]}
        if origin is typing.Literal:
            return pick(arguments)
        if origin is tuple and arguments[-1] is Ellipsis:
            return tuple(self._value(arguments[0]) for _ in range(pick((0, 1, 3))))
        if origin is tuple:
            return tuple(map(self._value, arguments))
        if type(None) in arguments:
            inner = next(item for item in arguments if item is not type(None))
            return pick((None, self._value(inner)))
        return annotation(**{name: self._value(hint) for name, hint in _fields(annotation)})


def _header_bytes(frame: bytes | bytearray) -> int:
    return int(PREFIX.unpack(frame[: PREFIX.size])[4])
