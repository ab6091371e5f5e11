"""The torch backends: packed weights, kernels and their choice, lengths, GPUs, reasons."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from backends import torch_matmul, torch_stage, torch_tokens
from backends.base import Backend, BackendError, BackendUnavailable, StageOptions
from backends.registry import backend_class
from backends.torch_cuda import (
    TorchCpuBackend,
    TorchCudaBackend,
    check_gpu,
    is_integrated,
    triton_version,
)
from backends.torch_layers import TokenPass
from backends.torch_matmul import Form, KernelChooser, candidate_forms
from backends.torch_packed import CONTAINERS, PackedWeight, plain_weight
from calibration.device import profile_device
from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.costs import executed_bytes
from model.quantize import INTEGER_BITS, Format, QuantizedMatrix, Scheme, quantize
from model.reference import ReferenceModel
from model.spec import ModelSpec

FIXTURES = Path(__file__).parents[1] / "fixtures"
STAGE_INT4_TOLERANCE = 3e-2
"""Relative to the largest logit, after three layers by torch's 4-bit product: 2.04 % on an H100."""

INTERPRETER_WITH_NEW_NUMPY = "only 0-dimensional arrays can be converted to Python scalars"
"""What Triton 3.6's interpreter says under numpy 2.5."""

OLD_NUMPY = ("-W", "ignore:Conversion of an array with ndim:DeprecationWarning")
"""What older numpy only warns of."""

NO_PLUGINS = ("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark")
"""For pytest inside a test: plugins that a machine may have, and that disagree with it."""

CPU = torch.device("cpu")
HALF_TOLERANCE = 1e-2
"""Relative to the largest logit, after the three layers of a fixture in fp16."""

OPTIONS = StageOptions(slots=2, context_tokens=48, threads=1, exact=True)
FORMATS = [
    *(Format.of(bits, "rtn", 32) for bits in INTEGER_BITS),
    Format.of(4, "rtn", 64, symmetric=True),
    Format.of(8, "truncate", 128),
    Format.of(3, "truncate", 32),
]

Artifacts = list[tuple[int, Path]]


@pytest.fixture
def gpu() -> Backend:
    try:
        TorchCudaBackend.probe()
    except BackendUnavailable as unavailable:
        pytest.skip(unavailable.reason)
    return TorchCudaBackend()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(6, 64), (5, 200)])
def test_packed_weights_are_exactly_the_stored_ones(fmt: Format, rows: int, columns: int) -> None:
    stored = matrices(fmt, rows, columns)
    packed = PackedWeight.of(stored, CPU)
    assert packed.bits == CONTAINERS[fmt.bits]
    np.testing.assert_array_equal(packed.dequantize(torch.float32).numpy(), values(stored))
    part = packed.part(slice(2, 4)).dequantize(torch.float32)
    np.testing.assert_array_equal(part.numpy(), values(stored)[2:4])


@pytest.mark.parametrize("bits", INTEGER_BITS)
def test_packed_weights_take_no_more_than_a_plan_charges(bits: int, tmp_path: Path) -> None:
    spec, artifacts = stored_model(tmp_path, "llama", bits)
    one = [replace(OPTIONS, slots=slots) for slots in (1, 2)]
    stages = [TorchCpuBackend().load(spec, artifacts[1:2], options) for options in one]
    kv = stages[1].memory_bytes - stages[0].memory_bytes
    layer = spec.layer(1)
    assert kv == 2 * 4 * layer.kv_heads * layer.head_dim * OPTIONS.context_tokens
    stored = matrices(Format.of(bits), 64, 256)
    packed = PackedWeight.of(stored, CPU).nbytes
    head = replace(spec, vocab=2 * 64, hidden=256, embed_dim=256, final_norm=False)
    assert packed <= executed_bytes(head, head.head_block, Format.of(bits), CONTAINERS[bits])
    for stage in stages:
        stage.close()


