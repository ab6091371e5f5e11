"""Codes that a quantizer chose run in every backend as rounded ones do."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from backends.base import BackendUnavailable, StageOptions
from backends.registry import BACKENDS, backend_class
from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.quantize import PREPARED, Format, Quantizer
from model.quantizers.prepared import quantized
from model.reference import ReferenceModel

FIXTURES = Path(__file__).parents[1] / "fixtures"
ROUNDING = {"edgetpu", "tflite_cpu"}
"""Backends that round activations. They run 8 bits alone, which no quantizer prepares."""

PROMPT = np.arange(3, 20)


@pytest.mark.parametrize("quantizer", PREPARED)
@pytest.mark.parametrize("name", sorted(set(BACKENDS) - ROUNDING))
def test_a_backend_computes_with_the_chosen_codes(
    name: str, quantizer: Quantizer, tmp_path: Path
) -> None:
    try:
        backend = backend_class(name)()
        widths = backend.probe().container_bits
    except BackendUnavailable as unavailable:
        pytest.skip(unavailable.reason)
    checkpoint = quantized(Checkpoint.open(FIXTURES / "llama"), quantizer, tmp_path)
    spec = checkpoint.spec
    for bits in sorted({2, 3, 4} & widths.keys()):
        fmt = Format.of(bits, quantizer)
        artifacts = [
            (block, write_artifact(tmp_path, block, checkpoint.block_in(block, fmt), fmt).path)
            for block in range(spec.block_count)
        ]
        expected = ReferenceModel.from_artifacts(spec, artifacts).forward(PROMPT)[-1]
        options = StageOptions(slots=1, context_tokens=32, threads=1, exact=True)
        with closing(backend.load(spec, artifacts, options)) as stage:
            found = stage.forward(0, 0, PROMPT)[0]
        np.testing.assert_allclose(found, expected, atol=1e-4 * float(np.abs(expected).max()))
