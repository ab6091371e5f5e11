"""Reads how config.json says that a checkpoint's weights are stored.

Methods that are read have a reader in ``model.packed``. All others are refused here by their name,
before any weights are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from model.errors import CheckpointError, UnsupportedModelError
from model.families.config import Config, read_config_file

_KEYS = ("quantization_config", "compression_config", "quantization")
_OLD_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files beside config.json in which the first versions of two tools kept their settings."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """The method of quantized weights (gptq, awq, mlx, ...), and its settings in config.json."""

    method: str
    settings: Config


def read_quantization(config: Config) -> Quantization | None:
    """Return how the weights are quantized, or None if config.json does not say that they are.

    Raises UnsupportedModelError that names the method or option which is not read.
    """
    settings = next(filter(None, map(config.nested, _KEYS)), None)
    method = ""
    if settings is None:
        path = next(iter(old_settings(config)), None)
        if path is None:
            return None
        settings, method = read_config_file(path), _OLD_FILES[path.name]
    method = settings.text("quant_method", method).lower()
    if not method and settings.has("bits") and settings.has("group_size"):
        method = "mlx"
    if method == "auto-round":
        method = _auto_round(settings)
    check = _CHECKS.get(method)
    if check is None:
        named = f"weights quantized by {method!r}" if method else "weights of an unknown method"
        raise UnsupportedModelError(
            f"{config.path}: {named} are not read; read are {', '.join(READ)}, or give the model "
            "without quantization"
        )
    check(settings)
    return Quantization(method, settings)


def old_settings(config: Config) -> list[Path]:
    """Return the files of settings beside config.json, which older tools wrote instead of a key."""
    if any(config.has(key) for key in _KEYS):
        return []
    return [path for name in _OLD_FILES if (path := config.path.parent / name).exists()]


READ = ("GPTQ", "AWQ", "compressed-tensors", "fp8", "MLX", "bitsandbytes", "MXFP4")
"""The methods that are read, for messages."""


def _auto_round(settings: Config) -> str:
    """Return the method whose layout a model of AutoRound has."""
    packing = settings.text("packing_format", "auto_round:auto_gptq")
    for method in ("gptq", "awq"):
        if packing in (f"auto_round:auto_{method}", f"auto_{method}"):
            return method
    raise settings.unsupported("packing_format", packing, "known: auto_gptq and auto_awq")


def _gptq(settings: Config) -> None:
    kind = settings.text("checkpoint_format", settings.text("format", "gptq"))
    if kind not in ("gptq", "gptq_v2"):
        raise settings.unsupported("checkpoint_format", kind, "known: gptq, gptq_v2")


def _awq(settings: Config) -> None:
    version = settings.text("version", settings.text("format", "gemm")).lower()
    if version != "gemm":
        raise settings.unsupported(
            "version", version, "get the model in AWQ's gemm version, or as GPTQ"
        )


def _compressed_tensors(settings: Config) -> None:
    known = {"pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense"}
    formats = [settings.text("format", "dense")]
    groups = settings.nested("config_groups")
    for name in groups.values if groups is not None else ():
        group = None if groups is None else groups.nested(name)
        formats.append("dense" if group is None else group.text("format", "dense"))
    for kind in formats:
        if kind not in known | {"mixed-precision"}:
            raise settings.unsupported("format", kind, f"known: {', '.join(sorted(known))}")
    sparsity = settings.nested("sparsity_config")
    if sparsity is not None and sparsity.text("format", "dense") != "dense":
        raise settings.unsupported("sparsity_config", sparsity.values, "sparse weights are not")
    transforms = settings.nested("transform_config")
    if transforms is not None and transforms.nested("config_groups") is not None:
        raise settings.unsupported("transform_config", "...", "rotated activations are not")


def _plain(_settings: Config) -> None:
    """Nothing is to be checked before the weights."""


def _mlx(settings: Config) -> None:
    mode = settings.text("mode", "affine")
    if mode != "affine":
        raise settings.unsupported("mode", mode, "only MLX's affine quantization is")


_CHECKS: Mapping[str, Callable[[Config], None]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _plain,
    "fbgemm_fp8": _plain,
    "mlx": _mlx,
    "mxfp4": _plain,
    "bitsandbytes": _plain,
}


def positive(settings: Config, key: str, default: int) -> int:
    """Return a size of the settings, or ``default`` for -1, null or nothing."""
    value = settings.values.get(key)
    if value is None or value == -1:
        return default
    if type(value) is not int or not 0 < value < 1 << 31:
        raise CheckpointError(f"{settings.path}: {key} must be a size, not {value!r}")
    return value
