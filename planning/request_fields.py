"""Fields that several requests of users have, read from their JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.given import not_absolute
from model.quantize import BITS, DEFAULT_GROUP_SIZE, Format, Scheme
from planning.errors import RequestInvalid


def take_model(plain: dict[str, Any]) -> Path:
    """The model's directory, out of ``plain``. Raises RequestInvalid."""
    model = plain.pop("model", None)
    if not isinstance(model, str):
        raise RequestInvalid("model: the absolute path of a model directory", "model")
    if not Path(model).is_absolute():
        raise RequestInvalid(
            f"model: {not_absolute(model)}; the absolute path of a model directory is needed",
            "model",
        )
    return Path(model)


def take_form(plain: dict[str, Any]) -> tuple[Scheme, int]:
    """Scheme and group size, out of ``plain``. Raises RequestInvalid."""
    scheme = plain.pop("scheme", "rtn")
    group_size = plain.pop("group_size", DEFAULT_GROUP_SIZE)
    try:
        Format.of(4, scheme, group_size)
    except ValueError as error:
        raise RequestInvalid(str(error), "scheme") from error
    return scheme, group_size


def read_widths(values: object, field: str) -> tuple[int, ...]:
    """Bits of weights, as given. Raises RequestInvalid."""
    if (
        not isinstance(values, list)
        or not values
        or any(type(item) is not int or item not in BITS for item in values)
    ):
        raise RequestInvalid(f"{field}: a list out of {', '.join(map(str, BITS))}", field)
    return tuple(values)
