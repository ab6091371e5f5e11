"""A checkpoint's tensor on disk, whatever file holds it.

A file format gives one class. It reads values as float32, and tells which matrices have codes that
a ``Format`` of this project holds exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.quantize import Format, QuantizedMatrix
from model.safetensors import SafetensorsFile

Rows = slice
"""Rows of the first axis, or everything for ``slice(None)``."""


class StoredTensor(ABC):
    """One tensor under the name that transformers gives it."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """The file to name in messages."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the values, not of packed codes."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """The stored type, for messages: F32, F16, BF16, Q4_K, GPTQ 4 bits."""

    @property
    @abstractmethod
    def readable(self) -> bool:
        """Whether the values are numbers that ``float32`` can read."""

    @abstractmethod
    def float32(self, rows: Rows = slice(None)) -> npt.NDArray[np.float32]:
        """Return values: a read-only view of the file, or an array of the caller's own.

        Raises CheckpointError.
        """

    @property
    def format(self) -> Format | None:
        """The format of ``codes``, or None if no format of this project holds the codes exactly.

        It is asked for often, so it reads no codes.
        """
        return None

    def codes(self) -> QuantizedMatrix | None:
        """Return the stored codes of a matrix in ``format``, or None as that does.

        Its ``dequantize`` equals ``float32`` exactly. A tensor [..., N, K] of more axes gives a
        matrix with all of its rows.
        """
        return None


@dataclass(frozen=True, slots=True)
class PlainTensor(StoredTensor):
    """A tensor of plain numbers in a safetensors file."""

    file: SafetensorsFile
    name: str

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.entries[self.name].shape

    @property
    def dtype(self) -> str:
        return self.file.entries[self.name].dtype

    @property
    def readable(self) -> bool:
        return self.dtype in ("F64", "F32", "F16", "BF16")

    def float32(self, rows: Rows = slice(None)) -> npt.NDArray[np.float32]:
        return self.file.float32(self.name, rows)

    def map(self) -> npt.NDArray[Any]:
        """Return the stored numbers as a view of the file, bf16 as uint16."""
        return self.file.map(self.name)
