"""Random encoders, which ``tests/make_encoders.py`` makes, and what transformers computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.quantize import Format
from model.texts import Texts

ENCODERS = Path(__file__).parent / "encoders"
NAMES = sorted(path.parent.name for path in ENCODERS.glob("*/golden.npz"))


@dataclass(frozen=True, slots=True)
class Golden:
    """What transformers computed: hidden rows behind the layers, and the head's result."""

    tokens: npt.NDArray[Any]
    texts: Texts
    hidden: npt.NDArray[Any]
    output: npt.NDArray[Any]

    @staticmethod
    def load(name: str) -> Golden:
        values = np.load(ENCODERS / name / "golden.npz")
        lengths, seconds = (tuple(values[key].tolist()) for key in ("lengths", "seconds"))
        return Golden(values["tokens"], Texts(lengths, seconds), values["hidden"], values["output"])


def stored(name: str, fmt: Format, directory: Path) -> tuple[Checkpoint, list[tuple[int, Path]]]:
    """Return a fixture's checkpoint, and its blocks in one format as artifacts."""
    checkpoint = Checkpoint.open(ENCODERS / name)
    return checkpoint, [
        (block, write_artifact(directory, block, checkpoint.block(block), fmt).path)
        for block in range(checkpoint.spec.block_count)
    ]
