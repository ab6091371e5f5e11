"""Rotary parameters in config.json, in the old fields and in ``rope_parameters``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from model.errors import CheckpointError
from model.families.config import Config
from model.spec import MAX_SIZE, RopeScaling, RopeSpec

_SCALINGS: Mapping[str, RopeScaling] = {
    "default": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",
}


def rope_spec(
    config: Config, head_dim: int, theta: float = 10000.0, partial: float | None = None
) -> tuple[RopeSpec, int]:
    """Return rotary parameters and usable context, from the old fields or ``rope_parameters``.

    theta, partial: what an absent rope_theta and partial_rotary_factor mean. None: heads of the
        architecture turn whole.
    """
    context = config.size("max_position_embeddings")
    scaling = (
        config.nested("rope_scaling") or config.nested("rope_parameters") or Config(config.path, {})
    )
    if any(isinstance(value, dict) for value in scaling.values.values()):
        raise config.unsupported("rope_parameters", "...", "one set for all layers is")
    name = scaling.text("rope_type", scaling.text("type", "default"))
    if name not in _SCALINGS:
        raise config.unsupported("rope_type", name, f"known: {', '.join(_SCALINGS)}")
    kind = _SCALINGS[name]
    fraction = config.number("partial_rotary_factor", partial or 1.0)
    fraction = scaling.number("partial_rotary_factor", fraction)
    if partial is None and fraction != 1:
        raise config.unsupported(
            "partial_rotary_factor", fraction, "heads of this architecture turn whole"
        )
    rotated = _rotated(config, head_dim, fraction, kind)
    common: dict[str, Any] = {
        "theta": scaling.number("rope_theta", config.number("rope_theta", theta)),
        "scaling": kind,
        "rotated": 0 if rotated == head_dim else rotated,
    }
    if kind == "none":
        return RopeSpec(**common), context
    if kind in ("linear", "dynamic"):
        factor = _factor(scaling)
        usable = int(min(context * factor, MAX_SIZE - 1))
        return RopeSpec(factor=factor, original_context=context, **common), usable
    if kind == "llama3":
        return RopeSpec(**common, **_llama3(scaling)), context
    own = config if config.has("original_max_position_embeddings") else scaling
    trained = own.size("original_max_position_embeddings", context)
    if kind == "yarn":
        if common["theta"] <= 1:
            raise CheckpointError(f"{config.path}: rope_theta must be above 1 for yarn")
        factor = _factor(scaling, context / trained)
        usable = int(min(max(context, trained * factor), MAX_SIZE - 1))
        return RopeSpec(original_context=trained, **common, **_yarn(scaling, factor)), usable
    factors = _longrope(scaling, context / trained, trained)
    if {len(factors["short_factors"]), len(factors["long_factors"])} != {rotated // 2}:
        raise CheckpointError(
            f"{config.path}: short_factor and long_factor must have {rotated // 2} numbers, one "
            "for each rotary pair"
        )
    return RopeSpec(original_context=trained, **common, **factors), context


def _rotated(config: Config, head_dim: int, fraction: float, kind: RopeScaling) -> int:
    """Return how many columns of a head turn."""
    rotated = int(head_dim * min(fraction, 2.0))
    smallest = 4 if kind == "dynamic" else 2
    if head_dim % 2 or rotated % 2 or not smallest <= rotated <= head_dim:
        part = "" if rotated == head_dim else f", of which {fraction:g} turn,"
        raise CheckpointError(f"{config.path}: head_dim {head_dim}{part} cannot be rotated")
    return rotated


def _factor(scaling: Config, default: float | None = None) -> float:
    factor = scaling.number("factor", default)
    if factor < 1:
        raise CheckpointError(f"{scaling.path}: rope factor must be at least 1, not {factor}")
    return factor


def _llama3(scaling: Config) -> dict[str, Any]:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low >= high:
        raise CheckpointError(f"{scaling.path}: low_freq_factor must be below high_freq_factor")
    return {
        "factor": _factor(scaling),
        "original_context": scaling.size("original_max_position_embeddings"),
        "low_freq_factor": low,
        "high_freq_factor": high,
    }


def _yarn(scaling: Config, factor: float) -> dict[str, Any]:
    """Source of the default factor of attention: Peng et al., "YaRN", section 3.4."""
    attention = 0.1 * math.log(factor) + 1
    if scaling.values.get("mscale") and scaling.values.get("mscale_all_dim"):
        above, below = (scaling.number(key) for key in ("mscale", "mscale_all_dim"))
        attention = (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)
    return {
        "factor": factor,
        "beta_fast": scaling.number("beta_fast", 32.0),
        "beta_slow": scaling.number("beta_slow", 1.0),
        "truncated": scaling.flag("truncate", True),
        "attention_factor": scaling.number("attention_factor", attention),
    }


def _longrope(scaling: Config, stretch: float, trained: int) -> dict[str, Any]:
    """Source of the default factor of attention: Ding et al., "LongRoPE"."""
    factor = scaling.number("factor", stretch)
    attention = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 < trained else 1.0
    return {
        "attention_factor": scaling.number("attention_factor", attention),
        "short_factors": scaling.numbers("short_factor"),
        "long_factors": scaling.numbers("long_factor"),
    }
