from __future__ import annotations

import dataclasses
import math
import struct
import typing
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire import limits
from wire.codec import PREFIX, decode_header, decode_prefix, encode
from wire.errors import ProtocolError, VersionMismatch
from wire.messages import (
    CODES,
    PROTOCOL_VERSION,
    WITH_PAYLOAD,
    Activation,
    Heartbeat,
    LoadStage,
    Message,
    Sampling,
    StageBeat,
    StartSequence,
    TeamFailed,
    TeamLogits,
    TeamPart,
    TeamPass,
    TokenSampled,
)

PROTOCOL = Path(__file__).parents[2] / "docs" / "protocol.md"


def strategy(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of a field annotated ``annotation``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is int:
        return st.integers(-(2**63), 2**63 - 1)
    if annotation is float:
        return st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
    if annotation is str:
        return st.text(max_size=20)
    if annotation is bytes:
        return st.binary(max_size=20)
    if annotation is bool:
        return st.booleans()
    if origin is dict:
        leaf = st.none() | st.integers(0, 9) | st.text(max_size=5) | st.booleans()
        return st.dictionaries(st.text(max_size=5), leaf | st.lists(leaf, max_size=3), max_size=3)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(strategy(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(strategy, arguments))
    if type(None) in arguments:
        inner = next(item for item in arguments if item is not type(None))
        return st.none() | strategy(inner)
    hints = typing.get_type_hints(annotation)
    return st.builds(annotation, **{key: strategy(hint) for key, hint in hints.items()})


MESSAGES = st.sampled_from(sorted(CODES)).flatmap(lambda code: strategy(CODES[code]))


def decode(frame: bytes) -> Message:
    prefix = decode_prefix(frame[: PREFIX.size])
    return decode_header(prefix.kind, frame[PREFIX.size : PREFIX.size + prefix.header_bytes])


@settings(max_examples=400, deadline=None)
@given(MESSAGES)
def test_every_message_survives_the_wire(message: Message) -> None:
    assert decode(encode(message)) == message


@settings(max_examples=200, deadline=None)
@given(MESSAGES, st.data())
def test_a_damaged_header_is_refused_or_read_as_a_valid_message(
    message: Message, data: st.DataObject
) -> None:
    frame = bytearray(encode(message))
    position = data.draw(st.integers(PREFIX.size, len(frame) - 1))
    frame[position] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode(bytes(frame))
    except ProtocolError:
        return
    assert type(decoded) is type(message)
    assert decode(encode(decoded)) == decoded


@settings(max_examples=200, deadline=None)
@given(MESSAGES, st.data())
def test_a_truncated_header_is_refused(message: Message, data: st.DataObject) -> None:
    header = encode(message)[PREFIX.size :]
    cut = data.draw(st.integers(0, len(header) - 1))
    with pytest.raises(ProtocolError):
        decode_header(type(message), header[:cut])


@pytest.mark.parametrize("kind", CODES.values(), ids=lambda kind: kind.__name__)
def test_missing_and_surplus_fields_are_refused(kind: type[Message]) -> None:
    count = len(dataclasses.fields(kind))
    for wrong in {max(count - 1, 0), count + 1} - {count}:
        with pytest.raises(ProtocolError):
            decode_header(kind, msgpack.packb([0] * wrong))


GOLDEN: dict[str, tuple[Message, int]] = {
    "heartbeat": (Heartbeat(1024, 0.5, None, (StageBeat(1, 0.25),)), 0),
    "token": (TokenSampled(1, 7, 0, 42, ""), 0),
    "activation": (Activation(1, 7, 0, 5, 1, 16, True), 260),
    "pass": (TeamPass(1, 3, (0,), (5,), 1, 16, 1), 260),
    "part": (TeamPart(1, 3, 0, 0, 1, 16), 260),
    "logits": (TeamLogits(1, 3, 1, 1, 128), 8),
    "left": (TeamFailed(1, 3, "m", "w", False), 0),
    "start": (StartSequence(1, 7, 0, (), Sampling(64, (2,), 0.0, 0, 1.0, 9)), 0),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes_are_those_of_the_protocol_document(name: str) -> None:
    documented = {}
    for line in PROTOCOL.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().strip("`") for cell in line.split("|")]
        if len(cells) == 4 and cells[1] in GOLDEN:
            documented[cells[1]] = bytes.fromhex(cells[2])
    message, payload_bytes = GOLDEN[name]
    assert encode(message, payload_bytes) == documented[name]
    assert decode(documented[name]) == message


def prefix(**changes: Any) -> bytes:
    fields = {
        "magic": b"SHOL",
        "version": PROTOCOL_VERSION,
        "reserved": 0,
        "code": 42,
        "header": 10,
        "payload": 0,
        **changes,
    }
    return struct.pack("<4sBBHIQ", *fields.values())


def test_prefix_of_another_protocol_or_version() -> None:
    with pytest.raises(ProtocolError, match="does not speak"):
        decode_prefix(prefix(magic=b"GET "))
    with pytest.raises(VersionMismatch, match=r"version 9.*version 3") as caught:
        decode_prefix(prefix(version=9))
    assert (caught.value.ours, caught.value.theirs) == (3, 9)


@pytest.mark.parametrize(
    "changes",
    [
        {"code": 9999},
        {"reserved": 1},
        {"header": limits.MAX_HEADER_BYTES + 1},
        {"payload": limits.MAX_PAYLOAD_BYTES + 1},
        {"payload": 2**64 - 1},
        {"code": 4, "payload": 1},
    ],
    ids=str,
)
def test_prefix_over_the_limits(changes: dict[str, int]) -> None:
    with pytest.raises(ProtocolError):
        decode_prefix(prefix(**changes))


def test_only_tensor_messages_carry_payloads() -> None:
    for code, kind in CODES.items():
        if kind in WITH_PAYLOAD:
            assert decode_prefix(prefix(code=code, payload=8)).payload_bytes == 8
        else:
            with pytest.raises(ProtocolError):
                decode_prefix(prefix(code=code, payload=8))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinite_and_nan_numbers_are_refused(value: float) -> None:
    start = encode(StartSequence(1, 7, 0, (5,), Sampling(64, (2,))))
    fields = msgpack.unpackb(start[PREFIX.size :])
    fields[4][2] = value
    with pytest.raises(ProtocolError, match="finite"):
        decode_header(StartSequence, msgpack.packb(fields))


@pytest.mark.parametrize("path", [(0,), (3, 0), (4, 0), (4, 1, 0)])
def test_an_integer_of_more_than_63_bits_is_refused(path: tuple[int, ...]) -> None:
    start = encode(StartSequence(1, 7, 0, (5,), Sampling(64, (2,))))
    for value, is_refused in ((2**63 - 1, False), (2**63, True), (2**64 - 1, True)):
        fields = part = msgpack.unpackb(start[PREFIX.size :])
        for index in path[:-1]:
            part = part[index]
        part[path[-1]] = value
        if is_refused:
            with pytest.raises(ProtocolError, match="63 bits"):
                decode_header(StartSequence, msgpack.packb(fields))
        else:
            decode_header(StartSequence, msgpack.packb(fields))


def test_an_integer_of_more_than_63_bits_is_refused_in_a_map() -> None:
    load = encode(LoadStage(1, 1, {"a": [{"b": 2**63 - 1}]}, (), 1, 1, "x", b""))
    fields = msgpack.unpackb(load[PREFIX.size :])
    decode_header(LoadStage, msgpack.packb(fields))
    fields = msgpack.unpackb(load[PREFIX.size :])
    fields[2]["a"][0]["b"] = 2**63
    with pytest.raises(ProtocolError, match=r"LoadStage\.spec"):
        decode_header(LoadStage, msgpack.packb(fields))


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_a_list_of_integers_has_nothing_else(value: object) -> None:
    start = encode(StartSequence(1, 7, 0, (5, 6, 7), Sampling(64, (2,))))
    fields = msgpack.unpackb(start[PREFIX.size :])
    fields[3][1] = value
    with pytest.raises(ProtocolError, match=r"prompt: expected int"):
        decode_header(StartSequence, msgpack.packb(fields))


def test_deep_nesting_is_refused() -> None:
    nested: Any = 0
    for _ in range(limits.MAX_NESTING + 1):
        nested = [nested]
    with pytest.raises(ProtocolError):
        decode_header(LoadStage, msgpack.packb([1, 1, {"a": nested}, [], 1, 1, "x", b"", 16]))
    bottomless = b"\x91" * 100_000 + b"\x00"
    with pytest.raises(ProtocolError):
        decode_header(LoadStage, bottomless)


def test_what_is_too_large_to_send_fails_at_the_sender() -> None:
    with pytest.raises(ProtocolError, match="too large"):
        encode(Activation(1, 1, 0, 0, 1, 32, True), limits.MAX_PAYLOAD_BYTES + 1)
