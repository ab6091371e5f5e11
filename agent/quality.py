"""Measures a model's sensitivities on this device, with blocks from the coordinator.

The device fetches a block when it needs it, and evicts blocks when the cache is full. So neither
its memory nor its storage has to hold the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from agent.blocks import BlockCache
from backends.base import Backend, BackendError
from backends.registry import BACKENDS, backend_class
from calibration.quality.blocks import measure_blocks, measure_plans
from calibration.quality.hops import measure_boundaries
from calibration.quality.students import Options
from model.artifact import Tensor, read_block, values_of
from model.errors import CheckpointError
from model.quantize import BITS, Format, QuantizedMatrix, own_format
from model.spec import ModelSpec
from wire.introduction import Caller
from wire.messages import (
    BlockRef,
    Endpoint,
    HopMeasured,
    MeasureQuality,
    Message,
    QualityMeasured,
)

KEPT_SHARE = 0.4
"""The share of the device's memory for original blocks that are kept instead of read again."""


class StreamedModel:
    """A ``BlockSource`` (calibration.quality.students) over artifacts of original blocks."""

    def __init__(
        self,
        spec: ModelSpec,
        blocks: Sequence[BlockRef],
        cache: BlockCache,
        coordinator: Endpoint,
        device: str,
        caller: Caller | None = None,
        prepared: Sequence[tuple[int, BlockRef]] = (),
    ) -> None:
        """Take originals of all blocks, and blocks whose codes the coordinator chose.

        prepared: pairs of bits and block. Raises BackendError if ``blocks`` are not all blocks of
        the model, in order.
        """
        if [ref.block for ref in blocks] != list(range(spec.block_count)):
            raise BackendError("the request must have all blocks of the model, in order")
        self.spec = spec
        self._blocks = blocks
        self._cache = cache
        self._coordinator = coordinator
        self._device = device
        self._caller = caller
        self._formats: dict[int, Format] = {}
        self._prepared = {(ref.block, bits): ref for bits, ref in prepared}

    def block(self, block: int) -> Mapping[str, npt.NDArray[np.float32]]:
        """Read one block. Raises CacheError, WireError, CheckpointError."""
        fmt, tensors = read_block(self._path(block), self.spec, block)
        self._formats[block] = fmt
        return {name: values_of(tensor) for name, tensor in tensors.items()}

    def kept(self, block: int, fmt: Format) -> Mapping[str, Tensor]:
        """Return the tensors that came in ``fmt``. Raises the same errors as ``block``."""
        ref = self._prepared.get((block, fmt.bits))
        if ref is not None:
            found, tensors = read_block(self._fetched(ref), self.spec, block)
            if found == fmt:
                return tensors
        if fmt.scheme == "float" or self.lossless_format(block) != fmt:
            return {}
        _, tensors = read_block(self._path(block), self.spec, block)
        return {
            name: tensor for name, tensor in tensors.items() if isinstance(tensor, QuantizedMatrix)
        }

    def format_of(self, block: int, fmt: Format) -> Format:
        """Return the format in which the block came at its bits, or else ``fmt``."""
        return own_format(self.lossless_format(block), fmt)

    def lossless_format(self, block: int) -> Format:
        """Return the format in which the block came. Raises the same errors as ``block``."""
        if block not in self._formats:
            self._formats[block], _ = read_block(self._path(block), self.spec, block)
        return self._formats[block]

    def _path(self, block: int) -> Path:
        return self._fetched(self._blocks[block])

    def _fetched(self, ref: BlockRef) -> Path:
        self._cache.fetch(
            [ref], self._coordinator, self._device, lambda done, total: None, caller=self._caller
        )
        return self._cache.path(ref.sha256)


def measure_quality(
    request: MeasureQuality,
    source: StreamedModel,
    own: Backend,
    *,
    threads: int,
    directory: Path,
    memory_bytes: int,
    progress: Callable[[int, int], None],
    report: Callable[[Message], None],
) -> None:
    """Carry out a request; ``report`` gets each result at once.

    own: the agent's backend, for requests that name none.
    directory: it is emptied first, because a killed run leaves hidden states there.
    progress: gets (done, all) passes of the blocks, then of the hops, then of the plans.

    Raises BackendError for an impossible request, BackendUnavailable for a backend that is not
    here, and the errors of reading and running blocks.
    """
    formats = _formats(request, source.spec)
    backend, plain = _backends(request.backend, own)
    shutil.rmtree(directory, ignore_errors=True)
    options = Options(backend, threads, progress, int(memory_bytes * KEPT_SHARE), plain)

    try:
        with closing(_results(request, source, formats, options, directory)) as results:
            for result in results:
                report(result)
    except ValueError as error:
        raise BackendError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _results(
    request: MeasureQuality,
    source: StreamedModel,
    formats: Mapping[int, Format],
    options: Options,
    directory: Path,
) -> Generator[Message, None, None]:
    """Yield the results of blocks, then of hops, then of plans. Close it to end the work."""
    sequences = request.sequences
    wanted = {block: [formats[bits] for bits in widths] for block, widths in request.wanted}
    with closing(measure_blocks(source, wanted, sequences, options, directory)) as found:
        for one in found:
            yield QualityMeasured(request.request, one.block, (one.bits,), one.kl, one.weight_error)
    wanted_hops = dict(request.hops)
    with closing(measure_boundaries(source, wanted_hops, sequences, options, directory)) as hops:
        for hop in hops:
            yield HopMeasured(request.request, hop.boundary, hop.bits, hop.kl)
    plans = [[formats[bits] for bits in plan] for plan in request.plans]
    with closing(measure_plans(source, plans, sequences, options, directory)) as measured:
        for plan, kl in zip(request.plans, measured, strict=True):
            yield QualityMeasured(request.request, None, plan, kl, 0.0)


def _backends(name: str, own: Backend) -> tuple[Backend, Backend | None]:
    """Return the backend for layers, and the one for widths that it lacks (None: the reference).

    Raises BackendUnavailable.
    """
    if not name:
        return own, None
    backend, plain = (backend_class(one)() for one in (name, next(iter(BACKENDS))))
    for one in (backend, plain):
        one.probe()
    return backend, plain


def _formats(request: MeasureQuality, spec: ModelSpec) -> dict[int, Format]:
    """The format of each width asked for. Raises BackendError."""
    blocks = [block for block, _ in request.wanted]
    if len(set(blocks)) != len(blocks) or not all(0 <= k < spec.block_count for k in blocks):
        raise BackendError("the model has no such blocks")
    boundaries = [boundary for boundary, _ in request.hops]
    if len(set(boundaries)) != len(boundaries) or not all(
        0 <= boundary < spec.head_block for boundary in boundaries
    ):
        raise BackendError("the model has no such boundaries between blocks")
    asked = {bits for _, widths in request.wanted for bits in widths}
    asked.update(bits for plan in request.plans for bits in plan)
    if not asked <= set(BITS):
        raise BackendError(f"unknown widths: known are {', '.join(map(str, BITS))}")
    try:
        return {bits: Format.of(bits, request.scheme, request.group_size) for bits in asked}
    except ValueError as error:
        raise BackendError(str(error)) from error
