"""Layers of two kinds: sliding ones, which see a window, and full ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from model.errors import CheckpointError
from model.families.config import Config
from model.families.rope import rope_spec
from model.spec import LayerSpec, RopeSpec

SLIDING, FULL = "sliding_attention", "full_attention"


def layer_kinds(config: Config, pattern: int) -> list[str]:
    """Return each layer's kind by layer_types, or else every ``pattern``-th layer is a full one."""
    count, kinds = config.layer_count(), config.strings("layer_types")
    if not kinds:
        return [SLIDING if (layer + 1) % pattern else FULL for layer in range(count)]
    if len(kinds) != count:
        raise CheckpointError(f"{config.path}: layer_types has {len(kinds)} of {count} layers")
    for kind in kinds:
        if kind not in (SLIDING, FULL):
            raise config.unsupported("layer_types", kind, f"known: {FULL}, {SLIDING}")
    return kinds


def windows(config: Config, kinds: list[str], default: int) -> list[int | None]:
    """Return each layer's window. ``default`` is what an absent sliding_window means."""
    if SLIDING not in kinds:
        return [None] * len(kinds)
    if config.values.get("sliding_window", default) is None:
        raise CheckpointError(
            f"{config.path}: layer_types has sliding layers, but sliding_window is null"
        )
    window = config.size("sliding_window", default)
    return [window if kind == SLIDING else None for kind in kinds]


def ropes(
    config: Config, head_dim: int, context: int, thetas: Mapping[str, tuple[str, float]]
) -> dict[str, RopeSpec]:
    """Return the rotary parameters of each kind of layer.

    They are in rope_parameters, by kind. Older configs have one rope_scaling, which is that of full
    layers alone, and a theta of each kind.

    thetas: of each kind, the older config's key and what absence means.
    """
    given, scaling = config.nested("rope_parameters"), config.nested("rope_scaling")
    if given is not None and not {SLIDING, FULL} & given.values.keys():
        raise config.unsupported("rope_parameters", "...", f"known: those of {FULL} and {SLIDING}")
    specs = {}
    for kind, (key, default) in thetas.items():
        own: dict[str, Any] = {"rope_theta": config.number(key, default)}
        for values in (given and given.nested(kind), scaling if kind == FULL else None):
            if values is not None:
                own |= values.values
        values = Config(config.path, {"max_position_embeddings": context, "rope_parameters": own})
        specs[kind], _ = rope_spec(values, head_dim)
    return specs


def without_ropes(config: Config) -> Config:
    """Return the config without rotary parameters, to describe what kinds of layers share."""
    kept = {key: value for key, value in config.values.items() if not key.startswith("rope_")}
    return Config(config.path, kept)


def with_ropes(
    layers: Sequence[LayerSpec], kinds: Sequence[str], by_kind: Mapping[str, RopeSpec]
) -> tuple[LayerSpec, ...]:
    pairs = zip(layers, kinds, strict=True)
    return tuple(replace(layer, rope=by_kind[kind]) for layer, kind in pairs)
