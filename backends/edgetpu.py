"""Google's Coral Edge TPU: a layer's matrix products on the chip, everything else on the host.

Two backends run the same files. ``edgetpu`` has them compiled and runs them on the chip.
``tflite_cpu`` interprets them on the CPU. So the chip's results can be tested and measured without
a chip. ONNX Runtime computes embedding and head. Looking up rows is no product, and no vocabulary
fits on the chip.

Each of a layer's products (q, k and v stacked; o; gate and up stacked; down) is one file.
edgetpu_product describes the rounding to 8 bits, and edgetpu_compiler where compiled files are
kept.
"""

from __future__ import annotations

import functools
import itertools
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from backends.base import (
    Array,
    Artifacts,
    Backend,
    BackendError,
    BackendUnavailable,
    Capabilities,
    FilesMissing,
    HardwareAbsent,
    Stage,
    StageOptions,
    Supplier,
    Tokens,
)
from backends.checks import check_blocks, check_inputs, check_rows
from backends.edgetpu_compiler import (
    COMPILER,
    Compiled,
    Compiler,
    compile_files,
    default_directory,
    find_compiled,
    find_compiler,
)
from backends.edgetpu_devices import check_in_child, choose_target
from backends.edgetpu_host import HostLayer, Span, stacks
from backends.edgetpu_product import Counts, Int8Product, Int8Weights
from backends.edgetpu_runtime import Engine, Runtime, Target, find_runtime
from backends.edgetpu_tflite import fully_connected
from backends.encoder import EncoderLayers, EncoderStage, read_encoder
from backends.onnx_cpu import CHUNK_ROWS, OnnxCpuBackend
from model.artifact import read_block, values_of
from model.costs import stage_buffer_bytes
from model.rotary import rotary_table
from model.spec import LayerSpec, ModelSpec, RopeSpec
from model.texts import Texts

log = logging.getLogger(__name__)

BITS = 8
CONTAINER_BITS = {BITS: BITS}
ARITHMETIC = "tflite_cpu"

ON_CHIP_BYTES = 7_500_000
"""The chip's room for weights: 7.7 to 7.9 MiB of 8 MB, less the programs of about twenty products.

Compilers were seen to leave that much to weights.
"""

FILES_VERSION = 1
"""The version of the files of ``product_files``. Files of another version are compiled again."""

MANY_SATURATED = 0.05
"""The share of saturated outputs of a product that is worth a warning."""


class TfliteCpuBackend(Backend):
    """The Edge TPU's files, interpreted by TensorFlow Lite on the CPU."""

    @classmethod
    def probe(cls) -> Capabilities:
        try:
            runtime = find_runtime()
            version = _version(runtime)
        except BackendError as error:
            raise BackendUnavailable("tflite_cpu", _reason(error)) from error
        return Capabilities(
            "tflite_cpu",
            version,
            CONTAINER_BITS,
            exact_container_bits={},
            arithmetic=ARITHMETIC,
            experts=False,
        )

    def load(self, spec: ModelSpec, artifacts: Artifacts, options: StageOptions) -> Int8Stage:
        return _load(spec, artifacts, options, self._engines(options))

    def load_encoder(
        self, spec: ModelSpec, artifacts: Artifacts, options: StageOptions
    ) -> EncoderStage:
        return _load_encoder(spec, artifacts, options, self._engines(options))

    @staticmethod
    def _engines(options: StageOptions) -> MakeEngines:
        runtime = find_runtime()
        return lambda files: [Engine(runtime, file.path, None, options.threads) for file in files]


