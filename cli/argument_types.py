"""Types of arguments: each turns a text into a value, or says what was expected."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.schemes import BITS
from wire import limits
from wire.sizes import parse_size

if TYPE_CHECKING:
    from wire.messages import Endpoint

CONTROL_PORT = 7420
HTTP_PORT = 7421


class Several(argparse.Action):
    """An option that may be repeated. The command line replaces the values of a file.

    Its ``type`` returns one value, or a list of them. All of them together are a tuple, or a list.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)
        # If it is still the default object, the command line has not given the option yet.
        given = () if before is self.default else before
        if isinstance(values, list):
            setattr(namespace, self.dest, [*given, *values])
        else:
            setattr(namespace, self.dest, (*given, values))


def argument(convert: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    """``convert`` with a message for the user in place of its ValueError or KeyError."""

    def parse(text: str) -> Any:
        try:
            return convert(text)
        except (ValueError, KeyError) as error:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}") from error

    return parse


def one_of(words: Sequence[str]) -> Callable[[str], str]:
    """A converter that takes only these words, also from a settings file."""
    return argument({word: word for word in words}.__getitem__, "one of " + ", ".join(words))


def whole(text: str) -> int:
    """A whole number from 0 up, in plain digits. Raises ValueError."""
    if not text.isascii() or not text.isdigit():
        raise ValueError(text)
    return int(text)


def between(low: float, high: float, unit: str = "") -> Callable[[str], float]:
    """A converter of numbers from ``low`` to ``high``, with or without ``unit``."""

    def convert(text: str) -> float:
        value = float(text.removesuffix(unit))
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return convert


def _seconds(text: str) -> float:
    """The seconds of a time such as 90s, 10m or 2h. Raises ValueError, KeyError."""
    seconds = float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1:]]
    if not 1 <= seconds <= 365 * 86400:
        raise ValueError(text)
    return seconds


def at_least_0(text: str) -> float:
    """A finite number from 0 up. Raises ValueError."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError(text)
    return value


def _positive(text: str) -> int:
    value = whole(text)
    if value < 1:
        raise ValueError(text)
    return value


def _guesses(text: str) -> int:
    value = whole(text)
    if value > limits.DRAFT_TOKENS:
        raise ValueError(text)
    return value


def _known_bits(text: str) -> list[int]:
    bits = sorted({int(part) for part in text.split(",")})
    if any(value not in BITS for value in bits):
        raise ValueError(text)
    return bits


def _port_number(text: str) -> int:
    value = whole(text)
    if value >= 65536:
        raise ValueError(text)
    return value


_ENDPOINT = re.compile(
    r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]]+))(?::(?P<port>\d{1,5}))?", re.ASCII
)


def _endpoint(default_port: int) -> Callable[[str], Endpoint]:
    def convert(text: str) -> Endpoint:
        from wire.messages import Endpoint

        match = _ENDPOINT.fullmatch(text)
        if match is None:
            raise ValueError(text)
        port = match["port"]
        return Endpoint(
            match["v6"] or match["host"], default_port if port is None else _port_number(port)
        )

    return convert


_HOST_NAME = re.compile(r"\*|[A-Za-z0-9_.:\[\]-]{1,253}", re.ASCII)


def _host_names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(map(_HOST_NAME.fullmatch, names)):
        raise ValueError(text)
    return names


_ORIGIN = re.compile(r"\*|https?://[A-Za-z0-9_.:\[\]-]{1,253}", re.ASCII)


def _origins(text: str) -> list[str]:
    origins = [part.strip().lower().rstrip("/") for part in text.split(",")]
    if not all(map(_ORIGIN.fullmatch, origins)):
        raise ValueError(text)
    return origins


def backend(text: str) -> str:
    """The name of a backend, whether it can run here or not."""
    from backends.registry import BACKENDS

    return one_of(sorted(BACKENDS))(text)


def new_file(text: str) -> Path:
    """A file to write at the end. A wrong folder is told before long work begins."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {path.parent}: make it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: permission denied")
    return path


def ending_in(suffix: str) -> Callable[[str], Path]:
    """A converter to a new file whose name says its format."""

    def convert(text: str) -> Path:
        if Path(text).suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(f"{text!r}: end the name in {suffix}")
        return new_file(text)

    return convert


svg_file = ending_in(".svg")
count = argument(_positive, "a whole number above 0")
guesses = argument(_guesses, f"a whole number from 0 to {limits.DRAFT_TOKENS}")
bits = argument(_known_bits, "widths out of " + ",".join(map(str, BITS)))
size = argument(parse_size, "a size such as 512M, 1.5G or 200MiB")
watts = argument(between(0.01, 1e5, "W"), "watts, such as 6.5")
duration = argument(_seconds, "a time such as 90s, 10m or 2h")
seconds = argument(between(0, 86400, "s"), "seconds, such as 30")
port = argument(_port_number, "a port between 0 and 65535")
http_endpoint = argument(_endpoint(HTTP_PORT), "HOST:PORT")
host_names = argument(_host_names, "a host name, such as shoal.lan, or * for all")
origins = argument(_origins, "an origin, such as https://chat.lan, or * for all")
advertised_endpoint = argument(_endpoint(0), "HOST or HOST:PORT")
control_endpoint = argument(_endpoint(CONTROL_PORT), "HOST or HOST:PORT")