@pytest.mark.parametrize("where", ["interpreter", "gpu"])
@pytest.mark.parametrize("cases", ["kernel", "fused"])
def test_triton_kernels(cases: str, where: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    if where == "gpu":
        request.getfixturevalue("gpu")
    path = Path(__file__).with_name(f"torch_{cases}_cases.py")
    completed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *NO_PLUGINS, *OLD_NUMPY, str(path)],
        env=os.environ | {"TRITON_INTERPRET": str(int(where == "interpreter"))},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    if where == "interpreter" and INTERPRETER_WITH_NEW_NUMPY in completed.stdout:
        pytest.skip("Triton's interpreter does not run with this numpy")
    assert completed.returncode == 0, completed.stdout


# sm_75 is Turing, sm_87 Jetson Orin, sm_110 Jetson Thor.
@pytest.mark.filterwarnings("ignore:TRITON_")
@pytest.mark.parametrize("capability", [75, 87, 110])
@pytest.mark.parametrize("bits", sorted(set(CONTAINERS.values())))
def test_triton_kernels_compile_for(capability: int, bits: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from backends import torch_kernels

    pointers = {"x": "*fp16", "words": "*i32", "scales": "*fp16", "zeros": "*u8", "result": "*fp16"}
    constants = {"BITS": bits, "GROUP_WORDS": bits, "WORDS": 256}
    for kernel in (torch_kernels.gemv_kernel, torch_kernels.unpack_kernel):
        compile_for(capability, kernel, pointers, constants)
    for rows, outputs in ((16, 16), (64, 64)):
        fixed = constants | {"GROUP_WORDS": 2 * bits, "ROWS": rows, "OUTPUTS": outputs}
        compile_for(capability, torch_kernels.gemm_kernel, pointers, fixed)


@pytest.mark.filterwarnings("ignore:TRITON_")
@pytest.mark.parametrize("capability", [75, 87, 110])
def test_the_kernel_for_tiles_compiles_for(capability: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from backends import torch_kernels

    pointers = {"tiles": "*i32", "scales_and_offsets": "*bf16", "result": "*fp16"}
    constants = {"GROUP": 64, "INNER": 8, "BLOCK": 2048}
    compile_for(capability, torch_kernels.unpack_tiles_kernel, pointers, constants)


STEP_POINTERS = {
    "add_norm": {"hidden": "*fp32", "part": "*fp16", "total": "*fp32", "result": "*bf16"},
    "place": {
        "heads": "*bf16",
        "slots": "*i64",
        "positions": "*i64",
        "cos": "*fp32",
        "sin": "*fp32",
        "weights": "*fp32",
        "query": "*fp16",
        "keys": "*fp16",
        "values": "*fp16",
    },
    "activate": {"rows": "*bf16", "result": "*fp16"},
}
STEP_CONSTANTS: list[tuple[str, dict[str, Any]]] = [
    ("add_norm", {"WIDTH": 2048, "BLOCK": 2048, "ADDS": True, "CENTERED": False}),
    ("add_norm", {"WIDTH": 5120, "BLOCK": 8192, "ADDS": False, "CENTERED": True}),
    ("place", {"WIDTH": 64, "BLOCK": 64, "TURNED": 64, "NORMED": False}),
    ("place", {"WIDTH": 80, "BLOCK": 128, "TURNED": 32, "NORMED": True}),
    ("place", {"WIDTH": 128, "BLOCK": 128, "TURNED": 0, "NORMED": False}),
    *(
        ("activate", {"KIND": kind, "GATED": kind != "relu", "WIDTH": 8192, "BLOCK": 1024})
        for kind in ("relu", "silu", "gelu", "gelu_tanh")
    ),
]


@pytest.mark.filterwarnings("ignore:TRITON_")
@pytest.mark.parametrize("capability", [75, 87, 110])
def test_kernels_of_steps_compile_for(capability: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from backends import torch_fused_kernels

    scalars = {"epsilon": "fp32", "slot_stride": "i64"}
    norm = {"weight": "*fp32", "bias": "*fp32"}
    for name, constants in STEP_CONSTANTS:
        kernel = getattr(torch_fused_kernels, f"{name}_kernel")
        fixed = constants | {"HEADS": 32, "KV_HEADS": 8}
        compile_for(capability, kernel, STEP_POINTERS[name] | norm | scalars, fixed)


def compile_for(
    capability: int, kernel: Any, pointers: dict[str, str], constants: dict[str, Any]
) -> None:
    """Compile all the way to machine code, for which no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names
    }
    fixed = {(names.index(name),): constants[name] for name in names if name in constants}
    source = triton.compiler.ASTSource(kernel, signature=signature, constexprs=fixed)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    except triton.runtime.errors.PTXASError as error:
        if f"'sm_{capability}a' is not defined" not in str(error):
            raise
        pytest.skip(f"this Triton's assembler does not know sm_{capability}")
    assert compiled.asm["cubin"]


@pytest.mark.parametrize("fmt", [Format.of(4, "rtn", group) for group in (32, 64)])
def test_every_form_multiplies_alike(fmt: Format) -> None:
    stored = matrices(fmt, 16, 128)
    packed, expected = PackedWeight.of(stored, CPU), values(stored)
    forms = candidate_forms(CPU, torch.float32, exact=True)
    assert [form.name for form in forms] == ["packed", "int4", "unpacked"]
    x = torch.randn((9, 128), generator=torch.Generator().manual_seed(0))
    for form in forms:
        for kernel in form.kernels.values():
            product = kernel(x, form.convert(packed)).numpy()
            np.testing.assert_allclose(product, x.numpy() @ expected.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_stage_with_room_gives_the_same(bits: int, tmp_path: Path) -> None:
    spec, artifacts = stored_model(tmp_path, "qwen3", bits)
    roomy = replace(OPTIONS, memory_bytes=1 << 30)
    stage = TorchCpuBackend().load(spec, artifacts, roomy)
    check(stage_logits(stage, tokens(spec, 12)), reference(spec, artifacts, 12), 1e-5)
    stage.close()


def broken(x: Any, weight: Any) -> Any:
    raise RuntimeError("no compiler\nand more")


def wrong(x: Any, weight: PackedWeight) -> Any:
    return torch.zeros((len(x), weight.shape[0]))


def test_a_kernel_that_fails_or_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    packed, *others = candidate_forms(CPU, torch.float32, exact=True)
    doubtful = Form("packed", packed.convert, {**packed.kernels, "a": broken, "b": wrong}, 1e-5)
    failing = Form("int4", lambda weight: broken(None, weight), {"c": wrong}, 1e-5)
    monkeypatch.setattr(
        torch_matmul, "candidate_forms", lambda *_, **__: [doubtful, failing, *others[1:]]
    )
    stored = matrices(Format.of(4, "rtn", 32), 16, 128)
    chooser = KernelChooser(CPU, exact=True, roomy=True)
    with caplog.at_level(logging.WARNING):
        linear = chooser.linear(PackedWeight.of(stored, CPU), None, torch.float32)
    assert {message.split(" is not used")[0] for message in caplog.messages} == {
        "packed/a",
        "packed/b",
        "int4",
    }
    assert all("\n" not in message for message in caplog.messages)
    x = torch.randn((3, 128), generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(linear(x).numpy(), x.numpy() @ values(stored).T, atol=1e-4)


@pytest.mark.parametrize(
    ("tiles_us", "form", "kernels"),
    [
        # Seconds of a token count, and a sixteenth of a chunk's.
        ({1: 5, 8: 5, 64: 90}, "packed", ("few", "few", "many")),
        ({1: 2, 8: 2, 64: 50}, "int4", ("tiles", "tiles", "tiles")),
        ({1: 5, 8: 5, 64: 9}, "int4", ("tiles", "tiles", "tiles")),
    ],
)
def test_the_fastest_form_for_tokens_and_prompts_is_kept(
    tiles_us: dict[int, int],
    form: str,
    kernels: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    times_us = {
        "few": {1: 6, 8: 8, 64: 300},
        "many": {1: 30, 8: 30, 64: 30},
        "tiles": tiles_us,
    }

    def named(name: str) -> Any:
        def kernel(x: Any, weight: Any) -> Any:
            kernel.last = name, len(x)  # type: ignore[attr-defined]
            return torch_matmul._multiply_plainly(x, weight)

        return kernel

    every = {name: named(name) for name in times_us}
    packed, *_ = candidate_forms(CPU, torch.float32, exact=True)
    few_and_many = {name: every[name] for name in ("few", "many")}
    forms = [
        Form("packed", packed.convert, few_and_many, 1e-5),
        Form("int4", packed.convert, {"tiles": every["tiles"]}, 2e-2, {"tiles": torch.float64}),
    ]
    monkeypatch.setattr(torch_matmul, "candidate_forms", lambda *_, **__: forms)

    def seconds(call: Any, *_: object) -> float:
        name = next(name for name, kernel in every.items() if kernel is call.func)
        return times_us[name][len(call.args[0])] * 1e-6

    monkeypatch.setattr(torch_matmul, "seconds", seconds)
    stored = matrices(Format.of(4, "rtn", 32), 16, 128)
    with caplog.at_level(logging.INFO):
        linear = KernelChooser(CPU, exact=False, roomy=True).linear(
            PackedWeight.of(stored, CPU), None, torch.float32
        )
    assert f"kept {form}, multiplied by {kernels[0]} (" in caplog.text
    for rows, name in zip((1, 8, 64), kernels, strict=True):
        x = torch.randn((rows, 128), generator=torch.Generator().manual_seed(0))
        np.testing.assert_allclose(linear(x).numpy(), x.numpy() @ values(stored).T, atol=1e-4)
        assert every[name].last == (name, rows)
        assert linear.takes(rows) == (torch.float64 if name == "tiles" else torch.float32)


def test_a_later_stage_of_the_same_layouts_takes_their_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So it loads faster, and gives the same results to the last bit."""
    timed = []

    def seconds(*_: object) -> float:
        timed.append(1)
        return 1e-3

    monkeypatch.setattr(torch_matmul, "seconds", seconds)
    choices: torch_matmul.Choices = {}
    packed = PackedWeight.of(matrices(Format.of(4, "rtn", 32), 16, 128), CPU)
    counts = []
    for exact in (False, False, True):
        chooser = KernelChooser(CPU, exact=exact, roomy=True, choices=choices)
        chooser.linear(packed, None, torch.float32)
        counts.append(len(timed))
    assert 0 < counts[0] == counts[1] < counts[2]


@pytest.mark.parametrize("name", ["mistral", "opt-post"])
def test_token_passes_of_every_length(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_tokens, "SHORTEST_LENGTH", 4)
    monkeypatch.setattr(torch_stage, "PROMPT_ROWS", 5)
    spec, artifacts = stored_model(tmp_path, name, 8)
    expected, sequence = reference(spec, artifacts, 40), tokens(spec, 40)
    stage = TorchCpuBackend().load(spec, artifacts, OPTIONS)
    for position in range(40):
        row = slice(position, position + 1)
        check(stage.forward(0, position, sequence[row]), expected[row], 1e-5)
    # A prompt of several chunks, the last of which is short.
    check(stage.forward(1, 0, sequence[:12]), expected[11:12], 1e-5)
    stage.close()


@pytest.mark.parametrize("rows", [1, 6])
def test_values_out_of_range_are_an_error_that_ends_with_its_sequence(
    rows: int, tmp_path: Path
) -> None:
    spec, artifacts = stored_model(tmp_path, "llama", 8)
    stage = TorchCpuBackend().load(spec, artifacts[1:3], OPTIONS)
    hidden = np.random.default_rng(0).standard_normal((6, spec.hidden)).astype(np.float32)
    expected = [stage.forward(1, at, hidden[at : at + 1]) for at in range(6)]
    overflown = np.full((rows, spec.hidden), np.inf, np.float32)
    with pytest.raises(BackendError, match="range of 16 bits"):
        stage.forward(0, 0, overflown)
    for at in range(6):
        np.testing.assert_array_equal(stage.forward(0, at, hidden[at : at + 1]), expected[at])
    stage.close()


def test_a_pass_of_one_slot_twice_or_of_none_is_refused(tmp_path: Path) -> None:
    spec, artifacts = stored_model(tmp_path, "llama", 4)
    stage = TorchCpuBackend().load(spec, artifacts, OPTIONS)
    with pytest.raises(BackendError, match="different slots"):
        stage.decode([1, 1], [0, 1], tokens(spec, 2))
    with pytest.raises(BackendError, match="different slots"):
        stage.decode([], [], tokens(spec, 0))
    stage.close()


def test_errors_of_torch_are_backend_errors_of_one_line() -> None:
    with pytest.raises(BackendError) as caught, torch_stage.translated("cannot run"):
        raise RuntimeError("CUDA error: unspecified\nCompile with TORCH_USE_CUDA_DSA\n")
    assert str(caught.value) == "cannot run: CUDA error: unspecified"
    expected = pytest.raises(BackendError, match="out of memory; use fewer bits")
    with expected, torch_stage.translated("cannot load"):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")


@pytest.mark.parametrize("name", ["torch_cuda", "torch_cpu"])
def test_without_torch_the_reason_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendUnavailable, match="torch is not installed: pip install") as caught:
        backend_class(name).probe()
    assert caught.value.backend == name


def test_reasons_why_there_is_no_gpu() -> None:
    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old.\nPlease update")

    cpu_only = SimpleNamespace(__version__="2.9.0+cpu", version=SimpleNamespace(cuda=None))
    with pytest.raises(BackendUnavailable, match=r"2\.9\.0\+cpu\) is built without CUDA"):
        check_gpu(cpu_only)
    old = SimpleNamespace(
        version=SimpleNamespace(cuda="12.6"), cuda=SimpleNamespace(init=fail), __version__="2.9.0"
    )
    with pytest.raises(BackendUnavailable) as caught:
        check_gpu(old)
    assert caught.value.reason == "no usable GPU: The NVIDIA driver on your system is too old"


def test_the_version_says_what_slows_a_gpu_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert triton_version() == "no Triton" or triton_version().endswith("without a C compiler")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert triton_version() == "no Triton"


def test_what_shares_the_memory_of_the_machine(tmp_path: Path) -> None:
    tree = tmp_path / "compatible"
    assert not is_integrated(SimpleNamespace(is_integrated=0), tree)
    assert is_integrated(SimpleNamespace(is_integrated=1), tree)
    tree.write_bytes(b"nvidia,p3768-0000+p3767-0003\0nvidia,tegra234\0")
    assert is_integrated(SimpleNamespace(), tree)
    tree.write_bytes(b"raspberrypi,5-model-b\0brcm,bcm2712\0")
    assert not is_integrated(SimpleNamespace(is_integrated=0), tree)


def test_a_device_with_memory_of_its_own_is_profiled_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = classmethod(lambda _: (6 << 30, 8 << 30))
    monkeypatch.setattr(TorchCpuBackend, "memory_bytes", own)
    profile = profile_device(backend="torch_cpu", cache_dir=tmp_path, threads=1)
    assert profile.backend == "torch_cpu"
    assert profile.memory_total_bytes == 8 << 30
    assert 5 << 30 < profile.memory_bytes < 6 << 30


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("name", ["opt-post", "llama-linear", "mistral", "qwen3"])
def test_half_precision(
    name: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU computes in, here by the CPU."""
    monkeypatch.setattr(torch_stage, "compute_dtype", lambda *_, **__: torch.float16)
    spec, artifacts = stored_model(tmp_path, name, bits)
    stage = TorchCpuBackend().load(spec, artifacts, OPTIONS)
    check(stage_logits(stage, tokens(spec, 20)), reference(spec, artifacts, 20), HALF_TOLERANCE)
    stage.close()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["opt-post", "mistral", "qwen3"])
def test_a_token_pass_asks_the_host_for_nothing(name: str, count: int, tmp_path: Path) -> None:
    """A graph cannot contain what depends on values: with fake tensors, which have none, it fails.

    They also refuse operands on different devices and of types that do not go together.
    """
    spec, artifacts = stored_model(tmp_path, name, 4)
    stage = TorchCpuBackend().load(spec, artifacts, replace(OPTIONS, slots=count))
    width = spec.embed_dim
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        places = torch.arange(count)
        rows = TokenPass(places, places, 16, 0 if count == 1 else None)
        result = stage._token_pass(torch.zeros((count, width)), rows)
        assert result.shape == (count, spec.vocab)
        with pytest.raises(DataDependentOutputException):
            bool(result.sum() > 0)
    stage.close()


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("name", ["opt-post", "llama", "qwen3"])
def test_half_precision_on_a_gpu(gpu: Backend, name: str, bits: int, tmp_path: Path) -> None:
    spec, artifacts = stored_model(tmp_path, name, bits)
    stage = gpu.load(spec, artifacts, replace(OPTIONS, exact=False))
    check(
        stage_logits(stage, tokens(spec, 30)), reference(spec, artifacts, 30), STAGE_INT4_TOLERANCE
    )
    stage.close()


def test_without_graphs_a_gpu_gives_the_same(
    gpu: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec, artifacts = stored_model(tmp_path, "llama", 8)

    def refuse() -> None:
        raise RuntimeError("capture refused")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    stage = gpu.load(spec, artifacts, OPTIONS)
    assert "without CUDA graphs" in caplog.text
    check(stage_logits(stage, tokens(spec, 9)), reference(spec, artifacts, 9), 1e-5)
    stage.close()


def test_on_a_gpu_stages_of_a_process_capture_at_any_time(
    gpu: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of three threads loads a stage, captures graphs of several lengths, and closes it."""
    monkeypatch.setattr(torch_tokens, "SHORTEST_LENGTH", 4)
    spec, artifacts = stored_model(tmp_path, "llama", 8)
    sequence, expected = tokens(spec, 24), reference(spec, artifacts, 24)
    start = threading.Barrier(3)

    def run() -> None:
        start.wait(60)
        for _ in range(2):
            stage = gpu.load(spec, artifacts, OPTIONS)
            check(stage_logits(stage, sequence), expected, 1e-5)
            stage.close()

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(run) for _ in range(3)]:
            done.result(120)
    assert "without CUDA graphs" not in caplog.text


def matrices(fmt: Format, rows: int, columns: int) -> list[QuantizedMatrix]:
    random = np.random.default_rng(fmt.bits)
    return [
        quantize(random.standard_normal((rows, columns)).astype(np.float32), fmt) for _ in range(2)
    ]


def values(stored: list[QuantizedMatrix]) -> Any:
    return np.concatenate([matrix.dequantize() for matrix in stored])


def stored_model(
    directory: Path, name: str, bits: int, scheme: Scheme = "rtn"
) -> tuple[ModelSpec, Artifacts]:
    checkpoint = Checkpoint.open(FIXTURES / name)
    spec = checkpoint.spec
    artifacts = [
        (
            block,
            write_artifact(
                directory, block, checkpoint.block(block), Format.of(bits, scheme, 32)
            ).path,
        )
        for block in range(spec.block_count)
    ]
    return spec, artifacts


def tokens(spec: ModelSpec, count: int) -> Any:
    return np.random.default_rng(1).integers(0, spec.vocab, count)


def reference(spec: ModelSpec, artifacts: Artifacts, count: int) -> Any:
    return ReferenceModel.from_artifacts(spec, artifacts, np.float64).forward(tokens(spec, count))


def stage_logits(stage: Any, sequence: Any) -> Any:
    """Logits of every row: the first half as a prompt of which only the last row shows, then
    token by token."""
    half = len(sequence) // 2
    rows = [np.full((half - 1, stage.forward(0, 0, sequence[:1]).shape[1]), np.nan, np.float32)]
    rows.append(stage.forward(0, 0, sequence[:half]))
    rows += [stage.forward(0, at, sequence[at : at + 1]) for at in range(half, len(sequence))]
    return np.concatenate(rows)


def check(actual: Any, expected: Any, tolerance: float) -> None:
    """Rows that are not NaN agree, relative to the largest logit."""
    shown = ~np.isnan(actual[:, 0])
    assert shown.any()
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual[shown], expected[shown], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1.0, torch.float16), (1e-7, torch.float32), (1e6, torch.float32)]
)
def test_weights_that_fp16_does_not_hold_stay_wide(scale: float, dtype: torch.dtype) -> None:
    drawn = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    stored = quantize(drawn * np.float32(scale), Format.of(16))
    weight = plain_weight([stored], torch.device("cpu"), torch.float16)
    assert weight.dtype == dtype
    np.testing.assert_allclose(weight.float().numpy(), stored.dequantize(), rtol=2**-11)


def test_small_weights_that_are_stored_as_fp16_stay_fp16() -> None:
    values = (np.arange(1, 33, dtype=np.float32) * np.float32(2**-24))[None]
    weight = plain_weight([quantize(values, Format.of(16))], torch.device("cpu"), torch.float16)
    assert weight.dtype == torch.float16
    np.testing.assert_array_equal(weight.float().numpy(), values)