class EdgeTpuBackend(Backend):
    """An Edge TPU on USB or PCIe, reached through libedgetpu."""

    root: ClassVar[Path] = Path("/")
    """The directory that contains /sys and /dev."""

    @classmethod
    def probe(cls) -> Capabilities:
        try:
            target = choose_target(cls.root)  # Without a chip no runtime is needed.
        except BackendError as error:
            raise HardwareAbsent("edgetpu", _reason(error)) from error
        try:
            runtime = find_runtime(edge_tpu=True)
            version = _version(runtime)
            _check_once(runtime, target)
        except BackendError as error:
            raise BackendUnavailable("edgetpu", _reason(error)) from error
        return Capabilities(
            "edgetpu",
            f"{version}, {target.device}",
            CONTAINER_BITS,
            ON_CHIP_BYTES,
            {},
            ARITHMETIC,
            experts=False,
        )

    def load(self, spec: ModelSpec, artifacts: Artifacts, options: StageOptions) -> Int8Stage:
        return _load(spec, artifacts, options, self._engines(spec, artifacts, options))

    def load_encoder(
        self, spec: ModelSpec, artifacts: Artifacts, options: StageOptions
    ) -> EncoderStage:
        return _load_encoder(spec, artifacts, options, self._engines(spec, artifacts, options))

    def _engines(self, spec: ModelSpec, artifacts: Artifacts, options: StageOptions) -> MakeEngines:
        runtime, target = find_runtime(edge_tpu=True), choose_target(self.root)

        def engines(files: Sequence[ProductFile]) -> list[Engine]:
            compiled = _compiled(files)
            if compiled is None:
                compiled = _supplied(self.supplier, spec, artifacts, files)
                # Files from another machine must be right in every product.
                pairs = zip(compiled.files, [file.path for file in files], strict=True)
                check_in_child(runtime, target, [path for pair in pairs for path in pair])
            else:
                _check_once(runtime, target, (compiled.files[0], files[0].path))
            if compiled.streamed_bytes:
                log.warning(
                    "%.1f MB of %s do not fit on the chip and cross the bus at every call",
                    compiled.streamed_bytes / 1e6,
                    _layer_names(spec, artifacts),
                )
            return [Engine(runtime, path, target, options.threads) for path in compiled.files]

        return engines

    @classmethod
    def maker(cls) -> str | None:
        compiler = find_compiler()
        return None if compiler is None else f"{compiler.version}-{FILES_VERSION}"

    @classmethod
    def make_files(
        cls, spec: ModelSpec, artifacts: Artifacts, directory: Path, tick: Callable[[], None]
    ) -> list[Path]:
        """Return the compiled products of all layers in order, then the compiler's log."""
        compiler = find_compiler()
        if compiler is None:
            raise FilesMissing(f"{COMPILER} is not on PATH")
        compiled = compile_stage(spec, artifacts, compiler, directory, tick)
        return [*compiled.files, compiled.log]


@dataclass(frozen=True, slots=True)
class ProductFile:
    """One product's .tflite file and its weights, whose codes are a view of the file."""

    name: str
    path: Path
    weights: Int8Weights


MakeEngines = Callable[[Sequence[ProductFile]], list[Engine]]
"""Makes an engine for each product of a stage, in order."""


