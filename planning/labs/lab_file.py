"""The YAML file that describes a testbed; its schema is docs/labs.md."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from model.bounded import read_bytes
from model.quantize import BITS
from planning.labs.lab import Lab, LabDevice, LabError, LabModel
from planning.problem import HopFormat
from wire.activations import HOP_BITS
from wire.profile import LinkProfile
from wire.sizes import parse_size

MAX_LAB_BYTES = 1 << 20
"""Enough for any testbed: hundreds of devices with all their links."""
LEAST, MOST = 1e-12, 1e12
"""Numbers above 0 are between these. With any others, times or their sums may be no numbers."""


def read_lab(path: Path) -> Lab:
    """The testbed that a YAML file describes. Raises LabError with one line for the user."""
    try:
        data = read_bytes(path, MAX_LAB_BYTES)
    except OSError as error:
        raise LabError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise LabError(f"{path}: {error}") from error
    return parse_lab(data, str(path))


def parse_lab(text: str | bytes, source: str) -> Lab:
    """The testbed that a text describes; ``source`` names it in messages. Raises LabError."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise LabError(f"{source}{line}: not YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else "nested too deep"
        raise LabError(f"{source}: not YAML: {reason}") from error
    if root is None:
        raise LabError(f"{source}: empty: describe `devices:` and a `default_link:`")
    return _Reader(source).lab(root)


_Node = yaml.Node
_Fields = dict[str, _Node]

# Only testbed.lab reads ``emulation``.
_TOP = ("model", "devices", "links", "default_link", "hops", "templates", "emulation")
_MODEL = ("name", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "gated")
_MODEL_REQUIRED = ("name", "hidden", "ffn", "heads", "vocab")
_DEVICE = (
    "name", "memory", "storage", "bits", "container", "layer_ms", "embed_ms", "head_ms",
    "call_ms", "watts", "on_chip", "arithmetic", "layer_kl", "shares", "sum_ms",
)  # fmt: skip
_REQUIRED = ("name", "memory", "storage", "layer_ms", "embed_ms", "head_ms")
_LAYER_MS = ("decode", "prefill_per_token")
_LINK = ("from", "to", "rtt_ms", "mbit_per_s", "one_way")
_DEFAULT_LINK = ("rtt_ms", "mbit_per_s")


