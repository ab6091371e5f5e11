"""Options that are wrong or would change nothing are told at once, before any long work."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.errors import EXIT_USAGE
from cli.main import main

ROOT = Path(__file__).parents[2]
LLAMA = str(ROOT / "tests" / "fixtures" / "llama")
LAB = f"--devices={ROOT / 'examples' / 'labs' / 'home-4-pis.yaml'}"
NOBODY = "--url=http://127.0.0.1:9"

KNOWN = "'abacus': expected one of edgetpu, onnx_cpu, tflite_cpu, torch_cpu, torch_cuda"

WRONG = [
    (["agent", "--insecure", "--backend=abacus"], KNOWN),
    (["calibrate", "--backend=abacus"], KNOWN),
    (["bench", "--backend=abacus"], KNOWN),
    (["calibrate", "--plot=roof.png"], "end the name in .svg"),
    (["trace", NOBODY, "--svg=way.png"], "end the name in .svg"),
    (["plan", LLAMA, LAB, "--plot=plan.png"], "end the name in .svg"),
    (["plan", LLAMA, LAB, "--plot=none/plan.svg"], "there is no folder none: make it"),
    (["plan", LLAMA, NOBODY, "--save=none/plan.json"], "there is no folder none: make it"),
    (["plan", LLAMA, NOBODY, "--save=."], "'.' is a folder: name a file in it"),
    (["coordinator", "export", "none/x.tar"], "there is no folder none: make it"),
    (["plan", LLAMA, LAB, "--scheme-text=none"], "--scheme-text none: no such file or directory"),
    (["plan", LLAMA, LAB, "--repair=2c"], "--repair goes with --formulation dilemma"),
    (["plan", LLAMA, LAB, "--seed=3"], "--seed goes with --simulate N"),
    (["calibrate", "--bits=4"], "--bits is about layers: name a --model or a --shape"),
    (["calibrate", "--full"], "--full is about layers: name a --model or a --shape"),
    (["calibrate", "--text=mine.txt"], "--text goes with --quality"),
    (["calibrate", "--check-plans=3"], "--check-plans goes with --quality"),
    (["calibrate", "--quality", NOBODY], "--url goes with --on NAME"),
    (["calibrate", "--quality", "--sustain=9s"], "--sustain does not go with --quality"),
    (["calibrate", "--quality", "--on=auto", "--backend=torch_cpu"], "--backend does not go with"),
    (["calibrate", "--quality", "--on=auto"], "it needs --model"),
    (
        ["chat", NOBODY],
        "a chat is held on a terminal: without one, `shoal run MODEL PROMPT` answers",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: str(value)[-40:])
def test_a_wrong_option_is_told_at_once(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    try:
        code = main(arguments)
    except SystemExit as usage:
        code = int(usage.code or 0)
    error = " ".join(capsys.readouterr().err.split())
    assert (code, message in error) == (EXIT_USAGE, True), error
    assert list(tmp_path.iterdir()) == []


def test_a_setting_names_the_backends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "agent.toml"
    settings.write_text('backend = "abacus"\n')
    assert main(["agent", f"--config={settings}"]) == EXIT_USAGE
    assert f"{settings}: backend: {KNOWN}" in " ".join(capsys.readouterr().err.split())