class Int8Stage(Stage):
    """Layers whose products run on an Engine, between ONNX Runtime's embedding and head."""

    def __init__(
        self,
        spec: ModelSpec,
        embedding: Stage | None,
        layers: Sequence[HostLayer],
        products: Sequence[tuple[str, Int8Product]],
        head: Stage | None,
        options: StageOptions,
        memory_bytes: int,
        resources: ExitStack,
    ) -> None:
        self._spec = spec
        self._embedding = embedding
        self._layers = list(layers)
        self._products = list(products)
        self._head = head
        self._options = options
        self._memory_bytes = memory_bytes
        self._resources = resources
        self._open = True

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    @property
    def kept_files(self) -> Mapping[Path, str]:
        return {} if self._head is None else self._head.kept_files

    @property
    def counts(self) -> dict[str, Counts]:
        """Return the values that the host had to compute of each product so far."""
        return {name: product.counts for name, product in self._products}

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
    ) -> Array:
        self._check_call([slot], position, inputs)
        rows = len(inputs)
        hidden: Array = np.asarray(inputs, np.float32)
        if self._embedding is not None:
            hidden = self._embedding.forward(slot, position, inputs)
        hidden = self._run_layers(hidden, [Span(slot, position, 0, rows)])
        if self._head is None:
            return hidden
        if not logits:
            return np.empty((0, self._spec.vocab), np.float32)
        first = rows - logits
        return self._head.forward(slot, position + first, hidden[first:], logits=logits)

    def decode(
        self, slots: Sequence[int], positions: Sequence[int], inputs: Array | Tokens
    ) -> Array:
        """Run one row of each of several sequences. The layers' products take all rows at once."""
        for row, position in enumerate(positions):
            self._check_call(slots, position, inputs[row : row + 1])
        places = list(zip(slots, positions, strict=True))
        hidden: Array = np.asarray(inputs, np.float32)
        if self._embedding is not None:
            hidden = _each_row(self._embedding, places, inputs)
        spans = [Span(*place, row, row + 1) for row, place in enumerate(places)]
        hidden = self._run_layers(hidden, spans)
        return hidden if self._head is None else _each_row(self._head, places, hidden)

    def _run_layers(self, hidden: Array, spans: Sequence[Span]) -> Array:
        # Infinities from a damaged model or peer give NaN, and must not print a warning.
        with np.errstate(over="ignore", invalid="ignore"):
            for layer in self._layers:
                hidden = layer(hidden, spans)
        # A stage without layers returns its input, and the caller owns the result.
        return hidden if self._layers else hidden.copy()

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        for name, counts in self.counts.items():
            share = counts.saturated / max(counts.outputs, 1)
            log.log(
                logging.WARNING if share > MANY_SATURATED else logging.DEBUG,
                "%s: the host computed %.2g %% of the outputs, which left the range, and %.2g %%"
                " of the inputs, which were outliers",
                name,
                100 * share,
                100 * counts.outliers / max(counts.inputs, 1),
            )
        self._layers, self._products = [], []
        self._embedding = self._head = None
        self._resources.close()

    def _check_call(self, slots: Sequence[int], position: int, inputs: Array | Tokens) -> None:
        if not self._open:
            raise BackendError("the stage is closed")
        if len(set(slots)) < len(slots):
            raise BackendError("the rows of a pass must have different slots")
        check_inputs(inputs, self._spec, tokens=self._embedding is not None)
        for slot in slots:
            check_rows(
                slot, position, len(inputs), self._options.slots, self._options.context_tokens
            )


class HostEncoderLayers(EncoderLayers):
    """Layers of an encoder. A product takes the rows of all texts at once."""

    def __init__(
        self, layers: Sequence[HostLayer], memory_bytes: int, resources: ExitStack
    ) -> None:
        self._layers = list(layers)
        self._memory_bytes = memory_bytes
        self._resources = resources

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def run(self, hidden: Array, texts: Texts) -> Array:
        begins = texts.begins().tolist()
        spans = [Span(0, 0, begin, end) for begin, end in itertools.pairwise(begins)]
        with np.errstate(over="ignore", invalid="ignore"):
            for layer in self._layers:
                hidden = layer(hidden, spans)
        return hidden

    def close(self) -> None:
        self._layers = []
        self._resources.close()