class _Reader:
    """Reads nodes, which know their lines, into values. Raises LabError for unusable nodes."""

    def __init__(self, source: str) -> None:
        self._source = source

    def lab(self, root: _Node) -> Lab:
        fields = self._mapping(root, "the file", _TOP, required=("devices",))
        devices = tuple(self._device(node) for node in self._items(fields["devices"], "devices"))
        if not devices:
            raise self._error(fields["devices"], "devices: describe at least one")
        lines: dict[str, _Node] = {}
        for device, node in zip(devices, self._items(fields["devices"], "devices"), strict=True):
            if device.name in lines:
                raise self._error(
                    node,
                    f"device {device.name} is described twice (first in line"
                    f" {self._line(lines[device.name])}): rename one",
                )
            lines[device.name] = node
        links = self._links(fields, root, tuple(lines))
        hops = self._hops(fields["hops"]) if "hops" in fields else ()
        model = self._model(fields["model"]) if "model" in fields else None
        return Lab(self._source, devices, links, hops, model)

    def _model(self, node: _Node) -> LabModel:
        fields = self._mapping(node, "model", _MODEL, required=_MODEL_REQUIRED)
        name = self._name(fields["name"], "model.name")
        sizes = {
            key: self._count(fields[key], f"model.{key}") for key in _MODEL[1:-1] if key in fields
        }
        heads = sizes["heads"]
        if "head_dim" not in sizes and sizes["hidden"] % heads:
            raise self._error(
                fields["heads"], f"model.heads: {heads} do not divide hidden: say head_dim"
            )
        head_dim = sizes.get("head_dim", sizes["hidden"] // heads)
        return LabModel(
            name=name,
            hidden=sizes["hidden"],
            ffn=sizes["ffn"],
            q_rows=heads * head_dim,
            kv_rows=sizes.get("kv_heads", heads) * head_dim,
            vocab=sizes["vocab"],
            gated=self._flag(fields["gated"], "model.gated") if "gated" in fields else True,
        )

    def _device(self, node: _Node) -> LabDevice:
        fields = self._mapping(node, "a device", _DEVICE, required=_REQUIRED)
        name = self._name(fields["name"], "name")
        times = self._mapping(fields["layer_ms"], "layer_ms", _LAYER_MS, required=("decode",))
        decode_s = self._by_width(times["decode"], "layer_ms.decode", None)
        bits = self._widths(fields["bits"], "bits") if "bits" in fields else tuple(sorted(decode_s))
        for width in bits:
            if width not in decode_s:
                raise self._error(
                    times["decode"],
                    f"layer_ms.decode has no {width} bit, which {name} runs: add it, or drop"
                    f" {width} from bits",
                )
        for width in decode_s:
            if width not in bits:
                raise self._error(
                    times["decode"],
                    f"layer_ms.decode has {width} bit, which {name} does not run: add {width} to"
                    " bits, or drop it here",
                )
        prefill = times.get("prefill_per_token")
        container = {width: width for width in bits}
        if "container" in fields:
            container |= self._container(fields["container"], bits)
        return LabDevice(
            name=name,
            memory_bytes=self._size(fields["memory"], "memory"),
            storage_bytes=self._size(fields["storage"], "storage"),
            container=container,
            layer_decode_s=decode_s,
            layer_prefill_s_per_token=(
                decode_s
                if prefill is None
                else self._by_width(prefill, "layer_ms.prefill_per_token", bits)
            ),
            embed_s=self._by_width(fields["embed_ms"], "embed_ms", bits),
            head_s=self._by_width(fields["head_ms"], "head_ms", bits),
            call_s=(
                self._number(fields["call_ms"], "call_ms", least=0.0) / 1e3
                if "call_ms" in fields
                else 0.0
            ),
            watts=self._number(fields["watts"], "watts") if "watts" in fields else None,
            on_chip_bytes=(
                self._size(fields["on_chip"], "on_chip") if "on_chip" in fields else None
            ),
            arithmetic=(
                self._name(fields["arithmetic"], "arithmetic") if "arithmetic" in fields else ""
            ),
            layer_kl=self._layer_kl(fields["layer_kl"], bits) if "layer_kl" in fields else None,
            **self._sharing(fields),
        )

    def _sharing(self, fields: _Fields) -> dict[str, Any]:
        """The fields about teams. An accelerator of its own arithmetic runs no shares."""
        node, own = fields.get("shares"), "on_chip" in fields or "arithmetic" in fields
        found: dict[str, Any] = {"shares": not own}
        if isinstance(node, yaml.MappingNode):
            found = {"shares": True, "share_times": self._share_times(node)}
        elif node is not None:
            found = {"shares": self._flag(node, "shares")}
        if "sum_ms" in fields:
            found["sum_s"] = self._number(fields["sum_ms"], "sum_ms", least=0.0) / 1e3
        return found

    def _share_times(self, node: _Node) -> dict[float, float]:
        """Times of shares, relative to the whole layer: ``{0.5: 0.56, 0.25: 0.33}``."""
        found: dict[float, float] = {}
        for key, value in self._pairs(node, "shares"):
            share = self._number(key, "shares")
            if share > 1:
                raise self._error(key, f"shares: {share:g} is more than a whole layer")
            found[share] = self._number(value, f"shares at {share:g}")
        if not found:
            raise self._error(node, "shares: expected true, false, or times like {0.5: 0.56}")
        return dict(sorted(found.items()))

    def _layer_kl(self, node: _Node, bits: tuple[int, ...]) -> dict[int, float]:
        found = {
            self._width(key, "layer_kl"): self._number(value, "layer_kl", least=0.0)
            for key, value in self._pairs(node, "layer_kl")
        }
        if sorted(found) != sorted(bits):
            raise self._error(node, f"layer_kl: expected a number at each of {_list(bits)} bit")
        return found

    def _hops(self, node: _Node) -> tuple[HopFormat, ...]:
        """Formats of hops: ``[16, 8]``, or KL divergences by width: ``{16: 0, 8: 0.004}``."""
        known: dict[int, float | None] = {}
        if isinstance(node, yaml.MappingNode):
            pairs: list[tuple[_Node, _Node | None]] = [*self._pairs(node, "hops")]
        else:
            pairs = [(item, None) for item in self._items(node, "hops")]
        for key, value in pairs:
            text = self._text(key)
            if text not in map(str, HOP_BITS) or int(text) in known:
                raise self._error(
                    key,
                    f"hops: {text[:40]!r}: expected each width once, out of {_list(HOP_BITS)}",
                )
            known[int(text)] = (
                HopFormat.unmeasured(int(text)).sensitivity
                if value is None
                else self._number(value, f"hops at {text} bit", least=0.0)
            )
        if not known:
            raise self._error(node, "hops: expected widths like [16, 8], or {16: 0, 8: 0.004}")
        return tuple(HopFormat(bits, known[bits]) for bits in sorted(known))

    def _links(
        self, fields: _Fields, root: _Node, names: tuple[str, ...]
    ) -> tuple[LinkProfile, ...]:
        found: dict[tuple[str, str], LinkProfile] = {}
        stated: dict[tuple[str, str], int] = {}
        for node in self._items(fields["links"], "links") if "links" in fields else ():
            link = self._mapping(node, "a link", _LINK, required=_LINK[:4])
            ends = []
            for key in ("from", "to"):
                name = self._name(link[key], key)
                if name not in names:
                    raise self._error(
                        link[key], f"{key}: unknown device {name}: known are {', '.join(names)}"
                    )
                ends.append(name)
            source, target = ends
            if source == target:
                raise self._error(node, f"a link from {source} to itself: drop it")
            one_way = "one_way" in link and self._flag(link["one_way"], "one_way")
            pairs = [(source, target)] if one_way else [(source, target), (target, source)]
            rtt_s, bytes_per_s = self._speed(link)
            for pair in pairs:
                if pair in stated:
                    raise self._error(
                        node,
                        f"the link from {pair[0]} to {pair[1]} is described twice (first in line"
                        f" {stated[pair]}): drop one, or say `one_way: true`",
                    )
                stated[pair] = self._line(node)
                found[pair] = LinkProfile(*pair, rtt_s, bytes_per_s)
        self._fill(fields.get("default_link"), root, names, found)
        return tuple(found[pair] for pair in itertools.permutations(names, 2) if pair in found)

    def _fill(
        self,
        node: _Node | None,
        root: _Node,
        names: tuple[str, ...],
        found: dict[tuple[str, str], LinkProfile],
    ) -> None:
        """Give each pair without a link the default link. Without a default it is an error."""
        missing = [pair for pair in itertools.permutations(names, 2) if pair not in found]
        if node is None:
            if missing:
                source, target = missing[0]
                others = f" ({len(missing)} links are missing)" if len(missing) > 1 else ""
                raise self._error(
                    root,
                    f"no link from {source} to {target}{others}: describe it, add a default_link,"
                    " or say `default_link: none` where devices cannot reach each other",
                )
            return
        if isinstance(node, yaml.ScalarNode) and node.value == "none":
            return
        fields = self._mapping(node, "default_link", _DEFAULT_LINK, required=_DEFAULT_LINK)
        rtt_s, bytes_per_s = self._speed(fields)
        for pair in missing:
            found[pair] = LinkProfile(*pair, rtt_s, bytes_per_s)

    def _speed(self, fields: _Fields) -> tuple[float, float]:
        rtt_s = self._number(fields["rtt_ms"], "rtt_ms", least=0.0) / 1e3
        return rtt_s, self._number(fields["mbit_per_s"], "mbit_per_s") * 1e6 / 8

    # ---- values -----------------------------------------------------------------------------

    def _mapping(
        self, node: _Node, what: str, known: Sequence[str], required: Sequence[str]
    ) -> _Fields:
        fields = {self._text(key): value for key, value in self._pairs(node, what)}
        for key, _ in self._pairs(node, what):
            if self._text(key) not in known:
                raise self._error(
                    key, f"unknown key {self._text(key)!r} in {what}: known are {', '.join(known)}"
                )
        for name in required:
            if name not in fields:
                raise self._error(node, f"{what} has no {name}: add it")
        return fields

    def _pairs(self, node: _Node, what: str) -> list[tuple[_Node, _Node]]:
        """Key and value nodes. ``<<: *template`` gives the keys that the mapping lacks."""
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, f"{what}: expected `key: value` pairs")
        own: dict[str, tuple[_Node, _Node]] = {}
        merged: list[tuple[_Node, _Node]] = []
        for key, value in node.value:
            name = self._text(key)
            if name == "<<":
                if not isinstance(value, yaml.MappingNode):
                    raise self._error(value, "<<: expected one alias of a template, like *pi")
                if any(self._text(inner) == "<<" for inner, _ in value.value):
                    raise self._error(value, "<<: a template cannot use another template")
                merged = self._pairs(value, what)
            elif name in own:
                raise self._error(key, f"{name} is there twice in {what}: drop one")
            else:
                own[name] = key, value
        kept = [pair for pair in merged if self._text(pair[0]) not in own]
        return [*kept, *own.values()]

    def _items(self, node: _Node, what: str) -> list[_Node]:
        if not isinstance(node, yaml.SequenceNode):
            raise self._error(node, f"{what}: expected a list, one `- ` per entry")
        return list(node.value)

    def _text(self, node: _Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, "expected a plain word or number")
        return str(node.value)

    def _name(self, node: _Node, what: str) -> str:
        name = self._text(node).strip()
        if not 0 < len(name) <= 64 or not name.isprintable():
            raise self._error(node, f"{what}: expected a name of 1 to 64 characters")
        return name

    def _number(self, node: _Node, what: str, least: float | None = None) -> float:
        """A number from LEAST to MOST, and 0 as well if that is ``least``."""
        text = self._text(node)
        try:
            value = float(text)
        except ValueError:
            raise self._error(node, f"{what}: expected a number, found {text[:40]!r}") from None
        if not math.isfinite(value) or value < 0 or (least is None and value == 0):
            expected = "a number above 0" if least is None else f"a number from {least:g} up"
            raise self._error(node, f"{what}: expected {expected}, found {text[:40]}")
        if value and not LEAST <= value <= MOST:
            raise self._error(
                node, f"{what}: {text[:40]} is not between {LEAST:g} and {MOST:g}: is it a mistake?"
            )
        return value

    def _count(self, node: _Node, what: str) -> int:
        text = self._text(node)
        if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text)):
            raise self._error(node, f"{what}: expected a whole number above 0, found {text[:40]!r}")
        return int(text)

    def _size(self, node: _Node, what: str) -> int:
        try:
            size = parse_size(self._text(node))
        except ValueError as error:
            raise self._error(node, f"{what}: {error}") from None
        if size == 0:
            raise self._error(node, f"{what}: expected more than 0 bytes")
        return size

    def _flag(self, node: _Node, what: str) -> bool:
        text = self._text(node)
        if text not in ("true", "false"):
            raise self._error(node, f"{what}: expected true or false, found {text[:40]!r}")
        return text == "true"

    def _width(self, node: _Node, what: str) -> int:
        text = self._text(node)
        if text not in map(str, BITS):
            raise self._error(node, f"{what}: {text[:40]!r} is no width: known are {_list(BITS)}")
        return int(text)

    def _widths(self, node: _Node, what: str) -> tuple[int, ...]:
        widths = [self._width(item, what) for item in self._items(node, what)]
        if not widths or len(set(widths)) != len(widths):
            raise self._error(node, f"{what}: expected each width once, like [4, 8, 16]")
        return tuple(sorted(widths))

    def _by_width(self, node: _Node, what: str, bits: Sequence[int] | None) -> dict[int, float]:
        """Seconds by width, from milliseconds. A single number holds for each of ``bits``."""
        if bits is not None and isinstance(node, yaml.ScalarNode):
            return dict.fromkeys(bits, self._number(node, what) / 1e3)
        seconds = {
            self._width(key, what): self._number(value, f"{what} at {self._text(key)} bit") / 1e3
            for key, value in self._pairs(node, what)
        }
        if not seconds:
            raise self._error(node, f"{what}: expected milliseconds by width, like {{4: 1.9}}")
        for width in bits or ():
            if width not in seconds:
                raise self._error(node, f"{what} has no {width} bit: add it")
        for width in seconds:
            if bits is not None and width not in bits:
                raise self._error(node, f"{what} has {width} bit, which is not in bits: drop it")
        return seconds

    def _container(self, node: _Node, bits: tuple[int, ...]) -> dict[int, int]:
        container = {}
        for key, value in self._pairs(node, "container"):
            stored, executed = self._width(key, "container"), self._width(value, "container")
            if stored not in bits:
                raise self._error(key, f"container: {stored} is not in bits: drop it")
            if executed < stored:
                raise self._error(
                    value, f"container: {stored}-bit weights do not fit {executed} bits"
                )
            container[stored] = executed
        return container

    def _line(self, node: _Node) -> int:
        return int(node.start_mark.line) + 1

    def _error(self, node: _Node, message: str) -> LabError:
        return LabError(f"{self._source}:{self._line(node)}: {message}")


def _list(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))
