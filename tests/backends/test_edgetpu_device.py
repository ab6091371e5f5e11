"""The whole way to a chip: found in sysfs, compiled for, tried in a child, run by a delegate."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from backends import edgetpu, edgetpu_compiler, edgetpu_devices
from backends.base import Artifacts, BackendError, BackendUnavailable, StageOptions
from backends.edgetpu import (
    ON_CHIP_BYTES,
    EdgeTpuBackend,
    Int8Stage,
    ProductFile,
    TfliteCpuBackend,
)
from backends.edgetpu_compiler import Compiler, compile_files, find_compiled, find_compiler
from backends.edgetpu_devices import choose_target, find_devices
from backends.edgetpu_runtime import RUNTIMES, Engine, find_runtime
from backends.edgetpu_tflite import fully_connected
from calibration.layers import Task, timed_layers
from cli.main import main
from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.quantize import Format
from model.spec import ModelSpec
from tests.backends.fake_edgetpu.stand_ins import build_library, usb_device, write_compiler

TINY_OPT = Path(__file__).parents[2] / "examples" / "tiny-opt" / "model"
OPTIONS = StageOptions(slots=2, context_tokens=64, threads=1)

Model = tuple[ModelSpec, list[tuple[int, Path]]]
Shoal = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake libedgetpu, built."""
    return build_library(tmp_path_factory.mktemp("library"))


@pytest.fixture
def chip(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with one Edge TPU on USB and no compiler; returns where compiled files are kept."""
    usb_device(tmp_path / "root", "2-1", "18d1", "9302", "5000")
    monkeypatch.setattr(EdgeTpuBackend, "root", tmp_path / "root")
    monkeypatch.setattr(edgetpu, "_checked", set())
    monkeypatch.setenv("SHOAL_LIBEDGETPU", str(library))
    monkeypatch.setenv("SHOAL_EDGETPU_DIR", str(tmp_path / "compiled"))
    return tmp_path / "compiled"


@pytest.fixture
def compiler(chip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """The same machine with a compiler on its PATH."""
    monkeypatch.setenv("PATH", str(write_compiler(tmp_path / "bin")), prepend=":")
    found = find_compiler()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The demo model's first three layers."""
    checkpoint, directory = Checkpoint.open(TINY_OPT), tmp_path_factory.mktemp("blocks")
    return checkpoint.spec, [
        (block, write_artifact(directory, block, checkpoint.block(block), Format.of(8)).path)
        for block in (1, 2, 3)
    ]


# ---- finding -------------------------------------------------------------------------------------


def test_devices_are_found_before_and_after_their_firmware(tmp_path: Path) -> None:
    usb_device(tmp_path, "1-1", "1d6b", "0002", "480")
    usb_device(tmp_path, "1-1.2", "1a6e", "089a", "480")
    usb_device(tmp_path, "2-1", "18d1", "9302", "5000")
    (tmp_path / "sys/bus/usb/devices/usb1").mkdir()
    (tmp_path / "dev").mkdir()
    for node in ("apex_0", "apex_1", "null"):
        (tmp_path / "dev" / node).touch()
    devices = find_devices(tmp_path)
    assert [device.device for device in devices] == ["usb:0", "usb:1", "pci:0", "pci:1"]
    assert "no firmware yet" in devices[0].note
    assert "USB 2" in devices[0].note
    assert devices[1].note == "2-1, ready, 5000 Mbit/s"
    assert devices[3].note == "/dev/apex_1"


def test_several_chips_are_several_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="no Edge TPU"):
        choose_target(tmp_path)
    usb_device(tmp_path, "2-1", "18d1", "9302")
    usb_device(tmp_path, "2-2", "18d1", "9302")
    assert choose_target(tmp_path).device == "usb:0"
    monkeypatch.setenv("SHOAL_EDGETPU_DEVICE", "usb:1")
    assert choose_target(tmp_path).device == "usb:1"
    monkeypatch.setenv("SHOAL_EDGETPU_DEVICE", "pci:0")
    with pytest.raises(BackendError, match=r"pci:0 is not there: found usb:0 \(2-1, ready\)"):
        choose_target(tmp_path)