def product_files(
    spec: ModelSpec, artifacts: Artifacts, directory: Path
) -> tuple[list[ProductFile], dict[int, dict[str, Array]]]:
    """Return the .tflite files of all layers in order, and each layer's norms and biases by block.

    The files are written to ``directory`` and stay mapped after it is gone. Equal artifacts make
    equal files on every machine. Raises BackendError unless the blocks have 8 bits, and
    CheckpointError for damaged artifacts.
    """
    files: list[ProductFile] = []
    vectors: dict[int, dict[str, Array]] = {}
    for block, source in artifacts:
        fmt, tensors = read_block(source, spec, block)
        if fmt.bits != BITS:
            raise BackendError(
                f"{spec.block_name(block)} is stored at {fmt.bits} bits: an Edge TPU takes {BITS}"
            )
        if spec.block_kind(block) != "layer":
            continue
        layer = spec.layer(block)
        if layer.experts is not None or layer.sinks:
            what = "a mixture of experts" if layer.experts is not None else "attention sinks"
            raise BackendError(f"{spec.block_name(block)} has {what}, which no Edge TPU runs")
        vectors[block] = {
            name: tensor for name, tensor in tensors.items() if isinstance(tensor, np.ndarray)
        }
        for name, parts in stacks(spec.layer(block)).items():
            matrix = np.concatenate([values_of(tensors[f"{part}.weight"]) for part in parts])
            weights = Int8Weights.of(matrix)
            written = fully_connected(weights.codes, weights.multipliers)
            path = directory / f"{len(files):03}.tflite"
            path.write_bytes(written.content)
            codes = np.memmap(path, np.int8, "r", written.weights_offset, matrix.shape)
            mapped = replace(weights, codes=np.asarray(codes))
            files.append(ProductFile(f"{spec.block_name(block)} {name}", path, mapped))
    return files, vectors


def _load(
    spec: ModelSpec, artifacts: Artifacts, options: StageOptions, make_engines: MakeEngines
) -> Int8Stage:
    check_blocks(spec, [block for block, _ in artifacts], options)
    # Two stages cannot share one directory of prepared weights, because each drops the other's.
    end_options = replace(options, prepared_dir=None)
    with ExitStack() as resources:
        ends = {
            kind: resources.enter_context(
                closing(
                    OnnxCpuBackend().load(
                        spec, [(block, path)], options if kind == "head" else end_options
                    )
                )
            )
            for block, path in artifacts
            if (kind := spec.block_kind(block)) != "layer"
        }
        layers, products, memory_bytes = _host_layers(
            spec, artifacts, options, make_engines, resources
        )
        memory_bytes += sum(stage.memory_bytes for stage in ends.values())
        if layers:
            blocks = [block for block, _ in artifacts if spec.block_kind(block) == "layer"]
            memory_bytes += stage_buffer_bytes(spec, blocks, CHUNK_ROWS, options.context_tokens)
        return Int8Stage(
            spec,
            ends.get("embedding"),
            layers,
            products,
            ends.get("head"),
            options,
            memory_bytes,
            resources.pop_all(),
        )


def _load_encoder(
    spec: ModelSpec, artifacts: Artifacts, options: StageOptions, make_engines: MakeEngines
) -> EncoderStage:
    check_blocks(spec, [block for block, _ in artifacts], options)
    ends, _, buffer_bytes = read_encoder(spec, artifacts, options)
    with ExitStack() as resources:
        # Texts run one after the other, so one slot holds the keys of each in turn.
        layers, _, memory_bytes = _host_layers(
            spec, artifacts, replace(options, slots=1), make_engines, resources
        )
        host = HostEncoderLayers(layers, memory_bytes, resources.pop_all()) if layers else None
        return EncoderStage(spec, ends, host, options, buffer_bytes)


def _host_layers(
    spec: ModelSpec,
    artifacts: Artifacts,
    options: StageOptions,
    make_engines: MakeEngines,
    resources: ExitStack,
) -> tuple[list[HostLayer], list[tuple[str, Int8Product]], int]:
    """Return a stage's layers, their products by name, and their bytes.

    The engines are closed with ``resources``.
    """
    directory = artifacts[0][1].parent
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".products-") as name:
            files, vectors = product_files(spec, artifacts, Path(name))
            engines = make_engines(files) if files else []
            products = []
            for file, engine in zip(files, engines, strict=True):
                resources.callback(engine.close)
                products.append((file.name, Int8Product(file.weights, engine)))
    except OSError as error:
        # The directory must hold files of a byte per weight until they are mapped.
        reason = (error.strerror or str(error)).lower()
        raise BackendError(f"cannot write products to {directory}: {reason}") from error
    left = iter(product for _, product in products)
    layers = [
        HostLayer(
            spec.layer(block),
            own,
            {name: next(left) for name in stacks(spec.layer(block))},
            _rotary(spec.layer(block), options.context_tokens),
            options.slots,
            options.context_tokens,
        )
        for block, own in vectors.items()
    ]
    memory_bytes = sum(layer.memory_bytes for layer in layers)
    memory_bytes += sum(file.weights.codes.size + 2 * file.weights.steps.nbytes for file in files)
    return layers, products, memory_bytes


