"""``shoal bench`` on a tiny shape through the real backend: which figures there are, not what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibration.speed import packed_bytes
from cli.main import main
from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.quantize import Format

pytest.importorskip("onnxruntime")

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
    assert main([*command, "--mixed", "--exact", "--memory=1G"]) == 0
    assert "4,16 bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--shape=nothing",), "known are"),
        (("--bits=7",), "only 2, 3"),
        (("--context=99999999",), "ask for fewer"),
        (("--backend=abacus",), "abacus"),
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
