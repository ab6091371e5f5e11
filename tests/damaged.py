"""Copies of a small model whose weights are others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.checkpoint import Checkpoint
from model.safetensors import read_safetensors, write_safetensors

LLAMA = Path(__file__).parent / "fixtures" / "llama"

Weights = npt.NDArray[Any]


def changed(directory: Path, change: Callable[[Weights], Weights], *matrices: str) -> Checkpoint:
    """Write a copy of the model in which some matrices of the first layer's MLP are other ones."""
    shutil.copytree(LLAMA, directory)
    path = directory / "model.safetensors"
    tensors = {name: np.array(value) for name, value in read_safetensors(path).map_all().items()}
    for name in (f"model.layers.0.mlp.{matrix}_proj.weight" for matrix in matrices):
        tensors[name] = change(tensors[name])
    path.unlink()
    write_safetensors(path, tensors)
    return Checkpoint.open(directory)


def overflowing(directory: Path) -> Checkpoint:
    """Write a copy of the model whose weights can be stored, and whose predictions are NaN."""
    return changed(directory, lambda weights: weights * np.float32(1e24), "up", "down")