def compile_stage(
    spec: ModelSpec,
    artifacts: Artifacts,
    compiler: Compiler,
    directory: Path,
    tick: Callable[[], None] = lambda: None,
) -> Compiled:
    """Compile the layers of a stage together. Raises BackendError, CheckpointError."""
    with tempfile.TemporaryDirectory(prefix="shoal-edgetpu-") as name:
        files, _ = product_files(spec, artifacts, Path(name))
        if not files:
            raise BackendError("there is no layer to compile")
        return compile_files(compiler, [file.path for file in files], directory, tick)


def _compiled(files: Sequence[ProductFile]) -> Compiled | None:
    """Return the files for the chip, compiled here or found. Raises BackendError."""
    paths, directory = [file.path for file in files], default_directory()
    compiler = find_compiler()
    if compiler is not None:
        return compile_files(compiler, paths, directory)
    return find_compiled(directory, paths, None)


def _supplied(
    supplier: Supplier | None, spec: ModelSpec, artifacts: Artifacts, files: Sequence[ProductFile]
) -> Compiled:
    """Return the files for the chip from another machine. Raises FilesMissing, BackendError."""
    layers = [item for item in artifacts if spec.block_kind(item[0]) == "layer"]
    first, end = layers[0][0] - 1, layers[-1][0]
    try:
        if supplier is None:
            raise FilesMissing(f"{COMPILER} is not on PATH")
        *paths, said = supplier(spec, layers)
    except FilesMissing as error:
        raise FilesMissing(
            f"{_layer_names(spec, layers)} are not compiled for the Edge TPU ({error}): put"
            f" {COMPILER} on the PATH of the coordinator or of an agent, on x86-64; or run there"
            f" `shoal edgetpu compile MODEL --layers {first}:{end} -o DIR`, and copy the files in"
            f" DIR to {default_directory()}"
        ) from error
    if len(paths) != len(files):
        raise BackendError(f"{len(paths)} compiled files came for {len(files)} products")
    return Compiled.of(paths, said)


def _layer_names(spec: ModelSpec, artifacts: Artifacts) -> str:
    layers = [block - 1 for block, _ in artifacts if spec.block_kind(block) == "layer"]
    return f"layers {layers[0]} to {layers[-1]}"


_checked: set[tuple[Target, str, bool]] = set()


def _check_once(runtime: Runtime, target: Target, files: tuple[Path, ...] = ()) -> None:
    """Let a child open the device, or run a product, before this process does."""
    key = target, str(runtime), bool(files)
    if key not in _checked:
        check_in_child(runtime, target, files)
        _checked.add(key)


def _version(runtime: Runtime) -> str:
    """Name all that a stage's times depend on. ONNX Runtime has the ends. Raises BackendError."""
    return f"{runtime}, onnxruntime {OnnxCpuBackend.probe().version}"


def _each_row(stage: Stage, places: Sequence[tuple[int, int]], inputs: Array | Tokens) -> Array:
    rows = [stage.forward(*place, inputs[row : row + 1]) for row, place in enumerate(places)]
    return np.concatenate(rows)


@functools.lru_cache(maxsize=4)
def _rotary_table(rope: RopeSpec, head_dim: int, context_tokens: int) -> tuple[Array, Array]:
    return rotary_table(rope, head_dim, context_tokens)


def _rotary(layer: LayerSpec, context_tokens: int) -> tuple[Array, Array] | None:
    if layer.rope is None:
        return None
    return _rotary_table(layer.rope, layer.head_dim, context_tokens)


def _reason(error: BackendError) -> str:
    return error.reason if isinstance(error, BackendUnavailable) else str(error)
