"""Random JSON schemas, and a vocabulary and logits that write JSON by chance."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from model.token_bytes import TokenBytes

_PARTS = (b'"', b"{", b"}", b"[", b"]", b",", b":", b'":', b'",', b'"}', b"true", b"false", b"null")
_WORDS = (b"the", b" of", b"name", b"12", b"0.5", "ü".encode(), "🦈".encode(), b'": "', b'", "')


def vocabulary() -> TokenBytes:
    """All bytes, some longer tokens, and an end."""
    tokens = [bytes([byte]) for byte in range(256)] + [part for part in _PARTS if len(part) > 1]
    tokens += [*_WORDS, b"<|think|>", b"<|end|>"]
    special = [False] * (len(tokens) - 2) + [True, True]
    return TokenBytes(tuple(tokens), tuple(special), len(tokens) - 1)


def logits(tokens: TokenBytes, generator: np.random.Generator) -> np.ndarray:
    """Return random logits by which strings and lists end soon."""
    values = generator.normal(0, 2, len(tokens.tokens)).astype(np.float32)
    ends = [token for token, data in enumerate(tokens.tokens) if data[:1] in (b'"', b"]", b"}")]
    values[ends] += 4
    values[tokens.end] += 4
    return values


def schema(generator: random.Random, depth: int = 3) -> dict[str, Any]:
    """Return a schema of at most ``depth`` levels that some value fits."""
    makers: list[Callable[[random.Random, int], dict[str, Any]]]
    makers = [_string, _number, _integer, _enumeration, _boolean]
    if depth > 0:
        makers += [_object, _object, _array, _any_of]
    return generator.choice(makers)(generator, depth - 1)


def _string(generator: random.Random, _: int) -> dict[str, Any]:
    kind = generator.randrange(4)
    if kind == 0:
        low = generator.randrange(4)
        return {"type": "string", "minLength": low, "maxLength": low + generator.randrange(6)}
    if kind == 1:
        return {
            "type": "string",
            "pattern": generator.choice(["^[a-c]{2,5}$", "^(x|yz)+$", "^\\d+$"]),
        }
    if kind == 2:
        return {"type": "string", "format": generator.choice(["date", "ipv4", "uuid", "time"])}
    return {"type": "string"}


def _number(generator: random.Random, _: int) -> dict[str, Any]:
    low = generator.randrange(-50, 50)
    return generator.choice(
        [{"type": "number"}, {"type": "number", "minimum": low, "exclusiveMaximum": low + 7}]
    )


def _integer(generator: random.Random, _: int) -> dict[str, Any]:
    low = generator.randrange(-1000, 1000)
    return generator.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + generator.randrange(500)},
            {"type": "integer", "multipleOf": generator.randrange(2, 9)},
            {"type": ["integer", "null"]},
        ]
    )


def _enumeration(generator: random.Random, _: int) -> dict[str, Any]:
    values = ["red", "grün", 'a "quote"', 4, None, True, [1, 2], {"k": "v"}]
    return generator.choice(
        [{"enum": generator.sample(values, 3)}, {"const": generator.choice(values)}]
    )


def _boolean(generator: random.Random, _: int) -> dict[str, Any]:
    return generator.choice([{"type": "boolean"}, {"type": "null"}])


def _object(generator: random.Random, depth: int) -> dict[str, Any]:
    names = generator.sample(["id", "name", "größe", "a b", "list", "x"], generator.randrange(1, 5))
    required = [name for name in names if generator.random() < 0.6]
    made: dict[str, Any] = {
        "type": "object",
        "properties": {name: schema(generator, depth) for name in names},
        "required": required,
    }
    if generator.random() < 0.7:
        made["additionalProperties"] = False
    return made


def _array(generator: random.Random, depth: int) -> dict[str, Any]:
    low = generator.randrange(3)
    if generator.random() < 0.3:
        return {
            "type": "array",
            "prefixItems": [schema(generator, depth) for _ in range(2)],
            "items": False,
            "minItems": 2,
        }
    return {
        "type": "array",
        "items": schema(generator, depth),
        "minItems": low,
        "maxItems": low + generator.randrange(4),
    }


def _any_of(generator: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [schema(generator, depth) for _ in range(2)]}