# ---- the library ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("chip")
def test_a_chip_that_opens_is_available() -> None:
    capabilities = EdgeTpuBackend.probe()
    assert capabilities.backend == "edgetpu"
    assert capabilities.version.endswith("usb:0")
    assert set(capabilities.container_bits) == {8}
    assert capabilities.on_chip_bytes == ON_CHIP_BYTES
    assert TfliteCpuBackend.probe().backend == "tflite_cpu"
    assert TfliteCpuBackend.probe().on_chip_bytes is None


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("FAKE_EDGETPU", "null", r"cannot open Edge TPU usb:0 \(no such device\): another process"),
        ("SHOAL_LIBEDGETPU", "/nowhere.so", r"^/nowhere\.so cannot be loaded .* install libedget"),
        ("SHOAL_LIBEDGETPU", "libm.so.6", r"^libm\.so\.6 is not libedgetpu: .*tflite_plugin"),
    ],
)
@pytest.mark.usefixtures("chip")
def test_a_chip_that_cannot_be_used_says_why(
    variable: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(BackendUnavailable) as caught:
        EdgeTpuBackend.probe()
    assert caught.value.backend == "edgetpu"
    with pytest.raises(BackendError, match=reason):
        raise BackendError(caught.value.reason)


@pytest.mark.usefixtures("chip")
def test_a_device_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_EDGETPU", "hang")
    target = choose_target(EdgeTpuBackend.root)
    with pytest.raises(BackendError, match=r"did not answer within 0\.5 s: unplug it"):
        edgetpu_devices.check_in_child(find_runtime(), target, timeout_s=0.5)


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("crash", r"crashed \(SIGSEGV\) with .*: it was built for another version"),
        ("wrong", "computes something else than the CPU"),
        ("none", "cannot run a product on Edge TPU usb:0: .*edgetpu-custom-op"),
    ],
)
@pytest.mark.usefixtures("compiler")
def test_a_library_that_fails_at_the_first_product_takes_no_agent_down(
    mode: str, reason: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_EDGETPU", mode)
    # Opening the device reveals nothing.
    assert EdgeTpuBackend.probe().backend == "edgetpu"
    spec, artifacts = model
    with pytest.raises(BackendError, match=reason):
        EdgeTpuBackend().load(spec, artifacts[:1], OPTIONS)


# ---- running -------------------------------------------------------------------------------------


def outputs(stage: Int8Stage) -> list[npt.NDArray[np.float32]]:
    rows = np.random.default_rng(0).standard_normal((12, 128)).astype(np.float32)
    with closing(stage):
        return [
            stage.forward(0, 0, rows[:9]),
            stage.forward(1, 0, rows[9:]),
            stage.decode([1, 0], [3, 9], rows[:2]),
        ]


def assert_alike(
    actual: Sequence[npt.NDArray[np.float32]], expected: Sequence[npt.NDArray[np.float32]]
) -> None:
    for rows, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(rows, wanted, atol=0.02 * np.abs(wanted).max())


@pytest.mark.usefixtures("compiler")
def test_the_chip_computes_what_the_cpu_does(model: Model) -> None:
    expected = outputs(TfliteCpuBackend().load(*model, OPTIONS))
    assert_alike(outputs(EdgeTpuBackend().load(*model, OPTIONS)), expected)


@pytest.mark.usefixtures("chip")
def test_a_delegate_may_claim_plain_files_too(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what libedgetpu does, but the same interface: every product through a delegate."""
    monkeypatch.setenv("FAKE_EDGETPU", "fc")
    runtime, target = find_runtime(), choose_target(EdgeTpuBackend.root)

    def engines(files: Sequence[ProductFile]) -> list[Engine]:
        return [Engine(runtime, file.path, target, 1) for file in files]

    expected = outputs(TfliteCpuBackend().load(*model, OPTIONS))
    assert_alike(outputs(edgetpu._load(*model, OPTIONS, engines)), expected)


def test_compiled_files_serve_a_machine_without_a_compiler(
    compiler: Compiler, chip: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = outputs(EdgeTpuBackend().load(*model, OPTIONS))
    assert len(list(chip.glob(f"*-{compiler.version}/*.tflite"))) == 3 * 4
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_compiler() is None
    again = outputs(EdgeTpuBackend().load(*model, OPTIONS))
    for rows, wanted in zip(again, first, strict=True):
        np.testing.assert_array_equal(rows, wanted)
    # Another run of layers is another stage.
    spec, artifacts = model
    with pytest.raises(BackendError, match=r"layers 1 to 2 are not compiled .* --layers 1:3 -o"):
        EdgeTpuBackend().load(spec, artifacts[1:], OPTIONS)


@pytest.mark.parametrize("tampered", [None, 5])
def test_a_machine_without_a_compiler_uses_only_what_is_right_of_others(
    tampered: int | None, compiler: Compiler, chip: Path, model: Model, tmp_path: Path
) -> None:
    spec, artifacts = model
    expected = outputs(EdgeTpuBackend().load(spec, artifacts, OPTIONS))
    elsewhere, asked = tmp_path / "elsewhere", []

    def supplier(spec: ModelSpec, wanted: Artifacts) -> list[Path]:
        asked.append([block for block, _ in wanted])
        files = EdgeTpuBackend.make_files(spec, wanted, elsewhere, lambda: None)
        if tampered is not None:
            files[tampered] = files[tampered + 4]
        return files

    assert EdgeTpuBackend.maker() == f"{compiler.version}-1"
    shutil.rmtree(chip)
    with pytest.MonkeyPatch.context() as patch:
        # The supplier runs where the compiler is.
        patch.setattr(edgetpu, "_compiled", lambda files: None)
        backend = EdgeTpuBackend()
        backend.supplier = supplier
        if tampered is None:
            assert_alike(outputs(backend.load(spec, artifacts, OPTIONS)), expected)
        else:
            with pytest.raises(BackendError, match="computes something else than the CPU"):
                backend.load(spec, artifacts, OPTIONS)
    assert asked == [[1, 2, 3]]
    assert not chip.exists()


# ---- compiling -----------------------------------------------------------------------------------


def product_file(directory: Path, name: str = "a", seed: int = 0) -> Path:
    codes = np.random.default_rng(seed).integers(-127, 128, (64, 32)).astype(np.int8)
    path = directory / f"{name}.tflite"
    path.write_bytes(fully_connected(codes, np.full(64, 1e-3, np.float32)).content)
    return path


def test_compiling_is_done_once(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, directory = [product_file(tmp_path, "a"), product_file(tmp_path, "b", 1)], tmp_path / "c"
    first = compile_files(compiler, files, directory)
    assert compiler.version == "16.0.384591198"
    assert {path.parent.name.partition("-")[2] for path in first.files} == {compiler.version}
    assert first.streamed_bytes == 0
    monkeypatch.setenv("FAKE_COMPILER", "refuse")
    assert compile_files(compiler, files, directory) == first
    assert find_compiled(directory, files, None) == first
    assert find_compiled(directory, files[::-1], None) is None
    assert find_compiled(directory, files, "17") is None
    assert not list(directory.glob(".*"))


def test_damaged_files_are_compiled_again(compiler: Compiler, tmp_path: Path) -> None:
    files, directory = [product_file(tmp_path)], tmp_path / "compiled"
    (compiled,) = compile_files(compiler, files, directory).files
    whole = compiled.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), b"", whole[:-1]):
        compiled.write_bytes(damaged)
        assert find_compiled(directory, files, None) is None
        assert compile_files(compiler, files, directory).files[0].read_bytes() == whole


@pytest.mark.usefixtures("compiler")
def test_what_does_not_fit_on_the_chip_is_told(
    model: Model, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_COMPILER_ON_CHIP", "100000")
    EdgeTpuBackend().load(*model, OPTIONS).close()
    assert "0.5 MB of layers 0 to 2 do not fit on the chip" in caplog.text


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("refuse", "edgetpu_compiler failed: Internal compiler error"),
        ("unmapped", "mapped no operator of .*a.tflite to the Edge TPU"),
        ("silent", "wrote no output for .*a.tflite"),
    ],
)
def test_a_compiler_that_does_not_do_it(
    mode: str, reason: str, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_COMPILER", mode)
    with pytest.raises(BackendError, match=reason):
        compile_files(compiler, [product_file(tmp_path)], tmp_path / "compiled")
    assert not list((tmp_path / "compiled").iterdir())


@pytest.mark.usefixtures("compiler")
def test_a_compiler_ends_with_what_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, held = tmp_path / "bin" / "edgetpu_compiler", tmp_path / "held"
    os.mkfifo(held)
    version = "[ $1 = --version ] && echo version 1 && exit"
    script.write_text(f"#!/bin/sh\n{version}\nsleep 60 > {held}\n")
    monkeypatch.setattr(edgetpu_compiler, "TICK_S", 0.01)
    running = threading.Event()

    class Cancelled(Exception):
        pass

    def tick() -> None:
        if running.is_set():
            raise Cancelled

    def read() -> None:
        with held.open("rb") as pipe:
            running.set()
            pipe.read()

    compiler = find_compiler()
    assert compiler is not None
    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    with pytest.raises(Cancelled):
        compile_files(compiler, [product_file(tmp_path)], tmp_path / "compiled", tick)
    # Reading ends when nothing that was started holds the other end.
    reading.join(60)
    assert not reading.is_alive()
    assert not list((tmp_path / "compiled").iterdir())


def test_another_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "edgetpu_compiler"
    script.write_text("#!/bin/sh\necho hello\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(BackendError, match="does not say its version"):
        find_compiler()


# ---- runtimes ------------------------------------------------------------------------------------


def fake_module(directory: Path, name: str, content: str = "") -> None:
    """A module of a package that is not installed, and the package's metadata."""
    package = name.partition(".")[0]
    path = directory / Path(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    info = directory / f"{package}-2.14.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.14.0\n")


litert_alone = pytest.mark.skipif(
    importlib.util.find_spec("tflite_runtime") is not None
    or importlib.util.find_spec("ai_edge_litert") is None,
    reason="made for an installation with ai-edge-litert alone",
)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that modules are imported from first."""
    for name in ("tflite_runtime", "tflite_runtime.interpreter", "pycoral", "pycoral.utils"):
        # Set, so that it is taken out again at the end; then absent.
        monkeypatch.setitem(sys.modules, name, sys)
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def without_litert(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(RUNTIMES, "ai-edge-litert", "not_installed.interpreter")
    return site


@litert_alone
@pytest.mark.usefixtures("without_litert")
def test_no_runtime_says_what_to_install() -> None:
    with pytest.raises(BackendError, match=r"neither ai-edge-litert nor .*shoal-llm\[coral\]"):
        find_runtime()


@litert_alone
def test_a_runtime_for_another_numpy_is_no_crash(without_litert: Path) -> None:
    fake_module(without_litert, "tflite_runtime.interpreter", "raise SystemError('bad numpy')")
    with pytest.raises(BackendError, match=r"tflite-runtime cannot be imported \(bad numpy\)"):
        find_runtime()


@litert_alone
@pytest.mark.usefixtures("library")
def test_googles_pycoral_prefers_the_runtime_that_it_came_with(site: Path) -> None:
    fake_module(site, "tflite_runtime.interpreter")
    assert find_runtime(edge_tpu=True).name == "ai-edge-litert"
    # The package index has another project of this name, without the module.
    fake_module(site, "pycoral.cli")
    assert find_runtime(edge_tpu=True).name == "ai-edge-litert"
    sys.modules.pop("pycoral", None)
    fake_module(site, "pycoral.utils.edgetpu")
    assert str(find_runtime(edge_tpu=True)) == "tflite-runtime 2.14.0"
    assert find_runtime().name == "ai-edge-litert"


# ---- by hand -------------------------------------------------------------------------------------


@pytest.fixture
def shoal(capsys: pytest.CaptureFixture[str]) -> Shoal:
    """Run one command; its exit code and what it printed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.mark.usefixtures("compiler")
def test_compile_and_check_by_hand(
    chip: Path, tmp_path: Path, model: Model, shoal: Shoal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the machine with the compiler, then on the device, to which the directory was copied."""
    monkeypatch.setattr("backends.edgetpu_bench.SHAPES", ((96, 64), (64, 160)))
    monkeypatch.setattr("calibration.layers.MAX_TIMED_LAYERS", 2)
    monkeypatch.setattr("calibration.layers._MIN_TIME_S", 0.0)
    made = tmp_path / "made"
    code, out, _ = shoal(
        "edgetpu", "compile", str(TINY_OPT), "--layers=0:3", f"--out={made}", "--json"
    )
    assert code == 0
    answer = json.loads(out)
    assert answer["stages"][0] == {"stage": "layers 0 to 2", "files": 12, "streamed_bytes": 0}
    monkeypatch.setenv("PATH", "/nowhere")
    made.rename(chip)
    EdgeTpuBackend().load(*model, OPTIONS).close()
    monkeypatch.setattr("cli.commands.edgetpu.ROOT", EdgeTpuBackend.root)
    code, out, _ = shoal("edgetpu", "check", "--json")
    assert code == 0
    checked = json.loads(out)
    assert checked["device"] == "usb:0"
    assert [product["shape"] for product in checked["products"]] == [[96, 64], [64, 160]]
    assert all(product["one_row_s"] > 0 for product in checked["products"])
    code, out, _ = shoal("edgetpu", "check")
    assert code == 0
    assert "found usb:0 (2-1, ready, 5000 Mbit/s)" in out
    assert "64 x 160" in out


@pytest.mark.usefixtures("chip")
def test_commands_that_cannot_work_say_why(shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert shoal("edgetpu", "compile")[0] == 2
    code, _, err = shoal("edgetpu", "compile", str(TINY_OPT))
    assert code == 1
    assert "edgetpu_compiler is not on PATH" in err
    code, _, err = shoal("edgetpu", "check")
    assert code == 1
    assert "no Edge TPU on USB" in err
    monkeypatch.setattr("cli.commands.edgetpu.ROOT", EdgeTpuBackend.root)
    code, _, err = shoal("edgetpu", "check")
    assert code == 1
    assert "has no compiled product to run" in err


def test_layers_are_timed_as_a_plan_may_use_them() -> None:
    spec = Checkpoint.open(TINY_OPT).spec
    task = Task("layer", 0, 8, 8, (8,))
    layer_bytes = 4 * 128 * 128 + 2 * 128 * 512
    for on_chip_bytes, layers in ((None, 8), (3 * layer_bytes, 3), (layer_bytes - 1, 1)):
        timed = timed_layers(spec, task, on_chip_bytes)
        assert timed is not None
        assert len(timed.layers) == layers
