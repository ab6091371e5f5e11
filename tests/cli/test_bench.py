"""``shoal bench`` on a tiny shape through the real backend. Tests assert no speeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibration import speed
from calibration.speed import LOAD_SHARE, executed_formats, packed_bytes
from cli.errors import Unavailable
from cli.main import main
from cli.tables import fitting
from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.costs import kv_bytes
from model.quantize import Format
from tests.cli.test_tables import Recording, parsed

pytest.importorskip("onnxruntime")

from backends.base import BackendError, BackendUnavailable, Capabilities
from backends.onnx_cpu import OnnxCpuBackend

FIXTURES = Path(__file__).parents[1] / "fixtures"
FAST = ("--rounds=1", "--context=3,20", "--prompt=10", "--threads=1")


def test_every_width_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = str(FIXTURES / "llama" / "config.json")
    command = ["bench", f"--shape={shape}", "--bits=4,16", f"--directory={tmp_path}", *FAST]
    assert main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [run["bits"] for run in answer["runs"]] == [[4], [16]]
    for run in answer["runs"]:
        assert [decode["context"] for decode in run["decode"]] == [3, 20]
        assert all(decode["tokens_per_s"] > 0 for decode in run["decode"])
        assert run["prefill_tokens_per_s"] > 0
        assert run["load_s"] > 0
        assert run["load_again_s"] > 0
    assert list(tmp_path.iterdir()) == []
    assert main([*command, "--mixed", "--fast-prompts"]) == 0
    assert "4,16 bits" in capsys.readouterr().out


def test_exact_weights_are_read_as_floats(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = Checkpoint.open(FIXTURES / "llama").spec
    command = ["bench", f"--shape={FIXTURES / 'llama' / 'config.json'}", "--bits=4", *FAST]
    reads = {}
    for options in ((), ("--exact",)):
        assert main([*command, *options, "--json"]) == 0
        (run,) = json.loads(capsys.readouterr().out)["runs"]
        packed = sum(packed_bytes(spec, block, Format(4)) for block in range(spec.block_count))
        assert run["packed_bytes"] == packed
        reads[options] = [decode["read_bytes"] for decode in run["decode"]]
    table = packed_bytes(spec, 0, Format(4))
    floats = sum(packed_bytes(spec, k, Format.of(32)) for k in range(1, spec.block_count))
    cached = [
        sum(kv_bytes(spec, block, context) for block in range(spec.block_count))
        for context in (3, 20)
    ]
    assert reads[()] == [packed - table + read for read in cached]
    assert reads["--exact",] == [floats + read for read in cached]
    assert run["executed_bytes"] == table + floats
    # Room for the packed weights, not for the floats.
    free = int((packed + floats) / 2 / LOAD_SHARE) + cached[-1]
    monkeypatch.setattr(speed, "memory_bytes", lambda: (free, free))
    assert main([*command, "--json"]) == 0
    assert main([*command, "--exact"]) == 1
    assert "fewer bits, or a smaller shape" in capsys.readouterr().err


def test_a_backend_that_rounds_cannot_be_exact() -> None:
    class Rounding(OnnxCpuBackend):
        @classmethod
        def probe(cls) -> Capabilities:
            return Capabilities("rounding", "1", {8: 8}, exact_container_bits={})

    formats = [Format(8)] * 2
    assert executed_formats(Rounding(), formats, exact=False) == (Format(8),) * 2
    with pytest.raises(BackendError, match="rounding does not run 8 bits exactly: it runs none"):
        executed_formats(Rounding(), formats, exact=True)
    with pytest.raises(BackendError, match="does not run 4 bits: it runs 8"):
        executed_formats(Rounding(), [Format(4)], exact=False)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--shape=nothing",), "known are"),
        (("--bits=7",), "only 2, 3"),
        (("--context=99999999",), "ask for fewer"),
    ],
)
def test_what_cannot_be_measured_is_said(
    arguments: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) != 0
    error = capsys.readouterr().err
    assert reason in error
    assert "Traceback" not in error


@pytest.mark.parametrize("fmt", [Format(4), Format(3, symmetric=True), Format.of(16)], ids=str)
def test_packed_bytes_are_the_stored_ones_with_wider_scales(fmt: Format, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "qwen3")
    spec = checkpoint.spec
    for block in range(spec.block_count):
        artifact = write_artifact(tmp_path, block, checkpoint.block(block), fmt)
        matrices = [shape for shape in spec.block_tensors(block).values() if len(shape) == 2]
        groups = sum(rows * fmt.groups(width) for rows, width in matrices) if fmt.group_size else 0
        assert packed_bytes(spec, block, fmt) == artifact.payload_bytes + 2 * groups


def test_its_table_is_whole_on_a_narrow_terminal() -> None:
    shape = str(FIXTURES / "llama" / "config.json")
    screen = Recording()
    options = parsed("bench", f"--shape={shape}", "--bits=4,8", "--mixed", *FAST)
    options.run(options, screen)
    screen.check()
    (table, _), *_ = screen.tables
    for width in (80, 60):
        assert len(fitting(table, width)) == 1


@pytest.mark.parametrize("command", [("bench",), ("calibrate", "--shape=llama-1b")])
def test_a_backend_that_is_not_here_ends_as_what_is_missing(
    command: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def probe() -> Capabilities:
        raise BackendUnavailable("onnx_cpu", "its library is broken")

    monkeypatch.setattr(OnnxCpuBackend, "probe", staticmethod(probe))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main([*command, "--backend=onnx_cpu"]) == Unavailable.exit_code
    error = capsys.readouterr().err
    assert "onnx_cpu is not available: its library is broken; `shoal doctor` says how" in error
